//! Many tenants on few connections; and a driver's own pool on fewer than it has.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use dynabase::tenant::Tier;
use sqlx::{Connection, Row, postgres::PgPoolOptions};

use crate::support::{
    PATIENCE,
    postgres::Own,
    proxy::{Limits, Org, Proxy, Setup},
    until,
    wire::Wire,
};

const TENANTS: usize = 50;
const BUDGET: u32 = 8;

#[test]
fn fifty_tenants_on_eight_connections_all_make_progress() {
    let server = Own::start();
    let mut setup = Setup {
        upstream: format!("max_connections = {BUDGET}\nidle_timeout = \"2s\"\n"),
        ..Setup::free(Limits { queue_timeout: "20s", ..Limits::default() })
    };
    setup.tiers[1].queue_timeout = "300ms";
    let proxy = Proxy::before(&server.place, &setup);
    let hammer = proxy.tenant("hammer", Tier::Enterprise);
    let tenants: Vec<Org<'_>> = (0..TENANTS).map(|n| proxy.tenant(&format!("small-{n}"), Tier::Free)).collect();
    let backends = || {
        server
            .place
            .value("select count(*) from pg_stat_activity where usename like 't\\_%'")
            .parse::<u32>()
            .expect("a number")
    };
    let (over, hammered, most) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let mut client = hammer.wire();
                while !over.load(Ordering::Acquire) {
                    assert_eq!(client.code("select pg_sleep(0.01)"), "");
                    hammered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                most.fetch_max(backends(), Ordering::Relaxed);
            }
        });
        until("the hammer has all there is", || backends() == BUDGET);
        let began = Instant::now();
        let work = |org: &Org<'_>| {
            let mut client = org.wire();
            for n in 0..5 {
                assert_eq!(client.ask(&format!("select {n} from pg_sleep(0.005)")), n.to_string(), "{}", org.org);
            }
        };
        let workers: Vec<_> = tenants.iter().map(|org| scope.spawn(move || work(org))).collect();
        for worker in workers {
            worker.join().expect("served");
        }
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        // The one with the most work has not been shut out by the many either.
        let before = hammered.load(Ordering::Relaxed);
        until("the hammer goes on", || hammered.load(Ordering::Relaxed) > before + 16);
        over.store(true, Ordering::Release);
    });
    assert!(most.load(Ordering::Relaxed) <= BUDGET, "{most:?} backends");
    // Nobody needs them now.
    until("idle connections are closed", || backends() == 0);
    // All held: who waits longer than its tier's queue is told so, and its session goes on.
    let mut holders: Vec<Wire> = (0..BUDGET).map(|_| hammer.wire()).collect();
    let late = proxy.tenant("late", Tier::Starter);
    let mut waiting = late.wire();
    for holder in &mut holders {
        holder.ask("begin");
    }
    let began = Instant::now();
    let refused = waiting.query("select 1");
    assert!(["57P03", "53300"].contains(&refused.code().as_str()) && refused.error(b'S') == "ERROR", "{refused:?}");
    assert!(began.elapsed() >= Duration::from_millis(300));
    holders[0].ask("commit");
    until("a place is free", || waiting.code("select 1").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlx_with_a_pool_of_ten_on_one_connection() {
    let org = Proxy::shared().tenant("sqlx", Tier::Free);
    let pool = PgPoolOptions::new().max_connections(10).connect(&org.url()).await.expect("connected");
    for migration in [
        "create table notes (id bigserial primary key, body text not null)",
        "create index notes_body on notes (body)",
        "alter table notes add column done boolean not null default false",
    ] {
        let mut transaction = pool.begin().await.expect("begun");
        sqlx::query(migration).execute(&mut *transaction).await.expect(migration);
        transaction.commit().await.expect("committed");
    }
    let mut tasks = tokio::task::JoinSet::new();
    for me in 0..10i64 {
        let pool = pool.clone();
        tasks.spawn(async move {
            for n in 0..20i64 {
                let body = format!("{me}/{n}");
                let row = sqlx::query("insert into notes (body) values ($1) returning id, done")
                    .bind(&body)
                    .fetch_one(&pool)
                    .await?;
                let (id, done): (i64, bool) = (row.get(0), row.get(1));
                assert!(!done);
                let mut transaction = pool.begin().await?;
                sqlx::query("update notes set done = true where id = $1").bind(id).execute(&mut *transaction).await?;
                if n % 2 == 0 {
                    transaction.commit().await?;
                } else {
                    transaction.rollback().await?;
                }
                let back: (String, bool) =
                    sqlx::query_as("select body, done from notes where id = $1").bind(id).fetch_one(&pool).await?;
                assert_eq!(back, (body, n % 2 == 0));
            }
            Ok::<_, sqlx::Error>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no panic").expect("no error");
    }
    // The schema changes under the statements that its connections have cached.
    sqlx::query("alter table notes add column extra int default 7").execute(&pool).await.expect("altered");
    let mut connection = pool.acquire().await.expect("one");
    connection.ping().await.expect("alive");
    let row = sqlx::query("select id, extra from notes order by id limit 1")
        .fetch_one(&mut *connection)
        .await
        .expect("a row");
    assert_eq!(row.get::<i32, _>(1), 7);
    let error = sqlx::query("select nosuch from notes").fetch_one(&mut *connection).await.expect_err("no column");
    assert_eq!(error.as_database_error().and_then(|error| error.code()).as_deref(), Some("42703"));
    let (done,): (i64,) =
        sqlx::query_as("select count(*) from notes where done").fetch_one(&mut *connection).await.expect("a row");
    assert_eq!(done, 100);
    drop(connection);
    pool.close().await;
    org.settles(1);
    assert!(org.backends() <= 1);
}
