//! What rewriting a request costs. Mark: a find of 246 bytes bound to its tenant in 500 ns. Run:
//! `cargo bench --bench mongo`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dynabase::{
    front::mongo::rewrite::{Request, Scope, Verdict, rewrite},
    tenant::{
        Isolation, Names, OrgId,
        namespace::{NameStyle, RootSecret},
    },
    wire::mongo::bson,
};

const TIER_MS: i32 = 5000;

fn document(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    let open = bson::open(&mut out);
    write(&mut out);
    bson::close(&mut out, open);
    out
}

/// The head that drivers send with each command.
fn tail(out: &mut Vec<u8>) {
    bson::put_str(out, "$db", "app");
    let lsid = bson::open_document(out, "lsid");
    bson::put_binary(out, "id", 4, &[7; 16]);
    bson::close(out, lsid);
}

fn find() -> Vec<u8> {
    document(|out| {
        bson::put_str(out, "find", "orders");
        let filter = bson::open_document(out, "filter");
        bson::put_str(out, "customer", "c-000123");
        let status = bson::open_document(out, "status");
        let list = bson::open_array(out, "$in");
        bson::put_str(out, "0", "open");
        bson::put_str(out, "1", "paid");
        bson::close(out, list);
        bson::close(out, status);
        bson::close(out, filter);
        let sort = bson::open_document(out, "sort");
        bson::put_i32(out, "created_at", -1);
        bson::close(out, sort);
        bson::put_i32(out, "limit", 20);
        bson::put_i32(out, "batchSize", 20);
        tail(out);
        bson::put_str(out, "comment", "list of orders");
    })
}

fn insert() -> (Vec<u8>, Vec<u8>) {
    let body = document(|out| {
        bson::put_str(out, "insert", "orders");
        bson::put_bool(out, "ordered", true);
        tail(out);
    });
    let mut documents = Vec::new();
    for id in 0..100u8 {
        documents.extend(document(|out| {
            bson::put_object_id(out, "_id", &[id; 12]);
            for field in ["customer", "status", "currency", "note"] {
                bson::put_str(out, field, "a text of usual length");
            }
        }));
    }
    (body, documents)
}

fn aggregate() -> Vec<u8> {
    document(|out| {
        bson::put_str(out, "aggregate", "orders");
        let stages = bson::open_array(out, "pipeline");
        let stage = bson::open_document(out, "0");
        let filter = bson::open_document(out, "$match");
        bson::put_str(out, "status", "open");
        bson::close(out, filter);
        bson::close(out, stage);
        let stage = bson::open_document(out, "1");
        let lookup = bson::open_document(out, "$lookup");
        for (key, value) in [("from", "customers"), ("localField", "customer"), ("foreignField", "_id"), ("as", "c")] {
            bson::put_str(out, key, value);
        }
        bson::close(out, lookup);
        bson::close(out, stage);
        bson::close(out, stages);
        let cursor = bson::open_document(out, "cursor");
        bson::close(out, cursor);
        tail(out);
    })
}

fn costs(criterion: &mut Criterion) {
    let org = OrgId::parse("acme").expect("within the pattern");
    let names = Names::new(RootSecret::new(&[7; 32]).expect("long enough"), NameStyle::Opaque);
    let (find, aggregate, (insert, documents)) = (find(), aggregate(), insert());
    let batch: [(&str, &[u8]); 1] = [("documents", &documents)];
    for isolation in [Isolation::Filter, Isolation::Database] {
        let place = names.mongodb(&org, isolation);
        let scope = Scope { isolation, org: &org, place: &place, max_time_ms: TIER_MS, shows_org: false };
        let mut group = criterion.benchmark_group(format!("{isolation:?}"));
        for (name, body, sections) in
            [("find", &find, &batch[..0]), ("aggregate", &aggregate, &batch[..0]), ("insert 100", &insert, &batch[..])]
        {
            let bytes = body.len() + sections.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
            group.throughput(Throughput::Bytes(bytes as u64));
            let mut out = Vec::with_capacity(64 * 1024);
            group.bench_function(format!("{name}, {bytes} bytes"), |bencher| {
                bencher.iter(|| {
                    out.clear();
                    let verdict = rewrite(black_box(&scope), &Request { body, sections }, &mut out);
                    assert!(matches!(verdict, Verdict::Forward(_)));
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, costs);
criterion_main!(benches);
