//! What a subscriber's connection brings, as the tenant may see it: channels without the prefix, keyspace
//! notifications in the tenant's own words, nothing of anybody else.
//!
//! | upstream | client |
//! |---|---|
//! | `org:acme:news` | `news` |
//! | `__keyspace@7__:org:acme@2:k` | `__keyspace@2__:k` |
//! | `__keyevent@7__:set`, payload `org:acme@2:k` | `__keyevent@2__:set`, payload `k` |
//! | `__redis__:invalidate`, payload keys | the same, payload bare keys |

use super::reply;
use crate::wire::resp::{Cursor, Item, put_bulk, put_head, put_integer};

/// Where messages about a key come, before the number of its database.
const KEYSPACE: &[u8] = b"__keyspace@";

/// Where messages about an event come, before the number of the database.
const KEYEVENT: &[u8] = b"__keyevent@";

/// The channel of redirected invalidations; the server sends to it, nobody publishes there.
pub const INVALIDATE: &[u8] = b"__redis__:invalidate";

/// A channel or pattern of keyspace notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice<'a> {
    /// It names an event and brings keys; otherwise it names a key and brings events.
    pub events: bool,
    /// The number of the database.
    pub database: u32,
    /// What follows `__:`.
    pub rest: &'a [u8],
}

impl<'a> Notice<'a> {
    /// Reads a channel or pattern; `None` if it is any other, or leaves the database open.
    pub fn parse(name: &'a [u8]) -> Option<Self> {
        let (events, rest) = match (name.strip_prefix(KEYSPACE), name.strip_prefix(KEYEVENT)) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return None,
        };
        let digits = rest.iter().position(|b| !b.is_ascii_digit())?;
        let database = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        Some(Self { events, database, rest: rest[digits..].strip_prefix(b"__:")? })
    }

    /// The name upstream, where the tenant's database is `index` and has `prefix`.
    pub fn upstream(&self, index: u32, prefix: &[u8]) -> Vec<u8> {
        let key: &[u8] = if self.events { b"" } else { prefix };
        self.named(index, &[key, self.rest].concat())
    }

    fn named(&self, database: u32, rest: &[u8]) -> Vec<u8> {
        [if self.events { KEYEVENT } else { KEYSPACE }, database.to_string().as_bytes(), b"__:", rest].concat()
    }
}

/// The key without the prefix of one of the tenant's databases, and that database.
fn own_key<'a>(key: &'a [u8], stem: &[u8]) -> Option<(u32, &'a [u8])> {
    let rest = key.strip_prefix(stem)?;
    match rest.split_first()? {
        (b':', key) => Some((0, key)),
        (b'@', rest) => {
            let end = memchr::memchr(b':', rest)?;
            Some((std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?, &rest[end + 1..]))
        }
        _ => None,
    }
}

/// A channel or pattern as the tenant named it; `None` if it is not the tenant's. `databases` are pairs of the
/// server's and the tenant's number of each database whose events are listened to.
fn own_name(name: &[u8], prefix: &[u8], databases: &[(u32, u32)]) -> Option<Vec<u8>> {
    if let Some(bare) = name.strip_prefix(prefix) {
        return Some(bare.to_vec());
    }
    if name == INVALIDATE {
        return Some(name.to_vec());
    }
    let notice = Notice::parse(name)?;
    if notice.events {
        let (_, number) = databases.iter().find(|(index, _)| *index == notice.database)?;
        return Some(notice.named(*number, notice.rest));
    }
    let (number, key) = own_key(notice.rest, &prefix[..prefix.len() - 1])?;
    Some(notice.named(number, key))
}

/// Appends an array of keys with those of the tenant alone, whichever of its databases they are in.
fn keys(cursor: &mut Cursor<'_>, prefix: &[u8], out: &mut Vec<u8>) {
    let stem = &prefix[..prefix.len() - 1];
    let start = cursor.rest;
    let Some(Item::Many(mark, count)) = cursor.item() else {
        cursor.rest = start;
        return;
    };
    let own: Vec<&[u8]> = (0..count)
        .filter_map(|_| match cursor.item() {
            Some(Item::Bulk(key)) => own_key(key, stem).map(|(_, bare)| bare),
            _ => None,
        })
        .collect();
    put_head(out, mark, own.len());
    own.iter().for_each(|key| put_bulk(out, key));
}

/// Appends a frame of a subscriber's connection, or a push, as the client may see it; nothing if it is not meant for
/// the tenant. `prefix` is that of the tenant's channels.
pub fn strip(frame: &[u8], prefix: &[u8], databases: &[(u32, u32)], out: &mut Vec<u8>) {
    if matches!(frame.first(), Some(b'-' | b'!')) {
        return reply::strip(reply::Shape::Raw, frame, prefix, out);
    }
    let mut cursor = Cursor { rest: frame };
    let Some(Item::Many(mark, count)) = cursor.item() else { return out.extend_from_slice(frame) };
    let Some(Item::Bulk(kind)) = cursor.item() else { return out.extend_from_slice(frame) };
    let begin = out.len();
    put_head(out, mark, count);
    put_bulk(out, kind);
    match kind {
        b"pong" => {}
        b"invalidate" => keys(&mut cursor, prefix, out),
        // The id of an upstream connection means nothing to the client.
        b"tracking-redir-broken" => {
            cursor.item();
            put_integer(out, 0);
        }
        _ => {
            let names = if kind == b"pmessage" { 2 } else { 1 };
            let mut last = None;
            for _ in 0..names {
                last = match cursor.item() {
                    Some(Item::Bulk(name)) => match own_name(name, prefix, databases) {
                        Some(own) => {
                            put_bulk(out, &own);
                            Some(name)
                        }
                        None => return out.truncate(begin),
                    },
                    Some(Item::Other(null)) => {
                        out.extend_from_slice(null);
                        None
                    }
                    _ => return out.truncate(begin),
                };
            }
            let is_message = matches!(kind, b"message" | b"pmessage");
            if let (true, Some(name)) = (is_message, last) {
                if name == INVALIDATE {
                    keys(&mut cursor, prefix, out);
                } else if let Some(Notice { events: true, database, .. }) = Notice::parse(name) {
                    let number = databases.iter().find(|(index, _)| *index == database).map(|(_, number)| *number);
                    match cursor.item() {
                        Some(Item::Bulk(key)) => match own_key(key, &prefix[..prefix.len() - 1]) {
                            Some((own, bare)) if Some(own) == number => put_bulk(out, bare),
                            _ => return out.truncate(begin),
                        },
                        _ => return out.truncate(begin),
                    }
                }
            }
        }
    }
    out.extend_from_slice(cursor.rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripped(words: &[&str]) -> String {
        let mut frame = Vec::new();
        put_head(&mut frame, b'>', words.len());
        words.iter().for_each(|word| put_bulk(&mut frame, word.as_bytes()));
        let mut out = Vec::new();
        strip(&frame, b"org:a:", &[(7, 2), (1, 0)], &mut out);
        crate::upstream::redis::dial::strings(&out).join(" ")
    }

    #[test]
    fn messages_lose_the_prefix_and_payloads_keep_what_looks_like_one() {
        assert_eq!(stripped(&["message", "org:a:c", "x"]), "message c x");
        assert_eq!(stripped(&["pmessage", "org:a:*", "org:a:c", "org:a:x"]), "pmessage * c org:a:x");
        assert_eq!(stripped(&["message", "org:b:c", "x"]), "");
        let mut out = Vec::new();
        strip(b"*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n", b"org:a:", &[], &mut out);
        assert_eq!(out, b"*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n");
    }

    #[test]
    fn notifications_are_the_tenants_own() {
        assert_eq!(stripped(&["message", "__keyspace@1__:org:a:k", "set"]), "message __keyspace@0__:k set");
        assert_eq!(stripped(&["message", "__keyspace@7__:org:a@2:k", "set"]), "message __keyspace@2__:k set");
        assert_eq!(stripped(&["message", "__keyspace@1__:org:ab:k", "set"]), "");
        assert_eq!(stripped(&["message", "__keyevent@7__:set", "org:a@2:k"]), "message __keyevent@2__:set k");
        assert_eq!(stripped(&["message", "__keyevent@7__:set", "org:a:k"]), "", "another database's key");
        assert_eq!(stripped(&["message", "__keyevent@7__:set", "org:b@2:k"]), "");
        assert_eq!(stripped(&["message", "__keyevent@9__:set", "org:a:k"]), "");
        assert_eq!(
            stripped(&["pmessage", "__keyspace@1__:org:a:k*", "__keyspace@1__:org:a:k1", "del"]),
            "pmessage __keyspace@0__:k* __keyspace@0__:k1 del"
        );
        for (name, expected) in
            [("__keyspace@0__:k", "__keyspace@7__:org:a@2:k"), ("__keyevent@2__:e*", "__keyevent@7__:e*")]
        {
            let notice = Notice::parse(name.as_bytes()).expect("one");
            assert_eq!(notice.upstream(7, b"org:a@2:"), expected.as_bytes());
        }
        for other in ["__keyspace@*__:k", "__keyspace@__:k", "__keyspace@1_:k", "news", "__keyevent@99999999999__:x"] {
            assert_eq!(Notice::parse(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn invalidations_name_own_keys_only() {
        let mut out = Vec::new();
        strip(b">2\r\n$10\r\ninvalidate\r\n*2\r\n$7\r\norg:a:k\r\n$7\r\norg:b:k\r\n", b"org:a:", &[], &mut out);
        assert_eq!(out, b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n");
        out.clear();
        strip(
            b"*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n*1\r\n$7\r\norg:a:k\r\n",
            b"org:a:",
            &[],
            &mut out,
        );
        assert_eq!(out, b"*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n*1\r\n$1\r\nk\r\n");
        out.clear();
        strip(b">2\r\n$10\r\ninvalidate\r\n_\r\n", b"org:a:", &[], &mut out);
        assert_eq!(out, b">2\r\n$10\r\ninvalidate\r\n_\r\n");
    }
}
