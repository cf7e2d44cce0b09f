//! A tenant works on all five databases at once while its tier goes up and down: nothing is refused, and what was
//! acknowledged is there, once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bson::{Document, doc};
use futures_util::TryStreamExt;
use redis::Commands;
use serde_json::{Value, json};

use crate::{
    dev,
    neon::ask,
    support::{block_on, eventually},
};

/// Transitions in `make test`; `make chaos` sets `DYNABASE_CHAOS_RUNS`.
const TRANSITIONS: u64 = 4;

/// Transitions for which writers keep [`PACE`].
const SAME_PACE: u64 = 20;

/// One writer's pause between two requests: below FREE's 50 requests a second, and Convex' 300 calls a minute.
const PACE: Duration = Duration::from_millis(30);
const PACE_CONVEX: Duration = Duration::from_millis(250);

/// What one writer was told.
struct Told {
    /// Numbers that were acknowledged, in their order.
    done: Vec<i64>,
    refused: Vec<String>,
    longest: Duration,
}

/// Writes 0, 1, 2 … until told to stop.
fn writer(
    stop: &Arc<AtomicBool>,
    pace: Duration,
    mut write: impl FnMut(i64) -> Result<(), String> + Send + 'static,
) -> JoinHandle<Told> {
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let mut told = Told { done: Vec::new(), refused: Vec::new(), longest: Duration::ZERO };
        for n in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let began = Instant::now();
            match write(n) {
                Ok(()) => told.done.push(n),
                Err(why) => told.refused.push(why),
            }
            told.longest = told.longest.max(began.elapsed());
            std::thread::sleep(pace);
        }
        told
    })
}

/// A body that may have come in chunks.
fn whole(body: &str) -> String {
    if body.starts_with(['{', '[']) {
        return body.to_owned();
    }
    let (mut whole, mut left) = (String::new(), body);
    while let Some((length, rest)) = left.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).expect("a length");
        whole.push_str(&rest[..length]);
        left = rest[length..].trim_start_matches("\r\n");
    }
    whole
}

/// One tenant of `dynabase dev`.
#[derive(Clone)]
struct Tenant {
    ready: Value,
    runtime: Arc<tokio::runtime::Runtime>,
}

impl Tenant {
    fn url(&self, database: &str) -> &str {
        self.ready["tenants"][0]["urls"][database].as_str().expect("a URL")
    }

    fn port(&self, front: &str) -> u16 {
        self.ready["ports"][front].as_u64().and_then(|port| port.try_into().ok()).expect("a port")
    }

    /// One request at the HTTP door: the answer of a 200.
    fn http(&self, path: &str, header: &str, body: &Value) -> Result<Value, String> {
        let head = format!("POST {path} HTTP/1.1\r\nContent-Type: application/json\r\n{header}");
        match ask(self.port("http"), &head, &body.to_string()) {
            (200, answer) => {
                let answer = whole(&answer);
                serde_json::from_str(&answer).map_err(|error| format!("{error}: {answer}"))
            }
            (status, answer) => Err(format!("{path}: {status} {answer}")),
        }
    }

    fn sql(&self, query: &str) -> Result<Value, String> {
        let header = format!("Neon-Connection-String: {}", self.url("neon"));
        self.http("/sql", &header, &json!({"query": query, "params": []}))
    }

    fn convex(&self, kind: &str, function: &str, args: Value) -> Result<Value, String> {
        let token = self.ready["tenants"][0]["token"].as_str().expect("a token");
        let call = json!({"path": function, "args": args, "format": "json"});
        let answer = self.http(&format!("/api/{kind}"), &format!("Authorization: Bearer {token}"), &call)?;
        match answer["status"].as_str() {
            Some("success") => Ok(answer["value"].clone()),
            _ => Err(format!("{function}: {answer}")),
        }
    }

    fn admin(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let token = self.ready["admin"]["token"].as_str().expect("a token");
        let head = format!("{method} {path} HTTP/1.1\r\nAuthorization: Bearer {token}");
        let (status, answer) = ask(self.port("admin"), &head, body);
        (status, serde_json::from_str(&answer).expect("JSON"))
    }

    fn move_to(&self, tier: &str) {
        let (status, begun) = self.admin("PUT", "/v1/tenants/acme/tier", &json!({"tier": tier}).to_string());
        assert_eq!(status, 202, "{tier}: {begun}");
        let path = format!("/v1/transitions/{}", begun["id"].as_str().expect("an id"));
        let over = eventually("it is over", || {
            let (_, entry) = self.admin("GET", &path, "");
            ["done", "aborted"].contains(&entry["state"].as_str().unwrap_or("")).then_some(entry)
        });
        assert_eq!(over["state"], "done", "{tier}: {over}");
    }

    fn postgres(&self) -> tokio_postgres::Client {
        self.runtime.block_on(async {
            let (client, connection) =
                tokio_postgres::connect(self.url("postgres"), tokio_postgres::NoTls).await.expect("in");
            tokio::spawn(connection);
            client
        })
    }

    fn redis(&self) -> redis::Connection {
        redis::Client::open(self.url("redis")).and_then(|client| client.get_connection()).expect("in")
    }

    fn mongodb(&self) -> mongodb::Collection<Document> {
        let client = self.runtime.block_on(mongodb::Client::with_uri_str(self.url("mongodb"))).expect("a URL");
        client.database("app").collection("load")
    }

    fn writers(&self, stop: &Arc<AtomicBool>, pace: Duration) -> Vec<(&'static str, JoinHandle<Told>)> {
        let (client, runtime) = (self.postgres(), Arc::clone(&self.runtime));
        let postgres = writer(stop, pace, move |n| {
            let insert = format!("insert into load values ({n})");
            runtime.block_on(client.batch_execute(&insert)).map_err(|error| format!("postgres: {error:?}"))
        });
        let mut client = self.redis();
        let redis =
            writer(stop, pace, move |n| client.rpush::<_, _, ()>("load", n).map_err(|error| format!("redis: {error}")));
        let (load, runtime) = (self.mongodb(), Arc::clone(&self.runtime));
        let mongodb = writer(stop, pace, move |n| {
            let written = runtime.block_on(async { load.insert_one(doc! { "_id": n }).await });
            written.map(drop).map_err(|error| format!("mongodb: {error}"))
        });
        let tenant = self.clone();
        let neon = writer(stop, pace, move |n| tenant.sql(&format!("insert into load_http values ({n})")).map(drop));
        let tenant = self.clone();
        let convex = writer(stop, pace.max(PACE_CONVEX), move |n| {
            let args = json!({"channel": "load", "body": n.to_string()});
            tenant.convex("mutation", "messages:send", args).map(drop)
        });
        vec![("postgres", postgres), ("redis", redis), ("mongodb", mongodb), ("neon", neon), ("convex", convex)]
    }

    /// What is there, in the order of numbers.
    fn found(&self) -> BTreeMap<&'static str, Vec<i64>> {
        let client = self.postgres();
        let rows = self.runtime.block_on(client.query("select n from load order by n", &[])).expect("read");
        let postgres = rows.iter().map(|row| row.get(0)).collect();
        let mut redis: Vec<i64> = self.redis().lrange("load", 0, -1).expect("read");
        redis.sort_unstable();
        let load = self.mongodb();
        let documents: Vec<Document> = self.runtime.block_on(async {
            load.find(doc! {}).sort(doc! { "_id": 1 }).await.expect("asked").try_collect().await.expect("read")
        });
        let mongodb = documents.iter().map(|it| it.get_i64("_id").expect("a number")).collect();
        let rows = self.sql("select n::int from load_http order by n").expect("read");
        let neon = rows["rows"].as_array().expect("rows").iter().map(|row| row["n"].as_i64().expect("n")).collect();
        let sent = self.convex("query", "messages:list", json!({"channel": "load"})).expect("read");
        let number = |it: &Value| it["body"].as_str().and_then(|body| body.parse().ok()).expect("a number");
        let mut convex: Vec<i64> = sent.as_array().expect("messages").iter().map(number).collect();
        convex.sort_unstable();
        [("postgres", postgres), ("redis", redis), ("mongodb", mongodb), ("neon", neon), ("convex", convex)].into()
    }
}

#[test]
fn all_five_databases_go_on_while_the_tier_goes_up_and_down() {
    let transitions = std::env::var("DYNABASE_CHAOS_RUNS").ok().and_then(|runs| runs.parse().ok());
    let transitions = transitions.unwrap_or(TRANSITIONS);
    let folder = tempfile::tempdir().expect("a folder");
    let (dev, ready) = dev::start(folder.path(), dev::offset());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let tenant = Tenant { ready, runtime: Arc::new(runtime.expect("a runtime")) };
    block_on(async {
        let (client, connection) =
            tokio_postgres::connect(tenant.url("postgres"), tokio_postgres::NoTls).await.expect("in");
        tokio::spawn(connection);
        client.batch_execute("create table load (n bigint)").await.expect("made");
    });
    tenant.sql("create table load_http (n bigint)").expect("made");
    let stop = Arc::new(AtomicBool::new(false));
    // What is written moves with each transition: in a long run less of it at a time.
    let pace = PACE * u32::try_from(transitions / SAME_PACE).expect("few").max(1);
    let writers = tenant.writers(&stop, pace);
    let tiers = ["PRO", "FREE", "ENTERPRISE", "STARTER"];
    let mut slowest = Duration::ZERO;
    for tier in tiers.iter().cycle().take(usize::try_from(transitions).expect("few")) {
        let began = Instant::now();
        tenant.move_to(tier);
        slowest = slowest.max(began.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    let told: Vec<_> = writers.into_iter().map(|(name, it)| (name, it.join().expect("it wrote"))).collect();
    println!("{transitions} transitions, the slowest {slowest:?}");
    let mut found = tenant.found();
    for (name, told) in told {
        println!("{name}: {} acknowledged, longest wait {:?}", told.done.len(), told.longest);
        // Each front and each driver gives up in time: what had to wait longer than they let it would be here.
        assert_eq!(told.refused, [""; 0], "{name}");
        assert!(!told.done.is_empty(), "{name}");
        assert_eq!(found.remove(name).expect("read"), told.done, "{name}: what was acknowledged is what is there");
    }
    drop(dev);
}
