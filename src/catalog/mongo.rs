//! The catalog on MongoDB: collections `orgs`, `tiers` and `service_keys` of one database, which operators may change
//! by hand. Nothing holds all of them in memory.
//!
//! Opening connects to nothing: a process starts, and serves whom it knows, while MongoDB is away.

mod document;
mod follow;
mod init;
mod source;
mod tiers;

use std::{sync::Arc, time::Duration};

use bson::{Document, RawDocumentBuf, doc};
use futures_util::StreamExt;
use mongodb::{
    Client, Collection, Database,
    error::{Error, ErrorKind, WriteFailure},
    options::{ClientOptions, ConnectionString, ReadConcern, ReadPreference, SelectionCriteria, Tls, WriteConcern},
};
use tokio::sync::{mpsc, watch};

pub(super) use self::document::UPDATED_AT;
pub use self::init::Made;
pub(super) use self::source::MongoSource;
use self::tiers::Overrides;
use super::{
    Config, Expect, Fault,
    document::{KeyRecord, Record, hex},
    ledger::STAMP,
    source::{Found, Health},
};
use crate::tenant::{OrgId, directory::KeyHash, namespace::Password};

/// The database, by default.
pub const DATABASE: &str = "dynabase";

pub(super) const ORGS: &str = "orgs";
const TIERS: &str = "tiers";
const KEYS: &str = "service_keys";

/// Documents read ahead of whoever lists them.
const LIST_AHEAD: usize = 64;

/// Longest wait for a server that takes operations, and for a connection to it.
const REACH_WITHIN: Duration = Duration::from_secs(2);

/// Longest wait for an answer. Longer than [`REACH_WITHIN`], so that its words are heard.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// Connections: one for the follower, one for the feeder, a few for operators' commands.
const POOL: u32 = 8;

/// MongoDB's code for a document whose key is there already.
const DUPLICATE_KEY: i32 = 11000;

/// A database with the catalog's collections. Cheap to clone.
#[derive(Clone)]
pub struct MongoCatalog(Arc<Inner>);

/// What is shared by all clones.
struct Inner {
    database: Database,
    health: Health,
    overrides: Overrides,
    /// Whether it can be read now; set by the follower.
    up: watch::Sender<State>,
}

/// What a deployment lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Collections that are not there.
    pub missing: Vec<&'static str>,
    /// Why there are no change streams.
    pub without_streams: Option<String>,
}

/// How the source is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not tried yet, or the first try is under way.
    New,
    /// Followed to its end.
    Up,
    /// It was lost.
    Away,
}

impl MongoCatalog {
    /// Makes the client. Connects to nothing.
    ///
    /// # Errors
    /// What is wrong with the configuration, without a word of it.
    pub(super) async fn open(config: &Config) -> Result<Self, Fault> {
        let url = config.url.as_ref().ok_or_else(|| Fault::Unavailable("catalog.url is required".into()))?;
        let mut options = parse(url).map_err(Fault::Unavailable)?;
        if let (Some(Tls::Enabled(tls)), Some(path)) = (&mut options.tls, &config.ca_file) {
            tls.ca_file_path = Some(path.clone());
        }
        options.app_name = Some("dynabase catalog".into());
        options.max_pool_size = Some(POOL);
        options.server_selection_timeout = Some(REACH_WITHIN);
        options.connect_timeout = Some(REACH_WITHIN);
        options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
        // What is acted on must not be rolled back.
        options.read_concern = Some(ReadConcern::majority());
        options.write_concern = Some(WriteConcern::majority());
        let client = Client::with_options(options).map_err(|error| unavailable(&error))?;
        let inner = Inner {
            database: client.database(&config.database),
            health: Health::new(),
            overrides: Overrides::default(),
            up: watch::Sender::new(State::New),
        };
        Ok(Self(Arc::new(inner)))
    }

    /// The database with the catalog's collections; its client makes sessions and transactions.
    pub fn database(&self) -> &Database {
        &self.0.database
    }

    pub(super) fn health(&self) -> &Health {
        &self.0.health
    }

    /// The tiers that `text` gives, under what the collection `tiers` was last known to say.
    pub(super) fn tiers(&self, text: &str) -> Result<crate::tenant::Tiers, String> {
        self.0.overrides.over(text)
    }

    /// Reads the collection `tiers`.
    pub(super) async fn read_tiers(&self) -> Result<(), Fault> {
        tiers::read(&self.0).await.map(|_| ()).map_err(|error| unavailable(&error))
    }

    /// Waits until it was reached once.
    pub(super) async fn reached(&self) {
        let mut up = self.0.up.subscribe();
        // The sender lives as long as `self`.
        let _ = up.wait_for(|state| *state == State::Up).await;
    }

    /// Asks the server for a sign of life.
    pub(super) async fn ping(&self) -> Result<(), Fault> {
        within(self.0.database.run_command(doc! {"ping": 1})).await.map(|_| ())
    }

    /// What it lacks.
    pub(super) async fn about(&self) -> Result<About, Fault> {
        let there = within(self.0.database.list_collection_names()).await?;
        let missing = [ORGS, TIERS, KEYS].into_iter().filter(|name| !there.iter().any(|it| it == name)).collect();
        let stream = tokio::time::timeout(ANSWER_WITHIN, self.0.database.watch()).await;
        let without_streams = match stream {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(words(&error)),
            Err(_) => Some("no answer".into()),
        };
        Ok(About { missing, without_streams })
    }

    /// Makes the collections with their rules and indexes; what is there is brought up to date.
    pub(super) async fn init(&self) -> Result<Vec<Made>, Fault> {
        let made = init::run(&self.0.database).await.map_err(|error| unavailable(&error))?;
        self.init_ledger().await?;
        Ok(made)
    }

    pub(super) async fn get(&self, org: &OrgId) -> Result<Record, Fault> {
        let raw = within(self.raw(ORGS).find_one(doc! {"_id": org.as_str()})).await?;
        known(raw.map(|raw| document::org(&raw, org)))
    }

    pub(super) fn list(&self) -> mpsc::Receiver<Result<Record, Fault>> {
        self.list_with(doc! {})
    }

    pub(super) fn list_with(&self, filter: Document) -> mpsc::Receiver<Result<Record, Fault>> {
        self.stream(ORGS, filter, |raw| match document::org_of(raw) {
            Some(org) => document::org(raw, &org),
            None => Found::Damaged("its _id is no organisation's".into(), 0, document::stamp(raw)),
        })
    }

    pub(super) async fn put(&self, record: Record, expect: Expect) -> Result<(), Fault> {
        let org = record.tenant.org.clone();
        let filter = match expect {
            Expect::Absent => {
                let mut document = writable(&record)?;
                document.insert(UPDATED_AT, bson::DateTime::now());
                return within(self.documents(ORGS).insert_one(document)).await.map(|_| ());
            }
            Expect::Epoch(epoch) => {
                doc! {"_id": org.as_str(), "epoch": i64::try_from(epoch).unwrap_or(i64::MAX)}
            }
        };
        let present = self.get(&org).await?;
        let Expect::Epoch(epoch) = expect else { return Err(Fault::Exists) };
        if present.tenant.epoch != epoch || record.tenant.epoch < epoch {
            return Err(Fault::Stale { present: present.tenant.epoch });
        }
        let routed = !present.tenant.routes.is_empty() && record.tenant.routes.is_empty();
        let mut set = writable(&record.over(present))?;
        set.remove("_id");
        // The ledger's alone: this writer may have read before a transition began.
        set.remove(STAMP);
        // What the document has beyond our fields stays, as nothing names it.
        let mut update = doc! {"$set": set, "$currentDate": {UPDATED_AT: true}};
        if routed {
            update.insert("$unset", doc! {"routes": ""});
        }
        let done = within(self.documents(ORGS).update_one(filter, update)).await?;
        if done.matched_count == 1 {
            return Ok(());
        }
        let present = self.get(&org).await?;
        Err(Fault::Stale { present: present.tenant.epoch })
    }

    pub(super) async fn delete(&self, org: &OrgId) -> Result<(), Fault> {
        self.remove(ORGS, org.as_str()).await
    }

    pub(super) async fn create_key(&self, record: KeyRecord) -> Result<(), Fault> {
        let text = record.to_json();
        KeyRecord::parse(&text, &record.key.hash).map_err(Fault::Damaged)?;
        let document = document::document(&text).map_err(Fault::Damaged)?;
        within(self.documents(KEYS).insert_one(document)).await.map(|_| ())
    }

    pub(super) fn list_keys(&self, org: Option<OrgId>) -> mpsc::Receiver<Result<KeyRecord, Fault>> {
        let filter = org.map_or_else(Document::new, |org| doc! {"org": org.as_str()});
        self.stream(KEYS, filter, |raw| match document::key_of(raw) {
            Some(hash) => document::key(raw, &hash),
            None => Found::Damaged("its _id is no key's".into(), 0, document::stamp(raw)),
        })
    }

    pub(super) async fn revoke_key(&self, hash: &KeyHash) -> Result<(), Fault> {
        self.remove(KEYS, &hex(hash)).await
    }

    async fn remove(&self, collection: &str, id: &str) -> Result<(), Fault> {
        let done = within(self.documents(collection).delete_one(doc! {"_id": id})).await?;
        if done.deleted_count == 1 { Ok(()) } else { Err(Fault::Unknown) }
    }

    pub(super) fn documents(&self, name: &str) -> Collection<Document> {
        self.0.database.collection(name)
    }

    fn raw(&self, name: &str) -> Collection<RawDocumentBuf> {
        self.0.database.collection(name)
    }

    fn stream<T: Send + 'static>(
        &self,
        collection: &str,
        filter: Document,
        read: impl Fn(&RawDocumentBuf) -> Found<T> + Send + 'static,
    ) -> mpsc::Receiver<Result<T, Fault>> {
        let (sender, receiver) = mpsc::channel(LIST_AHEAD);
        let collection = self.raw(collection);
        // It ends with its receiver, or with the cursor.
        tokio::spawn(async move {
            let mut cursor = match within(collection.find(filter)).await {
                Ok(cursor) => cursor,
                Err(fault) => return drop(sender.send(Err(fault)).await),
            };
            while let Some(next) = cursor.next().await {
                let item = match next {
                    Ok(raw) => known(Some(read(&raw))).map_err(|fault| match fault {
                        Fault::Damaged(what) => Fault::Damaged(format!("{}: {what}", document::name(&raw))),
                        other => other,
                    }),
                    Err(error) => Err(unavailable(&error)),
                };
                let last = matches!(item, Err(Fault::Unavailable(_)));
                if sender.send(item).await.is_err() || last {
                    return;
                }
            }
        });
        receiver
    }
}

impl Inner {
    fn state(&self) -> State {
        *self.up.borrow()
    }

    /// Says whether the change of state is news.
    fn set_state(&self, state: State) -> bool {
        self.up.send_if_modified(|present| std::mem::replace(present, state) != state)
    }
}

/// Parses a catalog's URL.
///
/// # Errors
/// What is wrong, without a word of it: the parser's own words may quote a piece of the password.
pub(super) fn parse(url: &Password) -> Result<ClientOptions, String> {
    let url = url.expose();
    if url.starts_with("mongodb+srv://") {
        return Err("is a mongodb+srv:// URL: give the servers themselves, \
                    mongodb://user:password@host1,host2,host3/?tls=true&replicaSet=NAME"
            .into());
    }
    let wrong = "is not a URL such as mongodb://user:password@host:27017/?replicaSet=rs0 (escape @ : / % in it)";
    let parsed = ConnectionString::parse(url).map_err(|_| wrong)?;
    let options = futures_util::FutureExt::now_or_never(async { ClientOptions::parse(parsed).await });
    // Without a look-up in DNS, parsing never waits.
    options.and_then(Result::ok).ok_or_else(|| wrong.into())
}

/// A document that can be read again.
fn writable(record: &Record) -> Result<Document, Fault> {
    let text = record.to_json();
    Record::parse(&text, &record.tenant.org).map_err(Fault::Damaged)?;
    document::document(&text).map_err(Fault::Damaged)
}

fn known<T>(found: Option<Found<T>>) -> Result<T, Fault> {
    match found {
        Some(Found::Good(record, _)) => Ok(record),
        Some(Found::Absent) | None => Err(Fault::Unknown),
        Some(Found::Damaged(what, ..)) => Err(Fault::Damaged(what)),
        Some(Found::Away(what)) => Err(Fault::Unavailable(what)),
    }
}

/// Waits for an answer, not for ever.
pub(super) async fn within<T>(work: impl IntoFuture<Output = mongodb::error::Result<T>>) -> Result<T, Fault> {
    match tokio::time::timeout(ANSWER_WITHIN, work.into_future()).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(fault(&error)),
        Err(_) => Err(Fault::Unavailable("MongoDB does not answer".into())),
    }
}

fn fault(error: &Error) -> Fault {
    match code(error) {
        Some(DUPLICATE_KEY) => Fault::Exists,
        _ => match error.kind.as_ref() {
            ErrorKind::Write(WriteFailure::WriteError(refused)) => Fault::Damaged(refused.message.clone()),
            _ => unavailable(error),
        },
    }
}

fn unavailable(error: &Error) -> Fault {
    Fault::Unavailable(words(error))
}

/// The server's code of an error.
fn code(error: &Error) -> Option<i32> {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => Some(command.code),
        ErrorKind::Write(WriteFailure::WriteError(refused)) => Some(refused.code),
        ErrorKind::Write(WriteFailure::WriteConcernError(refused)) => Some(refused.code),
        _ => None,
    }
}

/// One line for people.
fn words(error: &Error) -> String {
    let text = match error.kind.as_ref() {
        ErrorKind::Command(command) => format!("{} ({})", command.message, command.code),
        ErrorKind::ServerSelection { .. } => {
            let text = error.to_string();
            // What the driver knows of the servers, which names the reason.
            text.split("Error: Kind: ").nth(1).map_or_else(
                || "no server of the URL answers as a primary".to_owned(),
                |reason| format!("no server answers: {}", reason.split(", labels").next().unwrap_or(reason)),
            )
        }
        kind => kind.to_string(),
    };
    text.lines().next().unwrap_or_default().chars().take(300).collect()
}
