//! Redis' protocol: cut anywhere, a request gives the same arguments; no reply makes a walker or the taking off of
//! prefixes panic, and no key of somebody else's leaves an array of keys.
#![no_main]

use dynabase::{
    upstream::redis::reply::{Shape, strip},
    wire::resp::{ARGS_MAX, BULK_MAX, Cursor, Item, Progress, Reply, Request, split_inline},
};
use libfuzzer_sys::fuzz_target;

const SHAPES: [Shape; 9] = [
    Shape::Raw,
    Shape::Keys,
    Shape::Scan,
    Shape::Key,
    Shape::First,
    Shape::Streams,
    Shape::Pairs,
    Shape::Message,
    Shape::SetNx,
];
const PREFIX: &[u8] = b"org:a:";

fuzz_target!(|data: &[u8]| {
    let Some((&cut, bytes)) = data.split_first() else { return };
    let mut whole = Request::default();
    let once = whole.advance(bytes, ARGS_MAX, BULK_MAX);
    let mut parts = Request::default();
    let cut = usize::from(cut).min(bytes.len());
    if let Ok(Progress::Incomplete) = parts.advance(&bytes[..cut], ARGS_MAX, BULK_MAX) {
        assert_eq!(parts.advance(bytes, ARGS_MAX, BULK_MAX), once);
        assert_eq!(parts.args, whole.args);
    }
    let _ = split_inline(bytes);
    if let Ok((len, true)) = Reply::default().advance(bytes) {
        for shape in SHAPES {
            let mut out = Vec::new();
            strip(shape, &bytes[..len], PREFIX, &mut out);
            if shape == Shape::Keys && bytes[0] == b'*' {
                let mut theirs = Cursor { rest: &out };
                while let Some(item) = theirs.item() {
                    if let Item::Bulk(key) = item {
                        assert!(bytes.windows(PREFIX.len() + key.len()).any(|w| w.starts_with(PREFIX) && w.ends_with(key)));
                    }
                }
            }
        }
    }
});
