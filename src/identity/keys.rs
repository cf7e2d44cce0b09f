//! A key set: the issuer's public signing keys by key id. Parsing only; following the source is `keyring.rs`.

use std::sync::Arc;

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{ECDSA_P256_SHA256_FIXED, ParsedPublicKey},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hashbrown::HashMap;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

/// Longest key id in bytes. Issuers use UUIDs or SHA-256 thumbprints.
pub(super) const KID_MAX_BYTES: usize = 128;

/// Most keys of one set. Issuers publish two to four; the rest would be a mistake.
const KEYS_MAX: usize = 100;

/// Bounds of an RSA modulus in bytes (2048 to 8192 bits), as the signature check has them.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// One public key. Its type fixes the algorithm: a token can't choose.
pub(super) struct Key {
    pub(super) algorithm: Algorithm,
    pub(super) decoding: DecodingKey,
    /// Tells two keys of one id apart.
    fingerprint: [u8; 32],
}

/// Public keys by key id. Immutable.
#[derive(Default)]
pub(super) struct KeySet(HashMap<Arc<str>, Key>);

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kid: String,
    kty: String,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
    n: Option<String>,
    e: Option<String>,
}

impl KeySet {
    /// Parses a JWKS document. Keys that are not for ES256 or RS256 signatures, or damaged, are skipped: one bad key
    /// must not lock everybody out. Of two keys with one id the first counts.
    ///
    /// # Errors
    /// What is wrong with the document as a whole.
    pub(super) fn parse(json: &[u8]) -> Result<Self, &'static str> {
        let document: Document = serde_json::from_slice(json).map_err(|_| "not a JSON Web Key Set")?;
        if document.keys.len() > KEYS_MAX {
            return Err("more than 100 keys");
        }
        let mut keys = HashMap::new();
        for value in document.keys {
            let Ok(jwk) = serde_json::from_value::<Jwk>(value) else { continue };
            if let Some(key) = Key::new(&jwk) {
                keys.entry(Arc::from(jwk.kid)).or_insert(key);
            }
        }
        Ok(Self(keys))
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The key with this id, and the id as the set holds it.
    pub(super) fn find(&self, kid: &str) -> Option<(&Arc<str>, &Key)> {
        self.0.get_key_value(kid)
    }

    /// Whether the key that `before` had under this id is gone or another one.
    pub(super) fn lost(&self, before: &KeySet, kid: &str) -> bool {
        match (self.0.get(kid), before.0.get(kid)) {
            (None, _) => true,
            (Some(now), Some(then)) => now.fingerprint != then.fingerprint,
            (Some(_), None) => false,
        }
    }

    /// Whether both hold the same keys.
    pub(super) fn same(&self, other: &KeySet) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().all(|(kid, key)| other.0.get(kid).is_some_and(|o| o.fingerprint == key.fingerprint))
    }

    /// How many keys there are.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }
}

impl Key {
    fn new(jwk: &Jwk) -> Option<Self> {
        let signs = jwk.usage.as_deref().is_none_or(|usage| usage == "sig")
            && jwk.key_ops.as_ref().is_none_or(|ops| ops.iter().any(|op| op == "verify"));
        if !signs || jwk.kid.is_empty() || jwk.kid.len() > KID_MAX_BYTES {
            return None;
        }
        let (name, key) = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("EC", Some("P-256")) => ("ES256", Self::ec(jwk)?),
            ("RSA", None) => ("RS256", Self::rsa(jwk)?),
            _ => return None,
        };
        jwk.alg.as_deref().is_none_or(|alg| alg == name).then_some(key)
    }

    fn ec(jwk: &Jwk) -> Option<Self> {
        let x: [u8; 32] = decode(&jwk.x)?.try_into().ok()?;
        let y: [u8; 32] = decode(&jwk.y)?.try_into().ok()?;
        let point = [&[4][..], &x, &y].concat();
        // A point that is not on the curve is found here once, not at every token.
        ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &point).ok()?;
        Some(Self {
            algorithm: Algorithm::ES256,
            decoding: DecodingKey::from_ec_der(&point),
            fingerprint: sha256(&point),
        })
    }

    fn rsa(jwk: &Jwk) -> Option<Self> {
        let modulus = decode(&jwk.n)?;
        let exponent = decode(&jwk.e)?;
        if !RSA_BYTES.contains(&modulus.len()) || !(1..=8).contains(&exponent.len()) {
            return None;
        }
        Some(Self {
            algorithm: Algorithm::RS256,
            decoding: DecodingKey::from_rsa_raw_components(&modulus, &exponent),
            fingerprint: sha256(&[&modulus[..], &exponent[..]].concat()),
        })
    }
}

fn decode(field: &Option<String>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(field.as_deref()?).ok()
}

/// SHA-256 without allocating.
pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}
