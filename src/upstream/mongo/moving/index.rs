//! A tenant's indexes in either kind of place: what `front/mongo/rewrite/index.rs` made of what the client said, and back.

use bson::{Document as Tree, doc};

use super::{Move, MoveError, ORG};
use crate::{
    tenant::{Isolation, OrgId},
    upstream::mongo::{
        Error, Upstream,
        account::{decode, run},
    },
};

/// Stands between the name of an index in a shared collection and its tenant's.
const MARK: char = '~';

/// Indexes read at once: a collection has 64 at most.
const BATCH: i32 = 100;

/// `IndexNotFound`, `CannotCreateIndex` for one too many, `NamespaceNotFound`.
const NO_INDEX: i32 = 27;
const NO_ROOM: i32 = 67;
const NO_COLLECTION: i32 = 26;

impl Upstream {
    pub(super) async fn indexes(&self, database: &str, collection: &str) -> Result<Vec<Tree>, MoveError> {
        let ask = doc! { "listIndexes": collection, "cursor": { "batchSize": BATCH }, "$db": database };
        let told = match run(self, ask).await {
            Err(error) if error.code() == Some(NO_COLLECTION) => return Ok(Vec::new()),
            other => decode(&other?)?,
        };
        let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
        let batch = batch.map_err(|_| Error::Protocol("listIndexes without a batch"))?;
        Ok(batch.iter().filter_map(|it| it.as_document().cloned()).collect())
    }

    /// Makes the tenant's indexes of a collection in the place to go to.
    pub(super) async fn carry_indexes(
        &self,
        it: &Move,
        name: &(String, String),
        source: &str,
        target: &str,
    ) -> Result<(), MoveError> {
        for index in self.indexes(source, &name.1).await? {
            let Some(index) = (match it.to {
                Isolation::Database => unshared(&index, &it.org),
                Isolation::Filter => shared(&index, &it.org),
            }) else {
                continue;
            };
            let unique = index.get_bool("unique").unwrap_or(false);
            let make = doc! { "createIndexes": &name.1, "indexes": [index], "$db": target };
            match run(self, make).await {
                // As for a client: an index that only makes faster is left out where there is no room for it.
                Err(error) if error.code() == Some(NO_ROOM) && !unique => {}
                Err(error @ Error::Refused { .. }) => {
                    return Err(MoveError::Unfit(format!("an index of {}.{}: {error}", name.0, name.1)));
                }
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// Drops the tenant's indexes of a shared collection.
    pub(super) async fn drop_indexes(&self, org: &OrgId, database: &str, collection: &str) -> Result<(), MoveError> {
        for index in self.indexes(database, collection).await? {
            let name = index.get_str("name").unwrap_or_default();
            if name.rsplit_once(MARK).is_none_or(|(_, of)| of != org.as_str()) {
                continue;
            }
            match run(self, doc! { "dropIndexes": collection, "index": name, "$db": database }).await {
                Err(error) if matches!(error.code(), Some(NO_INDEX | NO_COLLECTION)) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }
}

/// An index of a shared collection as one of the tenant's own; `None` for another tenant's.
fn unshared(index: &Tree, org: &OrgId) -> Option<Tree> {
    let (name, of) = index.get_str("name").ok()?.rsplit_once(MARK)?;
    if of != org.as_str() {
        return None;
    }
    let mut own = Tree::new();
    for (key, value) in index {
        match key.as_str() {
            "v" | "ns" => {}
            "name" => drop(own.insert("name", name)),
            "partialFilterExpression" => {
                let mut filter = value.as_document()?.clone();
                filter.remove(ORG);
                // As `front/mongo/rewrite/index.rs` wrapped what the client said.
                let only = filter.len() == 1;
                let inner = filter.get_array("$and").ok().and_then(|list| list.first()?.as_document().cloned());
                let filter = inner.filter(|_| only).unwrap_or(filter);
                if !filter.is_empty() {
                    own.insert(key, filter);
                }
            }
            _ => drop(own.insert(key, value.clone())),
        }
    }
    Some(own)
}

/// An index of the tenant's own as one of a shared collection; `None` for the one that every collection has.
fn shared(index: &Tree, org: &OrgId) -> Option<Tree> {
    let name = index.get_str("name").ok()?;
    if name == "_id_" {
        return None;
    }
    let mut filter = doc! { ORG: org.as_str() };
    if index.get_bool("sparse").unwrap_or(false) {
        let exists: Vec<Tree> =
            index.get_document("key").ok()?.keys().map(|path| doc! { path: { "$exists": true } }).collect();
        match exists.as_slice() {
            [one] => filter.extend(one.clone()),
            _ => drop(filter.insert("$or", exists)),
        }
    }
    if let Ok(given) = index.get_document("partialFilterExpression") {
        filter.insert("$and", vec![given.clone()]);
    }
    let mut made = Tree::new();
    for (key, value) in index {
        match key.as_str() {
            "v" | "ns" | "sparse" | "partialFilterExpression" => {}
            "name" => drop(made.insert("name", format!("{name}{MARK}{org}"))),
            _ => drop(made.insert(key, value.clone())),
        }
    }
    made.insert("partialFilterExpression", filter);
    Some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn org() -> OrgId {
        OrgId::parse("acme").expect("an id")
    }

    #[test]
    fn an_index_comes_back_as_it_was() {
        for own in [
            doc! { "key": { "a": 1 }, "name": "a_1", "unique": true },
            doc! { "key": { "a": 1 }, "name": "a_1", "expireAfterSeconds": 60 },
            doc! { "key": { "a": 1, "b": -1 }, "name": "a_1_b_-1", "partialFilterExpression": { "a": { "$gt": 5 } } },
        ] {
            let there = shared(&own, &org()).expect("an index");
            assert!(there.get_str("name").is_ok_and(|name| name.ends_with("~acme")));
            let filter = there.get_document("partialFilterExpression").expect("a filter");
            assert_eq!(filter.get_str("org_id").ok(), Some("acme"));
            assert_eq!(unshared(&there, &org()), Some(own));
        }
        // Sparse becomes what it means.
        let sparse = doc! { "key": { "a": 1 }, "name": "a_1", "sparse": true };
        let back = unshared(&shared(&sparse, &org()).expect("an index"), &org()).expect("ours");
        assert_eq!(back.get_document("partialFilterExpression").ok(), Some(&doc! { "a": { "$exists": true } }));
        assert_eq!(unshared(&doc! { "key": { "a": 1 }, "name": "a_1~other" }, &org()), None);
        assert_eq!(shared(&doc! { "key": { "_id": 1 }, "name": "_id_" }, &org()), None);
    }
}
