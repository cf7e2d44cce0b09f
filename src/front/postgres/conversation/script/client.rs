//! What clients say: whole messages, in an order that drivers use.

use std::collections::HashSet;

use super::super::Conversation;
use crate::{
    front::postgres::ledger::{How, Ledger, Owed},
    wire::postgres::{frontend, put},
};

const COPY: &str = "COPY t FROM STDIN";
const TEXTS: [&str; 24] = [
    "SELECT 1",
    "SELECT $1::int",
    "INSERT INTO t VALUES (1)",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SET search_path = a",
    "SET search_path = b",
    "SET LOCAL search_path = c",
    "RESET ALL",
    "SELECT 1; SELECT 2",
    "BEGIN; SET search_path = d; COMMIT",
    COPY,
    "COPY t TO STDOUT",
    "DEALLOCATE a",
    "DEALLOCATE ALL",
    "DISCARD ALL",
    "CREATE TABLE u (a int)",
    "CREATE TEMP TABLE v (a int)",
    "LISTEN c",
    "SELECT nextval('s')",
    "SELECT currval('s')",
    "SELECT f(1)",
    "",
];
pub const NAMES: [&[u8]; 6] = [b"", b"a", b"b", b"c", b"_dynabase_1", b"?"];

/// What is left of a script.
pub struct Script<'a>(pub &'a [u8]);

impl Script<'_> {
    pub fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte().unwrap_or(0)) % of.len()]
    }

    pub fn raw(&mut self) -> Vec<u8> {
        let n = usize::from(self.byte().unwrap_or(0)).min(self.0.len());
        let (raw, rest) = self.0.split_at(n);
        self.0 = rest;
        raw.to_vec()
    }
}

/// A client, and what it knows of its own doings.
#[derive(Debug)]
pub struct Client {
    pub conversation: Conversation,
    /// Said, and not taken yet.
    pub tail: Vec<u8>,
    /// Received, and not a whole message yet.
    pub received: Vec<u8>,
    /// What it is owed, by its own account.
    pub owed: Ledger,
    pub link: Option<usize>,
    /// Names that it has used.
    pub names: HashSet<Vec<u8>>,
    /// It may have been told that a name is taken, or lost its statements, by its own doing.
    pub reused: bool,
    pub wiped: bool,
    /// It asked for a COPY, or may have: until it knows, it says nothing that a COPY would not take.
    pub copying: bool,
    /// It prepared a COPY.
    pub copies: bool,
    pub gone: bool,
}

impl Client {
    /// One whole message of a client, as a driver might send it.
    pub fn say(&mut self, act: u8, script: &mut Script<'_>) {
        let client = self;
        // A driver that is asked for COPY data gives that, or ends it.
        let copies = client.owed.copies_in();
        client.copying &= !copies && !client.owed.is_settled() && !client.owed.is_skipping();
        let mut out = Vec::new();
        match act % 10 {
            // Data may come before the server asks for it; a Sync may stand behind the Execute.
            0..4 if client.copying => put(&mut out, b'd', |out| out.extend_from_slice(b"1\n")),
            4 if client.copying => {
                put(&mut out, b'c', |_| {});
                client.owed.end_copy();
                client.copying = false;
            }
            5..8 if client.copying => {}
            _ if copies && act % 10 < 7 => put(&mut out, b'd', |out| out.extend_from_slice(b"1\n")),
            _ if copies => {
                let kind = if act % 10 == 9 { b'f' } else { b'c' };
                put(&mut out, kind, |out| {
                    if kind == b'f' {
                        out.push(0);
                    }
                });
                client.owed.end_copy();
            }
            0 | 1 => {
                let text = script.pick(&TEXTS);
                client.wiped |= text.ends_with("ALL");
                client.copying = text == COPY;
                frontend::put_query(&mut out, text);
                client.owed.push(Owed::Query, How::Forward);
            }
            2 | 3 => {
                let (name, text) = (script.pick(&NAMES), script.pick(&TEXTS));
                client.wiped |= text.ends_with("ALL");
                client.copies |= text == COPY;
                client.reused |= !name.is_empty() && !client.names.insert(name.to_vec());
                frontend::put_parse(&mut out, name, &[text.as_bytes(), &[0, 0, 0]].concat());
                client.owed.push(Owed::Parse, How::Forward);
            }
            4 => {
                frontend::put_bind_head(&mut out, b"", script.pick(&NAMES), 6);
                out.extend_from_slice(&[0; 6]);
                client.owed.push(Owed::Bind, How::Forward);
            }
            5 => {
                client.copying = client.copies;
                put(&mut out, b'E', |out| out.extend_from_slice(&[0; 5]));
                client.owed.push(Owed::Execute, How::Forward);
            }
            6 => {
                let name = script.pick(&NAMES);
                if act >= 40 {
                    put(&mut out, b'D', |out| out.extend_from_slice(b"P\0"));
                    client.owed.push(Owed::Describe, How::Forward);
                } else {
                    frontend::put_statement(&mut out, b'D', name);
                    client.owed.push(Owed::DescribeStatement, How::Forward);
                }
            }
            7 => {
                let name = script.pick(&NAMES);
                if act >= 60 {
                    put(&mut out, b'H', |_| {});
                } else if act >= 50 {
                    put(&mut out, b'F', |out| out.extend_from_slice(&[0; 10]));
                    client.owed.push(Owed::Call, How::Forward);
                } else {
                    frontend::put_statement(&mut out, b'C', name);
                    client.owed.push(Owed::Close, How::Forward);
                }
            }
            _ => {
                put(&mut out, b'S', |_| {});
                client.owed.push(Owed::Sync, How::Forward);
            }
        }
        client.tail.extend(out);
    }
}
