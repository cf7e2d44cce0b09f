//! How many collections and indexes a tenant may have: counted at the server, refused in its words, and what is there
//! goes on.

use std::sync::Arc;

use bson::{Document, doc};
use dynabase::tenant::Tier;

use super::support::{Client, House, tenant};
use crate::support::{block_on, mongo::Own};

/// The shipped tiers with other numbers for one.
fn tiers(tier: &str, lines: &str) -> String {
    let text = include_str!("../../config/tiers.toml");
    let at = text.find(&format!("[{tier}.mongodb]")).expect("there");
    let (before, rest) = text.split_at(at);
    let (section, after) = rest.split_at(rest.find("rate =").expect("a rate"));
    let kept = section.lines().filter(|line| !line.starts_with("collections") && !line.starts_with("indexes"));
    let kept: Vec<&str> = kept.collect();
    // So many requests come at once.
    let after = after.replacen(", over = ", "0000, over = ", 1);
    format!("{before}{}\n{lines}\n{after}", kept.join("\n"))
}

async fn done(client: &mut Client, command: Document) {
    let told = client.run(command.clone()).await;
    assert_eq!(told.get_f64("ok").ok(), Some(1.0), "{command}: {told}");
    assert!(!told.contains_key("writeErrors"), "{command}: {told}");
}

/// Refused as one more than there may be.
async fn full(client: &mut Client, command: Document, numbers: &str) {
    let told = client.run(command.clone()).await;
    assert_eq!(told.get_i32("code").ok(), Some(242), "{command}: {told}");
    assert_eq!(told.get_str("codeName").ok(), Some("CannotCreateCollection"));
    assert!(told.get_str("errmsg").is_ok_and(|text| text.contains(numbers)), "{told}");
    assert!(!told.contains_key("errorLabels"), "it would be the same at once: {told}");
}

fn insert(collection: &str) -> Document {
    doc! { "insert": collection, "documents": [{ "a": 1 }], "$db": "app" }
}

fn index(collection: &str, field: &str) -> Document {
    let index = doc! { "key": { field: 1 }, "name": field };
    doc! { "createIndexes": collection, "indexes": [index], "$db": "app" }
}

fn upsert(collection: &str) -> Document {
    let set = doc! { "$set": { "a": 1 } };
    doc! { "update": collection, "updates": [{ "q": { "_id": 1 }, "u": set, "upsert": true }], "$db": "app" }
}

fn bulk(names: &[&str]) -> Document {
    let spaces: Vec<Document> = names.iter().map(|name| doc! { "ns": format!("app.{name}") }).collect();
    let ops: Vec<Document> =
        (0_i32..).zip(names).map(|(at, _)| doc! { "insert": at, "document": { "a": 1 } }).collect();
    doc! { "bulkWrite": 1, "ops": ops, "nsInfo": spaces, "$db": "admin" }
}

fn into(stage: &str, from: &str, to: &str) -> Document {
    doc! { "aggregate": from, "pipeline": [{ stage: to }], "cursor": {}, "$db": "app" }
}

/// The collections that the server has in a database, without its own.
async fn there(server: &Own, database: &str) -> Vec<String> {
    let mut names = server.place.client().await.database(database).list_collection_names().await.expect("listed");
    names.retain(|name| !name.starts_with("system."));
    names.sort();
    names
}

#[test]
fn shared_collections_are_counted_for_who_brought_them_into_being() {
    let server = Own::start(None);
    block_on(async {
        let house = House::with_tiers(server.place.port, &tiers("FREE", "collections = 3")).await;
        let (mut one, mut other) = (house.client("acme").await, house.client("globex").await);
        done(&mut other, insert("theirs")).await;
        // What others have made costs nothing.
        for command in [insert("theirs"), insert("a"), doc! { "create": "b", "$db": "app" }, index("c", "x")] {
            done(&mut one, command).await;
        }
        let modify = doc! {
            "findAndModify": "d", "query": { "_id": 1 }, "update": { "$set": { "a": 1 } }, "upsert": true, "$db": "app",
        };
        let watch = doc! { "aggregate": "d", "pipeline": [{ "$changeStream": {} }], "cursor": {}, "$db": "app" };
        let many: Vec<String> = (0..12).map(|n| format!("m{n}")).collect();
        let many: Vec<&str> = ["a"].into_iter().chain(many.iter().map(String::as_str)).collect();
        for command in [
            insert("d"),
            upsert("d"),
            modify,
            index("d", "x"),
            doc! { "create": "d", "$db": "app" },
            into("$merge", "a", "d"),
            watch,
            bulk(&["a", "d"]),
            bulk(&many),
            doc! { "insert": "d", "documents": [{ "a": 1 }], "$db": "elsewhere" },
        ] {
            full(&mut one, command, "3 of 3 of tier FREE").await;
        }
        assert_eq!(there(&server, "shared_app").await, ["a", "b", "c", "theirs"]);
        assert_eq!(there(&server, "shared_elsewhere").await, [""; 0]);
        // What is there goes on, and what makes none is not refused.
        let find = doc! { "find": "d", "$db": "app" };
        for command in [insert("a"), insert("theirs"), upsert("b"), index("c", "y"), into("$merge", "a", "b"), find] {
            done(&mut one, command).await;
        }
        // A dropped one stays at the server: no room, but its name.
        done(&mut one, doc! { "drop": "a", "$db": "app" }).await;
        full(&mut one, insert("d"), "3 of 3").await;
        done(&mut one, insert("a")).await;
        // One that an operator has dropped gives room.
        done(&mut one, doc! { "drop": "c", "$db": "app" }).await;
        let database = server.place.client().await.database("shared_app");
        database.collection::<Document>("c").drop().await.expect("dropped");
        // Not at once: it may have been noted a moment ago by who is about to make it.
        full(&mut one, insert("d"), "3 of 3").await;
        let noted = server.place.client().await.database("dynabase_platform").collection::<Document>("made");
        let past = doc! { "$inc": { "noted_ms": -3_600_000_i64 } };
        assert_eq!(noted.update_many(doc! { "names": "shared_app.c" }, past).await.expect("set").modified_count, 1);
        done(&mut one, insert("d")).await;
        full(&mut one, insert("e"), "3 of 3").await;
        // A raised tier does, too, at once, for the client that is in.
        house.table.apply(Arc::new(tenant("acme", Tier::Starter, 2))).expect("a newer epoch");
        done(&mut one, insert("e")).await;
        assert_eq!(there(&server, "shared_app").await, ["a", "b", "d", "e", "theirs"]);
    });
}

/// Two processes, many clients, one tenant.
#[test]
fn shared_collections_are_counted_exactly_over_all_processes() {
    let server = Own::start(None);
    block_on(async {
        let tiers = tiers("STARTER", "collections = 5");
        let houses =
            [House::with_tiers(server.place.port, &tiers).await, House::with_tiers(server.place.port, &tiers).await];
        let mut making = Vec::new();
        for n in 0..12 {
            let mut client = houses[n % 2].client("globex").await;
            // Two of them make the same one.
            making.push(tokio::spawn(async move { client.run(insert(&format!("n{}", n / 2))).await }));
        }
        let (mut made, mut refused) = (0, 0);
        for told in making {
            let told = told.await.expect("it ran");
            match told.get_i32("code").ok() {
                None => made += 1,
                Some(242) => refused += 1,
                Some(_) => panic!("{told}"),
            }
        }
        assert_eq!((made, refused), (10, 2));
        assert_eq!(there(&server, "shared_app").await.len(), 5);
    });
}

#[test]
fn collections_of_databases_of_its_own_are_those_that_are_there() {
    let server = Own::start(None);
    block_on(async {
        let house = House::with_tiers(server.place.port, &tiers("PRO", "collections = 3\nindexes = 2")).await;
        let mut client = house.client("initech").await;
        let view = |name: &str| doc! { "create": name, "viewOn": "a", "pipeline": [], "$db": "app" };
        let elsewhere = doc! { "insert": "b", "documents": [{ "a": 1 }], "$db": "elsewhere" };
        for command in [insert("a"), elsewhere, view("v")] {
            done(&mut client, command).await;
        }
        for command in [
            insert("d"),
            upsert("d"),
            view("w"),
            index("d", "x"),
            into("$out", "a", "d"),
            into("$merge", "a", "d"),
            bulk(&["a", "d"]),
            doc! { "aggregate": "a", "pipeline": [{ "$out": { "db": "further", "coll": "d" } }], "cursor": {}, "$db": "app" },
        ] {
            full(&mut client, command, "3 of 3 of tier PRO").await;
        }
        let explained = doc! { "explain": into("$out", "a", "d"), "$db": "app" };
        assert_ne!(client.run(explained).await.get_i32("code").ok(), Some(242), "it writes nothing");
        // What is there goes on, also known to this process; what was dropped gives room, once.
        for command in [insert("a"), insert("a"), doc! { "drop": "v", "$db": "app" }, insert("d"), insert("d")] {
            done(&mut client, command).await;
        }
        full(&mut client, insert("v"), "3 of 3").await;
        done(&mut client, doc! { "drop": "d", "$db": "app" }).await;
        done(&mut client, insert("e")).await;
        full(&mut client, insert("d"), "3 of 3").await;
        let database = house.place("initech", "app");
        assert_eq!(there(&server, &database).await, ["a", "e"]);
        // Indexes: as many as the tier says, over all that one request makes.
        done(&mut client, index("a", "x")).await;
        let two: Vec<Document> = ["y", "z"].map(|field| doc! { "key": { field: 1 }, "name": field }).into();
        let told = client.run(doc! { "createIndexes": "a", "indexes": two, "$db": "app" }).await;
        assert_eq!(told.get_i32("code").ok(), Some(67), "{told}");
        assert!(told.get_str("errmsg").is_ok_and(|text| text.contains("1 of 2 of tier PRO")), "{told}");
        done(&mut client, index("a", "y")).await;
        done(&mut client, index("a", "x")).await;
        assert_eq!(client.run(index("a", "z")).await.get_i32("code").ok(), Some(67));
    });
}
