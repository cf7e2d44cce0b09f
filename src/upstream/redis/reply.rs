//! What happens to a reply on its way from the server to a client: most go through as they are; those that carry
//! names lose the tenant's prefix. Never more than one walk over the bytes.

use crate::{
    tenant::namespace::RedisNamespace,
    wire::resp::{Cursor, Item, put_bulk, put_head},
};

/// Where keys or channels stand in a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Nowhere.
    Raw,
    /// Every element of an array is a key (KEYS, PUBSUB CHANNELS).
    Keys,
    /// The second of two elements is an array of keys (SCAN).
    Scan,
    /// The reply is a key (RANDOMKEY).
    Key,
    /// The first element is a key (BLPOP, BZPOPMIN, LMPOP, ZMPOP).
    First,
    /// The elements are pairs that begin with a key; a map in RESP3 (XREAD).
    Streams,
    /// Keys and values alternate in a flat array (PUBSUB NUMSUB).
    Pairs,
    /// A message or confirmation ([`super::message`]).
    Message,
    /// A pair of a number of ours and the reply.
    Second,
    /// `nil` becomes 0 and `OK` becomes 1 (a SETNX that was sent as SET … NX).
    SetNx,
}

/// Appends `reply` to `out` with the prefix taken off wherever `shape` says a name stands, and off every error.
/// Bytes that do not have the expected form are appended as they are, except that a lone key of somebody else
/// becomes a null.
pub fn strip(shape: Shape, reply: &[u8], prefix: &[u8], out: &mut Vec<u8>) {
    if matches!(reply.first(), Some(b'-' | b'!')) {
        return strip_error(reply, prefix, out);
    }
    let mut cursor = Cursor { rest: reply };
    match shape {
        Shape::Raw => out.extend_from_slice(reply),
        Shape::Second => match (cursor.item(), cursor.item()) {
            (Some(Item::Many(b'*', 2)), Some(Item::Other(_))) => strip(Shape::Raw, cursor.rest, prefix, out),
            _ => out.extend_from_slice(reply),
        },
        Shape::SetNx => out.extend_from_slice(if reply.starts_with(b"+") { b":1\r\n" } else { b":0\r\n" }),
        Shape::Key => match cursor.item() {
            Some(Item::Bulk(key)) => match key.strip_prefix(prefix) {
                Some(bare) => put_bulk(out, bare),
                None => out.extend_from_slice(b"$-1\r\n"),
            },
            _ => out.extend_from_slice(reply),
        },
        Shape::Keys => keys(&mut cursor, prefix, out),
        Shape::Scan => {
            head(&mut cursor, out);
            copy(&mut cursor, out);
            keys(&mut cursor, prefix, out);
        }
        Shape::First => {
            if head(&mut cursor, out) > 0 {
                name(&mut cursor, prefix, out);
            }
            out.extend_from_slice(cursor.rest);
        }
        Shape::Pairs => {
            let count = head(&mut cursor, out);
            for i in 0..count {
                if i % 2 == 0 { name(&mut cursor, prefix, out) } else { copy(&mut cursor, out) }
            }
        }
        Shape::Streams => match cursor.item() {
            Some(Item::Many(b'%', count)) => {
                put_head(out, b'%', count / 2);
                for i in 0..count {
                    if i % 2 == 0 { name(&mut cursor, prefix, out) } else { copy(&mut cursor, out) }
                }
            }
            Some(Item::Many(mark, count)) => {
                put_head(out, mark, count);
                for _ in 0..count {
                    head(&mut cursor, out);
                    name(&mut cursor, prefix, out);
                    copy(&mut cursor, out);
                }
            }
            _ => out.extend_from_slice(reply),
        },
        Shape::Message => super::message::strip(reply, prefix, &[], out),
    }
}

fn keys(cursor: &mut Cursor<'_>, prefix: &[u8], out: &mut Vec<u8>) {
    // Foreign keys can't be there, and if they were they would not leave: count first, then write.
    let start = cursor.rest;
    let Some(Item::Many(mark, count)) = cursor.item() else {
        return out.extend_from_slice(start);
    };
    let mut probe = *cursor;
    let mut own = 0;
    for _ in 0..count {
        own += usize::from(matches!(probe.item(), Some(Item::Bulk(key)) if key.starts_with(prefix)));
    }
    put_head(out, mark, own);
    for _ in 0..count {
        if let Some(Item::Bulk(key)) = cursor.item()
            && let Some(bare) = key.strip_prefix(prefix)
        {
            put_bulk(out, bare);
        }
    }
}

/// Copies an array's header and gives its count; 0 for a null or anything else, which is copied too.
fn head(cursor: &mut Cursor<'_>, out: &mut Vec<u8>) -> usize {
    match cursor.item() {
        Some(Item::Many(mark, count)) => {
            put_head(out, mark, if mark == b'%' { count / 2 } else { count });
            count
        }
        Some(Item::Other(bytes)) => {
            out.extend_from_slice(bytes);
            0
        }
        Some(Item::Bulk(bytes)) => {
            put_bulk(out, bytes);
            0
        }
        None => 0,
    }
}

fn copy(cursor: &mut Cursor<'_>, out: &mut Vec<u8>) {
    if let Some(value) = cursor.whole() {
        out.extend_from_slice(value);
    }
}

fn name(cursor: &mut Cursor<'_>, prefix: &[u8], out: &mut Vec<u8>) {
    match cursor.item() {
        Some(Item::Bulk(name)) => put_bulk(out, name.strip_prefix(prefix).unwrap_or(name)),
        Some(Item::Other(bytes)) => out.extend_from_slice(bytes),
        Some(Item::Many(mark, count)) => put_head(out, mark, count),
        None => {}
    }
}

/// Appends an error without any occurrence of the prefix (`-NOGROUP No such key '…'`).
fn strip_error(reply: &[u8], prefix: &[u8], out: &mut Vec<u8>) {
    if reply.first() == Some(&b'!') {
        let mut cursor = Cursor { rest: reply };
        // A blob error carries its length: it is turned into a plain one, which every client reads.
        let line = reply.iter().position(|b| *b == b'\n').map_or(reply, |at| &reply[at + 1..]);
        cursor.rest = line;
        out.push(b'-');
        let text = cursor.rest.strip_suffix(b"\r\n").unwrap_or(cursor.rest);
        let start = out.len();
        without(text, prefix, out);
        out[start..].iter_mut().filter(|b| matches!(b, b'\r' | b'\n')).for_each(|b| *b = b' ');
        return out.extend_from_slice(b"\r\n");
    }
    without(reply, prefix, out);
}

fn without(text: &[u8], prefix: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some(at) = memchr::memmem::find(rest, prefix) {
        put_unmarked(&rest[..at], out);
        rest = &rest[at + prefix.len()..];
        // A client's own name may look like a prefix: one layer is ours, the next is its.
        if rest.starts_with(prefix) {
            out.extend_from_slice(prefix);
            rest = &rest[prefix.len()..];
        }
    }
    put_unmarked(rest, out);
}

/// Appends a text without the marks of functions in it.
fn put_unmarked(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some((begin, end)) = RedisNamespace::find_function_mark(rest) {
        out.extend_from_slice(&rest[..begin]);
        rest = &rest[end..];
        // As above.
        if let Some((0, next)) = RedisNamespace::find_function_mark(rest) {
            out.extend_from_slice(&rest[..next]);
            rest = &rest[next..];
        }
    }
    out.extend_from_slice(rest);
}

/// The replies of a `MULTI … EXEC` that was sent as one piece: acknowledgements, then the result.
#[derive(Debug)]
pub struct Transaction {
    /// Acknowledgements still to come.
    pub acks: usize,
    /// What happens to each element of the result; `None` takes it out (a command of ours).
    pub elements: Vec<Option<Shape>>,
    /// The client sent one command, and gets its reply instead of an array.
    pub single: bool,
    /// The first error among the acknowledgements.
    pub refused: Option<Vec<u8>>,
}

impl Transaction {
    /// Takes the next frame; gives whether it was the last, and appends what the client gets then.
    pub fn frame(&mut self, reply: &[u8], prefix: &[u8], out: &mut Vec<u8>) -> bool {
        if self.acks > 0 {
            self.acks -= 1;
            if reply.first() == Some(&b'-') && self.refused.is_none() {
                self.refused = Some(reply.to_vec());
            }
            return false;
        }
        let mut cursor = Cursor { rest: reply };
        match cursor.item() {
            Some(Item::Many(mark, _)) => {
                if !self.single {
                    put_head(out, mark, self.elements.iter().flatten().count());
                }
                for element in &self.elements {
                    let Some(value) = cursor.whole() else { break };
                    if let Some(shape) = element {
                        strip(*shape, value, prefix, out);
                    }
                }
            }
            _ => match &self.refused {
                Some(refused) if self.single => strip_error(refused, prefix, out),
                _ => strip(Shape::Raw, reply, prefix, out),
            },
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: &[u8] = b"org:a:";

    fn stripped(shape: Shape, reply: &[u8]) -> String {
        let mut out = Vec::new();
        strip(shape, reply, P, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn names_lose_their_prefix_and_values_keep_what_looks_like_one() {
        let key = "$7\r\norg:a:k\r\n";
        assert_eq!(stripped(Shape::First, format!("*2\r\n{key}{key}").as_bytes()), format!("*2\r\n$1\r\nk\r\n{key}"));
        assert_eq!(stripped(Shape::Raw, key.as_bytes()), key);
        let mark = "dynabase_abcdefghij234567abcd_";
        let error = format!("-ERR org:a:k script: {mark}f, on {mark}{mark}g\r\n");
        assert_eq!(stripped(Shape::Raw, error.as_bytes()), format!("-ERR k script: f, on {mark}g\r\n"));
        assert_eq!(stripped(Shape::Raw, format!("+{mark}f\r\n").as_bytes()), format!("+{mark}f\r\n"));
        assert_eq!(
            stripped(Shape::Scan, format!("*2\r\n$1\r\n0\r\n*1\r\n{key}").as_bytes()),
            "*2\r\n$1\r\n0\r\n*1\r\n$1\r\nk\r\n"
        );
        let entries = "*1\r\n*2\r\n$3\r\n1-1\r\n*2\r\n$1\r\nf\r\n$7\r\norg:a:k\r\n";
        assert_eq!(
            stripped(Shape::Streams, format!("*1\r\n*2\r\n{key}{entries}").as_bytes()),
            format!("*1\r\n*2\r\n$1\r\nk\r\n{entries}")
        );
        assert_eq!(
            stripped(Shape::Streams, format!("%1\r\n{key}{entries}").as_bytes()),
            format!("%1\r\n$1\r\nk\r\n{entries}")
        );
        assert_eq!(stripped(Shape::First, b"*-1\r\n"), "*-1\r\n");
        assert_eq!(stripped(Shape::Streams, b"_\r\n"), "_\r\n");
    }

    #[test]
    fn keys_of_others_never_pass() {
        assert_eq!(stripped(Shape::Keys, b"*2\r\n$7\r\norg:b:k\r\n$7\r\norg:a:k\r\n"), "*1\r\n$1\r\nk\r\n");
        assert_eq!(stripped(Shape::Key, b"$7\r\norg:b:k\r\n"), "$-1\r\n");
    }

    #[test]
    fn errors_lose_the_prefix_wherever_it_stands() {
        assert_eq!(stripped(Shape::Raw, b"-NOGROUP No such key 'org:a:k' or\r\n"), "-NOGROUP No such key 'k' or\r\n");
        assert_eq!(stripped(Shape::First, b"!14\r\nERR 'org:a:k' \n\r\n"), "-ERR 'k'  \r\n");
    }

    #[test]
    fn messages_in_both_protocols() {
        for mark in ['*', '>'] {
            assert_eq!(
                stripped(
                    Shape::Message,
                    format!("{mark}3\r\n$7\r\nmessage\r\n$7\r\norg:a:c\r\n$1\r\nx\r\n").as_bytes()
                ),
                format!("{mark}3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nx\r\n")
            );
            assert_eq!(
                stripped(
                    Shape::Message,
                    format!("{mark}4\r\n$8\r\npmessage\r\n$7\r\norg:a:*\r\n$7\r\norg:a:c\r\n$7\r\norg:a:x\r\n")
                        .as_bytes()
                ),
                format!("{mark}4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n$7\r\norg:a:x\r\n")
            );
        }
        assert_eq!(
            stripped(Shape::Message, b"*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n"),
            "*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n"
        );
    }

    #[test]
    fn our_commands_leave_no_trace_in_a_transaction() {
        let mut transaction = Transaction {
            acks: 1,
            elements: vec![Some(Shape::Raw), None, Some(Shape::First)],
            single: false,
            refused: None,
        };
        let mut out = Vec::new();
        assert!(!transaction.frame(b"+OK\r\n", P, &mut out));
        assert!(transaction.frame(b"*3\r\n:7\r\n:1\r\n*2\r\n$7\r\norg:a:k\r\n$1\r\nv\r\n", P, &mut out));
        assert_eq!(out, b"*2\r\n:7\r\n*2\r\n$1\r\nk\r\n$1\r\nv\r\n");
    }
}
