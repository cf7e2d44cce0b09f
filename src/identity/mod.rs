//! Who is asking: a credential becomes an [`Identity`] or a refusal.
//!
//! Entry point: [`Verifier::verify`].

use std::{sync::Arc, time::SystemTime};

use crate::{
    refusal::Refusal,
    tenant::{OrgId, directory::KeyHash},
};

/// A verified caller.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The organisation it speaks for.
    pub org: OrgId,
    /// `sub` of the token, or the service key's short fingerprint. For logs.
    pub subject: Arc<str>,
    /// The one logical user it may use; `None` is any of the tenant's.
    pub user: Option<Arc<str>>,
    /// When it ends; `None` is never.
    pub expires_at: Option<SystemTime>,
    /// What it came with.
    pub proof: Proof,
}

/// What a caller proved itself with.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A token signed by the key with this `kid` (`None`: the configured HS256 secret).
    Token(Option<Arc<str>>),
    /// A service key.
    ServiceKey(KeyHash),
}

/// Verifies credentials.
#[derive(Debug)]
pub struct Verifier {}

impl Verifier {
    /// Verifies a token or a service key.
    ///
    /// # Errors
    /// [`Refusal::BadToken`] with the fault, [`Refusal::CatalogDown`] when a service key can't be looked up.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn verify(&self, _credential: &[u8]) -> Result<Arc<Identity>, Refusal> {
        Err(Refusal::Internal)
    }
}
