//! What a credential costs: first seen, and seen before. Budgets: first ES256 100 µs, seen before 1 µs.

use std::{
    hint::black_box,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair, RsaPublicKeyComponents,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use dynabase::{
    identity::{Config, Secret, Verifier, mint, service_key},
    tenant::{
        OrgId,
        directory::{Ask, Directory, ServiceKey},
    },
};
use futures_util::FutureExt;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

const ISSUER: &str = "https://project.supabase.co/auth/v1";
const SECRET: &str = "a-development-secret-of-more-than-32-bytes";

/// Keys, and the claims that Supabase puts into a token of usual size.
struct Issuer {
    ec: EncodingKey,
    rsa: RsaKeyPair,
    jwks: Value,
}

impl Issuer {
    fn new() -> Self {
        let pkcs8 =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).expect("a key");
        let ec = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref()).expect("the key just made");
        let point = ec.public_key().as_ref();
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
        let parts = RsaPublicKeyComponents::<Vec<u8>>::from(rsa.public_key());
        let b64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        Self {
            jwks: json!({"keys": [
                {"kid": "es", "kty": "EC", "crv": "P-256", "x": b64(&point[1..33]), "y": b64(&point[33..])},
                {"kid": "rs", "kty": "RSA", "n": b64(&parts.n), "e": b64(&parts.e)},
            ]}),
            ec: EncodingKey::from_ec_der(pkcs8.as_ref()),
            rsa,
        }
    }

    /// A token that nobody has seen yet.
    fn token(&self, algorithm: Algorithm, n: u64) -> String {
        let header = |kid: Option<&str>| Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) };
        let encode = |kid, key| jsonwebtoken::encode(&header(kid), &claims(n), key).expect("signs");
        match algorithm {
            Algorithm::ES256 => encode(Some("es"), &self.ec),
            Algorithm::RS256 => self.rs256(&claims(n).to_string()),
            _ => encode(None, &EncodingKey::from_secret(SECRET.as_bytes())),
        }
    }

    fn rs256(&self, claims: &str) -> String {
        let b64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let signed = format!("{}.{}", b64(br#"{"alg":"RS256","kid":"rs","typ":"JWT"}"#), b64(claims.as_bytes()));
        let mut signature = vec![0; self.rsa.public_modulus_len()];
        self.rsa.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature).expect("signs");
        format!("{signed}.{}", b64(&signature))
    }
}

fn claims(n: u64) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    json!({
        "iss": ISSUER, "aud": "authenticated", "exp": now + 3600, "iat": now,
        "sub": "3b1f0f6e-6f0b-4b7e-9a5e-0d7c5c8f2a11", "role": "authenticated", "aal": "aal1",
        "session_id": format!("0c1d2e3f-4a5b-4c6d-8e7f-{n:012}"), "email": "ada@acme.example", "phone": "",
        "is_anonymous": false, "amr": [{"method": "password", "timestamp": now}],
        "app_metadata": {"provider": "email", "providers": ["email"]}, "user_metadata": {"name": "Ada"},
        "org_id": "acme",
    })
}

fn first(c: &mut Criterion, issuer: &Issuer, verifier: &Verifier) {
    let mut n = 0;
    for (name, algorithm) in [("ES256", Algorithm::ES256), ("RS256", Algorithm::RS256), ("HS256", Algorithm::HS256)] {
        c.bench_function(&format!("first verification, {name}"), |b| {
            let fresh = || {
                n += 1;
                issuer.token(algorithm, n)
            };
            b.iter_batched(fresh, |token| verify(verifier, &token), BatchSize::SmallInput);
        });
    }
}

/// Nothing here has to wait, so the future is polled once: no runtime in the numbers.
fn verify(verifier: &Verifier, credential: &str) {
    let answer = verifier.verify(black_box(credential.as_bytes())).now_or_never().expect("no waiting");
    black_box(answer.expect("accepted"));
}

fn bench(c: &mut Criterion) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let issuer = Issuer::new();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("jwks.json");
    std::fs::write(&file, issuer.jwks.to_string()).expect("writes");
    let mut config = Config::new(ISSUER);
    config.jwks_file = Some(file);
    config.hs256_secret = Some(Secret::new(SECRET));
    let (directory, mut asks) = Directory::new();
    runtime.spawn(async move {
        let org = OrgId::parse("acme").expect("an id");
        while let Some(Ask::Key(hash, answer)) = asks.recv().await {
            let key = ServiceKey { hash, org: org.clone(), user: "app".into(), expires_at: None };
            let _ = answer.send(Ok(key.into()));
        }
    });
    let verifier = Verifier::new(&config, directory).expect("a good configuration");
    runtime.block_on(verifier.reload());

    first(c, &issuer, &verifier);

    let token = issuer.token(Algorithm::ES256, 0);
    verify(&verifier, &token);
    c.bench_function(&format!("seen before, token of {} bytes", token.len()), |b| b.iter(|| verify(&verifier, &token)));

    let acme = OrgId::parse("acme").expect("an id");
    let hour = Duration::from_secs(3600);
    let subject = mint::subject(&acme);
    let small = mint::token(&Secret::new(SECRET), ISSUER, "authenticated", &acme, &subject, hour, SystemTime::now());
    verify(&verifier, &small);
    c.bench_function("seen before, development token", |b| b.iter(|| verify(&verifier, &small)));

    let key = service_key::mint().expect("randomness");
    runtime.block_on(verifier.verify(key.reveal().as_bytes())).expect("accepted");
    c.bench_function("seen before, service key", |b| b.iter(|| verify(&verifier, key.reveal())));
    c.bench_function("first look-up, service key", |b| {
        let fresh = || service_key::mint().expect("randomness");
        let look_up = |key: service_key::NewKey| runtime.block_on(verifier.verify(key.reveal().as_bytes())).is_ok();
        b.iter_batched(fresh, look_up, BatchSize::SmallInput);
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
