//! Values too large to be held: they pass in pieces, delay nobody, and leave nothing half done.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::support::{Client, House};

const MB: usize = 1 << 20;

/// The bytes of a value at a place: no two pieces of it look alike.
fn pattern(at: usize, into: &mut [u8]) {
    for (i, byte) in into.iter_mut().enumerate() {
        let at = (at + i) as u64;
        *byte = ((at >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> ((at & 7) * 8)) as u8;
    }
}

fn value(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pattern(0, &mut bytes);
    bytes
}

/// Memory of this process in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<usize>().ok()).expect("a number") << 10
}

/// How much it grew at most since the start.
struct Growth {
    start: usize,
    most: usize,
}

impl Growth {
    fn new() -> Self {
        Self { start: resident(), most: 0 }
    }

    fn look(&mut self) {
        self.most = self.most.max(resident().saturating_sub(self.start));
    }
}

/// Writes a value's bytes from one place to another.
async fn write(stream: &mut TcpStream, from: usize, to: usize, growth: &mut Growth) {
    let mut piece = vec![0; 64 << 10];
    let mut at = from;
    while at < to {
        let len = piece.len().min(to - at);
        pattern(at, &mut piece[..len]);
        stream.write_all(&piece[..len]).await.expect("it is read");
        at += len;
        if at.is_multiple_of(4 * MB) {
            growth.look();
        }
    }
}

/// Reads `$len`, the value and CRLF, and compares every byte.
async fn read(stream: &mut TcpStream, len: usize, growth: &mut Growth) {
    let head = format!("${len}\r\n");
    let mut got = vec![0; head.len()];
    stream.read_exact(&mut got).await.expect("a header");
    assert_eq!(String::from_utf8_lossy(&got), head);
    let (mut piece, mut expected) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut at = 0;
    while at < len {
        let part = piece.len().min(len - at);
        stream.read_exact(&mut piece[..part]).await.expect("the value");
        pattern(at, &mut expected[..part]);
        assert!(piece[..part] == expected[..part], "at {at}");
        at += part;
        if at.is_multiple_of(4 * MB) {
            growth.look();
        }
    }
    let mut end = [0; 2];
    stream.read_exact(&mut end).await.expect("a line end");
    assert_eq!(&end, b"\r\n");
}

/// The life of a key, where it was just given one.
async fn life(client: &mut Client, key: &str) -> &'static str {
    match client.run(&["TTL", key]).await.trim_start_matches(':').parse::<i64>().expect("a number") {
        -1 => "no end",
        3400..=3600 => "the tier's",
        _ => "another",
    }
}

/// A client that keeps asking until told to stop; gives how often it was answered.
fn busy(mut client: Client) -> (Arc<AtomicUsize>, Arc<AtomicBool>, tokio::task::JoinHandle<Client>) {
    let (count, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (counted, stopped) = (Arc::clone(&count), Arc::clone(&stop));
    let task = tokio::spawn(async move {
        assert_eq!(client.line("SET small v").await, "+OK");
        while !stopped.load(Ordering::Relaxed) {
            assert_eq!(client.line("GET small").await, "\"v\"");
            counted.fetch_add(1, Ordering::Relaxed);
        }
        client
    });
    (count, stop, task)
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_value_of_hundreds_of_megabytes_passes_in_pieces_while_others_are_answered() {
    const LEN: usize = 260 * MB + 4711;
    let house = House::start().await;
    // With a life, which is sent around the command, and without; in both protocols.
    for (org, three) in [("umbrella", true), ("initech", false)] {
        let mut client = if three { house.client3(org).await } else { house.client(org).await };
        let (count, stop, task) = busy(house.client(org).await);
        let mut growth = Growth::new();
        client.stream.write_all(format!("*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n${LEN}\r\n").as_bytes()).await.expect("sent");
        let before = count.load(Ordering::Relaxed);
        write(&mut client.stream, 0, LEN, &mut growth).await;
        // What follows in the same pipeline keeps its place.
        client.stream.write_all(b"\r\n*2\r\n$6\r\nSTRLEN\r\n$3\r\nbig\r\n").await.expect("sent");
        assert_eq!(client.reply().await, "+OK");
        assert_eq!(client.reply().await, format!(":{LEN}"));
        let between = count.load(Ordering::Relaxed);
        client.send(&["GET", "big"]).await;
        read(&mut client.stream, LEN, &mut growth).await;
        let after = count.load(Ordering::Relaxed);
        assert!(between - before > 20 && after - between > 20, "{before} {between} {after}");
        assert!(growth.most < 64 * MB, "{} MB more", growth.most / MB);
        stop.store(true, Ordering::Relaxed);
        let mut other = task.await.expect("it was answered");
        let ttl = client.line("TTL big").await;
        assert_eq!(ttl == ":-1", org == "umbrella", "{ttl}");
        assert_eq!(other.line("UNLINK big").await, ":1");
        assert_eq!(client.line("GET small").await, "\"v\"");
    }
}

#[tokio::test(flavor = "multi_thread")]
pub async fn every_form_with_its_key_in_front_passes_and_keeps_its_meaning() {
    let house = House::start().await;
    let text = value(2 * MB);
    let text: &[u8] = &text;
    for org in ["initech", "umbrella"] {
        let mut client = house.client(org).await;
        let shown = |bytes: &[u8]| format!("\"{}\"", bytes.escape_ascii());
        for (words, expected) in [
            (&[&b"SET"[..], b"a", text][..], "+OK".to_owned()),
            (&[b"APPEND", b"a", text], format!(":{}", 4 * MB)),
            (&[b"SET", b"b", text, b"NX", b"EX", b"9999999"], "+OK".to_owned()),
            (&[b"SET", b"b", text, b"NX"], "(nil)".to_owned()),
            (&[b"SET", b"b", b"short", b"GET"], shown(text)),
            (&[b"SETEX", b"c", b"100", text], "+OK".to_owned()),
            (&[b"SETNX", b"c", text], ":0".to_owned()),
            (&[b"HSET", b"h", b"f", text, b"g", text, b"last", b"1"], ":3".to_owned()),
            (&[b"HGET", b"h", b"g"], shown(text)),
            (&[b"HGET", b"h", b"last"], "\"1\"".to_owned()),
            (&[b"RPUSH", b"l", text, b"x"], ":2".to_owned()),
            (&[b"LINDEX", b"l", b"0"], shown(text)),
            (&[b"SADD", b"s", text], ":1".to_owned()),
            (&[b"SISMEMBER", b"s", text], ":1".to_owned()),
            (&[b"XADD", b"x", b"1-1", b"f", text], "\"1-1\"".to_owned()),
            (&[b"SETRANGE", b"r", b"5", text], format!(":{}", 2 * MB + 5)),
            (&[b"GETSET", b"c", text], shown(text)),
            (&[b"PFADD", b"p", text], ":1".to_owned()),
            (&[b"SET", b"a", text, b"NOPE"], "-ERR syntax error".to_owned()),
            (&[b"LPUSH", b"a", text], "-WRONGTYPE Operation against a key holding the wrong kind of value".to_owned()),
            (&[b"PUBLISH", b"nobody", text], ":0".to_owned()),
            (&[b"MSET", b"m", text, b"n", text], "+OK".to_owned()),
            (&[b"EVAL", b"return #ARGV[1]", b"1", b"a", text], format!(":{}", 2 * MB)),
        ] {
            client.send_raw(words).await;
            let reply = client.reply().await;
            assert!(reply == expected, "{}: {:.100}", String::from_utf8_lossy(words[0]), reply);
        }
        for key in ["a", "b", "h", "l", "s", "x", "r", "p", "m"] {
            let ttl: i64 = client.run(&["TTL", key]).await.trim_start_matches(':').parse().expect("a number");
            let longest = 7 * 24 * 3600;
            assert!(if org == "initech" { (1..=longest).contains(&ttl) } else { ttl != -2 }, "{key}: {ttl}");
        }
        // To a subscriber too, and in a transaction, which is held here.
        let mut listener = house.client(org).await;
        listener.line("SUBSCRIBE news").await;
        client.send_raw(&[b"PUBLISH", b"news", text]).await;
        assert_eq!(client.reply().await, ":1");
        assert_eq!(listener.reply().await, format!("[\"message\" \"news\" {}]", shown(text)));
        client.line("MULTI").await;
        client.send_raw(&[b"SET", b"t", text]).await;
        assert_eq!(client.reply().await, "+QUEUED");
        client.line("GET t").await;
        assert_eq!(client.line("EXEC").await, format!("[+OK {}]", shown(text)));
        client.send(&["CLIENT", "REPLY", "SKIP"]).await;
        client.send_raw(&[b"SET", b"quiet", text]).await;
        assert_eq!(client.line("STRLEN quiet").await, format!(":{}", 2 * MB));
    }
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_client_that_leaves_in_the_middle_leaves_nothing_behind() {
    let house = House::start().await;
    let mut admin = house.admin().await;
    let mut growth = Growth::new();
    // More often than the tenant has connections: each is given back.
    for n in 0..60 {
        let mut client = house.client("acme").await;
        let head = format!("*5\r\n$4\r\nHSET\r\n$3\r\nbig\r\n$1\r\nf\r\n${}\r\n", 20 * MB);
        client.stream.write_all(head.as_bytes()).await.expect("sent");
        write(&mut client.stream, 0, 2 * MB + n, &mut growth).await;
        drop(client);
    }
    let mut client = house.client("acme").await;
    assert_eq!(client.line("EXISTS big").await, ":0");
    assert_eq!(client.line("SET k v").await, "+OK");
    let mut blocked = house.client("acme").await;
    assert_eq!(blocked.line("BLPOP nothing 0.01").await, "(nil*)");
    while admin.line("CLIENT LIST").await.matches("cmd=").count() > 12 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Nothing of it counts: all keys of the tier are left.
    assert_eq!(client.line("DBSIZE").await, ":1");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_broken_end_is_never_run() {
    let house = House::start().await;
    for org in ["acme", "umbrella"] {
        for broken in [&b"xx"[..], b"\rx", b"\n\r"] {
            let mut client = house.client(org).await;
            let mut bytes = format!("*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n${}\r\n", 3 * MB).into_bytes();
            bytes.extend(value(3 * MB));
            bytes.extend_from_slice(broken);
            bytes.extend_from_slice(b"*1\r\n$8\r\nFLUSHALL\r\n");
            client.stream.write_all(&bytes).await.expect("sent");
            assert_eq!(client.reply().await, "-ERR Protocol error: invalid bulk length");
            assert_eq!(client.reply().await, "(closed)");
            assert_eq!(house.client(org).await.line("EXISTS big").await, ":0");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
pub async fn what_does_not_fit_the_tier_is_refused_and_the_client_goes_on() {
    let house = House::start().await;
    let mut client = house.client("acme").await;
    assert_eq!(client.line("SET k v").await, "+OK");
    let text = value(60 * MB);
    client.send_raw(&[b"SET", b"k", &text]).await;
    let reply = client.reply().await;
    assert!(reply.starts_with("-OOM "), "{reply}");
    assert_eq!(client.line("GET k").await, "\"v\"");
    // The second half is announced when the first is on its way.
    client.send_raw(&[b"HSET", b"h", b"f", &text[..30 * MB], b"g", &text[..30 * MB]]).await;
    assert!(client.reply().await.starts_with("-OOM "));
    assert_eq!(client.line("EXISTS h").await, ":0");
    client.send_raw(&[b"APPEND", b"k", &text[..30 * MB]]).await;
    assert_eq!(client.reply().await, format!(":{}", 30 * MB + 1));
    client.send_raw(&[b"APPEND", b"k", &text[..30 * MB]]).await;
    assert!(client.reply().await.starts_with("-OOM "));
    assert_eq!(life(&mut client, "k").await, "the tier's");
    assert_eq!(client.line("DEL k").await, ":1");
    // What is on its way counts, whatever is measured meanwhile.
    let mut first = house.client("acme").await;
    let head = format!("*3\r\n$3\r\nSET\r\n$1\r\na\r\n${}\r\n", 30 * MB);
    first.stream.write_all(head.as_bytes()).await.expect("sent");
    write(&mut first.stream, 0, 29 * MB, &mut Growth::new()).await;
    for _ in 0..2 {
        client.send_raw(&[b"SET", b"b", &text[..30 * MB]]).await;
        let reply = client.reply().await;
        assert!(reply.starts_with("-OOM "), "{reply}");
    }
    write(&mut first.stream, 29 * MB, 30 * MB, &mut Growth::new()).await;
    first.stream.write_all(b"\r\n").await.expect("sent");
    assert_eq!(first.reply().await, "+OK");
    assert_eq!(client.line("STRLEN a").await, format!(":{}", 30 * MB));
}

#[tokio::test(flavor = "multi_thread")]
pub async fn the_last_key_counts_for_large_ones_too() {
    let house = House::with_tiers(
        &include_str!("../../config/tiers.toml")
            .replace("per_second = 500, burst = 1000", "per_second = 500000, burst = 1000000"),
    )
    .await;
    let mut client = house.client("acme").await;
    let text = value(2 * MB);
    for i in 0..999 {
        client.send(&["SET", &format!("k{i}"), "v"]).await;
    }
    for _ in 0..999 {
        assert_eq!(client.reply().await, "+OK");
    }
    for (key, fits) in [("new", true), ("newer", false), ("k5", true), ("new", true)] {
        client.send_raw(&[b"SET", key.as_bytes(), &text]).await;
        let reply = client.reply().await;
        assert!(if fits { reply == "+OK" } else { reply.starts_with("-OOM ") }, "{key}: {reply}");
    }
    assert_eq!(client.line("DBSIZE").await, ":1000");
    assert_eq!(life(&mut client, "new").await, "the tier's");
}

#[tokio::test(flavor = "multi_thread")]
pub async fn who_does_not_read_delays_nobody_and_loses_nothing() {
    const LEN: usize = 100 * MB;
    let house = House::start().await;
    let mut growth = Growth::new();
    let mut writer = house.client("umbrella").await;
    writer.stream.write_all(format!("*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n${LEN}\r\n").as_bytes()).await.expect("sent");
    write(&mut writer.stream, 0, LEN, &mut growth).await;
    writer.stream.write_all(b"\r\n").await.expect("sent");
    assert_eq!(writer.reply().await, "+OK");
    writer.send_raw(&[b"SET", b"half", &value(LEN / 2)]).await;
    assert_eq!(writer.reply().await, "+OK");
    let mut admin = house.admin().await;
    for (three, behind) in [(false, false), (true, false), (false, true)] {
        // What is held for others has a bound.
        let (key, len) = if behind { ("half", LEN / 2) } else { ("big", LEN) };
        let mut slow = if three { house.client3("umbrella").await } else { house.client("umbrella").await };
        let other = house.client("umbrella").await;
        // Its first large reply comes on the connection that all share.
        slow.send(&["GET", key]).await;
        if !behind {
            stuck(&mut admin).await;
        }
        let (count, stop, task) = busy(other);
        while count.load(Ordering::Relaxed) < 100 {
            tokio::task::yield_now().await;
        }
        // What others wait behind is held for them; nothing else is.
        if !behind {
            growth.look();
        }
        // The second has a connection of its own.
        slow.send(&["GET", key]).await;
        read(&mut slow.stream, len, &mut Growth::new()).await;
        stuck(&mut admin).await;
        let before = count.load(Ordering::Relaxed);
        while count.load(Ordering::Relaxed) < before + 100 {
            tokio::task::yield_now().await;
        }
        if !behind {
            growth.look();
        }
        read(&mut slow.stream, len, &mut Growth::new()).await;
        assert_eq!(slow.line("GET small").await, "\"v\"");
        stop.store(true, Ordering::Relaxed);
        task.await.expect("it was answered");
    }
    // One that leaves while everything waits for it.
    let mut slow = house.client("umbrella").await;
    slow.send(&["GET", "big"]).await;
    stuck(&mut admin).await;
    drop(slow);
    while omem(&mut admin).await > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(writer.line("GET small").await, "\"v\"");
    assert!(growth.most < 64 * MB, "{} MB more", growth.most / MB);
}

/// While nobody is behind it, it costs nothing; where others are, more than a bound is held for nobody.
#[tokio::test(flavor = "multi_thread")]
pub async fn who_asks_for_too_much_and_does_not_read_is_let_go_where_others_wait() {
    const LEN: usize = 200 * MB;
    let house = House::start().await;
    let mut writer = house.client("umbrella").await;
    writer.stream.write_all(format!("*3\r\n$3\r\nSET\r\n$3\r\nbig\r\n${LEN}\r\n").as_bytes()).await.expect("sent");
    write(&mut writer.stream, 0, LEN, &mut Growth::new()).await;
    writer.stream.write_all(b"\r\n").await.expect("sent");
    assert_eq!(writer.reply().await, "+OK");
    writer.line("SET small v").await;
    let mut admin = house.admin().await;
    let (mut slow, mut other) = (house.client("umbrella").await, house.client("umbrella").await);
    assert_eq!(slow.line("GET small").await, "\"v\"");
    assert_eq!(other.line("GET small").await, "\"v\"");
    let mut growth = Growth::new();
    // Both are on their way to the server before it answers the first.
    assert_eq!(admin.line("CLIENT PAUSE 300 ALL").await, "+OK");
    slow.send(&["GET", "big"]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    other.send(&["GET", "small"]).await;
    let begun = std::time::Instant::now();
    let watch = async {
        loop {
            growth.look();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let reply = tokio::select! { reply = other.reply() => reply, () = watch => unreachable!("it never ends") };
    assert_eq!(reply, "\"v\"");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert!(growth.most < 150 * MB, "{} MB more", growth.most / MB);
    let mut rest = Vec::new();
    let _ = slow.stream.read_to_end(&mut rest).await;
    assert!(rest.len() < LEN, "it was let go");
    assert_eq!(other.line("GET small").await, "\"v\"");
}

/// What one tenant makes us hold whole takes nothing from the others.
#[tokio::test(flavor = "multi_thread")]
pub async fn one_tenant_does_not_take_what_all_have() {
    let house = House::start().await;
    let text = value(60 * MB);
    let mut held = Vec::new();
    let mut refused = 0;
    // A transaction is held until its end.
    for _ in 0..6 {
        let mut client = house.client("umbrella").await;
        assert_eq!(client.line("MULTI").await, "+OK");
        let mut request = Vec::new();
        dynabase::wire::resp::put_request(&mut request, &[b"SET", b"k", &text]);
        // It may be closed while it is still sending.
        let _ = client.stream.write_all(&request).await;
        match client.reply().await.as_str() {
            "+QUEUED" => held.push(client),
            reply => {
                assert!(reply == "(closed)" || reply.starts_with("-ERR max request size exceeded"), "{reply}");
                refused += 1;
            }
        }
    }
    assert!(refused >= 2 && held.len() >= 2, "{} are held", held.len());
    let mut other = house.client("hooli").await;
    assert_eq!(other.line("MULTI").await, "+OK");
    other.send_raw(&[b"SET", b"k", &text]).await;
    assert_eq!(other.reply().await, "+QUEUED");
    assert_eq!(other.line("EXEC").await, "[+OK]");
    assert_eq!(held[0].line("DISCARD").await, "+OK");
    let mut next = house.client("umbrella").await;
    assert_eq!(next.line("MULTI").await, "+OK");
    next.send_raw(&[b"SET", b"k", &text]).await;
    assert_eq!(next.reply().await, "+QUEUED");
}

/// A script that a transaction calls a thousand times is held once.
#[tokio::test(flavor = "multi_thread")]
pub async fn a_transaction_holds_a_script_once() {
    const CALLS: usize = 1000;
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let script = format!("return redis.call('INCR','n') --{}", "x".repeat(MB - 100));
    let sha = client.run(&["SCRIPT", "LOAD", &script]).await.trim_matches('"').to_owned();
    let mut growth = Growth::new();
    assert_eq!(client.line("MULTI").await, "+OK");
    for _ in 0..CALLS {
        client.send(&["EVALSHA", &sha, "0"]).await;
    }
    for _ in 0..CALLS {
        assert_eq!(client.reply().await, "+QUEUED");
    }
    growth.look();
    assert!(growth.most < 64 * MB, "{} MB more", growth.most / MB);
    assert!(client.line("EXEC").await.ends_with(&format!(" :{CALLS}]")));
}

/// What waits in the server for its clients.
async fn omem(admin: &mut Client) -> usize {
    let list = admin.line("CLIENT LIST").await;
    list.split("omem=").skip(1).filter_map(|rest| rest.split(' ').next()?.parse::<usize>().ok()).sum()
}

/// Waits until the server has something to say that nobody takes.
async fn stuck(admin: &mut Client) {
    let (mut before, mut same) = (0, 0);
    while same < 10 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = omem(admin).await;
        same = if now > 0 && now == before { same + 1 } else { 0 };
        before = now;
    }
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_server_that_dies_in_the_middle_takes_its_clients_along() {
    let mut house = House::start().await;
    let mut growth = Growth::new();
    let mut reader = house.client("umbrella").await;
    reader.send_raw(&[b"SET", b"big", &value(50 * MB)]).await;
    assert_eq!(reader.reply().await, "+OK");
    reader.send(&["GET", "big"]).await;
    reader.stream.readable().await.expect("it began");
    let mut sender = house.client("umbrella").await;
    sender.stream.write_all(format!("*3\r\n$3\r\nSET\r\n$1\r\nb\r\n${}\r\n", 50 * MB).as_bytes()).await.expect("sent");
    write(&mut sender.stream, 0, 5 * MB, &mut growth).await;
    house.redis.kill();
    let mut rest = Vec::new();
    let _ = reader.stream.read_to_end(&mut rest).await;
    assert!(rest.len() < 50 * MB, "half a reply, and the end");
    // Nothing says that it was done.
    let mut said = Vec::new();
    let _ = sender.stream.read_to_end(&mut said).await;
    assert!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
    house.redis.start_again().await;
    let mut next = house.client("umbrella").await;
    while next.line("SET k v").await != "+OK" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
pub async fn a_watch_survives_the_lives_that_are_set_beside_it() {
    let house = House::start().await;
    for org in ["acme", "umbrella"] {
        let (mut client, mut other) = (house.client(org).await, house.client(org).await);
        for between in ["HSET h f v", "SET n v NX", "PERSIST h", "LPUSH l v", "GET h2"] {
            client.line("DEL n").await;
            assert_eq!(client.line("WATCH w").await, "+OK");
            let reply = client.line(between).await;
            assert!(!reply.starts_with('-'), "{between}: {reply}");
            assert_eq!(other.line("SET w changed").await, "+OK");
            client.line("MULTI").await;
            client.line("SET result v").await;
            assert_eq!(client.line("EXEC").await, "(nil*)", "{between}");
        }
        client.line("WATCH w").await;
        client.send_raw(&[b"SET", b"large", &value(2 * MB)]).await;
        assert_eq!(client.reply().await, "+OK");
        client.line("MULTI").await;
        client.line("SET result v").await;
        assert_eq!(client.line("EXEC").await, "[+OK]");
        assert_eq!(life(&mut other, "large").await, if org == "acme" { "the tier's" } else { "no end" });
    }
}
