//! An issuer with real keys, and what is accepted. Hostile tokens stand in `hostile.rs`; following the issuer's keys
//! in `following.rs`; service keys in `known.rs`.

mod following;
mod hostile;
mod known;

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    encoding::AsDer,
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_SHA256,
        RSA_PSS_SHA256, RsaEncoding, RsaKeyPair, RsaPublicKeyComponents,
    },
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde_json::{Value, json};

use super::*;

pub const ISSUER: &str = "https://project.supabase.co/auth/v1";
pub const SECRET: &str = "a-development-secret-of-more-than-32-bytes";

/// Signing keys as an issuer has them, made once per test run.
pub struct Issuer {
    ec_pkcs8: Vec<u8>,
    ec: EcdsaKeyPair,
    rsa: RsaKeyPair,
}

pub static ISSUED_BY: LazyLock<Issuer> = LazyLock::new(Issuer::new);

impl Issuer {
    pub fn new() -> Self {
        let ec_pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())
            .expect("a P-256 key")
            .as_ref()
            .to_vec();
        let ec = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &ec_pkcs8).expect("the key just made");
        Self { ec_pkcs8, ec, rsa: RsaKeyPair::generate(KeySize::Rsa2048).expect("an RSA key") }
    }

    pub fn ec_jwk(&self, kid: &str) -> Value {
        let point = self.ec.public_key().as_ref();
        json!({
            "kid": kid, "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "key_ops": ["verify"], "ext": true,
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]),
        })
    }

    pub fn rsa_jwk(&self, kid: &str) -> Value {
        let parts = RsaPublicKeyComponents::<Vec<u8>>::from(self.rsa.public_key());
        json!({
            "kid": kid, "kty": "RSA", "alg": "RS256", "use": "sig",
            "n": URL_SAFE_NO_PAD.encode(parts.n), "e": URL_SAFE_NO_PAD.encode(parts.e),
        })
    }

    /// The set with both keys, as `es-1` and `rs-1`.
    pub fn jwks(&self) -> String {
        json!({"keys": [self.ec_jwk("es-1"), self.rsa_jwk("rs-1")]}).to_string()
    }

    /// The RSA public key as its PEM file: what the classic confusion attack signs with.
    pub fn rsa_pem(&self) -> String {
        let der = self.rsa.public_key().as_der().expect("a public key has a DER form");
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der.as_ref()))
    }

    pub fn es256(&self, header: &str, claims: &str) -> String {
        token(header, claims, |signed| self.ec.sign(&SystemRandom::new(), signed).expect("signs").as_ref().to_vec())
    }

    pub fn es256_der(&self, header: &str, claims: &str) -> String {
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &self.ec_pkcs8).expect("the same key");
        token(header, claims, |signed| key.sign(&SystemRandom::new(), signed).expect("signs").as_ref().to_vec())
    }

    pub fn rs256(&self, header: &str, claims: &str) -> String {
        self.rsa(&RSA_PKCS1_SHA256, header, claims)
    }

    pub fn ps256(&self, header: &str, claims: &str) -> String {
        self.rsa(&RSA_PSS_SHA256, header, claims)
    }

    fn rsa(&self, padding: &'static dyn RsaEncoding, header: &str, claims: &str) -> String {
        token(header, claims, |signed| {
            let mut signature = vec![0; self.rsa.public_modulus_len()];
            self.rsa.sign(padding, &SystemRandom::new(), signed, &mut signature).expect("signs");
            signature
        })
    }
}

pub fn token(header: &str, claims: &str, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = sign(signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

pub fn hs256(secret: &str, header: &str, claims: &str) -> String {
    mint::sign(&Secret::new(secret), header, claims)
}

pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// The claims of a good token.
pub fn good() -> Value {
    json!({
        "iss": ISSUER, "aud": "authenticated", "exp": unix_now() + 3600, "iat": unix_now(),
        "sub": "3b1f0f6e-6f0b-4b7e-9a5e-0d7c5c8f2a11", "role": "authenticated", "aal": "aal1",
        "session_id": "0c1d2e3f-4a5b-4c6d-8e7f-901234567890", "email": "ada@acme.example", "phone": "",
        "is_anonymous": false, "amr": [{"method": "password", "timestamp": unix_now()}],
        "app_metadata": {"provider": "email"}, "user_metadata": {"org_id": "globex"}, "org_id": "acme",
    })
}

/// The good claims with some replaced; `null` as replacement takes a claim out.
pub fn with(changes: Value) -> String {
    let mut claims = good();
    for (name, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => claims.as_object_mut().expect("an object").remove(name),
            value => claims.as_object_mut().expect("an object").insert(name.clone(), value.clone()),
        };
    }
    claims.to_string()
}

pub const ES: &str = r#"{"alg":"ES256","kid":"es-1","typ":"JWT"}"#;
pub const RS: &str = r#"{"alg":"RS256","kid":"rs-1","typ":"JWT"}"#;
pub const HS: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// A verifier that trusts [`ISSUED_BY`]'s keys from a file and, if told so, the shared secret. The folder holds the
/// file; dropping it takes the file away.
pub async fn verifier(secret: Option<&str>) -> (Verifier, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("jwks.json");
    std::fs::write(&file, ISSUED_BY.jwks()).expect("writes");
    let mut config = Config::new(ISSUER);
    config.jwks_file = Some(file);
    config.hs256_secret = secret.map(Secret::new);
    let verifier = Verifier::new(&config, Directory::new().0).expect("a good configuration");
    verifier.reload().await;
    (verifier, folder)
}

pub async fn fault(verifier: &Verifier, credential: impl AsRef<[u8]>) -> Option<TokenFault> {
    match verifier.verify(credential.as_ref()).await {
        Ok(_) => None,
        Err(Refusal::BadToken(fault)) => Some(fault),
        Err(other) => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn good_tokens_of_every_kind_are_accepted() {
    let (verifier, _folder) = verifier(Some(SECRET)).await;
    let claims = good().to_string();
    let kid_of_the_secret = r#"{"alg":"HS256","kid":"AbCdEfGh","typ":"JWT"}"#;
    for (kid, token) in [
        (Some("es-1"), ISSUED_BY.es256(ES, &claims)),
        (Some("rs-1"), ISSUED_BY.rs256(RS, &claims)),
        (None, hs256(SECRET, HS, &claims)),
        (None, hs256(SECRET, kid_of_the_secret, &claims)),
    ] {
        let identity = verifier.verify(token.as_bytes()).await.expect("accepted");
        assert_eq!((identity.org.as_str(), &*identity.subject), ("acme", "3b1f0f6e-6f0b-4b7e-9a5e-0d7c5c8f2a11"));
        assert!(identity.user.is_none());
        assert!(matches!(&identity.proof, Proof::Token(k) if k.as_deref() == kid), "{:?}", identity.proof);
    }
}

#[tokio::test]
async fn what_issuers_may_vary_is_accepted() {
    let (verifier, _folder) = verifier(None).await;
    let uuid = "018F3C2E-7B5A-7CC1-9A2F-0123456789AB";
    for (what, claims, org) in [
        ("aud as a list", with(json!({"aud": ["x", "authenticated"]})), "acme"),
        ("whole seconds written as a float", with(json!({"exp": (unix_now() + 60) as f64})), "acme"),
        ("nbf within the leeway", with(json!({"nbf": unix_now() + 20})), "acme"),
        ("expired within the leeway", with(json!({"exp": unix_now() - 20})), "acme"),
        ("amr as words", with(json!({"amr": ["password"]})), "acme"),
        ("the second path", with(json!({"org_id": null, "app_metadata": {"org_id": "initech"}})), "initech"),
        ("the first path wins", with(json!({"app_metadata": {"org_id": "initech"}})), "acme"),
        ("a UUID", with(json!({"org_id": uuid})), "018f3c2e-7b5a-7cc1-9a2f-0123456789ab"),
        ("the longest id", with(json!({"org_id": "x".repeat(48)})), &"x".repeat(48)),
    ] {
        let token = ISSUED_BY.es256(ES, &claims);
        let identity = verifier.verify(token.as_bytes()).await.unwrap_or_else(|refusal| panic!("{what}: {refusal:?}"));
        assert_eq!(identity.org.as_str(), org, "{what}");
    }
    let ignored = r#"{"alg":"ES256","kid":"es-1","jku":"https://evil.example/keys","x5u":"https://evil.example/c"}"#;
    assert_eq!(fault(&verifier, ISSUED_BY.es256(ignored, &good().to_string())).await, None);
}

#[tokio::test]
async fn a_development_token_has_the_claims_of_the_real_one() {
    let (verifier, _folder) = verifier(Some(SECRET)).await;
    let acme = OrgId::parse("acme").expect("an id");
    let (secret, sub) = (Secret::new(SECRET), mint::subject(&acme));
    let mint =
        || mint::token(&secret, ISSUER, "authenticated", &acme, &sub, Duration::from_secs(60), SystemTime::now());
    let identity = verifier.verify(mint().as_bytes()).await.expect("accepted");
    assert_eq!((identity.org.as_str(), &*identity.subject), ("acme", &*sub));
    let text = mint();
    let claims = URL_SAFE_NO_PAD.decode(text.split('.').nth(1).expect("three parts")).expect("base64");
    let claims: Value = serde_json::from_slice(&claims).expect("JSON");
    for (name, value) in good().as_object().expect("an object") {
        let same = std::mem::discriminant(value) == std::mem::discriminant(&claims[name]);
        assert!(same, "{name} is missing or of another type");
    }
    assert!(crate::tenant::is_uuid(claims["session_id"].as_str().expect("text")));
}

#[test]
fn a_faulty_configuration_names_every_fault() {
    let mut config = Config::new(ISSUER);
    assert!(config.check()[0].contains("needs one of"), "{:?}", config.check());
    config.jwks_url = Some("http://issuer.example/keys".into());
    config.hs256_secret = Some(Secret::new("short"));
    config.org_claims =
        ["user_metadata.org_id", "user_metadata", "email", "a.b", "app_metadata.a.b", "", "app_metadata"]
            .map(String::from)
            .to_vec();
    config.leeway = Duration::from_secs(301);
    config.cache_size = 0;
    config.roles.clear();
    let faults = config.check();
    assert_eq!(faults.len(), 12, "{faults:#?}");
    assert!(faults.iter().any(|fault| fault.contains("any user could be any tenant")));
    assert!(Verifier::new(&config, Directory::new().0).is_err());
    assert!(!format!("{config:?}").contains("short"), "the secret shows in Debug");
    for (url, good) in [
        ("https://issuer.example/keys", true),
        ("http://127.0.0.1:1/keys", true),
        ("http://[::1]:1/keys", true),
        ("http://localhost/keys", true),
        ("http://localhost.evil.example/keys", false),
        ("http://127.0.0.1@evil.example/keys", false),
        ("ftp://127.0.0.1/keys", false),
        ("file:///etc/passwd", false),
        ("/keys", false),
    ] {
        let config = Config { jwks_url: Some(url.into()), ..Config::new(ISSUER) };
        assert_eq!(config.check().is_empty(), good, "{url}: {:?}", config.check());
    }
}

#[test]
fn the_configuration_file_has_defaults_and_no_unknown_keys() {
    let config: Config = toml::from_str("issuer = \"i\"\nhs256_secret_file = \"f\"\nleeway = \"5s\"").expect("parses");
    assert_eq!((config.audience.as_str(), config.leeway.as_secs(), config.cache_size), ("authenticated", 5, 100_000));
    assert!(toml::from_str::<Config>("issuer = \"i\"\naudiance = \"x\"").is_err());
}

#[test]
fn bad_keys_of_a_set_are_skipped() {
    let issuer = &*ISSUED_BY;
    let change = |mut jwk: Value, name: &str, value: Value| {
        jwk[name] = value;
        jwk
    };
    let ec = |name: &str, value: Value| change(issuer.ec_jwk("k"), name, value);
    let bad = [
        ec("use", json!("enc")),
        ec("key_ops", json!(["sign"])),
        ec("alg", json!("RS256")),
        ec("crv", json!("P-384")),
        ec("kty", json!("oct")),
        ec("y", json!(URL_SAFE_NO_PAD.encode([7; 32]))),
        ec("x", json!(URL_SAFE_NO_PAD.encode([7; 31]))),
        ec("x", json!("not base64!")),
        ec("kid", json!("")),
        ec("kid", json!("k".repeat(129))),
        ec("kid", json!(7)),
        change(issuer.rsa_jwk("k"), "alg", json!("PS256")),
        change(issuer.rsa_jwk("k"), "n", json!(URL_SAFE_NO_PAD.encode([0xff; 128]))),
        change(issuer.rsa_jwk("k"), "e", json!("")),
        json!({"kid": "k", "kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}),
        json!("a word"),
    ];
    for jwk in bad {
        let set = json!({"keys": [jwk, issuer.ec_jwk("good")]}).to_string();
        let keys = KeySet::parse(set.as_bytes()).expect("a set");
        assert_eq!(keys.count(), 1, "{set}");
        assert!(keys.find("good").is_some());
    }
    for damaged in ["", "[]", "{}", "{\"keys\":{}}", "<html>"] {
        assert!(KeySet::parse(damaged.as_bytes()).is_err(), "{damaged}");
    }
    assert_eq!(KeySet::parse(b"{\"keys\":[]}").map(|keys| keys.count()), Ok(0));
}
