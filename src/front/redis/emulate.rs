//! Commands about a whole database where the tenant has none of its own, because the server has only one (a cluster,
//! many managed servers): done key by key inside the prefix, without holding up anybody else.
//!
//! What differs from the real thing: a flush is not one step, and none of these runs in a transaction or a script,
//! where the server would do it for everybody's keys at once.

use std::sync::Arc;

use super::{
    client::{Client, Held},
    commands::Row,
};
use crate::{
    upstream::redis::{
        Version,
        dial::DialError,
        reply::{Shape, strip},
    },
    wire::resp::{put_array, put_bulk, put_integer},
};

/// Keys that one page of `SCAN` looks at, at most: other tenants' commands go between pages.
const PAGE_MAX: i64 = 1000;

/// Whether a command is about all keys of a database.
pub fn is_whole(row: &Row) -> bool {
    matches!(row.name, "keys" | "scan" | "randomkey" | "dbsize" | "flushdb")
}

impl Client {
    /// Runs one of them.
    pub(super) async fn emulate(&mut self, held: &Held) {
        if let Err(error) = self.try_emulate(held).await {
            tracing::warn!(%error, "a walk over the keys failed");
            self.fail(crate::upstream::redis::link::LOST);
        }
    }

    async fn try_emulate(&mut self, held: &Held) -> Result<(), DialError> {
        let Some(tenancy) = &self.tenancy else { return Ok(()) };
        let (place, database) = (Arc::clone(&tenancy.place), Arc::clone(&tenancy.database));
        let words: Vec<&[u8]> = held.args.iter().map(|arg| arg.of(&held.bytes)).collect();
        let mut out = Vec::new();
        match held.row.name {
            "dbsize" => {
                place.census(0, crate::quota::clock::now_ms()).await?;
                put_integer(&mut out, i64::try_from(database.ledger.keys()).unwrap_or(i64::MAX));
            }
            "keys" => {
                let names = place.names(&database, words[1]).await?;
                put_array(&mut out, names.len());
                names.iter().for_each(|name| put_bulk(&mut out, name));
            }
            "randomkey" => match place.any(&database).await? {
                Some(name) => put_bulk(&mut out, &name),
                None => out.extend_from_slice(if self.version == Version::Three { b"_\r\n" } else { b"$-1\r\n" }),
            },
            "flushdb" => {
                let mode = words
                    .get(1)
                    .is_none_or(|word| [&b"SYNC"[..], b"ASYNC"].iter().any(|mode| word.eq_ignore_ascii_case(mode)));
                if !mode || words.len() > 2 {
                    self.fail("ERR syntax error");
                    return Ok(());
                }
                place.empty(&database).await?;
                database.ledger.shrink();
                out.extend_from_slice(b"+OK\r\n");
            }
            _ if !words.len().is_multiple_of(2) => {
                self.fail("ERR syntax error");
                return Ok(());
            }
            _ => {
                let answer = place.scan(scan(&words, &database.prefix)).await?;
                strip(Shape::Scan, &answer, &database.prefix, &mut out);
            }
        }
        self.say(&out);
        Ok(())
    }
}

/// The words of a SCAN with its patterns inside the prefix and no page too long. What is wrong stays so.
fn scan(words: &[&[u8]], prefix: &[u8]) -> Vec<Vec<u8>> {
    let mut out: Vec<Vec<u8>> = words.iter().take(2).map(|word| word.to_vec()).collect();
    let mut matches = false;
    for pair in words[2..].chunks_exact(2) {
        let (option, value) = (pair[0], pair[1]);
        out.push(option.to_vec());
        if super::keys::is_option(option, "MATCH") {
            matches = true;
            out.push([prefix, value].concat());
        } else if super::keys::is_option(option, "COUNT") && super::keys::number(value).is_some_and(|n| n > PAGE_MAX) {
            out.push(PAGE_MAX.to_string().into());
        } else {
            out.push(value.to_vec());
        }
    }
    if !matches {
        out.extend([b"MATCH".to_vec(), [prefix, b"*"].concat()]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_inside_the_prefix() {
        for (line, expected) in [
            ("SCAN 0", "SCAN 0 MATCH p:*"),
            ("SCAN 7 match a* COUNT 10", "SCAN 7 match p:a* COUNT 10"),
            ("SCAN 7 COUNT 99999 TYPE list", "SCAN 7 COUNT 1000 TYPE list MATCH p:*"),
            ("SCAN 0 MATCH a MATCH b", "SCAN 0 MATCH p:a MATCH p:b"),
        ] {
            let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
            assert_eq!(String::from_utf8_lossy(&scan(&words, b"p:").join(&b' ')), expected);
        }
    }
}
