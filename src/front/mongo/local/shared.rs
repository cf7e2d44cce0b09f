//! Databases and collections as a whole, as one tenant sees them: of shared collections only what is its own.

use ::bson::{Bson, Document as Tree, RawDocumentBuf, doc};

use crate::{
    front::mongo::{
        commands::Emulate,
        refuse::Answer,
        rewrite::{Local, ORG, Scope, index},
        tenancy::Way,
    },
    tenant::{Isolation, OrgId},
    upstream::mongo::{Error, Upstream, account},
    wire::mongo::bson::Document,
};

/// One question.
pub struct Ask<'a> {
    pub upstream: &'a Upstream,
    pub way: &'a Way,
    pub org: &'a OrgId,
    pub local: &'a Local<'a>,
    pub body: Document<'a>,
}

/// What came of an errand.
type Done<T> = Result<T, Error>;

impl Ask<'_> {
    /// Appends the answer.
    ///
    /// # Errors
    /// What the client gets instead.
    pub async fn put(&self, out: &mut Vec<u8>) -> Result<(), Answer> {
        let fail = |error: Error| super::failed(&error, self.way.isolation);
        let mut reply = match self.local.emulate {
            Emulate::ListDatabases => self.databases().await?,
            Emulate::ListCollections => self.list_collections().await?,
            Emulate::Drop => {
                let name = self.local.collection.unwrap_or_default();
                let indexes = self.empty(name).await.map_err(fail)?;
                doc! { "nIndexesWas": indexes + 1, "ns": format!("{}.{name}", self.local.database) }
            }
            Emulate::DropDatabase => {
                for name in self.collections().await.map_err(fail)? {
                    self.empty(&name).await.map_err(fail)?;
                }
                doc! { "dropped": self.local.database }
            }
            Emulate::DropIndexes => self.drop_indexes().await?,
            Emulate::CollStats => self.collection_stats().await.map_err(fail)?,
            _ => self.database_stats().await.map_err(fail)?,
        };
        reply.insert("ok", 1.0);
        let raw = RawDocumentBuf::try_from(&reply).map_err(|_| super::internal())?;
        out.extend_from_slice(raw.as_bytes());
        Ok(())
    }

    fn physical(&self) -> String {
        self.way.place.physical(self.local.database).unwrap_or_default()
    }

    fn mine(&self) -> Tree {
        doc! { ORG: self.org.as_str() }
    }

    async fn run(&self, command: Tree) -> Done<Tree> {
        account::decode(&account::run(self.upstream, command).await?)
    }

    async fn is_mine(&self, database: &str, collection: &str) -> Done<bool> {
        is_mine(self.upstream, self.way, self.org, database, collection).await
    }

    async fn indexes(&self, database: &str, collection: &str) -> Done<Vec<(String, Tree)>> {
        indexes(self.upstream, self.way, self.org, database, collection).await
    }

    /// The tenant's collections of the database that was asked about.
    async fn collections(&self) -> Done<Vec<String>> {
        let database = self.physical();
        let mut mine = Vec::new();
        for name in account::collections(self.upstream, &database).await? {
            if self.is_mine(&database, &name).await? {
                mine.push(name);
            }
        }
        Ok(mine)
    }

    /// Deletes the tenant's documents and indexes of a collection; gives how many indexes there were.
    async fn empty(&self, collection: &str) -> Done<i32> {
        let database = self.physical();
        let indexes = self.indexes(&database, collection).await?;
        let deletes = vec![doc! { "q": self.mine(), "limit": 0 }];
        self.run(doc! { "delete": collection, "deletes": deletes, "$db": &database }).await?;
        for (_, index) in &indexes {
            self.drop_index(&database, collection, index).await?;
        }
        Ok(i32::try_from(indexes.len()).unwrap_or(i32::MAX))
    }

    async fn drop_index(&self, database: &str, collection: &str, index: &Tree) -> Done<()> {
        let name = index.get_str("name").unwrap_or_default();
        match self.run(doc! { "dropIndexes": collection, "index": name, "$db": database }).await {
            // Somebody else was faster.
            Err(error) if error.code() == Some(27) => Ok(()),
            done => done.map(drop),
        }
    }

    async fn drop_indexes(&self) -> Result<Tree, Answer> {
        let fail = |error: Error| super::failed(&error, self.way.isolation);
        let (database, collection) = (self.physical(), self.local.collection.unwrap_or_default());
        let mine = self.indexes(&database, collection).await.map_err(fail)?;
        if mine.is_empty() && !self.is_mine(&database, collection).await.map_err(fail)? {
            return Err(not_there(self.local.database, collection));
        }
        let asked = Tree::from_reader(self.body.bytes()).map_err(|_| super::internal())?;
        let wanted = asked.get("index").cloned().unwrap_or_else(|| "*".into());
        let mut found = false;
        for (_, index) in &mine {
            let matches = match &wanted {
                Bson::Document(key) => index.get_document("key").is_ok_and(|it| is_same_key(it, key)),
                _ => true,
            };
            if matches {
                self.drop_index(&database, collection, index).await.map_err(fail)?;
                found = true;
            }
        }
        if !found && matches!(wanted, Bson::Document(_)) {
            return Err(Answer::new(27, "IndexNotFound", "can't find index with that key"));
        }
        Ok(doc! { "nIndexesWas": i32::try_from(mine.len() + 1).unwrap_or(i32::MAX) })
    }

    async fn figures(&self, collection: &str) -> Done<(i64, i64)> {
        let size = doc! { "$sum": { "$bsonSize": "$$ROOT" } };
        let group = doc! { "_id": Bson::Null, "count": { "$sum": 1 }, "size": size };
        let pipeline = vec![doc! { "$match": self.mine() }, doc! { "$group": group }];
        let ask = doc! { "aggregate": collection, "pipeline": pipeline, "cursor": {}, "$db": self.physical() };
        let told = self.run(ask).await?;
        let batch = told.get_document("cursor").ok().and_then(|cursor| cursor.get_array("firstBatch").ok());
        let row = batch.and_then(|batch| batch.first()).and_then(Bson::as_document);
        let number = |key: &str| row.and_then(|row| row.get(key)).map_or(0, whole);
        Ok((number("count"), number("size")))
    }

    async fn collection_stats(&self) -> Done<Tree> {
        let name = self.local.collection.unwrap_or_default();
        let (count, size) = self.figures(name).await?;
        let indexes = self.indexes(&self.physical(), name).await?.len() + 1;
        let mut told = doc! {
            "ns": format!("{}.{name}", self.local.database), "size": size, "count": count, "storageSize": size,
            "totalIndexSize": 0_i64, "totalSize": size, "nindexes": i32::try_from(indexes).unwrap_or(i32::MAX),
            "capped": false, "scaleFactor": 1,
        };
        if let Some(average) = size.checked_div(count) {
            told.insert("avgObjSize", average);
        }
        Ok(told)
    }

    async fn database_stats(&self) -> Done<Tree> {
        let collections = self.collections().await?;
        let (mut objects, mut size, mut indexes) = (0, 0, 0_usize);
        for name in &collections {
            let (count, bytes) = self.figures(name).await?;
            objects += count;
            size += bytes;
            indexes += self.indexes(&self.physical(), name).await?.len() + 1;
        }
        Ok(doc! {
            "db": self.local.database, "collections": i64::try_from(collections.len()).unwrap_or(i64::MAX), "views": 0_i64,
            "objects": objects, "avgObjSize": size.checked_div(objects).unwrap_or(0), "dataSize": size,
            "storageSize": size, "indexes": i64::try_from(indexes).unwrap_or(i64::MAX), "indexSize": 0_i64,
            "totalSize": size, "scaleFactor": 1_i64,
        })
    }

    async fn list_collections(&self) -> Result<Tree, Answer> {
        let wanted = Wanted::read(self.body)?;
        let name_only = self.body.get("nameOnly").ok().flatten().is_some_and(|it| it.truthy());
        let names = self.collections().await.map_err(|error| super::failed(&error, self.way.isolation))?;
        let batch: Vec<Tree> = names
            .into_iter()
            .filter(|name| wanted.takes(name, "collection"))
            .map(|name| {
                if name_only {
                    return doc! { "name": name, "type": "collection" };
                }
                doc! {
                    "name": name, "type": "collection", "options": {}, "info": { "readOnly": false },
                    "idIndex": { "v": 2, "key": { "_id": 1 }, "name": "_id_" },
                }
            })
            .collect();
        let namespace = format!("{}.$cmd.listCollections", self.local.database);
        Ok(doc! { "cursor": { "id": 0_i64, "ns": namespace, "firstBatch": batch } })
    }

    /// The logical databases: under `filter` those that hold something of the tenant's.
    async fn databases(&self) -> Result<Tree, Answer> {
        let fail = |error: Error| super::failed(&error, self.way.isolation);
        let wanted = Wanted::read(self.body)?;
        let told = self.run(doc! { "listDatabases": 1, "$db": "admin" }).await.map_err(fail)?;
        let mut mine = Vec::new();
        let mut total = 0;
        for database in told.get_array("databases").map(Vec::as_slice).unwrap_or_default() {
            let Some(database) = database.as_document() else { continue };
            let physical = database.get_str("name").unwrap_or_default();
            let Some(logical) = self.way.place.logical(physical).filter(|name| wanted.takes(name, "")) else {
                continue;
            };
            let mut size = database.get("sizeOnDisk").map_or(0, whole);
            if self.way.isolation == Isolation::Filter {
                let mut any = false;
                for name in account::collections(self.upstream, physical).await.map_err(fail)? {
                    if self.is_mine(physical, &name).await.map_err(fail)? {
                        any = true;
                        break;
                    }
                }
                if !any {
                    continue;
                }
                // How much of it is whose is not worth a walk.
                size = 0;
            }
            total += size;
            mine.push(doc! { "name": logical, "sizeOnDisk": size, "empty": false });
        }
        if self.body.get("nameOnly").ok().flatten().is_some_and(|it| it.truthy()) {
            let names: Vec<Tree> =
                mine.iter().map(|it| doc! { "name": it.get_str("name").unwrap_or_default() }).collect();
            return Ok(doc! { "databases": names });
        }
        Ok(doc! { "databases": mine, "totalSize": total, "totalSizeMb": total >> 20 })
    }
}

/// Whether a shared collection holds a document or an index of a tenant's.
///
/// # Errors
/// The deployment can't be reached or refuses the platform.
pub async fn is_mine(upstream: &Upstream, way: &Way, org: &OrgId, database: &str, collection: &str) -> Done<bool> {
    let find = doc! {
        "find": collection, "filter": { ORG: org.as_str() }, "projection": { "_id": 1 }, "limit": 1, "singleBatch": true,
        "$db": database,
    };
    let told = account::decode(&account::run(upstream, find).await?)?;
    let batch = told.get_document("cursor").ok().and_then(|cursor| cursor.get_array("firstBatch").ok());
    if batch.is_some_and(|batch| !batch.is_empty()) {
        return Ok(true);
    }
    Ok(!indexes(upstream, way, org, database, collection).await?.is_empty())
}

/// A tenant's own indexes of a shared collection: logical name and description.
async fn indexes(
    upstream: &Upstream,
    way: &Way,
    org: &OrgId,
    database: &str,
    collection: &str,
) -> Done<Vec<(String, Tree)>> {
    let list = doc! { "listIndexes": collection, "cursor": { "batchSize": 1000 }, "$db": database };
    let told = match account::run(upstream, list).await {
        // No such collection.
        Err(error) if error.code() == Some(26) => return Ok(Vec::new()),
        told => account::decode(&told?)?,
    };
    let batch = told.get_document("cursor").ok().and_then(|cursor| cursor.get_array("firstBatch").ok());
    let scope = Scope { isolation: way.isolation, org, place: &way.place, max_time_ms: 0, shows_org: false };
    let each = batch.map(Vec::as_slice).unwrap_or_default().iter().filter_map(Bson::as_document);
    Ok(each
        .filter_map(|index| {
            let name = index.get_str("name").ok().filter(|name| *name != index::ID)?;
            Some((index::logical(&scope, name)?.to_owned(), index.clone()))
        })
        .collect())
}

/// What a tenant is told of a collection in which it has neither documents nor indexes, whoever else has.
pub fn not_there(database: &str, collection: &str) -> Answer {
    Answer::new(26, "NamespaceNotFound", format!("ns does not exist: {database}.{collection}"))
}

/// A client's `filter` on a list of names: equality and `$in` of `name` and `type`.
struct Wanted {
    names: Option<Vec<String>>,
    kind: Option<String>,
}

impl Wanted {
    fn read(body: Document<'_>) -> Result<Self, Answer> {
        let other = || {
            Answer::new(
                9,
                "FailedToParse",
                "this list is filtered by {name: \"…\"} or {name: {$in: […]}} only: filter it in the program",
            )
        };
        let mut wanted = Self { names: None, kind: None };
        let Some(filter) = body.get("filter").ok().flatten().and_then(|it| it.document()) else { return Ok(wanted) };
        let filter = Tree::from_reader(filter.bytes()).map_err(|_| other())?;
        for (key, value) in &filter {
            let texts = match value {
                Bson::String(text) => vec![text.clone()],
                Bson::Document(inner) if inner.len() == 1 => match inner.iter().next() {
                    Some((op, Bson::String(text))) if op == "$eq" => vec![text.clone()],
                    Some((op, Bson::Array(list))) if op == "$in" => {
                        list.iter().map(|it| it.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or_else(other)?
                    }
                    _ => return Err(other()),
                },
                _ => return Err(other()),
            };
            match key.as_str() {
                "name" => wanted.names = Some(texts),
                "type" => wanted.kind = texts.into_iter().next(),
                _ => return Err(other()),
            }
        }
        Ok(wanted)
    }

    fn takes(&self, name: &str, kind: &str) -> bool {
        self.names.as_ref().is_none_or(|names| names.iter().any(|it| it == name))
            && self.kind.as_deref().is_none_or(|wanted| wanted == kind)
    }
}

fn whole(number: &Bson) -> i64 {
    match number {
        Bson::Int32(number) => (*number).into(),
        Bson::Int64(number) => *number,
        #[allow(clippy::cast_possible_truncation, reason = "saturates")]
        Bson::Double(number) => *number as i64,
        _ => 0,
    }
}

/// Whether two keys name the same fields in the same directions, whatever type the numbers have.
fn is_same_key(one: &Tree, other: &Tree) -> bool {
    let same = |a: &Bson, b: &Bson| a == b || (whole(a) != 0 && whole(a) == whole(b));
    one.len() == other.len() && one.iter().zip(other).all(|((a, x), (b, y))| a == b && same(x, y))
}
