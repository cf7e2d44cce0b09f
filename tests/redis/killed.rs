//! dynabase itself, killed as hard as can be while clients write: what it enforces afterwards is what is there.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use dynabase::tenant::Tier;
use tokio::io::AsyncWriteExt;

use super::support::{Client, PLATFORM, Redis};
use crate::support::proxy::{Proxy, Setup};

/// The longest life and the number of keys in all databases but the platform's own, seen from behind; every key must
/// have a life.
async fn behind(admin: &mut Client) -> (i64, i64) {
    let look = "local longest,n=0,0 for _,k in ipairs(redis.call('KEYS','*')) do local t=redis.call('PTTL',k) \
                if t==-1 then return redis.error_reply('ERR no life: '..k) end \
                if t>longest then longest=t end n=n+1 end return {longest,n}";
    let (mut longest, mut keys) = (0, 0);
    let keyspace = admin.line("INFO keyspace").await;
    for database in keyspace.split("db").skip(1).filter_map(|rest| rest.split_once(':').map(|(n, _)| n)) {
        if database == "0" {
            continue;
        }
        assert_eq!(admin.run(&["SELECT", database]).await, "+OK");
        let found = admin.run(&["EVAL", look, "0"]).await;
        let numbers: Vec<i64> =
            found.trim_matches(['[', ']']).split(' ').filter_map(|n| n.trim_start_matches(':').parse().ok()).collect();
        assert_eq!(numbers.len(), 2, "{found}");
        longest = longest.max(numbers[0]);
        keys += numbers[1];
        assert_eq!(admin.line("SELECT 0").await, "+OK");
    }
    (longest, keys)
}

/// One client's load until its connection ends: whatever creates, overwrites and deletes, in pipelines.
async fn load(port: u16, token: String, n: usize, answered: Arc<AtomicUsize>) {
    let mut client = Client::connect(port).await;
    assert_eq!(client.run(&["AUTH", &token]).await, "+OK");
    let mut dice = n * 7919 + 1;
    let mut roll = |sides: usize| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % sides
    };
    loop {
        for _ in 0..20 {
            let key = format!("k{}", roll(1300));
            let (other, script) =
                (format!("k{}", roll(1300)), "redis.call('SET',KEYS[1],1) redis.call('SADD','s'..KEYS[1],2)");
            let words: Vec<&str> = match roll(12) {
                0..=3 => vec!["SET", &key, "v"],
                4 => vec!["SET", &key, "v", "EX", "999999", "NX"],
                5 => vec!["DEL", &key, &other],
                6 => vec!["MSET", &key, "1", &other, "2"],
                7 => vec!["APPEND", &key, "x"],
                8 => vec!["SETNX", &key, "v"],
                9 => vec!["EVAL", script, "1", &key],
                10 => vec!["COPY", &key, &other],
                _ => vec!["PERSIST", &key],
            };
            let mut bytes = Vec::new();
            dynabase::wire::resp::put_request(&mut bytes, &words.iter().map(|w| w.as_bytes()).collect::<Vec<_>>());
            if client.stream.write_all(&bytes).await.is_err() {
                return;
            }
        }
        for _ in 0..20 {
            if client.frame().await.is_none() {
                return;
            }
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn counts_and_lives_are_right_after_a_kill_under_load() {
    let redis = Redis::start(PLATFORM).await;
    let sections = format!("[upstream.redis]\nurl = \"redis://:{PLATFORM}@127.0.0.1:{}\"\n", redis.port);
    let listen = "redis = \"127.0.0.1:0\"".to_owned();
    let mut proxy = Proxy::start(&Setup { sections, listen, ..Setup::default() });
    let token = proxy.tenant("acme", Tier::Free).token();
    let mut admin = redis.admin().await;
    for round in 0..3 {
        let port = proxy.port_of("Redis");
        let answered = Arc::new(AtomicUsize::new(0));
        let clients: Vec<_> =
            (0..6).map(|n| tokio::spawn(load(port, token.clone(), round * 10 + n, Arc::clone(&answered)))).collect();
        // A large value is under way, too.
        let mut large = Client::connect(port).await;
        assert_eq!(large.run(&["AUTH", &token]).await, "+OK");
        large.stream.write_all(b"*3\r\n$3\r\nSET\r\n$5\r\nlarge\r\n$5000000\r\n").await.expect("sent");
        large.stream.write_all(&vec![b'x'; 3_000_000]).await.expect("sent");
        while answered.load(Ordering::Relaxed) < 600 + round * 700 {
            tokio::task::yield_now().await;
        }
        proxy.kill();
        for client in clients {
            client.await.expect("it ends with its connection");
        }
        // What was in the sockets is run to its end.
        while admin.line("CLIENT LIST").await.matches("cmd=").count() > 1 {
            tokio::task::yield_now().await;
        }
        let (longest, keys) = behind(&mut admin).await;
        assert!(longest <= 3_600_000 && keys > 0 && keys <= 1000, "{keys} keys, {longest} ms");

        proxy.start_again();
        let mut client = Client::connect(proxy.port_of("Redis")).await;
        assert_eq!(client.run(&["AUTH", &token]).await, "+OK");
        assert_eq!(client.line("DBSIZE").await, format!(":{keys}"));
        assert_eq!(client.line("EXISTS large").await, ":0");
        // Names of this round: those of the last one are partly there, and would make nothing new.
        for n in keys..1000 {
            assert_eq!(client.run(&["SET", &format!("new{round}:{n}"), "v"]).await, "+OK", "{n}");
        }
        for _ in 0..3 {
            assert!(client.line("SET one:more v").await.starts_with("-OOM "));
        }
        let (longest, keys) = behind(&mut admin).await;
        assert!(longest <= 3_600_000 && keys == 1000, "{keys} keys, {longest} ms");
        for n in 0..400 {
            client.run(&["DEL", &format!("k{n}"), &format!("new{round}:{n}")]).await;
        }
    }
}
