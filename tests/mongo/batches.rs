//! Results that come in several batches: what is hidden, mapped and counted in the first is so in the others.

use bson::{Bson, Document, doc};

use super::support::{Client, House};
use crate::support::mongo;

/// Every result of a cursor, `size` at a time, from a reply that opened it.
async fn all(client: &mut Client, opened: &Document, collection: &str, database: &str, size: i32) -> Vec<Document> {
    let mut found = Vec::new();
    let mut told = opened.clone();
    loop {
        let cursor = told.get_document("cursor").unwrap_or_else(|_| panic!("{told}"));
        let batch = cursor.get_array("firstBatch").or(cursor.get_array("nextBatch")).expect("a batch");
        found.extend(batch.iter().filter_map(Bson::as_document).cloned());
        let id = cursor.get_i64("id").expect("an id");
        if id == 0 {
            return found;
        }
        told = client.run(doc! { "getMore": id, "collection": collection, "batchSize": size, "$db": database }).await;
    }
}

/// Number and code of each result; 0 is success.
fn seen(results: &[Document]) -> Vec<(i32, i32)> {
    let one = |it: &Document| (it.get_i32("idx").expect("a number"), it.get_i32("code").unwrap_or(0));
    results.iter().map(one).collect()
}

#[tokio::test]
async fn the_results_of_a_bulk_write_keep_order_and_number_where_one_is_refused() {
    let house = House::before(mongo::shared().port).await;
    // The first for org_id, which only a shared collection has; the other as JavaScript runs nowhere.
    let foreign = doc! { "insert": 1, "document": { "_id": "b1", "org_id": "acme" } };
    let script = doc! { "update": 1, "filter": { "$where": "1" }, "updateMods": { "$set": { "a": 1 } } };
    for (org, refused, code) in [("globex", foreign, 66), ("initech", script, 13)] {
        let mut client = house.client(org).await;
        for size in [None, Some(0), Some(1), Some(2), Some(100)] {
            for (ordered, wanted) in
                [(false, vec![(0, 0), (1, code), (2, 0), (3, 11000), (4, code)]), (true, vec![(0, 0), (1, code)])]
            {
                client.run(doc! { "delete": "bulk", "deletes": [{ "q": {}, "limit": 0 }], "$db": "app" }).await;
                let insert = |id: &str| doc! { "insert": 0, "document": { "_id": id } };
                let mut ask = doc! {
                    "bulkWrite": 1, "ordered": ordered, "nsInfo": [{ "ns": "app.bulk" }, { "ns": "app.bulk" }],
                    "ops": [insert("b0"), refused.clone(), insert("b2"), insert("b2"), refused.clone()], "$db": "admin",
                };
                if let Some(size) = size {
                    ask.insert("cursor", doc! { "batchSize": size });
                }
                let told = client.run(ask).await;
                let first = told.get_document("cursor").and_then(|it| it.get_array("firstBatch")).expect("one").len();
                if let Some(size) = size {
                    assert!(first <= usize::try_from(size).expect("small"), "{told}");
                }
                let results = all(&mut client, &told, "$cmd.bulkWrite", "admin", size.unwrap_or(1).max(1)).await;
                assert_eq!(seen(&results), wanted, "{org}, {size:?} at a time, ordered {ordered}");
                let errors = wanted.iter().filter(|(_, code)| *code != 0).count();
                assert_eq!(told.get_i32("nErrors").ok(), i32::try_from(errors).ok(), "{told}");
                assert_eq!(told.get_i32("nInserted").ok(), Some(if ordered { 1 } else { 2 }), "{told}");
                for result in &results {
                    let text = result.to_string();
                    assert!(!text.contains("shared_") && !text.contains("org_initech~"), "{text}");
                    assert!(!text.contains("$refused") && !text.contains("org_id:"), "{text}");
                }
                let left = client.run(doc! { "count": "bulk", "query": {}, "$db": "app" }).await;
                assert_eq!(left.get_i32("n").ok(), Some(if ordered { 1 } else { 2 }), "nothing stands for the refused");
            }
        }
        client.run(doc! { "drop": "bulk", "$db": "app" }).await;
    }
}

/// A `getMore` of a list of indexes is not told from a find's.
#[tokio::test]
async fn the_indexes_of_a_shared_collection_that_others_have_are_in_no_batch() {
    let house = House::before(mongo::shared().port).await;
    let (mut one, mut other) = (house.client("acme").await, house.client("globex").await);
    for (client, field) in [(&mut one, "mine"), (&mut other, "theirs")] {
        let index = doc! { "key": { field: 1 }, "name": field, "unique": true };
        let told = client.run(doc! { "createIndexes": "listed", "indexes": [index], "$db": "app" }).await;
        assert_eq!(told.get_f64("ok").ok(), Some(1.0), "{told}");
    }
    for size in [0, 1, 2, 100] {
        let told = one.run(doc! { "listIndexes": "listed", "cursor": { "batchSize": size }, "$db": "app" }).await;
        let listed = all(&mut one, &told, "listed", "app", 1).await;
        let names: Vec<&str> = listed.iter().map(|it| it.get_str("name").expect("a name")).collect();
        assert_eq!(names, ["_id_", "mine"], "{size} at a time");
    }
    for client in [&mut one, &mut other] {
        client.run(doc! { "drop": "listed", "$db": "app" }).await;
    }
}
