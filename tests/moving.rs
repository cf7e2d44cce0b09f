//! A tenant's documents change their place with its tier, while it writes: nothing acknowledged is lost or done twice,
//! and wherever the move is killed, in the end they are in one place, which is the one that is looked in.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bson::{Document, doc};
use dynabase::tenant::{Isolation, OrgId};
use futures_util::TryStreamExt;
use redis::Commands;
use serde_json::Value;

use crate::{
    support::{
        block_on, eventually,
        proxy::{Limits, Org, Proxy, Setup},
        until,
    },
    transition::{Redis, mongodb},
};

/// Moves in `make test`; `make chaos` sets `DYNABASE_CHAOS_RUNS`.
const MOVES: u64 = 2;

/// Times that every point of a move is tried until those that matter have been among them.
const ROUNDS_MAX: usize = 5;

/// Writers at a time.
const WRITERS: usize = 2;

/// A coordinator's that does not go on; after it somebody else may.
const LEASE: Duration = Duration::from_secs(15);

/// A proxy whose FREE shares collections and whose PRO has databases.
struct House {
    proxy: Proxy,
    mongodb: dynabase::cli::dev::mongo::Server,
    _redis: Redis,
    _folder: tempfile::TempDir,
}

impl House {
    fn start() -> Self {
        Self::with_free(Limits::default())
    }

    /// With other limits for FREE.
    fn with_free(free: Limits) -> Self {
        let redis = Redis::start();
        let folder = tempfile::tempdir().expect("a folder");
        let mongodb = mongodb(&folder);
        let sections = format!(
            "[upstream.redis]\nurl = \"redis://127.0.0.1:{}\"\n[upstream.mongodb]\nurl = \"{}\"\n",
            redis.port,
            mongodb.url()
        );
        let listen = "redis = \"127.0.0.1:0\"\nmongodb = \"127.0.0.1:0\"".to_owned();
        let mut setup = Setup { sections, listen, ..Setup::default() };
        setup.tiers[0] = free;
        setup.tiers[2].isolation = "database";
        let proxy = Proxy::start(&setup);
        let (code, out, err) = proxy.command(&["tenant", "create", "acme", "--tier", "FREE"], &[]);
        assert_eq!(code, Some(0), "{out}{err}");
        // Another one, whose documents stay where they are.
        let (code, out, err) = proxy.command(&["tenant", "create", "globex", "--tier", "FREE"], &[]);
        assert_eq!(code, Some(0), "{out}{err}");
        let house = Self { proxy, mongodb, _redis: redis, _folder: folder };
        until("it is served", || {
            block_on(async { house.collection("acme").await.count_documents(doc! {}).await.is_ok() })
        });
        house
    }

    async fn client(&self, org: &str) -> mongodb::Client {
        let org: Org<'_> = self.proxy.org(org);
        let url = format!(
            "mongodb://app:{}@127.0.0.1:{}/app?authMechanism=PLAIN&directConnection=true&serverSelectionTimeoutMS=5000",
            org.token(),
            self.proxy.port_of("MongoDB")
        );
        mongodb::Client::with_uri_str(url).await.expect("a URL")
    }

    async fn collection(&self, org: &str) -> mongodb::Collection<Document> {
        self.client(org).await.database("app").collection("kept")
    }

    /// Documents in either place, read behind the proxy: shared, own.
    fn behind(&self, org: &str) -> (u64, u64) {
        let id = OrgId::parse(org).expect("an id");
        let names = self.proxy.config.names().expect("our own");
        let own = names.mongodb(&id, Isolation::Database).physical("app").expect("a name");
        block_on(async {
            let client = mongodb::Client::with_uri_str(self.mongodb.url()).await.expect("a URL");
            let of = |database: &str| client.database(database).collection::<Document>("kept");
            let shared = of("shared_app").count_documents(doc! { "org_id": org }).await.expect("counted");
            let own = of(&own).count_documents(doc! {}).await.expect("counted");
            (shared, own)
        })
    }

    fn tier(&self, tier: &str) {
        let (code, out, err) = self.proxy.command(&["tier", "set", "acme", tier, "--wait"], &[]);
        assert_eq!(code, Some(0), "{tier}: {out}{err}");
    }

    /// Notices of moves that are up.
    fn holds(&self) -> u64 {
        block_on(async {
            let client = mongodb::Client::with_uri_str(self.mongodb.url()).await.expect("a URL");
            client
                .database("dynabase_platform")
                .collection::<Document>("holds")
                .count_documents(doc! { "open": true })
                .await
                .expect("counted")
        })
    }
}

/// What a writer was told is done.
#[derive(Default)]
struct Ledger {
    /// Ids that were inserted and not deleted, with how often each was counted up.
    counts: BTreeMap<i64, i64>,
    /// What was refused, in the driver's words.
    refused: Vec<String>,
    longest: Duration,
}

/// Inserts, counts up and deletes until told to stop.
async fn write(kept: mongodb::Collection<Document>, first: i64, stop: Arc<AtomicBool>) -> Ledger {
    let mut ledger = Ledger::default();
    let mut next = first;
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let id = next;
        next += i64::try_from(WRITERS).expect("few");
        match kept.insert_one(doc! { "_id": id, "n": 0_i64, "text": format!("document {id}") }).await {
            Ok(_) => drop(ledger.counts.insert(id, 0)),
            Err(error) => ledger.refused.push(error.to_string()),
        }
        // An earlier one, known to be there.
        if let Some((&known, _)) =
            ledger.counts.iter().nth(usize::try_from(id).expect("small") % ledger.counts.len().max(1))
        {
            match kept.update_one(doc! { "_id": known }, doc! { "$inc": { "n": 1_i64 } }).await {
                Ok(done) if done.matched_count == 1 => *ledger.counts.entry(known).or_default() += 1,
                Ok(_) => ledger.refused.push(format!("{known} was not there")),
                Err(error) => ledger.refused.push(error.to_string()),
            }
            if id % 5 == 0 {
                match kept.delete_one(doc! { "_id": known }).await {
                    Ok(done) if done.deleted_count == 1 => drop(ledger.counts.remove(&known)),
                    Ok(_) => ledger.refused.push(format!("{known} was not there to be deleted")),
                    Err(error) => ledger.refused.push(error.to_string()),
                }
            }
        }
        ledger.longest = ledger.longest.max(began.elapsed());
    }
    ledger
}

#[test]
fn documents_move_with_the_tier_under_a_writer_and_back() {
    let moves = std::env::var("DYNABASE_CHAOS_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(MOVES);
    let house = House::start();
    block_on(async {
        let kept = house.collection("acme").await;
        let old: Vec<Document> =
            (0..600_i64).map(|n| doc! { "_id": -1 - n, "n": n, "at": bson::DateTime::now() }).collect();
        kept.insert_many(old).await.expect("inserted");
        let unique = mongodb::options::IndexOptions::builder().unique(true).sparse(true).build();
        let index = mongodb::IndexModel::builder().keys(doc! { "email": 1 }).options(unique).build();
        kept.create_index(index).await.expect("made");
        house.collection("globex").await.insert_one(doc! { "_id": "theirs" }).await.expect("inserted");
    });
    let stop = Arc::new(AtomicBool::new(false));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let writers: Vec<_> = (0..WRITERS)
        .map(|n| {
            let kept = block_on(house.collection("acme"));
            drop(kept);
            let url = house.proxy.port_of("MongoDB");
            let token = house.proxy.org("acme").token();
            let stop = Arc::clone(&stop);
            runtime.spawn(async move {
                let url =
                    format!("mongodb://app:{token}@127.0.0.1:{url}/app?authMechanism=PLAIN&directConnection=true");
                let client = mongodb::Client::with_uri_str(url).await.expect("a URL");
                let kept = client.database("app").collection("kept");
                write(kept, i64::try_from(n).expect("few"), stop).await
            })
        })
        .collect();
    // Beside it the other databases work: rows and counts that were acknowledged.
    let (postgres, redis) = (rows(&house, &stop), counts_up(&house, &stop));
    for turn in 0..moves {
        house.tier(if turn % 2 == 0 { "PRO" } else { "FREE" });
        let (shared, own) = house.behind("acme");
        assert!(
            (shared == 0) == (turn % 2 == 0) && (own == 0) == (turn % 2 == 1),
            "{turn}: {shared} shared, {own} own"
        );
        assert_eq!(house.holds(), 0);
    }
    stop.store(true, Ordering::Relaxed);
    let mut counts = BTreeMap::new();
    let (mut refused, mut longest) = (Vec::new(), Duration::ZERO);
    for writer in writers {
        let ledger = runtime.block_on(writer).expect("it wrote");
        counts.extend(ledger.counts);
        refused.extend(ledger.refused);
        longest = longest.max(ledger.longest);
    }
    let (rows, refused_rows) = postgres.join().expect("it wrote");
    let (counted, refused_counts) = redis.join().expect("it counted");
    refused.extend(refused_rows.into_iter().chain(refused_counts));
    println!("{rows} rows, {counted} counts in Redis meanwhile");
    assert_eq!(
        house.proxy.org("acme").wire().ask("select count(*) || ' ' || count(distinct n) from load"),
        format!("{rows} {rows}")
    );
    let there: u64 = redis_of(&house).get("counted").expect("asked");
    assert_eq!(there, counted);
    println!("{moves} moves, {} documents written meanwhile, longest wait {longest:?}", counts.len());
    // A request that had to wait longer than the front lets it would be here.
    assert_eq!(refused, [""; 0]);
    let found: BTreeMap<i64, i64> = block_on(async {
        let kept = house.collection("acme").await;
        let all: Vec<Document> = kept.find(doc! {}).await.expect("asked").try_collect().await.expect("read");
        // A unique index came along.
        kept.insert_one(doc! { "_id": "a", "email": "x" }).await.expect("inserted");
        let twice = kept.insert_one(doc! { "_id": "b", "email": "x" }).await.expect_err("taken");
        assert!(twice.to_string().contains("11000"), "{twice}");
        assert_eq!(house.collection("globex").await.count_documents(doc! {}).await.expect("counted"), 1);
        assert!(all.iter().all(|it| !it.contains_key("org_id")));
        all.iter().map(|it| (it.get_i64("_id").expect("a number"), it.get_i64("n").expect("a number"))).collect()
    });
    assert_eq!(found.iter().filter(|(id, _)| **id < 0).count(), 600);
    let written: BTreeMap<i64, i64> = found.into_iter().filter(|(id, _)| *id >= 0).collect();
    assert_eq!(written, counts, "what was acknowledged is what is there");
}

type Told = std::thread::JoinHandle<(u64, Vec<String>)>;

/// Inserts rows until told to stop; how many were acknowledged, and what was refused.
fn rows(house: &House, stop: &Arc<AtomicBool>) -> Told {
    let mut wire = house.proxy.org("acme").wire();
    assert_eq!(wire.query("create table load (n bigint)").codes(), [""; 0]);
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let (mut rows, mut refused) = (0, Vec::new());
        while !stop.load(Ordering::Relaxed) {
            match wire.query(&format!("insert into load values ({rows})")).codes().as_slice() {
                [] => rows += 1,
                codes => refused.push(format!("postgres: {codes:?}")),
            }
        }
        (rows, refused)
    })
}

fn redis_of(house: &House) -> redis::Connection {
    let url = format!("redis://app:{}@127.0.0.1:{}/0", house.proxy.org("acme").token(), house.proxy.port_of("Redis"));
    redis::Client::open(url).and_then(|client| client.get_connection()).expect("in")
}

/// Counts up in Redis until told to stop.
fn counts_up(house: &House, stop: &Arc<AtomicBool>) -> Told {
    let mut redis = redis_of(house);
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let (mut counted, mut refused) = (0, Vec::new());
        while !stop.load(Ordering::Relaxed) {
            match redis.incr::<_, _, u64>("counted", 1) {
                Ok(now) if now == counted + 1 => counted += 1,
                Ok(now) => refused.push(format!("redis: {now} after {counted}")),
                Err(error) => refused.push(format!("redis: {error}")),
            }
        }
        (counted, refused)
    })
}

/// After any kill: whoever comes next brings the documents to one place.
fn settles(house: &House, what: &str) -> String {
    eventually(what, || {
        house.proxy.command(&["tier", "retry", "acme"], &[]);
        let (code, out, _) = house.proxy.command(&["tier", "verify", "acme", "--json"], &[]);
        let verdict: Value = serde_json::from_str(&out).ok()?;
        (code == Some(0)).then(|| verdict["tier"].as_str().expect("a tier").to_owned())
    })
}

#[test]
fn killed_at_any_step_of_a_move_the_documents_are_in_the_one_place_that_is_looked_in() {
    let house = House::start();
    let ids: BTreeSet<i64> = (0..30).collect();
    block_on(async {
        let documents: Vec<Document> = ids.iter().map(|n| doc! { "_id": n }).collect();
        house.collection("acme").await.insert_many(documents).await.expect("inserted");
    });
    let all = std::env::var_os("DYNABASE_CHAOS_RUNS").is_some();
    let mut wanted: Vec<&str> = match all {
        true => {
            vec!["after a batch", "after a hold", "after the decision", "after a release", "after a place was cleared"]
        }
        false => Vec::new(),
    };
    let mut seen = Vec::new();
    let mut tier = "FREE".to_owned();
    // The databases are at work at the same time: what is passed at a number differs from run to run.
    for _ in 0..ROUNDS_MAX {
        let mut point = if all { 1 } else { 9 };
        loop {
            let to = if tier == "FREE" { "PRO" } else { "FREE" };
            let environment = [("DYNABASE_TEST_FAILPOINT", point.to_string())];
            let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
            let (code, _, err) = house.proxy.command(&["tier", "set", "acme", to, "--wait"], &environment);
            let name = err.lines().find_map(|line| line.strip_prefix("failpoint ")).map(str::to_owned);
            assert_eq!(code.is_none(), name.is_some(), "{err}");
            let what = format!("{tier} → {to}, killed at {point}: {name:?}");
            tier = settles(&house, &what);
            let expected = if tier == "FREE" { (30, 0) } else { (0, 30) };
            assert_eq!((house.behind("acme"), house.holds()), (expected, 0), "{what}, then {tier}");
            let found =
                block_on(async { house.collection("acme").await.count_documents(doc! {}).await.expect("counted") });
            assert_eq!(found, 30, "{what}");
            let Some(name) = name else { break };
            wanted.retain(|wanted| *wanted != name);
            seen.push(name);
            point += if all { 1 } else { 4 };
        }
        if wanted.is_empty() {
            break;
        }
    }
    println!("killed at {} points: {seen:?}", seen.len());
    assert!(wanted.is_empty(), "{wanted:?} were not passed: {seen:?}");
}

#[test]
fn what_shared_collections_can_t_hold_keeps_a_tenant_where_it_is() {
    let house = House::start();
    house.tier("PRO");
    let stays = |why: &str| {
        let (code, out, err) = house.proxy.command(&["tier", "set", "acme", "FREE", "--wait"], &[]);
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains(why) && err.contains("stays on PRO"), "{err}");
        assert_eq!((house.behind("acme"), house.holds()), ((0, 1), 0), "{why}");
    };
    let run = |command: Document| {
        block_on(async { house.client("acme").await.database("app").run_command(command).await.expect("done") });
    };
    run(doc! { "insert": "kept", "documents": [{ "_id": 1 }] });
    run(doc! { "create": "log", "capped": true, "size": 4096 });
    stays("app.log has capped");
    run(doc! { "drop": "log" });
    let german = doc! { "key": { "name": 1 }, "name": "german", "collation": { "locale": "de" } };
    run(doc! { "createIndexes": "kept", "indexes": [german] });
    stays("index german of app.kept can't be in a shared collection");
    run(doc! { "dropIndexes": "kept", "index": "german" });
    run(doc! { "create": "seen", "viewOn": "kept", "pipeline": [] });
    stays("app.seen is no plain collection");
    run(doc! { "drop": "seen" });
    // An _id that another tenant has in the shared collection.
    block_on(async {
        house.collection("globex").await.insert_one(doc! { "_id": 1 }).await.expect("inserted");
    });
    stays("is taken there");
    assert_eq!(house.behind("globex"), (1, 0));
    // Nothing else was in its way.
    block_on(async {
        house.collection("globex").await.delete_one(doc! { "_id": 1 }).await.expect("deleted");
    });
    house.tier("FREE");
    assert_eq!(house.behind("acme"), (1, 0));
}

#[test]
fn a_tenant_with_more_collections_than_a_tier_has_goes_there_only_by_force_and_makes_no_more() {
    let house = House::with_free(Limits { collections: 2, ..Limits::default() });
    house.tier("PRO");
    let insert = |name: &str| {
        block_on(async {
            let database = house.client("acme").await.database("app");
            database.collection::<Document>(name).insert_one(doc! { "a": 1 }).await
        })
    };
    for name in ["a", "b", "c"] {
        insert(name).expect("inserted");
    }
    let (code, out, err) = house.proxy.command(&["tier", "set", "acme", "FREE", "--wait"], &[]);
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("collections") && out.contains('3') && out.contains('2'), "{out}");
    assert!(err.contains("more than FREE allows"), "{err}");
    let (code, out, err) = house.proxy.command(&["tier", "set", "acme", "FREE", "--wait", "--force"], &[]);
    assert_eq!(code, Some(0), "{out}{err}");
    for name in ["a", "b", "c"] {
        insert(name).expect("it is there");
    }
    let refused = insert("d").expect_err("one more").to_string();
    assert!(refused.contains("242") && refused.contains("3 of 2 of tier FREE"), "{refused}");
}

#[test]
fn a_coordinator_that_was_frozen_in_a_batch_writes_nothing_once_another_one_has_come() {
    let house = House::start();
    block_on(async {
        let kept = house.collection("acme").await;
        kept.insert_many((0..20_i64).map(|id| doc! { "_id": id, "n": 0_i64 })).await.expect("inserted");
    });
    // The first batch that is written, the notice of the standstill; in `make chaos` a batch of the other direction too.
    let all = std::env::var_os("DYNABASE_CHAOS_RUNS").is_some();
    let cases = [("FREE", "PRO", "in a batch"), ("PRO", "FREE", "before a hold"), ("FREE", "PRO", "before a hold")];
    let more = [("PRO", "FREE", "in a batch")];
    let cases = cases[..if all { 3 } else { 2 }].iter().chain(more.iter().filter(|_| all));
    for (turn, &(from, to, name)) in (1_i64..).zip(cases) {
        let frozen = freeze(&house, to, name);
        // Its lease runs out, and somebody else goes on or puts everything back; then the tenant writes.
        // The lease is what is waited for: nothing else tells that its owner does not come.
        std::thread::sleep(LEASE);
        if settles(&house, &format!("{to}, frozen {name}")) == from {
            house.tier(to);
        }
        block_on(async {
            let kept = house.collection("acme").await;
            kept.update_many(doc! {}, doc! { "$set": { "n": turn } }).await.expect("counted");
            kept.delete_one(doc! { "_id": 20 - turn }).await.expect("deleted");
        });
        thaw(frozen);
        let left = u64::try_from(20 - turn).expect("some");
        let wanted = if to == "FREE" { (left, 0) } else { (0, left) };
        assert_eq!((house.behind("acme"), house.holds()), (wanted, 0), "{to}, {name}");
        let stale = block_on(async {
            let kept = house.collection("acme").await;
            kept.count_documents(doc! { "n": { "$ne": turn } }).await.expect("not held")
        });
        assert_eq!(stale, 0, "{to}, {name}");
    }
}

/// A process that stands still. It ends with the test, however that ends.
struct Frozen(std::process::Child);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A move whose process stands still from the first point of this name on.
fn freeze(house: &House, to: &str, name: &str) -> Frozen {
    let mut child = house.proxy.begin(&["tier", "set", "acme", to, "--wait"], &[("DYNABASE_TEST_FREEZE", name)]);
    let mut said = String::new();
    let mut lines = BufReader::new(child.stderr.as_mut().expect("piped"));
    while !said.contains("failpoint ") && lines.read_line(&mut said).is_ok_and(|read| read > 0) {}
    drop(lines);
    let frozen = Frozen(child);
    assert!(said.contains(&format!("failpoint {name}")), "{said}");
    frozen
}

/// Lets it go on, to its end: it is told what became of the move, whoever has made it. One that is not stopped by its
/// fence may never come to one.
fn thaw(mut frozen: Frozen) {
    let pid = rustix::process::Pid::from_child(&frozen.0);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).expect("it is there");
    until("the frozen coordinator ends", || frozen.0.try_wait().expect("its parent may ask").is_some());
}
