//! The steps of a tenant's life over real servers: made, deleted and taken back, purged, its credentials rotated; with
//! sessions open, and with the process killed at every step.

use bson::{Document, doc};
use dynabase::tenant::{OrgId, Protocol};
use redis::Commands;
use serde_json::Value;

use crate::{
    support::{
        block_on, eventually,
        proxy::{Org, Proxy, Setup},
        until,
    },
    transition::{Redis, mongodb, states},
};

/// A proxy before all five databases.
struct Five {
    proxy: Proxy,
    redis: Redis,
    mongodb: dynabase::cli::dev::mongo::Server,
    _folder: tempfile::TempDir,
}

impl Five {
    fn start(more: &str) -> Self {
        let redis = Redis::start();
        let folder = tempfile::tempdir().expect("a folder");
        let mongodb = mongodb(&folder);
        let postgres = crate::support::postgres::shared();
        let sections = format!(
            "[upstream.redis]\nurl = \"redis://127.0.0.1:{}\"\n[upstream.mongodb]\nurl = \"{}\"\n\
             [upstream.neon]\nurl = \"{}\"\n[upstream.convex]\npublic_url = \"http://127.0.0.1:1\"\n{more}",
            redis.port,
            mongodb.url(),
            postgres.url
        );
        let listen = "redis = \"127.0.0.1:0\"\nmongodb = \"127.0.0.1:0\"\nhttp = \"127.0.0.1:0\"".to_owned();
        let proxy = Proxy::start(&Setup { sections, listen, ..Setup::default() });
        Self { proxy, redis, mongodb, _folder: folder }
    }

    fn done(&self, words: &[&str]) -> String {
        let (code, out, err) = self.proxy.command(words, &[]);
        assert_eq!(code, Some(0), "{words:?}: {out}{err}");
        out
    }

    fn redis(&self, org: &Org<'_>) -> Result<redis::Connection, redis::RedisError> {
        let url = format!("redis://app:{}@127.0.0.1:{}/0", org.token(), self.proxy.port_of("Redis"));
        redis::Client::open(url)?.get_connection()
    }

    async fn mongo(&self, org: &Org<'_>) -> mongodb::Client {
        let port = self.proxy.port_of("MongoDB");
        let url = format!(
            "mongodb://app:{}@127.0.0.1:{port}/app?authMechanism=PLAIN&directConnection=true&maxPoolSize=1\
             &serverSelectionTimeoutMS=3000",
            org.token()
        );
        mongodb::Client::with_uri_str(url).await.expect("a URL")
    }

    /// Writes one thing of each kind.
    fn fill(&self, org: &Org<'_>) {
        assert_eq!(org.wire().query("create table kept (x int); insert into kept values (7)").codes(), [""; 0]);
        self.redis(org).expect("in").set::<_, _, ()>("kept", "7").expect("set");
        block_on(async {
            let kept = self.mongo(org).await.database("app").collection::<Document>("kept");
            kept.insert_one(doc! { "_id": 7 }).await.expect("inserted");
        });
    }

    /// Whether all of it is there.
    fn filled(&self, org: &Org<'_>) -> bool {
        let postgres = org.wire().ask("select to_regclass('kept') is not null") == "t";
        let redis: Option<String> = self.redis(org).expect("in").get("kept").expect("asked");
        let mongodb = block_on(async {
            let kept = self.mongo(org).await.database("app").collection::<Document>("kept");
            kept.find_one(doc! { "_id": 7 }).await.expect("asked")
        });
        assert_eq!((redis.is_some(), mongodb.is_some()), (postgres, postgres), "all or nothing");
        postgres
    }

    fn holdings(&self, org: &str) -> Value {
        let out = self.done(&["tenant", "delete", org, "--dry-run", "--json"]);
        serde_json::from_str(&out).expect("JSON")
    }

    /// What is left of a tenant, read behind the proxy.
    fn left(&self, org: &str) -> Vec<String> {
        let id = OrgId::parse(org).expect("an id");
        let names = self.proxy.config.names().expect("our own");
        let mut left = Vec::new();
        for protocol in [Protocol::Postgres, Protocol::Neon] {
            let role = names.sql(protocol, &id, "app").role;
            for (what, query) in [
                ("role", format!("select count(*) from pg_roles where rolname = '{role}'")),
                ("database", format!("select count(*) from pg_database where datname like '{role}%'")),
            ] {
                if self.proxy.server.value(&query) != "0" {
                    left.push(format!("{} {what}", protocol.label()));
                }
            }
        }
        let mut admin = redis::Client::open(format!("redis://127.0.0.1:{}", self.redis.port))
            .and_then(|client| client.get_connection())
            .expect("Redis");
        let user = names.redis(&id).user;
        let users: Vec<String> = redis::cmd("ACL").arg("USERS").query(&mut admin).expect("users");
        if users.contains(&user) {
            left.push("redis user".into());
        }
        let info: String = redis::cmd("INFO").arg("keyspace").query(&mut admin).expect("keyspace");
        // The platform's own keys are in database 0.
        if info.lines().any(|line| line.starts_with("db") && !line.starts_with("db0:")) {
            left.push(format!("redis keys: {info}"));
        }
        let documents = block_on(async {
            let client = mongodb::Client::with_uri_str(self.mongodb.url()).await.expect("a URL");
            let mut found = 0;
            for name in client.list_database_names().await.expect("names") {
                if name.starts_with(&user) {
                    return u64::MAX;
                }
                if name.starts_with("shared_") {
                    let database = client.database(&name);
                    for collection in database.list_collection_names().await.expect("names") {
                        let mine = doc! { "org_id": org };
                        let collection = database.collection::<Document>(&collection);
                        found += collection.count_documents(mine).await.expect("counted");
                    }
                }
            }
            found
        });
        if documents > 0 {
            left.push(format!("{documents} documents"));
        }
        left
    }
}

fn held<'a>(all: &'a Value, database: &str) -> &'a Vec<Value> {
    let found = all["databases"].as_array().expect("five").iter().find(|it| it["database"] == database);
    found.expect("it is there")["holdings"].as_array().expect("a list")
}

#[test]
fn a_deletion_can_be_taken_back_until_the_purge_and_that_leaves_nothing() {
    let five = Five::start("");
    five.done(&["tenant", "create", "acme", "--tier", "FREE"]);
    assert_eq!(states(&five.proxy, "acme").0, Some(0));
    let org = five.proxy.org("acme");
    five.fill(&org);
    let before = five.holdings("acme");
    assert!(held(&before, "postgres")[0]["bytes"].as_u64() > Some(1 << 20), "{before}");
    assert_eq!(held(&before, "redis")[0]["count"], 1, "{before}");
    assert_eq!((&held(&before, "mongodb")[0]["count"], &before["purge_after"]), (&1.into(), &Value::Null), "{before}");
    let out = five.done(&["tenant", "delete", "acme", "--dry-run"]);
    assert!(out.contains("shared collection app.kept"), "{out}");
    assert!(five.filled(&org), "a dry run changes nothing");
    // Nothing of a tenant that is served can be purged.
    assert_eq!(five.proxy.command(&["tenant", "purge", "acme", "--yes"], &[]).0, Some(1));

    let mut wire = org.wire();
    wire.query("select 1");
    let mut live = five.redis(&org).expect("in");
    let (code, _, err) = five.proxy.command(&["tenant", "delete", "acme"], &[]);
    assert!(code == Some(0) && err.contains("tenant restore acme"), "{err}");
    // Live sessions end in their own words, and new ones are refused.
    until("the session of before ends", || {
        wire.try_send(b"").is_err() || wire.read().is_none_or(|it| it.field(b'C') == "57P01")
    });
    until("the Redis session ends", || live.get::<_, Option<String>>("kept").is_err());
    let refused = crate::support::wire::Wire::login(five.proxy.address(), &org.token(), &[]).expect_err("refused");
    assert_eq!(refused.field(b'S'), "FATAL");
    assert!(five.redis(&org).is_err());
    let refused = block_on(async { five.mongo(&org).await.database("app").run_command(doc! { "ping": 1 }).await });
    assert!(refused.is_err());
    assert_eq!(five.proxy.command(&["tier", "set", "acme", "PRO"], &[]).0, Some(1), "it is being deleted");
    let kept = five.holdings("acme");
    assert!(kept["purge_after"].is_string());
    assert_eq!(held(&kept, "redis"), held(&before, "redis"));
    assert_eq!(held(&kept, "mongodb"), held(&before, "mongodb"));
    // Once more is no failure.
    five.done(&["tenant", "delete", "acme"]);

    five.done(&["tenant", "restore", "acme"]);
    until("it is served again", || five.redis(&org).is_ok());
    assert!(five.filled(&org));
    assert_eq!(five.holdings("acme")["purge_after"], Value::Null);
    assert_eq!(five.proxy.command(&["tenant", "restore", "acme"], &[]).0, Some(1), "it is not deleted");

    five.done(&["tenant", "delete", "acme"]);
    assert_eq!(five.proxy.command(&["tenant", "purge", "acme"], &[]).0, Some(2), "not without --yes");
    five.done(&["tenant", "purge", "acme", "--yes"]);
    assert_eq!(five.left("acme"), [""; 0]);
    assert_eq!(five.proxy.command(&["tenant", "show", "acme"], &[]).0, Some(1));
    // Another tenant of that name begins with nothing.
    five.done(&["tenant", "create", "acme", "--tier", "STARTER"]);
    until("it is served", || five.redis(&org).is_ok());
    assert!(!five.filled(&org));
}

#[test]
fn when_its_grace_is_over_a_deleted_tenant_is_purged_by_itself_and_others_stay() {
    let five = Five::start("[tenants]\ngrace = \"1h\"\ninterval = \"1s\"\n");
    for org in ["acme", "globex"] {
        five.done(&["tenant", "create", org]);
        until("it is served", || five.redis(&five.proxy.org(org)).is_ok());
    }
    five.fill(&five.proxy.org("acme"));
    five.done(&["tenant", "delete", "globex"]);
    five.done(&["tenant", "delete", "acme", "--grace", "1s"]);
    until("it is purged", || five.proxy.command(&["tenant", "show", "acme"], &[]).0 == Some(1));
    let shown: Value = serde_json::from_str(&five.done(&["tenant", "show", "globex", "--json"])).expect("JSON");
    assert_eq!(shown["status"], "deleting", "its hour is not over");
    let id = OrgId::parse("acme").expect("an id");
    let role = five.proxy.config.names().expect("our own").sql(Protocol::Postgres, &id, "app").role;
    assert_eq!(five.proxy.server.value(&format!("select count(*) from pg_roles where rolname = '{role}'")), "0");
    five.done(&["tenant", "delete", "globex", "--now", "--yes"]);
    assert_eq!((five.left("acme"), five.left("globex")), (vec![], vec![]));
}

/// Whether a password lets a role in.
fn lets_in(five: &Five, generation: u32) -> bool {
    let id = OrgId::parse("acme").expect("an id");
    let names = five.proxy.config.names().expect("our own");
    let role = names.postgres(&id, "app").role;
    let password = names.password("postgres", &id, generation);
    let (host, rest) = five.proxy.server.url.split_once('@').expect("a login");
    let at = rest.split('/').next().expect("a host");
    assert!(host.starts_with("postgres"));
    let url = format!("postgres://{role}:{}@{at}/{role}", password.expose());
    block_on(async {
        match tokio_postgres::connect(&url, tokio_postgres::NoTls).await {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.code().map(|it| it.code()), Some("28P01"), "{error}");
                false
            }
        }
    })
}

#[test]
fn credentials_are_rotated_under_open_sessions_and_the_old_ones_are_worth_nothing() {
    let five = Five::start("");
    five.done(&["tenant", "create", "acme", "--tier", "ENTERPRISE"]);
    let org = five.proxy.org("acme");
    until("it is served", || five.redis(&org).is_ok());
    five.fill(&org);
    let mut wire = org.wire();
    wire.query("begin; create temporary table mine (x int)");
    let mut live = five.redis(&org).expect("in");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let kept = runtime.block_on(async {
        let kept = five.mongo(&org).await.database("app").collection::<Document>("kept");
        kept.find_one(doc! {}).await.expect("asked");
        kept
    });
    assert!(lets_in(&five, 1) && !lets_in(&five, 2));
    for generation in 2..5 {
        five.done(&["tenant", "rotate", "acme"]);
        assert!(lets_in(&five, generation) && !lets_in(&five, generation - 1), "{generation}");
        // The sessions of before go on, and new ones come in.
        assert_eq!(wire.query("insert into mine values (1)").codes(), [""; 0]);
        live.set::<_, _, ()>("more", generation).expect("set");
        let more = doc! { "_id": i64::from(generation) };
        runtime.block_on(async { kept.insert_one(more).await }).expect("inserted");
        assert!(five.filled(&org));
        assert!(lets_in(&five, generation), "nobody has taken it back");
    }
    assert_eq!(wire.query("commit").codes(), [""; 0]);
    let shown: Value = serde_json::from_str(&five.done(&["tenant", "show", "acme", "--json"])).expect("JSON");
    assert_eq!(shown["generation"], 4);
    // Redis knows the last one alone.
    let names = five.proxy.config.names().expect("our own");
    let mut stranger = redis::Client::open(format!("redis://127.0.0.1:{}", five.redis.port))
        .and_then(|client| client.get_connection())
        .expect("Redis");
    for generation in 1..6 {
        let password = names.password("redis", &org.org, generation);
        let user = names.redis(&org.org).user;
        let said: Result<(), _> = redis::cmd("AUTH").arg(user).arg(password.expose()).query(&mut stranger);
        assert_eq!(said.is_ok(), generation == 4, "{generation}");
    }
}

/// The command, killed at the n-th point; gives the point's name.
fn killed(proxy: &Proxy, words: &[&str], point: u64) -> Option<String> {
    let (code, _, err) = proxy.command(words, &[("DYNABASE_TEST_FAILPOINT", &point.to_string())]);
    let name = err.lines().find_map(|line| line.strip_prefix("failpoint ")).map(str::to_owned);
    assert_eq!(code.is_none(), name.is_some(), "{err}");
    name
}

/// Carries on after a kill until the tenant is (not) there and nothing is open.
fn settled(proxy: &Proxy, words: &[&str], there: bool) {
    eventually("it is settled", || {
        // The running process takes it up too: whoever is second is told so.
        proxy.command(words, &[]);
        let (code, out, _) = proxy.command(&["tenant", "show", "acme", "--json"], &[]);
        let status = serde_json::from_str::<Value>(&out).ok().map(|shown| shown["status"] == "active");
        let over = proxy.command(&["tier", "show", "acme", "--json"], &[]).1;
        let open = serde_json::from_str::<Value>(&over).is_ok_and(|shown| !shown["transition"].is_null());
        (!open && (status == Some(true)) == there && (code == Some(0)) == there).then_some(())
    });
}

#[test]
fn killed_at_any_step_of_its_life_the_same_command_goes_on() {
    let five = Five::start("");
    let (create, rotate) = (["tenant", "create", "acme"], ["tenant", "rotate", "acme"]);
    let purge = ["tenant", "purge", "acme", "--yes"];
    let mut seen: [Vec<String>; 3] = Default::default();
    // `make chaos` passes them all.
    let all = std::env::var_os("DYNABASE_CHAOS_RUNS").is_some();
    let mut point = if all { 1 } else { 3 };
    let mut ended = [false; 3];
    while ended != [true; 3] {
        for (at, words) in [&create[..], &rotate, &purge].into_iter().enumerate() {
            if at == 2 {
                five.done(&["tenant", "delete", "acme"]);
            }
            match killed(&five.proxy, words, point) {
                Some(name) => seen[at].push(name),
                None => ended[at] = true,
            }
            match at {
                0 => {
                    settled(&five.proxy, words, true);
                    assert_eq!(states(&five.proxy, "acme").0, Some(0), "created, killed at {point}");
                }
                1 => {
                    settled(&five.proxy, &["tier", "retry", "acme"], true);
                    assert_eq!(states(&five.proxy, "acme").0, Some(0), "rotated, killed at {point}");
                    let org = five.proxy.org("acme");
                    until("it gets in", || five.redis(&org).is_ok());
                    assert_eq!(org.wire().ask("select 1"), "1");
                }
                _ => {
                    settled(&five.proxy, words, false);
                    assert_eq!(five.left("acme"), [""; 0], "purged, killed at {point}");
                }
            }
        }
        point += if all { 1 } else { 5 };
    }
    println!("killed at {} points: {seen:?}", seen.iter().map(Vec::len).sum::<usize>());
    if !all {
        return;
    }
    for (names, wanted) in seen.iter().zip([
        &[
            "before a draft",
            "after a draft",
            "before the intent",
            "after a call",
            "after the decision",
            "before the end",
        ][..],
        &["before the intent", "after a call", "before the decision", "after the decision", "after the end"],
        &["after the decision", "before a call", "after a call", "before the end", "before a record"],
    ]) {
        for name in wanted {
            assert!(names.iter().any(|it| it == name), "{name} was not passed: {names:?}");
        }
    }
}

#[test]
fn over_http_a_tenant_is_made_suspended_deleted_and_taken_back() {
    let redis = Redis::start();
    let sections = format!("[upstream.redis]\nurl = \"redis://127.0.0.1:{}\"\n", redis.port);
    let proxy = Proxy::start(&Setup { sections, listen: "redis = \"127.0.0.1:0\"".into(), ..Setup::default() });
    let carried = |method: &str, path: &str, body: &str| {
        let (status, begun) = proxy.admin_send(method, path, body);
        assert_eq!(status, 202, "{method} {path}: {begun}");
        let id = begun["id"].as_str().expect("an id").to_owned();
        eventually("it is over", || {
            let entry: Value = serde_json::from_str(&proxy.admin(&format!("/v1/transitions/{id}"))).expect("JSON");
            (entry["state"] == "done").then_some(entry)
        })
    };
    assert_eq!(carried("PUT", "/v1/tenants/acme", "{\"tier\":\"FREE\"}")["deed"], "create");
    let org = proxy.org("acme");
    until("it is served", || shown(&proxy)["status"] == "active");
    assert_eq!(org.wire().ask("select 1"), "1");
    assert_eq!(proxy.admin_send("PUT", "/v1/tenants/acme", "{\"tier\":\"FREE\"}").0, 409);
    carried("POST", "/v1/tenants/acme/suspend", "");
    until("it is refused", || shown(&proxy)["status"] == "suspended");
    assert_eq!(proxy.admin_send("POST", "/v1/tenants/acme/suspend", "").0, 200, "it is so already");
    carried("DELETE", "/v1/tenants/acme", "{\"grace\":3600}");
    let held: Value = serde_json::from_str(&proxy.admin("/v1/tenants/acme/holdings")).expect("JSON");
    assert!(
        held["purge_after"].is_string() && held["databases"][0]["holdings"][0]["bytes"].as_u64() > Some(0),
        "{held}"
    );
    carried("POST", "/v1/tenants/acme/restore", "");
    until("it is what it was", || shown(&proxy)["status"] == "suspended");
    carried("POST", "/v1/tenants/acme/resume", "");
    until("it is served", || shown(&proxy)["status"] == "active");
    carried("POST", "/v1/tenants/acme/rotate", "");
    assert_eq!(org.wire().ask("select 1"), "1");
    for (method, path, body, status) in [
        ("POST", "/v1/tenants/acme/purge", "", 409),
        ("POST", "/v1/tenants/acme/restore", "", 409),
        ("POST", "/v1/tenants/acme/rotate", "{\"tier\":\"PRO\"}", 400),
        ("PUT", "/v1/tenants/other", "", 400),
        ("DELETE", "/v1/tenants/other", "", 404),
        ("DELETE", "/v1/tenants/A%20B", "", 400),
        ("DELETE", "/v1/tenants/acme/tier", "", 405),
        ("POST", "/v1/tenants/acme", "", 405),
    ] {
        assert_eq!(proxy.admin_send(method, path, body).0, status, "{method} {path}");
    }
    carried("DELETE", "/v1/tenants/acme", "");
    carried("POST", "/v1/tenants/acme/purge", "");
    assert_eq!(proxy.admin_send("GET", "/v1/tenants/acme/holdings", "").0, 404);
}

fn shown(proxy: &Proxy) -> Value {
    serde_json::from_str(&proxy.admin("/v1/tenants/acme")).expect("JSON")
}
