//! Following the issuer's keys over real HTTP.

use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{Notify, mpsc::UnboundedReceiver},
};

use super::*;

/// An issuer's key address. What it answers can be changed; what it was asked is counted.
#[derive(Default)]
struct Server {
    status: Mutex<String>,
    body: Mutex<String>,
    fetches: AtomicUsize,
    /// While set, answers wait for `go`.
    held: std::sync::atomic::AtomicBool,
    go: Notify,
}

impl Server {
    async fn start(body: String) -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/jwks.json", listener.local_addr().expect("bound"));
        let server = Arc::new(Self { status: Mutex::new("200 OK".into()), body: Mutex::new(body), ..Self::default() });
        let serving = Arc::clone(&server);
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let server = Arc::clone(&serving);
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    let _ = socket.read(&mut request).await;
                    server.fetches.fetch_add(1, Ordering::SeqCst);
                    if server.held.load(Ordering::SeqCst) {
                        server.go.notified().await;
                    }
                    let (status, body) = (server.status.lock().clone(), server.body.lock().clone());
                    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n", body.len());
                    let _ = socket.write_all(format!("{head}location: /elsewhere\r\n\r\n{body}").as_bytes()).await;
                });
            }
        });
        (server, url)
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

fn keys(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

fn following(url: &str) -> Verifier {
    let config = Config { jwks_url: Some(url.into()), ..Config::new(ISSUER) };
    Verifier::new(&config, Directory::new().0).expect("a good configuration")
}

fn signed(issuer: &Issuer, kid: &str) -> String {
    issuer.es256(&format!(r#"{{"alg":"ES256","kid":"{kid}"}}"#), &good().to_string())
}

/// Waits until the refresher reports `wanted`.
async fn until<T: PartialEq>(reports: &mut UnboundedReceiver<T>, wanted: T) {
    let reported = async { while reports.recv().await.expect("the refresher runs") != wanted {} };
    tokio::time::timeout(Duration::from_secs(10), reported).await.expect("it is reported");
}

#[tokio::test]
async fn the_first_token_fetches_the_keys_and_the_next_ones_do_not() {
    let (server, url) = Server::start(ISSUED_BY.jwks()).await;
    let verifier = following(&url);
    assert_eq!(verifier.keys_age(), None);
    for _ in 0..20 {
        assert_eq!(fault(&verifier, signed(&ISSUED_BY, "es-1")).await, None);
    }
    assert_eq!(server.fetches(), 1);
    assert!(verifier.keys_age().is_some());
}

#[tokio::test]
async fn a_rotated_key_is_learned_from_the_first_token_that_names_it() {
    let next = Issuer::new();
    let (server, url) = Server::start(keys(&[ISSUED_BY.ec_jwk("old")])).await;
    let verifier = following(&url);
    verifier.reload().await;
    assert_eq!(fault(&verifier, signed(&next, "new")).await, Some(TokenFault::UnknownKey));
    *server.body.lock() = keys(&[next.ec_jwk("new"), ISSUED_BY.ec_jwk("old")]);
    assert_eq!(fault(&verifier, signed(&next, "new")).await, None);
    assert_eq!(fault(&verifier, signed(&ISSUED_BY, "old")).await, None, "the previous key is still trusted");
    assert_eq!(server.fetches(), 3);
}

#[tokio::test]
async fn made_up_key_ids_do_not_stampede_the_issuer() {
    let (server, url) = Server::start(ISSUED_BY.jwks()).await;
    let verifier = Arc::new(following(&url));
    verifier.reload().await;
    let tasks: Vec<_> = (0..1000)
        .map(|n| {
            let (verifier, token) = (Arc::clone(&verifier), signed(&ISSUED_BY, &format!("kid-{n}")));
            tokio::spawn(async move { fault(&verifier, token).await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.expect("no panic"), Some(TokenFault::UnknownKey));
    }
    assert!(server.fetches() <= 3, "{} fetches", server.fetches());
    assert_eq!(fault(&verifier, signed(&ISSUED_BY, "es-1")).await, None, "good tokens are not in the way");
}

#[tokio::test]
async fn one_fetch_serves_all_who_wait_even_if_the_first_leaves() {
    let (server, url) = Server::start(ISSUED_BY.jwks()).await;
    server.held.store(true, Ordering::SeqCst);
    let verifier = Arc::new(following(&url));
    let wait = |verifier: &Arc<Verifier>| {
        let verifier = Arc::clone(verifier);
        tokio::spawn(async move { fault(&verifier, signed(&ISSUED_BY, "es-1")).await })
    };
    let first = wait(&verifier);
    while server.fetches() == 0 {
        tokio::task::yield_now().await;
    }
    let others: Vec<_> = (0..50).map(|_| wait(&verifier)).collect();
    first.abort();
    tokio::task::yield_now().await;
    server.held.store(false, Ordering::SeqCst);
    server.go.notify_waiters();
    for other in others {
        assert_eq!(other.await.expect("no panic"), None);
    }
    assert_eq!(server.fetches(), 1);
}

#[tokio::test]
async fn a_failing_issuer_leaves_the_last_good_keys_in_force() {
    let (server, url) = Server::start(ISSUED_BY.jwks()).await;
    let verifier = following(&url);
    verifier.reload().await;
    let failures = [
        ("500 Internal Server Error", keys(&[])),
        ("302 Found", keys(&[])),
        ("200 OK", "<html>maintenance</html>".into()),
        ("200 OK", format!("{{\"keys\":[],\"pad\":\"{}\"}}", "x".repeat(65 * 1024))),
    ];
    for (status, body) in failures {
        *server.status.lock() = status.into();
        *server.body.lock() = body;
        let before = server.fetches();
        verifier.reload().await;
        assert_eq!(server.fetches(), before + 1, "a redirect is not followed");
        assert_eq!(fault(&verifier, signed(&ISSUED_BY, "es-1")).await, None);
    }
}

#[tokio::test]
async fn without_any_keys_the_answer_is_to_try_later() {
    let (server, url) = Server::start(String::new()).await;
    let verifier = following(&url);
    for _ in 0..20 {
        let answer = verifier.verify(signed(&ISSUED_BY, "es-1").as_bytes()).await;
        assert_eq!(answer.err(), Some(Refusal::CatalogDown));
    }
    assert!(server.fetches() <= 2, "{} fetches", server.fetches());
    *server.body.lock() = ISSUED_BY.jwks();
    verifier.reload().await;
    assert_eq!(fault(&verifier, signed(&ISSUED_BY, "es-1")).await, None, "and no refusal was remembered");
}

#[tokio::test]
async fn a_key_that_vanishes_takes_remembered_tokens_and_live_sessions_with_it() {
    let other = Issuer::new();
    let (server, url) = Server::start(keys(&[ISSUED_BY.ec_jwk("a"), other.ec_jwk("b")])).await;
    let verifier = Arc::new(following(&url));
    verifier.reload().await;
    let (by_a, by_b) = (signed(&ISSUED_BY, "a"), signed(&other, "b"));
    assert_eq!(fault(&verifier, &by_a).await, None);
    assert_eq!(fault(&verifier, &by_b).await, None);
    let (sender, mut lost) = tokio::sync::mpsc::unbounded_channel();
    let running = Arc::clone(&verifier);
    let refresher = tokio::spawn(async move {
        let revoked = |lost: &dyn Fn(Option<&str>) -> bool| {
            let _ = sender.send([lost(Some("a")), lost(Some("b")), lost(None)]);
        };
        running.run_refresher(revoked).await;
    });
    *server.body.lock() = keys(&[other.ec_jwk("b")]);
    verifier.reload().await;
    // The refresher may first report the set that was there when it started.
    until(&mut lost, [true, false, false]).await;
    assert_eq!(fault(&verifier, &by_a).await, Some(TokenFault::UnknownKey));
    assert_eq!(fault(&verifier, &by_b).await, None);
    // The same id with another key is another key.
    *server.body.lock() = keys(&[ISSUED_BY.ec_jwk("b")]);
    verifier.reload().await;
    until(&mut lost, [true, true, false]).await;
    assert_eq!(fault(&verifier, &by_b).await, Some(TokenFault::Signature));
    // And a refusal does not outlive the keys that it was concluded from.
    *server.body.lock() = keys(&[other.ec_jwk("b")]);
    verifier.reload().await;
    assert_eq!(fault(&verifier, &by_b).await, None);
    refresher.abort();
}

#[tokio::test]
async fn a_changed_key_file_is_read_again() {
    let (verifier, folder) = verifier(None).await;
    let verifier = Arc::new(verifier);
    let (sender, mut lost) = tokio::sync::mpsc::unbounded_channel();
    let running = Arc::clone(&verifier);
    let refresher = tokio::spawn(async move {
        let revoked = |lost: &dyn Fn(Option<&str>) -> bool| {
            let _ = sender.send(lost(Some("es-1")));
        };
        running.run_refresher(revoked).await;
    });
    let token = signed(&ISSUED_BY, "es-1");
    assert_eq!(fault(&verifier, &token).await, None);
    std::fs::write(folder.path().join("jwks.json"), "{ half").expect("writes");
    verifier.reload().await;
    assert_eq!(fault(&verifier, &token).await, None, "a damaged file changes nothing");
    std::fs::write(folder.path().join("jwks.json"), keys(&[ISSUED_BY.rsa_jwk("rs-1")])).expect("writes");
    until(&mut lost, true).await;
    assert_eq!(fault(&verifier, &token).await, Some(TokenFault::UnknownKey));
    refresher.abort();
}
