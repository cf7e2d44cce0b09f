//! A tenant's request becomes one that can't leave the tenant: bytes in, bytes out.
//!
//! [`rewrite`] reads the sections of an OP_MSG, looks its command up in [`super::commands`], checks every field, and
//! writes the request anew into a buffer of the caller's. Nothing that was not written here goes upstream: what we
//! don't know (command, field, stage, operator) is refused, so that two parsers can't disagree on what it means.
//!
//! ```text
//! body, sections ──► fields in a table, no duplicates ──► one rule per field ──► Forward: out holds the sections
//!                            │                                                  Local:   the front answers
//!                            └──► unknown, malformed, forbidden ──────────────► Refuse:  the server's own code
//! ```
//!
//! `database`: the tenant owns its physical databases; names are mapped, everything else is checked only.
//! `filter`: the documents of all tenants lie in one physical database per logical name, whose collections come into
//! being with the first document of any tenant, as in an ordinary database: nobody declares them. Equal names share
//! a collection; `org_id` tells whose a document is:
//! - every reader is bound by `{$and: [{org_id: X}, F]}`, every written document carries `org_id: X`, and no update
//!   can touch that field;
//! - what comes back has lost it (by projection or `$unset`), so that replies need no rewriting;
//! - indexes are the tenant's own: partial ones over `{org_id: X}` under a name that ends in the tenant's. A shared
//!   index, prefixed or not, would let one tenant's `unique` (or a 2dsphere, or two arrays) fail another's insert.
//!   The server's 64 indexes per collection bound this: operators with many tenants of one application make shared
//!   ones themselves.
//!
//! No sockets, no clock, nothing about sessions: `lsid` and cursor ids are checked and copied, and their places told.

mod change;
mod expression;
mod fault;
pub mod index;
mod message;
mod name;
mod pipeline;
mod predicate;
mod projection;
mod stage;
mod statement;
mod update;

pub(super) use name::put_text;
pub(super) use statement::STATEMENTS_MAX;

use crate::{
    front::mongo::commands::{Emulate, ReplyRule, Row},
    tenant::{Isolation, OrgId, namespace::MongoNamespace},
    wire::mongo::bson,
};

/// Who asks and how he is kept apart.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    /// By `org_id` in shared collections, or by databases of his own.
    pub isolation: Isolation,
    /// The tenant.
    pub org: &'a OrgId,
    /// Its names.
    pub place: &'a MongoNamespace,
    /// The tier's time for one request in milliseconds; positive.
    pub max_time_ms: i32,
    /// Whether documents come back with `org_id`, from `find` and `findAndModify`.
    pub shows_org: bool,
}

/// A message's sections.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The section of kind 0.
    pub body: &'a [u8],
    /// Those of kind 1: name, and documents back to back.
    pub sections: &'a [(&'a str, &'a [u8])],
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Verdict<'a> {
    /// It was rewritten.
    Forward(Forward<'a>),
    /// The front answers.
    Local(Local<'a>),
    /// No.
    Refuse(Fault),
}

/// A rewritten request.
#[derive(Debug)]
pub struct Forward<'a> {
    /// Its command.
    pub row: &'static Row,
    /// The logical database.
    pub database: &'a str,
    /// The collection, where the command names one.
    pub collection: Option<&'a str>,
    /// What in the reply has to be mapped.
    pub reply: ReplyRule,
    /// What has to be so on the collection before the request is sent.
    pub prepare: Option<Prepare<'a>>,
    /// The transaction that it belongs to.
    pub transaction: Option<Transaction>,
    /// Whether the server recognises it when it is sent twice: `txnNumber` outside of a transaction.
    pub retryable: bool,
    /// Where in the buffer the 16 bytes of `lsid.id` stand.
    pub lsid: Option<usize>,
    /// Where in the buffer further ids stand: 8 bytes each for cursors (`getMore`, `killCursors`), 16 for sessions
    /// (`endSessions`, `killSessions`, `refreshSessions`).
    pub ids: Vec<usize>,
    /// Statements that were refused and have to appear in the reply as errors, by index. They were left out; in a
    /// `bulkWrite` something stands for each that the server refuses as well.
    pub failed: Vec<Failed>,
    /// Whether the first failure ends the command; what follows it was left out as well.
    pub ordered: bool,
    /// Whether it may bring its collections into being.
    pub creates: bool,
    /// Another collection that it may bring into being, and its logical database.
    pub target: Option<(&'a str, &'a str)>,
}

/// What a request needs on its collection; done by the front with the platform's own rights, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepare<'a> {
    /// `changeStreamPreAndPostImages` on: only so can a delete be told to be the tenant's.
    Images {
        /// The collection watched.
        collection: &'a str,
    },
    /// Room for the tenant's indexes that the request makes: of a shared collection no tenant has all.
    IndexRoom {
        /// The collection indexed.
        collection: &'a str,
    },
    /// A unique index on `{org_id: 1, _id: 1}`: `$merge` needs it on what it writes to.
    MergeIndex {
        /// The collection written to.
        collection: &'a str,
    },
}

/// A transaction as a request names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// `txnNumber`.
    pub number: i64,
    /// `startTransaction`.
    pub starts: bool,
}

/// A request for the front itself.
#[derive(Clone, Copy, Debug)]
pub struct Local<'a> {
    /// Its command.
    pub row: &'static Row,
    /// Which answer.
    pub emulate: Emulate,
    /// The logical database.
    pub database: &'a str,
    /// The collection, where the command names one.
    pub collection: Option<&'a str>,
}

/// A refusal in the server's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The server's code.
    pub code: i32,
    /// The code's name.
    pub name: &'static str,
    /// What a person reads.
    pub message: String,
    /// Not empty: the reply is `{ok: 1, n: 0, writeErrors: […]}` with these instead, or `bulkWrite`'s own form.
    pub failed: Vec<Failed>,
    /// The reply has the form of `bulkWrite`.
    pub bulk: bool,
}

/// A statement that was refused: an entry of `writeErrors`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Its index in the client's request.
    pub index: usize,
    /// The server's code.
    pub code: i32,
    /// What a person reads.
    pub message: String,
}

/// What tells whose a document is.
pub const ORG: &str = "org_id";

/// Largest document in bytes, as the server has it.
const DOCUMENT_MAX: usize = 16 * 1024 * 1024;

/// Largest body of a command: a largest document and what is said about it, as the server has it.
const BODY_MAX: usize = DOCUMENT_MAX + (16 << 10);

/// Cursors or sessions that one command may name: as many as drivers send at a time.
const IDS_MAX: usize = 10_000;

/// Deepest nesting of what is looked into: the server refuses about 180 levels, drivers write a dozen.
const DEPTH_MAX: usize = bson::DEPTH_MAX;

/// Deepest nesting of pipelines, as the server has it.
const PIPELINES_DEPTH_MAX: usize = 20;

/// Most stages of one pipeline, as the server has it.
const PIPELINE_STAGES_MAX: usize = 1000;

/// Appends flags and sections of an OP_MSG (header excluded) to `out`, which the caller reuses. Whatever is not
/// forwarded leaves `out` as it was.
pub fn rewrite<'a>(scope: &Scope<'_>, request: &Request<'a>, out: &mut Vec<u8>) -> Verdict<'a> {
    let from = out.len();
    let verdict = message::rewrite(scope, request, out).unwrap_or_else(Verdict::Refuse);
    if !matches!(verdict, Verdict::Forward(_)) {
        out.truncate(from);
    }
    verdict
}

#[cfg(test)]
mod tests;
