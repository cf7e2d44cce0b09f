//! Convex's sync protocol: JSON text frames, peeked and relayed, not parsed and rebuilt.
//!
//! [`mod@client`] finds in a client's frame what a limit or a rewrite needs, [`mod@server`] in the deployment's what versions
//! and answers need; both skip the rest by its brackets and leave the text as it is. Where two readers could differ,
//! a frame is refused: a key twice, or written with escapes, in an object that is read here.
//!
//! [`rewrite`] makes the few frames that are not sent on as they came, [`mod@write`] those of our own.

mod client;
mod json;
pub mod rewrite;
mod server;
#[cfg(test)]
mod tests;
pub mod write;

use std::ops::Range;

pub use client::client;
pub use server::{Prefix, server};

/// Most modifications in one frame. A reconnecting client sends all its queries in one; the largest tier has 1 000 per
/// socket, and as many removals fit beside them.
pub const MODIFICATIONS_MAX: usize = 4096;

/// The zero timestamp, in which every socket starts.
const ZERO: Ts = Ts(*b"AAAAAAAAAAA=");

/// A timestamp as it is written: base64 of 8 bytes, little-endian. Copied, never computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ts([u8; 12]);

impl Ts {
    fn parse(text: &str) -> Option<Self> {
        let good = |b: &u8| b.is_ascii_alphanumeric() || b"+/=".contains(b);
        text.as_bytes().try_into().ok().filter(|bytes: &[u8; 12]| bytes.iter().all(good)).map(Self)
    }

    fn as_str(&self) -> &str {
        // Checked to be ASCII when it was made.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// Where a client is: what it has been told of its queries, its identity and the deployment's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Of the query set.
    pub query_set: u32,
    /// Of the identity: how many `Authenticate`s.
    pub identity: u32,
    /// Of the data.
    pub ts: Ts,
}

impl Default for Version {
    fn default() -> Self {
        Self { query_set: 0, identity: 0, ts: ZERO }
    }
}

/// A client's frame. Ranges are byte ranges of the frame's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client<'a> {
    /// The first frame.
    Connect {
        /// Chosen by the client; JS keeps it over reconnects.
        session: &'a str,
        /// How many sockets it had before this one.
        connections: u32,
        /// Whether it says which timestamp it has seen.
        observed: bool,
    },
    /// Who the caller is from here on.
    Authenticate {
        /// How many of these came before.
        base: u32,
        /// As whom.
        caller: Caller<'a>,
    },
    /// Subscriptions come and go.
    ModifyQuerySet {
        /// The query set's version before.
        base: u32,
        /// And after.
        new: u32,
        /// The array.
        all: Range<usize>,
        /// What is in it, in order.
        modifications: Vec<Modification>,
    },
    /// A mutation or an action.
    Call {
        /// Which of them.
        kind: Kind,
        /// Repeated in the answer.
        request: u32,
        /// Whether it names a component, as only administrators may.
        component: bool,
        /// The arguments: an array with one object.
        args: Range<usize>,
    },
    /// Something for the deployment's log.
    Event,
}

/// What can be called over a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One transaction.
    Mutation,
    /// Anything.
    Action,
}

/// As whom an `Authenticate` wants to be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller<'a> {
    /// The bearer of this token.
    User {
        /// The token.
        token: &'a str,
        /// Where it stands, within its quotes.
        at: Range<usize>,
    },
    /// Nobody: a logout.
    Nobody,
    /// An administrator.
    Admin,
}

/// One change of the query set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Modification {
    /// A new subscription.
    Add {
        /// Its number, chosen by the client.
        query: u32,
        /// Whether it names a component, as only administrators may.
        component: bool,
        /// The arguments: an array with one object.
        args: Range<usize>,
        /// The whole of it.
        all: Range<usize>,
    },
    /// A subscription ends.
    Remove {
        /// Its number.
        query: u32,
        /// The whole of it.
        all: Range<usize>,
    },
}

/// A deployment's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server<'a> {
    /// The client is at a new version.
    Transition {
        /// Which.
        end: Version,
    },
    /// A part of one.
    Chunk {
        /// A piece of the transition's text, still escaped.
        text: &'a str,
        /// Its number, from 0.
        part: u32,
        /// Of how many.
        total: u32,
    },
    /// The answer to a mutation or action.
    Response {
        /// Which of them.
        kind: Kind,
        /// To which request.
        request: u32,
        /// Whether it did what was asked.
        success: bool,
    },
    /// The token was not taken, or is no longer.
    AuthError,
    /// I am here.
    Ping,
    /// What is only relayed.
    Other,
}
