//! Names put inside the tenant's prefix, and lives of keys shortened, without a copy of anything else.

use super::{commands::Row, keys};
use crate::wire::resp::{Arg, put_array, put_bulk, put_bulk_joined, put_head};

/// Bytes of `*N` CRLF: headers come without leading zeros.
pub fn header_len(args: usize) -> usize {
    args.checked_ilog10().unwrap_or(0) as usize + 4
}

/// Writes a command with the prefix before each of `keys` (ascending). All other bytes go through as they came: the
/// decoder has accepted nothing but the one canonical form.
pub fn put_rewritten(out: &mut Vec<u8>, bytes: &[u8], args: &[Arg], keys: &[usize], prefix: &[u8]) {
    put_rewritten_from(out, 0, bytes, args, keys, prefix);
}

/// The same without the bytes before `start`.
pub fn put_rewritten_from(out: &mut Vec<u8>, start: usize, bytes: &[u8], args: &[Arg], keys: &[usize], prefix: &[u8]) {
    let mut from = start;
    for &key in keys {
        let Arg { start, len } = args[key];
        let before = args[key - 1];
        out.extend_from_slice(&bytes[from..before.start + before.len + 2]);
        put_head(out, b'$', prefix.len() + len);
        out.extend_from_slice(prefix);
        from = start;
    }
    out.extend_from_slice(&bytes[from..]);
}

/// Writes a command whose life can be shortened in place; false (and nothing written) for every other form.
pub fn put_shortened(out: &mut Vec<u8>, row: &Row, bytes: &[u8], args: &[Arg], prefix: &[u8], ttl: u64) -> bool {
    let fits = |arg: Arg, unit: u64| {
        keys::number(arg.of(bytes)).filter(|n| *n > 0).map(|n| n.unsigned_abs() <= ttl.saturating_mul(unit))
    };
    let replace = |out: &mut Vec<u8>, at: usize, unit: u64| {
        let life = ttl.saturating_mul(unit).to_string();
        put_array(out, args.len());
        for (i, arg) in args.iter().enumerate() {
            match i {
                1 => put_bulk_joined(out, prefix, arg.of(bytes)),
                i if i == at => put_bulk(out, life.as_bytes()),
                _ => put_bulk(out, arg.of(bytes)),
            }
        }
    };
    let (at, unit) = match (row.name, args.len()) {
        ("set", 3) => {
            put_array(out, 5);
            put_rewritten_from(out, header_len(3), bytes, args, &[1], prefix);
            out.extend_from_slice(b"$2\r\nEX\r\n");
            put_bulk(out, ttl.to_string().as_bytes());
            return true;
        }
        ("set", 5) if args[3].of(bytes).eq_ignore_ascii_case(b"EX") => (4, 1),
        ("set", 5) if args[3].of(bytes).eq_ignore_ascii_case(b"PX") => (4, 1000),
        ("setex" | "expire", _) if args.len() == if row.name == "setex" { 4 } else { 3 } => (2, 1),
        ("psetex" | "pexpire", _) if args.len() == if row.name == "psetex" { 4 } else { 3 } => (2, 1000),
        _ => return false,
    };
    match fits(args[at], unit) {
        Some(true) => put_rewritten(out, bytes, args, &[1], prefix),
        Some(false) => replace(out, at, unit),
        // Not a number, or not a positive one: the server says what is wrong with it, or deletes the key.
        None => put_rewritten(out, bytes, args, &[1], prefix),
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        front::redis::commands,
        wire::resp::{ARGS_MAX, BULK_MAX, Request, put_request},
    };

    fn parsed(words: &[&[u8]]) -> (Vec<u8>, Vec<Arg>) {
        let mut bytes = Vec::new();
        put_request(&mut bytes, words);
        let mut request = Request::default();
        request.advance(&bytes, ARGS_MAX, BULK_MAX).expect("valid");
        (bytes, request.args)
    }

    fn shortened(words: &[&[u8]]) -> Option<String> {
        let (bytes, args) = parsed(words);
        let row = commands::find(words[0], None).expect("known");
        let mut out = Vec::new();
        let done = put_shortened(&mut out, row, &bytes, &args, b"p:", 60);
        let words = crate::wire::resp::Cursor { rest: &out };
        done.then(|| crate::upstream::redis::dial::strings(words.rest).join(" "))
    }

    #[test]
    fn lives_are_cut_and_never_prolonged() {
        for (words, expected) in [
            (&[&b"SET"[..], b"k", b"v"][..], Some("SET p:k v EX 60")),
            (&[b"SET", b"k", b"v", b"EX", b"61"], Some("SET p:k v EX 60")),
            (&[b"SET", b"k", b"v", b"ex", b"59"], Some("SET p:k v ex 59")),
            (&[b"SET", b"k", b"v", b"PX", b"60001"], Some("SET p:k v PX 60000")),
            (&[b"SET", b"k", b"v", b"EX", b"0"], Some("SET p:k v EX 0")),
            (&[b"SET", b"k", b"v", b"NX"], None),
            (&[b"SET", b"k", b"v", b"KEEPTTL"], None),
            (&[b"SET", b"k", b"v", b"EX", b"99", b"NX"], None),
            (&[b"SETEX", b"k", b"3600", b"v"], Some("SETEX p:k 60 v")),
            (&[b"EXPIRE", b"k", b"9999999999999"], Some("EXPIRE p:k 60")),
            (&[b"EXPIRE", b"k", b"-1"], Some("EXPIRE p:k -1")),
            (&[b"EXPIRE", b"k", b"10", b"NX"], None),
            (&[b"HSET", b"k", b"f", b"v"], None),
            (&[b"PERSIST", b"k"], None),
        ] {
            assert_eq!(shortened(words).as_deref(), expected, "{words:?}");
        }
    }

    #[test]
    fn rewriting_moves_no_byte_that_is_not_a_key() {
        let (bytes, args) = parsed(&[b"MSET", b"a", b"\r\n$1\r\nx", b"b", b"$3"]);
        let mut out = Vec::new();
        put_rewritten(&mut out, &bytes, &args, &[1, 3], b"org:a:");
        let (expected, _) = parsed(&[b"MSET", b"org:a:a", b"\r\n$1\r\nx", b"org:a:b", b"$3"]);
        assert_eq!(out, expected);
    }

    #[test]
    fn header_lengths() {
        for n in [1, 9, 10, 99, 100, 1_000_000] {
            let mut out = Vec::new();
            put_array(&mut out, n);
            assert_eq!(header_len(n), out.len(), "{n}");
        }
    }

    proptest::proptest! {
        /// What the fuzz target `redis_rewrite` proves for longer.
        #[test]
        fn no_rewritten_request_names_a_key_outside(
            row in 0..commands::ROWS.len(),
            words in proptest::collection::vec("[a-zA-Z0-9*>-]{0,3}|STREAMS|STORE|BY|GET|COUNT|LIMIT|BLOCK|GROUP|1|2", 0..12),
        ) {
            let row = &commands::ROWS[row];
            let name: Vec<&str> = row.name.split('|').collect();
            let all: Vec<&[u8]> = name.into_iter().chain(words.iter().map(String::as_str)).map(str::as_bytes).collect();
            let (bytes, args) = parsed(&all);
            if row.fits(args.len()) {
                let mut found = keys::Found::default();
                keys::find(row, &args, &bytes, &mut found);
                let mut out = Vec::new();
                put_rewritten(&mut out, &bytes, &args, &found.keys, b"org:a:");
                let mut again = Request::default();
                assert_eq!(again.advance(&out, ARGS_MAX, BULK_MAX), Ok(crate::wire::resp::Progress::Complete(out.len())));
                for (i, (before, after)) in args.iter().zip(&again.args).enumerate() {
                    let prefix: &[u8] = if found.keys.contains(&i) { b"org:a:" } else { b"" };
                    assert_eq!(after.of(&out), [prefix, before.of(&bytes)].concat());
                }
            }
        }
    }
}
