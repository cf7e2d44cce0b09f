//! Looking tenants and service keys up, wherever the catalog keeps them. The catalog's feeder task answers the
//! questions asked here, so that nothing on a client's path knows what kind of catalog there is.

use std::{fmt, sync::Arc, time::SystemTime};

use tokio::sync::{mpsc, oneshot};

use super::{OrgId, Tenant};

/// SHA-256 of a service key; the key itself is never stored.
pub type KeyHash = [u8; 32];

/// A service key as the catalog keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceKey {
    /// Which key.
    pub hash: KeyHash,
    /// Whose.
    pub org: OrgId,
    /// The logical user it stands for.
    pub user: String,
    /// When it ends; `None` is never.
    pub expires_at: Option<SystemTime>,
}

/// Why a question has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// The catalog answered: there is no such thing.
    Unknown,
    /// The catalog could not be asked; try again later.
    Unavailable,
}

/// One question to the catalog. The answer goes into the sender; a dropped sender means [`Absent::Unavailable`].
pub enum Ask {
    /// Who is this organisation?
    Tenant(OrgId, oneshot::Sender<Result<Arc<Tenant>, Absent>>),
    /// Whose key is this?
    Key(KeyHash, oneshot::Sender<Result<Arc<ServiceKey>, Absent>>),
}

/// Questions that may wait for the feeder at once; more are [`Absent::Unavailable`] at once, not queued.
pub const ASKS_MAX: usize = 1024;

/// A handle to ask the catalog. Cheap to clone.
#[derive(Clone)]
pub struct Directory(mpsc::Sender<Ask>);

impl Directory {
    /// Gives the handle and the end that the catalog's feeder serves.
    pub fn new() -> (Self, mpsc::Receiver<Ask>) {
        let (sender, receiver) = mpsc::channel(ASKS_MAX);
        (Self(sender), receiver)
    }

    /// Asks for a tenant.
    ///
    /// # Cancel safety
    /// Dropping it abandons the question; nothing else changes.
    pub async fn tenant(&self, org: &OrgId) -> Result<Arc<Tenant>, Absent> {
        self.ask(|answer| Ask::Tenant(org.clone(), answer)).await
    }

    /// Asks for a service key.
    ///
    /// # Cancel safety
    /// Dropping it abandons the question; nothing else changes.
    pub async fn key(&self, hash: KeyHash) -> Result<Arc<ServiceKey>, Absent> {
        self.ask(|answer| Ask::Key(hash, answer)).await
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<Result<T, Absent>>) -> Ask) -> Result<T, Absent> {
        let (sender, receiver) = oneshot::channel();
        self.0.try_send(question(sender)).map_err(|_| Absent::Unavailable)?;
        receiver.await.unwrap_or(Err(Absent::Unavailable))
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Directory")
    }
}
