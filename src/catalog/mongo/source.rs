//! The collections as the feeder reads them. A follower of its own tells of changes; what was handed out is looked at
//! again as a whole only when news may have been lost, or where the server gives none.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bson::{Document as Bson, RawDocumentBuf, doc};
use futures_util::TryStreamExt;
use tokio::task::JoinHandle;

use super::{ANSWER_WITHIN, Inner, KEYS, MongoCatalog, ORGS, State, document, follow, words};
use crate::{
    catalog::{
        document::{hex, unhex},
        source::{Change, Document, Found, Health, News, Source, Stamp, Why},
    },
    quota::Table,
    tenant::{OrgId, directory::KeyHash},
};

/// Documents asked for at once: some 300 KB of answer.
const CHUNK: usize = 1_000;

/// The collections with their follower.
pub(in crate::catalog) struct MongoSource {
    inner: Arc<Inner>,
    news: News,
    follower: JoinHandle<()>,
}

impl MongoSource {
    /// Starts following; changed tiers go straight into `table`. Ends when dropped.
    pub(in crate::catalog) fn new(catalog: &MongoCatalog, table: Arc<Table>) -> Self {
        let news = News::new();
        let follower = tokio::spawn(follow::run(Arc::clone(&catalog.0), table, news.teller()));
        Self { inner: Arc::clone(&catalog.0), news, follower }
    }
}

impl Drop for MongoSource {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Source for MongoSource {
    /// As long as the next news of one burst takes.
    const GATHER: Duration = Duration::from_millis(1);

    /// News is lost with a connection, which is not made again and again at once.
    const SCAN_SOON: Duration = Duration::from_millis(20);

    /// One small question every two seconds: a stream that is silently behind, as after a restore, is found out within
    /// seconds in a small deployment, and within a minute with ten thousand tenants in use.
    const SCAN_MAX: usize = 300;

    fn news(&mut self) -> &mut News {
        &mut self.news
    }

    fn health(&self) -> &Health {
        &self.inner.health
    }

    async fn read(&mut self, wanted: Vec<Change>, why: Why) -> Vec<Document> {
        let found = match self.inner.state() {
            // The driver would wait for a server that we know to be away: nobody should wait with it.
            State::Away => Err("MongoDB is away".to_owned()),
            State::New | State::Up => tokio::time::timeout(ANSWER_WITHIN, self.fetch(&wanted, why))
                .await
                .unwrap_or_else(|_| Err("MongoDB does not answer".to_owned())),
        };
        wanted
            .into_iter()
            .map(|change| match (change, &found) {
                (Change::Org(org), Ok(found)) => {
                    let read = found.orgs.get(&org).map_or(Found::Absent, |raw| document::org(raw, &org));
                    Document::Org(org, read)
                }
                (Change::Key(hash), Ok(found)) => {
                    let read = found.keys.get(&hash).map_or(Found::Absent, |raw| document::key(raw, &hash));
                    Document::Key(hash, read)
                }
                (Change::Org(org), Err(what)) => Document::Org(org, Found::Away(what.clone())),
                (Change::Key(hash), Err(what)) => Document::Key(hash, Found::Away(what.clone())),
            })
            .collect()
    }

    async fn stamps(&mut self, of: Vec<Change>) -> Option<Vec<(Change, Option<Stamp>)>> {
        match self.inner.state() {
            State::Away => return None,
            State::New if of.is_empty() => return Some(Vec::new()),
            State::New | State::Up => {}
        }
        let mut stamps = Vec::with_capacity(of.len());
        for part in of.chunks(CHUNK) {
            let reading = tokio::time::timeout(ANSWER_WITHIN, self.fetch(part, Why::Changed));
            let found = reading.await.ok()?.ok()?;
            for change in part {
                let raw = match change {
                    Change::Org(org) => found.orgs.get(org),
                    Change::Key(hash) => found.keys.get(hash),
                };
                stamps.push((change.clone(), raw.map(|raw| document::stamp(raw))));
            }
        }
        Some(stamps)
    }
}

#[derive(Default)]
struct Read {
    orgs: HashMap<OrgId, RawDocumentBuf>,
    keys: HashMap<KeyHash, RawDocumentBuf>,
}

impl MongoSource {
    /// Reads documents, each collection in one round trip.
    async fn fetch(&self, wanted: &[Change], why: Why) -> Result<Read, String> {
        let mut orgs = Vec::new();
        let mut keys = Vec::new();
        for change in wanted {
            match change {
                Change::Org(org) => orgs.push(org.as_str().to_owned()),
                Change::Key(hash) => keys.push(hex(hash)),
            }
        }
        let (orgs, keys) = tokio::try_join!(self.of(ORGS, orgs, why), self.of(KEYS, keys, why))?;
        Ok(Read {
            orgs: orgs.into_iter().filter_map(|raw| Some((document::org_of(&raw)?, raw))).collect(),
            keys: keys.into_iter().filter_map(|raw| Some((unhex(raw.get_str("_id").ok()?)?, raw))).collect(),
        })
    }

    async fn of(&self, collection: &'static str, ids: Vec<String>, why: Why) -> Result<Vec<RawDocumentBuf>, String> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let (count, batch) = (ids.len(), u32::try_from(ids.len()).unwrap_or(u32::MAX));
        let filter = match <[String; 1]>::try_from(ids) {
            Ok([id]) => doc! {"_id": id},
            Err(ids) => doc! {"_id": {"$in": ids}},
        };
        let collection_handle = self.inner.database.collection::<RawDocumentBuf>(collection);
        let found = collection_handle.find(filter).batch_size(batch).await;
        let found: Vec<_> = match found {
            Ok(cursor) => cursor.try_collect().await.map_err(|error| words(&error))?,
            Err(error) => return Err(words(&error)),
        };
        if why == Why::Changed && found.len() < count && !self.exists(collection).await? {
            // Dropped, or about to be restored: that says nothing about those who were in it.
            return Err(format!("the collection {collection} is gone"));
        }
        Ok(found)
    }

    async fn exists(&self, collection: &str) -> Result<bool, String> {
        let command: Bson = doc! {
            "listCollections": 1, "filter": {"name": collection}, "nameOnly": true, "authorizedCollections": true,
        };
        let reply = self.inner.database.run_command(command).await.map_err(|error| words(&error))?;
        let batch = reply.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
        Ok(batch.is_ok_and(|batch| !batch.is_empty()))
    }
}
