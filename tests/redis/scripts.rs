//! Scripts: inside the namespace when they are honest, stopped by the server when they are not.

use super::support::{Client, House, Kind, kind};

async fn eval(client: &mut Client, script: &str, words: &[&str]) -> String {
    client.run(&[&["EVAL", script], words].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
pub async fn keys_that_a_script_builds_itself_are_the_tenants() {
    let house = House::start().await;
    for three in [false, true] {
        let mut client = if three { house.client3("umbrella").await } else { house.client("umbrella").await };
        client.line("FLUSHALL").await;
        assert_eq!(eval(&mut client, "return KEYS[1]", &["1", "a"]).await, "\"a\"");
        assert_eq!(
            eval(&mut client, "return {#ARGV,ARGV[1],ARGV[2]}", &["0", "x"]).await.replace('_', "(nil)"),
            "[:1 \"x\"]"
        );
        assert_eq!(
            eval(
                &mut client,
                "redis.call('SET',KEYS[1]..':'..ARGV[1],7) return redis.call('GET','a:b')",
                &["1", "a", "b"]
            )
            .await,
            "\"7\""
        );
        assert_eq!(client.line("GET a:b").await, "\"7\"");
        for (script, expected) in [
            ("return redis.call('MSET','m1',1,'m2',2)", "+OK"),
            ("return redis.call('MGET','m1','m2')", "[\"1\" \"2\"]"),
            ("return redis.call('KEYS','m1*')", "[\"m1\"]"),
            ("return redis.call('SCAN','0','MATCH','m2')[2]", "[\"m2\"]"),
            ("redis.call('RPUSH','l',1,2,3) return redis.call('LMPOP',1,'l','LEFT')", "[\"l\" [\"1\"]]"),
            ("return redis.call('RPOPLPUSH','l','l2')", "\"3\""),
            ("redis.call('ZADD','z',1,'a') return redis.call('ZUNIONSTORE','z2',1,'z')", ":1"),
            ("redis.call('XADD','s','1-1','f','v') return redis.call('XREAD','STREAMS','s',0)[1][1]", "\"s\""),
            ("return redis.call('XGROUP','CREATE','s','g','0')", "+OK"),
            ("return redis.call('OBJECT','ENCODING','m1')", "\"int\""),
            ("return redis.call('PUBLISH','c','x')", ":0"),
            ("return redis.call('DBSIZE') > 0 and redis.call('EXISTS',redis.call('RANDOMKEY'))", ":1"),
            (
                "return redis.pcall('LPUSH','m1','x').err",
                "\"WRONGTYPE Operation against a key holding the wrong kind of value\"",
            ),
            ("return redis.sha1hex('')", "\"da39a3ee5e6b4b0d3255bfef95601890afd80709\""),
            ("return loadstring('return redis.call(\"GET\",\"m1\")')()", "\"1\""),
            ("return cjson.encode({1,2})", "\"[1,2]\""),
        ] {
            // What would show the keys of everybody is refused by the server where they are in one database.
            if kind() != Kind::Own && ["'KEYS'", "'SCAN'", "'RANDOMKEY'"].iter().any(|name| script.contains(name)) {
                let reply = eval(&mut client, script, &["0"]).await;
                assert!(reply.starts_with("-ERR The user executing the script can't run this command"), "{reply}");
                continue;
            }
            assert_eq!(eval(&mut client, script, &["0"]).await, expected, "{script}");
        }
        let sha = client.run(&["SCRIPT", "LOAD", "return redis.call('GET',KEYS[1])"]).await;
        assert_eq!(
            sha,
            "\"4e6d8fc8bb01276962cce5371fa795a7763657ae\""
                .replace("4e6d8fc8bb01276962cce5371fa795a7763657ae", sha.trim_matches('"'))
        );
        let sha = sha.trim_matches('"').to_owned();
        assert_eq!(client.run(&["EVALSHA", &sha, "1", "m1"]).await, "\"1\"");
        assert_eq!(client.run(&["EVALSHA_RO", &sha, "1", "m1"]).await, "\"1\"");
        assert_eq!(client.run(&["SCRIPT", "EXISTS", &sha, &"0".repeat(40)]).await, "[:1 :0]");
        assert_eq!(client.line("SCRIPT FLUSH").await, "+OK");
        assert_eq!(client.run(&["EVALSHA", &sha, "1", "m1"]).await, "-NOSCRIPT No matching script. Please use EVAL.");
        assert_eq!(
            eval(&mut client, "return 1", &["9", "a"]).await,
            "-ERR Number of keys can't be greater than number of args"
        );
        assert_eq!(eval(&mut client, "return 1", &["-1"]).await, "-ERR Number of keys can't be negative");
        assert!(eval(&mut client, "return syntax error", &["0"]).await.starts_with("-ERR Error compiling script"));
        client.line("MULTI").await;
        client.run(&["EVAL", "return redis.call('INCR','n')", "0"]).await;
        client.run(&["EVAL", "return KEYS[1]", "1", "k"]).await;
        assert_eq!(client.line("EXEC").await, "[:1 \"k\"]");
    }
    if kind() == Kind::Cluster {
        return;
    }
    let mut admin = house.admin().await;
    admin.line("SELECT 1").await;
    let keys = admin.line(if kind() == Kind::Own { "KEYS *" } else { "KEYS org*" }).await;
    assert!(keys.split(' ').all(|key| key.trim_start_matches('[').starts_with("\"org:umbrella:")), "{keys}");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_script_that_reaches_for_others_is_stopped() {
    let house = House::start().await;
    let mut victim = house.client("hooli").await;
    victim.line("SET secret SECRETVALUE").await;
    let mut attacker = house.client("umbrella").await;
    attacker.line("SET own 1").await;
    for script in [
        "return redis.call('GET','org:hooli:secret')",
        "return _G.redis.call('GET','org:hooli:secret')",
        "return loadstring('return redis.call(\"GET\",\"org:hooli:secret\")')()",
        "return loadstring('return _G.redis.call(\"GET\",\"org:hooli:secret\")')()",
        "return load(function() return nil end)",
        "return loadstring('return 1 end end, (function() return redis')()",
        "return getmetatable(redis).__index.call('GET','org:hooli:secret')",
        "return getmetatable(_G).__index.redis.call('GET','org:hooli:secret')",
        "return rawget(_G,'redis').call('GET','org:hooli:secret')",
        "for k,v in pairs(_G) do if k=='redis' then return v.call('GET','org:hooli:secret') end end",
        "return coroutine.wrap(function() return redis.call('GET','org:hooli:secret') end)()",
        "return select(2,pcall(redis.call,'GET','org:hooli:secret'))",
        "redis.call('SELECT',1) return redis.call('DBSIZE')",
        "return redis.call('MOVE','own',1)",
        "return redis.call('COPY','own','own2','DB',1)",
        "return redis.call('SWAPDB',0,1)",
        "return redis.call('FLUSHALL')",
        "return redis.call('CONFIG','GET','*')",
        "return redis.call('ACL','LIST')",
        "return redis.call('PUBSUB','CHANNELS')",
        "return redis.call('INFO')",
        "return redis.call('CLIENT','LIST')",
        "return redis.call('SORT','own','BY','org:hooli:*')",
        "return redis.call('EVAL','return 1',0)",
        "return redis.call('FUNCTION','LIST')",
        "return redis.call('SCRIPT','FLUSH')",
        "return redis.call('DEBUG','OBJECT','secret')",
        "return redis.call('MIGRATE','127.0.0.1',1,'secret',0,1)",
        "return redis.call('RESET')",
        "return redis.call('AUTH','x')",
        "return redis.call('KEYS','*')",
        "return redis.call('SCAN',0)",
        "redis = nil return 1",
    ] {
        let reply = eval(&mut attacker, script, &["0"]).await;
        assert!(!reply.contains("SECRETVALUE") && !reply.contains("hooli"), "{script}: {reply}");
        assert!(!reply.starts_with("+OK"), "{script}: {reply}");
    }
    // The server itself would stop it, were there no prelude: as the tenant's own user.
    let mut direct = Client::connect(house.redis.port).await;
    let password =
        super::support::names().password("redis", &dynabase::tenant::OrgId::parse("umbrella").expect("id"), 1);
    assert_eq!(direct.run(&["AUTH", "org_umbrella", password.expose()]).await, "+OK");
    for line in [
        "GET org:hooli:secret",
        "EVAL return(redis.call('GET','org:hooli:secret')) 0",
        "SELECT 0",
        "FLUSHALL",
        "MOVE org:umbrella:own 3",
        "COPY org:umbrella:own org:umbrella:x DB 3",
        "PUBSUB CHANNELS",
        "SUBSCRIBE org:hooli:x",
        "PSUBSCRIBE *",
        "PUBLISH org:hooli:x y",
        "CONFIG GET *",
        "CLIENT LIST",
        "ACL LIST",
        "FUNCTION LIST",
        "SCRIPT FLUSH",
        "INFO",
        "MONITOR",
        "DEBUG SLEEP 0",
        "SHUTDOWN",
        "SWAPDB 0 1",
        "SORT org:umbrella:l BY org:hooli:*",
        "RENAME org:umbrella:own org:hooli:own",
        "CLIENT TRACKING ON BCAST",
        "SAVE",
        "MEMORY STATS",
    ]
    .into_iter()
    .chain(["KEYS *", "SCAN 0", "DBSIZE", "RANDOMKEY", "FLUSHDB"].into_iter().filter(|_| kind() == Kind::One))
    {
        let reply = direct.line(line).await;
        assert!(reply.starts_with('-'), "{line}: {reply}");
    }
    assert_eq!(victim.line("GET secret").await, "\"SECRETVALUE\"");
    assert_eq!(victim.line("DBSIZE").await, ":1");
}
