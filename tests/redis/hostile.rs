//! What a tenant can make a server say, and what a server can be made to do: words of a script that look like the
//! cluster's own, values that are no errors, scripts that never end, payloads that are not what they say.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dynabase::{upstream::redis::Via, wire::resp};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::support::{Client, House, Kind, PLATFORM, Redis, on, target};

async fn eval(client: &mut Client, script: &str, words: &[&str]) -> String {
    client.run(&[&["EVAL", script], words].concat()).await
}

/// A listener that nobody has a reason to call: how many did.
async fn rogue() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            held.push(stream);
        }
    });
    (port, calls)
}

/// A node between the front and a real one that answers `GET` with these words and passes everything else.
async fn liar(real: u16, words: impl Fn(u16) -> String + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let words: Arc<dyn Fn(u16) -> String + Send + Sync> = Arc::new(words);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let words = Arc::clone(&words);
            tokio::spawn(async move {
                let mut far = Client::connect(real).await;
                let mut buffer = Vec::new();
                loop {
                    let mut request = resp::Request::default();
                    match request.advance(&buffer, resp::ARGS_MAX, resp::BULK_MAX).expect("a request") {
                        resp::Progress::Complete(len) => {
                            let bytes: Vec<u8> = buffer.drain(..len).collect();
                            let words_of: Vec<&[u8]> = request.args.iter().map(|arg| arg.of(&bytes)).collect();
                            let reply = match words_of[0].to_ascii_uppercase().as_slice() {
                                b"GET" => words(port).into_bytes(),
                                // The whole cluster is this one.
                                b"CLUSTER" if words_of[1].eq_ignore_ascii_case(b"SLOTS") => format!(
                                    "*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:{port}\r\n$1\r\na\r\n"
                                )
                                .into_bytes(),
                                _ => {
                                    far.send_raw(&words_of).await;
                                    match far.frame().await {
                                        Some(frame) => frame,
                                        None => return,
                                    }
                                }
                            };
                            if near.write_all(&reply).await.is_err() {
                                return;
                            }
                        }
                        _ => match near.read_buf(&mut buffer).await {
                            Ok(n) if n > 0 => {}
                            _ => return,
                        },
                    }
                }
            });
        }
    });
    port
}

fn slot_of(org: &str) -> u16 {
    dynabase::upstream::redis::nodes::slot(format!("{{org:{org}}}:k").as_bytes())
}

/// Whatever a reply says, nobody is called, let alone told the platform's password, whom the cluster doesn't name.
#[tokio::test(flavor = "multi_thread")]
async fn no_address_out_of_a_reply_is_called() {
    let slot = slot_of("umbrella");
    for word in ["MOVED", "ASK"] {
        let (evil, calls) = rogue().await;
        let redis = Redis::start(PLATFORM).await;
        let port = liar(redis.port, move |_| format!("-{word} {slot} 127.0.0.1:{evil}\r\n")).await;
        let mut target = target(port);
        target.via = Via::Cluster;
        let house = House::before(redis, target, None, include_str!("../../config/tiers.toml")).await;
        let mut client = house.client("umbrella").await;
        assert_eq!(client.line("SET k v").await, "+OK");
        for _ in 0..3 {
            let reply = client.line("GET k").await;
            assert!(reply.starts_with("-ERR upstream connection lost"), "{word}: {reply}");
        }
        // On a connection of the client's own, too.
        assert_eq!(client.line("WATCH k").await, "+OK");
        assert_eq!(client.line("GET k").await, "(closed)", "{word}");
        let mut other = house.client("umbrella").await;
        assert_eq!(other.line("SET k w").await, "+OK", "{word}: the server serves on");
        assert_eq!(calls.load(Ordering::SeqCst), 0, "{word}");
    }
}

/// The same words about a slot that nobody asked about are a tenant's text.
#[tokio::test(flavor = "multi_thread")]
async fn words_about_another_slot_are_passed_as_text() {
    let slot = slot_of("umbrella").wrapping_add(1) % 16_384;
    let redis = Redis::start(PLATFORM).await;
    let port = liar(redis.port, move |_| format!("-MOVED {slot} 127.0.0.1:1\r\n")).await;
    let mut target = target(port);
    target.via = Via::Cluster;
    let house = House::before(redis, target, None, include_str!("../../config/tiers.toml")).await;
    let mut client = house.client("umbrella").await;
    assert_eq!(client.line("GET k").await, format!("-MOVED {slot} 127.0.0.1:1"));
    assert_eq!(client.line("SET k v").await, "+OK");
}

/// What ends a plain Redis 7.0, one way or another, and what comes of it here.
const DEADLY: [(&str, &str); 20] = [
    ("error({})", "-ERR the script raised a value that is no text"),
    ("error({err={}})", "-ERR the script raised a value that is no text"),
    ("error({err=true})", "-ERR the script raised a value that is no text"),
    (
        "error(setmetatable({},{__tostring=function() return 'z' end}))",
        "-ERR the script raised a value that is no text",
    ),
    ("error(setmetatable({},{__index=function() return {} end}))", "-ERR the script raised a value that is no text"),
    (
        "error(setmetatable({},{__index=function() error({err={}}) end}))",
        "-ERR the script raised a value that is no text",
    ),
    ("error(setmetatable({err='x'},{__index=function() error('y') end}))", "-x"),
    ("coroutine.wrap(function() error({err={}}) end)()", "-ERR the script raised a value that is no text"),
    (
        "coroutine.wrap(function() coroutine.wrap(function() error({}) end)() end)()",
        "-ERR the script raised a value that is no text",
    ),
    ("error(function() end)", "-ERR the script raised a value that is no text"),
    ("return setmetatable({err='x'},{__index=function() error('y') end})", "-x"),
    ("return {setmetatable({err='x'},{__index=function() error('y') end})}", "[-x]"),
    ("return setmetatable({1,2},{__index=function(t,k) return k end})", "[:1 :2]"),
    ("local t={} t[1]=t t[2]=t return t", "-ERR reached lua stack limit"),
    ("local t={} for i=1,60 do t={t,t} end return t", "-ERR the reply of the script is too large"),
    (
        "local s,t=string.rep('x',1e6),{} for i=1,1000 do t[i]=s end return t",
        "-ERR the reply of the script is too large",
    ),
    // Words that a client, or we, would take for the server's own.
    ("error(setmetatable({err='MOVED 1 127.0.0.1:1'},{__newindex=function() end}))", "-ERR MOVED 1 127.0.0.1:1"),
    ("return {err='ASK 1 127.0.0.1:1'}", "-ERR ASK 1 127.0.0.1:1"),
    ("return redis.error_reply('READONLY x')", "-ERR READONLY x"),
    ("error({err='NOSCRIPT x'})", "-ERR NOSCRIPT x"),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_value_of_a_script_ends_the_server() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    for (script, expected) in DEADLY {
        let reply = eval(&mut client, script, &["0"]).await;
        let reply = reply.split(" script: ").next().unwrap_or_default();
        assert_eq!(reply, expected, "{script}");
        assert_eq!(other.line("SET k v").await, "+OK", "{script}");
    }
    assert!(!house.admin().await.line("INFO server").await.contains("redis_version:0"), "it is the same server");
}

#[test]
fn no_value_of_a_script_ends_a_server_of_one_database() {
    on(Kind::One, no_value_of_a_script_ends_the_server);
}

/// Ordinary errors are to the letter those of a plain server, up to the name of the script.
#[tokio::test(flavor = "multi_thread")]
async fn ordinary_errors_are_a_plain_servers() {
    let house = House::start().await;
    let plain = Redis::start("").await;
    let mut through = house.client("umbrella").await;
    let mut direct = Client::connect(plain.port).await;
    for client in [&mut through, &mut direct] {
        client.line("SET s 1").await;
    }
    for script in [
        "error('x')",
        "error('x',0)",
        "error('x',2)",
        "\n\nerror('x')",
        "error(5)",
        "error(true)",
        "error()",
        "error({err='MY x'})",
        "error({err='x'})",
        "error(redis.error_reply('A b'))",
        "return redis.error_reply('A b')",
        "return redis.error_reply('x')",
        "return redis.call('nope')",
        "return redis.call('LPUSH','s','x')",
        "return redis.pcall('LPUSH','s','x')",
        "return redis.call('GET')",
        "redis.call()",
        "redis.call({})",
        "local x=nil return x.y",
        "return x",
        "x=1",
        "assert(false,'z')",
        "assert(false)",
        "local ok,e=pcall(redis.call,'nope') return e",
        "local ok,e=pcall(redis.call,'nope') error(e)",
        "coroutine.wrap(function() error('q') end)()",
        "coroutine.yield(1)",
        "return {1,{2,'a'},false,nil,3}",
        "return nil",
        "return true",
        "return 3.7",
        "return {ok='fine'}",
        "return 1,2",
        "return select('#',...)",
        "for i=1,1e6 do end return 1",
    ] {
        let [mine, theirs] = [eval(&mut through, script, &["0"]).await, eval(&mut direct, script, &["0"]).await];
        let [mine, theirs] = [&mine, &theirs].map(|reply| reply.split(" script: ").next());
        assert_eq!(mine, theirs, "{script}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_script_ends() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    for script in [
        "while true do end",
        "repeat until false",
        "for i=1,1e12 do end",
        "local function f() return f() end return f()",
        "while true do pcall(function() while true do end end) end",
        "while true do xpcall(function() error('x') end,function() while true do end end) end",
        "coroutine.wrap(function() while true do end end)()",
        "while true do redis.call('GET','x') end",
        "ARGV[1]=loadstring('return ARGV[1]()') return ARGV[1]()",
        "ARGV[1]=_G.loadstring('return ARGV[1]()') return ARGV[1]()",
        "_G.loadstring=nil return _G.loadstring('while true do end')()",
        "return loadstring('while true do end')()",
        "return load('local function f() return f() end f()')()",
        "local t=setmetatable({},{__index=function(t,k) return t[k+1] end}) return pcall(function() return t[1] end)",
    ] {
        let begun = std::time::Instant::now();
        let reply = eval(&mut client, script, &["0"]).await;
        let ended = ["-ERR Script killed: it ran for too long", "-ERR user_script:1: attempt to call", "(nil)", ":1"];
        assert!(ended.iter().any(|text| reply.starts_with(text)), "{script}: {reply}");
        assert_eq!(other.line("GET k").await, "(nil)", "{script}");
        assert!(begun.elapsed() < Duration::from_secs(9), "{script}: {:?}", begun.elapsed());
    }
    // A hundred thousand turns are nothing.
    assert_eq!(eval(&mut client, "local n=0 for i=1,1e5 do n=n+i end return n", &["0"]).await, ":5000050000");
}

/// What can't be counted is ended from outside once the server says that it is busy.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_server_is_told_to_end_the_script() {
    let house = House::start().await;
    assert_eq!(house.admin().await.line("CONFIG SET busy-reply-threshold 100").await, "+OK");
    let mut client = house.client("umbrella").await;
    assert_eq!(eval(&mut client, "return 1", &["0"]).await, ":1");
    // Let the one who looks have its connection.
    let mut admin = house.admin().await;
    while !admin.line("CLIENT LIST").await.contains("cmd=ping") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let script = "for i=1,3e6 do local s=string.rep('x',8e3) end return 1";
    let begun = std::time::Instant::now();
    client.send(&["EVAL", script, "0"]).await;
    let reply = client.reply().await;
    assert!(reply.contains("Script killed by user"), "{reply}");
    assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
    assert_eq!(house.client("hooli").await.line("SET k v").await, "+OK");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_script_leaves_its_wrapper_or_forges_its_account() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    for (script, expected) in [
        ("return 1 end do return {-5000,'x'} end local function z()", "'<eof>' expected near 'end'"),
        ("end do return {-5000,'x'} end local function z()", "'<eof>' expected near 'end'"),
        ("dynabase_made=function() return -5000 end return 1", "names that begin with 'dynabase_' are reserved"),
        ("return dynabase_end(function() end)", "names that begin with 'dynabase_' are reserved"),
        ("return 1 --[[", "unfinished long comment near '<eof>'"),
        ("if x then", "'end' expected near '<eof>'"),
    ] {
        let expected = format!("-ERR Error compiling script (new function): user_script:1: {expected}");
        assert_eq!(eval(&mut client, script, &["0"]).await, expected, "{script}");
        assert_eq!(client.run(&["SCRIPT", "LOAD", script]).await, expected, "{script}");
    }
    for script in ["return 'end'", "--end\nreturn 'end'", "return [[end]]"] {
        assert_eq!(eval(&mut client, script, &["0"]).await, "\"end\"", "{script}");
    }
    // What the server is asked beside keys.
    for script in [
        "return redis.log(redis.LOG_WARNING,'x')",
        "return redis.set_repl(redis.REPL_NONE)",
        "return redis.breakpoint()",
        "return collectgarbage('stop')==0 and false",
        "redis.call=nil return redis.call",
    ] {
        assert_eq!(eval(&mut client, script, &["0"]).await, "(nil)", "{script}");
    }
    // Options that end at a zero byte, as the server reads them.
    client.line("RPUSH l 3 1").await;
    client.line("GEOADD g 1 1 m").await;
    for script in [
        "return redis.call('SORT','l','STORE\\0','dst')",
        "return redis.call('SORT','l','STORE\\0x','org:acme:dst')",
        "return redis.call('GEORADIUS','g',1,1,10,'m','STORE\\0','dst')",
    ] {
        eval(&mut client, script, &["0"]).await;
        let ttl = client.line("TTL dst").await;
        assert!(ttl.starts_with(":3") || ttl == ":-2", "{script}: {ttl}");
        client.line("DEL dst").await;
    }
    client.send_raw(&[b"SORT", b"l", b"STORE\0", b"dst"]).await;
    assert_eq!(client.reply().await, ":2");
    assert!(client.line("TTL dst").await.starts_with(":3"));
}

#[test]
fn no_script_leaves_its_wrapper_in_one_database() {
    on(Kind::One, no_script_leaves_its_wrapper_or_forges_its_account);
}

/// A payload that says more than it holds.
fn corrupt(dump: &[u8]) -> Vec<u8> {
    let mut bytes = dump[..dump.len() - 8].to_vec();
    let at = memchr::memmem::find(&bytes, b"\x85field").expect("a listpack");
    bytes[at] = 0xbf;
    let mut crc: u64 = 0;
    for byte in &bytes {
        crc ^= u64::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { (crc >> 1) ^ 0x95ac_9329_ac4b_c9b5 };
        }
    }
    bytes.extend(crc.to_le_bytes());
    bytes
}

async fn dump(client: &mut Client) -> Vec<u8> {
    client.line("HSET hh field value").await;
    client.send(&["DUMP", "hh"]).await;
    let frame = client.frame().await.expect("a reply");
    match (resp::Cursor { rest: &frame }).item() {
        Some(resp::Item::Bulk(bytes)) => bytes.to_vec(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_made_up_payload_ends_nothing() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let good = dump(&mut client).await;
    client.send_raw(&[b"RESTORE", b"bad", b"0", &corrupt(&good)]).await;
    assert_eq!(client.reply().await, "-ERR Bad data format");
    let script = b"return redis.pcall('RESTORE','bad',0,ARGV[1])";
    client.send_raw(&[b"EVAL", script, b"0", &corrupt(&good)]).await;
    assert_eq!(client.reply().await, "-ERR Bad data format");
    client.send_raw(&[b"RESTORE", b"good", b"0", &good]).await;
    assert_eq!(client.reply().await, "+OK");
    assert_eq!(client.line("HGETALL good").await, "[\"field\" \"value\"]");
    assert_eq!(client.line("EXISTS bad").await, ":0");
}

/// Where the server would believe it, nobody gets to try.
#[tokio::test(flavor = "multi_thread")]
async fn restore_is_refused_where_payloads_are_believed() {
    let options = ["--databases", "64", "--requirepass", PLATFORM, "--sanitize-dump-payload", "no"];
    let redis = Redis::with(tempfile::tempdir().expect("a folder"), super::support::free_port(), &options).await;
    let target = target(redis.port);
    let house = House::before(redis, target, None, include_str!("../../config/tiers.toml")).await;
    let mut client = house.client("umbrella").await;
    let good = dump(&mut client).await;
    for payload in [&good, &corrupt(&good)] {
        client.send_raw(&[b"RESTORE", b"bad", b"0", payload]).await;
        let reply = client.reply().await;
        assert!(reply.starts_with("-NOPERM RESTORE needs a server that looks into payloads"), "{reply}");
        client.send_raw(&[b"EVAL", b"return redis.call('RESTORE','bad',0,ARGV[1])", b"0", payload]).await;
        let reply = client.reply().await;
        assert!(reply.starts_with("-ERR The user executing the script can't run this command"), "{reply}");
    }
    assert_eq!(client.line("EXISTS bad").await, ":0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_makes_no_more_than_the_tiers_memory() {
    for script in [
        "for i=1,3 do redis.call('SETRANGE','k'..i,100000000,'x') end",
        "for i=1,9 do redis.call('SETBIT','k'..i,160000000,1) end",
        "for i=1,9 do redis.call('BITFIELD','k'..i,'SET','u8','#20000000','1') end",
        "redis.call('BITFIELD','k','GET','u8',0,'SET','i64','#20000000','1')",
        "for i=1,200 do redis.call('APPEND','k',string.rep('x',1000000)) end",
        "for i=1,200 do redis.call('SUNIONSTORE','k'..i,'a') end",
        "for i=1,200 do pcall(redis.call,'SETRANGE','k'..i,10000000,'x') end return redis.call('SETRANGE','k',9e7,'v')",
    ] {
        let house = House::start().await;
        let mut client = house.client("acme").await;
        assert!(client.line("BITFIELD bf SET u8 #200000000 1").await.starts_with("-OOM "));
        assert!(client.line("BITFIELD bf SET u8 #99999999999 1").await.starts_with("-OOM "));
        assert_eq!(client.run(&["SADD", "a", &"x".repeat(1 << 20)]).await, ":1");
        let reply = eval(&mut client, script, &["0"]).await;
        assert!(reply.starts_with("-OOM "), "{script}: {reply}");
        let told = house.admin().await.line("INFO memory").await;
        let used = told.split("used_memory:").nth(1).and_then(|rest| rest.split('\\').next()).expect("it is told");
        assert!(used.parse::<u64>().expect("a number") < 100 << 20, "{script}: {used}");
        assert_eq!(client.line("DEL k").await.chars().next(), Some(':'), "deleting goes on");
    }
    // Many stores over one key hold no more than one; offsets that are no numbers are not counted backwards.
    let house = House::start().await;
    let mut client = house.client("acme").await;
    client.run(&["SADD", "a", &"x".repeat(1 << 20)]).await;
    assert_eq!(eval(&mut client, "for i=1,100 do redis.call('SUNIONSTORE','b','a') end return 1", &["0"]).await, ":1");
    for offset in ["nan", "-5", "-1e18"] {
        let script = format!("redis.pcall('SETRANGE','k','{offset}','x') redis.call('SETRANGE','k',100000000,'x')");
        assert!(eval(&mut client, &script, &["0"]).await.starts_with("-OOM "), "{offset}");
    }
}

/// Small elements first, so that a sample would see nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn large_elements_behind_small_ones_are_weighed() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    for _ in 0..6 {
        client.run(&["RPUSH", "l", &"a".repeat(8100)]).await;
    }
    let large = "b".repeat(2 << 20);
    let mut stored = 0;
    for _ in 0..60 {
        let reply = client.run(&["RPUSH", "l", &large]).await;
        if reply.starts_with("-OOM ") {
            break;
        }
        stored += 1;
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    assert!((15..=26).contains(&stored), "{stored} times 2 MB of 50 MB were stored");
}

/// A server with the limit that `dynabase doctor` asks for is filled by nobody.
#[tokio::test(flavor = "multi_thread")]
async fn large_replies_asked_for_many_times_fill_no_server() {
    let limit = ["--client-output-buffer-limit", "normal", "64mb", "0", "0"];
    let options = [&["--databases", "64", "--requirepass", PLATFORM][..], &limit].concat();
    let redis = Redis::with(tempfile::tempdir().expect("a folder"), super::support::free_port(), &options).await;
    let target = target(redis.port);
    let house = House::before(redis, target, None, include_str!("../../config/tiers.toml")).await;
    let mut other = house.client("hooli").await;
    assert_eq!(other.line("SET k v").await, "+OK");
    let value = "x".repeat(10 << 20);
    for request in [["MGET"].into_iter().chain(["k"; 200]).collect::<Vec<_>>(), vec!["GET", "k"]] {
        let mut client = house.client("acme").await;
        assert_eq!(client.run(&["SET", "k", &value]).await, "+OK");
        for _ in 0..if request.len() > 2 { 1 } else { 200 } {
            client.send(&request).await;
        }
        // Up to the end of the connection, or an error for each.
        for _ in 0..200 {
            if client.frame().await.is_none() {
                break;
            }
        }
        assert_eq!(other.line("GET k").await, "\"v\"", "another tenant is served");
    }
    let told = house.admin().await.line("INFO memory").await;
    let peak = told.split("used_memory_peak:").nth(1).and_then(|rest| rest.split('\\').next()).expect("it is told");
    assert!(peak.parse::<u64>().expect("a number") < 400 << 20, "{peak}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_kept_have_a_size() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    assert_eq!(client.run(&["CLIENT", "SETNAME", &"n".repeat(1024)]).await, "+OK");
    assert!(client.run(&["CLIENT", "SETNAME", &"n".repeat(1025)]).await.starts_with("-ERR Client names"));
    let long = "k".repeat(200 << 10);
    let mut replies = Vec::new();
    for i in 0..8 {
        replies.push(client.run(&["WATCH", &format!("{long}{i}")]).await);
    }
    assert_eq!(replies[..5], ["+OK"; 5]);
    assert_eq!(replies[5..], ["-ERR too many watched keys"; 3]);
    assert_eq!(client.line("UNWATCH").await, "+OK");
    assert_eq!(client.run(&["WATCH", &long]).await, "+OK");
    let mut listener = house.client3("umbrella").await;
    let mut replies = Vec::new();
    for i in 0..8 {
        replies.push(listener.run(&["SUBSCRIBE", &format!("{long}{i}")]).await);
    }
    assert!(replies[..5].iter().all(|reply| reply.starts_with('>')), "the first fit");
    assert_eq!(replies[5..], ["-ERR too many subscriptions"; 3]);
    // A HELLO that fails changes nothing: not the tenant either.
    client.line("UNWATCH").await;
    let token = house.token("hooli");
    let reply = client.run(&["HELLO", "3", "AUTH", "app", &token, "SETNAME", "bad name"]).await;
    assert!(reply.starts_with("-ERR Client names"), "{reply}");
    client.line("SET mine 1").await;
    assert_eq!(house.client("hooli").await.line("EXISTS mine").await, ":0");
    assert_eq!(house.client("umbrella").await.line("EXISTS mine").await, ":1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_can_be_loaded_first_and_scripts_have_a_size_together() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let sha = "\"e0e1f9fabfc9d4800c877a703b823ac0578ff8db\"";
    assert_eq!(client.run(&["SCRIPT", "LOAD", "return 1"]).await, sha);
    assert_eq!(client.run(&["EVALSHA", sha.trim_matches('"'), "0"]).await, ":1");
    let long = "x".repeat(1_000_000);
    let mut stored = 0;
    while client.run(&["EVAL", &format!("return {stored} --{long}"), "0"]).await == format!(":{stored}") {
        stored += 1;
        assert!(stored < 20, "eight megabytes are enough");
    }
    assert_eq!(stored, 8);
    assert!(client.line("EVAL return(99) 0").await.starts_with(':'), "a small one fits");
    assert_eq!(client.line("SCRIPT FLUSH").await, "+OK");
    assert_eq!(client.run(&["EVAL", &format!("return 7 --{long}"), "0"]).await, ":7");
}

/// The server forgets no script by itself: its cache is emptied once much was sent there, and nobody notices.
#[tokio::test(flavor = "multi_thread")]
async fn the_servers_cache_of_scripts_is_emptied() {
    let house = House::start().await;
    let mut other = house.client("hooli").await;
    let sha = other.run(&["SCRIPT", "LOAD", "return redis.call('INCR','n')"]).await;
    let sha = sha.trim_matches('"').to_owned();
    let mut called = 0;
    let mut client = house.client("umbrella").await;
    let long = "x".repeat(1_000_000);
    for i in 0..280 {
        // Its own account is small, and is emptied by a command that does not reach the server.
        if i % 8 == 0 {
            assert_eq!(client.line("SCRIPT FLUSH").await, "+OK");
            // From then on it may be emptied just now.
            if i < 240 {
                called += 1;
                assert_eq!(other.run(&["EVALSHA", &sha, "0"]).await, format!(":{called}"));
            }
        }
        assert_eq!(client.run(&["EVAL", &format!("return {i} --{long}"), "0"]).await, format!(":{i}"));
    }
    let mut admin = house.admin().await;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let told = admin.line("INFO memory").await;
        let cached = told.split("number_of_cached_scripts:").nth(1).and_then(|rest| rest.split('\\').next());
        if cached.and_then(|text| text.parse::<u32>().ok()).expect("it is told") < 250 {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{cached:?} scripts");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // One call may have been on its way.
    let reply = other.run(&["EVALSHA", &sha, "0"]).await;
    assert!(reply == format!(":{}", called + 1) || reply.starts_with("-NOSCRIPT"), "{reply}");
    assert!(other.run(&["EVALSHA", &sha, "0"]).await.starts_with(':'));
}
