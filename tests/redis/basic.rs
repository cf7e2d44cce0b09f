//! A tenant's client sees what it would see on a Redis of its own.

use super::support::{Client, House, Kind, kind};

#[tokio::test(flavor = "multi_thread")]
pub async fn a_client_logs_in_and_works_inside_its_prefix() {
    let house = House::start().await;
    let mut raw = Client::connect(house.port).await;
    assert_eq!(raw.line("PING").await, "-NOAUTH Authentication required.");
    assert!(raw.run(&["AUTH", "nonsense"]).await.starts_with("-WRONGPASS"));
    assert!(raw.line("HELLO 3").await.starts_with("-NOAUTH HELLO must be called"));
    let token = house.token("acme");
    let hello = raw.run(&["HELLO", "3", "AUTH", "app", &token, "SETNAME", "me"]).await;
    assert!(hello.starts_with("%[\"server\" \"redis\" \"version\" \"7."), "{hello}");
    assert_eq!(raw.line("CLIENT GETNAME").await, "\"me\"");
    assert_eq!(raw.line("SET k v").await, "+OK");
    assert_eq!(raw.line("GET k").await, "\"v\"");
    assert_eq!(raw.line("GET missing").await, "_");
    assert_eq!(raw.line("KEYS *").await, "[\"k\"]");
    assert_eq!(raw.line("SCAN 0").await, "[\"0\" [\"k\"]]");
    assert_eq!(raw.line("DBSIZE").await, ":1");
    assert_eq!(raw.line("RANDOMKEY").await, "\"k\"");
    assert_eq!(raw.line("TYPE k").await, "+string");
    assert_eq!(raw.line("ACL WHOAMI").await, "\"app\"");
    assert_eq!(
        raw.line("CONFIG SET a b").await,
        "-NOPERM this user has no permissions to run the 'config|set' command"
    );
    assert!(
        raw.line("NOSUCH a b").await.starts_with("-ERR unknown command 'NOSUCH', with args beginning with: 'a' 'b'")
    );
    assert_eq!(raw.line("GET").await, "-ERR wrong number of arguments for 'get' command");
    let mut admin = house.admin().await;
    match kind() {
        Kind::Own => {
            let spaces = admin.line("INFO keyspace").await;
            assert!(spaces.contains("db1:keys=1"), "{spaces}");
            admin.line("SELECT 1").await;
            assert_eq!(admin.line("KEYS *").await, "[\"org:acme:k\"]");
        }
        Kind::One => assert_eq!(admin.line("KEYS org:*").await, "[\"org:acme:k\"]"),
        Kind::Cluster => {
            let mut keys = admin.line("KEYS {org*").await;
            for node in &house.more {
                keys.push_str(&node.admin().await.line("KEYS {org*").await);
            }
            assert!(keys.contains("\"{org:acme}:k\""), "{keys}");
        }
    }
    assert_eq!(raw.line("QUIT").await, "+OK");
    assert_eq!(raw.reply().await, "(closed)");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_pipeline_keeps_its_order_whatever_is_in_it() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let words = [
        "SET a 1",
        "PING",
        "NOSUCH",
        "GET a",
        "CONFIG SET x y",
        "INCR a",
        "MULTI",
        "INCR a",
        "EXEC",
        "CLIENT ID",
        "GET a",
    ];
    for line in words {
        client.send(&line.split(' ').collect::<Vec<_>>()).await;
    }
    let mut replies = Vec::new();
    for _ in words {
        replies.push(client.reply().await);
    }
    replies[9] = "id".into();
    assert_eq!(
        replies,
        [
            "+OK",
            "+PONG",
            "-ERR unknown command 'NOSUCH', with args beginning with:",
            "\"1\"",
            "-NOPERM this user has no permissions to run the 'config|set' command",
            ":2",
            "+OK",
            "+QUEUED",
            "[:3]",
            "id",
            "\"3\""
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
pub async fn names_come_back_bare_in_both_protocols() {
    let house = House::start().await;
    for three in [false, true] {
        let mut client = if three { house.client3("umbrella").await } else { house.client("umbrella").await };
        client.line("FLUSHALL").await;
        client.line("RPUSH l a b c").await;
        assert_eq!(client.line("BLPOP l 0").await, "[\"l\" \"a\"]");
        assert_eq!(client.line("LMPOP 2 x l LEFT").await, "[\"l\" [\"b\"]]");
        client.line("ZADD z 1 m 2 n").await;
        let score = if three { ",1" } else { "\"1\"" };
        assert_eq!(client.line("BZPOPMIN z 0").await, format!("[\"z\" \"m\" {score}]"));
        client.line("XADD s 1-1 f v").await;
        let streams = client.line("XREAD COUNT 1 STREAMS s 0").await;
        let inner = "[[\"1-1\" [\"f\" \"v\"]]]";
        assert_eq!(streams, if three { format!("%[\"s\" {inner}]") } else { format!("[[\"s\" {inner}]]") });
        let nogroup = client.line("XREADGROUP GROUP g c STREAMS s >").await;
        assert!(nogroup.contains("No such key 's' or consumer group 'g'"), "{nogroup}");
        assert_eq!(client.line("BLPOP nothing 0.01").await, if three { "_" } else { "(nil*)" });
        // Inside a transaction, too.
        client.line("RPUSH l d").await;
        client.line("MULTI").await;
        client.line("LMPOP 1 l RIGHT").await;
        client.line(if kind() == Kind::Own { "KEYS *" } else { "EXISTS l" }).await;
        assert_eq!(client.line("EXEC").await.split_once(" [").map(|(a, _)| a.to_owned()), Some("[[\"l\"".into()));
        client.line("DEL s z l").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
pub async fn messages_stay_inside_the_tenant() {
    let house = House::start().await;
    for three in [false, true] {
        let mut listener = if three { house.client3("acme").await } else { house.client("acme").await };
        let mut other = house.client("globex").await;
        let mark = if three { ">" } else { "" };
        assert_eq!(listener.line("SUBSCRIBE news").await, format!("{mark}[\"subscribe\" \"news\" :1]"));
        assert_eq!(listener.line("PSUBSCRIBE n*").await, format!("{mark}[\"psubscribe\" \"n*\" :2]"));
        assert_eq!(other.line("PUBLISH news secret").await, ":0");
        assert_eq!(other.line("PUBSUB CHANNELS").await, "[]");
        assert_eq!(other.line("PUBSUB NUMPAT").await, ":0");
        let mut talker = house.client("acme").await;
        assert_eq!(talker.line("PUBLISH news hello").await, ":2");
        assert_eq!(talker.line("PUBSUB CHANNELS").await, "[\"news\"]");
        assert_eq!(talker.line("PUBSUB NUMSUB news x").await, "[\"news\" :1 \"x\" :0]");
        assert_eq!(talker.line("PUBSUB NUMPAT").await, ":1");
        assert_eq!(listener.reply().await, format!("{mark}[\"message\" \"news\" \"hello\"]"));
        assert_eq!(listener.reply().await, format!("{mark}[\"pmessage\" \"n*\" \"news\" \"hello\"]"));
        if three {
            assert_eq!(listener.line("GET x").await, "_");
        } else {
            assert!(listener.line("GET x").await.starts_with("-ERR Can't execute 'get': only (P|S)SUBSCRIBE"));
            assert_eq!(listener.line("PING").await, "[\"pong\" \"\"]");
        }
        assert_eq!(listener.line("UNSUBSCRIBE").await, format!("{mark}[\"unsubscribe\" \"news\" :1]"));
        assert_eq!(listener.line("PUNSUBSCRIBE n*").await, format!("{mark}[\"punsubscribe\" \"n*\" :0]"));
        assert_eq!(listener.line("PING").await, "+PONG");
        assert_eq!(listener.line("SET x 1").await, "+OK");
        listener.line("DEL x").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_blocked_client_delays_nobody_and_pops_nothing_after_it_left() {
    let house = House::start().await;
    let mut blocked = house.client("acme").await;
    blocked.send(&["BLPOP", "q", "0"]).await;
    let mut other = house.client("acme").await;
    assert_eq!(other.line("SET a 1").await, "+OK");
    assert_eq!(other.line("RPUSH q x").await, ":1");
    assert_eq!(blocked.reply().await, "[\"q\" \"x\"]");
    blocked.send(&["BLPOP", "q", "0"]).await;
    // Wait until the server has the blocked client.
    let mut admin = house.admin().await;
    while !admin.line("INFO clients").await.contains("blocked_clients:1") {
        tokio::task::yield_now().await;
    }
    drop(blocked);
    while !admin.line("INFO clients").await.contains("blocked_clients:0") {
        tokio::task::yield_now().await;
    }
    assert_eq!(other.line("RPUSH q y").await, ":1");
    assert_eq!(other.line("LLEN q").await, ":1");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn transactions_watch_and_abort() {
    let house = House::start().await;
    let mut a = house.client("acme").await;
    let mut b = house.client("acme").await;
    assert_eq!(a.line("WATCH k").await, "+OK");
    assert_eq!(a.line("GET k").await, "(nil)");
    assert_eq!(b.line("SET k 1").await, "+OK");
    assert_eq!(a.line("MULTI").await, "+OK");
    assert_eq!(a.line("SET k 2").await, "+QUEUED");
    assert_eq!(a.line("EXEC").await, "(nil*)");
    assert_eq!(a.line("GET k").await, "\"1\"");
    assert_eq!(a.line("MULTI").await, "+OK");
    assert_eq!(a.line("MULTI").await, "-ERR MULTI calls can not be nested");
    assert_eq!(a.line("HSET h f v").await, "+QUEUED");
    assert_eq!(a.line("INCR k").await, "+QUEUED");
    assert_eq!(a.line("LPUSH k x").await, "+QUEUED");
    assert_eq!(a.line("EXEC").await, "[:1 :2 -WRONGTYPE Operation against a key holding the wrong kind of value]");
    assert_eq!(a.line("MULTI").await, "+OK");
    assert!(a.line("NOSUCH").await.starts_with("-ERR unknown"));
    assert_eq!(a.line("EXEC").await, "-EXECABORT Transaction discarded because of previous errors.");
    assert_eq!(a.line("EXEC").await, "-ERR EXEC without MULTI");
    assert_eq!(a.line("MULTI").await, "+OK");
    assert_eq!(a.line("EXEC").await, "[]");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn logical_databases_are_apart() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    client.line("SET k 0").await;
    assert_eq!(client.line("SELECT 5").await, "+OK");
    assert_eq!(client.line("GET k").await, "(nil)");
    client.line("SET k 5").await;
    client.line("SET only5 x").await;
    assert_eq!(client.line("DBSIZE").await, ":2");
    assert_eq!(client.line("MOVE only5 0").await, ":1");
    assert_eq!(client.line("MOVE k 0").await, ":0");
    assert_eq!(client.line("COPY k k5 DB 0").await, ":1");
    assert_eq!(client.line("SELECT 0").await, "+OK");
    assert_eq!(client.line("MGET k only5 k5").await, "[\"0\" \"x\" \"5\"]");
    assert_eq!(client.line("SELECT 16").await, "-ERR DB index is out of range");
    assert_eq!(client.line("COPY k k2").await, ":1");
    if kind() != Kind::Own {
        assert_eq!(client.line("FLUSHALL").await, "+OK");
        assert_eq!(client.line("DBSIZE").await, ":0");
        assert_eq!(client.line("SWAPDB 0 1").await, "-ERR SWAPDB is not possible on a server with a single database");
        return;
    }
    let mut admin = house.admin().await;
    let known = admin.line("HGETALL dynabase:databases:org:umbrella").await;
    let index = known.split('"').nth(7).expect("two databases").to_owned();
    admin.line(&format!("SELECT {index}")).await;
    assert_eq!(admin.line("KEYS *").await, "[\"org:umbrella@5:k\"]");
    assert_eq!(client.line("FLUSHALL").await, "+OK");
    assert_eq!(client.line("DBSIZE").await, ":0");
    client.line("SELECT 5").await;
    assert_eq!(client.line("DBSIZE").await, ":0");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn sort_follows_patterns_inside_the_tenant_only() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    other.line("SET w_1 99").await;
    client.line("RPUSH l 1 2").await;
    client.line("MSET w_1 2 w_2 1 v_1 one v_2 two").await;
    assert_eq!(client.line("SORT l BY w_* GET v_* GET #").await, "[\"two\" \"2\" \"one\" \"1\"]");
    assert_eq!(client.line("SORT l DESC STORE out").await, ":2");
    assert_eq!(client.line("LRANGE out 0 -1").await, "[\"2\" \"1\"]");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_lost_upstream_is_told_and_found_again() {
    let mut house = House::start().await;
    let mut client = house.client("umbrella").await;
    assert_eq!(client.line("SET k 1").await, "+OK");
    house.redis.kill();
    let mut errors = 0;
    for _ in 0..3 {
        let reply = client.line("INCR k").await;
        assert!(reply.starts_with("-ERR upstream"), "{reply}");
        errors += 1;
    }
    assert_eq!(errors, 3);
    assert_eq!(client.line("PING").await, "+PONG");
    // A server that came back has forgotten the tenant's ACL user; it is made again.
    house.redis.start_again().await;
    while client.line("SET k 2").await != "+OK" {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(client.line("EVAL return(1) 0").await, ":1");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn large_values_and_nested_replies_pass() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let big = "x".repeat(20 << 20);
    assert_eq!(client.run(&["SET", "big", &big]).await, "+OK");
    assert_eq!(client.line("STRLEN big").await, format!(":{}", big.len()));
    assert_eq!(client.line("GET big").await.len(), big.len() + 2);
    let mut words = vec!["RPUSH", "l"];
    words.extend(std::iter::repeat_n("element", 50_000));
    assert_eq!(client.run(&words).await, ":50000");
    assert_eq!(client.line("LRANGE l 0 -1").await.matches("element").count(), 50_000);
    let nest = "local t={} local r=t for i=1,3000 do t[1]={} t=t[1] end return r";
    client.send(&["EVAL", nest, "0"]).await;
    assert!(client.frame().await.is_some_and(|frame| frame.len() > 3000 * 4));
    assert_eq!(client.line("PING").await, "+PONG");
}
