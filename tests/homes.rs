//! A tenant's SQL database changes its home with its tier, from Neon's to the main server and back, while it works: its
//! clients wait and go on, nothing acknowledged is lost or done twice, and wherever the move is killed, the database is
//! in one place in the end, which is the one that is looked in.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use dynabase::tenant::{OrgId, Protocol};
use serde_json::{Value, json};

use crate::{
    neon::{ask, door},
    support::{
        eventually, postgres,
        proxy::{Org, Proxy, Setup},
        until,
        wire::Wire,
    },
};

/// Moves in `make test`; `make chaos` sets `DYNABASE_CHAOS_RUNS`.
const MOVES: u64 = 2;

/// Longest wait of one statement that a move may cause.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A coordinator's that does not go on; after it somebody else may.
const LEASE: Duration = Duration::from_secs(15);

/// Everything that has to survive a move, and what tells that it did.
const KINDS: &str = "
    create extension citext;
    create type mood as enum ('sad', 'happy');
    create domain small as int check (value < 1000);
    create schema \"Other One\";
    create table \"Other One\".parent (id bigint generated always as identity primary key, name citext unique);
    create table kinds (
        id serial primary key, parent bigint not null references \"Other One\".parent (id), m mood default 'happy', s small,
        amount numeric(12, 3), at timestamptz, gone interval, doc jsonb, raw bytea, list int[], real8 float8,
        twice numeric generated always as (amount * 2) stored, note text collate \"C\"
    );
    create index on kinds ((doc ->> 'a'));
    create table parts (id int, day date not null, primary key (id, day)) partition by range (day);
    create table parts_1 partition of parts for values from ('2020-01-01') to ('2021-01-01');
    create table parts_2 partition of parts default;
    create view seen as select k.id, p.name from kinds k join \"Other One\".parent p on p.id = k.parent;
    create materialized view counted as select count(*) as n from kinds;
    create function bump() returns trigger language plpgsql as
        $f$ begin new.note := coalesce(new.note, '') || '!'; return new; end $f$;
    insert into \"Other One\".parent (name) select 'P' || n from generate_series(1, 50) n;
    insert into kinds (parent, m, s, amount, at, gone, doc, raw, list, real8, note)
        select 1 + n % 50, case when n % 3 = 0 then 'sad'::mood end, n % 1000, n / 7.0, now(), make_interval(mins => n),
        jsonb_build_object('a', n, 'b', array[n]), decode(md5(n::text), 'hex'), array[n, null], n / 3.0, E'tab\\t\\\\ ' || n
        from generate_series(1, 2000) n;
    insert into parts select n, '2020-06-01'::date + n from generate_series(1, 400) n;
    refresh materialized view counted;
    create trigger bumps before insert on kinds for each row execute function bump();
    comment on table kinds is 'all of them';
    grant select on kinds to public;
    alter table kinds enable row level security;
    create policy everyone on kinds to current_user using (true);
    create sequence apart start 17 increment 5;
    select nextval('apart')";

/// What a database has in it, as one text.
const FINGERPRINT: &str = "
    select concat_ws(' ', (select count(*) from kinds), (select sum(hashtextextended(k::text, 3)) from kinds k),
        (select sum(hashtextextended(p::text, 3)) from parts p), (select n from counted), (select count(*) from seen),
        (select last_value from apart), (select last_value from kinds_id_seq),
        (select count(*) from pg_constraint where connamespace = 'public'::regnamespace and contype in ('f', 'p', 'c', 'u')),
        (select count(*) from pg_index where indrelid = 'kinds'::regclass), obj_description('kinds'::regclass),
        (select count(*) from pg_trigger where not tgisinternal), (select count(*) from pg_policy),
        (select relowner::regrole = current_user::regrole from pg_class where oid = 'kinds'::regclass),
        has_table_privilege('public', 'kinds', 'select'))";

/// A proxy whose FREE is at home at Neon, on a server of its own, and whose paid tiers are at home on the main one.
struct House {
    proxy: Proxy,
    neon: postgres::Own,
}

impl House {
    fn start(more: &str) -> Self {
        let neon = postgres::Own::start();
        let sections = format!("[upstream.neon]\nurl = \"{}\"\n{more}", neon.place.url);
        let mut setup = Setup { sections, listen: "http = \"127.0.0.1:0\"".into(), ..Setup::default() };
        setup.tiers[0].home = "neon";
        let house = Self { proxy: Proxy::start(&setup), neon };
        house.run(&["tenant", "create", "acme", "--tier", "FREE"]);
        until("it is served", || Wire::login(house.proxy.address(), &house.acme().token(), &[]).is_ok());
        house
    }

    fn acme(&self) -> Org<'_> {
        self.proxy.org("acme")
    }

    /// Runs a command that has to succeed.
    fn run(&self, words: &[&str]) -> (String, String) {
        let (code, out, err) = self.proxy.command(words, &[]);
        assert_eq!(code, Some(0), "{words:?}: {out}{err}");
        (out, err)
    }

    fn tier(&self, tier: &str) -> String {
        self.run(&["tier", "set", "acme", tier, "--wait"]).1
    }

    /// The administrator's URL into the tenant's database in one of its homes.
    fn behind(&self, home: &str) -> String {
        let (protocol, url) = match home {
            "neon" => (Protocol::Neon, &self.neon.place.url),
            _ => (Protocol::Postgres, &self.proxy.server.url),
        };
        let names = self.proxy.config.names().expect("our own");
        let org = OrgId::parse("acme").expect("an id");
        let (server, _) = url.rsplit_once('/').expect("a database");
        format!("{server}/{}", names.sql(protocol, &org, "app").database)
    }

    /// Whether the tenant may come into its database there; `None`: there is none.
    fn lets_in(&self, home: &str) -> Option<bool> {
        let url = self.behind(home);
        let (server, database) = url.rsplit_once('/').expect("a database");
        let question = format!(
            "select has_database_privilege('{database}', oid, 'connect') from pg_database where datname = '{database}'"
        );
        let answer = postgres::sql(&format!("{server}/postgres"), &question);
        answer.first().map(|it| it == "t")
    }

    fn verify(&self) -> (Option<i32>, Value) {
        let (code, out, err) = self.proxy.command(&["tier", "verify", "acme", "--json"], &[]);
        (code, serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}")))
    }

    fn home(&self) -> String {
        self.verify().1["home"].as_str().expect("a home").to_owned()
    }

    fn sql(&self, query: &str) -> Result<Value, String> {
        let head =
            format!("POST /sql HTTP/1.1\r\nNeon-Connection-String: postgres://app:{}@x/app", self.acme().token());
        let (status, body) = ask(door(&self.proxy), &head, &json!({"query": query, "params": []}).to_string());
        let answer: Value = serde_json::from_str(&body).map_err(|error| format!("{status} {error}: {body}"))?;
        if status == 200 { Ok(answer["rows"].clone()) } else { Err(format!("{status} {answer}")) }
    }

    /// What the last transition says of the Postgres database.
    fn note(&self) -> String {
        let history: Value = serde_json::from_str(&self.run(&["tier", "history", "acme", "--json"]).0).expect("JSON");
        let last = history.as_array().and_then(|all| all.last()).cloned().expect("one at least");
        last["participants"][0]["note"].as_str().expect("a text").to_owned()
    }
}

/// What a writer was told.
struct Told {
    done: u64,
    refused: Vec<String>,
    longest: Duration,
}

/// Writes 0, 1, 2 … until told to stop.
fn writer(
    stop: &Arc<AtomicBool>,
    mut write: impl FnMut(u64) -> Result<(), String> + Send + 'static,
) -> JoinHandle<Told> {
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let mut told = Told { done: 0, refused: Vec::new(), longest: Duration::ZERO };
        while !stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            match write(told.done) {
                Ok(()) => told.done += 1,
                Err(why) => {
                    told.refused.push(why);
                    return told;
                }
            }
            told.longest = told.longest.max(began.elapsed());
        }
        told
    })
}

#[test]
fn a_database_moves_with_the_tier_under_writers_and_back() {
    let moves = std::env::var("DYNABASE_CHAOS_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(MOVES);
    let house = House::start("");
    let mut wire = house.acme().wire();
    assert_eq!(wire.query(KINDS).codes(), [""; 0]);
    assert_eq!(wire.query("create table load (who text, n bigint, primary key (who, n))").codes(), [""; 0]);
    for own in ["work_mem = '7MB'", "search_path = \"$user\", public, pg_temp"] {
        // On a session of its own, which is pinned by this.
        let codes = house.acme().wire().query(&format!("alter role current_user set {own}")).codes();
        assert_eq!(codes, [""; 0], "{own}");
    }
    let before = wire.ask(FINGERPRINT);
    assert_eq!(house.home(), "neon");
    let stop = Arc::new(AtomicBool::new(false));
    // One statement each time, on one connection; with a setting that has to come along.
    let mut plain = house.acme().wire();
    plain.query("set application_name = 'writer'");
    let plain = writer(&stop, move |n| match plain.query(&format!("insert into load values ('plain', {n})")).codes() {
        codes if codes.is_empty() => Ok(()),
        codes => Err(format!("{codes:?}")),
    });
    // Whole transactions.
    let mut whole = house.acme().wire();
    let whole = writer(&stop, move |n| {
        for text in ["begin", &format!("insert into load values ('whole', {n})"), "commit"] {
            let codes = whole.query(text).codes();
            if !codes.is_empty() {
                return Err(format!("{text}: {codes:?}"));
            }
        }
        Ok(())
    });
    // A driver with prepared statements, one of them with a type of the tenant's own.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (client, connection) =
        runtime.block_on(tokio_postgres::connect(&house.acme().url(), tokio_postgres::NoTls)).expect("in");
    runtime.spawn(connection);
    let insert = runtime.block_on(client.prepare("insert into load values ('prepared', $1)")).expect("prepared");
    let prepared = writer(&stop, move |n| {
        let n = i64::try_from(n).expect("small");
        match runtime.block_on(client.execute(&insert, &[&n])) {
            Ok(1) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    // And the Neon door, which leads to the same database.
    let head = format!("POST /sql HTTP/1.1\r\nNeon-Connection-String: postgres://app:{}@x/app", house.acme().token());
    let port = door(&house.proxy);
    let http = writer(&stop, move |n| {
        let body = json!({"query": format!("insert into load values ('http', {n})"), "params": []}).to_string();
        match ask(port, &head, &body) {
            (200, _) => Ok(()),
            (status, body) => Err(format!("{status} {body}")),
        }
    });
    for turn in 0..moves {
        let (tier, home, other) = if turn % 2 == 0 { ("PRO", "main", "neon") } else { ("FREE", "neon", "main") };
        house.tier(tier);
        let (code, verdict) = house.verify();
        assert_eq!((code, verdict["home"].as_str()), (Some(0), Some(home)), "{verdict}");
        assert_eq!((house.lets_in(home), house.lets_in(other)), (Some(true), Some(false)), "{tier}");
        println!("{tier}: {}", house.note());
        assert!(house.note().contains("transactions waited for"), "{}", house.note());
        assert_eq!(wire.ask(FINGERPRINT), before, "{tier}, on a connection of before");
        assert_eq!(house.acme().wire().ask(FINGERPRINT), before, "{tier}");
        let own = wire.ask("select current_setting('work_mem') || ' ' || current_setting('search_path')");
        assert_eq!(own, "7MB \"$user\", public, pg_temp", "{tier}");
    }
    stop.store(true, Ordering::Relaxed);
    for (who, writer) in [("plain", plain), ("whole", whole), ("prepared", prepared), ("http", http)] {
        let told = writer.join().expect("it wrote");
        println!("{who}: {} rows, longest wait {:?}", told.done, told.longest);
        assert_eq!(told.refused, [""; 0], "{who}");
        assert!(told.done > 0 && told.longest < PAUSE_MAX, "{who}: {} {:?}", told.done, told.longest);
        let there =
            wire.ask(&format!("select count(*) || ' ' || coalesce(max(n), -1) + 1 from load where who = '{who}'"));
        assert_eq!(there, format!("{} {}", told.done, told.done), "{who}: what was acknowledged is what is there");
    }
    // The trigger and the foreign key work there.
    assert_eq!(wire.code("insert into kinds (parent) values (999)"), "23503");
    assert_eq!(wire.ask("insert into kinds (parent, note) values (1, 'x') returning note"), "x!");
    assert_eq!(wire.ask("select nextval('apart')"), "22");
    let rows = house.sql("select count(*)::int as n from kinds").expect("answered");
    assert_eq!(rows[0]["n"], 2001);
}

/// Whether the tenant's record says that it stands still.
fn stands_still(house: &House) -> bool {
    let path = house.proxy.config.catalog.as_ref().and_then(|it| it.path.clone()).expect("a folder");
    let text = std::fs::read_to_string(path.join("orgs/acme.json")).unwrap_or_default();
    serde_json::from_str::<Value>(&text).is_ok_and(|record| record["transition"]["still"] == true)
}

#[test]
fn an_open_transaction_is_waited_for_and_what_can_t_be_carried_is_told_so() {
    let house = House::start("");
    let mut wire = house.acme().wire();
    wire.query("create table t (x int)");
    let mut pinned = house.acme().wire();
    pinned.query("create temporary table mine (x int)");
    let mut idle = house.acme().wire();
    idle.query("select 1");
    wire.query("begin; insert into t values (1)");
    let mut child = house.proxy.begin(&["tier", "set", "acme", "PRO", "--wait"], &[]);
    until("it stands still", || stands_still(&house));
    // The one that holds its connection without a transaction is told in the server's own words.
    let end = eventually("the pinned session ends", || pinned.read());
    assert_eq!(end.field(b'C'), "57P01");
    // Who comes now waits for the new home.
    let token = house.acme().token();
    let address = house.proxy.address();
    let late = std::thread::spawn(move || Wire::login(address, &token, &[]).expect("in").ask("select count(*) from t"));
    assert_eq!(wire.query("insert into t values (2)").codes(), [""; 0], "the transaction goes on");
    assert!(stands_still(&house));
    assert_eq!(wire.query("commit").codes(), [""; 0]);
    assert!(child.wait().expect("it ends").success());
    assert_eq!(late.join().expect("it asked"), "2");
    assert_eq!(house.home(), "main");
    // The same connections, in the new place.
    assert_eq!(wire.ask("select count(*) from t"), "2");
    assert_eq!(idle.ask("select count(*) from t"), "2");
    assert_eq!(postgres::sql(&house.behind("main"), "select count(*) from t"), ["2"]);
}

#[test]
fn what_can_t_be_moved_stays_and_a_copy_that_differs_changes_nothing() {
    let house = House::start("");
    let mut wire = house.acme().wire();
    assert_eq!(wire.query("create table t (id int primary key); insert into t values (1)").codes(), [""; 0]);
    let stays = |wire: &mut Wire, why: &str| {
        let (code, out, err) = house.proxy.command(&["tier", "set", "acme", "PRO", "--wait"], &[]);
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains(why), "{why}: {err}");
        assert_eq!(wire.ask("select count(*) from t"), "1", "{why}");
        assert_eq!(
            (house.home().as_str(), house.lets_in("neon"), house.lets_in("main")),
            ("neon", Some(true), Some(true))
        );
        assert_eq!(house.verify().0, Some(0), "{why}");
        assert_eq!(postgres::sql(&house.behind("main"), "select count(*) from pg_class where relname = 't'"), ["0"]);
    };
    for (make, unmake, why) in [
        ("select lo_create(77)", "select lo_unlink(77)", "large objects"),
        ("alter table t force row level security", "alter table t no force row level security", "row-level security"),
        // It says that it gives the same each time, and does not.
        (
            "create function lie(int) returns float8 immutable language sql as 'select random()'; \
             alter table t add column x float8 generated always as (lie(id)) stored",
            "alter table t drop column x; drop function lie",
            "not the same in both places",
        ),
    ] {
        assert_eq!(wire.query(make).codes(), [""; 0], "{make}");
        stays(&mut wire, why);
        assert_eq!(wire.query(unmake).codes(), [""; 0], "{unmake}");
    }
    // Something of the tenant's is where it would go.
    postgres::sql(&house.behind("main"), "create table theirs (x int)");
    let (code, _, err) = house.proxy.command(&["tier", "set", "acme", "PRO", "--wait"], &[]);
    assert!(code == Some(1) && err.contains("theirs"), "{err}");
    postgres::sql(&house.behind("main"), "drop table theirs");
    house.tier("PRO");
    assert_eq!(wire.ask("select count(*) from t"), "1");
}

#[test]
fn what_was_left_is_kept_until_its_grace_is_over() {
    let house = House::start("[tenants]\ngrace = \"2s\"\ninterval = \"1s\"\n");
    let mut wire = house.acme().wire();
    wire.query("create table t (x int); insert into t values (1)");
    house.tier("PRO");
    let role = |protocol| {
        let names = house.proxy.config.names().expect("our own");
        names.sql(protocol, &OrgId::parse("acme").expect("an id"), "app").role
    };
    until("what was left is gone", || house.lets_in("neon").is_none());
    until("nothing is open", || house.verify().0 == Some(0));
    assert_eq!(wire.ask("select count(*) from t"), "1");
    // And back into a place that has to be made anew.
    house.tier("FREE");
    assert_eq!((wire.ask("select count(*) from t"), house.home()), ("1".into(), "neon".into()));
    until("what was left is gone", || house.lets_in("main").is_none());
    until("nothing is open", || house.verify().0 == Some(0));
    house.run(&["tenant", "delete", "acme", "--now", "--yes"]);
    for (protocol, place) in [(Protocol::Postgres, &house.proxy.server), (Protocol::Neon, &house.neon.place)] {
        let question = format!("select count(*) from pg_roles where rolname like '{}%'", role(protocol));
        assert_eq!(place.value(&question), "0", "{protocol:?}");
    }
}

/// After any kill: whoever comes next brings the database to one place.
fn settles(house: &House, what: &str) -> String {
    eventually(what, || {
        house.proxy.command(&["tier", "retry", "acme"], &[]);
        let (code, verdict) = house.verify();
        (code == Some(0)).then(|| verdict["tier"].as_str().expect("a tier").to_owned())
    })
}

#[test]
fn killed_at_any_step_of_a_move_the_database_is_in_the_one_place_that_is_looked_in() {
    let house = House::start("");
    let mut wire = house.acme().wire();
    assert_eq!(wire.query("create table t (id int primary key); insert into t values (0)").codes(), [""; 0]);
    let all = std::env::var_os("DYNABASE_CHAOS_RUNS").is_some();
    let mut seen = Vec::new();
    let mut tier = "FREE".to_owned();
    let mut point = if all { 1 } else { 7 };
    let mut rows = 1;
    loop {
        let to = if tier == "FREE" { "PRO" } else { "FREE" };
        let environment = [("DYNABASE_TEST_FAILPOINT", point.to_string())];
        let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
        let (code, _, err) = house.proxy.command(&["tier", "set", "acme", to, "--wait"], &environment);
        let name = err.lines().find_map(|line| line.strip_prefix("failpoint ")).map(str::to_owned);
        assert_eq!(code.is_none(), name.is_some(), "{err}");
        let what = format!("{tier} → {to}, killed at {point}: {name:?}");
        tier = settles(&house, &what);
        let (home, other) = if tier == "FREE" { ("neon", "main") } else { ("main", "neon") };
        assert_eq!((house.home().as_str(), house.lets_in(home)), (home, Some(true)), "{what}, then {tier}");
        assert!(!stands_still(&house), "{what}");
        // Both doors, and a connection of before, are where it writes now.
        assert_eq!(wire.query(&format!("insert into t values ({rows})")).codes(), [""; 0], "{what}");
        rows += 1;
        assert_eq!(postgres::sql(&house.behind(home), "select count(*) from t"), [rows.to_string()], "{what}");
        assert_eq!(house.sql("select count(*)::int as n from t").expect(&what)[0]["n"], rows, "{what}");
        // The other one is closed, or was never filled.
        if house.lets_in(other) == Some(true) {
            let left = postgres::sql(&house.behind(other), "select count(*) from pg_class where relname = 't'");
            assert_eq!(left, ["0"], "{what}, then {tier}: something of it is at {other} too");
        }
        let Some(name) = name else { break };
        seen.push(name);
        point += if all { 1 } else { 5 };
    }
    println!("killed at {} points: {seen:?}", seen.len());
    if all {
        for wanted in [
            "after a take-over",
            "after a place was made",
            "after a table",
            "after a standstill",
            "after a place was closed",
            "after the comparison",
            "after the decision",
            "after a place was left",
        ] {
            assert!(seen.iter().any(|name| name == wanted), "{wanted} was not passed: {seen:?}");
        }
    }
}

#[test]
fn a_coordinator_that_was_frozen_while_filling_touches_nothing_once_another_one_has_come() {
    use std::io::{BufRead, BufReader};
    let house = House::start("");
    let mut wire = house.acme().wire();
    assert_eq!(wire.query("create table t (id int primary key); insert into t values (1)").codes(), [""; 0]);
    let words = ["tier", "set", "acme", "PRO", "--wait"];
    let mut frozen = house.proxy.begin(&words, &[("DYNABASE_TEST_FREEZE", "after a schema")]);
    let mut said = String::new();
    let mut lines = BufReader::new(frozen.stderr.as_mut().expect("piped"));
    while !said.contains("failpoint ") && lines.read_line(&mut said).is_ok_and(|read| read > 0) {}
    assert!(said.contains("failpoint after a schema"), "{said}");
    // Its lease runs out, and somebody else goes on. The lease is what is waited for: nothing else tells that its owner
    // does not come.
    std::thread::sleep(LEASE);
    if settles(&house, "taken up") == "FREE" {
        house.tier("PRO");
    }
    assert_eq!(wire.query("insert into t values (2)").codes(), [""; 0]);
    let pid = rustix::process::Pid::from_child(&frozen);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).expect("it is there");
    frozen.wait().expect("it ends");
    assert_eq!((house.home().as_str(), wire.ask("select count(*) from t").as_str()), ("main", "2"));
    assert_eq!(house.verify().0, Some(0));
}

/// `cargo test --test integration homes::the_pause -- --ignored --nocapture`, with `DYNABASE_HOME_ROWS` rows of some
/// hundred bytes, first in a table that nobody writes to, then in one that is written all the while.
#[test]
#[ignore = "measures"]
fn the_pause_by_the_size_of_the_database() {
    let rows = std::env::var("DYNABASE_HOME_ROWS").ok().and_then(|rows| rows.parse::<u64>().ok()).unwrap_or(100_000);
    let house = House::start("");
    let mut wire = house.acme().wire();
    let fill = format!(
        "create table small (id int primary key, n int); insert into small select n, 0 from generate_series(1, 1000) n; \
         create table big (id bigint primary key, n int, text text); create index on big (n); \
         insert into big select n, n % 1000, repeat(md5(n::text), 3) from generate_series(1, {rows}) n"
    );
    assert_eq!(wire.query(&fill).codes(), [""; 0]);
    let bytes = wire.ask("select pg_size_pretty(pg_database_size(current_database()))");
    for table in ["small", "big"] {
        let stop = Arc::new(AtomicBool::new(false));
        let mut other = house.acme().wire();
        let writer = writer(&stop, move |n| {
            let codes = other.query(&format!("update {table} set n = n + 1 where id = {}", 1 + n % 1000)).codes();
            if codes.is_empty() { Ok(()) } else { Err(format!("{codes:?}")) }
        });
        for tier in ["PRO", "FREE", "PRO", "FREE"] {
            let began = Instant::now();
            house.tier(tier);
            println!("{rows} rows, {bytes}, {table} is written: {tier} in {:?}: {}", began.elapsed(), house.note());
        }
        stop.store(true, Ordering::Relaxed);
        let told = writer.join().expect("it wrote");
        println!("{} updates meanwhile, longest wait {:?}", told.done, told.longest);
        assert_eq!(told.refused, [""; 0]);
    }
}
