//! The tier's numbers, exactly.

use dynabase::tenant::Tier;

use super::support::{Client, House};

#[tokio::test(flavor = "multi_thread")]
pub async fn the_key_after_the_last_is_refused_whatever_makes_it() {
    let house = House::with_tiers(
        &include_str!("../../config/tiers.toml")
            .replace("per_second = 500, burst = 1000", "per_second = 500000, burst = 1000000"),
    )
    .await;
    let mut client = house.client("acme").await;
    // Sent in one pipeline by several clients: no two commands share the last place.
    let mut others = Vec::new();
    for n in 0..4 {
        let mut other = house.client("acme").await;
        others.push(tokio::spawn(async move {
            for i in 0..300 {
                other.send(&["SET", &format!("k{n}:{i}"), "v"]).await;
            }
            let mut stored = 0;
            for _ in 0..300 {
                let reply = other.reply().await;
                assert!(reply == "+OK" || reply.starts_with("-OOM "), "{reply}");
                stored += usize::from(reply == "+OK");
            }
            stored
        }));
    }
    let mut stored = 0;
    for other in others {
        stored += other.await.expect("it ends");
    }
    assert_eq!(stored, 1000);
    assert_eq!(client.line("DBSIZE").await, ":1000");
    for line in [
        "SET new v",
        "HSET new f v",
        "LPUSH new v",
        "SADD new v",
        "ZADD new 1 v",
        "INCR new",
        "XADD new * f v",
        "APPEND new v",
        "SETNX new v",
        "MSET new v",
        "PFADD new v",
        "GEOADD new 1 1 m",
        "SETBIT new 1 1",
        "BITOP NOT new k0:0",
        "SUNIONSTORE new s",
        "COPY k0:0 new",
        "XGROUP CREATE new g $ MKSTREAM",
        "SETEX new 10 v",
        "GETSET new v",
        "INCRBYFLOAT new 1",
        "EVAL return(redis.call('set',KEYS[1],'v')) 1 new",
        "EVAL return(redis.call('hset','new','f','v')) 0",
    ] {
        let reply = client.line(line).await;
        let empty_result = line.starts_with("SUNIONSTORE") && reply == ":0";
        assert!(reply.starts_with("-OOM ") || empty_result, "{line}: {reply}");
    }
    client.line("MULTI").await;
    client.line("SET new v").await;
    client.line("SET k0:0 w").await;
    let exec = client.line("EXEC").await;
    assert!(exec.starts_with("[-OOM ") && exec.ends_with("+OK]"), "{exec}");
    assert_eq!(client.line("DBSIZE").await, ":1000");
    // Overwriting, reading and deleting go on; a deletion makes room at once.
    assert_eq!(client.line("SET k0:0 w").await, "+OK");
    assert_eq!(client.line("GET k0:0").await, "\"w\"");
    assert_eq!(client.line("DEL k0:0").await, ":1");
    assert_eq!(client.line("SET new v").await, "+OK");
    assert!(client.line("SET new2 v").await.starts_with("-OOM "));
    // Other databases count with it.
    client.line("SELECT 3").await;
    assert!(client.line("SET elsewhere v").await.starts_with("-OOM "));
    // A larger tier takes effect on the live connection.
    house.set_tier("acme", Tier::Starter, 2);
    assert_eq!(client.line("SET elsewhere v").await, "+OK");
    house.set_tier("acme", Tier::Free, 3);
    assert_eq!(client.line("GET elsewhere").await, "\"v\"");
    assert!(client.line("SET elsewhere2 v").await.starts_with("-OOM "));
}

#[tokio::test(flavor = "multi_thread")]
pub async fn the_count_is_right_in_a_new_process() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    for i in 0..900 {
        client.send(&["SET", &format!("k{i}"), "v"]).await;
    }
    // The client and its process vanish under load; another process finds what is there.
    for _ in 0..450 {
        client.reply().await;
    }
    drop(client);
    let second = house.second_front().await;
    let mut client = Client::connect(second).await;
    assert_eq!(client.run(&["AUTH", &house.token("acme")]).await, "+OK");
    let mut stored: usize = 0;
    for i in 0..1000 {
        let reply = client.run(&["SET", &format!("n{i}"), "v"]).await;
        if reply.starts_with("-ERR max requests") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        if reply.starts_with("-OOM") {
            break;
        }
        stored += usize::from(reply == "+OK");
    }
    assert!(stored > 0);
    assert_eq!(client.line("DBSIZE").await, ":1000");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn no_key_outlives_its_tier_whatever_makes_it() {
    let house = House::start().await;
    for three in [false, true] {
        let mut client = if three { house.client3("acme").await } else { house.client("acme").await };
        for (key, line) in [
            ("a", "SET a v"),
            ("b", "SET b v EX 999999"),
            ("c", "SET c v PX 99999999999"),
            ("d", "SET d v NX"),
            ("e", "SET e v EXAT 99999999999"),
            ("f", "SETEX f 99999 v"),
            ("g", "PSETEX g 99999999999 v"),
            ("h", "SETNX h v"),
            ("i", "MSET i v"),
            ("j", "HSET j f v"),
            ("k", "LPUSH k v"),
            ("l", "SADD l v"),
            ("m", "ZADD m 1 v"),
            ("n", "INCR n"),
            ("o", "APPEND o v"),
            ("p", "XADD p * f v"),
            ("q", "PFADD q v"),
            ("r", "GEOADD r 1 1 m"),
            ("s", "SETRANGE s 2 v"),
            ("t", "SUNIONSTORE t l"),
            ("u", "COPY a u"),
            ("v", "GETSET v v"),
            ("w", "LMOVE k w LEFT LEFT"),
            ("x", "BLMOVE w x LEFT LEFT 0"),
            ("y", "EVAL return(redis.call('SET',KEYS[1],1)) 1 y"),
            ("z", "EVAL return(redis.call('SADD','z',1)) 0"),
            ("a", "PERSIST a"),
            ("a", "GETEX a PERSIST"),
            ("a", "EXPIRE a 99999999"),
            ("a", "PEXPIREAT a 99999999999999"),
            ("a", "EXPIRE a 99999999 XX"),
            ("a", "SET a v KEEPTTL"),
            ("a2", "RENAME a a2"),
            ("st", "SORT l ALPHA STORE st"),
            ("bf", "BITFIELD bf SET u8 0 1"),
            ("hb", "HINCRBY hb f 1"),
            ("x2", "XGROUP CREATE x2 g $ MKSTREAM"),
        ] {
            let reply = client.line(line).await;
            assert!(!reply.starts_with('-'), "{line}: {reply}");
            let ttl = client.run(&["TTL", key]).await;
            let seconds: i64 = ttl.trim_start_matches(':').parse().expect("a number");
            assert!((1..=3600).contains(&seconds), "{line}: TTL {seconds}");
        }
        // Shorter ones stay.
        client.line("SET short v EX 10").await;
        client.line("APPEND short w").await;
        let ttl = client.line("TTL short").await;
        assert!([":9", ":10"].contains(&ttl.as_str()), "{ttl}");
        client.line("MULTI").await;
        client.line("HSET tx f v").await;
        client.line("LPUSH tx2 v").await;
        client.line("TTL tx2").await;
        assert_eq!(client.line("EXEC").await, "[:1 :1 :3600]");
        client.line("FLUSHDB").await;
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let mut free = house.client("umbrella").await;
    free.line("SET k v").await;
    assert_eq!(free.line("TTL k").await, ":-1");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn memory_over_the_cap_refuses_growth_and_nothing_else() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    let megabyte = "x".repeat(1 << 20);
    let mut stored = 0;
    for i in 0..60 {
        let reply = client.run(&["SET", &format!("k{i}"), &megabyte]).await;
        if reply.starts_with("-OOM") {
            break;
        }
        stored += 1;
    }
    assert!((40..=50).contains(&stored), "{stored} MB of 50 were stored");
    assert!(client.line("SETRANGE sparse 400000000 x").await.starts_with("-OOM"));
    assert!(client.line("SETBIT sparse 4000000000 1").await.starts_with("-OOM"));
    assert_eq!(client.line("STRLEN k0").await, ":1048576");
    // Overwriting again and again is not growth.
    assert_eq!(client.line("DEL k0 k1 k2 k3 k4 k5 k6 k7 k8 k9").await, ":10");
    for _ in 0..30 {
        assert_eq!(client.run(&["SET", "k20", &megabyte]).await, "+OK");
    }
    assert!(client.line("INFO memory").await.contains("maxmemory:52428800"));
}

#[tokio::test(flavor = "multi_thread")]
pub async fn rates_and_sockets() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    for _ in 0..1500 {
        client.send(&["PING"]).await;
    }
    let mut refused = 0;
    for _ in 0..1500 {
        let reply = client.reply().await;
        if reply != "+PONG" {
            assert!(
                reply.starts_with("-ERR max requests limit exceeded. Limit: 500 commands per second (tier FREE)"),
                "{reply}"
            );
            refused += 1;
        }
    }
    assert!((1..=500).contains(&refused), "{refused}");
    let mut clients = Vec::new();
    for _ in 0..49 {
        clients.push(house.client("acme").await);
    }
    let mut one_more = Client::connect(house.port).await;
    let reply = one_more.run(&["AUTH", &house.token("acme")]).await;
    assert!(reply.starts_with("-ERR max number of clients reached"), "{reply}");
    assert_eq!(one_more.reply().await, "(closed)");
    // A token can be renewed at the cap.
    assert_eq!(client.run(&["AUTH", &house.token("acme")]).await, "+OK");
}

/// The first command on a new connection waits for a measurement: the connection must not end meanwhile.
#[tokio::test(flavor = "multi_thread")]
pub async fn a_tenants_first_command_may_be_one_that_is_refused() {
    let house = House::start().await;
    for org in ["acme", "globex", "initech"] {
        let mut client = house.client(org).await;
        let reply = client.line("SETBIT k 4294967295 1").await;
        assert!(reply.starts_with("-OOM "), "{reply}");
        assert_eq!(client.line("BITCOUNT k").await, ":0");
    }
}
