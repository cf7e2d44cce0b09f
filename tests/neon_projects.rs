//! Neon homes as projects at Neon: the management API is a double, the computes behind it are real PostgreSQL servers
//! with TLS, each reached by its endpoint's own name.

use std::net::Ipv4Addr;

use dynabase::tenant::Protocol;
use serde_json::{Value, json};

use crate::{
    neon::{ask, door},
    support::{
        eventually,
        neon_double::{KEY, Misdeed, NeonDouble},
        neon_ground::Ground,
        postgres,
        proxy::{Org, Proxy, Setup},
        until,
    },
};

struct World {
    ground: Ground,
    double: NeonDouble,
    proxy: Proxy,
}

impl World {
    /// With Neon homes that no tier moves anything out of.
    fn start() -> Self {
        Self::with(include_str!("../config/tiers.toml").replace("home = \"neon\"", "home = \"main\""))
    }

    fn with(tiers: String) -> Self {
        let ground = Ground::start();
        let double = NeonDouble::on(ground.clone());
        let sections = format!(
            "[upstream.neon]\napi_key = \"{KEY}\"\napi_url = \"{}\"\napi_timeout = \"20s\"\nregion = \"aws-eu-central-1\"\n\
             endpoint_address = \"{}:{}\"\nca_file = \"neon.pem\"\nstorage_interval = \"1h\"",
            double.address,
            Ipv4Addr::LOCALHOST,
            ground.port
        );
        let proxy = Proxy::start(&Setup {
            listen: "http = \"127.0.0.1:0\"".into(),
            sections,
            files: vec![("neon.pem", ground.ca.clone()), ("tiers.toml", tiers)],
            ..Setup::default()
        });
        Self { ground, double, proxy }
    }

    /// Runs a command that has to succeed.
    fn run(&self, words: &[&str]) -> String {
        let (code, out, err) = self.proxy.command(words, &[]);
        assert_eq!(code, Some(0), "{words:?}: {out}{err}");
        out
    }

    fn create(&self, org: &str, tier: &str) -> Org<'_> {
        self.run(&["tenant", "create", org, "--tier", tier]);
        self.proxy.org(org)
    }

    fn sql(&self, org: &Org<'_>, database: &str, query: &str) -> Value {
        let head = format!("POST /sql HTTP/1.1\r\nNeon-Connection-String: postgres://app:{}@x/{database}", org.token());
        let (_, body) = ask(door(&self.proxy), &head, &json!({"query": query}).to_string());
        let answer: Value = serde_json::from_str(&body).expect("JSON");
        if answer["rows"].is_array() { answer["rows"].clone() } else { answer["code"].clone() }
    }

    /// What `tier verify` says of Neon: its exit code, the state, what was found.
    fn verify(&self, org: &str) -> (Option<i32>, Value, Value) {
        let (code, out, _) = self.proxy.command(&["tier", "verify", org, "--json"], &[]);
        let verdict: Value = serde_json::from_str(&out).expect("JSON");
        let neon = verdict["databases"].as_array().expect("five").iter().find(|it| it["database"] == "neon").cloned();
        let neon = neon.expect("it is one of them");
        (code, neon["state"].clone(), neon["found"].clone())
    }

    fn tier(&self, org: &str) -> String {
        let view: Value = serde_json::from_str(&self.proxy.admin(&format!("/v1/tenants/{org}"))).expect("JSON");
        view["tier"].as_str().expect("a tier").to_owned()
    }

    fn connection_limit(&self, org: &Org<'_>, host: &str) -> String {
        let names = self.proxy.config.names().expect("our own");
        let role = names.sql(Protocol::Neon, &org.org, "app").role;
        let question = format!("select rolconnlimit from pg_roles where rolname = '{role}'");
        postgres::sql(&self.ground.url(host), &question).join("")
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("text").to_owned()
}

#[test]
fn a_tenant_lives_in_a_project_of_its_own_from_creation_to_deletion() {
    let world = World::start();
    // The project is locked, then made without a reply: there is one all the same.
    world.double.misbehave("POST", Misdeed::Refuse(423));
    world.double.misbehave("POST", Misdeed::LoseReply);
    let acme = world.create("acme", "FREE");
    assert_eq!(world.double.counts(), (1, 1));
    let globex = world.create("globex", "PRO");
    assert_eq!(world.double.counts(), (2, 2));
    let (home, other) = (text(&world.double.endpoint(0)["host"]), text(&world.double.endpoint(1)["host"]));

    world.sql(&acme, "app", "create table t (i int)");
    world.sql(&acme, "app", "insert into t values (1)");
    assert_eq!(world.sql(&acme, "app", "select * from t"), json!([{"i": 1}]));
    assert_eq!(world.sql(&globex, "app", "select * from t"), "42P01", "another project");
    // Over TLS with the endpoint's name, under a role that owns nothing of the project.
    let ssl = "select ssl, current_user as me from pg_stat_ssl where pid = pg_backend_pid()";
    let row = &world.sql(&acme, "app", ssl)[0];
    let names = world.proxy.config.names().expect("our own");
    let role = names.sql(Protocol::Neon, &acme.org, "app").role;
    assert_eq!((&row["ssl"], &row["me"]), (&json!(true), &json!(role)));
    assert_eq!(world.sql(&acme, "app", "create role intruder"), "42501");
    assert!(world.ground.named().contains(&home) && world.ground.named().contains(&other));

    // What the tier says is set there, and read back.
    let endpoint = world.double.endpoint(0);
    assert_eq!(
        (&endpoint["autoscaling_limit_max_cu"], &endpoint["suspend_timeout_seconds"]),
        (&json!(0.25), &json!(300))
    );
    let (code, state, found) = world.verify("acme");
    assert_eq!((code, &state), (Some(0), &json!("yes")), "{found}");
    assert_eq!(found["logical_size_bytes"], 512 << 20);
    // Somebody turned a knob at Neon: seen, and put right.
    world.double.turn(0, "autoscaling_limit_max_cu", json!(4.0));
    let (code, state, found) = world.verify("acme");
    assert_eq!((code, &state), (Some(1), &json!("no")), "{found}");
    world.run(&["tenant", "provision", "acme"]);
    assert_eq!(world.verify("acme").0, Some(0));

    let (code, out, _) = world.proxy.command(&["doctor"], &[]);
    assert!(out.contains("projects at Neon"), "{code:?}: {out}");

    // A larger tier, while operations take their time and the API is busy.
    world.double.misbehave("PATCH", Misdeed::Refuse(423));
    world.double.misbehave("PATCH", Misdeed::LoseReply);
    world.run(&["tier", "set", "acme", "PRO", "--wait"]);
    let endpoint = world.double.endpoint(0);
    assert_eq!(
        (&endpoint["autoscaling_limit_max_cu"], &endpoint["suspend_timeout_seconds"]),
        (&json!(2.0), &json!(1800))
    );
    assert_eq!(world.verify("acme").2["logical_size_bytes"], json!(4u64 << 30));
    assert_eq!(
        (world.connection_limit(&acme, &home), world.connection_limit(&globex, &other)),
        ("50".into(), "50".into())
    );

    // A branch: a copy on a host of its own, reached with the same token.
    let branches = "/v1/tenants/acme/branches";
    let (status, made) = world.proxy.admin_send("POST", branches, r#"{"name":"dev"}"#);
    assert_eq!((status, made), (201, json!({"name": "dev", "database": "app@dev"})));
    assert_eq!(world.sql(&acme, "app@dev", "select * from t"), json!([{"i": 1}]));
    world.sql(&acme, "app@dev", "insert into t values (2)");
    assert_eq!(world.sql(&acme, "app", "select * from t"), json!([{"i": 1}]), "the project does not see it");
    assert_eq!(world.sql(&acme, "app@dev", "select count(*)::int as n from t"), json!([{"n": 2}]));
    assert_eq!(world.sql(&globex, "app@dev", "select 1"), "3D000");
    assert!(world.ground.named().contains(&text(&world.double.endpoint(2)["host"])));
    // A tier that allows fewer branches than there are is refused with the numbers.
    for (name, wanted) in [("b", 201), ("c", 201), ("d", 502)] {
        let (status, said) = world.proxy.admin_send("POST", branches, &json!({ "name": name }).to_string());
        assert_eq!(status, wanted, "{said}");
    }
    let listed = |list: &Value| -> Vec<String> {
        list["branches"].as_array().expect("a list").iter().map(|it| text(&it["name"])).collect()
    };
    assert_eq!(
        listed(&world.proxy.admin_send("GET", branches, "").1),
        ["dev", "b", "c"],
        "what Neon refused is not there"
    );
    let (code, out, _) = world.proxy.command(&["tier", "set", "acme", "FREE"], &[]);
    assert!(code == Some(1) && out.contains("branches"), "{out}");
    for name in ["b", "c"] {
        assert_eq!(world.proxy.admin_send("DELETE", &format!("{branches}/{name}"), "").0, 200);
    }
    world.run(&["tier", "set", "acme", "FREE", "--wait"]);
    // The branch follows the tier too: its compute, and the role in it.
    let dev = world.double.endpoint(2);
    assert_eq!(dev["autoscaling_limit_max_cu"], json!(0.25));
    assert_eq!(world.connection_limit(&acme, &text(&dev["host"])), "5");
    assert_eq!(world.proxy.admin_send("POST", branches, r#"{"name":"more"}"#).0, 422);
    assert_eq!(world.proxy.admin_send("DELETE", &format!("{branches}/dev"), "").0, 200);
    assert_eq!(world.proxy.admin_send("DELETE", &format!("{branches}/dev"), "").0, 404);
    assert_eq!(world.sql(&acme, "app@dev", "select 1"), "3D000");

    world.double.misbehave("DELETE", Misdeed::LoseReply);
    world.run(&["tenant", "rotate", "acme"]);
    assert_eq!(world.sql(&acme, "app", "select * from t"), json!([{"i": 1}]), "with the next credentials");
    world.run(&["tenant", "delete", "acme", "--now", "--yes"]);
    assert_eq!(world.double.counts().0, 1);
    assert_eq!(world.sql(&globex, "app", "select 1 as one"), json!([{"one": 1}]));
}

#[test]
fn a_database_moves_out_of_its_project_and_back_by_logins_that_are_no_superusers() {
    // As shipped: FREE is at home at Neon.
    let world = World::with(include_str!("../config/tiers.toml").to_owned());
    let acme = world.create("acme", "FREE");
    let host = text(&world.double.endpoint(0)["host"]);
    let mut wire = acme.wire();
    let made = wire.query(
        "create table t (id int primary key, n int references t (id)); insert into t values (1, null), (2, 1); \
         create schema other; create table other.u (s serial, x text); insert into other.u (x) values ('a'), ('b'); \
         create table private (x int); revoke all on private from current_user",
    );
    assert_eq!(made.codes(), [""; 0]);
    let (code, _, err) = world.proxy.command(&["tier", "set", "acme", "PRO", "--wait"], &[]);
    assert!(code == Some(1) && err.contains("permission denied for table private"), "{err}");
    assert_eq!(wire.ask("select count(*) from t"), "2", "it stays as it was");
    assert_eq!(wire.query("drop table private").codes(), [""; 0]);
    for (tier, home) in [("PRO", "main"), ("FREE", "neon"), ("STARTER", "main")] {
        world.run(&["tier", "set", "acme", tier, "--wait"]);
        let (code, out, _) = world.proxy.command(&["tier", "verify", "acme", "--json"], &[]);
        let verdict: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!((code, verdict["home"].as_str()), (Some(0), Some(home)), "{out}");
        // On a connection of before, and through both doors.
        assert_eq!(
            wire.ask("select sum(id) || ' ' || (select string_agg(x, '') from other.u) from t"),
            "3 ab",
            "{tier}"
        );
        assert_eq!(world.sql(&acme, "app", "select count(*)::int as n from t"), json!([{"n": 2}]), "{tier}");
        assert_eq!(wire.code("insert into t values (3, 99)"), "23503", "{tier}");
        let names = world.proxy.config.names().expect("our own");
        let movers = "select count(*) from pg_roles where rolname like '%!move'";
        assert_eq!(postgres::sql(&world.ground.url(&host), movers), ["0"], "{tier}");
        let role = names.sql(Protocol::Neon, &acme.org, "app").role;
        let may = format!(
            "select has_database_privilege('{role}', datname, 'connect') from pg_database where datname = '{role}'"
        );
        assert_eq!(postgres::sql(&world.ground.url(&host), &may), [if home == "neon" { "t" } else { "f" }], "{tier}");
    }
    // What is not in the Neon home has no branches.
    let (status, said) = world.proxy.admin_send("POST", "/v1/tenants/acme/branches", r#"{"name":"dev"}"#);
    assert_eq!((status, &said["error"]["code"]), (409, &json!("elsewhere")), "{said}");
    world.run(&["tenant", "delete", "acme", "--now", "--yes"]);
    assert_eq!(world.double.counts().0, 0);
}

#[test]
fn a_move_that_neon_refuses_changes_nothing_anywhere() {
    let world = World::start();
    let acme = world.create("acme", "FREE");
    let host = text(&world.double.endpoint(0)["host"]);
    let before = world.double.endpoint(0);
    // The account's plan has no such computes.
    world.double.misbehave("PATCH", Misdeed::Refuse(422));
    let (code, _, err) = world.proxy.command(&["tier", "set", "acme", "PRO"], &[]);
    assert!(code == Some(1) && err.contains("422"), "{err}");
    assert_eq!(world.tier("acme"), "FREE");
    assert_eq!(world.double.endpoint(0), before);
    let main = format!("select rolconnlimit from pg_roles where rolname = '{}'", acme.role());
    until("all is as it was", || world.connection_limit(&acme, &host) == "5" && world.proxy.server.value(&main) == "5");
    until("the transition is over", || world.verify("acme").0 == Some(0));
}

#[test]
fn a_move_that_is_decided_ends_when_neon_is_back() {
    let world = World::start();
    let acme = world.create("acme", "PRO");
    let host = text(&world.double.endpoint(0)["host"]);
    // A smaller tier asks nothing of Neon before it is decided, and then nothing is taken.
    world.double.refuse_all(Some("PATCH"));
    let (status, begun) = world.proxy.admin_put("/v1/tenants/acme/tier", r#"{"tier":"FREE"}"#);
    assert_eq!(status, 202, "{begun}");
    let at = format!("/v1/transitions/{}", text(&begun["transition_id"]));
    let state = || -> Value {
        let shown: Value = serde_json::from_str(&world.proxy.admin(&at)).expect("JSON");
        shown["state"].clone()
    };
    until("it is decided", || state() == "committed");
    until("the tier is in force", || world.tier("acme") == "FREE");
    eventually("Neon was asked", || world.double.log().iter().any(|it| it.starts_with("PATCH")).then_some(()));
    assert_eq!(world.double.endpoint(0)["autoscaling_limit_max_cu"], json!(2.0), "not there yet");
    assert_eq!(world.verify("acme").0, Some(1));
    assert_eq!(world.sql(&acme, "app", "select 1 as one"), json!([{"one": 1}]), "served meanwhile");
    world.double.refuse_all(None);
    until("it is done", || state() == "done");
    assert_eq!(world.double.endpoint(0)["autoscaling_limit_max_cu"], json!(0.25));
    assert_eq!(world.connection_limit(&acme, &host), "5");
    assert_eq!(world.verify("acme").0, Some(0));
}

#[test]
fn a_key_and_a_url_together_and_clear_text_are_faults_of_the_configuration() {
    let faults = |text: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("dynabase.toml");
        std::fs::write(folder.path().join("tiers.toml"), include_str!("../config/tiers.toml")).expect("written");
        std::fs::write(&path, format!("[upstream.neon]\n{text}\n")).expect("written");
        dynabase::config::Config::load(&path).expect_err("much is missing").to_string()
    };
    assert!(
        faults("api_key = \"k\"\nurl = \"postgres://u:p@h/d\"").contains("upstream.neon.api_key: and url are both set")
    );
    assert!(faults("api_key = \"k\"\ntls = \"disable\"").contains("upstream.neon.tls"));
    assert!(
        faults("api_key = \"k\"\napi_url = \"http://example.com\"").contains("upstream.neon.api_url: has to be https")
    );
    assert!(faults("api_key = \"k\"\napi_timeout = \"1h\"").contains("upstream.neon.api_timeout"));
    assert!(!faults("api_key = \"hunter2\"\npg_version = 9").contains("hunter2"));
}
