//! Development tokens: what Supabase Auth would issue, signed with the configured HS256 secret. Only `cli` and `dev`
//! use this; nothing on a client's path can.

use std::time::{Duration, SystemTime};

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::json;

use super::{config::Secret, keys::sha256};
use crate::tenant::OrgId;

/// Gives a token with the claims of Supabase Auth and a top-level `org_id`.
///
/// `sub` is the user's UUID ([`subject`] makes one up), `ttl` how long it lives from `now` (whole seconds count).
/// The same arguments give the same token.
pub fn token(
    secret: &Secret,
    issuer: &str,
    audience: &str,
    org: &OrgId,
    sub: &str,
    ttl: Duration,
    now: SystemTime,
) -> String {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let iat = since.as_secs();
    let session = uuid(&sha256(format!("session {org} {sub} {}", since.as_nanos()).as_bytes()));
    let claims = json!({
        "iss": issuer,
        "aud": audience,
        "exp": iat.saturating_add(ttl.as_secs()),
        "iat": iat,
        "sub": sub,
        "role": "authenticated",
        "aal": "aal1",
        "session_id": session,
        "email": format!("dev@{org}.example"),
        "phone": "",
        "is_anonymous": false,
        "amr": [{"method": "password", "timestamp": iat}],
        "app_metadata": {"provider": "email", "providers": ["email"]},
        "user_metadata": {},
        "org_id": org.as_str(),
    });
    sign(secret, &json!({"alg": "HS256", "typ": "JWT"}).to_string(), &claims.to_string())
}

/// A user id for an organisation's development tokens: always the same one.
pub fn subject(org: &OrgId) -> String {
    uuid(&sha256(format!("subject {org}").as_bytes()))
}

pub(super) fn sign(secret: &Secret, header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.reveal().as_bytes());
    let signature = URL_SAFE_NO_PAD.encode(hmac::sign(&key, signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// The first 16 bytes as a version 4 UUID.
fn uuid(bytes: &[u8; 32]) -> String {
    let mut hex: Vec<char> = data_encoding::HEXLOWER.encode(&bytes[..16]).chars().collect();
    hex[12] = '4';
    hex[16] = 'a';
    for at in [20, 16, 12, 8] {
        hex.insert(at, '-');
    }
    hex.into_iter().collect()
}
