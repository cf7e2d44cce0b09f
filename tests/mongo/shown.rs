//! A tier that shows `org_id`: the tenant's own is seen, nobody else's, and what is read can be written back.

use bson::{Document, doc};

use super::support::{Client, House};
use crate::support::{block_on, mongo::Own};

/// The shipped tiers, with FREE showing it.
fn tiers() -> String {
    let text = include_str!("../../config/tiers.toml");
    let shown = text.replacen("isolation = \"filter\"", "isolation = \"filter\"\nshow_org_id = true", 1);
    assert_ne!(text, shown);
    shown
}

async fn documents(client: &mut Client, command: Document) -> Vec<Document> {
    let told = client.run(command).await;
    let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch")).expect("a batch");
    batch.iter().map(|it| it.as_document().expect("a document").clone()).collect()
}

#[test]
fn a_tier_may_show_whose_a_document_is_and_to_nobody_else() {
    let server = Own::start(None);
    block_on(async {
        let house = House::with_tiers(server.place.port, &tiers()).await;
        let (mut acme, mut globex) = (house.client("acme").await, house.client("globex").await);
        for (client, id) in [(&mut acme, 1), (&mut globex, 2)] {
            let insert = doc! { "insert": "c", "documents": [{ "_id": id, "a": { "b": 1 } }], "$db": "app" };
            assert_eq!(client.run(insert).await.get_i32("n").ok(), Some(1));
        }
        let whole = doc! { "_id": 1, "a": { "b": 1 }, "org_id": "acme" };
        let find = |projection: Document| doc! { "find": "c", "projection": projection, "$db": "app" };
        let same = |found: Vec<Document>, wanted: &Document| {
            assert_eq!(found.len(), 1, "{found:?}");
            // Where in the document it stands is the server's.
            assert_eq!((found[0].len(), found[0].get("org_id")), (wanted.len(), wanted.get("org_id")), "{found:?}");
            assert!(wanted.iter().all(|(key, value)| found[0].get(key) == Some(value)), "{found:?}");
        };
        same(documents(&mut acme, doc! { "find": "c", "$db": "app" }).await, &whole);
        same(documents(&mut acme, find(doc! { "org_id": 1 })).await, &doc! { "_id": 1, "org_id": "acme" });
        same(documents(&mut acme, find(doc! { "org_id": 0 })).await, &doc! { "_id": 1, "a": { "b": 1 } });
        // A tenant of another tier does not see it.
        same(documents(&mut globex, doc! { "find": "c", "$db": "app" }).await, &doc! { "_id": 2, "a": { "b": 1 } });
        let theirs = doc! { "find": "c", "filter": { "org_id": "globex" }, "$db": "app" };
        assert!(documents(&mut acme, theirs).await.is_empty());

        // What was read is written back.
        let update = |q: Document, u: Document| doc! { "update": "c", "updates": [{ "q": q, "u": u }], "$db": "app" };
        let told = acme.run(update(doc! { "_id": 1 }, whole.clone())).await;
        assert_eq!((told.get_i32("n").ok(), told.contains_key("writeErrors")), (Some(1), false), "{told}");
        let told = acme.run(update(doc! { "_id": 1 }, doc! { "org_id": "globex" })).await;
        assert!(told.contains_key("writeErrors"), "{told}");
        let modify = doc! {
            "findAndModify": "c", "query": { "_id": 1 }, "update": { "$set": { "a": 2 } }, "new": true, "$db": "app",
        };
        let told = acme.run(modify).await;
        let value = told.get_document("value").expect("it");
        assert_eq!((value.get_i32("a").ok(), value.get_str("org_id").ok()), (Some(2), Some("acme")), "{told}");
        // Pipelines work on documents without it.
        let pipeline = doc! { "aggregate": "c", "pipeline": [{ "$match": {} }], "cursor": {}, "$db": "app" };
        same(documents(&mut acme, pipeline).await, &doc! { "_id": 1, "a": 2 });
    });
}
