//! What is remembered, and when it stops being believed; service keys.

use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;

use super::*;
use crate::tenant::directory::Ask;

/// A catalog that knows at most one key and counts the questions.
#[derive(Default)]
struct Catalog {
    key: Mutex<Option<Result<ServiceKey, Absent>>>,
    asked: AtomicUsize,
}

fn with_catalog() -> (Arc<Verifier>, Arc<Catalog>) {
    let (directory, mut asks) = Directory::new();
    let catalog = Arc::new(Catalog::default());
    let config = Config { hs256_secret: Some(Secret::new(SECRET)), ..Config::new(ISSUER) };
    let verifier = Arc::new(Verifier::new(&config, directory).expect("a good configuration"));
    let answering = Arc::clone(&catalog);
    tokio::spawn(async move {
        while let Some(Ask::Key(hash, answer)) = asks.recv().await {
            answering.asked.fetch_add(1, Ordering::SeqCst);
            let found = answering.key.lock().clone().unwrap_or(Err(Absent::Unknown));
            let _ = answer
                .send(found.and_then(|key| if key.hash == hash { Ok(Arc::new(key)) } else { Err(Absent::Unknown) }));
        }
    });
    (verifier, catalog)
}

fn record(key: &service_key::NewKey, expires_at: Option<SystemTime>) -> Option<Result<ServiceKey, Absent>> {
    let org = OrgId::parse("acme").expect("an id");
    Some(Ok(ServiceKey { hash: key.hash(), org, user: "reports".into(), expires_at }))
}

#[tokio::test]
async fn a_service_key_is_asked_for_once_and_forgotten_when_revoked() {
    let (verifier, catalog) = with_catalog();
    let key = service_key::mint().expect("randomness");
    *catalog.key.lock() = record(&key, None);
    for _ in 0..3 {
        let identity = verifier.verify(key.reveal().as_bytes()).await.expect("accepted");
        assert_eq!((identity.org.as_str(), identity.user.as_deref()), ("acme", Some("reports")));
        assert!(matches!(identity.proof, Proof::ServiceKey(hash) if hash == key.hash()));
        assert!(identity.subject.starts_with("key:") && !key.reveal().contains(&identity.subject[4..]));
    }
    assert_eq!(catalog.asked.load(Ordering::SeqCst), 1);
    *catalog.key.lock() = None;
    assert_eq!(fault(&verifier, key.reveal()).await, None, "still remembered");
    verifier.forget_key(&key.hash());
    for _ in 0..3 {
        assert_eq!(fault(&verifier, key.reveal()).await, Some(TokenFault::UnknownServiceKey));
    }
    assert_eq!(catalog.asked.load(Ordering::SeqCst), 2, "a refusal is remembered too");
    *catalog.key.lock() = record(&key, None);
    verifier.forget_key(&key.hash());
    assert_eq!(fault(&verifier, key.reveal()).await, None, "made again");
}

#[tokio::test]
async fn an_expired_service_key_is_unknown() {
    let (verifier, catalog) = with_catalog();
    let key = service_key::mint().expect("randomness");
    *catalog.key.lock() = record(&key, Some(SystemTime::now() - Duration::from_secs(1)));
    assert_eq!(fault(&verifier, key.reveal()).await, Some(TokenFault::UnknownServiceKey));
    // Remembered as good, it still ends at its time.
    *catalog.key.lock() = record(&key, Some(SystemTime::now() + Duration::from_millis(40)));
    assert_eq!(fault(&verifier, key.reveal()).await, None);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(fault(&verifier, key.reveal()).await, Some(TokenFault::UnknownServiceKey));
}

#[tokio::test]
async fn a_service_key_that_cannot_be_one_costs_no_question() {
    let (verifier, catalog) = with_catalog();
    for bad in ["dyk_", "dyk_short", "dyk_' OR 1=1 --", &format!("dyk_{}", "x".repeat(5000))] {
        assert_eq!(fault(&verifier, bad).await, Some(TokenFault::UnknownServiceKey), "{bad}");
    }
    assert_eq!(catalog.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_catalog_that_is_away_is_no_verdict_on_the_key() {
    let (verifier, catalog) = with_catalog();
    let key = service_key::mint().expect("randomness");
    *catalog.key.lock() = Some(Err(Absent::Unavailable));
    assert_eq!(verifier.verify(key.reveal().as_bytes()).await.err(), Some(Refusal::CatalogDown));
    *catalog.key.lock() = record(&key, None);
    assert_eq!(fault(&verifier, key.reveal()).await, None);
}

#[tokio::test]
async fn a_remembered_token_ends_at_its_expiry() {
    let (verifier, _catalog) = with_catalog();
    let claims = with(json!({"exp": unix_now() - 29}));
    let token = hs256(SECRET, HS, &claims);
    assert_eq!(fault(&verifier, &token).await, None, "within the leeway");
    let identity = verifier.verify(token.as_bytes()).await.expect("accepted");
    let left = identity.expires_at.expect("tokens end").duration_since(SystemTime::now()).unwrap_or_default();
    assert!(left <= Duration::from_secs(1), "{left:?}");
    tokio::time::sleep(left + Duration::from_millis(5)).await;
    assert_eq!(fault(&verifier, &token).await, Some(TokenFault::Expired));
}

#[tokio::test]
async fn a_remembered_token_is_the_same_value() {
    let (verifier, _folder) = verifier(None).await;
    let token = ISSUED_BY.es256(ES, &good().to_string());
    let first = verifier.verify(token.as_bytes()).await.expect("accepted");
    let second = verifier.verify(token.as_bytes()).await.expect("accepted");
    assert!(Arc::ptr_eq(&first, &second));
}

#[tokio::test]
async fn garbage_does_not_drive_good_results_out() {
    let config = Config { hs256_secret: Some(Secret::new(SECRET)), cache_size: 10, ..Config::new(ISSUER) };
    let verifier = Verifier::new(&config, Directory::new().0).expect("a good configuration");
    let good = hs256(SECRET, HS, &good().to_string());
    let first = verifier.verify(good.as_bytes()).await.expect("accepted");
    for n in 0..1000 {
        let forged = hs256("not the secret", HS, &with(json!({"n": n})));
        assert_eq!(fault(&verifier, forged).await, Some(TokenFault::Signature));
    }
    let again = verifier.verify(good.as_bytes()).await.expect("accepted");
    assert!(Arc::ptr_eq(&first, &again));
}
