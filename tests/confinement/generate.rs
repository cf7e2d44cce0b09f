//! Requests out of bytes: what a tenant might send who wants out. The same bytes give the same request, so that a
//! fuzzer, a property and a real server can share them. A key that begins with `@` is a section.

use bson::{Bson, Document, doc};

/// Another tenant, whose id some collations make equal to `acme-1`.
pub const OTHER: &str = "acme1";

/// The tenant that asks.
pub const OWN: &str = "acme-1";

/// Deepest nesting that is made.
const DEPTH_MAX: usize = 5;

/// Decisions, read from bytes; zeros when they end.
pub struct Choice<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Choice<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn byte(&mut self) -> usize {
        let byte = self.bytes.get(self.at).copied().unwrap_or_default();
        self.at += 1;
        byte.into()
    }

    fn below(&mut self, n: usize) -> usize {
        self.byte() % n
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    fn of(&mut self, list: &[&str]) -> String {
        list[self.below(list.len())].to_owned()
    }

    fn path(&mut self) -> String {
        self.of(&["a", "b", "n", "s", "ssn", "_id", "t.u", "org_id", "org_id.x", "org_idx", "list"])
    }

    fn collection(&mut self) -> String {
        self.of(&["c", "c", "c", "d", "d", "e", "system.users", "a$b"])
    }

    fn scalar(&mut self) -> Bson {
        match self.below(9) {
            0 => Bson::Int32(i32::try_from(self.byte()).unwrap_or_default()),
            1 => Bson::String(self.of(&[OWN, OTHER, "x", "1", "$a", "$org_id", "$$ROOT"])),
            2 => Bson::Null,
            3 => Bson::Boolean(self.one_in(2)),
            4 => Bson::Double(1.5),
            5 => Bson::Int64(7),
            6 => Bson::Array(vec![Bson::String(OWN.into()), Bson::String(OTHER.into())]),
            7 => Bson::Document(doc! { "org_id": OTHER }),
            _ => Bson::Int32(1),
        }
    }

    pub fn filter(&mut self, depth: usize) -> Document {
        let mut filter = Document::new();
        for _ in 0..self.below(4) {
            match self.below(12) {
                0 if depth < DEPTH_MAX => {
                    let name = self.of(&["$and", "$or", "$nor"]);
                    let list = (0..1 + self.below(3)).map(|_| Bson::Document(self.filter(depth + 1))).collect();
                    filter.insert(name, Bson::Array(list));
                }
                1 => {
                    filter.insert("$expr", self.expression(depth + 1));
                }
                2 => {
                    filter.insert("org_id", self.scalar());
                }
                3 => {
                    let path = self.path();
                    let inner = self.filter(depth + 1);
                    filter.insert(path, doc! { "$elemMatch": inner });
                }
                4 => {
                    let (path, operator) = (self.path(), self.of(&["$ne", "$gt", "$lte", "$eq", "$exists", "$type"]));
                    let value = self.scalar();
                    filter.insert(path, doc! { operator: value });
                }
                5 => {
                    let (path, operator) = (self.path(), self.of(&["$in", "$nin", "$all"]));
                    let list = vec![self.scalar(), self.scalar()];
                    filter.insert(path, doc! { operator: list });
                }
                6 => {
                    let path = self.path();
                    filter.insert(path, doc! { "$not": { "$regex": "^a" } });
                }
                7 if self.one_in(4) => {
                    let name = self.of(&["$where", "$nope", "$comment", "$text", "$_internalExprEq"]);
                    filter.insert(name, "1");
                }
                _ => {
                    let path = self.path();
                    filter.insert(path, self.scalar());
                }
            }
        }
        filter
    }

    pub fn expression(&mut self, depth: usize) -> Bson {
        if depth >= DEPTH_MAX {
            return self.scalar();
        }
        match self.below(14) {
            0 | 1 => {
                let name = self.of(&["$eq", "$ne", "$gt", "$and", "$or", "$add", "$divide", "$concat"]);
                let list = vec![self.expression(depth + 1), self.expression(depth + 1)];
                Bson::Document(doc! { name: list })
            }
            2 | 3 => {
                let path = self.of(&["$ssn", "$a", "$org_id", "$$ROOT", "$s", "$missing"]);
                let name = self.of(&["$toInt", "$toDate", "$toObjectId", "$toUpper", "$strLenBytes", "$not", "$type"]);
                Bson::Document(doc! { name: path })
            }
            4 => {
                let list = vec![self.expression(depth + 1), self.expression(depth + 1), self.expression(depth + 1)];
                Bson::Document(doc! { "$cond": list })
            }
            5 => Bson::Document(doc! { "$literal": self.scalar() }),
            6 if self.one_in(6) => Bson::Document(doc! { "$function": { "body": "f", "args": [], "lang": "js" } }),
            7 if self.one_in(6) => Bson::String("$$USER_ROLES".into()),
            _ => Bson::String(self.of(&["$a", "$ssn", "$org_id", "$$ROOT", "$list", "x"])),
        }
    }

    fn projection(&mut self) -> Document {
        let mut projection = Document::new();
        for _ in 0..self.below(4) {
            let path = self.path();
            let value = match self.below(7) {
                0 | 1 => Bson::Int32(0),
                2 | 3 => Bson::Int32(1),
                4 => Bson::Document(doc! { "$slice": 1 }),
                5 => Bson::Document(doc! { "$elemMatch": { "x": 1 } }),
                _ => self.expression(3),
            };
            projection.insert(path, value);
        }
        projection
    }

    fn collation(&mut self) -> Document {
        match self.below(5) {
            0 => doc! { "locale": "simple" },
            1 => doc! { "locale": "en", "strength": 1 },
            2 => doc! { "locale": "en", "alternate": "shifted" },
            3 => doc! { "locale": "en", "numericOrdering": true },
            _ => doc! { "locale": "en", "strength": 2, "caseLevel": false },
        }
    }

    fn document(&mut self) -> Document {
        let mut document = Document::new();
        for _ in 0..self.below(4) {
            let path = self.of(&["a", "b", "n", "s", "org_id", "list"]);
            document.insert(path, self.scalar());
        }
        document
    }

    fn update(&mut self) -> Bson {
        match self.below(6) {
            0 => Bson::Document(self.document()),
            1 => {
                let stages = (0..self.below(3)).map(|_| {
                    let path = self.path();
                    Bson::Document(match self.below(5) {
                        0 => doc! { "$set": { path: self.expression(2) } },
                        1 => doc! { "$unset": path },
                        2 => doc! { "$replaceWith": { "org_id": OTHER, "a": 1 } },
                        3 => doc! { "$project": { path: 1 } },
                        _ => doc! { "$addFields": { "org_id": OTHER } },
                    })
                });
                Bson::Array(stages.collect())
            }
            _ => {
                let mut update = Document::new();
                for _ in 0..1 + self.below(2) {
                    let operator = self.of(&[
                        "$set",
                        "$unset",
                        "$inc",
                        "$mul",
                        "$min",
                        "$max",
                        "$rename",
                        "$setOnInsert",
                        "$currentDate",
                        "$push",
                        "$pull",
                        "$addToSet",
                        "$pop",
                        "$bit",
                        "$nope",
                    ]);
                    let path = self.path();
                    let value = if operator == "$rename" { Bson::String(self.path()) } else { self.scalar() };
                    update.insert(operator, doc! { path: value });
                }
                Bson::Document(update)
            }
        }
    }

    pub fn pipeline(&mut self, depth: usize) -> Vec<Document> {
        (0..self.below(4)).map(|_| self.stage(depth)).collect()
    }

    fn stage(&mut self, depth: usize) -> Document {
        let kind = if depth < DEPTH_MAX { self.below(26) } else { self.below(12) };
        match kind {
            0 | 1 => doc! { "$match": self.filter(depth) },
            2 => doc! { "$sort": { self.path(): 1 } },
            3 => doc! { "$group": { "_id": self.expression(3), "n": { "$sum": 1 }, "all": { "$push": "$$ROOT" } } },
            4 => doc! { "$project": self.projection() },
            5 => doc! { "$set": { self.path(): self.expression(2) } },
            6 => doc! { "$unset": self.path() },
            7 => doc! { "$limit": 3 },
            8 => doc! { "$unwind": "$list" },
            9 => doc! { "$replaceRoot": { "newRoot": { "x": "$$ROOT" } } },
            10 => doc! { "$count": "n" },
            11 => doc! { "$sample": { "size": 5 } },
            12 | 13 => {
                let mut lookup = doc! { "from": self.collection(), "as": "joined" };
                if self.one_in(2) {
                    lookup.insert("localField", self.path());
                    lookup.insert("foreignField", self.path());
                }
                if self.one_in(2) || lookup.len() == 2 {
                    lookup.insert("let", doc! { "v": self.expression(3) });
                    lookup.insert("pipeline", self.pipeline(depth + 2));
                }
                doc! { "$lookup": lookup }
            }
            14 | 15 => {
                let mut lookup = doc! {
                    "from": self.collection(), "startWith": self.expression(3), "connectFromField": self.path(),
                    "connectToField": self.path(), "as": "graph",
                };
                if self.one_in(2) {
                    lookup.insert("restrictSearchWithMatch", self.filter(depth + 1));
                }
                doc! { "$graphLookup": lookup }
            }
            16 => doc! { "$unionWith": self.collection() },
            17 => doc! { "$unionWith": { "coll": self.collection(), "pipeline": self.pipeline(depth + 2) } },
            18 => doc! { "$facet": { "x": self.pipeline(depth + 2), "y": self.pipeline(depth + 2) } },
            19 => match self.below(4) {
                0 => doc! { "$merge": self.collection() },
                1 => {
                    doc! { "$merge": { "into": { "db": self.of(&["app", "other", "local"]), "coll": "e" }, "on": "_id" } }
                }
                2 => doc! { "$merge": { "into": "e", "whenMatched": [{ "$set": { "org_id": OTHER } }] } },
                _ => doc! { "$merge": { "into": "e", "on": ["org_id", "_id"], "whenMatched": "replace" } },
            },
            20 => match self.below(3) {
                0 => doc! { "$out": self.collection() },
                1 => doc! { "$out": { "db": self.of(&["app", "admin"]), "coll": "e" } },
                _ => doc! { "$lookup": { "from": { "db": "shared_app", "coll": "c" }, "pipeline": [], "as": "x" } },
            },
            21 => doc! { "$geoNear": { "near": [1, 2], "distanceField": "d", "query": self.filter(depth + 1) } },
            22 => doc! { "$collStats": { "count": {} } },
            23 => {
                let name = self.of(&[
                    "$currentOp",
                    "$listSessions",
                    "$indexStats",
                    "$planCacheStats",
                    "$search",
                    "$nope",
                    "$_internalAllCollectionStats",
                    "$listLocalSessions",
                    "$mergeCursors",
                    "$queryStats",
                ]);
                doc! { name: {} }
            }
            24 => doc! { "$rankFusion": { "input": { "pipelines": { "x": self.pipeline(depth + 2) } } } },
            _ => doc! { "$changeStream": { "fullDocument": self.of(&["default", "updateLookup", "required"]) } },
        }
    }

    fn statement(&mut self, update: bool) -> Document {
        let mut statement = doc! { "q": self.filter(0) };
        if update {
            statement.insert("u", self.update());
            if self.one_in(3) {
                statement.insert("upsert", true);
            }
            if self.one_in(3) {
                statement.insert("multi", true);
            }
        } else {
            statement.insert("limit", i32::from(self.one_in(2)));
        }
        if self.one_in(4) {
            statement.insert("collation", self.collation());
        }
        if self.one_in(10) {
            statement.insert("hint", doc! { "a": 1 });
        }
        statement
    }

    fn listed(&mut self, name: &str) -> String {
        if self.one_in(2) { format!("@{name}") } else { name.to_owned() }
    }

    /// A whole request.
    pub fn request(&mut self) -> Document {
        let collection = self.collection();
        let mut request = match self.below(14) {
            0 | 1 => {
                let mut find = doc! { "find": collection, "filter": self.filter(0) };
                if self.one_in(2) {
                    find.insert("projection", self.projection());
                }
                if self.one_in(4) {
                    find.insert("sort", doc! { self.of(&["a", "$natural"]): 1 });
                }
                find
            }
            2..=4 => doc! { "aggregate": collection, "pipeline": self.pipeline(0), "cursor": {} },
            5 => doc! { "count": collection, "query": self.filter(0) },
            6 => doc! { "distinct": collection, "key": self.path(), "query": self.filter(0) },
            7 => {
                let list: Vec<Document> = (0..1 + self.below(3)).map(|_| self.document()).collect();
                doc! { "insert": collection, self.listed("documents"): list, "ordered": self.one_in(2) }
            }
            8 | 9 => {
                let list: Vec<Document> = (0..1 + self.below(3)).map(|_| self.statement(true)).collect();
                doc! { "update": collection, self.listed("updates"): list, "ordered": self.one_in(2) }
            }
            10 => {
                let list: Vec<Document> = (0..1 + self.below(3)).map(|_| self.statement(false)).collect();
                doc! { "delete": collection, self.listed("deletes"): list }
            }
            11 => {
                let mut modify = doc! { "findAndModify": collection, "query": self.filter(0) };
                if self.one_in(3) {
                    modify.insert("remove", true);
                } else {
                    modify.insert("update", self.update());
                    modify.insert("upsert", self.one_in(2));
                    modify.insert("new", self.one_in(2));
                }
                if self.one_in(3) {
                    modify.insert("fields", self.projection());
                }
                modify
            }
            12 => {
                let operation = match self.below(3) {
                    0 => doc! { "insert": 0, "document": self.document() },
                    1 => doc! { "update": 0, "filter": self.filter(0), "updateMods": self.update(), "multi": true },
                    _ => doc! { "delete": 0, "filter": self.filter(0), "multi": true },
                };
                let ns = self.of(&["app.c", "app.d", "local.oplog.rs", "shared_app.c", "app.system.users"]);
                return doc! { "bulkWrite": 1, self.listed("ops"): [operation], "nsInfo": [{ "ns": ns }], "$db": "admin" };
            }
            _ => self.catalog(collection),
        };
        if self.one_in(5) {
            request.insert("collation", self.collation());
        }
        if self.one_in(12) {
            let name = self.of(&["rawData", "$_x", "let", "hint", "readConcern", "fromRouter"]);
            request.insert(name, doc! { "a": 1 });
        }
        let db = self.of(&["app", "app", "app", "app", "app", "app", "app", "other", "local", "admin"]);
        request.insert("$db", db);
        request
    }

    fn catalog(&mut self, collection: String) -> Document {
        match self.below(8) {
            0 => {
                let key = doc! { self.path(): 1 };
                let index = doc! { "key": key, "name": "x", "unique": self.one_in(2), "sparse": self.one_in(2) };
                doc! { "createIndexes": collection, "indexes": [index] }
            }
            1 => doc! { "dropIndexes": collection, "index": self.of(&["x", "*", "_id_", "x~acme1"]) },
            2 => doc! { "listIndexes": collection, "cursor": { "batchSize": 1 } },
            3 => doc! { "create": collection, "capped": self.one_in(3), "size": 4096 },
            4 => doc! { "create": "view", "viewOn": collection, "pipeline": self.pipeline(0) },
            5 => doc! { "explain": { "find": collection, "filter": self.filter(0) }, "verbosity": "executionStats" },
            6 => doc! { self.of(&["drop", "collStats", "validate", "collMod", "convertToCapped"]): collection },
            _ => doc! { "explain": { "aggregate": collection, "pipeline": self.pipeline(0), "cursor": {} } },
        }
    }
}
