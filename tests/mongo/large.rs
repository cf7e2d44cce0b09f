//! Large messages of many clients at once: memory stays bounded, who is over it is told to try again, others go on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bson::{Document, doc};
use dynabase::{
    tenant::Tier,
    wire::mongo::{MORE_TO_COME, OP_COMPRESSED, OP_MSG},
};

use super::support::{Act, Client, bytes, payload, plain, server};
use crate::support::proxy::{Proxy, Setup};

/// Clients that each send a large message at a time: 880 MB, and twice that rewritten.
const CLIENTS: usize = 22;

/// Its documents of a megabyte.
const DOCUMENTS: i32 = 40;

/// What a tenant's room is; two of the messages have it, with what they become.
const ROOM_BYTES: u64 = 192 << 20;

/// What all else may take: sockets, tables, what the allocator keeps.
const REST_BYTES: u64 = 64 << 20;

/// An insert with its documents in a section.
fn large(flags: u32) -> Vec<u8> {
    let pad = "x".repeat(1_000_000);
    let mut documents = Vec::new();
    for n in 0..DOCUMENTS {
        documents.extend(bytes(&doc! { "_id": n, "pad": &pad }));
    }
    let size = i32::try_from(4 + b"documents\0".len() + documents.len()).expect("below 48 MB");
    let body = bytes(&doc! { "insert": "c", "$db": "app" });
    let parts = [&flags.to_le_bytes()[..], &[0], &body, &[1], &size.to_le_bytes(), b"documents\0", &documents];
    payload(7, OP_MSG, &parts.concat())
}

async fn client(port: u16, token: String) -> Client {
    let mut client = Client::connect(port).await;
    let told = client.run(plain(&token)).await;
    assert_eq!(told.get_bool("done").ok(), Some(true), "{told}");
    client
}

/// All but the last byte: nobody can be answered before it.
async fn send_but_one(port: u16, token: String, message: Arc<Vec<u8>>) -> (Client, Arc<Vec<u8>>) {
    let mut client = client(port, token).await;
    client.send(&message[..message.len() - 1]).await;
    (client, message)
}

async fn last_byte(client: &mut Client, message: &[u8]) -> Document {
    client.send(&message[message.len() - 1..]).await;
    let (to, told) = client.reply().await.expect("an answer");
    assert_eq!(to, 7);
    told
}

#[test]
fn many_large_messages_at_once_stay_in_bounds_and_others_are_served() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (port, _events) = runtime.block_on(server(|asked| {
        if asked.contains_key("find") {
            // Notices of moves: none.
            let cursor = doc! { "id": 0_i64, "ns": "dynabase.holds", "firstBatch": [] };
            return Act::Answer(doc! { "cursor": cursor, "ok": 1.0 });
        }
        Act::Answer(doc! { "n": DOCUMENTS, "ok": 1.0 })
    }));
    let proxy = Proxy::start(&Setup {
        listen: "mongodb = \"127.0.0.1:0\"".into(),
        sections: format!("[upstream.mongodb]\nurl = \"mongodb://127.0.0.1:{port}/?directConnection=true\"\n"),
        ..Setup::default()
    });
    let (greedy, modest) = (proxy.tenant("greedy", Tier::Enterprise), proxy.tenant("modest", Tier::Free));
    let (door, token) = (proxy.port_of("MongoDB"), greedy.token());
    let (message, silent) = (Arc::new(large(0)), Arc::new(large(MORE_TO_COME)));
    let sent = |message: &Arc<Vec<u8>>| runtime.spawn(send_but_one(door, token.clone(), Arc::clone(message)));
    let idle = proxy.resident();

    // What the kernel does not hold was read: these two have room.
    let holders: Vec<_> = (0..2).map(|_| sent(&message)).collect();
    let holders: Vec<_> = holders.into_iter().map(|it| runtime.block_on(it).expect("sent")).collect();
    let others: Vec<_> = (0..CLIENTS).map(|_| sent(&message)).collect();
    let quiet = sent(&silent);
    let mut sealed = runtime.block_on(client(door, token.clone()));
    let claim = [&OP_MSG.to_le_bytes()[..], &40_000_000_i32.to_le_bytes(), &[2], &[0; 100]].concat();
    runtime.block_on(sealed.send(&payload(9, OP_COMPRESSED, &claim)));

    // Somebody else, all the while; and the most that dynabase takes.
    let (most, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let (others, quiet) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                most.fetch_max(proxy.resident(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let since = Instant::now();
        let told = runtime.block_on(async {
            let mut client = client(door, modest.token()).await;
            client.run(doc! { "count": "c", "$db": "app" }).await
        });
        assert_eq!(told.get_f64("ok").ok(), Some(1.0), "{told}");
        assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
        let others: Vec<_> = others.into_iter().map(|it| runtime.block_on(it).expect("sent")).collect();
        let quiet = runtime.block_on(quiet).expect("sent");
        over.store(true, Ordering::Release);
        (others, quiet)
    });
    let taken = most.load(Ordering::Relaxed).saturating_sub(idle);
    assert!(taken < ROOM_BYTES + REST_BYTES, "{} MiB", taken >> 20);
    assert!(taken > message.len() as u64, "it was measured while it held something: {} MiB", taken >> 20);

    runtime.block_on(async {
        for (mut client, message) in others {
            let told = last_byte(&mut client, &message).await;
            assert_eq!(told.get_i32("code").ok(), Some(462), "{told}");
            assert_eq!(told.get_array("errorLabels").map(Vec::len).ok(), Some(2), "{told}");
            assert!(told.get_i32("baseBackoffMS").is_ok_and(|ms| ms > 0), "{told}");
            assert_eq!(client.run(doc! { "ping": 1, "$db": "admin" }).await, doc! { "ok": 1.0 }, "it goes on");
        }
        // Who wants no answer gets none, also not this one.
        let (mut quiet, silent) = quiet;
        quiet.send(&silent[silent.len() - 1..]).await;
        assert_eq!(quiet.run(doc! { "ping": 1, "$db": "admin" }).await, doc! { "ok": 1.0 });
        // Whether this one wanted any stood inside.
        sealed.closed().await;
        for (mut client, message) in holders {
            let told = last_byte(&mut client, &message).await;
            assert_eq!(told.get_i32("n").ok(), Some(DOCUMENTS), "{told}");
            // Room was given back.
            client.send(&message).await;
            assert_eq!(client.reply().await.expect("an answer").1.get_i32("n").ok(), Some(DOCUMENTS));
        }
    });
    assert!(proxy.metric("dynabase_mongodb_large_refused_total", "") >= (CLIENTS + 2) as f64);
}
