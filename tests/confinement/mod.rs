//! No rewritten MongoDB request can touch a document of another tenant: proved of generated requests by an oracle that
//! shares nothing with the rewriting, and seen on a real server that holds documents of two tenants.
//!
//! `oracle.rs`, `generate.rs` and `sent.rs` serve the fuzz target as well.

mod generate;
mod life;
mod live;
mod oracle;
mod sent;

use bson::{Document, doc};
use dynabase::tenant::Isolation;
use generate::Choice;
use proptest::prelude::*;
use sent::{Asker, read};

/// Requests in a sweep; more than half of them have to be sent on, or the sweep would prove little.
const SWEEP: u64 = 20_000;

fn prove(asker: &Asker, request: &Document) -> bool {
    let Some(out) = asker.bytes(request) else { return false };
    let sent = read(&out).expect("text");
    if let Err(why) = asker.confined().prove(&sent) {
        panic!("{:?}: {why}\n  request {request}\n  sent    {sent}", asker.isolation);
    }
    true
}

/// Bytes from a number, the same each time.
pub(crate) fn bytes(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..160)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

#[test]
fn no_generated_request_leaves_the_tenant() {
    for isolation in [Isolation::Filter, Isolation::Database] {
        let asker = Asker::new(isolation);
        let sent = (0..SWEEP).filter(|seed| prove(&asker, &Choice::new(&bytes(*seed)).request())).count() as u64;
        assert!(sent > SWEEP / 8, "{isolation:?}: {sent} of {SWEEP} were sent");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn no_request_leaves_the_tenant(bytes in proptest::collection::vec(any::<u8>(), 0..240)) {
        for isolation in [Isolation::Filter, Isolation::Database] {
            prove(&Asker::new(isolation), &Choice::new(&bytes).request());
        }
    }
}

/// The oracle has to see what it is for: each of these would leave the tenant.
#[test]
fn the_oracle_sees_a_leak() {
    let asker = Asker::new(Isolation::Filter);
    let own = doc! { "org_id": "acme-1" };
    let hidden = doc! { "org_id": 0 };
    let aggregate = |stages: Vec<Document>| doc! { "aggregate": "c", "pipeline": stages, "$db": "shared_app" };
    let bound = doc! { "$match": own.clone() };
    let unset = doc! { "$unset": "org_id" };
    let leaks = [
        doc! { "find": "c", "filter": {}, "projection": hidden.clone(), "$db": "shared_app" },
        doc! { "find": "c", "filter": { "org_id": "acme-1", "a": 1 }, "projection": hidden.clone(), "$db": "shared_app" },
        doc! { "find": "c", "filter": own.clone(), "$db": "shared_app" },
        doc! { "find": "c", "filter": own.clone(), "projection": { "_id": 0 }, "$db": "shared_app" },
        doc! { "find": "c", "filter": own.clone(), "projection": hidden.clone(), "$db": "app" },
        doc! { "find": "c", "filter": own.clone(), "projection": hidden.clone(), "$db": "shared_app",
        "collation": { "locale": "en" } },
        doc! { "find": "c", "filter": { "$and": [own.clone(), { "$expr": { "$toInt": "$a" } }] },
        "projection": hidden.clone(), "$db": "shared_app" },
        doc! { "find": "c", "filter": own.clone(), "projection": hidden, "$db": "shared_app", "maxTimeMS": 6000 },
        doc! { "count": "c", "$db": "shared_app" },
        doc! { "insert": "c", "documents": [{ "a": 1 }], "$db": "shared_app" },
        doc! { "insert": "c", "documents": [own.clone()], "@documents": [own.clone()], "$db": "shared_app" },
        doc! { "update": "c", "updates": [{ "q": own.clone(), "u": { "a": 1 } }], "$db": "shared_app" },
        doc! { "update": "c", "updates": [{ "q": own.clone(), "u": { "$rename": { "a": "org_id" } } }],
        "$db": "shared_app" },
        doc! { "update": "c", "updates": [{ "q": own.clone(), "u": [{ "$unset": "org_id" }] }], "$db": "shared_app" },
        doc! { "delete": "c", "deletes": [{ "q": {}, "limit": 0 }], "$db": "shared_app" },
        doc! { "drop": "c", "$db": "shared_app" },
        doc! { "createIndexes": "c", "indexes": [{ "key": { "a": 1 }, "name": "a_1" }], "$db": "shared_app" },
        doc! { "bulkWrite": 1, "ops": [], "nsInfo": [{ "ns": "other.c" }], "$db": "admin" },
        aggregate(vec![]),
        aggregate(vec![bound.clone()]),
        aggregate(vec![bound.clone(), unset.clone(), doc! { "$unionWith": "d" }]),
        aggregate(vec![bound.clone(), unset.clone(), doc! { "$unionWith": { "coll": "d", "pipeline": [] } }]),
        aggregate(vec![bound.clone(), unset.clone(), doc! { "$lookup": { "from": "d", "as": "x" } }]),
        aggregate(vec![bound.clone(), unset.clone(), doc! { "$facet": { "x": [{ "$unionWith": "d" }] } }]),
        aggregate(vec![bound.clone(), unset.clone(), doc! { "$out": "d" }]),
        aggregate(vec![bound.clone(), unset.clone(), doc! { "$merge": { "into": "d" } }]),
        aggregate(vec![bound.clone(), unset.clone(), doc! { "$match": { "$expr": { "$toInt": "$a" } } }]),
        aggregate(vec![bound, unset, doc! { "$set": { "x": { "$function": {} } } }]),
        aggregate(vec![doc! { "$changeStream": {} }]),
    ];
    for leak in leaks {
        assert!(asker.confined().prove(&leak).is_err(), "{leak}");
    }
    let apart = Asker::new(Isolation::Database);
    let db = apart.place.physical("app").expect("a name");
    for leak in [
        doc! { "find": "c", "$db": "org_globex~app" },
        doc! { "aggregate": "c", "pipeline": [{ "$out": { "db": "local", "coll": "c" } }], "$db": &db },
        doc! { "aggregate": "c", "pipeline": [{ "$currentOp": {} }], "$db": &db },
        doc! { "find": "system.users", "$db": &db },
        doc! { "dropDatabase": 1, "$db": "admin" },
    ] {
        assert!(apart.confined().prove(&leak).is_err(), "{leak}");
    }
}
