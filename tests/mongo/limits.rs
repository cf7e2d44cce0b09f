//! A tier's limits, each met on purpose, and what becomes of the upstream when something goes wrong.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bson::{Binary, Document, doc, spec::BinarySubtype};
use dynabase::tenant::Tier;

use super::support::{Act, Event, House, asked_until, message, server, tenant, wait};

/// The shipped tiers with one number of FREE's changed.
fn tiers(from: &str, to: &str) -> String {
    let text = include_str!("../../config/tiers.toml");
    let at = text.find("[FREE.mongodb]").expect("there");
    format!("{}{}", &text[..at], text[at..].replacen(from, to, 1))
}

fn lsid(byte: u8) -> Document {
    doc! { "id": Binary { subtype: BinarySubtype::Uuid, bytes: vec![byte; 16] } }
}

fn statement(byte: u8, starts: bool) -> Document {
    let mut command = doc! {
        "insert": "c", "documents": [{ "_id": 1 }], "lsid": lsid(byte), "txnNumber": 1_i64, "autocommit": false, "$db": "app",
    };
    if starts {
        command.insert("startTransaction", true);
    }
    command
}

fn end(byte: u8, how: &str) -> Document {
    doc! { how: 1, "lsid": lsid(byte), "txnNumber": 1_i64, "autocommit": false, "$db": "admin" }
}

fn labels(told: &Document) -> Vec<&str> {
    told.get_array("errorLabels").map(|list| list.iter().filter_map(|it| it.as_str()).collect()).unwrap_or_default()
}

fn fine(_: &Document) -> Act {
    Act::Answer(doc! { "n": 1, "ok": 1.0 })
}

#[tokio::test]
async fn open_transactions_are_the_tiers_connections_and_the_next_waits_its_time() {
    let (port, mut events) = server(fine).await;
    let house = House::with_tiers(port, &tiers("queue_timeout = \"5s\"", "queue_timeout = \"300ms\"")).await;
    let (mut one, mut other) = (house.client("acme").await, house.client("acme").await);
    assert_eq!(one.run(statement(1, true)).await.get_f64("ok").ok(), Some(1.0));
    assert_eq!(one.run(statement(2, true)).await.get_f64("ok").ok(), Some(1.0));
    // FREE has two: both are in use, though nothing runs.
    let told = other.run(doc! { "count": "c", "$db": "app" }).await;
    assert_eq!(told.get_i32("code").ok(), Some(462), "{told}");
    assert_eq!(labels(&told), ["SystemOverloadedError", "RetryableError"]);
    assert!(told.get_str("errmsg").is_ok_and(|text| text.contains("2 of 2") && text.contains("FREE")), "{told}");
    // A statement inside one needs no further place.
    assert_eq!(one.run(statement(1, false)).await.get_f64("ok").ok(), Some(1.0));
    assert_eq!(one.run(end(1, "commitTransaction")).await.get_f64("ok").ok(), Some(1.0));
    assert_eq!(other.run(doc! { "count": "c", "$db": "app" }).await.get_f64("ok").ok(), Some(1.0));
    // Who leaves takes its transaction along.
    drop(one);
    wait(&mut events, |event| matches!(event, Event::Asked(asked) if asked.contains_key("abortTransaction"))).await;
}

#[tokio::test]
async fn a_raised_tier_lets_the_waiting_go() {
    let (port, _events) = server(fine).await;
    let house = House::with_tiers(port, &tiers("queue_timeout = \"5s\"", "queue_timeout = \"20s\"")).await;
    let (mut one, mut other) = (house.client("acme").await, house.client("acme").await);
    one.run(statement(1, true)).await;
    one.run(statement(2, true)).await;
    let waiting = tokio::spawn(async move { other.run(doc! { "count": "c", "$db": "app" }).await });
    let raised = tenant("acme", Tier::Starter, 2);
    house.table.apply(Arc::new(raised)).expect("a newer epoch");
    let told = tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("in time").expect("it ran");
    assert_eq!(told.get_f64("ok").ok(), Some(1.0));
}

#[tokio::test]
async fn one_request_more_than_the_rate_gets_462_with_labels() {
    let (port, _events) = server(fine).await;
    let house = House::before(port).await;
    let mut client = house.client("acme").await;
    let mut refused = None;
    for _ in 0..400 {
        let told = client.run(doc! { "count": "c", "$db": "app" }).await;
        if told.get_f64("ok").ok() == Some(0.0) {
            refused = Some(told);
            break;
        }
    }
    let told = refused.expect("FREE allows 50 a second and a burst of 100");
    assert_eq!(told.get_i32("code").ok(), Some(462));
    assert_eq!(labels(&told), ["SystemOverloadedError", "RetryableError"]);
    assert!(told.get_i32("baseBackoffMS").is_ok_and(|ms| ms >= 1), "{told}");
    // What gives things back is never refused.
    assert_eq!(client.run(end(1, "abortTransaction")).await.get_f64("ok").ok(), Some(1.0));
}

#[tokio::test]
async fn the_cursor_over_the_cap_is_closed_and_refused() {
    let next = AtomicI64::new(100);
    let (port, mut events) = server(move |asked| {
        if asked.contains_key("find") {
            let id = next.fetch_add(1, Ordering::Relaxed);
            return Act::Answer(doc! { "cursor": { "id": id, "ns": "shared_app.c", "firstBatch": [] }, "ok": 1.0 });
        }
        fine(asked)
    })
    .await;
    let house = House::with_tiers(port, &tiers("cursors = 50", "cursors = 2")).await;
    let mut client = house.client("acme").await;
    let find = || doc! { "find": "c", "$db": "app" };
    let first = client.run(find()).await;
    let seen = first.get_document("cursor").and_then(|cursor| cursor.get_i64("id")).expect("a cursor");
    assert_ne!(seen, 100, "the server's own number stays there");
    client.run(find()).await;
    let told = client.run(find()).await;
    assert_eq!((told.get_i32("code").ok(), labels(&told).len()), (Some(462), 0), "{told}");
    wait(&mut events, |event| {
        matches!(event, Event::Asked(asked) if asked.get_array("cursors").is_ok_and(|ids| ids[0].as_i64() == Some(102)))
    })
    .await;
    let kill = doc! { "killCursors": "c", "cursors": [seen], "$db": "app" };
    client.run(kill).await;
    wait(&mut events, |event| {
        matches!(event, Event::Asked(asked) if asked.get_array("cursors").is_ok_and(|ids| ids[0].as_i64() == Some(100)))
    })
    .await;
    assert_eq!(client.run(find()).await.get_f64("ok").ok(), Some(1.0));
}

/// Ids that the tenant does not have are no way to make the server work.
#[tokio::test]
async fn the_server_is_asked_to_close_only_what_the_tenant_has_open() {
    let (port, mut events) = server(|asked| {
        if asked.contains_key("find") {
            return Act::Answer(
                doc! { "cursor": { "id": 100_i64, "ns": "shared_app.c", "firstBatch": [] }, "ok": 1.0 },
            );
        }
        let killed = asked.get_array("cursors").cloned().unwrap_or_default();
        Act::Answer(doc! { "cursorsKilled": killed, "cursorsNotFound": [], "ok": 1.0 })
    })
    .await;
    let house = House::before(port).await;
    let mut client = house.client("acme").await;
    let opened = client.run(doc! { "find": "c", "$db": "app" }).await;
    let seen = opened.get_document("cursor").and_then(|cursor| cursor.get_i64("id")).expect("a cursor");
    let kill = |ids: Vec<i64>| doc! { "killCursors": "c", "cursors": ids, "$db": "app" };
    let lists = |told: &Document| {
        let list = |name| told.get_array(name).expect("there").iter().filter_map(|it| it.as_i64()).collect::<Vec<_>>();
        (list("cursorsKilled"), list("cursorsNotFound"))
    };
    let many: Vec<i64> = (1..=10_000).collect();
    assert_eq!(lists(&client.run(kill(many.clone())).await), (vec![], many));
    assert_eq!(lists(&client.run(kill(vec![5, seen, -5, 0])).await), (vec![seen], vec![5, -5, 0]));
    // It is closed now.
    assert_eq!(lists(&client.run(kill(vec![seen])).await), (vec![], vec![seen]));
    let told = client.run(kill((1..=10_001).collect())).await;
    assert_eq!(told.get_i32("code").ok(), Some(2), "{told}");
    client.run(doc! { "count": "c", "$db": "app" }).await;
    let asked = asked_until(&mut events, |command| command.contains_key("count")).await;
    let asked: Vec<_> = asked.iter().filter_map(|command| command.get_array("cursors").cloned().ok()).collect();
    assert_eq!(asked, [vec![bson::Bson::Int64(100)]]);
}

#[tokio::test]
async fn what_gives_back_owes_for_it_and_waits() {
    let (port, _events) = server(fine).await;
    let house = House::before(port).await;
    // FREE has 50 a second and a burst of 100: the last 50 of these take a second, however many clients send them.
    let (clients, each, least) = (5, 30, Duration::from_millis(800));
    let mut all = Vec::new();
    for _ in 0..clients {
        all.push(house.client("acme").await);
    }
    let began = std::time::Instant::now();
    let all = all.into_iter().map(|mut client| async move {
        for _ in 0..each {
            let told = client.run(doc! { "killCursors": "c", "cursors": [5_i64], "$db": "app" }).await;
            assert_eq!(told.get_f64("ok").ok(), Some(1.0), "never refused: {told}");
        }
    });
    futures_util::future::join_all(all).await;
    assert!(began.elapsed() > least, "{:?}", began.elapsed());
}

#[tokio::test]
async fn what_gives_back_has_few_places_at_the_server() {
    let (port, mut events) =
        server(|asked| if asked.contains_key("endSessions") { Act::Stall } else { fine(asked) }).await;
    let house = House::with_tiers(port, &tiers("queue_timeout = \"5s\"", "queue_timeout = \"300ms\"")).await;
    let mut all = Vec::new();
    for _ in 0..6 {
        all.push(house.client("acme").await);
    }
    let asks = all.into_iter().map(|mut client| async move {
        client.run(doc! { "endSessions": [lsid(1)], "$db": "admin" }).await.get_i32("code").ok()
    });
    let codes = futures_util::future::join_all(asks).await;
    // Two were sent on and took too long, four found no place.
    assert_eq!(codes.iter().filter(|code| **code == Some(462)).count(), 4, "{codes:?}");
    let mut asked = 0;
    while let Ok(event) = events.try_recv() {
        asked += usize::from(matches!(event, Event::Asked(command) if command.contains_key("endSessions")));
    }
    assert_eq!(asked, 2);
}

/// The first document of a shared collection brings the platform's index along, for whomever it is.
#[tokio::test]
async fn a_shared_collection_gets_the_platforms_index_once_and_no_request_fails_of_it() {
    for answer in [doc! { "ok": 1.0 }, doc! { "ok": 0.0, "code": 67, "errmsg": "add index fails, too many indexes" }] {
        let (port, mut events) =
            server(
                move |asked| {
                    if asked.contains_key("createIndexes") { Act::Answer(answer.clone()) } else { fine(asked) }
                },
            )
            .await;
        let house = House::before(port).await;
        let (mut one, mut other, mut own) =
            (house.client("acme").await, house.client("globex").await, house.client("initech").await);
        let insert = |collection: &str| doc! { "insert": collection, "documents": [{ "_id": 1 }], "$db": "app" };
        let upsert = doc! { "q": { "_id": 1 }, "u": { "$set": { "a": 1 } }, "upsert": true };
        let plain = doc! { "q": { "_id": 1 }, "u": { "$set": { "a": 1 } } };
        one.run(doc! { "count": "c", "$db": "app" }).await;
        one.run(doc! { "update": "c", "updates": [plain], "$db": "app" }).await;
        for command in [insert("c"), insert("c"), doc! { "update": "d", "updates": [upsert], "$db": "app" }] {
            assert_eq!(one.run(command).await.get_f64("ok").ok(), Some(1.0));
        }
        assert_eq!(other.run(insert("c")).await.get_f64("ok").ok(), Some(1.0));
        let nowhere = doc! {
            "bulkWrite": 1, "ops": [{ "insert": 0, "document": { "_id": 1 } }], "nsInfo": [{ "ns": "app.e" }],
            "$db": "admin",
        };
        one.run(nowhere).await;
        own.run(insert("c")).await;
        own.run(doc! { "count": "last", "$db": "app" }).await;
        let asked = asked_until(&mut events, |command| command.get_str("count").ok() == Some("last")).await;
        let names: Vec<(&str, &str)> = asked
            .iter()
            .filter_map(|command| {
                let (name, value) = command.iter().next()?;
                Some((name.as_str(), value.as_str().unwrap_or_default()))
            })
            .filter(|(name, _)| matches!(*name, "createIndexes" | "insert" | "update" | "count" | "bulkWrite"))
            .collect();
        let wanted = [
            ("count", "c"),
            ("update", "c"),
            ("createIndexes", "c"),
            ("insert", "c"),
            ("insert", "c"),
            ("createIndexes", "d"),
            ("update", "d"),
            ("insert", "c"),
            ("createIndexes", "e"),
            ("bulkWrite", ""),
            ("insert", "c"),
            ("count", "last"),
        ];
        assert_eq!(names, wanted);
        let index = asked.iter().find(|command| command.contains_key("createIndexes")).expect("one");
        let index = index.get_array("indexes").expect("there")[0].as_document().expect("one");
        assert_eq!(index.get_document("key").ok(), Some(&doc! { "org_id": 1, "_id": 1 }));
    }
}

#[tokio::test]
async fn what_takes_too_long_gets_50_and_its_connection_is_closed() {
    let (port, mut events) = server(|asked| if asked.contains_key("count") { Act::Stall } else { fine(asked) }).await;
    let house = House::with_tiers(port, &tiers("timeout = \"5s\"", "timeout = \"200ms\"")).await;
    let mut client = house.client("acme").await;
    client.send(&message(1, 0, &super::support::bytes(&doc! { "count": "c", "$db": "app" }))).await;
    let Event::Asked(asked) = wait(&mut events, |event| matches!(event, Event::Asked(_))).await else { return };
    assert_eq!(asked.get_i32("maxTimeMS").ok(), Some(200), "the server is told, too");
    let (_, told) = client.reply().await.expect("an answer");
    assert_eq!(told.get_i32("code").ok(), Some(50), "{told}");
    wait(&mut events, |event| *event == Event::Closed).await;
    assert_eq!(client.run(doc! { "ping": 1, "$db": "admin" }).await, doc! { "ok": 1.0 });
}

#[tokio::test]
async fn a_client_that_vanishes_ends_its_operation_at_the_server() {
    let (port, mut events) = server(|asked| if asked.contains_key("count") { Act::Stall } else { fine(asked) }).await;
    let house = House::before(port).await;
    let mut client = house.client("umbrella").await;
    client.send(&message(1, 0, &super::support::bytes(&doc! { "count": "c", "$db": "app" }))).await;
    wait(&mut events, |event| matches!(event, Event::Asked(_))).await;
    drop(client);
    wait(&mut events, |event| *event == Event::Closed).await;
}

#[tokio::test]
async fn a_lost_upstream_is_code_6_with_the_label_that_fits() {
    let (port, _events) =
        server(|asked| if asked.contains_key("abortTransaction") { fine(asked) } else { Act::Hang }).await;
    let house = House::before(port).await;
    let mut client = house.client("initech").await;
    let retryable =
        doc! { "insert": "c", "documents": [{ "_id": 1 }], "lsid": lsid(1), "txnNumber": 1_i64, "$db": "app" };
    for (command, label) in [
        (doc! { "count": "c", "$db": "app" }, None),
        (retryable, Some("RetryableWriteError")),
        (statement(2, true), Some("TransientTransactionError")),
        (end(3, "commitTransaction"), Some("RetryableWriteError")),
    ] {
        let told = client.run(command.clone()).await;
        assert_eq!(told.get_i32("code").ok(), Some(6), "{command}: {told}");
        assert_eq!(labels(&told).first().copied(), label, "{command}");
    }
    // Nobody answers at all.
    let nowhere = House::before(1).await;
    let told = nowhere.client("initech").await.run(doc! { "count": "c", "$db": "app" }).await;
    assert_eq!(told.get_i32("code").ok(), Some(6));
}

#[tokio::test]
async fn a_server_that_steps_down_is_not_taken_for_us() {
    let (port, _events) = server(|_| Act::Answer(doc! { "ok": 0.0, "errmsg": "not primary", "code": 10107 })).await;
    let house = House::before(port).await;
    let told = house.client("initech").await.run(doc! { "count": "c", "$db": "app" }).await;
    assert_eq!(told.get_i32("code").ok(), Some(6));
}
