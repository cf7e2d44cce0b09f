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
mod mongo;
mod source;

#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

pub use document::{KeyRecord, Record};
pub use file::FileCatalog;
pub use ledger::{Decision, Deed, Deletion, Entry, Kept, LedgerFault, Over, Part, Phase, Stamp, Step, now_ms};
pub use mongo::{About, DATABASE, Made, MongoCatalog};
use serde::{Deserialize, Deserializer};
use tokio::sync::mpsc;

use self::{file::FileSource, mongo::MongoSource, source::Health};
use crate::{
    quota::Table,
    tenant::{
        OrgId, Tiers,
        directory::{Ask, KeyHash},
        namespace::Password,
    },
};

/// The `[catalog]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What keeps it; `mongodb` where there is more than one process.
    pub kind: Kind,
    /// The folder of the file catalog; made if it is not there. Required with `kind = "file"`. Not on a network file
    /// system, where changes are seen after two seconds only.
    pub path: Option<PathBuf>,
    /// The URL of the MongoDB deployment. Required with `kind = "mongodb"`. Its user reads and writes `database`; a
    /// replica set gives change streams, without which changes are seen after a second only.
    #[serde(deserialize_with = "secret")]
    pub url: Option<Password>,
    /// Authorities to trust with `tls=true`, PEM. Default the URL's `tlsCAFile`, else Mozilla's list.
    pub ca_file: Option<PathBuf>,
    /// The database with the collections `orgs`, `tiers` and `service_keys`.
    pub database: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { kind: Kind::File, path: None, url: None, ca_file: None, database: DATABASE.into() }
    }
}

/// What keeps a catalog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A folder on this machine.
    #[default]
    File,
    /// MongoDB.
    Mongodb,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Password>, D::Error> {
    Ok(Some(Password::new(String::deserialize(deserializer)?)))
}

impl Config {
    /// A file catalog in a folder.
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), ..Self::default() }
    }

    /// Every fault in words; empty when there is none.
    pub fn check(&self) -> Vec<String> {
        let mut faults = Vec::new();
        match (self.kind, &self.path, &self.url) {
            (Kind::File, None, _) => faults.push("catalog.path is required: the folder of the file catalog".to_owned()),
            (Kind::File, Some(path), _) if path.as_os_str().is_empty() => {
                faults.push("catalog.path must not be empty".to_owned());
            }
            (Kind::File, Some(path), _) if path.exists() && !path.is_dir() => {
                faults.push("catalog.path is not a folder".to_owned());
            }
            (Kind::File, Some(_), Some(_)) => {
                faults.push("catalog.url is of no use with kind = \"file\": keep one of path and url".to_owned());
            }
            (Kind::File, Some(_), None) => {}
            (Kind::Mongodb, _, None) => faults.push("catalog.url is required with kind = \"mongodb\"".to_owned()),
            (Kind::Mongodb, _, Some(url)) => {
                if let Err(what) = mongo::parse(url) {
                    faults.push(format!("catalog.url {what}"));
                }
            }
        }
        // The characters that MongoDB refuses in a database's name, and its length in bytes.
        if self.database.is_empty()
            || self.database.len() > 63
            || self.database.contains(['/', '\\', '.', ' ', '"', '$', '\0'])
        {
            faults.push("catalog.database is no name of a database".to_owned());
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
    /// The catalog can't be read or written now. Nothing was changed, or, where MongoDB went away meanwhile, it is not
    /// known. Trying again later may succeed.
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
    /// Collections on MongoDB.
    Mongo(MongoCatalog),
}

impl Catalog {
    /// Opens the catalog that the configuration names.
    ///
    /// # Errors
    /// [`Fault::Unavailable`].
    pub async fn open(config: &Config) -> Result<Self, Fault> {
        match config.kind {
            Kind::File => FileCatalog::open(config.path.clone().unwrap_or_default()).await.map(Self::File),
            Kind::Mongodb => MongoCatalog::open(config).await.map(Self::Mongo),
        }
    }

    /// Gives one organisation's document.
    ///
    /// # Errors
    /// [`Fault::Unknown`], [`Fault::Damaged`], [`Fault::Unavailable`].
    pub async fn get(&self, org: &OrgId) -> Result<Record, Fault> {
        match self {
            Catalog::File(files) => files.get(org).await,
            Catalog::Mongo(mongo) => mongo.get(org).await,
        }
    }

    /// Streams every organisation's document, in no order; a damaged one comes as its fault. Dropping the receiver
    /// ends it.
    pub fn list(&self) -> mpsc::Receiver<Result<Record, Fault>> {
        match self {
            Catalog::File(files) => files.list(),
            Catalog::Mongo(mongo) => mongo.list(),
        }
    }

    /// Streams at least the documents of organisations of which something is to go when its time has come: those that
    /// are being deleted, and those whose databases have left a home. In no order; as [`Self::list`].
    pub fn leaving(&self) -> mpsc::Receiver<Result<Record, Fault>> {
        match self {
            Catalog::File(files) => files.list(),
            Catalog::Mongo(mongo) => {
                let kept = bson::doc! { ledger::KEPT: { "$exists": true } };
                mongo.list_with(bson::doc! { "$or": [{ "status": "deleting" }, kept] })
            }
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
            Catalog::Mongo(mongo) => mongo.put(record, expect).await,
        }
    }

    /// Deletes a document; its live sessions end. Its service keys stay until they are revoked: they open nothing.
    ///
    /// # Errors
    /// [`Fault::Unknown`], [`Fault::Unavailable`].
    pub async fn delete(&self, org: &OrgId) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.delete(org).await,
            Catalog::Mongo(mongo) => mongo.delete(org).await,
        }
    }

    /// Keeps a new service key.
    ///
    /// # Errors
    /// [`Fault::Exists`], [`Fault::Damaged`] (the new one), [`Fault::Unavailable`].
    pub async fn create_key(&self, record: KeyRecord) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.create_key(record).await,
            Catalog::Mongo(mongo) => mongo.create_key(record).await,
        }
    }

    /// Streams the service keys of one organisation, or all, in no order. Dropping the receiver ends it.
    pub fn list_keys(&self, org: Option<&OrgId>) -> mpsc::Receiver<Result<KeyRecord, Fault>> {
        match self {
            Catalog::File(files) => files.list_keys(org.cloned()),
            Catalog::Mongo(mongo) => mongo.list_keys(org.cloned()),
        }
    }

    /// Revokes a service key; its live sessions end.
    ///
    /// # Errors
    /// [`Fault::Unknown`], [`Fault::Unavailable`].
    pub async fn revoke_key(&self, hash: &KeyHash) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.revoke_key(hash).await,
            Catalog::Mongo(mongo) => mongo.revoke_key(hash).await,
        }
    }

    /// Answers `asks`, follows changes into `table`, and calls `forget` for every service key that was made, changed
    /// or revoked. Runs until dropped, or until nobody can ask any more. One per process.
    pub async fn feed(&self, table: Arc<Table>, forget: impl Fn(&KeyHash) + Send + Sync, asks: mpsc::Receiver<Ask>) {
        match self {
            Catalog::File(files) => feed::Feeder::new(FileSource::new(files), table, forget).run(asks).await,
            Catalog::Mongo(mongo) => {
                let source = MongoSource::new(mongo, Arc::clone(&table));
                feed::Feeder::new(source, table, forget).run(asks).await;
            }
        }
    }

    /// Time since the source was last known to be readable and followed to its end.
    pub fn age(&self) -> Duration {
        self.health().age()
    }

    /// How many damaged documents were met so far; each content counts once.
    pub fn damaged(&self) -> u64 {
        self.health().damaged()
    }

    fn health(&self) -> &Health {
        match self {
            Catalog::File(files) => files.health(),
            Catalog::Mongo(mongo) => mongo.health(),
        }
    }

    /// Waits until the source was reached once, which a feeder does.
    pub async fn reached(&self) {
        match self {
            Catalog::File(_) => {}
            Catalog::Mongo(mongo) => mongo.reached().await,
        }
    }

    /// The tiers of `tiers.toml`, whose text this is, under what the catalog is known to say about them. A feeder
    /// keeps that up to date; without one, [`Self::read_tiers`] asks for it.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn tiers(&self, text: &str) -> Result<Tiers, String> {
        match self {
            Catalog::File(_) => Tiers::parse(text).map_err(|faults| faults.join("; ")),
            Catalog::Mongo(mongo) => mongo.tiers(text),
        }
    }

    /// Asks what the catalog says about tiers.
    ///
    /// # Errors
    /// [`Fault::Unavailable`].
    pub async fn read_tiers(&self) -> Result<(), Fault> {
        match self {
            Catalog::File(_) => Ok(()),
            Catalog::Mongo(mongo) => mongo.read_tiers().await,
        }
    }

    /// Whether the source answers now.
    ///
    /// # Errors
    /// [`Fault::Unavailable`].
    pub async fn ping(&self) -> Result<(), Fault> {
        match self {
            Catalog::File(files) => files.ping().await,
            Catalog::Mongo(mongo) => mongo.ping().await,
        }
    }

    /// What the source lacks.
    ///
    /// # Errors
    /// [`Fault::Unavailable`].
    pub async fn about(&self) -> Result<About, Fault> {
        match self {
            Catalog::File(_) => Ok(About::default()),
            Catalog::Mongo(mongo) => mongo.about().await,
        }
    }

    /// Makes what the source has to have before it is used; what is there is brought up to date.
    ///
    /// # Errors
    /// [`Fault::Unavailable`].
    pub async fn init(&self) -> Result<Vec<Made>, Fault> {
        match self {
            Catalog::File(_) => Ok(Vec::new()),
            Catalog::Mongo(mongo) => mongo.init().await,
        }
    }
}
