//! No rewritten request names a key outside the prefix, and nothing but keys is changed.
#![no_main]

use dynabase::{
    front::redis::{
        commands::{self, Policy},
        keys::{self, Found},
        rewrite::put_rewritten,
    },
    wire::resp::{ARGS_MAX, BULK_MAX, Progress, Request},
};
use libfuzzer_sys::fuzz_target;

const PREFIX: &[u8] = b"org:a:";

fuzz_target!(|bytes: &[u8]| {
    let mut request = Request::default();
    let Ok(Progress::Complete(len)) = request.advance(bytes, ARGS_MAX, BULK_MAX) else { return };
    let bytes = &bytes[..len];
    let args = &request.args;
    let Some(name) = args.first() else { return };
    let sub = args.get(1).map(|arg| arg.of(bytes));
    let row = commands::find(name.of(bytes), None)
        .filter(|row| row.policy != Policy::Container)
        .or_else(|| commands::find(name.of(bytes), Some(sub?)));
    let Some(row) = row.filter(|row| row.fits(args.len())) else { return };
    let mut found = Found::default();
    keys::find(row, args, bytes, &mut found);
    assert!(found.keys.is_sorted() && found.keys.iter().all(|key| (1..args.len()).contains(key)));
    let mut out = Vec::new();
    put_rewritten(&mut out, bytes, args, &found.keys, PREFIX);
    let mut again = Request::default();
    assert_eq!(again.advance(&out, ARGS_MAX, BULK_MAX), Ok(Progress::Complete(out.len())));
    assert_eq!(again.args.len(), args.len());
    for (i, (before, after)) in args.iter().zip(&again.args).enumerate() {
        let expected = if found.keys.contains(&i) { [PREFIX, before.of(bytes)].concat() } else { before.of(bytes).to_vec() };
        assert_eq!(after.of(&out), expected);
    }
});
