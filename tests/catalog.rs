//! The catalog on MongoDB under a whole dynabase: what the ordinary driver writes into it reaches open sessions of three
//! fronts; its server goes away and comes back; the operators' commands.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use bson::{Document, doc};
use dynabase::{
    catalog::{self, Catalog, Expect, KeyRecord, Record},
    identity::service_key,
    tenant::{Home, OrgId, Tenant, Tier, directory::ServiceKey},
};
use serde_json::Value;

use crate::{
    mongo::support::{Client, plain},
    support::{
        block_on,
        cable::Cable,
        mongo::{self, Own},
        proxy::{Org, Proxy, Setup},
        until,
        wire::Wire,
    },
    transition::Redis,
};

/// How soon a write to the catalog has to be enforced, on a busy machine; the budget (100 ms, p99) is measured by
/// `make bench-catalog`.
const ENFORCED_WITHIN: Duration = Duration::from_secs(5);

/// Keys that FREE may have in Redis.
const FREE_KEYS: usize = 1000;

/// A dynabase whose catalog is a database of its own behind `url`, in front of all three servers.
struct House {
    proxy: Proxy,
    _redis: Redis,
    database: String,
}

impl House {
    fn start(url: &str) -> Self {
        static DATABASES: AtomicU32 = AtomicU32::new(0);
        let database = format!("live_{}_{}", std::process::id(), DATABASES.fetch_add(1, Ordering::Relaxed));
        let redis = Redis::start();
        let sections = format!(
            "[upstream.redis]\nurl = \"redis://127.0.0.1:{}\"\n[upstream.mongodb]\nurl = \"{}\"\n",
            redis.port,
            mongo::shared().url
        );
        let proxy = Proxy::start(&Setup {
            catalog: format!("kind = \"mongodb\"\nurl = \"{url}\"\ndatabase = \"{database}\""),
            listen: "redis = \"127.0.0.1:0\"\nmongodb = \"127.0.0.1:0\"".into(),
            sections,
            files: vec![("tiers.toml", include_str!("../config/tiers.toml").into())],
            ..Setup::default()
        });
        let house = Self { proxy, _redis: redis, database };
        house.done(&["catalog", "init"]);
        house
    }

    /// Runs a command that has to succeed; gives its output.
    fn done(&self, words: &[&str]) -> String {
        let (code, out, err) = self.proxy.command(words, &[]);
        assert_eq!(code, Some(0), "{words:?}: {out}{err}");
        out
    }

    fn create(&self, org: &str, tier: &str) -> Org<'_> {
        self.done(&["tenant", "create", org, "--tier", tier]);
        Org { proxy: &self.proxy, org: OrgId::parse(org).expect("an id") }
    }

    /// What an operator's shell does to an organisation's document, straight at the catalog's server.
    fn by_hand(&self, url: &str, org: &str, set: Document) {
        let update = doc! { "$set": set, "$inc": { "epoch": 1 } };
        let (url, database, org) = (url.to_owned(), self.database.clone(), org.to_owned());
        let done = block_on(async move {
            let client = mongodb::Client::with_uri_str(&url).await.expect("a URL");
            let orgs = client.database(&database).collection::<Document>("orgs");
            orgs.update_one(doc! { "_id": org }, update).await.expect("written").modified_count
        });
        assert_eq!(done, 1);
    }

    fn shown(&self, org: &str) -> Value {
        serde_json::from_str(&self.done(&["tenant", "show", org, "--json"])).expect("JSON")
    }

    fn age(&self) -> f64 {
        self.proxy.metric("dynabase_catalog_age_seconds", "")
    }
}

/// One tenant's open sessions, each a socket that is never opened again.
struct Open {
    runtime: tokio::runtime::Runtime,
    wire: Wire,
    redis: redis::aio::MultiplexedConnection,
    mongo: Client,
}

fn redis_client(org: &Org<'_>) -> redis::Client {
    let url = format!("redis://app:{}@127.0.0.1:{}/0", org.token(), org.proxy.port_of("Redis"));
    redis::Client::open(url).expect("a URL")
}

impl Open {
    fn of(org: &Org<'_>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (redis, mongo) = runtime.block_on(async {
            let redis = redis_client(org).get_multiplexed_async_connection().await.expect("it logs in");
            (redis, mongo_client(org).await)
        });
        Self { runtime, wire: org.wire(), redis, mongo }
    }

    fn redis(&mut self, words: &[&str]) -> redis::RedisResult<redis::Value> {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        self.runtime.block_on(command.query_async(&mut self.redis))
    }

    fn mongo(&mut self, command: Document) -> Document {
        self.runtime.block_on(self.mongo.run(command))
    }

    /// All three answer.
    fn serves(&mut self) {
        assert_eq!(self.wire.ask("select 1"), "1");
        self.redis(&["GET", "nothing"]).expect("an answer");
        let told = self.mongo(doc! { "count": "things", "$db": "app" });
        assert_eq!(told.get_f64("ok").ok(), Some(1.0), "{told}");
    }

    /// All three have ended.
    fn has_ended(&mut self) {
        self.runtime.block_on(self.mongo.closed());
        until("the Redis session ends", || self.redis(&["GET", "nothing"]).is_err());
        while self.wire.read().is_some() {}
    }
}

async fn mongo_client(org: &Org<'_>) -> Client {
    let mut client = Client::connect(org.proxy.port_of("MongoDB")).await;
    let told = client.run(plain(&org.token())).await;
    assert_eq!(told.get_bool("done").ok(), Some(true), "{told}");
    client
}

/// What logging in to each front is answered with: Postgres' SQLSTATE, Redis' text, MongoDB's reply.
fn refusals(org: &Org<'_>) -> (String, String, Document) {
    let wire = Wire::login(org.proxy.address(), &org.token(), &[]).err().map(|told| told.field(b'C'));
    let token = org.token();
    // In its own words, for which the driver has words of its own.
    let mut socket = TcpStream::connect(("127.0.0.1", org.proxy.port_of("Redis"))).expect("it accepts");
    let auth = format!("*3\r\n$4\r\nAUTH\r\n$3\r\napp\r\n${}\r\n{token}\r\n", token.len());
    socket.write_all(auth.as_bytes()).expect("sent");
    let mut redis = String::new();
    BufReader::new(socket).read_line(&mut redis).expect("an answer");
    let port = org.proxy.port_of("MongoDB");
    let mongo = block_on(async move { Client::connect(port).await.run(plain(&token)).await });
    (wire.unwrap_or_default(), redis, mongo)
}

/// Waits for a thing to be so that has to be so at once.
fn soon(what: &str, condition: impl FnMut() -> bool) {
    let since = Instant::now();
    until(what, condition);
    assert!(since.elapsed() < ENFORCED_WITHIN, "{what}: {:?}", since.elapsed());
}

/// Statements inside a transaction: each holds one of the tenant's connections.
fn begin(client: &mut Client, runtime: &tokio::runtime::Runtime, number: u8) {
    let id = bson::Binary { subtype: bson::spec::BinarySubtype::Uuid, bytes: vec![number; 16] };
    let told = runtime.block_on(client.run(doc! {
        "insert": "things", "documents": [{ "n": i32::from(number) }], "lsid": { "id": id }, "txnNumber": 1_i64,
        "autocommit": false, "startTransaction": true, "$db": "app",
    }));
    assert_eq!(told.get_f64("ok").ok(), Some(1.0), "{told}");
}

#[test]
fn an_edit_by_the_ordinary_driver_reaches_open_sessions_of_three_fronts() {
    let url = &mongo::shared().url;
    let house = House::start(url);
    let org = house.create("edited", "FREE");
    let mut open = Open::of(&org);
    open.serves();

    // Redis: one key more than FREE has.
    let keys: Vec<String> = (0..FREE_KEYS).flat_map(|n| [format!("k{n}"), "1".into()]).collect();
    let words: Vec<&str> = std::iter::once("MSET").chain(keys.iter().map(String::as_str)).collect();
    open.redis(&words).expect("as many as FREE has");
    let full = open.redis(&["SET", "one more", "1"]).expect_err("one more than FREE has").to_string();
    assert!(full.contains("OOM") && full.contains("keys of the tier"), "{full}");
    // The first document makes the collection, which two transactions can't do at once.
    let told = open.mongo(doc! { "insert": "things", "documents": [{ "n": 0 }], "$db": "app" });
    assert_eq!(told.get_i32("n").ok(), Some(1), "{told}");
    // Postgres and MongoDB: all of FREE's connections are in use, five and two; who comes next waits.
    let mut held: Vec<Wire> = (0..5).map(|_| org.wire()).collect();
    held.iter_mut().for_each(|wire| drop(wire.query("begin")));
    begin(&mut open.mongo, &open.runtime, 1);
    begin(&mut open.mongo, &open.runtime, 2);
    let (mut sixth, mut third) = (org.wire(), open.runtime.block_on(mongo_client(&org)));
    sixth.send(&crate::support::wire::query("select 6"));
    let waiting = open.runtime.spawn(async move { third.run(doc! { "count": "things", "$db": "app" }).await });
    until("both wait", || {
        let seen: Value = serde_json::from_str(&org.proxy.admin("/v1/tenants/edited")).expect("JSON");
        let protocols = seen["protocols"].as_array().cloned().unwrap_or_default();
        let used = |name: &str| {
            protocols.iter().find(|one| one["protocol"] == name).map(|one| one["connections"]["used"].clone())
        };
        used("postgres") == Some(5.into()) && used("mongodb") == Some(2.into())
    });
    assert!(!waiting.is_finished());

    // As a shell does it.
    house.by_hand(url, "edited", doc! { "tier": "STARTER" });
    soon("Redis takes more", || open.redis(&["SET", "one more", "1"]).is_ok());
    assert_eq!(sixth.up_to(b'Z').value(), "6");
    let told = open.runtime.block_on(waiting).expect("it ran");
    assert_eq!(told.get_f64("ok").ok(), Some(1.0), "{told}");
    open.serves();

    // And down again: what is there stays, one more is refused.
    house.by_hand(url, "edited", doc! { "tier": "FREE" });
    let mut n = 0;
    soon("Redis takes no more", || {
        n += 1;
        open.redis(&["SET", &format!("more {n}"), "1"]).is_err()
    });
    assert_eq!(house.shown("edited")["tier"], "FREE");

    drop(held);
    house.by_hand(url, "edited", doc! { "status": "suspended" });
    open.has_ended();
    let (sqlstate, redis, mongo) = refusals(&org);
    assert!(!sqlstate.is_empty() && redis.contains("suspended"), "{sqlstate} {redis}");
    assert!(mongo.get_str("errmsg").is_ok_and(|text| text.contains("suspended")), "{mongo}");
    house.by_hand(url, "edited", doc! { "status": "active" });
    soon("it is served again", || Wire::login(org.proxy.address(), &org.token(), &[]).is_ok());
    Open::of(&org).serves();
}

#[test]
fn while_the_catalog_is_away_the_known_go_on_and_what_came_after_is_enforced() {
    let mut server = Own::start(None);
    let mut cable = Cable::to(server.place.port);
    let house = House::start(&cable.url(&server.place.url));
    let (known, stranger) = (house.create("known", "FREE"), house.create("stranger", "FREE"));
    let mut open = Open::of(&known);
    open.serves();
    assert!(house.age() < 2.0, "{}", house.age());

    server.stop();
    cable.cut();
    until("the metric rises", || house.age() > 3.0);
    let risen = house.age();
    assert_eq!(
        house.proxy.metric("dynabase_ready", ""),
        1.0,
        "known tenants are served: {}",
        house.proxy.admin("/readyz")
    );
    // Open sessions, and new ones of who is known.
    open.serves();
    Open::of(&known).serves();
    // Who is not known is told to come again, in each database's words, and at once.
    let since = Instant::now();
    let (sqlstate, redis, mongo) = refusals(&stranger);
    assert!(since.elapsed() < Duration::from_secs(3), "{:?}", since.elapsed());
    assert_eq!(sqlstate, "57P03");
    assert!(redis.contains("catalog is unavailable; try again"), "{redis}");
    assert_eq!(mongo.get_i32("code").ok(), Some(462), "{mongo}");
    let labels = mongo.get_array("errorLabels").expect("labels");
    assert!(labels.contains(&"RetryableError".into()), "{mongo}");
    until("it goes on rising", || house.age() > risen + 1.0);

    // It comes back, and is edited before dynabase can see it.
    server.start_again();
    house.by_hand(&server.place.url, "known", doc! { "status": "suspended" });
    open.serves();
    cable.mend_to(server.place.port);
    open.has_ended();
    assert!(house.proxy.log().contains("from where it broke off"), "{}", house.proxy.log());
    until("the metric falls", || house.age() < 2.0);
    Open::of(&stranger).serves();
    // And followed: an edit made after.
    house.by_hand(&server.place.url, "known", doc! { "status": "active" });
    soon("it is served again", || Wire::login(known.proxy.address(), &known.token(), &[]).is_ok());
    let mut open = Open::of(&stranger);
    house.by_hand(&server.place.url, "stranger", doc! { "status": "suspended" });
    open.has_ended();
}

#[test]
fn it_starts_while_the_catalog_is_away_and_is_ready_once_it_was_reached() {
    let server = Own::start(None);
    let cable = Cable::to(server.place.port);
    cable.cut();
    let url = cable.url(&server.place.url);
    let catalog = format!("kind = \"mongodb\"\nurl = \"{url}\"\ndatabase = \"later\"");
    let proxy = Proxy::start(&Setup { catalog, ..Setup::default() });
    assert!(proxy.admin("/readyz").contains("catalog"), "{}", proxy.admin("/readyz"));
    assert_eq!(proxy.metric("dynabase_ready", ""), 0.0);
    let org = Org { proxy: &proxy, org: OrgId::parse("anybody").expect("an id") };
    let told = Wire::login(proxy.address(), &org.token(), &[]).expect_err("nobody is known");
    assert_eq!(told.field(b'C'), "57P03");
    cable.mend();
    until("it is ready", || proxy.metric("dynabase_ready", "") == 1.0);
    // Now it can tell that there is no such organisation.
    until("it is known to be nobody", || {
        Wire::login(proxy.address(), &org.token(), &[]).is_err_and(|told| told.field(b'C') != "57P03")
    });
}

/// Every document of a folder by its file's name.
fn documents(folder: &Path) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for part in ["orgs", "service_keys"] {
        for entry in std::fs::read_dir(folder.join(part)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if let Ok(value) = serde_json::from_slice(&std::fs::read(&path).expect("readable")) {
                found.insert(format!("{part}/{name}"), value);
            }
        }
    }
    found
}

#[test]
fn a_folder_goes_to_mongodb_and_comes_back_the_same() {
    let place = mongo::shared();
    let house = House::start(&place.url);
    let folders = tempfile::tempdir().expect("a folder");
    let (from, back) = (folders.path().join("from"), folders.path().join("back"));
    const ORGS: usize = 150;
    block_on(async {
        let catalog = Catalog::open(&catalog::Config::folder(&from)).await.expect("a folder");
        for n in 0..ORGS {
            let org = OrgId::parse(&format!("moved-{n}")).expect("an id");
            let mut tenant = Tenant { epoch: n as u64 + 1, ..Tenant::new(org.clone(), Tier::ALL[n % 4]) };
            tenant.routes.postgres = [None, Some(Home::Main), Some(Home::Neon)][n % 3];
            catalog.put(Record::new(tenant), Expect::Absent).await.expect("kept");
            if n % 10 == 0 {
                let hash = service_key::mint().expect("randomness").hash();
                let key = ServiceKey { hash, org, user: "app".into(), expires_at: None };
                catalog.create_key(KeyRecord::new(key)).await.expect("kept");
            }
        }
    });
    // A field that is nobody's but an operator's comes along.
    let noted = from.join("orgs/moved-7.json");
    let mut document: Value = serde_json::from_slice(&std::fs::read(&noted).expect("there")).expect("JSON");
    document["note"] = serde_json::json!({ "since": "2020", "seats": [1, 2.5, null] });
    std::fs::write(&noted, document.to_string()).expect("written");
    let (there, folder) = (documents(&from), from.display().to_string());
    assert_eq!(there.len(), ORGS + ORGS / 10);

    // Damaged ones are named and left out, the others go.
    std::fs::write(from.join("orgs/damaged.json"), "{\"org_id\":").expect("written");
    let (code, out, err) = house.proxy.command(&["catalog", "import", "--folder", &folder], &[]);
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("organisations: 150 copied, 0 were there already, 1 damaged"), "{out}");
    assert!(out.contains("service keys: 15 copied, 0 were there already, 0 damaged"), "{out}");
    assert!(err.contains("damaged"), "{err}");
    // The same again changes nothing.
    std::fs::remove_file(from.join("orgs/damaged.json")).expect("removed");
    let out = house.done(&["catalog", "import", "--folder", &folder]);
    assert!(out.contains("organisations: 0 copied, 150 were there already, 0 damaged"), "{out}");
    let again = house.proxy.command(&["catalog", "init"], &[]);
    assert!(again.0 == Some(0) && again.2.contains("was there"), "{again:?}");

    let back_name = back.display().to_string();
    let out = house.done(&["catalog", "export", "--folder", &back_name]);
    assert!(out.contains("organisations: 150 copied"), "{out}");
    assert_eq!(documents(&back), there);

    // What MongoDB has and nobody can read.
    let (url, database) = (place.url.clone(), house.database.clone());
    block_on(async move {
        let database = mongodb::Client::with_uri_str(&url).await.expect("a URL").database(&database);
        let off = doc! { "collMod": "orgs", "validator": {}, "validationLevel": "off" };
        database.run_command(off).await.expect("an administrator may");
        let orgs = database.collection::<Document>("orgs");
        orgs.insert_one(doc! { "_id": "worn", "tier": "GOLD", "status": "active", "epoch": 1 }).await.expect("written");
    });
    let other = folders.path().join("other").display().to_string();
    let (code, out, err) = house.proxy.command(&["catalog", "export", "--folder", &other], &[]);
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("organisations: 150 copied, 0 were there already, 1 damaged"), "{out}");
    assert!(err.contains("worn: "), "{err}");
    let nowhere = folders.path().join("nowhere").display().to_string();
    assert_eq!(house.proxy.command(&["catalog", "import", "--folder", &nowhere], &[]).0, Some(2));
}

#[test]
fn a_tenant_is_made_shown_suspended_and_deleted_in_all_databases() {
    let place = mongo::shared();
    let house = House::start(&place.url);
    let words = |command: &'static str, org: &'static str| vec!["tenant", command, org];
    // One of each isolation.
    for (org, tier) in [("made-free", "FREE"), ("made-pro", "PRO")] {
        let (code, _, err) = house.proxy.command(&["tenant", "create", org, "--tier", tier], &[]);
        assert_eq!(code, Some(0), "{err}");
        assert_eq!(err.contains("gets 11000 for one that another tenant holds"), tier == "FREE", "{err}");
        let tenant = Org { proxy: &house.proxy, org: OrgId::parse(org).expect("an id") };
        let mut open = Open::of(&tenant);
        open.serves();
        open.wire.query("create table t (x int)");
        open.redis(&["SET", "a", "1"]).expect("set");
        let told = open.mongo(doc! { "insert": "made", "documents": [{ "n": 1 }], "$db": "app" });
        assert_eq!(told.get_i32("n").ok(), Some(1), "{told}");
        let (code, out, err) = house.proxy.command(&["tenant", "create", org, "--tier", tier], &[]);
        assert!(code == Some(1) && err.contains("exists"), "{out}{err}");

        let shown = house.shown(org);
        assert_eq!((&shown["tier"], &shown["status"], &shown["epoch"]), (&tier.into(), &"active".into(), &1.into()));
        assert!(house.done(&["tenant", "list"]).contains(org));
        let list: Value = serde_json::from_str(&house.done(&["tenant", "list", "--json"])).expect("JSON");
        assert!(list.as_array().is_some_and(|all| all.iter().any(|one| one["org_id"] == org)), "{list}");

        house.done(&words("suspend", org));
        open.has_ended();
        assert_eq!(house.shown(org)["status"], "suspended");
        assert!(!refusals(&tenant).0.is_empty());
        house.done(&words("resume", org));
        soon("it is served again", || Wire::login(tenant.proxy.address(), &tenant.token(), &[]).is_ok());
        let mut open = Open::of(&tenant);
        assert_eq!(open.redis(&["GET", "a"]).expect("kept"), redis::Value::BulkString(b"1".into()));
        let told = open.mongo(doc! { "count": "made", "$db": "app" });
        assert_eq!(told.get_i32("n").ok(), Some(1), "its data stays: {told}");

        let (code, _, err) = house.proxy.command(&["tenant", "delete", org, "--now"], &[]);
        assert!(code == Some(2) && err.contains("--yes"), "{err}");
        house.done(&["tenant", "delete", org, "--now", "--yes"]);
        open.has_ended();
        let (code, _, err) = house.proxy.command(&["tenant", "show", org], &[]);
        assert!(code == Some(1) && err.contains(org), "{err}");
        let role = tenant.role();
        assert_eq!(house.proxy.server.value(&format!("select count(*) from pg_roles where rolname = '{role}'")), "0");
        // Nothing of it is left on MongoDB: no user, no database, no document.
        let (url, org) = (place.url.clone(), org.to_owned());
        block_on(async move {
            let client = mongodb::Client::with_uri_str(&url).await.expect("a URL");
            let names = client.list_database_names().await.expect("listed");
            assert!(!names.iter().any(|name| name.starts_with(&role)), "{names:?}");
            let shared = client.database("shared_app").collection::<Document>("made");
            assert_eq!(shared.count_documents(doc! { "org_id": org }).await.expect("counted"), 0);
            let users = client.database("admin").run_command(doc! { "usersInfo": 1 }).await.expect("listed");
            assert!(!users.to_string().contains(&role), "{users}");
        });
    }
}
