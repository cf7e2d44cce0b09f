//! The check of one token: pure, no I/O, no clock of its own. The order of the steps is part of the contract: what
//! is cheap and hostile is refused before anything is decoded, and nothing of the claims is looked at before the
//! signature holds.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, crypto};
use serde_json::{Map, Value};

use super::{
    Identity, Proof,
    config::{ClaimPath, Config},
    json,
    keys::{KID_MAX_BYTES, KeySet},
};
use crate::{
    refusal::TokenFault,
    tenant::{OrgId, is_uuid},
};

/// Longest credential in bytes. Supabase's largest tokens stay below 4 KiB.
pub const TOKEN_MAX_BYTES: usize = 8 * 1024;

/// Latest acceptable time in a claim: the largest integer that a JSON number carries exactly.
const TIME_MAX_SECS: u64 = (1 << 53) - 1;

/// What every token is held against.
pub(super) struct Rules {
    issuer: String,
    audience: String,
    org_claims: Vec<ClaimPath>,
    roles: Vec<String>,
    leeway: Duration,
    /// Whether there is a key set at all; without one only HS256 is allowed.
    asymmetric: bool,
    secret: Option<DecodingKey>,
}

impl Rules {
    pub(super) fn new(config: &Config) -> Result<Self, String> {
        Ok(Self {
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            org_claims: config.claim_paths()?,
            roles: config.roles.clone(),
            leeway: config.leeway,
            asymmetric: config.jwks_url.is_some() || config.jwks_file.is_some(),
            secret: config.secret()?.map(|secret| DecodingKey::from_secret(secret.reveal().as_bytes())),
        })
    }

    fn algorithm(&self, name: &str) -> Option<Algorithm> {
        match name {
            "ES256" if self.asymmetric => Some(Algorithm::ES256),
            "RS256" if self.asymmetric => Some(Algorithm::RS256),
            "HS256" if self.secret.is_some() => Some(Algorithm::HS256),
            _ => None,
        }
    }
}

/// A token whose shape and header are acceptable; nothing in it is believed yet.
pub(super) struct Token<'a> {
    /// Header, dot, claims: what is signed.
    signed: &'a [u8],
    signature: &'a str,
    claims: Vec<u8>,
    algorithm: Algorithm,
    kid: Option<String>,
}

impl<'a> Token<'a> {
    /// Takes the token apart: length, three parts of unpadded base64url, header.
    pub(super) fn parse(credential: &'a [u8], rules: &Rules) -> Result<Self, TokenFault> {
        if credential.is_empty() || credential.len() > TOKEN_MAX_BYTES {
            return Err(TokenFault::Malformed);
        }
        if credential.starts_with(b"sb_publishable_") || credential.starts_with(b"sb_secret_") {
            return Err(TokenFault::ApiKey);
        }
        let text = str::from_utf8(credential).map_err(|_| TokenFault::Malformed)?;
        let mut parts = text.split('.');
        let (Some(header), Some(claims), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenFault::Malformed);
        };
        let signed = &credential[..header.len() + 1 + claims.len()];
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenFault::Malformed);
        let (header, claims, _) = (decode(header)?, decode(claims)?, decode(signature)?);
        let header = json::object(&header).ok_or(TokenFault::Malformed)?;
        let algorithm = match header.get("alg") {
            Some(Value::String(name)) => rules.algorithm(name).ok_or(TokenFault::Algorithm)?,
            _ => return Err(TokenFault::Algorithm),
        };
        if header.contains_key("crit") {
            return Err(TokenFault::Header);
        }
        let kid = match header.get("kid") {
            None => None,
            Some(Value::String(kid)) if kid.len() <= KID_MAX_BYTES => Some(kid.clone()),
            Some(_) => return Err(TokenFault::Header),
        };
        Ok(Self { signed, signature, claims, algorithm, kid })
    }

    /// The id of the key that the token says it is signed by.
    pub(super) fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// Whether it can be verified without any public key: one signed with the shared secret.
    pub(super) fn is_shared(&self) -> bool {
        self.algorithm == Algorithm::HS256
    }

    /// Verifies signature and claims at `now`.
    pub(super) fn verify(&self, keys: &KeySet, rules: &Rules, now: SystemTime) -> Result<Identity, TokenFault> {
        let (key, kid) = self.key(keys, rules)?;
        match crypto::verify(self.signature, self.signed, key, self.algorithm) {
            Ok(true) => {}
            _ => return Err(TokenFault::Signature),
        }
        let claims = json::object(&self.claims).ok_or(TokenFault::Malformed)?;
        identity(&claims, kid, rules, now)
    }

    /// The key by its id in our own set, whose type has to fit the token's algorithm. A token with no id, or with
    /// one that no public key has, can only be one of the shared secret's: Supabase puts an id on those too.
    fn key<'k>(&self, keys: &'k KeySet, rules: &'k Rules) -> Result<(&'k DecodingKey, Option<Arc<str>>), TokenFault> {
        match self.kid.as_deref().and_then(|kid| keys.find(kid)) {
            Some((_, key)) if key.algorithm != self.algorithm => Err(TokenFault::Algorithm),
            Some((kid, key)) => Ok((&key.decoding, Some(Arc::clone(kid)))),
            None => match (self.algorithm, &rules.secret) {
                (Algorithm::HS256, Some(secret)) => Ok((secret, None)),
                _ => Err(TokenFault::UnknownKey),
            },
        }
    }
}

fn identity(
    claims: &Map<String, Value>,
    kid: Option<Arc<str>>,
    rules: &Rules,
    now: SystemTime,
) -> Result<Identity, TokenFault> {
    let leeway = rules.leeway;
    let expires_at = time(claims, "exp")?.ok_or(TokenFault::Claims)? + leeway;
    if expires_at <= now {
        return Err(TokenFault::Expired);
    }
    for name in ["nbf", "iat"] {
        if time(claims, name)?.is_some_and(|at| at > now + leeway) {
            return Err(TokenFault::NotYetValid);
        }
    }
    if text(claims, "iss")? != rules.issuer {
        return Err(TokenFault::Issuer);
    }
    audience(claims, &rules.audience)?;
    let subject = text(claims, "sub")?;
    if !is_uuid(subject) || text(claims, "session_id")?.is_empty() {
        return Err(TokenFault::Claims);
    }
    let org = org(claims, &rules.org_claims)?;
    if !rules.roles.iter().any(|role| Ok(role.as_str()) == text(claims, "role")) {
        text(claims, "role")?;
        return Err(TokenFault::Role);
    }
    Ok(Identity { org, subject: subject.into(), user: None, expires_at: Some(expires_at), proof: Proof::Token(kid) })
}

fn text<'c>(claims: &'c Map<String, Value>, name: &str) -> Result<&'c str, TokenFault> {
    claims.get(name).and_then(Value::as_str).ok_or(TokenFault::Claims)
}

/// A time claim in whole seconds since 1970; a fraction, a sign or an absurd size is no time.
fn time(claims: &Map<String, Value>, name: &str) -> Result<Option<SystemTime>, TokenFault> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let secs = match (value.as_u64(), value.as_f64()) {
        (Some(secs), _) => secs,
        // Exact: the bounds were checked, and there is no fraction.
        (None, Some(secs)) if secs.fract() == 0.0 && (0.0..=TIME_MAX_SECS as f64).contains(&secs) => secs as u64,
        _ => return Err(TokenFault::Claims),
    };
    if secs > TIME_MAX_SECS {
        return Err(TokenFault::Claims);
    }
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(secs)).map(Some).ok_or(TokenFault::Claims)
}

fn audience(claims: &Map<String, Value>, wanted: &str) -> Result<(), TokenFault> {
    let found = match claims.get("aud") {
        Some(Value::String(one)) => one == wanted,
        Some(Value::Array(many)) if many.iter().all(Value::is_string) => many.iter().any(|one| one == wanted),
        _ => return Err(TokenFault::Claims),
    };
    if found { Ok(()) } else { Err(TokenFault::Audience) }
}

/// The organisation at the first path that is present. A present claim that is no id does not give way to the next
/// path: the issuer said something, and it was not this.
fn org(claims: &Map<String, Value>, paths: &[ClaimPath]) -> Result<OrgId, TokenFault> {
    let claim = paths.iter().find_map(|path| match path {
        ClaimPath::Top(name) => claims.get(name),
        ClaimPath::AppMetadata(name) => claims.get("app_metadata")?.as_object()?.get(name),
    });
    claim.ok_or(TokenFault::NoOrg)?.as_str().and_then(OrgId::parse).ok_or(TokenFault::BadOrg)
}
