//! What a client is told about the server is its tenant's own truth; what it asks for in other tenants' names is
//! nothing; what changes for its tenant changes for the client that is there.

use dynabase::tenant::Tier;
use tokio::io::AsyncWriteExt;

use super::support::{Client, House, PLATFORM};

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_settings_are_the_tenants_own() {
    let house = House::start().await;
    let mut other = house.client("hooli").await;
    assert_eq!(other.line("CLIENT SETNAME hoolis").await, "+OK");
    other.line("MSET a 1 b 2 c 3").await;
    let other_id = other.line("CLIENT ID").await.trim_start_matches(':').to_owned();
    let mut client = house.client("acme").await;
    let mut second = house.client("acme").await;
    assert_eq!(second.line("CLIENT SETNAME second").await, "+OK");
    assert_eq!(client.line("SET k v").await, "+OK");

    let list = client.line("CLIENT LIST").await;
    assert_eq!(list.matches("id=").count(), 2, "{list}");
    assert!(list.contains("name=second") && !list.contains("hoolis") && !list.contains("org"), "{list}");
    assert_eq!(client.run(&["CLIENT", "LIST", "ID", &other_id]).await, "\"\"");
    assert_eq!(client.run(&["CLIENT", "KILL", "ID", &other_id]).await, ":0");
    assert_eq!(other.line("PING").await, "+PONG");

    let info = client.line("INFO").await;
    for own in ["connected_clients:2\\r\\n", "maxmemory:52428800\\r\\n", "maxclients:50\\r\\n", "role:master"] {
        assert!(info.contains(own), "{own} in {info}");
    }
    client.line("DBSIZE").await;
    for section in ["INFO", "INFO everything", "INFO keyspace"] {
        let info = client.line(section).await;
        assert!(!info.contains("db1") && !info.contains("keys=3") && !info.contains("hooli"), "{info}");
    }
    for (ask, expected) in [
        ("CONFIG GET maxmemory", "[\"maxmemory\" \"52428800\"]"),
        ("CONFIG GET maxclients", "[\"maxclients\" \"50\"]"),
        ("CONFIG GET requirepass", "[]"),
        ("CONFIG GET dir", "[]"),
        ("ACL WHOAMI", "\"app\""),
    ] {
        assert_eq!(client.line(ask).await, expected, "{ask}");
    }
    assert!(!client.line("CONFIG GET *").await.contains(PLATFORM));
    for refused in [
        "CONFIG SET maxmemory 0",
        "CONFIG REWRITE",
        "ACL LIST",
        "ACL SETUSER x",
        "MONITOR",
        "SLOWLOG GET",
        "DEBUG SLEEP 0",
        "SHUTDOWN NOSAVE",
        "REPLICAOF no one",
        "FUNCTION KILL",
        "SCRIPT KILL",
        "CLIENT PAUSE 1000",
        "LATENCY RESET",
        "MEMORY STATS",
        "SAVE",
    ] {
        let reply = client.line(refused).await;
        assert!(reply.starts_with("-NOPERM this user has no permissions to run the '"), "{refused}: {reply}");
    }
    assert_eq!(other.line("DBSIZE").await, ":3");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_others_are_just_names() {
    let house = House::start().await;
    let mut victim = house.client("hooli").await;
    victim.line("MSET secret SECRETVALUE w_1 SECRETVALUE w_2 1").await;
    victim.line("RPUSH list SECRETVALUE").await;
    let mut attacker = house.client("umbrella").await;
    attacker.line("RPUSH l 1 2").await;
    attacker.line("SET own 1").await;
    for line in [
        "KEYS *",
        "KEYS org:hooli:*",
        "KEYS ../org:hooli:*",
        "KEYS [a-z]*",
        "KEYS \\*",
        "SCAN 0 MATCH *hooli* COUNT 1000",
        "SCAN 0 MATCH [!x]* COUNT 1000",
        "SCAN 0 COUNT 1000 TYPE string",
        "SORT l BY org:hooli:w_* GET org:hooli:w_*",
        "SORT l BY w_* GET w_*",
        "SORT l BY ../w_* GET #",
        "SORT_RO l BY org:hooli:w_* GET org:hooli:w_*->f",
        "SORT org:hooli:list ALPHA",
        "OBJECT ENCODING org:hooli:secret",
        "OBJECT REFCOUNT org:hooli:secret",
        "OBJECT FREQ org:hooli:secret",
        "DUMP org:hooli:secret",
        "TYPE org:hooli:secret",
        "MEMORY USAGE org:hooli:secret",
        "PUBSUB CHANNELS *",
        "PUBSUB NUMPAT",
        "RANDOMKEY",
        "XREAD STREAMS org:hooli:list 0",
        "LCS org:hooli:secret own",
        "OBJECT HELP",
    ] {
        let reply = attacker.line(line).await;
        assert!(!reply.contains("SECRET") && !reply.contains("secret\""), "{line}: {reply}");
        if line.starts_with("OBJECT ENC") || line.starts_with("DUMP") || line.starts_with("MEMORY") {
            assert_eq!(reply, "(nil)", "{line}");
        }
    }
    // A prefix typed by hand is a part of the key's name.
    assert_eq!(attacker.line("SET org:hooli:secret mine").await, "+OK");
    assert_eq!(attacker.line("KEYS org:hooli:*").await, "[\"org:hooli:secret\"]");
    assert_eq!(attacker.line("SORT l BY nosort STORE org:hooli:list").await, ":2");
    assert_eq!(victim.line("LRANGE list 0 -1").await, "[\"SECRETVALUE\"]");
    assert_eq!(attacker.line("FLUSHALL").await, "+OK");
    assert_eq!(victim.line("GET secret").await, "\"SECRETVALUE\"");
    assert_eq!(victim.line("DBSIZE").await, ":4");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_typed_by_hand_are_commands() {
    let house = House::start().await;
    let mut client = Client::connect(house.port).await;
    let login = format!("AUTH app {}\r\n", house.token("acme"));
    for (line, expected) in [
        ("PING\r\n", "-NOAUTH Authentication required."),
        (&login, "+OK"),
        ("\r\n  \r\nset k 'a b'\r\n", "+OK"),
        ("GET k\n", "\"a b\""),
        ("SET \"k\\x41\\n\" \"\\\"\"\r\n", "+OK"),
        ("KEYS k?*\r\n", "[\"kA\\n\"]"),
        ("GET \"kA\\n\"\r\n", "\"\\\"\""),
        ("TTL k\r\n", ":3600"),
        ("NOSUCH x\r\n", "-ERR unknown command 'NOSUCH', with args beginning with: 'x'"),
        ("MULTI\r\n", "+OK"),
        ("INCR n\r\n", "+QUEUED"),
        ("EXEC\r\n", "[:1]"),
        ("SET k \"open\r\n", "-ERR Protocol error: unbalanced quotes in request"),
    ] {
        client.stream.write_all(line.as_bytes()).await.expect("sent");
        let reply = client.reply().await;
        let reply = if line.starts_with("TTL") && reply.starts_with(":35") { ":3600".to_owned() } else { reply };
        assert_eq!(reply, expected, "{line}");
    }
    assert_eq!(client.reply().await, "(closed)");
    // What a browser was made to send is answered with silence.
    for line in ["POST / HTTP/1.1\r\n", "Host: redis\r\n"] {
        let mut browser = Client::connect(house.port).await;
        browser.stream.write_all(format!("{line}\r\nSET k v\r\n").as_bytes()).await.expect("sent");
        assert_eq!(browser.reply().await, "(closed)");
    }
    // Script commands may come first, too.
    let mut client = house.client("acme").await;
    assert_eq!(client.run(&["SCRIPT", "LOAD", "return 7"]).await.len(), 42);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_tier_is_in_force_on_the_connections_that_are_there() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    let megabyte = "x".repeat(1 << 20);
    let fill = async |client: &mut Client, from: usize, to: usize| {
        for i in from..to {
            if client.run(&["SET", &format!("k{i}"), &megabyte]).await.starts_with("-OOM") {
                return i;
            }
        }
        to
    };
    let full = fill(&mut client, 0, 60).await;
    assert!((40..=50).contains(&full), "{full} MB of 50");
    let mut waiting = Vec::new();
    for n in 0..26 {
        let mut one = house.client("acme").await;
        one.send(&["BLPOP", "nothing", "0"]).await;
        if n == 25 {
            let reply = one.reply().await;
            assert!(reply.contains("(25 of 25 of tier FREE)"), "{reply}");
        } else {
            // The place is taken before the next asks for it.
            while house.admin().await.line("CLIENT LIST").await.matches("cmd=blpop").count() <= n {
                tokio::task::yield_now().await;
            }
        }
        waiting.push(one);
    }

    house.set_tier("acme", Tier::Starter, 2);
    assert!(client.line("INFO memory").await.contains("maxmemory:134217728"));
    assert_eq!(client.line("CONFIG GET maxclients").await, "[\"maxclients\" \"200\"]");
    assert_eq!(fill(&mut client, 60, 100).await, 100);
    let mut more = waiting.pop().expect("it was refused");
    assert_eq!(more.line("BLPOP nothing 0.01").await, "(nil*)");
    client.line("SET day v").await;
    let ttl = client.line("TTL day").await;
    assert!([":86400", ":86399"].contains(&ttl.as_str()), "{ttl}");

    // Smaller again: nothing is deleted, nothing grows, reads and deletions go on.
    house.set_tier("acme", Tier::Free, 3);
    assert!(client.run(&["SET", "one-more", &megabyte]).await.starts_with("-OOM "));
    assert_eq!(client.line("STRLEN k99").await, ":1048576");
    assert_eq!(client.line("DBSIZE").await, format!(":{}", full + 41));
    let ttl = client.line("TTL day").await;
    assert!(ttl.starts_with(":86"), "a life that was given stays: {ttl}");
    assert_eq!(client.line("EXPIRE day 99999").await, ":1");
    let ttl = client.line("TTL day").await;
    assert!([":3600", ":3599"].contains(&ttl.as_str()), "{ttl}");
    for i in 0..100 {
        client.run(&["DEL", &format!("k{i}")]).await;
    }
    assert_eq!(client.run(&["SET", "fits", &megabyte]).await, "+OK");
    waiting[0].stream.write_all(b"").await.expect("it is still there");
}
