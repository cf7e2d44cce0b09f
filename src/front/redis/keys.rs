//! Where the keys stand in one call, read as the server reads it.
//!
//! A call that the server will refuse as malformed gets every argument from the doubtful place on treated as a key:
//! the server's own error comes back, and whatever it may think of the bytes, no name outside the tenant was sent.

use super::commands::{Keys, Made, Row};
use crate::wire::resp::Arg;

/// The names found in a call.
#[derive(Debug, Default)]
pub struct Found {
    /// Indexes of arguments that are keys or key patterns, ascending.
    pub keys: Vec<usize>,
    /// The target of `STORE`.
    pub store: Option<usize>,
    /// `SORT` follows patterns (`BY`, `GET`).
    pub follows: bool,
    /// `XREAD … BLOCK`.
    pub blocks: bool,
}

impl Found {
    fn clear(&mut self) {
        self.keys.clear();
        self.store = None;
        self.follows = false;
        self.blocks = false;
    }

    /// The keys that the call may create.
    pub fn made(&self, made: Made) -> &[usize] {
        match made {
            Made::None => &[],
            Made::First => &self.keys[..self.keys.len().min(1)],
            Made::Last => &self.keys[self.keys.len().saturating_sub(1)..],
            Made::All => &self.keys,
            Made::Store => self.store.as_slice(),
        }
    }
}

/// Finds the keys of a call of `row`; `args` are within its arity, `offset` is 0, also for subcommands.
pub fn find(row: &Row, args: &[Arg], bytes: &[u8], found: &mut Found) {
    found.clear();
    let end = args.len();
    match row.keys {
        Keys::Nowhere => {}
        Keys::At1 => found.keys.push(1),
        Keys::At2 => {
            if end > 2 {
                found.keys.push(2);
            }
        }
        Keys::First2 => found.keys.extend(1..end.min(3)),
        Keys::All => found.keys.extend(1..end),
        Keys::Every2 => found.keys.extend((1..end).step_by(2)),
        Keys::AllButLast => found.keys.extend(1..end - 1),
        Keys::From2 => found.keys.extend(2..end),
        Keys::Num1 => counted(1, args, bytes, found),
        Keys::Num2 => counted(2, args, bytes, found),
        Keys::DestNum2 => {
            found.keys.push(1);
            counted(2, args, bytes, found);
        }
        Keys::Streams => streams(row, args, bytes, found),
        Keys::Radius => radius(row, args, bytes, found),
        Keys::Sort => sort(args, bytes, found),
    }
}

/// A number as the server reads it: no sign but `-`, no blank, no leading zero.
pub fn number(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical = digits == b"0" && digits.len() == text.len()
        || digits.first().is_some_and(|b| (b'1'..=b'9').contains(b)) && digits.iter().all(u8::is_ascii_digit);
    canonical.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()
}

fn counted(at: usize, args: &[Arg], bytes: &[u8], found: &mut Found) {
    let first = at + 1;
    let count = args.get(at).and_then(|arg| number(arg.of(bytes)));
    let last = match count.map(usize::try_from) {
        Some(Ok(count)) if count <= args.len().saturating_sub(first) => first + count,
        // The server will refuse it.
        _ => args.len(),
    };
    found.keys.extend(first..last);
}

/// Whether the server takes an argument for this option: it compares strings of C, which end at a zero byte.
pub fn is_option(text: &[u8], word: &str) -> bool {
    let len = memchr::memchr(0, text).unwrap_or(text.len());
    text[..len].eq_ignore_ascii_case(word.as_bytes())
}

fn is(arg: Option<&Arg>, bytes: &[u8], word: &str) -> bool {
    arg.is_some_and(|arg| is_option(arg.of(bytes), word))
}

fn streams(row: &Row, args: &[Arg], bytes: &[u8], found: &mut Found) {
    let mut at = 1;
    while at < args.len() {
        let arg = args.get(at);
        if is(arg, bytes, "STREAMS") {
            let rest = args.len() - at - 1;
            // An odd number is refused by the server.
            let keys = if rest.is_multiple_of(2) { rest / 2 } else { rest };
            found.keys.extend(at + 1..at + 1 + keys);
            return;
        }
        at += if is(arg, bytes, "COUNT") {
            2
        } else if is(arg, bytes, "BLOCK") {
            found.blocks = true;
            2
        } else if is(arg, bytes, "NOACK") {
            1
        } else if is(arg, bytes, "GROUP") && row.name == "xreadgroup" {
            3
        } else {
            found.blocks = false;
            return found.keys.extend(at..args.len());
        };
    }
}

fn radius(row: &Row, args: &[Arg], bytes: &[u8], found: &mut Found) {
    found.keys.push(1);
    let mut at = if row.name == "georadius" { 6 } else { 5 };
    while at < args.len() {
        let arg = args.get(at);
        if (is(arg, bytes, "STORE") || is(arg, bytes, "STOREDIST")) && at + 1 < args.len() {
            found.keys.push(at + 1);
            found.store = Some(at + 1);
            at += 2;
        } else if is(arg, bytes, "COUNT") {
            at += 2;
        } else if ["WITHDIST", "WITHHASH", "WITHCOORD", "ANY", "ASC", "DESC"].iter().any(|word| is(arg, bytes, word)) {
            at += 1;
        } else {
            return found.keys.extend(at..args.len());
        }
    }
}

fn sort(args: &[Arg], bytes: &[u8], found: &mut Found) {
    found.keys.push(1);
    let mut at = 2;
    while at < args.len() {
        let arg = args.get(at);
        let left = args.len() - at - 1;
        if ["ASC", "DESC", "ALPHA"].iter().any(|word| is(arg, bytes, word)) {
            at += 1;
        } else if is(arg, bytes, "LIMIT") && left >= 2 {
            at += 3;
        } else if is(arg, bytes, "STORE") && left >= 1 {
            found.keys.push(at + 1);
            found.store = Some(at + 1);
            at += 2;
        } else if is(arg, bytes, "BY") && left >= 1 {
            // Without a star the pattern names no key: it means "do not sort".
            if args[at + 1].of(bytes).contains(&b'*') {
                found.keys.push(at + 1);
                found.follows = true;
            }
            at += 2;
        } else if is(arg, bytes, "GET") && left >= 1 {
            if args[at + 1].of(bytes) != b"#" {
                found.keys.push(at + 1);
            }
            found.follows = true;
            at += 2;
        } else {
            return found.keys.extend(at..args.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        front::redis::commands,
        wire::resp::{ARGS_MAX, BULK_MAX, Request, put_request},
    };

    fn keys(line: &str) -> (Vec<String>, Found) {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        let mut bytes = Vec::new();
        put_request(&mut bytes, &words);
        let mut request = Request::default();
        request.advance(&bytes, ARGS_MAX, BULK_MAX).expect("valid");
        let row = commands::find(words[0], None)
            .filter(|row| row.policy != commands::Policy::Container)
            .or_else(|| commands::find(words[0], Some(words[1])))
            .expect("a known command");
        let mut found = Found::default();
        find(row, &request.args, &bytes, &mut found);
        (found.keys.iter().map(|i| String::from_utf8_lossy(words[*i]).into_owned()).collect(), found)
    }

    #[test]
    fn options_are_read_as_the_server_reads_them() {
        for (line, expected) in [
            ("SORT k GET STORE STORE d", vec!["k", "STORE", "d"]),
            ("SORT k STORE\0 d", vec!["k", "d"]),
            ("SORT k store\0xyz d", vec!["k", "d"]),
            ("GEORADIUS k 1 1 1 m STOREDIST\0 d", vec!["k", "d"]),
            ("XREAD COUNT\0 1 STREAMS\0 a b 0 0", vec!["a", "b"]),
            ("SORT k BY nosort GET # GET w_*->f", vec!["k", "w_*->f"]),
            ("XREADGROUP GROUP streams c COUNT 1 STREAMS a b > >", vec!["a", "b"]),
            ("XREAD COUNT 1 BLOCK 0 STREAMS a 0", vec!["a"]),
            ("GEORADIUS k 1 2 3 m COUNT 1 STORE x STOREDIST y", vec!["k", "x", "y"]),
            ("ZUNIONSTORE d 2 a b WEIGHTS 1 2", vec!["d", "a", "b"]),
            ("EVAL s 2 a b c", vec!["a", "b"]),
            ("MSET a 1 b 2", vec!["a", "b"]),
            ("BLPOP a b 0", vec!["a", "b"]),
            ("BITOP AND d a b", vec!["d", "a", "b"]),
            ("XGROUP CREATE s g $", vec!["s"]),
            ("LMPOP 2 a b LEFT", vec!["a", "b"]),
        ] {
            assert_eq!(keys(line).0, expected, "{line}");
        }
    }

    #[test]
    fn a_doubtful_call_sends_no_bare_name() {
        for (line, expected) in [
            ("EVAL s 9 a b", vec!["a", "b"]),
            ("EVAL s +1 a b", vec!["a", "b"]),
            ("ZUNION -1 a b", vec!["a", "b"]),
            ("LMPOP 01 a LEFT", vec!["a", "LEFT"]),
            ("XREAD STREAMS a b 0", vec!["a", "b", "0"]),
            ("XREAD FOO STREAMS a 0", vec!["FOO", "STREAMS", "a", "0"]),
            ("SORT k FOO STORE d", vec!["k", "FOO", "STORE", "d"]),
        ] {
            assert_eq!(keys(line).0, expected, "{line}");
        }
    }

    #[test]
    fn the_keys_that_a_call_may_create() {
        let made = |line: &str, made| keys(line).1.made(made).to_vec();
        assert_eq!(made("SORT k GET STORE STORE d", Made::Store), [5]);
        assert_eq!(made("SORT k", Made::Store), [0; 0]);
        assert_eq!(made("LMOVE a b LEFT LEFT", Made::Last), [2]);
        assert_eq!(made("MSET a 1 b 2", Made::All), [1, 3]);
        assert!(keys("XREAD BLOCK 0 STREAMS a 0").1.blocks);
        assert!(keys("SORT k GET #").1.follows);
    }
}
