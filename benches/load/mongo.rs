//! A load generator for `benches/mongo.py`: the Rust driver, so many clients at a time, each asking again as soon as it
//! is answered. Prints one line of JSON.
//!
//! ```text
//! mongo_load URL CASE CLIENTS OPERATIONS
//! ```

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::{Client, Collection, options::ClientOptions};

/// Documents that are there before a case begins. Few: SecantusDB finds no index for a clause inside `$and`, which is what a
/// filter of a shared collection is, and looks at all of them.
const DOCUMENTS: i32 = 200;

/// Documents that an aggregation groups.
const GROUPED: i32 = 50;

#[derive(Clone, Copy)]
enum Case {
    Find,
    Insert,
    Aggregate,
}

fn document(n: i32) -> Document {
    doc! { "_id": n, "customer": format!("c-{:06}", n % 500), "status": "open", "n": n, "note": "a text of usual length" }
}

async fn prepare(things: &Collection<Document>, case: Case) -> mongodb::error::Result<()> {
    if matches!(case, Case::Insert) {
        return things.drop().await;
    }
    if things.estimated_document_count().await? == u64::from(DOCUMENTS.unsigned_abs()) {
        return Ok(());
    }
    things.drop().await?;
    things.insert_many((0..DOCUMENTS).map(document)).await.map(|_| ())
}

async fn once(things: &Collection<Document>, case: Case, n: i32) -> mongodb::error::Result<()> {
    match case {
        Case::Find => things.find_one(doc! { "_id": n.rem_euclid(DOCUMENTS) }).await.map(|_| ()),
        Case::Insert => {
            let one = doc! { "customer": "c-000123", "status": "open", "n": n, "note": "a text of usual length" };
            things.insert_one(one).await.map(|_| ())
        }
        Case::Aggregate => {
            let from = n.rem_euclid(DOCUMENTS - GROUPED);
            let stages = [
                doc! { "$match": { "_id": { "$gte": from, "$lt": from + GROUPED } } },
                doc! { "$group": { "_id": "$status", "sum": { "$sum": "$n" } } },
            ];
            things.aggregate(stages).await?.try_collect::<Vec<_>>().await.map(|_| ())
        }
    }
}

async fn run(url: &str, case: Case, clients: u32, operations: u64) -> mongodb::error::Result<String> {
    let mut options = ClientOptions::parse(url).await?;
    options.max_pool_size = Some(clients);
    options.min_pool_size = Some(clients);
    options.server_selection_timeout = Some(Duration::from_secs(20));
    let client = Client::with_options(options)?;
    let database = client.default_database().unwrap_or_else(|| client.database("app"));
    let name = if matches!(case, Case::Insert) { "bench_inserted" } else { "bench" };
    let things = database.collection::<Document>(name);
    prepare(&things, case).await?;
    // Every client's connection is made and warm.
    futures_util::future::try_join_all((0..clients).map(|n| once(&things, case, n.cast_signed()))).await?;
    let (next, errors) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let began = Instant::now();
    let tasks = (0..clients).map(|_| {
        let (things, next, errors) = (things.clone(), Arc::clone(&next), Arc::clone(&errors));
        tokio::spawn(async move {
            let mut took = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= operations {
                    return took;
                }
                // Spread over the documents.
                let n = i32::try_from(at.wrapping_mul(7919) % 1_000_000).unwrap_or(0);
                let since = Instant::now();
                if once(&things, case, n).await.is_err() {
                    errors.fetch_add(1, Ordering::Relaxed);
                }
                took.push(u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
        })
    });
    let mut took = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        took.extend(task.await.unwrap_or_default());
    }
    let seconds = began.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |share: f64| took.get((took.len() as f64 * share) as usize).copied().unwrap_or_default();
    Ok(format!(
        "{{\"operations\": {}, \"seconds\": {seconds:.4}, \"p50_us\": {}, \"p99_us\": {}, \"errors\": {}}}",
        took.len(),
        at(0.5),
        at(0.99),
        errors.load(Ordering::Relaxed)
    ))
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [url, case, clients, operations] = words.as_slice() else {
        eprintln!("mongo_load URL find|insert|aggregate CLIENTS OPERATIONS");
        return ExitCode::from(2);
    };
    let case = match case.as_str() {
        "find" => Case::Find,
        "insert" => Case::Insert,
        "aggregate" => Case::Aggregate,
        _ => return ExitCode::from(2),
    };
    let (Ok(clients), Ok(operations)) = (clients.parse(), operations.parse()) else { return ExitCode::from(2) };
    // One thread: the other core is for the server and the proxy.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(url, case, clients, operations)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
