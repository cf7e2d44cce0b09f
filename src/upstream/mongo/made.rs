//! Which shared collections are there because of whom.
//!
//! A collection of the shared databases comes into being with the first request of any tenant that needs it, and it stays:
//! nobody could drop it without a word to the others that may be writing to it at that moment. What a tenant makes so is
//! noted before it is made, in one document of the platform's own for each tenant, so that its number is exact over all
//! processes. Two tenants that make the same one at the same moment are both noted for it. What is no longer there (an
//! operator dropped it, or it was never made) is forgotten when a tenant has no more room and has noted nothing for a
//! while ([`SETTLED`]): what was noted a moment ago may be about to be made.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use bson::{Document, doc};

use super::{
    Error, Upstream,
    account::{decode, named, run},
    standing::DATABASE,
};
use crate::tenant::{Isolation, OrgId};

pub(super) const COLLECTION: &str = "made";

/// `DuplicateKey`.
const DUPLICATE_KEY: i32 = 11000;

/// After so long what was noted is there, or was not made: longer than any request takes, and than clocks differ.
const SETTLED: Duration = Duration::from_secs(300);

/// Whether there was room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// They were noted.
    Noted,
    /// None was: so many are there already.
    Full(u64),
}

impl Upstream {
    /// Those of these physical `database.collection` that are not there.
    ///
    /// # Errors
    /// The deployment can't be reached or refuses the platform.
    pub async fn absent(&self, names: &[String]) -> Result<Vec<String>, Error> {
        let mut wanted: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (database, collection) in names.iter().filter_map(|name| name.split_once('.')) {
            wanted.entry(database).or_default().push(collection);
        }
        let mut absent = Vec::new();
        for (database, mut collections) in wanted {
            collections.sort_unstable();
            collections.dedup();
            let there = named(self, database, doc! { "name": { "$in": &collections } }).await?;
            let missing = collections.into_iter().filter(|name| !there.iter().any(|it| it == name));
            absent.extend(missing.map(|name| format!("{database}.{name}")));
        }
        Ok(absent)
    }

    /// How many collections a tenant's own databases have, views among them.
    ///
    /// # Errors
    /// As [`Self::absent`].
    pub async fn own_collections(&self, org: &OrgId) -> Result<u64, Error> {
        let own = self.place(org, Isolation::Database);
        let mut count = 0;
        for database in self.databases().await?.iter().filter(|name| own.logical(name).is_some()) {
            count += named(self, database, Document::new()).await?.len();
        }
        Ok(u64::try_from(count).unwrap_or(u64::MAX))
    }

    /// Notes shared collections as the tenant's doing, all or none, if with those of before they are no more than `max`.
    ///
    /// # Errors
    /// As [`Self::absent`].
    ///
    /// # Cancel safety
    /// Dropped, they may be noted.
    pub async fn note_made(&self, org: &OrgId, names: &[String], max: u32) -> Result<Room, Error> {
        // A second time, as the first of two that come at once may have been in the way of the other.
        if self.put_made(org, names, max).await? || self.put_made(org, names, max).await? {
            return Ok(Room::Noted);
        }
        let (before, noted_ms) = self.noted(org).await?;
        let mut gone = Vec::new();
        if now_ms().saturating_sub(noted_ms) > i64::try_from(SETTLED.as_millis()).unwrap_or(i64::MAX) {
            gone = self.absent(&before).await?;
        }
        if !gone.is_empty() {
            // Not where another one was noted meanwhile.
            let pull = doc! {
                "q": { "_id": self.names.base(org), "noted_ms": noted_ms }, "u": { "$pullAll": { "names": &gone } },
            };
            run(self, doc! { "update": COLLECTION, "updates": [pull], "$db": DATABASE }).await?;
            if self.put_made(org, names, max).await? {
                return Ok(Room::Noted);
            }
        }
        Ok(Room::Full(u64::try_from(before.len() - gone.len()).unwrap_or(u64::MAX)))
    }

    async fn put_made(&self, org: &OrgId, names: &[String], max: u32) -> Result<bool, Error> {
        let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
        let Some(first_too_many) = max.checked_sub(count) else { return Ok(false) };
        let full = format!("names.{first_too_many}");
        // Two requests may be about to make the same one.
        let room = vec![doc! { full: { "$exists": false } }, doc! { "names": { "$all": names } }];
        // Where there is none, the filter finds nothing and the insertion meets what is there.
        let put = doc! {
            "findAndModify": COLLECTION, "query": { "_id": self.names.base(org), "$or": room },
            "update": { "$addToSet": { "names": { "$each": names } }, "$max": { "noted_ms": now_ms() } },
            "upsert": true, "fields": { "_id": 1 }, "writeConcern": { "w": "majority" }, "$db": DATABASE,
        };
        match run(self, put).await {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(DUPLICATE_KEY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The shared collections that were noted as the tenant's doing.
    ///
    /// # Errors
    /// As [`Self::absent`].
    pub async fn made(&self, org: &OrgId) -> Result<Vec<String>, Error> {
        Ok(self.noted(org).await?.0)
    }

    /// The same, and when the last of them was noted.
    async fn noted(&self, org: &OrgId) -> Result<(Vec<String>, i64), Error> {
        let ask = doc! { "find": COLLECTION, "filter": { "_id": self.names.base(org) }, "limit": 1, "$db": DATABASE };
        let told = decode(&run(self, ask).await?)?;
        let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
        let batch = batch.map_err(|_| Error::Protocol("a cursor without a batch"))?;
        let Some(found) = batch.first().and_then(|found| found.as_document()) else { return Ok((Vec::new(), 0)) };
        let names = found.get_array("names").map(Vec::as_slice).unwrap_or_default();
        let names = names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect();
        Ok((names, found.get_i64("noted_ms").unwrap_or_default()))
    }

    /// Forgets what a tenant made: the next tenant of this name begins anew.
    pub(super) async fn forget_made(&self, org: &OrgId) -> Result<(), Error> {
        let mine = doc! { "q": { "_id": self.names.base(org) }, "limit": 1 };
        run(self, doc! { "delete": COLLECTION, "deletes": [mine], "$db": DATABASE }).await.map(drop)
    }
}

/// Milliseconds since 1970.
fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
