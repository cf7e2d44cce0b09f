//! The `[identity]` section of the configuration.

use std::{fmt, fs, path::PathBuf, time::Duration};

use hyper::Uri;
use serde::Deserialize;

use crate::tenant::unit;

/// Shortest HS256 secret in bytes: RFC 7518 section 3.2 wants a key no shorter than the hash.
const SECRET_MIN_BYTES: usize = 32;

/// Longest clock leeway. More would make a stolen token outlive its expiry noticeably.
const LEEWAY_MAX: Duration = Duration::from_secs(300);

/// Bounds of `refresh`: the issuer's own cache holds for ten minutes, and an hour is too long to trust a revoked key.
const REFRESH_MIN: Duration = Duration::from_secs(10);
const REFRESH_MAX: Duration = Duration::from_secs(3600);

/// Bounds of `cache_size`: one entry takes about half a kilobyte.
const CACHE_MAX: u64 = 10_000_000;

/// Top-level claims that a user can write, or that name something other than an organisation.
const NOT_ORG_CLAIMS: [&str; 15] = [
    "user_metadata",
    "app_metadata",
    "email",
    "phone",
    "iss",
    "aud",
    "exp",
    "iat",
    "nbf",
    "role",
    "aal",
    "amr",
    "session_id",
    "jti",
    "is_anonymous",
];

/// Which tokens are accepted and whose word is taken for it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The `iss` claim, byte for byte. With Supabase: `https://<ref>.supabase.co/auth/v1`. Required.
    pub issuer: String,
    /// The audience that `aud` must contain. Default `"authenticated"`.
    #[serde(default = "default_audience")]
    pub audience: String,
    /// Where the issuer publishes its signing keys; https, or http on loopback. Default none. With Supabase:
    /// the issuer and `/.well-known/jwks.json`.
    pub jwks_url: Option<String>,
    /// The same as a file, read again when it changes. Not together with `jwks_url`. Default none.
    pub jwks_file: Option<PathBuf>,
    /// The shared secret of HS256 tokens (Supabase's legacy JWT secret), at least 32 bytes. Default none: HS256 is
    /// refused.
    pub hs256_secret: Option<Secret>,
    /// The same in a file; line ends at its end are dropped. Default none.
    pub hs256_secret_file: Option<PathBuf>,
    /// Where the organisation stands in a token: top-level claims or `app_metadata.NAME`; the first that is present
    /// decides. Users can write `user_metadata`, so it is refused. Default `["org_id", "app_metadata.org_id"]`.
    #[serde(default = "default_org_claims")]
    pub org_claims: Vec<String>,
    /// Values of the `role` claim that are let in. Default `["authenticated"]`.
    #[serde(default = "default_roles")]
    pub roles: Vec<String>,
    /// How far the issuer's clock and ours may differ. 0 to 5 minutes. Default `"30s"`.
    #[serde(default = "default_leeway", deserialize_with = "unit::duration")]
    pub leeway: Duration,
    /// Verified tokens and service keys remembered at once, about half a kilobyte each. 1 to 10 million.
    /// Default 100000.
    #[serde(default = "default_cache_size")]
    pub cache_size: u64,
    /// How often the keys at `jwks_url` are fetched again. 10 seconds to an hour. Default `"5m"`.
    #[serde(default = "default_refresh", deserialize_with = "unit::duration")]
    pub refresh: Duration,
}

fn default_audience() -> String {
    "authenticated".into()
}

fn default_org_claims() -> Vec<String> {
    vec!["org_id".into(), "app_metadata.org_id".into()]
}

fn default_roles() -> Vec<String> {
    vec!["authenticated".into()]
}

fn default_leeway() -> Duration {
    Duration::from_secs(30)
}

fn default_cache_size() -> u64 {
    100_000
}

fn default_refresh() -> Duration {
    Duration::from_secs(300)
}

impl Config {
    /// A configuration for `issuer` with every default and no key yet.
    pub fn new(issuer: impl Into<String>) -> Self {
        Self {
            issuer: issuer.into(),
            audience: default_audience(),
            jwks_url: None,
            jwks_file: None,
            hs256_secret: None,
            hs256_secret_file: None,
            org_claims: default_org_claims(),
            roles: default_roles(),
            leeway: default_leeway(),
            cache_size: default_cache_size(),
            refresh: default_refresh(),
        }
    }

    /// Every fault in words; empty when there is none. Reads the secret's file, nothing else.
    pub fn check(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut need = |good: bool, what: &str| {
            if !good {
                faults.push(format!("identity.{what}"));
            }
        };
        need(!self.issuer.is_empty(), "issuer must not be empty");
        need(!self.audience.is_empty(), "audience must not be empty");
        need(!self.roles.is_empty(), "roles must name at least one role");
        need(!self.org_claims.is_empty(), "org_claims must name at least one claim");
        need(self.leeway <= LEEWAY_MAX, "leeway must be at most 5m");
        need((1..=CACHE_MAX).contains(&self.cache_size), "cache_size must be between 1 and 10000000");
        need((REFRESH_MIN..=REFRESH_MAX).contains(&self.refresh), "refresh must be between 10s and 1h");
        need(self.jwks_url.is_none() || self.jwks_file.is_none(), "jwks_url and jwks_file exclude each other");
        need(
            self.hs256_secret.is_none() || self.hs256_secret_file.is_none(),
            "hs256_secret and hs256_secret_file exclude each other",
        );
        let keyless = self.jwks_url.is_none()
            && self.jwks_file.is_none()
            && self.hs256_secret.is_none()
            && self.hs256_secret_file.is_none();
        need(!keyless, "needs one of jwks_url, jwks_file, hs256_secret, hs256_secret_file");
        faults.extend(self.org_claims.iter().filter_map(|claim| ClaimPath::parse(claim).err()));
        faults.extend(self.key_url().err());
        faults.extend(self.secret().err());
        faults
    }

    /// The HS256 secret, from wherever it is configured. Also what development tokens are signed with.
    ///
    /// # Errors
    /// The fault in words: the file can't be read, or the secret is too short.
    pub fn secret(&self) -> Result<Option<Secret>, String> {
        let (secret, source) = match (&self.hs256_secret, &self.hs256_secret_file) {
            (Some(secret), _) => (secret.clone(), "hs256_secret"),
            (None, Some(path)) => {
                let text = fs::read_to_string(path)
                    .map_err(|error| format!("identity.hs256_secret_file: {}: {error}", path.display()))?;
                (Secret(text.trim_end_matches(['\r', '\n']).to_owned()), "hs256_secret_file")
            }
            (None, None) => return Ok(None),
        };
        if secret.reveal().len() < SECRET_MIN_BYTES {
            return Err(format!("identity.{source}: the secret needs at least {SECRET_MIN_BYTES} bytes"));
        }
        Ok(Some(secret))
    }

    /// `jwks_url` as a URI whose answer nobody on the way can change.
    pub(super) fn key_url(&self) -> Result<Option<Uri>, String> {
        let Some(text) = &self.jwks_url else { return Ok(None) };
        let uri: Uri = text.parse().map_err(|_| "identity.jwks_url is not a URL".to_owned())?;
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let loopback = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        match uri.scheme_str() {
            Some("https") if !host.is_empty() => Ok(Some(uri)),
            Some("http") if loopback => Ok(Some(uri)),
            _ => Err("identity.jwks_url must be https (http on loopback only)".to_owned()),
        }
    }

    /// `org_claims`, parsed.
    pub(super) fn claim_paths(&self) -> Result<Vec<ClaimPath>, String> {
        self.org_claims.iter().map(|claim| ClaimPath::parse(claim)).collect()
    }
}

/// A place in a token's claims where the organisation may stand. `user_metadata` has no spelling here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClaimPath {
    /// A claim of its own.
    Top(String),
    /// A member of `app_metadata`.
    AppMetadata(String),
}

impl ClaimPath {
    fn parse(text: &str) -> Result<Self, String> {
        let plain =
            |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        match text.split_once('.') {
            None if NOT_ORG_CLAIMS.contains(&text) => {
                Err(format!("identity.org_claims: {text:?} can't hold the organisation"))
            }
            None if plain(text) => Ok(Self::Top(text.to_owned())),
            Some(("app_metadata", name)) if plain(name) => Ok(Self::AppMetadata(name.to_owned())),
            Some(("user_metadata", _)) => Err(format!(
                "identity.org_claims: {text:?} is written by users themselves: any user could be any tenant"
            )),
            _ => Err(format!("identity.org_claims: {text:?} is neither a top-level claim nor app_metadata.NAME")),
        }
    }
}

/// A secret text. Its `Debug` prints nothing.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes a text as a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}
