//! The catalog: which organisations there are, on which plan, and their service keys. Nobody else knows how it is
//! kept.
//!
//! [`Catalog`] is one interface over every kind of catalog. [`Catalog::feed`] is the task that answers questions
//! ([`crate::tenant::directory::Ask`]) and carries changes into the table of live limits; the rest is for operators
//! and may be slow.

pub(crate) mod date;
mod document;
mod feed;
mod file;
pub mod ledger;
mod watch;

#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

pub use document::{KeyRecord, Record};
pub use file::FileCatalog;
pub use ledger::{Decision, Entry, LedgerFault, Over, Part, Phase, Stamp, Step, now_ms};
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::{
    quota::Table,
    tenant::{
        OrgId,
        directory::{Ask, KeyHash},
    },
};

/// The `[catalog]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The folder of the file catalog; made if it is not there. Required. Not on a network file system, where
    /// changes are seen after two seconds only.
    pub path: PathBuf,
}

impl Config {
    /// Every fault in words; empty when there is none.
    pub fn check(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.path.as_os_str().is_empty() {
            faults.push("catalog.path must not be empty".to_owned());
        } else if self.path.exists() && !self.path.is_dir() {
            faults.push("catalog.path is not a folder".to_owned());
        }
        faults
    }
}

/// Why the catalog did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no such document.
    Unknown,
    /// There already is one.
    Exists,
    /// The document is not the one that the caller saw, or the new one is older: read again, decide again.
    Stale {
        /// The epoch in the catalog.
        present: u64,
    },
    /// The document is there and can't be understood; what is wrong with it. An operator has to mend it.
    Damaged(String),
    /// The catalog can't be read or written now; nothing was changed. Trying again later may succeed.
    Unavailable(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Unknown => f.write_str("there is no such document in the catalog"),
            Fault::Exists => f.write_str("it is in the catalog already"),
            Fault::Stale { present } => write!(f, "the catalog is at epoch {present} meanwhile; look again"),
            Fault::Damaged(what) => write!(f, "the document is damaged: {what}"),
            Fault::Unavailable(what) => write!(f, "the catalog is not available: {what}"),
        }
    }
}

impl std::error::Error for Fault {}

/// What a writer believes to be in the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nothing: the document is new.
    Absent,
    /// The document with this epoch.
    Epoch(u64),
}

/// A catalog of some kind. Cheap to clone.
#[derive(Clone)]
pub enum Catalog {
    /// A folder of documents on this machine.
    File(FileCatalog),
}

impl Catalog {
    /// Opens the catalog that the configuration names.
    ///
    /// # Errors
    /// [`Fault::Unavailable`].
    pub async fn open(config: &Config) -> Result<Self, Fault> {
        FileCatalog::open(config.path.clone()).await.map(Self::File)
    }

    /// Gives one organisation's document.
    ///
    /// # Errors
    /// [`Fault::Unknown`], [`Fault::Damaged`], [`Fault::Unavailable`].
    pub async fn get(&self, org: &OrgId) -> Result<Record, Fault> {
        match self {
            Catalog::File(files) => files.get(org).await,
        }
    }

    /// Streams every organisation's document, in no order; a damaged one comes as its fault. Dropping the receiver
    /// ends it.
    pub fn list(&self) -> mpsc::Receiver<Result<Record, Fault>> {
        match self {
            Catalog::File(files) => files.list(),
        }
    }

    /// Creates or updates a document. Fields that only the present one has are kept, and so is `created_at`.
    ///
    /// # Errors
    /// [`Fault::Exists`], [`Fault::Unknown`], [`Fault::Stale`], [`Fault::Damaged`] (the present document, or
    /// the new one), [`Fault::Unavailable`] (also a full disk; the present document is intact).
    ///
    /// # Cancel safety
    /// Dropped, it happens wholly or not at all; which is not known.
    pub async fn put(&self, record: Record, expect: Expect) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.put(record, expect).await,
        }
    }

    /// Deletes a document; its live sessions end. Its service keys stay until they are revoked: they open nothing.
    ///
    /// # Errors
    /// [`Fault::Unknown`], [`Fault::Unavailable`].
    pub async fn delete(&self, org: &OrgId) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.delete(org).await,
        }
    }

    /// Keeps a new service key.
    ///
    /// # Errors
    /// [`Fault::Exists`], [`Fault::Damaged`] (the new one), [`Fault::Unavailable`].
    pub async fn create_key(&self, record: KeyRecord) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.create_key(record).await,
        }
    }

    /// Streams the service keys of one organisation, or all, in no order. Dropping the receiver ends it.
    pub fn list_keys(&self, org: Option<&OrgId>) -> mpsc::Receiver<Result<KeyRecord, Fault>> {
        match self {
            Catalog::File(files) => files.list_keys(org.cloned()),
        }
    }

    /// Revokes a service key; its live sessions end.
    ///
    /// # Errors
    /// [`Fault::Unknown`], [`Fault::Unavailable`].
    pub async fn revoke_key(&self, hash: &KeyHash) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.revoke_key(hash).await,
        }
    }

    /// Answers `asks`, follows changes into `table`, and calls `forget` for every service key that was made, changed
    /// or revoked. Runs until dropped, or until nobody can ask any more. One per process.
    pub async fn feed(&self, table: Arc<Table>, forget: impl Fn(&KeyHash) + Send + Sync, asks: mpsc::Receiver<Ask>) {
        match self {
            Catalog::File(files) => feed::Feeder::new(files.clone(), table, forget).run(asks).await,
        }
    }

    /// Time since the source was last known to be readable and followed to its end.
    pub fn age(&self) -> Duration {
        match self {
            Catalog::File(files) => files.age(),
        }
    }

    /// How many damaged documents were met so far; each content counts once.
    pub fn damaged(&self) -> u64 {
        match self {
            Catalog::File(files) => files.damaged(),
        }
    }
}
