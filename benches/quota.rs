//! What a decision costs. Budgets: one rate decision 25 ns, one place taken and given back 30 ns, all cores on one
//! tenant at most four times one core. Run: `cargo bench --bench quota`.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use dynabase::{
    quota::{
        Live, Permit, Place, Slot, Table, clock,
        rate::{Pace, Rate},
    },
    tenant::{
        OrgId, Protocol, Status, Tenant, Tier, Tiers,
        directory::{Ask, Directory},
    },
};

const PG: Protocol = Protocol::Postgres;

fn record(epoch: u64) -> Arc<Tenant> {
    Arc::new(Tenant {
        org: OrgId::parse("acme").expect("within the pattern"),
        tier: Tier::Enterprise,
        status: Status::Active,
        epoch,
        generation: 1,
        databases: Vec::new(),
        users: Vec::new(),
        routes: Default::default(),
        still: false,
    })
}

/// A table with one resident tenant, whose rate is out of reach so that every decision takes the longer path.
fn resident() -> (Table, Arc<Slot>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let text = include_str!("../config/tiers.toml")
            .replace("per_second = 20000, burst = 40000", "per_second = 1000000000, burst = 4000000000");
        let (directory, mut asks) = Directory::new();
        let table = Table::new(directory, Tiers::parse(&text).expect("the shipped tiers"), 10);
        tokio::spawn(async move {
            while let Some(Ask::Tenant(_, reply)) = asks.recv().await {
                let _ = reply.send(Ok(record(1)));
            }
        });
        let slot = table.slot(&record(1).org).await.expect("the catalog answers");
        (table, slot)
    })
}

/// The time that `threads` need for `times` runs each, started together.
fn together(threads: usize, times: u64, run: impl Fn() + Sync) -> Duration {
    let barrier = std::sync::Barrier::new(threads);
    std::thread::scope(|scope| {
        let work = || {
            barrier.wait();
            let start = Instant::now();
            (0..times).for_each(|_| run());
            start.elapsed()
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("it ran")).max().unwrap_or_default()
    })
}

fn single(c: &mut Criterion) {
    let (_table, slot) = resident();
    let rate = Rate::default();
    let pace = Pace::new(1, u32::MAX);
    let now_ns = clock::now_ns();
    c.bench_function("rate admit", |b| b.iter(|| black_box(&rate).admit(black_box(now_ns), 1, pace)));
    let empty = Rate::default();
    empty.charge(now_ns, 1, Pace::new(1_000_000_000, 1));
    c.bench_function("rate refuse", |b| {
        b.iter(|| black_box(&empty).admit(black_box(now_ns), 1, Pace::new(1_000_000_000, 1)))
    });

    let place = Place::default();
    c.bench_function("place take and give", |b| {
        b.iter(|| {
            assert!(black_box(&place).take(100));
            place.give();
        });
    });
    struct Owner(Place);
    let owner = Arc::new(Owner(Place::default()));
    c.bench_function("permit take and drop", |b| b.iter(|| Permit::take(black_box(&owner), |owner| &owner.0, 100)));

    c.bench_function("clock", |b| b.iter(clock::now_ns));
    c.bench_function("policy load", |b| b.iter(|| black_box(&slot).policy().tenant.epoch));
    c.bench_function("slot admit, clock given", |b| b.iter(|| black_box(&slot).admit(PG, black_box(now_ns), 1)));
    c.bench_function("slot admit with clock", |b| b.iter(|| black_box(&slot).admit(PG, clock::now_ns(), 1)));
    c.bench_function("slot connection take and drop", |b| b.iter(|| black_box(&slot).connection(PG)));
    let live = Live::new(1, 1, u64::MAX, None, None);
    c.bench_function("deadline set and cleared, signals looked at", |b| {
        b.iter(|| {
            black_box(&live).set_deadline(1 << 40);
            let signalled = black_box(&live).signalled();
            live.set_deadline(u64::MAX);
            signalled
        });
    });
}

fn contended(c: &mut Criterion) {
    let (table, slot) = resident();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let now_ns = clock::now_ns();
    for threads in [1, cores] {
        c.bench_function(&format!("one tenant, {threads} threads: slot admit"), |b| {
            b.iter_custom(|times| together(threads, times, || _ = black_box(slot.admit(PG, now_ns, 1))));
        });
        c.bench_function(&format!("one tenant, {threads} threads: connection take and drop"), |b| {
            b.iter_custom(|times| together(threads, times, || drop(black_box(slot.connection(PG)))));
        });
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut epoch = 2;
            while !done.load(Ordering::Relaxed) {
                table.apply(record(epoch)).expect("a newer epoch");
                epoch += 1;
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        c.bench_function("slot admit while the policy is swapped every 0.1 ms", |b| {
            b.iter(|| black_box(&slot).admit(PG, now_ns, 1));
        });
        done.store(true, Ordering::Relaxed);
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1)).sample_size(30);
    targets = single, contended
}
criterion_main!(benches);
