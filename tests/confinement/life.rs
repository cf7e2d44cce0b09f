//! What an ordinary application does on a shared collection works as on one of its own, and keeps two tenants apart
//! where both use the same names: indexes, ids, counts, merges, streams.

use bson::{Document, doc};
use dynabase::tenant::{
    Isolation, Names, OrgId,
    namespace::{NameStyle, RootSecret},
};

use super::{live::Wire, sent::Asker};

/// A tenant of these tests in a logical database of its own test.
fn tenant(org: &str) -> Asker {
    let org = OrgId::parse(org).expect("an id");
    let names = Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Plain);
    let place = names.mongodb(&org, Isolation::Filter);
    Asker { isolation: Isolation::Filter, org, place }
}

struct Two {
    wire: Wire,
    db: &'static str,
    ann: Asker,
    bob: Asker,
}

impl Two {
    fn new(db: &'static str) -> Self {
        let mut wire = Wire::open();
        wire.run(&doc! { "dropDatabase": 1, "$db": format!("shared_{db}") });
        Self { wire, db, ann: tenant("anton"), bob: tenant("berta") }
    }

    fn ask(&mut self, ann: bool, mut request: Document) -> Document {
        if !request.contains_key("$db") {
            request.insert("$db", self.db);
        }
        let asker = if ann { &self.ann } else { &self.bob };
        let answer = self.wire.ask(asker, &request);
        assert!(!answer.to_string().contains(if ann { "berta" } else { "anton" }), "{request}: {answer}");
        answer
    }

    /// The same, and it works.
    fn works(&mut self, ann: bool, request: Document) -> Document {
        let text = request.to_string();
        let answer = self.ask(ann, request);
        let ok = answer.get_f64("ok").unwrap_or_default();
        assert!(ok == 1.0 && !answer.contains_key("writeErrors"), "{text}: {answer}");
        answer
    }

    fn rows(&mut self, ann: bool, request: Document) -> Vec<Document> {
        let answer = self.works(ann, request);
        let batch = answer.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch")).expect("a batch");
        batch.iter().map(|row| row.as_document().expect("a document").clone()).collect()
    }
}

#[test]
fn crud_of_two_tenants_under_one_name() {
    let mut two = Two::new("crud");
    for ann in [true, false] {
        two.works(ann, doc! { "create": "c" });
        let list =
            [doc! { "_id": format!("{ann}1"), "k": 1, "v": "x" }, doc! { "_id": format!("{ann}2"), "k": 2, "v": "y" }];
        let answer = two.works(ann, doc! { "insert": "c", "documents": list.to_vec() });
        assert_eq!(answer.get_i32("n").ok(), Some(2));
    }
    for ann in [true, false] {
        let rows = two.rows(ann, doc! { "find": "c", "sort": { "k": 1 } });
        assert_eq!(
            rows,
            [doc! { "_id": format!("{ann}1"), "k": 1, "v": "x" }, doc! { "_id": format!("{ann}2"), "k": 2, "v": "y" }]
        );
        assert_eq!(two.works(ann, doc! { "count": "c" }).get_i32("n").ok(), Some(2));
        assert_eq!(two.works(ann, doc! { "count": "c", "query": { "k": 1 } }).get_i32("n").ok(), Some(1));
        assert_eq!(
            two.works(ann, doc! { "distinct": "c", "key": "v" }).get_array("values").map(Vec::len).ok(),
            Some(2)
        );
        assert_eq!(two.rows(ann, doc! { "find": "c", "projection": { "org_id": 1 } }).len(), 2);
        let rows = two.rows(ann, doc! { "find": "c", "projection": { "org_id": 1, "_id": 0 } });
        assert_eq!(rows, [Document::new(), Document::new()]);
        // An upsert makes a document of one's own, again and again the same.
        for n in [1, 0] {
            let upsert = doc! { "q": { "k": 9 }, "u": { "$set": { "v": "z" }, "$setOnInsert": { "org_id": two.org(ann) } }, "upsert": true };
            let answer = two.works(ann, doc! { "update": "c", "updates": [upsert] });
            assert_eq!(answer.get_array("upserted").map_or(0, Vec::len), n);
        }
        let replace = doc! { "q": { "k": 9 }, "u": { "k": 9, "v": "w" } };
        assert_eq!(two.works(ann, doc! { "update": "c", "updates": [replace] }).get_i32("nModified").ok(), Some(1));
        let piped = doc! { "q": { "k": 9 }, "u": [{ "$replaceWith": { "k": 9, "v": "p" } }] };
        assert_eq!(two.works(ann, doc! { "update": "c", "updates": [piped] }).get_i32("nModified").ok(), Some(1));
        let same = doc! { "q": { "k": 9 }, "u": { "$set": { "org_id": two.org(ann) } } };
        assert_eq!(two.works(ann, doc! { "update": "c", "updates": [same] }).get_i32("n").ok(), Some(1));
        let answer = two.works(
            ann,
            doc! { "findAndModify": "c", "query": { "k": 9 }, "update": { "$inc": { "k": 1 } }, "new": true },
        );
        let value = answer.get_document("value").expect("the document");
        assert_eq!((value.get_i32("k").ok(), value.get("org_id")), (Some(10), None));
        let bulk = doc! {
            "bulkWrite": 1, "nsInfo": [{ "ns": "crud.c" }], "$db": "admin",
            "ops": [{ "insert": 0, "document": { "k": 11 } }, { "update": 0, "filter": { "k": 11 }, "updateMods": { "$set": { "v": 1 } } }, { "delete": 0, "filter": { "k": 11 } }],
        };
        let answer = two.works(ann, bulk);
        assert_eq!(answer.get_i32("nInserted").ok(), Some(1), "{answer}");
        assert_eq!(
            two.works(ann, doc! { "delete": "c", "deletes": [{ "q": { "k": 10 }, "limit": 0 }] }).get_i32("n").ok(),
            Some(1)
        );
        assert_eq!(two.works(ann, doc! { "count": "c" }).get_i32("n").ok(), Some(2));
        two.works(ann, doc! { "explain": { "find": "c", "filter": { "k": 1 } } });
    }
    // The one leaves; the other has what it had.
    assert_eq!(
        two.works(true, doc! { "delete": "c", "deletes": [{ "q": {}, "limit": 0 }] }).get_i32("n").ok(),
        Some(2)
    );
    assert_eq!(two.works(false, doc! { "count": "c" }).get_i32("n").ok(), Some(2));
}

impl Two {
    fn org(&self, ann: bool) -> &'static str {
        if ann { "anton" } else { "berta" }
    }
}

#[test]
fn unique_is_unique_within_the_tenant() {
    let mut two = Two::new("indexes");
    let index = |key: Document, more: Document| {
        let mut index = doc! { "key": key, "name": "k" };
        index.extend(more);
        doc! { "createIndexes": "c", "indexes": [index] }
    };
    // Of one tenant; the other's documents repeat the value and are no hindrance.
    for n in 0..2 {
        two.works(false, doc! { "insert": "c", "documents": [{ "_id": n, "email": "e" }] });
    }
    two.works(true, index(doc! { "email": 1 }, doc! { "unique": true }));
    two.works(true, doc! { "insert": "c", "documents": [{ "email": "e" }] });
    let answer = two.ask(true, doc! { "insert": "c", "documents": [{ "email": "e" }] });
    let error = answer.get_array("writeErrors").expect("a duplicate")[0].as_document().expect("an error");
    assert_eq!(error.get_i32("code").ok(), Some(11000), "{answer}");
    two.works(false, doc! { "insert": "c", "documents": [{ "email": "e" }] });
    // Start-up again and again, and the other under the same name with other options.
    two.works(true, index(doc! { "email": 1 }, doc! { "unique": true }));
    two.works(false, index(doc! { "email": 1 }, doc! {}));
    assert_eq!(two.rows(true, doc! { "find": "c", "filter": { "email": "e" }, "hint": "k" }).len(), 1);
    assert_eq!(two.rows(false, doc! { "find": "c", "filter": { "email": "e" }, "hint": "k" }).len(), 3);
    two.works(true, doc! { "dropIndexes": "c", "index": "k" });
    two.works(true, doc! { "insert": "c", "documents": [{ "email": "e" }] });
    assert_eq!(two.rows(false, doc! { "find": "c", "hint": "k" }).len(), 3);
    two.works(
        true,
        doc! { "createIndexes": "c", "indexes": [
            { "key": { "at": 1 }, "name": "at_1", "expireAfterSeconds": 3600 },
            { "key": { "a": 1, "b": -1 }, "name": "a_1_b_-1", "sparse": true, "unique": true },
        ] },
    );
    assert_eq!(two.rows(true, doc! { "find": "c", "filter": { "a": 1 }, "hint": { "a": 1, "b": -1 } }).len(), 0);
}

#[test]
fn an_id_of_anothers_shows_nothing() {
    let mut two = Two::new("ids");
    two.works(false, doc! { "insert": "c", "documents": [{ "_id": 1, "s": "of berta" }] });
    let answer = two.ask(true, doc! { "insert": "c", "documents": [{ "_id": 1 }] });
    let error = answer.get_array("writeErrors").expect("a duplicate")[0].as_document().expect("an error");
    assert_eq!(error.get_i32("code").ok(), Some(11000));
    let upsert = doc! { "q": { "_id": 1 }, "u": { "$set": { "s": "of anton" } }, "upsert": true };
    assert!(two.ask(true, doc! { "update": "c", "updates": [upsert] }).contains_key("writeErrors"));
    let rows = two.rows(false, doc! { "find": "c" });
    assert_eq!(rows, [doc! { "_id": 1, "s": "of berta" }]);
}

#[test]
fn pipelines_join_and_merge_within_the_tenant() {
    let mut two = Two::new("pipes");
    for ann in [true, false] {
        let (org, more) = (two.org(ann), i32::from(ann));
        let list: Vec<Document> = (0..3 + more)
            .map(|n| doc! { "_id": format!("{org}{n}"), "n": n, "next": n + 1, "v": format!("{n}") })
            .collect();
        two.works(ann, doc! { "insert": "c", "documents": list.clone() });
        two.works(ann, doc! { "insert": "d", "documents": list });
    }
    // What `$merge` needs; the front makes it.
    two.wire.run(&doc! { "createIndexes": "e", "$db": "shared_pipes",
    "indexes": [{ "key": { "org_id": 1, "_id": 1 }, "name": "dynabase_merge", "unique": true }] });
    for ann in [true, false] {
        let many = 3 + i64::from(ann);
        let mut rows =
            |stages: Vec<Document>| two.rows(ann, doc! { "aggregate": "c", "pipeline": stages, "cursor": {} });
        let count = |rows: Vec<Document>| {
            rows.first()
                .and_then(|row| row.get("n").and_then(|n| n.as_i64().or(n.as_i32().map(i64::from))))
                .unwrap_or(0)
        };
        assert_eq!(count(rows(vec![doc! { "$count": "n" }])), many);
        assert_eq!(count(rows(vec![doc! { "$unionWith": "d" }, doc! { "$count": "n" }])), 2 * many);
        let joined = rows(vec![
            doc! { "$match": { "n": 1 } },
            doc! { "$lookup": { "from": "d", "localField": "n", "foreignField": "n", "as": "x" } },
        ]);
        assert_eq!(joined[0].get_array("x").map(Vec::len).ok(), Some(1), "{joined:?}");
        let graph =
            doc! { "from": "d", "startWith": "$next", "connectFromField": "next", "connectToField": "n", "as": "x" };
        let walked = rows(vec![doc! { "$match": { "n": 0 } }, doc! { "$graphLookup": graph }]);
        assert_eq!(walked[0].get_array("x").map(Vec::len).ok(), Some(usize::try_from(many).expect("few") - 1));
        let facets = rows(vec![doc! { "$facet": { "x": [{ "$unionWith": "d" }, { "$count": "n" }] } }]);
        assert!(facets[0].to_string().contains(&(2 * many).to_string()));
        // Raises on a text that is no number; behind the barrier, and guarded at the beginning.
        let raises = doc! { "$match": { "$expr": { "$gte": [{ "$toInt": "$v" }, 1] } } };
        assert_eq!(count(rows(vec![raises.clone(), doc! { "$count": "n" }])), many - 1);
        assert_eq!(count(rows(vec![doc! { "$sort": { "n": 1 } }, raises, doc! { "$count": "n" }])), many - 1);
        for _ in 0..2 {
            assert!(rows(vec![doc! { "$merge": { "into": "e", "whenMatched": "replace" } }]).is_empty());
        }
        assert_eq!(two.works(ann, doc! { "count": "e" }).get_i32("n").ok(), Some(i32::try_from(many).expect("few")));
        let stats =
            two.rows(ann, doc! { "aggregate": "c", "pipeline": [{ "$collStats": { "count": {} } }], "cursor": {} });
        assert_eq!(stats[0].get_str("ns").ok(), Some("pipes.c"));
    }
}

#[test]
fn a_stream_tells_of_ones_own() {
    let mut two = Two::new("streams");
    two.wire.run(&doc! { "create": "c", "changeStreamPreAndPostImages": { "enabled": true }, "$db": "shared_streams" });
    let watch = |ann: bool| {
        let mut wire = Wire::open();
        let asker = tenant(if ann { "anton" } else { "berta" });
        let answer = wire.ask(&asker, &doc! { "aggregate": "c", "pipeline": [{ "$changeStream": {} }], "cursor": { "batchSize": 0 }, "$db": "streams" });
        let id = answer
            .get_document("cursor")
            .and_then(|cursor| cursor.get_i64("id"))
            .unwrap_or_else(|_| panic!("{answer}"));
        (wire, asker, id)
    };
    let mut streams = [(true, watch(true)), (false, watch(false))];
    for ann in [true, false] {
        let id = two.org(ann);
        two.works(ann, doc! { "insert": "c", "documents": [{ "_id": id, "v": 1 }] });
        two.works(ann, doc! { "update": "c", "updates": [{ "q": { "_id": id }, "u": { "$set": { "v": 2 } } }] });
        two.works(ann, doc! { "delete": "c", "deletes": [{ "q": { "_id": id }, "limit": 1 }] });
    }
    for (ann, (wire, asker, id)) in &mut streams {
        let mut events = Vec::new();
        for _ in 0..40 {
            let answer =
                wire.ask(asker, &doc! { "getMore": *id, "collection": "c", "maxTimeMS": 250, "$db": "streams" });
            let batch = answer
                .get_document("cursor")
                .and_then(|cursor| cursor.get_array("nextBatch"))
                .unwrap_or_else(|_| panic!("{answer}"));
            events.extend(batch.iter().map(|event| event.as_document().expect("an event").clone()));
            if events.len() >= 3 {
                break;
            }
        }
        let kinds: Vec<&str> = events.iter().map(|event| event.get_str("operationType").expect("a type")).collect();
        assert_eq!(kinds, ["insert", "update", "delete"], "{events:?}");
        for event in &events {
            let text = event.to_string();
            assert!(!text.contains(if *ann { "berta" } else { "anton" }) && !text.contains("org_id"), "{text}");
            let ns = event.get_document("ns").expect("a place");
            assert_eq!((ns.get_str("db").ok(), ns.get_str("coll").ok()), (Some("streams"), Some("c")));
        }
        assert!(!events[1].contains_key("fullDocument"), "nobody asked for it");
        assert_eq!(
            events[1].get_document("updateDescription").and_then(|it| it.get_document("updatedFields")).expect("told"),
            &doc! { "v": 2 }
        );
    }
}
