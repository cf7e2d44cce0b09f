//! Neon's front before a real PostgreSQL: `/sql` over HTTP, the cold home on the Postgres port, a compute that sleeps,
//! branches.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use dynabase::{
    tenant::{Home, Protocol, Tenant, Tier, namespace::Password},
    upstream::postgres::{Config, Provisioner},
    wire::neon::value::{self, Kind},
};
use serde_json::{Value, json};

use crate::support::{
    PATIENCE, block_on, eventually, postgres,
    proxy::{Limits, Org, Proxy, Setup},
};

/// A proxy with Neon homes on its own server, reached by `url`.
pub fn setup(url: &str) -> Setup {
    Setup {
        listen: "http = \"127.0.0.1:0\"".into(),
        sections: format!("[upstream.neon]\nurl = \"{url}\"\nstorage_interval = \"1h\""),
        ..Setup::default()
    }
}

/// The port of the HTTP door.
pub fn door(proxy: &Proxy) -> u16 {
    eventually("dynabase listens for HTTP", || {
        let log = proxy.log();
        let (_, rest) = log.split_once("listening for HTTP clients")?;
        rest.lines().next()?.rsplit_once(':')?.1.trim().parse().ok()
    })
}

/// A tenant with its Neon home.
pub fn tenant<'a>(proxy: &'a Proxy, org: &str, tier: Tier) -> Org<'a> {
    let org = proxy.tenant(org, tier);
    let admin =
        Config { url: Some(Password::new(&proxy.server.url)), ..Config::default() }.admin().expect("a good URL");
    let limits = proxy.config.load_tiers().expect("our own").limits(tier).sql(Protocol::Neon);
    let names = proxy.config.names().expect("our own");
    let record = Tenant::new(org.org.clone(), tier);
    block_on(async {
        Provisioner::of_neon_homes(admin).ensure(&record, &names, limits).await.expect("provisioned");
    });
    org
}

/// One request on a connection of its own: status and body.
pub fn ask(port: u16, head: &str, body: &str) -> (u16, String) {
    ask_at("x", port, head, body)
}

/// The same for a host of that name.
pub fn ask_at(host: &str, port: u16, head: &str, body: &str) -> (u16, String) {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the door");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    write!(socket, "{head}\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("answered");
    let status = answer.split(' ').nth(1).and_then(|it| it.parse().ok()).expect("a status");
    (status, answer.split_once("\r\n\r\n").map(|it| it.1.to_owned()).unwrap_or_default())
}

/// `POST /sql` to a tenant's database.
pub fn sql_in(port: u16, org: &Org<'_>, database: &str, query: &str) -> (u16, Value) {
    let head = format!("POST /sql HTTP/1.1\r\nNeon-Connection-String: postgres://app:{}@x/{database}", org.token());
    let (status, body) = ask(port, &head, &json!({"query": query, "params": []}).to_string());
    (status, serde_json::from_str(&body).expect("JSON"))
}

pub fn sql(port: u16, org: &Org<'_>, query: &str) -> Value {
    let (status, answer) = sql_in(port, org, "app", query);
    assert_eq!(status, 200, "{query}: {answer}");
    answer["rows"].clone()
}

/// Most memory that the process has ever had, in kilobytes.
fn peak_kb(proxy: &Proxy) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn an_answer_over_its_size_is_refused_before_it_is_held() {
    let proxy = Proxy::start(&setup(&postgres::shared().url));
    let port = door(&proxy);
    let org = tenant(&proxy, "neon_wide", Tier::Free);
    let columns: Vec<String> = (0..1500).map(|n| format!("c{n} int")).collect();
    sql(port, &org, &format!("create table w ({})", columns.join(",")));
    sql(port, &org, "create type pair as (a text)");
    assert_eq!(sql(port, &org, "select repeat('x', 5000000) as x")[0]["x"].as_str().map(str::len), Some(5_000_000));
    let login = format!("POST /sql HTTP/1.1\r\nNeon-Connection-String: postgres://app:{}@x/app", org.token());
    // Nothing but heads of results, of which each is far below the limit.
    let heads = json!({"queries": vec![json!({"query": "select * from w"}); 400]});
    // One row; and one error.
    let row = json!({"query": "select repeat('x', 150000000)"});
    // Rows that fit, and whose escapes take six times as much: alone, in an array, of a type that has to be asked for.
    let escapes = |of: &str| json!({"query": format!("select {}", of.replace('?', "repeat(chr(1), 9000000)"))});
    let [text, list, own] = ["?", "array[?]", "row(?)::pair"].map(escapes);
    let error = json!({"query": "do $$ begin raise exception '%', repeat('x', 50000000); end $$"});
    let (before, mut peaks) = (peak_kb(&proxy), Vec::new());
    // What is not looked at takes nothing; a row of 9 MB and 10 MB of its JSON are there for a moment.
    for (asked, code, mb) in [
        (heads, "54000", 40),
        (row, "54000", 40),
        (error, "P0001", 40),
        (text, "54000", 80),
        (list, "54000", 80),
        (own, "54000", 80),
    ] {
        let (status, answer) = ask(port, &login, &asked.to_string());
        assert!(answer.len() < 128 * 1024, "{code}: {} bytes", answer.len());
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!((status, &answer["code"]), (400, &json!(code)), "{answer}");
        peaks.push(peak_kb(&proxy) - before);
        assert!(peaks.iter().all(|grown| *grown < mb * 1024), "{peaks:?} kB more than before");
    }
    assert_eq!(sql(port, &org, "select 1 as one"), json!([{"one": 1}]));
}

#[test]
fn a_stranger_s_body_is_not_waited_for() {
    let proxy = Proxy::start(&setup(&postgres::shared().url));
    let port = door(&proxy);
    let org = tenant(&proxy, "neon_known", Tier::Free);
    let refused = |password: &str, length: usize| {
        let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the door");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
        let string = format!("postgres://app:{password}@x/app");
        write!(
            socket,
            "POST /sql HTTP/1.1\r\nHost: x\r\nNeon-Connection-String: {string}\r\nContent-Length: {length}\r\n\r\n{{"
        )
        .expect("sent");
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut piece = [0; 4096];
            match socket.read(&mut piece) {
                Ok(n @ 1..) => answer.extend_from_slice(&piece[..n]),
                _ => return None,
            }
        }
        Some(String::from_utf8(answer).expect("text"))
    };
    let answer = refused("nobody", 1000).expect("an answer without the body");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("\"code\":\"28P01\""), "{answer}");
    // Whoever was let in is asked for what it has to say.
    let answer = refused(&org.token(), 1).expect("an answer to the body");
    assert!(answer.contains("could not parse the HTTP request body"), "{answer}");
}

#[test]
fn every_array_type_of_the_server_is_an_array_here() {
    let rows = postgres::shared().sql(
        "select format('%s %s %s', t.oid, t.typelem, e.typdelim) from pg_type t join pg_type e on e.oid = t.typelem \
         where (t.typcategory = 'A' or t.oid = 2287) and t.typrelid = 0 and e.typrelid = 0 and t.oid < 10000",
    );
    assert!(rows.len() > 60, "{rows:?}");
    for row in rows {
        let mut words = row.split(' ');
        let (oid, element) = (words.next().expect("oid"), words.next().expect("element"));
        let delimiter = words.next().expect("delimiter").as_bytes()[0];
        let (oid, element): (u32, u32) = (oid.parse().expect("a number"), element.parse().expect("a number"));
        // int2vector and oidvector have a text of their own.
        if !matches!(oid, 22 | 30) {
            assert_eq!(value::kind(oid), Some(Kind::Array(value::element(element), delimiter)), "{row}");
        }
    }
}

#[test]
fn a_cold_home_is_one_database_by_every_way_in() {
    let proxy = Proxy::start(&setup(&postgres::shared().url));
    let port = door(&proxy);
    let cold = tenant(&proxy, "neon_cold", Tier::Pro);
    sql(port, &cold, "create table seen (i int)");
    assert_eq!(cold.wire().code("select * from seen"), "42P01", "the main home is another database");
    cold.edit(|tenant| tenant.routes.postgres = Some(Home::Neon));
    eventually("the new home is heard of", || (cold.wire().code("select * from seen") != "42P01").then_some(()));
    cold.wire().query("insert into seen values (7)");
    assert_eq!(sql(port, &cold, "select * from seen"), json!([{"i": 7}]));
    // Its connections are the Neon budget's, not the main one's.
    let used = |protocol: &str| -> u64 {
        let view: Value = serde_json::from_str(&proxy.admin("/v1/tenants/neon_cold")).expect("JSON");
        let found = view["protocols"].as_array().expect("a list").iter().find(|it| it["protocol"] == protocol).cloned();
        found.expect("every protocol")["connections"]["used"].as_u64().expect("a number")
    };
    let mut wire = cold.wire();
    wire.query("begin");
    assert!(used("neon") >= 1);
    drop(wire);
    let hot = tenant(&proxy, "neon_hot", Tier::Pro);
    hot.wire().query("select 1");
    assert_eq!(hot.wire().ask("select current_database()"), hot.role());
}

/// A compute that sleeps: it drops the first connections, then lets one wait, and is awake from then on.
struct Sleeper {
    port: u16,
    attempts: Arc<AtomicU32>,
    at_once: Arc<AtomicU32>,
}

const DROPPED: u32 = 2;
const WAKES_IN: Duration = Duration::from_millis(700);

impl Sleeper {
    fn before(target: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let (attempts, at_once) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (counted, most, awake) = (Arc::clone(&attempts), Arc::clone(&at_once), Arc::new(AtomicBool::new(false)));
        std::thread::spawn(move || {
            let waiting = Arc::new(AtomicU32::new(0));
            while let Ok((client, _)) = listener.accept() {
                let number = counted.fetch_add(1, Ordering::AcqRel);
                if number < DROPPED {
                    continue;
                }
                let (awake, most, waiting) = (Arc::clone(&awake), Arc::clone(&most), Arc::clone(&waiting));
                std::thread::spawn(move || {
                    if !awake.load(Ordering::Acquire) {
                        most.fetch_max(waiting.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                        std::thread::sleep(WAKES_IN);
                        waiting.fetch_sub(1, Ordering::AcqRel);
                        awake.store(true, Ordering::Release);
                    }
                    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else { return };
                    let (Ok(mut from), Ok(mut to)) = (client.try_clone(), server.try_clone()) else { return };
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                    let (mut from, mut to) = (server, client);
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
            }
        });
        Self { port, attempts, at_once }
    }
}

#[test]
fn a_compute_that_sleeps_is_felt_as_latency_only() {
    let server = postgres::shared();
    let sleeper = Sleeper::before(server.port);
    let url = server.url.replace(&format!(":{}/", server.port), &format!(":{}/", sleeper.port));
    assert_ne!(url, server.url);
    let mut setup = setup(&url);
    // The queue is far shorter than waking takes: waiting for a compute is not waiting for one's turn.
    setup.tiers[2] = Limits { connections: 5, queue_timeout: "500ms", ..Limits::default() };
    let proxy = Proxy::start(&setup);
    let port = door(&proxy);
    let org = tenant(&proxy, "neon_sleeps", Tier::Pro);
    assert_eq!(sleeper.attempts.load(Ordering::Acquire), 0, "nothing wakes a compute that nobody asks for");
    std::thread::scope(|scope| {
        for n in 0..5 {
            let org = &org;
            scope.spawn(move || assert_eq!(sql(port, org, &format!("select {n} as n")), json!([{"n": n}])));
        }
    });
    assert!(sleeper.attempts.load(Ordering::Acquire) > DROPPED);
    assert_eq!(sleeper.at_once.load(Ordering::Acquire), 1, "one connection wakes it, the others wait");
}

#[test]
fn branches_are_copies_that_are_counted() {
    let proxy = Proxy::start(&setup(&postgres::shared().url));
    let port = door(&proxy);
    let org = tenant(&proxy, "neon_branches", Tier::Pro);
    let other = tenant(&proxy, "neon_others", Tier::Pro);
    let rest = &|org: &Org<'_>, method: &str, path: &str, body: &str| {
        ask(port, &format!("{method} /neon/branches{path} HTTP/1.1\r\nAuthorization: Bearer {}", org.token()), body)
    };
    sql(port, &org, "create table t (i int)");
    sql(port, &org, "insert into t values (1)");
    assert_eq!(sql_in(port, &org, "app@dev", "select 1").1["code"], "3D000");
    let (status, body) = rest(&org, "POST", "", r#"{"name":"dev"}"#);
    assert_eq!((status, body.contains("app@dev")), (201, true), "{body}");
    let dev = |query: &str| {
        let (status, answer) = sql_in(port, &org, "app@dev", query);
        assert_eq!(status, 200, "{answer}");
        answer["rows"].clone()
    };
    assert_eq!(dev("select * from t"), json!([{"i": 1}]));
    dev("insert into t values (2)");
    assert_eq!(sql(port, &org, "select * from t"), json!([{"i": 1}]), "writing to a branch leaves the rest alone");
    // Nobody else's name leads there.
    assert_eq!(sql_in(port, &other, "app@dev", "select 1").1["code"], "3D000");
    assert_eq!(rest(&other, "DELETE", "/dev", "").0, 404);
    assert_eq!(rest(&other, "GET", "", "").1, r#"{"branches":[],"max":3}"#);

    // The same refusals at the tenant's door and on the operators' port.
    let both = |method: &str, path: &str, body: &str| {
        let (tenant, told) = rest(&org, method, path, body);
        let told: Value = serde_json::from_str(&told).expect("JSON");
        let (operator, answer) = proxy.admin_send(method, &format!("/v1/tenants/neon_branches/branches{path}"), body);
        assert_eq!((tenant, &told["code"]), (operator, &answer["error"]["code"]), "{told} {answer}");
        tenant
    };
    assert_eq!(both("POST", "", r#"{"name":"dev"}"#), 409);
    for bad in ["", "A", "a b", "-a", "a/b", "a@b", &"x".repeat(41)] {
        assert_eq!(both("POST", "", &json!({ "name": bad }).to_string()), 400, "{bad}");
    }
    assert_eq!(rest(&org, "POST", "", r#"{"name":"b"}"#).0, 201);
    // Two at once for one place: never one too many.
    let answers: Vec<u16> = std::thread::scope(|scope| {
        let org = &org;
        let make = move |name: &str| rest(org, "POST", "", &json!({ "name": name }).to_string()).0;
        let tries = ["c", "d"].map(|name| scope.spawn(move || make(name)));
        tries.into_iter().map(|it| it.join().expect("no panic")).collect()
    });
    assert!(answers.contains(&201) && answers.contains(&422), "{answers:?}");
    assert_eq!(both("POST", "", r#"{"name":"e"}"#), 422);
    assert_eq!(rest(&org, "DELETE", "/dev", "").0, 204);
    assert_eq!(both("DELETE", "/dev", ""), 404);
    assert_eq!(sql_in(port, &org, "app@dev", "select 1").1["code"], "3D000");
    assert_eq!(ask(port, "GET /neon/branches HTTP/1.1", "").0, 401);
    assert_eq!(ask(port, "GET /neon/branches HTTP/1.1\r\nAuthorization: Bearer nonsense", "").0, 401);
}
