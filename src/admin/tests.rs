use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::TcpStream,
};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use serde_json::Value;

use super::{tally::Tally, text::Text, *};
use crate::{
    refusal::{Refusal, TokenFault},
    tenant::{
        OrgId, Protocol, Status, Tenant, Tier, Tiers,
        directory::{Absent, Ask, Directory},
    },
    usage::event,
};

const TOKEN: &str = "correct-horse-battery-staple";

fn org(text: &str) -> OrgId {
    OrgId::parse(text).unwrap()
}

fn tenant(name: &str, tier: Tier, epoch: u64) -> Arc<Tenant> {
    let (databases, users) = (Vec::new(), Vec::new());
    Arc::new(Tenant {
        org: org(name),
        tier,
        status: Status::Active,
        epoch,
        generation: 1,
        databases,
        users,
        routes: Default::default(),
        still: false,
    })
}

/// A table whose catalog knows every organisation that does not start with `x`, and can't be asked about `down`.
fn table() -> Arc<Table> {
    let (directory, mut asks) = Directory::new();
    thread::spawn(move || {
        while let Some(ask) = asks.blocking_recv() {
            if let Ask::Tenant(org, answer) = ask {
                let found = match org.as_str() {
                    "down" => Err(Absent::Unavailable),
                    name if name.starts_with('x') => Err(Absent::Unknown),
                    name => Ok(tenant(name, Tier::Pro, 1)),
                };
                let _ = answer.send(found);
            }
        }
    });
    let tiers = Tiers::parse(include_str!("../../config/tiers.toml")).unwrap();
    Arc::new(Table::new(directory, tiers, 100_000))
}

struct Running {
    handle: AdminHandle,
    state: Arc<State>,
    drain: Drain,
    recorder: PrometheusRecorder,
}

fn start() -> Running {
    let recorder = PrometheusBuilder::new().build_recorder();
    let state = Arc::new(State::new(table(), Arc::default(), recorder.handle()));
    let drain = Drain::new();
    let config =
        Config { listen: "127.0.0.1:0".parse().unwrap(), token: Some(TOKEN.into()), top_orgs: 3, ..Config::default() };
    let handle = spawn(&config, Arc::clone(&state), drain.clone()).unwrap();
    Running { handle, state, drain, recorder }
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        serde_json::from_str(&self.body).unwrap()
    }

    fn code(&self) -> String {
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
        error["code"].as_str().unwrap().to_owned()
    }
}

impl Running {
    fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = TcpStream::connect(self.handle.addr).unwrap();
        // A server that has already refused may close before it has read all of it.
        let _ = stream.write_all(bytes);
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8(text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Reply { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    fn ask(&self, method: &str, path: &str, headers: &str) -> Reply {
        self.raw(format!("{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{headers}\r\n").as_bytes())
    }

    fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &format!("Authorization: Bearer {TOKEN}\r\n"))
    }

    fn load(&self, name: &str) -> Arc<crate::quota::Slot> {
        assert_eq!(self.get(&format!("/v1/tenants/{name}")).status, 200);
        self.state.table.resident(&org(name)).unwrap()
    }
}

#[test]
fn readiness_names_what_is_missing_and_draining_is_not_dying() {
    let running = start();
    assert_eq!(running.ask("GET", "/livez", "").body, "ok");
    let codes = || -> (u16, Vec<String>) {
        let reply = running.ask("GET", "/readyz", "");
        let json = reply.json();
        assert_eq!(json["ready"], reply.status == 200);
        let reasons = json["reasons"].as_array().unwrap();
        (reply.status, reasons.iter().map(|reason| reason["code"].as_str().unwrap().to_owned()).collect())
    };
    assert_eq!(codes(), (503, vec!["listeners".into(), "catalog".into(), "keys".into()]));
    let readiness = &running.state.readiness;
    readiness.listeners_up.store(true, Ordering::Release);
    readiness.catalog_loaded.store(true, Ordering::Release);
    assert_eq!(codes(), (503, vec!["keys".into()]));
    readiness.keys_loaded.store(true, Ordering::Release);
    assert_eq!(codes(), (200, vec![]));
    running.drain.start();
    assert_eq!(codes(), (503, vec!["draining".into()]));
    assert_eq!(running.ask("GET", "/livez", "").status, 200);
    assert_eq!(running.get("/metrics").status, 200);
}

#[test]
fn without_the_token_nothing_is_learned() {
    let running = start();
    for path in ["/metrics", "/v1/tenants", "/v1/tenants/acme", "/openapi.json", "/nowhere", "/livez/", "/"] {
        for headers in [
            String::new(),
            "Authorization: Bearer wrong\r\n".to_owned(),
            "Authorization: Bearer \r\n".to_owned(),
            "Authorization: Bearer\r\n".to_owned(),
            format!("Authorization: Basic {TOKEN}\r\n"),
            format!("Authorization: {TOKEN}\r\n"),
            format!("Authorization: Bearer {TOKEN}x\r\n"),
            format!("Authorization: Bearer {}\r\n", &TOKEN[1..]),
        ] {
            let reply = running.ask("GET", path, &headers);
            assert_eq!((reply.status, reply.code().as_str()), (401, "unauthorized"), "{path} {headers}");
            assert!(reply.head.contains("www-authenticate: bearer"), "{}", reply.head);
        }
    }
    assert!(running.state.table.slots().is_empty(), "no stranger makes us ask the catalog");
    assert_eq!(running.ask("GET", "/metrics", &format!("authorization: bearer {TOKEN}\r\n")).status, 200);
}

#[test]
fn wrong_paths_methods_and_parameters_get_json_errors() {
    let running = start();
    assert_eq!(running.get("/nowhere").code(), "not_found");
    assert_eq!(running.get("/v1/tenants/").status, 404);
    assert_eq!(running.get("/v1/tenants/acme/x").status, 404);
    let post = running.ask("POST", "/v1/tenants", &format!("Authorization: Bearer {TOKEN}\r\n"));
    assert_eq!((post.status, post.code().as_str()), (405, "method_not_allowed"));
    assert!(post.head.contains("allow: get, head"), "{}", post.head);
    let head = running.ask("HEAD", "/livez", "");
    assert!(head.status == 200 && head.body.is_empty());
    for query in ["limit=0", "limit=1001", "limit=x", "limit", "after=A%20B", "tier=PRO"] {
        assert_eq!(running.get(&format!("/v1/tenants?{query}")).code(), "bad_query", "{query}");
    }
}

#[test]
fn requests_that_are_too_large_are_refused() {
    let running = start();
    let long = format!("X-Long: {}\r\n", "x".repeat(20 * 1024));
    assert_eq!(running.ask("GET", "/livez", &long).status, 431);
    let many: String = (0..100).map(|i| format!("X-{i}: 1\r\n")).collect();
    assert_eq!(running.ask("GET", "/livez", &many).status, 431);
    let body = format!("Transfer-Encoding: chunked\r\n\r\n20000\r\n{}", "x".repeat(0x20000));
    let reply = running.raw(format!("GET /livez HTTP/1.1\r\nHost: a\r\n{body}").as_bytes());
    assert_eq!((reply.status, reply.code().as_str()), (413, "too_large"));
    assert_eq!(running.ask("GET", "/livez", "").status, 200);
}

#[test]
fn slow_requests_are_not_waited_for() {
    let running = start();
    let silent = thread::spawn({
        let mut stream = TcpStream::connect(running.handle.addr).unwrap();
        move || stream.read_to_end(&mut Vec::new())
    });
    let half = running.raw(b"GET /livez HTTP/1.1\r\nHost:");
    assert!(half.status == 0 || half.status == 408, "{}", half.head);
    let body = running.raw(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 5\r\n\r\nabc");
    assert_eq!((body.status, body.code().as_str()), (408, "slow"));
    silent.join().unwrap().unwrap();
}

#[test]
fn tenants_are_shown_with_what_they_use() {
    let running = start();
    let slot = running.load("acme");
    let _held = (slot.client(Protocol::Postgres).unwrap(), slot.connection(Protocol::Postgres).unwrap());
    slot.set_stored(Protocol::Postgres, 4096);
    let json = running.get("/v1/tenants/acme").json();
    assert_eq!(json["org"], "acme");
    assert_eq!((&json["tier"], &json["status"], &json["epoch"]), (&"PRO".into(), &"active".into(), &1.into()));
    let pg = &json["protocols"][Protocol::Postgres as usize];
    assert_eq!(pg["protocol"], "postgres");
    assert_eq!(pg["sessions"], serde_json::json!({ "used": 1, "max": 500 }));
    assert_eq!(pg["connections"], serde_json::json!({ "used": 1, "max": 50 }));
    assert_eq!(pg["stored_bytes"], 4096);
    assert_eq!(running.get("/v1/tenants/xeno").code(), "unknown_org");
    assert_eq!(running.get("/v1/tenants/ACME").code(), "bad_org");
    assert_eq!(running.get("/v1/tenants/down").code(), "catalog_down");
}

#[test]
fn pages_of_tenants_cover_each_exactly_once() {
    let running = start();
    for name in ["d", "a", "c", "e", "b"] {
        running.load(name);
    }
    let (mut seen, mut query) = (Vec::new(), "limit=2".to_owned());
    loop {
        let json = running.get(&format!("/v1/tenants?{query}")).json();
        let orgs = json["tenants"].as_array().unwrap();
        seen.extend(orgs.iter().map(|tenant| tenant["org"].as_str().unwrap().to_owned()));
        match json["next"].as_str() {
            Some(next) => query = format!("limit=2&after={next}"),
            None => break,
        }
    }
    assert_eq!(seen, ["a", "b", "c", "d", "e"]);
}

#[test]
fn the_description_lists_exactly_what_answers() {
    let running = start();
    let json = running.get("/openapi.json").json();
    let paths: BTreeSet<_> = json["paths"].as_object().unwrap().keys().cloned().collect();
    let want = [
        "/livez",
        "/readyz",
        "/metrics",
        "/v1/tenants",
        "/v1/tenants/{org}",
        "/v1/tenants/{org}/holdings",
        "/v1/tenants/{org}/suspend",
        "/v1/tenants/{org}/resume",
        "/v1/tenants/{org}/restore",
        "/v1/tenants/{org}/purge",
        "/v1/tenants/{org}/rotate",
        "/v1/tenants/{org}/tier",
        "/v1/tenants/{org}/branches",
        "/v1/tenants/{org}/branches/{name}",
        "/v1/transitions/{id}",
        "/v1/events",
        "/openapi.json",
    ];
    assert_eq!(paths, want.map(str::to_owned).into());
    for path in paths {
        for (method, described) in json["paths"][&path].as_object().unwrap() {
            let (method, asked) = (
                method.to_uppercase(),
                path.replace("{org}", "acme").replace("{id}", "acme.2.a").replace("{name}", "dev"),
            );
            let reply = running.ask(&method, &asked, &format!("Authorization: Bearer {TOKEN}\r\n"));
            // Without a coordinator transitions are not there yet, which a running process has before it listens.
            let responses = &described["responses"];
            let ready = reply.status != 503 || !reply.body.contains("not_ready");
            assert!(!ready || responses[reply.status.to_string()].is_object(), "{path} answers {}", reply.status);
            let open = described["security"].as_array().unwrap().is_empty();
            let stranger = running.ask(&method, &asked, "").status;
            assert_eq!(stranger != 401, open, "{path}");
        }
    }
}

/// Reads Prometheus text, strictly: every sample belongs to the family announced last, with help and type, once.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let (mut samples, mut families) = (BTreeMap::new(), BTreeSet::new());
    let (mut helped, mut family) = (String::new(), String::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(!help.is_empty());
            helped = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, helped, "type without help");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
            assert!(families.insert(name.to_owned()), "{name} twice");
            family = name.to_owned();
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            assert_eq!(name, family, "sample outside its family");
            let labels = labels.strip_suffix('}').unwrap();
            for label in labels.split(',').filter(|label| !label.is_empty()) {
                let (_, value) = label.split_once('=').unwrap();
                let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap();
                assert!(!value.contains(['"', '\\', '\n']));
            }
            let value: f64 = value.parse().unwrap();
            assert!(samples.insert(series.to_owned(), value).is_none(), "{series} twice");
        }
    }
    samples
}

#[test]
fn metrics_are_prometheus_text_with_events_and_values_of_the_moment() {
    let running = start();
    ::metrics::with_local_recorder(&running.recorder, || {
        event::describe();
        event::refused(Protocol::Postgres, &Refusal::BadToken(TokenFault::Expired));
        event::ended(Protocol::Postgres, event::Side::Client);
        event::upstream_failed(Protocol::Postgres, "connect");
        event::pinned(Protocol::Postgres, "listen");
        event::catalog_reloaded(event::Outcome::Failed);
    });
    assert!(running.state.connections.set(Arc::new(AcceptLimits::new(7, 0))).is_ok());
    assert!(running.state.catalog_age.set(Box::new(|| Some(Duration::from_millis(1500)))).is_ok());
    let slot = running.load("acme");
    let _held = (slot.client(Protocol::Postgres).unwrap(), slot.connection(Protocol::Postgres).unwrap());
    let meter = running.state.meters.meter(&org("acme"), Protocol::Postgres);
    meter.requests.store(5, Ordering::Relaxed);
    meter.waited_us.store(2_000_001, Ordering::Relaxed);
    let reply = running.get("/metrics");
    assert!(reply.head.contains("content-type: text/plain; version=0.0.4"));
    let samples = parse(&reply.body);
    for (series, want) in [
        ("dynabase_refusals_total{protocol=\"postgres\",reason=\"bad_token\"}", 1.0),
        ("dynabase_token_faults_total{protocol=\"postgres\",fault=\"expired\"}", 1.0),
        ("dynabase_connections_ended_total{protocol=\"postgres\",side=\"client\"}", 1.0),
        ("dynabase_upstream_errors_total{protocol=\"postgres\",step=\"connect\"}", 1.0),
        ("dynabase_pins_total{protocol=\"postgres\",reason=\"listen\"}", 1.0),
        ("dynabase_catalog_reloads_total{outcome=\"failed\"}", 1.0),
        ("dynabase_sessions{protocol=\"postgres\",tier=\"PRO\"}", 1.0),
        ("dynabase_upstream_connections{protocol=\"postgres\",tier=\"PRO\"}", 1.0),
        ("dynabase_upstream_connections_max{protocol=\"postgres\",tier=\"PRO\"}", 50.0),
        ("dynabase_tenants_resident{tier=\"PRO\"}", 1.0),
        ("dynabase_requests_total{protocol=\"postgres\",tier=\"PRO\"}", 5.0),
        ("dynabase_upstream_wait_seconds_total{protocol=\"postgres\",tier=\"PRO\"}", 2.000_001),
        ("dynabase_org_requests_total{org=\"acme\",protocol=\"postgres\"}", 5.0),
        ("dynabase_org_sessions{org=\"acme\",protocol=\"postgres\"}", 1.0),
        ("dynabase_connections_max", 7.0),
        ("dynabase_catalog_age_seconds", 1.5),
        ("dynabase_ready", 0.0),
        ("dynabase_draining", 0.0),
    ] {
        assert_eq!(samples.get(series), Some(&want), "{series}\n{}", reply.body);
    }
    assert!(samples["process_resident_memory_bytes"] > 1e6 && samples["process_open_fds"] > 3.0);
}

fn sum(samples: &BTreeMap<String, f64>, family: &str) -> f64 {
    samples.iter().filter(|(series, _)| series.starts_with(&format!("{family}{{"))).map(|(_, value)| value).sum()
}

fn orgs(samples: &BTreeMap<String, f64>) -> BTreeSet<&str> {
    samples.keys().filter_map(|series| series.split_once("org=\"")?.1.split('"').next()).collect()
}

fn tallied(tally: &Tally) -> BTreeMap<String, f64> {
    let mut text = Text::default();
    tally.write(&mut text, &[]);
    parse(&text.0)
}

fn traffic(meters: &Meters, name: &str, bytes: u64) {
    let meter = meters.meter(&org(name), Protocol::Postgres);
    meter.bytes_in.fetch_add(bytes, Ordering::Relaxed);
    meter.requests.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn ten_thousand_orgs_cost_as_many_labels_as_configured_and_one() {
    let running = start();
    for i in 0..10_000u64 {
        traffic(&running.state.meters, &format!("org{i}"), i + 1);
    }
    // An organisation can't pose as the rest.
    traffic(&running.state.meters, "other", 1_000_000);
    let samples = parse(&running.get("/metrics").body);
    assert_eq!(orgs(&samples), BTreeSet::from(["org9999", "org9998", "org9997", "other"]));
    let bytes = f64::from(10_000 * 10_001 / 2 + 1_000_000);
    assert_eq!(sum(&samples, "dynabase_org_received_bytes_total"), bytes);
    assert_eq!(sum(&samples, "dynabase_received_bytes_total"), bytes);
    assert_eq!(sum(&samples, "dynabase_org_requests_total"), 10_001.0);
}

#[test]
fn counters_only_grow_whatever_tiers_labels_and_meters_do() {
    let (meters, table) = (Meters::default(), table());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let acme = runtime.block_on(table.slot(&org("acme"))).unwrap();
    let mut tally = Tally::new(1);
    let requests = |tier: &str| format!("dynabase_requests_total{{protocol=\"postgres\",tier=\"{tier}\"}}");
    traffic(&meters, "acme", 100);
    tally.settle(&meters, &table.slots());
    assert_eq!(tallied(&tally)[&requests("PRO")], 1.0);
    assert_eq!(orgs(&tallied(&tally)), BTreeSet::from(["acme", "other"]));

    table.apply(tenant("acme", Tier::Enterprise, 2)).unwrap();
    traffic(&meters, "acme", 100);
    tally.settle(&meters, &table.slots());
    let samples = tallied(&tally);
    assert_eq!((samples[&requests("PRO")], samples[&requests("ENTERPRISE")]), (1.0, 1.0));

    // A rival with more traffic, but not twice as much, does not take the label; with more it does.
    traffic(&meters, "globex", 300);
    tally.settle(&meters, &table.slots());
    assert_eq!(orgs(&tallied(&tally)), BTreeSet::from(["acme", "other"]));
    traffic(&meters, "globex", 300);
    tally.settle(&meters, &table.slots());
    assert_eq!(orgs(&tallied(&tally)), BTreeSet::from(["globex", "other"]));

    // The last requests are counted even if nobody looked between them and the meter's end.
    traffic(&meters, "acme", 100);
    drop(acme);
    let kept_ms = u64::try_from(crate::usage::KEPT_FOR.as_millis()).unwrap();
    tally.retire(meters.sweep(1));
    tally.retire(meters.sweep(1 + kept_ms));
    assert!(meters.all().is_empty());
    tally.settle(&meters, &table.slots());
    let samples = tallied(&tally);
    assert_eq!((samples[&requests("PRO")], samples[&requests("ENTERPRISE")]), (1.0, 2.0));
    assert_eq!(sum(&samples, "dynabase_requests_total"), 5.0);

    // A meter that went without a word, and a new one in its place that has counted less: no step back, none over the top.
    traffic(&meters, "globex", 300);
    tally.settle(&meters, &table.slots());
    meters.sweep(1 + kept_ms);
    meters.sweep(1 + 2 * kept_ms);
    assert!(meters.all().is_empty());
    traffic(&meters, "globex", 1);
    tally.settle(&meters, &table.slots());
    assert_eq!(sum(&tallied(&tally), "dynabase_requests_total"), 7.0);
}

#[test]
fn a_configuration_without_one_token_does_not_start_and_never_shows_it() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let state = Arc::new(State::new(table(), Arc::default(), recorder.handle()));
    let fails = |config: Config| {
        let config = Config { listen: "127.0.0.1:0".parse().unwrap(), ..config };
        spawn(&config, Arc::clone(&state), Drain::new()).unwrap_err().to_string()
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    assert!(fails(Config::default()).contains("admin.token_file"));
    assert!(fails(Config { token: Some(" ".into()), ..Config::default() }).contains("empty"));
    let both = Config { token: Some(TOKEN.into()), token_file: Some(file.clone()), ..Config::default() };
    assert!(!format!("{both:?}").contains(TOKEN));
    assert!(fails(both).contains("keep one"));
    let missing = fails(Config { token_file: Some(dir.path().join("none")), ..Config::default() });
    assert!(missing.contains("none"), "{missing}");
    assert!(Config { token_file: Some(file), ..Config::default() }.token().unwrap().matches(TOKEN.as_bytes()));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = Config { listen: taken.local_addr().unwrap(), token: Some(TOKEN.into()), ..Config::default() };
    let error = spawn(&config, state, Drain::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn stopping_closes_idle_connections_and_ends_the_thread() {
    let running = start();
    let mut idle = TcpStream::connect(running.handle.addr).unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut some = [0; 16];
    idle.read_exact(&mut some).unwrap();
    let addr = running.handle.addr;
    running.handle.stop();
    idle.read_to_end(&mut Vec::new()).unwrap();
    assert!(TcpStream::connect(addr).is_err());
}
