//! Who is asking: a credential becomes an [`Identity`] or a refusal.
//!
//! `token.rs` is the pure check of a token; `keys.rs`, `source.rs` and `keyring.rs` parse, read and follow the
//! issuer's public keys; `service_key.rs` is the form of service keys. This file remembers what was verified.
//! Nothing here knows what an organisation may do.
//!
//! Entry point: [`Verifier::verify`].

mod config;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod json;
mod keyring;
mod keys;
pub mod mint;
pub mod service_key;
mod source;
mod token;

#[cfg(test)]
mod tests;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

pub use config::{Config, Secret};
/// The fuzzer's way in.
#[cfg(fuzzing)]
#[doc(hidden)]
pub use fuzz::play as fuzz_token;
use keyring::Keyring;
use keys::{KeySet, sha256};
use moka::{Expiry, sync::Cache};
use source::Source;
pub use token::TOKEN_MAX_BYTES;
use token::{Rules, Token};

use crate::{
    refusal::{Refusal, TokenFault},
    tenant::{
        OrgId,
        directory::{Absent, Directory, KeyHash, ServiceKey},
    },
};

/// How long a refusal that cost a signature check or a catalog look-up is remembered.
const REFUSED_FOR: Duration = Duration::from_secs(5);

/// Refusals remembered at once. Apart from the good results, so that garbage can't drive those out.
const REFUSED_MAX: u64 = 10_000;

/// Longest time that a good result is remembered, even if the credential lives longer.
const REMEMBERED_MAX: Duration = Duration::from_secs(24 * 3600);

/// Longest wait for the catalog to answer about a service key.
const LOOKUP_MAX: Duration = Duration::from_secs(5);

/// A verified caller.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The organisation it speaks for.
    pub org: OrgId,
    /// `sub` of the token, or the service key's short fingerprint. For logs.
    pub subject: Arc<str>,
    /// The one logical user it may use; `None` is any of the tenant's.
    pub user: Option<Arc<str>>,
    /// When it ends, the clock leeway included; `None` is never.
    pub expires_at: Option<SystemTime>,
    /// What it came with.
    pub proof: Proof,
}

impl Identity {
    fn is_live(&self, now: SystemTime) -> bool {
        self.expires_at.is_none_or(|at| at > now)
    }
}

/// What a caller proved itself with.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A token signed by the key with this `kid` (`None`: the configured HS256 secret).
    Token(Option<Arc<str>>),
    /// A service key.
    ServiceKey(KeyHash),
}

/// A result, and the generation of the key set that it was concluded from.
#[derive(Clone)]
struct Remembered<T> {
    verdict: T,
    generation: u64,
}

/// Verifies credentials. One per process.
pub struct Verifier {
    rules: Rules,
    keyring: Arc<Keyring>,
    directory: Directory,
    /// By SHA-256 of the credential, so that no credential stays in memory.
    accepted: Cache<[u8; 32], Remembered<Arc<Identity>>>,
    refused: Cache<[u8; 32], Remembered<TokenFault>>,
    /// Grows when a service key is forgotten: an answer that was asked for before must not be remembered after.
    forgotten: AtomicU64,
}

impl Verifier {
    /// A verifier for `config` that looks service keys up through `directory`. Keys are read later: by
    /// [`Self::run_refresher`], by [`Self::reload`], or for the first token.
    ///
    /// # Errors
    /// The first fault of the configuration in words.
    pub fn new(config: &Config, directory: Directory) -> Result<Self, String> {
        if let Some(fault) = config.check().into_iter().next() {
            return Err(fault);
        }
        Ok(Self {
            rules: Rules::new(config)?,
            keyring: Arc::new(Keyring::new(Source::new(config)?, config.refresh)),
            directory,
            accepted: Cache::builder().max_capacity(config.cache_size).expire_after(UntilExpiry).build(),
            refused: Cache::builder().max_capacity(REFUSED_MAX).time_to_live(REFUSED_FOR).build(),
            forgotten: AtomicU64::new(0),
        })
    }

    /// Verifies a token or a service key.
    ///
    /// What was verified before costs one SHA-256 and one look-up.
    ///
    /// # Errors
    /// [`Refusal::BadToken`] with the fault; [`Refusal::CatalogDown`] when a service key can't be looked up, or when
    /// the issuer's keys could not be read even once: trying again later may succeed.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn verify(&self, credential: &[u8]) -> Result<Arc<Identity>, Refusal> {
        if credential.len() > TOKEN_MAX_BYTES {
            return Err(Refusal::BadToken(TokenFault::Malformed));
        }
        let digest = sha256(credential);
        let now = SystemTime::now();
        let generation = self.keyring.generation();
        if let Some(known) = self.accepted.get(&digest)
            && (known.generation == generation || matches!(known.verdict.proof, Proof::ServiceKey(_)))
            && known.verdict.is_live(now)
        {
            return Ok(known.verdict);
        }
        if let Some(known) = self.refused.get(&digest).filter(|known| known.generation == generation) {
            return Err(Refusal::BadToken(known.verdict));
        }
        if credential.starts_with(service_key::PREFIX.as_bytes()) {
            return self.service_key(credential, now).await;
        }
        self.token(credential, digest, now).await
    }

    async fn token(&self, credential: &[u8], digest: [u8; 32], now: SystemTime) -> Result<Arc<Identity>, Refusal> {
        let token = Token::parse(credential, &self.rules).map_err(Refusal::BadToken)?;
        let mut asked = false;
        loop {
            // Before the set, so that a swap in between makes the result look older than it is, never newer.
            let generation = self.keyring.generation();
            let verdict = match self.keyring.usable() {
                Some(keys) => token.verify(&keys, &self.rules, now),
                None if token.is_shared() => token.verify(&KeySet::default(), &self.rules, now),
                None if asked => return Err(Refusal::CatalogDown),
                None => Err(TokenFault::UnknownKey),
            };
            match verdict {
                Ok(identity) => {
                    let identity = Arc::new(identity);
                    self.accepted.insert(digest, Remembered { verdict: Arc::clone(&identity), generation });
                    return Ok(identity);
                }
                Err(TokenFault::UnknownKey) if !asked && token.kid().is_some() => {
                    asked = true;
                    self.keyring.ask().await;
                }
                // Finding this out again is cheaper than remembering it.
                Err(fault @ (TokenFault::UnknownKey | TokenFault::Algorithm)) => return Err(Refusal::BadToken(fault)),
                Err(fault) => {
                    self.refused.insert(digest, Remembered { verdict: fault, generation });
                    return Err(Refusal::BadToken(fault));
                }
            }
        }
    }

    async fn service_key(&self, credential: &[u8], now: SystemTime) -> Result<Arc<Identity>, Refusal> {
        let unknown = Err(Refusal::BadToken(TokenFault::UnknownServiceKey));
        let Some(hash) = service_key::parse(credential) else { return unknown };
        let forgotten = self.forgotten.load(Ordering::Acquire);
        let generation = self.keyring.generation();
        let answer = tokio::time::timeout(LOOKUP_MAX, self.directory.key(hash)).await;
        match answer.unwrap_or(Err(Absent::Unavailable)) {
            Ok(key) => {
                let identity = Arc::new(Identity::from(&*key));
                if !identity.is_live(now) {
                    return unknown;
                }
                self.accepted.insert(hash, Remembered { verdict: Arc::clone(&identity), generation });
                if self.forgotten.load(Ordering::Acquire) != forgotten {
                    self.accepted.invalidate(&hash);
                }
                Ok(identity)
            }
            Err(Absent::Unknown) => {
                self.refused.insert(hash, Remembered { verdict: TokenFault::UnknownServiceKey, generation });
                if self.forgotten.load(Ordering::Acquire) != forgotten {
                    self.refused.invalidate(&hash);
                }
                unknown
            }
            Err(Absent::Unavailable) => Err(Refusal::CatalogDown),
        }
    }

    /// Forgets what is known about a service key: it was made, changed or revoked.
    pub fn forget_key(&self, hash: &KeyHash) {
        self.forgotten.fetch_add(1, Ordering::AcqRel);
        self.accepted.invalidate(hash);
        self.refused.invalidate(hash);
    }

    /// Keeps the issuer's keys fresh; runs until dropped.
    ///
    /// Whenever keys have left the set, `revoked` is called with a test that says of a session's signing key
    /// (`Live::signing_key`, see [`Proof::Token`]) whether it was lost. So the caller ends those sessions:
    /// `|lost| table.stop_where(Stop::Revoked, |live| lost(live.signing_key.as_deref()))`.
    ///
    /// # Cancel safety
    /// May be dropped at any point and run again.
    pub async fn run_refresher(&self, revoked: impl Fn(&dyn Fn(Option<&str>) -> bool)) {
        self.keyring.run(revoked).await;
    }

    /// Reads the issuer's keys now. A failure is logged and leaves the present keys in force.
    ///
    /// # Cancel safety
    /// May be dropped; the reading goes on.
    pub async fn reload(&self) {
        self.keyring.refresh().await;
    }

    /// Time since the issuer's keys were last read well; `None` when they never were, or none are configured.
    pub fn keys_age(&self) -> Option<Duration> {
        self.keyring.age()
    }
}

/// Reads the issuer's keys once; gives how many there are of the kinds that we verify, `None` where only a secret is
/// configured.
///
/// # Errors
/// What went wrong.
pub async fn read_keys(config: &Config) -> Result<Option<usize>, String> {
    match source::Source::new(config)? {
        source::Source::None => Ok(None),
        source => source.load().await.map(|keys| Some(keys.len())),
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

impl From<&ServiceKey> for Identity {
    fn from(key: &ServiceKey) -> Self {
        Self {
            org: key.org.clone(),
            subject: service_key::fingerprint(&key.hash).into(),
            user: Some(key.user.as_str().into()),
            expires_at: key.expires_at,
            proof: Proof::ServiceKey(key.hash),
        }
    }
}

/// Lets an accepted credential be forgotten when it ends.
struct UntilExpiry;

impl Expiry<[u8; 32], Remembered<Arc<Identity>>> for UntilExpiry {
    fn expire_after_create(
        &self,
        _digest: &[u8; 32],
        value: &Remembered<Arc<Identity>>,
        _created_at: Instant,
    ) -> Option<Duration> {
        let left = value.verdict.expires_at.map(|at| at.duration_since(SystemTime::now()).unwrap_or_default());
        Some(left.unwrap_or(REMEMBERED_MAX).min(REMEMBERED_MAX))
    }

    fn expire_after_update(
        &self,
        digest: &[u8; 32],
        value: &Remembered<Arc<Identity>>,
        updated_at: Instant,
        _left: Option<Duration>,
    ) -> Option<Duration> {
        self.expire_after_create(digest, value, updated_at)
    }
}
