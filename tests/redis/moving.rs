//! Servers that take each other's place: a replica that Sentinel promotes, slots that move from node to node of a
//! cluster. Real Sentinels, real nodes.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use dynabase::upstream::redis::Via;

use super::support::{Client, House, Kind, PLATFORM, Redis, free_port, kind, on, target};

/// A process that ends with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A function that reads a key.
const LIBRARY: &str =
    "#!lua name=l\nredis.register_function('get',function(keys) return redis.call('GET',keys[1]) end)";

/// Tries until it gets this, for as long as a failover may take.
async fn until(client: &mut Client, house: &House, org: &str, line: &str, expected: &str) -> usize {
    let begun = Instant::now();
    let mut refused = 0;
    loop {
        let reply = client.line(line).await;
        if reply == expected {
            return refused;
        }
        assert!(begun.elapsed() < Duration::from_secs(40), "{line}: still {reply}");
        refused += 1;
        assert!(reply.starts_with("-ERR upstream") || reply == "(closed)" || reply == "(nil)", "{line}: {reply}");
        if reply == "(closed)" {
            *client = house.client(org).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_by_sentinel_is_followed() {
    let common = ["--databases", "64", "--requirepass", PLATFORM, "--masterauth", PLATFORM];
    let master = Redis::with(tempfile::tempdir().expect("a folder"), free_port(), &common).await;
    let master_port = master.port.to_string();
    let replica_options = [&common[..], &["--replicaof", "127.0.0.1", &master_port]].concat();
    let replica = Redis::with(tempfile::tempdir().expect("a folder"), free_port(), &replica_options).await;
    let mut sentinels = Vec::new();
    let mut ports = Vec::new();
    let folder = tempfile::tempdir().expect("a folder");
    for i in 0..3 {
        let port = free_port();
        let config = folder.path().join(format!("{i}.conf"));
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor main 127.0.0.1 {master_port} 2\n\
             sentinel auth-pass main {PLATFORM}\nsentinel down-after-milliseconds main 500\n\
             sentinel failover-timeout main 3000\n",
            folder.path().display()
        );
        std::fs::write(&config, text).expect("written");
        let child = Command::new("redis-server").arg(&config).arg("--sentinel").stdout(Stdio::null()).spawn();
        sentinels.push(Ends(child.expect("redis-server is installed")));
        ports.push(port);
    }
    for port in &ports {
        while tokio::net::TcpStream::connect(("127.0.0.1", *port)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // It knows the replica and the two others.
        let mut client = Client::connect(*port).await;
        loop {
            let known = client.line("SENTINEL MASTER main").await;
            if known.contains("\"num-slaves\" \"1\"") && known.contains("\"num-other-sentinels\" \"2\"") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let mut target = target(ports[0]);
    target.others = ports[1..].iter().map(|port| format!("127.0.0.1:{port}")).collect();
    target.via = Via::Sentinel { master: "main".into(), user: None, password: None };
    let mut house = House::before(master, target, None, include_str!("../../config/tiers.toml")).await;
    let mut client = house.client("umbrella").await;
    assert_eq!(client.line("SET k 1").await, "+OK");
    assert_eq!(client.run(&["FUNCTION", "LOAD", LIBRARY]).await, "\"l\"");
    let mut listener = house.client("umbrella").await;
    listener.line("SUBSCRIBE c").await;
    let mut behind = replica.admin().await;
    while !behind.line("INFO keyspace").await.contains("db1:keys=1") || behind.line("FUNCTION LIST").await == "[]" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // What is outstanding when the master dies has no answer: it is told, and not sent again.
    let mut blocked = house.client("umbrella").await;
    blocked.send(&["BLPOP", "q", "0"]).await;
    let mut admin = house.admin().await;
    while !admin.line("INFO clients").await.contains("blocked_clients:1") {
        tokio::task::yield_now().await;
    }
    house.redis.kill();
    assert_eq!(blocked.reply().await, "(closed)");
    assert_eq!(listener.reply().await, "(closed)");
    let refused = until(&mut client, &house, "umbrella", "SET k 2", "+OK").await;
    assert!(refused > 0, "the dead master answered");
    assert_eq!(client.line("GET k").await, "\"2\"");
    // Sentinel ended the connections that the replica had.
    let mut behind = replica.admin().await;
    assert!(behind.line("ROLE").await.starts_with("[\"master\""));
    behind.line("SELECT 1").await;
    assert_eq!(behind.line("GET org:umbrella:k").await, "\"2\"");
    // The new one has no ACL users until it is asked for one; scripts are loaded again, too.
    let script = "return redis.call('INCR','n'..ARGV[1])";
    assert_eq!(client.run(&["EVAL", script, "0", "x"]).await, ":1");
    assert_eq!(client.line("FCALL get 1 k").await, "\"2\"");
    // The old one comes back as a replica; nobody is sent there.
    house.redis.start_again().await;
    assert_eq!(house.client("umbrella").await.line("SET k 3").await, "+OK");
    drop(sentinels);
    // Without Sentinels, what serves goes on serving.
    assert_eq!(client.line("INCR k").await, ":4");
}

/// The slot of a tenant moves to another node while it is used: nothing is lost, nothing is told to the client.
async fn slot_moves() {
    let house = House::start().await;
    assert_eq!(kind(), Kind::Cluster);
    let nodes: Vec<&Redis> = std::iter::once(&house.redis).chain(&house.more).collect();
    let mut admins = Vec::new();
    for node in &nodes {
        admins.push(node.admin().await);
    }
    let mut client = house.client("umbrella").await;
    for i in 0..200 {
        assert_eq!(client.run(&["SET", &format!("k{i}"), &i.to_string()]).await, "+OK");
    }
    assert_eq!(client.line("MSET a 1 b 2 c 3").await, "+OK", "all of a tenant is in one slot");
    assert_eq!(client.line("RENAME c d").await, "+OK");
    assert_eq!(client.run(&["FUNCTION", "LOAD", LIBRARY]).await, "\"l\"");
    let slot = admins[0].run(&["CLUSTER", "KEYSLOT", "{org:umbrella}:k"]).await.trim_start_matches(':').to_owned();
    let mut ids = Vec::new();
    let mut source = 0;
    for (i, admin) in admins.iter_mut().enumerate() {
        ids.push(admin.line("CLUSTER MYID").await.trim_matches('"').to_owned());
        if admin.line(&format!("CLUSTER COUNTKEYSINSLOT {slot}")).await != ":0" {
            source = i;
        }
    }
    let to = (source + 1) % 3;
    // A writer that never stops, and counts.
    let mut busy = house.client("umbrella").await;
    let writer = tokio::spawn(async move {
        let mut last = 0;
        for _ in 0..400 {
            let reply = busy.line("INCR n").await;
            let n: i64 = reply.trim_start_matches(':').parse().unwrap_or_else(|_| panic!("{reply}"));
            assert_eq!(n, last + 1);
            last = n;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        last
    });
    assert_eq!(admins[to].line(&format!("CLUSTER SETSLOT {slot} IMPORTING {}", ids[source])).await, "+OK");
    assert_eq!(admins[source].line(&format!("CLUSTER SETSLOT {slot} MIGRATING {}", ids[to])).await, "+OK");
    // Half of the keys have gone: those are found by ASK.
    let mut moved = 0;
    loop {
        let keys = admins[source].line(&format!("CLUSTER GETKEYSINSLOT {slot} 20")).await;
        let keys: Vec<String> = keys
            .trim_matches(['[', ']'])
            .split(' ')
            .map(|k| k.trim_matches('"').to_owned())
            .filter(|k| !k.is_empty())
            .collect();
        if keys.is_empty() {
            break;
        }
        let port = nodes[to].port.to_string();
        let mut words = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "AUTH", PLATFORM, "KEYS"];
        words.extend(keys.iter().map(String::as_str));
        assert_eq!(admins[source].run(&words).await, "+OK");
        moved += keys.len();
        if moved == 100 {
            for i in 0..200 {
                assert_eq!(client.run(&["GET", &format!("k{i}")]).await, format!("\"{i}\""));
                assert_eq!(client.run(&["FCALL", "get", "1", &format!("k{i}")]).await, format!("\"{i}\""));
            }
            assert_eq!(client.line("MULTI").await, "+OK");
            client.line("SET new 1").await;
            client.line("INCR new").await;
            let exec = client.line("EXEC").await;
            assert!(exec == "[+OK :2]" || exec.starts_with("-EXECABORT"), "{exec}");
        }
    }
    for admin in [to, source, 3 - to - source] {
        assert_eq!(admins[admin].line(&format!("CLUSTER SETSLOT {slot} NODE {}", ids[to])).await, "+OK");
    }
    // A pipeline through the move keeps its order.
    for i in 0..200 {
        client.send(&["GET", &format!("k{i}")]).await;
    }
    for i in 0..200 {
        assert_eq!(client.reply().await, format!("\"{i}\""));
    }
    assert_eq!(writer.await.expect("no error was told"), 400);
    assert_eq!(client.line("EVAL return(redis.call('GET','a')) 0").await, "\"1\"");
    assert_eq!(client.line("FCALL get 1 a").await, "\"1\"");
    assert!(client.line("FUNCTION LIST").await.contains("\"get\""));
    assert_eq!(house.client("umbrella").await.line("GET d").await, "\"3\"");
    assert_ne!(admins[to].line(&format!("CLUSTER COUNTKEYSINSLOT {slot}")).await, ":0");
}

/// A master of a cluster dies and its replica takes over.
async fn node_fails() {
    let mut house = House::start().await;
    let slot_of = |org: &str| format!("{{org:{org}}}:k");
    let mut admin = house.admin().await;
    let slot = admin.run(&["CLUSTER", "KEYSLOT", &slot_of("umbrella")]).await;
    let slot: u16 = slot.trim_start_matches(':').parse().expect("a number");
    let at = usize::from(slot > 5460) + usize::from(slot > 10_922);
    let (port, id) = {
        let node = if at == 0 { &house.redis } else { &house.more[at - 1] };
        (node.port, node.admin().await.line("CLUSTER MYID").await.trim_matches('"').to_owned())
    };
    // A replica of its own.
    let bus = free_port().to_string();
    let options = [
        "--cluster-enabled",
        "yes",
        "--cluster-port",
        &bus,
        "--cluster-node-timeout",
        "1500",
        "--requirepass",
        PLATFORM,
        "--masterauth",
        PLATFORM,
        "--cluster-replica-validity-factor",
        "0",
    ];
    let replica = Redis::with(tempfile::tempdir().expect("a folder"), free_port(), &options).await;
    let meet = format!("CLUSTER MEET 127.0.0.1 {} {bus}", replica.port);
    assert_eq!(admin.line(&meet).await, "+OK");
    let mut behind = replica.admin().await;
    while behind.line(&format!("CLUSTER REPLICATE {id}")).await != "+OK" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut client = house.client("umbrella").await;
    assert_eq!(client.line("SET k 1").await, "+OK");
    while !behind.line("INFO keyspace").await.contains("keys=")
        || !behind.line("INFO replication").await.contains("master_link_status:up")
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Everybody has heard of it: whoever is asked knows who may take over.
    while !admin.line("CLUSTER SLOTS").await.contains(&format!(":{}", replica.port)) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let victim = if at == 0 { &mut house.redis } else { &mut house.more[at - 1] };
    assert_eq!(victim.port, port);
    victim.kill();
    until(&mut client, &house, "umbrella", "SET k 2", "+OK").await;
    assert_eq!(client.line("GET k").await, "\"2\"");
    assert!(behind.line("ROLE").await.starts_with("[\"master\""));
}

#[test]
fn a_slot_that_moves_is_followed() {
    on(Kind::Cluster, slot_moves_test);
}

#[test]
fn a_replica_that_takes_over_is_found() {
    on(Kind::Cluster, node_fails_test);
}

fn block_on(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(test);
}

fn slot_moves_test() {
    block_on(slot_moves());
}

fn node_fails_test() {
    block_on(node_fails());
}
