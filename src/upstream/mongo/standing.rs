//! What the deployment holds of a tenant beyond its documents: the caps it stands under. MongoDB has none per user; the
//! proxy enforces them. Which ones were decided last is kept in a database of the platform's own, written only by who is
//! newer than the last writer, so that it can be read back.

use bson::{Document, doc};
use serde::{Deserialize, Serialize};

use super::{
    Error, Upstream,
    account::{decode, run},
    holdings::number,
};
use crate::tenant::{OrgId, Tier, tier::MongodbLimits};

/// The platform's own database: no tenant's name can be it.
pub(super) const DATABASE: &str = "dynabase_platform";

pub(super) const COLLECTION: &str = "standings";

/// `DuplicateKey`.
const DUPLICATE_KEY: i32 = 11000;

/// The caps a tenant stands under, as the deployment keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The tier's name.
    pub tier: String,
    /// Operations at a time.
    pub connections: i64,
    /// Longest operation in milliseconds.
    pub timeout_ms: i64,
    /// Open cursors.
    pub cursors: i64,
}

impl Standing {
    /// What a tier gives.
    pub fn of(tier: Tier, limits: &MongodbLimits) -> Self {
        Self {
            tier: tier.name().to_owned(),
            connections: limits.connections.into(),
            timeout_ms: i64::try_from(limits.timeout.as_millis()).unwrap_or(i64::MAX),
            cursors: limits.cursors.into(),
        }
    }

    /// Room for both; the later name.
    #[must_use]
    pub fn or_more(&self, other: &Self) -> Self {
        Self {
            tier: self.tier.clone(),
            connections: self.connections.max(other.connections),
            timeout_ms: self.timeout_ms.max(other.timeout_ms),
            cursors: self.cursors.max(other.cursors),
        }
    }
}

impl Upstream {
    /// What the deployment keeps of a tenant's caps; `None` before its first transition.
    ///
    /// # Errors
    /// It can't be reached or refuses the platform.
    pub async fn standing(&self, org: &OrgId) -> Result<Option<Standing>, Error> {
        let ask = doc! { "find": COLLECTION, "filter": { "_id": self.names.base(org) }, "limit": 1, "$db": DATABASE };
        let told = decode(&run(self, ask).await?)?;
        let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
        let batch = batch.map_err(|_| Error::Protocol("a cursor without a batch"))?;
        let Some(found) = batch.first().and_then(|found| found.as_document()) else { return Ok(None) };
        let read = bson::deserialize_from_document(found.clone());
        read.map(Some).map_err(|_| Error::Protocol("a standing that is not what was written"))
    }

    /// The fence of who wrote a tenant's caps last.
    pub(super) async fn standing_fence(&self, org: &OrgId) -> Result<Option<u64>, Error> {
        let ask = doc! {
            "find": COLLECTION, "filter": { "_id": self.names.base(org) }, "projection": { "fence": 1 }, "limit": 1,
            "$db": DATABASE,
        };
        let told = decode(&run(self, ask).await?)?;
        let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
        let batch = batch.map_err(|_| Error::Protocol("a cursor without a batch"))?;
        Ok(batch.first().and_then(|found| number(found.as_document()?, "fence")))
    }

    /// Keeps a tenant's caps, not where somebody newer than `fence` and `stage` has. Says whether it did.
    ///
    /// # Errors
    /// It can't be reached (nothing was done, or the answer was lost) or refuses the platform.
    ///
    /// # Cancel safety
    /// Dropped, it may happen yet.
    pub async fn set_standing(&self, org: &OrgId, standing: &Standing, fence: u64, stage: u8) -> Result<bool, Error> {
        let fence = i64::try_from(fence).unwrap_or(i64::MAX);
        let older =
            vec![doc! { "fence": { "$lt": fence } }, doc! { "fence": fence, "stage": { "$lte": i32::from(stage) } }];
        let mut set: Document =
            bson::serialize_to_document(standing).map_err(|_| Error::Protocol("a standing that is no BSON"))?;
        set.insert("fence", fence);
        set.insert("stage", i32::from(stage));
        // Where a newer one stands, the filter finds nothing and the insertion meets it.
        let put = doc! {
            "findAndModify": COLLECTION, "query": { "_id": self.names.base(org), "$or": older },
            "update": { "$set": set }, "upsert": true, "writeConcern": { "w": "majority" }, "$db": DATABASE,
        };
        match run(self, put).await {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(DUPLICATE_KEY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Forgets a tenant's caps: the next tenant of this name begins anew.
    pub(super) async fn forget_standing(&self, org: &OrgId) -> Result<(), Error> {
        let mine = vec![doc! { "q": { "_id": self.names.base(org) }, "limit": 1 }];
        run(self, doc! { "delete": COLLECTION, "deletes": mine, "$db": DATABASE }).await.map(drop)
    }
}
