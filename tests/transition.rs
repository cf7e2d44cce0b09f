//! Tier transitions over real servers: on live sessions, over HTTP, and with the process killed at every step.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use dynabase::tenant::Tier;
use serde_json::Value;

use crate::support::{
    PATIENCE, eventually, free_port,
    proxy::{Org, Proxy, Setup},
    until,
};

/// How soon live sessions have to have the new limits.
const ENFORCED_WITHIN: Duration = Duration::from_secs(1);

/// Random kills in `make test`; `make chaos` sets `DYNABASE_CHAOS_RUNS`.
const CHAOS_RUNS: u64 = 6;

/// A Redis server of one test's own.
pub struct Redis {
    child: Child,
    pub port: u16,
    folder: tempfile::TempDir,
}

impl Redis {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let port = free_port();
        Self { child: Self::spawn(port, folder.path()), port, folder }
    }

    fn spawn(port: u16, folder: &std::path::Path) -> Child {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "redis-server", "--port", &port.to_string(), "--bind", "127.0.0.1"]);
        command.args(["--databases", "512", "--save", "", "--appendonly", "yes", "--dir"]).arg(folder);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("redis-server is installed");
        until("Redis listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        child
    }

    fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }

    fn start_again(&mut self) {
        self.child = Self::spawn(self.port, self.folder.path());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn before(redis: &Redis) -> Proxy {
    let sections = format!("[upstream.redis]\nurl = \"redis://127.0.0.1:{}\"\n", redis.port);
    let listen = "redis = \"127.0.0.1:0\"".to_owned();
    Proxy::start(&Setup { sections, listen, ..Setup::default() })
}

fn connection_limit(org: &Org<'_>) -> String {
    org.proxy.server.value(&format!("select rolconnlimit from pg_roles where rolname = '{}'", org.role()))
}

fn shown(org: &Org<'_>) -> Value {
    serde_json::from_str(&org.proxy.admin(&format!("/v1/tenants/{}", org.org))).expect("JSON")
}

/// `tier verify` agrees, all databases that are there; gives the tier.
fn verified(org: &Org<'_>) -> String {
    let (code, out, err) = org.proxy.command(&["tier", "verify", org.org.as_str(), "--json"], &[]);
    assert_eq!(code, Some(0), "{out}{err}");
    let verdict: Value = serde_json::from_str(&out).expect("JSON");
    let states = verdict["databases"].as_array().expect("five").iter();
    let states: Vec<&str> = states.map(|it| it["state"].as_str().expect("a word")).collect();
    assert_eq!(states.len(), 5);
    assert_eq!(states[..2], ["yes", "yes"]);
    assert!(states[2..].iter().all(|state| ["yes", "not there"].contains(state)), "{states:?}");
    verdict["tier"].as_str().expect("a tier").to_owned()
}

#[test]
fn a_live_session_gets_the_new_limits_without_reconnecting() {
    let redis = Redis::start();
    let proxy = before(&redis);
    let org = proxy.tenant("acme", Tier::Free);
    let mut wire = org.wire();
    wire.query("select 1");
    let (code, _, err) = proxy.command(&["tier", "set", "acme", "PRO"], &[]);
    assert_eq!(code, Some(0), "{err}");
    let since = Instant::now();
    until("the new tier is in force", || shown(&org)["tier"] == "PRO");
    assert!(since.elapsed() < ENFORCED_WITHIN, "{:?}", since.elapsed());
    // PRO has five connections where FREE has one: two transactions at a time, the first one on the old session.
    wire.query("begin");
    let mut other = org.wire();
    other.query("begin");
    assert_eq!(shown(&org)["sessions"], 2);
    assert_eq!(connection_limit(&org), "5");
    assert_eq!(verified(&org), "PRO");

    let (code, out, _) = proxy.command(&["tier", "history", "acme", "--json"], &[]);
    assert_eq!(code, Some(0));
    let history: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((history[0]["from"].as_str(), history[0]["state"].as_str()), (Some("FREE"), Some("done")));
    // Once more is no failure, and no transition.
    assert_eq!(proxy.command(&["tier", "set", "acme", "PRO"], &[]).0, Some(0));
}

/// A MongoDB-wire server of one test's own; the calling thread keeps it.
pub fn mongodb(folder: &tempfile::TempDir) -> dynabase::cli::dev::mongo::Server {
    use dynabase::cli::dev::mongo;
    let program = mongo::find().expect("a MongoDB-wire server is installed: sh .ci/tools");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(mongo::Server::start(&program, folder.path(), None)).expect("it starts")
}

/// The state of each database in `tier verify`, and its exit code.
pub fn states(proxy: &Proxy, org: &str) -> (Option<i32>, Vec<String>) {
    let (code, out, err) = proxy.command(&["tier", "verify", org, "--json"], &[]);
    let verdict: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}"));
    let word = |it: &Value| it["state"].as_str().expect("a word").to_owned();
    (code, verdict["databases"].as_array().expect("five").iter().map(word).collect())
}

#[test]
fn all_five_databases_go_together_and_are_read_back() {
    let redis = Redis::start();
    let folder = tempfile::tempdir().expect("a folder");
    let mongodb = mongodb(&folder);
    let postgres = crate::support::postgres::shared();
    let sections = format!(
        "[upstream.redis]\nurl = \"redis://127.0.0.1:{}\"\n[upstream.mongodb]\nurl = \"{}\"\n\
         [upstream.neon]\nurl = \"{}\"\n[upstream.convex]\npublic_url = \"http://127.0.0.1:1\"\n",
        redis.port,
        mongodb.url(),
        postgres.url
    );
    let listen = "redis = \"127.0.0.1:0\"\nmongodb = \"127.0.0.1:0\"\nhttp = \"127.0.0.1:0\"".to_owned();
    let proxy = Proxy::start(&Setup { sections, listen, ..Setup::default() });
    let five = vec!["yes".to_owned(); 5];
    let done = |words: &[&str]| {
        let (code, out, err) = proxy.command(words, &[]);
        assert_eq!(code, Some(0), "{words:?}: {out}{err}");
    };
    // Twice, the second time as another tenant of the same name: nothing of the first one fences it off.
    for _ in 0..2 {
        done(&["tenant", "create", "acme", "--tier", "FREE"]);
        assert_eq!(states(&proxy, "acme"), (Some(0), five.clone()));
        for tier in ["PRO", "FREE", "STARTER"] {
            done(&["tier", "set", "acme", tier, "--wait"]);
            assert_eq!(states(&proxy, "acme"), (Some(0), five.clone()), "{tier}");
        }
        // What an operator changes by hand at one of them is seen.
        let names = proxy.config.names().expect("our own");
        let org = dynabase::tenant::OrgId::parse("acme").expect("an id");
        let home = names.sql(dynabase::tenant::Protocol::Neon, &org, "app").role;
        proxy.server.sql(&format!("alter role \"{home}\" connection limit 77"));
        let (code, seen) = states(&proxy, "acme");
        assert_eq!((code, seen[4].as_str()), (Some(1), "no"));
        assert!(seen[..4].iter().all(|state| state == "yes"), "{seen:?}");
        done(&["tenant", "delete", "acme", "--now", "--yes"]);
    }
}

#[test]
fn over_http_a_transition_is_begun_and_watched() {
    let redis = Redis::start();
    let proxy = before(&redis);
    let org = proxy.tenant("acme", Tier::Free);
    let (status, begun) = proxy.admin_put("/v1/tenants/acme/tier", "{\"tier\":\"STARTER\"}");
    assert_eq!(status, 202, "{begun}");
    let id = begun["id"].as_str().expect("an id").to_owned();
    let done = eventually("it is over", || {
        let entry: Value = serde_json::from_str(&proxy.admin(&format!("/v1/transitions/{id}"))).expect("JSON");
        (entry["state"] == "done").then_some(entry)
    });
    let states: Vec<&str> =
        done["participants"].as_array().expect("five").iter().map(|it| it["state"].as_str().unwrap_or("")).collect();
    assert_eq!(states[..2], ["done", "done"]);
    assert_eq!(connection_limit(&org), "2");
    assert_eq!(verified(&org), "STARTER");
    for (path, body, status) in [
        ("/v1/tenants/acme/tier", "{\"tier\":\"STARTER\"}", 200),
        ("/v1/tenants/acme/tier", "{\"tier\":\"GOLD\"}", 400),
        ("/v1/tenants/acme/tier", "{\"tier\":\"PRO\",\"x\":1}", 400),
        ("/v1/tenants/nobody/tier", "{\"tier\":\"PRO\"}", 404),
        ("/v1/tenants/A B/tier", "{\"tier\":\"PRO\"}", 400),
    ] {
        let path = path.replace(' ', "%20");
        assert_eq!(proxy.admin_put(&path, body).0, status, "{path} {body}");
    }
}

#[test]
fn who_has_more_than_the_new_tier_allows_is_told_what_and_goes_there_only_by_force() {
    let redis = Redis::start();
    let mut setup = Setup {
        sections: format!("[upstream.redis]\nurl = \"redis://127.0.0.1:{}\"\n", redis.port),
        listen: "redis = \"127.0.0.1:0\"".into(),
        ..Setup::default()
    };
    setup.tiers[0].storage = "1MB";
    let proxy = Proxy::start(&setup);
    let org = proxy.tenant("acme", Tier::Pro);
    let (code, out, err) = proxy.command(&["tier", "set", "acme", "FREE"], &[]);
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("postgres") && out.contains("storage bytes") && err.contains("--force"), "{out}{err}");
    let (status, refused) = proxy.admin_put("/v1/tenants/acme/tier", "{\"tier\":\"FREE\"}");
    assert_eq!((status, refused["error"]["code"].as_str()), (409, Some("over_limits")));
    assert_eq!(refused["error"]["over"][0]["max"], 1 << 20);
    assert_eq!(verified(&org), "PRO");
    assert_eq!(proxy.command(&["tier", "set", "acme", "FREE", "--force"], &[]).0, Some(0));
    assert_eq!(verified(&org), "FREE");
}

#[test]
fn a_database_that_is_away_changes_nothing_and_one_that_dies_after_the_commit_is_waited_for() {
    let mut redis = Redis::start();
    let proxy = before(&redis);
    let org = proxy.tenant("acme", Tier::Free);
    redis.kill();
    let (code, _, err) = proxy.command(&["tier", "set", "acme", "PRO"], &[]);
    assert_eq!(code, Some(1));
    assert!(err.contains("redis") && err.contains("nothing was changed"), "{err}");
    assert_eq!(connection_limit(&org), "1");
    redis.start_again();
    assert_eq!(verified(&org), "FREE");

    // Killed right behind the decision; Redis is away when the next process comes.
    let point = decision_point(&org);
    let (code, _, err) = kill_at(&org, "PRO", point);
    assert_eq!(code, None, "{err}");
    redis.kill();
    until("the running process has taken it up", || {
        let (_, out, _) = proxy.command(&["tier", "show", "acme", "--json"], &[]);
        let shown: Value = serde_json::from_str(&out).expect("JSON");
        shown["transition"]["state"] == "committed"
            && shown["transition"]["participants"][1]["note"].as_str().is_some_and(|note| !note.is_empty())
    });
    assert_eq!(shown(&org)["tier"], "PRO");
    assert_eq!(proxy.command(&["tier", "verify", "acme"], &[]).0, Some(1));
    assert_eq!(proxy.command(&["tier", "abort", "acme"], &[]).0, Some(1), "it is committed");
    redis.start_again();
    until("it is finished", || proxy.command(&["tier", "verify", "acme"], &[]).0 == Some(0));
    assert_eq!(verified(&org), "PRO");
}

/// Moves a tenant with a kill at the n-th point.
fn kill_at(org: &Org<'_>, tier: &str, point: u64) -> (Option<i32>, String, String) {
    let point = point.to_string();
    org.proxy.command(&["tier", "set", org.org.as_str(), tier], &[("DYNABASE_TEST_FAILPOINT", &point)])
}

/// The point behind the decision, seen from a tenant of the same proxy.
fn decision_point(org: &Org<'_>) -> u64 {
    for point in 1..100 {
        let tenant = org.proxy.tenant(&format!("probe-{point}"), Tier::Free);
        let (code, _, err) = kill_at(&tenant, "PRO", point);
        assert_eq!(code, None, "it was not killed at {point}");
        if err.contains("failpoint after the decision") {
            return point;
        }
    }
    panic!("no decision in a hundred points");
}

/// After any kill: whoever comes next makes all databases the old tier or the new one.
fn settles(org: &Org<'_>, what: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (code, out, err) = org.proxy.command(&["tier", "verify", org.org.as_str(), "--json"], &[]);
        if code == Some(0) {
            return verified(org);
        }
        assert!(Instant::now() < deadline, "{what}: {out}{err}");
        // The running process takes it up too; whoever is first.
        org.proxy.command(&["tier", "retry", org.org.as_str()], &[]);
    }
}

#[test]
fn killed_at_any_step_it_is_the_old_tier_or_the_new_one_everywhere() {
    let redis = Redis::start();
    let proxy = before(&redis);
    let org = proxy.tenant("acme", Tier::Free);
    let mut tier = "FREE".to_owned();
    let mut seen = Vec::new();
    for point in 1.. {
        let to = if tier == "FREE" { "PRO" } else { "FREE" };
        let (code, _, err) = kill_at(&org, to, point);
        let name = err.lines().find_map(|line| line.strip_prefix("failpoint ")).unwrap_or("").to_owned();
        assert_eq!(code.is_none(), !name.is_empty(), "{err}");
        tier = settles(&org, &format!("{to}, killed at {point}: {name}"));
        if code.is_some() {
            assert_eq!(tier, to, "{err}");
            break;
        }
        seen.push(name);
    }
    for wanted in ["before the intent", "after the decision", "before a record", "after a call", "before the end"] {
        assert!(seen.iter().any(|name| name == wanted), "{wanted} was not passed: {seen:?}");
    }
    println!("killed at {} points: {seen:?}", seen.len());
}

#[test]
fn random_kills_of_every_process_split_nothing() {
    let runs = std::env::var("DYNABASE_CHAOS_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(CHAOS_RUNS);
    let redis = Redis::start();
    let proxy = before(&redis);
    let org = proxy.tenant("acme", Tier::Free);
    let tiers = ["FREE", "STARTER", "PRO", "ENTERPRISE"];
    // Repeatable: a linear congruential generator, seeded by nothing.
    let mut state = 42u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let (mut kills, mut moved) = (0u64, 0u64);
    let mut tier = "FREE".to_owned();
    for run in 0..runs {
        let to = tiers[usize::try_from(random(4)).expect("small")];
        let point = 1 + random(45);
        kills += u64::from(kill_at(&org, to, point).0.is_none());
        // Those who come to mend it are killed too, now and then.
        for _ in 0..random(3) {
            let point = (1 + random(20)).to_string();
            let killed = proxy.command(&["tier", "retry", "acme"], &[("DYNABASE_TEST_FAILPOINT", &point)]);
            kills += u64::from(killed.0.is_none());
        }
        let after = settles(&org, &format!("run {run}: {tier} → {to}, killed at {point}"));
        assert!(after == to || after == tier, "run {run}: {tier} → {to} gave {after}");
        moved += u64::from(after != tier);
        tier = after;
    }
    println!("{runs} runs: {kills} kills, {moved} tiers changed, none split");
}
