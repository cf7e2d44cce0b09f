//! dynabase's own tokens for deployments: ES256 by a key that is derived from the root secret, so that every process
//! has the same one and none is stored. A caller's own token is verified here and never sent on.

use std::time::{Duration, SystemTime};

use aws_lc_rs::{
    agreement::{ECDH_P256, PrivateKey},
    digest::{Context, SHA256},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};

use crate::tenant::{Names, OrgId};

/// Tries at deriving a key: one in 2^32 seeds is no P-256 key.
const TRIES: u32 = 8;

/// Largest claim that is passed on, in bytes of JSON: Supabase's own are some hundred.
const CLAIM_MAX_BYTES: usize = 4096;

/// Who a token is about.
#[derive(Clone, Copy, Debug)]
pub struct Claims<'a> {
    /// The caller.
    pub subject: &'a str,
    /// Its organisation.
    pub org: &'a OrgId,
    /// The verified token, for further claims; anything else (a service key) has none.
    pub credential: &'a [u8],
}

impl Claims<'_> {
    /// What a token for `audience` would be made from: tokens of the same digest are interchangeable.
    pub(super) fn digest(&self, audience: &str, expires_at: Option<SystemTime>) -> [u8; 32] {
        let ends = expires_at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|at| at.as_secs());
        let ends = ends.unwrap_or(u64::MAX).to_be_bytes();
        let mut context = Context::new(&SHA256);
        for part in [audience.as_bytes(), self.subject.as_bytes(), self.org.as_str().as_bytes(), &ends, self.credential]
        {
            // With its length, so that no two lists of parts look the same.
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(context.finish().as_ref());
        digest
    }
}

/// Signs tokens.
pub(super) struct Issuer {
    url: String,
    key: EcdsaKeyPair,
    header: String,
    jwks: String,
    random: SystemRandom,
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Issuer")
    }
}

impl Issuer {
    pub(super) fn new(url: &str, names: &Names) -> Result<Self, String> {
        let (key, public) = (0..TRIES)
            .find_map(|attempt| {
                let seed = names.signing_seed("convex tokens", attempt);
                let private = PrivateKey::from_private_key(&ECDH_P256, &seed).ok()?;
                let public = private.compute_public_key().ok()?.as_ref().to_vec();
                let key =
                    EcdsaKeyPair::from_private_key_and_public_key(&ECDSA_P256_SHA256_FIXED_SIGNING, &seed, &public);
                Some((key.ok()?, public))
            })
            .ok_or("no signing key could be derived from names.root_secret")?;
        // 0x04, x, y: the uncompressed point.
        let [x, y] = [public.get(1..33), public.get(33..65)].map(|part| URL_SAFE_NO_PAD.encode(part.unwrap_or(&[])));
        // RFC 7638: the key's own fingerprint names it.
        let thumbprint = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
        let digest = aws_lc_rs::digest::digest(&SHA256, thumbprint.as_bytes());
        let kid = URL_SAFE_NO_PAD.encode(digest.as_ref());
        let jwks =
            json!({"keys": [{"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": kid, "alg": "ES256", "use": "sig"}]});
        let header = URL_SAFE_NO_PAD.encode(json!({"alg": "ES256", "typ": "JWT", "kid": kid}).to_string());
        Ok(Self { url: url.to_owned(), key, header, jwks: jwks.to_string(), random: SystemRandom::new() })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn jwks(&self) -> &str {
        &self.jwks
    }

    /// Claims that a caller could have written in another's name are ours: `iss`, `sub`, `aud`, `org_id`.
    pub(super) fn token(&self, audience: &str, claims: &Claims<'_>, chosen: &[String], ends: SystemTime) -> String {
        let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let mut payload = further(claims.credential, chosen);
        payload.insert("iss".into(), self.url.as_str().into());
        payload.insert("sub".into(), claims.subject.into());
        payload.insert("aud".into(), audience.into());
        payload.insert("org_id".into(), claims.org.as_str().into());
        payload.insert("iat".into(), seconds(SystemTime::now()).into());
        payload.insert("exp".into(), seconds(ends).into());
        let signed = format!("{}.{}", self.header, URL_SAFE_NO_PAD.encode(Value::Object(payload).to_string()));
        // Signing fails only without randomness; a token without signature opens nothing.
        let signature = self.key.sign(&self.random, signed.as_bytes());
        let signature = signature.map(|it| URL_SAFE_NO_PAD.encode(it.as_ref())).unwrap_or_default();
        format!("{signed}.{signature}")
    }
}

/// The chosen claims of a token that was verified before.
fn further(credential: &[u8], chosen: &[String]) -> Map<String, Value> {
    let read = || -> Option<Map<String, Value>> {
        let payload = credential.split(|b| *b == b'.').nth(1)?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
    };
    let Some(mut all) = read() else { return Map::new() };
    chosen
        .iter()
        .filter_map(|name| Some((name.clone(), all.remove(name)?)))
        .filter(|(_, value)| value.to_string().len() <= CLAIM_MAX_BYTES)
        .collect()
}
