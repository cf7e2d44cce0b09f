//! Clearing the place where a tenant's documents are no longer looked for.

use bson::doc;

use super::{BATCH, MoveError, ORG, written_well};
use crate::{
    tenant::{Isolation, OrgId},
    upstream::mongo::{
        Error, Upstream,
        account::{collections, decode, run},
    },
};

impl Upstream {
    /// Takes away all of a tenant's documents and indexes in one kind of place.
    ///
    /// # Errors
    /// [`MoveError`]; calling again continues.
    pub async fn clear(&self, org: &OrgId, isolation: Isolation, fence: u64) -> Result<(), MoveError> {
        let place = self.place(org, isolation);
        for physical in self.databases().await? {
            if place.logical(&physical).is_none() {
                continue;
            }
            if isolation == Isolation::Database {
                // Which collections, before the look whose they are: one that has its name later is another one.
                let seen = self.identities(&physical).await?;
                for (collection, identity) in seen {
                    self.fence(org, fence).await?;
                    match run(self, drop_of(&physical, &collection, identity)).await {
                        Err(error) if matches!(error.code(), Some(NO_COLLECTION | OTHER_COLLECTION)) => {}
                        other => drop(other?),
                    }
                }
                continue;
            }
            for collection in collections(self, &physical).await? {
                while self.delete_some(org, fence, &physical, &collection).await? {}
                self.fence(org, fence).await?;
                self.drop_indexes(org, &physical, &collection).await?;
            }
        }
        Ok(())
    }

    /// Deletes a batch of a tenant's documents of a shared collection. False: there is none left.
    async fn delete_some(&self, org: &OrgId, fence: u64, database: &str, collection: &str) -> Result<bool, MoveError> {
        let mine = doc! { ORG: org.as_str() };
        let find = doc! {
            "find": collection, "filter": &mine, "projection": { "_id": 1 }, "limit": BATCH, "batchSize": BATCH,
            "singleBatch": true, "$db": database,
        };
        let told = decode(&run(self, find).await?)?;
        let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
        let batch = batch.map_err(|_| Error::Protocol("a cursor without a batch"))?;
        let ids: Vec<bson::Bson> = batch.iter().filter_map(|it| it.as_document()?.get("_id").cloned()).collect();
        if ids.is_empty() {
            return Ok(false);
        }
        let mut query = doc! { "_id": { "$in": ids } };
        query.extend(mine);
        let delete = doc! { "delete": collection, "deletes": [{ "q": query, "limit": 0 }], "$db": database };
        let bytes = bson::serialize_to_vec(&delete).map_err(|_| Error::Protocol("a command that is no BSON"))?;
        written_well(&self.fenced(org, fence, &bytes).await?, collection)?;
        Ok(true)
    }

    /// The collections of a database of the tenant's own, with what tells each from a later one of its name.
    async fn identities(&self, database: &str) -> Result<Vec<(String, Option<bson::Bson>)>, MoveError> {
        let mut seen = Vec::new();
        for collection in collections(self, database).await? {
            let ask = doc! { "listCollections": 1, "filter": { "name": &collection }, "$db": database };
            let told = decode(&run(self, ask).await?)?;
            let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
            let found = batch.ok().and_then(|batch| batch.first()?.as_document()?.get_document("info").ok());
            seen.push((collection, found.and_then(|info| info.get("uuid").cloned())));
        }
        Ok(seen)
    }
}

/// `NamespaceNotFound`, `CollectionUUIDMismatch`.
const NO_COLLECTION: i32 = 26;
const OTHER_COLLECTION: i32 = 361;

/// Drops this collection and none that was made under its name later, where the server tells them apart.
fn drop_of(database: &str, collection: &str, identity: Option<bson::Bson>) -> bson::Document {
    let mut ask = doc! { "drop": collection, "$db": database };
    ask.extend(identity.map(|identity| ("collectionUUID".to_owned(), identity)));
    ask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collection_is_dropped_by_what_it_is_not_by_its_name_alone() {
        let identity = bson::Bson::from(bson::Uuid::from_bytes([7; 16]));
        assert_eq!(drop_of("d", "c", Some(identity.clone())).get("collectionUUID"), Some(&identity));
        assert_eq!(drop_of("d", "c", None), doc! { "drop": "c", "$db": "d" });
    }
}
