//! The ledger: what is being done to a tenant (another tier, or a step of its life: [`Deed`]), by whom, and how it
//! ended. All of it is called a transition here: one at a time for a tenant, all in the same phases.
//!
//! **The tenant's own document decides.** Its field `transition` ([`Stamp`]) holds the transition's id, the fence of the
//! coordinator that may go on with it, and its phase. Every step that counts is one conditional write of that one
//! document: *begin* (only when no other transition is open), *claim* (a higher fence), *decide* (the commit point: tier
//! and epoch change in the same write) and *close*. No transaction over two documents is needed, on any kind of catalog.
//! The entry beside it ([`Entry`]) is what a later coordinator needs to go on and what people read; it may be one step
//! behind.
//!
//! Invariants: one open transition per organisation; fences of an organisation only grow, over all its transitions; a
//! decision never changes.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

use super::{Catalog, Fault};
use crate::tenant::{OrgId, Protocol, Routes, Tier};

mod deed;
pub mod failpoint;
mod file;
mod mongo;
mod owner;

use deed::Change;
pub use deed::{Deed, Deletion, Kept};
pub use owner::{is_dead, this_process};

/// The field of an organisation's document.
pub(super) const STAMP: &str = "transition";

/// The field with [`Deletion`].
pub(super) const DELETION: &str = "deletion";

/// The field with [`Kept`].
pub(super) const KEPT: &str = "kept";

/// Longest word about a failure that is kept, in bytes; databases may say more.
const NOTE_MAX_BYTES: usize = 500;

/// How far a transition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Participants are asked; the old tier is in force.
    Preparing,
    /// The new tier is in force; participants are brought to it until all are there.
    Committed,
    /// The old tier stays; participants are brought back to it until all are there.
    Aborting,
    /// The new tier is in force everywhere.
    Done,
    /// The old tier is in force everywhere.
    Aborted,
}

impl Phase {
    /// The word in records and answers.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Preparing => "preparing",
            Phase::Committed => "committed",
            Phase::Aborting => "aborting",
            Phase::Done => "done",
            Phase::Aborted => "aborted",
        }
    }

    /// Whether nothing is left to do.
    pub fn is_closed(self) -> bool {
        matches!(self, Phase::Done | Phase::Aborted)
    }

    /// What was decided, if anything was.
    pub fn decision(self) -> Option<Decision> {
        match self {
            Phase::Preparing => None,
            Phase::Committed | Phase::Done => Some(Decision::Commit),
            Phase::Aborting | Phase::Aborted => Some(Decision::Abort),
        }
    }

    /// The phase once nothing is left to do.
    #[must_use]
    pub fn closed(self) -> Self {
        match self {
            Phase::Committed => Phase::Done,
            Phase::Aborting => Phase::Aborted,
            other => other,
        }
    }
}

/// The one decision of a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Decision {
    /// The new tier.
    Commit,
    /// The old tier.
    Abort,
}

/// How far one participant is, as far as the coordinator knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// This installation has no such database.
    Absent,
    /// Certainly not touched by this transition.
    Untouched,
    /// Asked to prepare for the first time; no answer yet.
    Asked,
    /// Asked, and nobody knows whether it did.
    Doubt,
    /// Said yes.
    Prepared,
    /// Said no, and did nothing.
    Refused,
    /// Finished or restored, whichever was decided.
    Settled,
}

/// Something a tenant has more of than its new tier allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Over {
    /// Which database: `postgres`, `redis`, …
    pub database: String,
    /// What: `storage bytes`, `keys`, …
    pub what: String,
    /// How much there is.
    pub used: u64,
    /// How much the new tier allows.
    pub max: u64,
}

/// One database's part in a transition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Which database: `postgres`, `redis`, …
    pub database: String,
    /// How far it is.
    pub step: Step,
    /// Its settings before, to be restored.
    #[serde(default)]
    pub prior: Value,
    /// The last thing to know about it: what it said, or how far it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Calls made so far.
    #[serde(default)]
    pub calls: u32,
}

impl Part {
    /// Keeps a word about it, cut to a bounded length.
    pub fn set_note(&mut self, note: &str) {
        let mut end = note.len().min(NOTE_MAX_BYTES);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note[..end].clone_into(&mut self.note);
    }
}

/// A transition as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// `<org>.<epoch>.<random>`.
    #[serde(rename = "_id")]
    pub id: String,
    /// What it does.
    #[serde(default, skip_serializing_if = "Deed::is_tier")]
    pub deed: Deed,
    /// Whose.
    pub org: OrgId,
    /// The tier before.
    pub from: Tier,
    /// The tier after.
    pub to: Tier,
    /// The record's epoch before; the commit raises it by one.
    pub from_epoch: u64,
    /// Of a deletion: from when on the data goes, and what the tenant was; of a restoration: what it will be again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion: Option<Deletion>,
    /// The generation of its credentials before.
    #[serde(default)]
    pub from_generation: u32,
    /// Whether a tenant that is over the new limits is moved nevertheless.
    #[serde(default)]
    pub force: bool,
    /// How far it is.
    pub phase: Phase,
    /// Every database, in the order of [`Protocol::ALL`].
    pub participants: Vec<Part>,
    /// Why it was aborted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What the tenant has more of than the new tier allows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub over: Vec<Over>,
    /// Where the data is to be, as far as the record has to say it: written there with the commit.
    #[serde(default, skip_serializing_if = "Routes::is_empty")]
    pub pins: Routes,
    /// The home that the tenant's SQL databases leave: kept for a while. Of [`Deed::Forget`]: the one that goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// Who asked for it.
    #[serde(default)]
    pub by: String,
    /// The coordinator that works on it.
    pub owner: String,
    /// Its fence.
    pub fence: u64,
    /// Until when it is left alone by others, in milliseconds of Unix time.
    pub lease_until_ms: u64,
    /// When preparing has to be over, in milliseconds of Unix time.
    pub deadline_ms: u64,
    /// Whether somebody called it off.
    #[serde(default)]
    pub cancel: bool,
    /// When it began, in milliseconds of Unix time.
    pub began_ms: u64,
    /// When it closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed_ms: Option<u64>,
}

impl Entry {
    /// Its organisation, from its id.
    pub fn org_of(id: &str) -> Option<OrgId> {
        let (org, rest) = id.split_once('.')?;
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.');
        OrgId::parse(org).filter(|parsed| parsed.as_str() == org && plain(rest) && rest.len() <= 64)
    }

    /// One database's part.
    pub fn part(&self, database: Protocol) -> Option<&Part> {
        self.participants.get(database as usize)
    }
}

/// What an organisation's document says of its present or last transition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Which.
    pub id: String,
    /// The coordinator that may go on with it.
    pub fence: u64,
    /// How far it is.
    pub phase: Phase,
    /// Whether the tenant's SQL databases stand still meanwhile: from [`Catalog::still`] until the decision.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub still: bool,
}

/// Why the ledger did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LedgerFault {
    /// Another transition of this organisation is open.
    Busy {
        /// Which.
        id: String,
    },
    /// Another coordinator has this transition now: leave it alone.
    Overtaken,
    /// The tenant's record is not the one the transition began with.
    Outdated,
    /// The catalog's own.
    Catalog(Fault),
}

impl fmt::Display for LedgerFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LedgerFault::Busy { id } => write!(f, "transition {id} of this tenant is not over yet"),
            LedgerFault::Overtaken => f.write_str("another process has this transition"),
            LedgerFault::Outdated => f.write_str("the tenant's record was changed meanwhile"),
            LedgerFault::Catalog(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for LedgerFault {}

impl From<Fault> for LedgerFault {
    fn from(fault: Fault) -> Self {
        LedgerFault::Catalog(fault)
    }
}

/// Now, in milliseconds of Unix time. Only for records and leases; deadlines within a process use its own clock.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A lease from now on.
pub fn lease(length: Duration) -> u64 {
    now_ms().saturating_add(u64::try_from(length.as_millis()).unwrap_or(u64::MAX))
}

impl Catalog {
    /// Begins a transition: writes its entry and stamps the tenant's document. Gives the entry with its fence.
    ///
    /// # Errors
    /// [`LedgerFault::Busy`], [`LedgerFault::Outdated`], the catalog's.
    ///
    /// # Cancel safety
    /// Dropped, it has begun or has not; [`Self::open_transitions`] shows it if it has.
    pub async fn begin(&self, entry: Entry) -> Result<Entry, LedgerFault> {
        match self {
            Catalog::File(files) => files.begin(entry).await,
            Catalog::Mongo(mongo) => mongo.begin(entry).await,
        }
    }

    /// Takes a transition whose coordinator's lease is over (or is `owner`'s own): raises the fence. Gives the entry,
    /// its phase as the tenant's document says.
    ///
    /// # Errors
    /// [`LedgerFault::Overtaken`]: somebody else has it; the catalog's, [`Fault::Unknown`] when it is not open.
    pub async fn claim(&self, org: &OrgId, owner: &str, length: Duration) -> Result<Entry, LedgerFault> {
        match self {
            Catalog::File(files) => files.claim(org, owner, length).await,
            Catalog::Mongo(mongo) => mongo.claim(org, owner, length).await,
        }
    }

    /// Keeps the entry as it is now, and renews the lease. Gives whether somebody has called the transition off.
    ///
    /// # Errors
    /// [`LedgerFault::Overtaken`], the catalog's.
    pub async fn save(&self, entry: Entry) -> Result<bool, LedgerFault> {
        match self {
            Catalog::File(files) => files.save(entry).await,
            Catalog::Mongo(mongo) => mongo.save(entry).await,
        }
    }

    /// Writes the decision if there is none yet, and gives the one there is. A commit changes tier and epoch of the
    /// tenant in the same write: this is the commit point.
    ///
    /// # Errors
    /// [`LedgerFault::Overtaken`]; [`LedgerFault::Outdated`]: it can't be committed any more; the catalog's, after which
    /// it may have been written: ask again.
    pub async fn decide(&self, entry: &Entry, decision: Decision) -> Result<Decision, LedgerFault> {
        match self {
            Catalog::File(files) => files.decide(entry.clone(), decision).await,
            Catalog::Mongo(mongo) => mongo.decide(entry.clone(), decision).await,
        }
    }

    /// Has the tenant's SQL databases stand still in every process, until the decision or until somebody else takes the
    /// transition up.
    ///
    /// # Errors
    /// [`LedgerFault::Overtaken`], the catalog's.
    pub async fn still(&self, entry: &Entry) -> Result<(), LedgerFault> {
        match self {
            Catalog::File(files) => files.still(entry.clone()).await,
            Catalog::Mongo(mongo) => mongo.still(entry).await,
        }
    }

    /// Closes a transition and lets the next one of the tenant begin.
    ///
    /// # Errors
    /// [`LedgerFault::Overtaken`], the catalog's.
    pub async fn close(&self, entry: Entry) -> Result<(), LedgerFault> {
        match self {
            Catalog::File(files) => files.close(entry).await,
            Catalog::Mongo(mongo) => mongo.close(entry).await,
        }
    }

    /// Calls a transition off: its coordinator aborts it unless a commit was asked for.
    ///
    /// # Errors
    /// [`Fault::Unknown`] when it is not open, and the catalog's others.
    pub async fn cancel(&self, org: &OrgId) -> Result<(), LedgerFault> {
        match self {
            Catalog::File(files) => files.cancel(org).await,
            Catalog::Mongo(mongo) => mongo.cancel(org).await,
        }
    }

    /// Gives one transition, open or closed.
    ///
    /// # Errors
    /// [`Fault::Unknown`], [`Fault::Damaged`], [`Fault::Unavailable`].
    pub async fn transition(&self, id: &str) -> Result<Entry, Fault> {
        match self {
            Catalog::File(files) => files.transition(id).await,
            Catalog::Mongo(mongo) => mongo.transition(id).await,
        }
    }

    /// Gives the open transition of an organisation.
    ///
    /// # Errors
    /// As [`Self::transition`].
    pub async fn open_transition(&self, org: &OrgId) -> Result<Entry, Fault> {
        match self {
            Catalog::File(files) => files.open_transition(org).await,
            Catalog::Mongo(mongo) => mongo.open_transition(org).await,
        }
    }

    /// Streams all open transitions, in no order; a damaged one comes as its fault.
    pub fn open_transitions(&self) -> mpsc::Receiver<Result<Entry, Fault>> {
        match self {
            Catalog::File(files) => files.open_transitions(),
            Catalog::Mongo(mongo) => mongo.open_transitions(),
        }
    }

    /// Streams the transitions of an organisation, open and closed, in no order.
    pub fn transitions(&self, org: &OrgId) -> mpsc::Receiver<Result<Entry, Fault>> {
        match self {
            Catalog::File(files) => files.transitions(org.clone()),
            Catalog::Mongo(mongo) => mongo.transitions(org.clone()),
        }
    }
}
