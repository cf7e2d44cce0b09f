//! SQL over HTTP: what is read as a body is JSON for everybody, its parameters become text or a fault, and whatever a
//! server says becomes JSON that everybody reads.
#![no_main]

use dynabase::wire::neon::{
    reply::{Columns, Shape, error, put_tail},
    request::{Request, param, parse},
    sink::Sink,
    value::{Element, Kind, put},
};
use libfuzzer_sys::fuzz_target;

const KINDS: [Kind; 7] = [
    Kind::Bool,
    Kind::Number,
    Kind::Text,
    Kind::Array(Element::Bool, b','),
    Kind::Array(Element::Number, b','),
    Kind::Array(Element::Text, b','),
    Kind::Array(Element::Text, b';'),
];

/// By the grammar: numbers of any size, nesting of any depth.
fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
}

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = parse(data) {
        assert!(is_json(data), "two readers disagree");
        let queries = match request {
            Request::Single(query) => vec![query],
            Request::Batch(queries) => queries,
        };
        for value in queries.iter().flat_map(|query| &query.params) {
            let _ = param(value);
        }
    }
    for kind in KINDS {
        let mut out = Vec::new();
        put(&mut Sink::new(&mut out, usize::MAX), kind, data).expect("room");
        assert!(is_json(&out), "{kind:?}");
        let mut bounded = Vec::new();
        let room = out.len() / 2;
        assert!(put(&mut Sink::new(&mut bounded, room), kind, data).is_err() && bounded.len() <= room, "{kind:?}");
    }
    assert!(is_json(&error(data)));
    if let Ok(columns) = Columns::parse(data) {
        let mut out = Vec::new();
        columns.put_head(&mut out);
        let shape = Shape { arrays: true, raw: true };
        if columns.put_row(&mut Sink::new(&mut out, usize::MAX), shape, data).is_err() {
            return;
        }
        put_tail(&mut out, b"SELECT 1", true);
        assert!(is_json(&out));
    }
});
