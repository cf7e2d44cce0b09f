//! The databases that take part in a transition: what each can say about a move, and how it is brought there or back.
//!
//! Every call may be repeated, may arrive late, and may be done although its answer is lost. A call carries the
//! coordinator's fence and stage ([`Mark`]); where a database can hold such a mark it refuses what is older, so that a
//! coordinator that wakes up too late changes nothing.

use std::{fmt, pin::Pin, sync::Arc};

use serde::Serialize;
use serde_json::Value;

use crate::{
    catalog::Over,
    tenant::{Home, Isolation, Limits, Protocol, Tenant, Tier},
    upstream::postgres::Mark,
};

mod convex;
mod home;
mod mongo;
mod neon;
mod postgres;
mod redis;

pub use convex::Convex;
pub use home::{HOME_PAUSE_MAX, Homecoming, rehomes};
pub use mongo::Mongo;
pub use neon::Neon;
pub use postgres::Postgres;
pub use redis::Redis;

use super::state::SEATS;

/// The stage of a mark while preparing.
pub const PREPARES: u8 = 1;

/// The stage of a mark when finishing or restoring.
pub const SETTLES: u8 = 2;

/// What a participant is asked to do.
#[derive(Clone, Debug)]
pub struct Order {
    /// The tenant as it was when the transition began.
    pub tenant: Tenant,
    /// Its limits then.
    pub from: Arc<Limits>,
    /// The tier to go to.
    pub to_tier: Tier,
    /// Its limits.
    pub to: Arc<Limits>,
    /// Whether a tenant over its new limits goes there nevertheless.
    pub force: bool,
    /// Between which homes the tenant's SQL databases move, if they do.
    pub homes: Option<(Home, Home)>,
    /// Whether the home to go to is one that they have left before.
    pub returns: bool,
    /// Of [`Stage::Forget`]: the home that they have left.
    pub left: Option<Home>,
    /// The settings before, as [`Participant::look`] gave them.
    pub prior: Value,
    /// The coordinator's fence.
    pub fence: u64,
    /// Where it says how far it is.
    pub progress: Progress,
}

/// Between which places a tenant's documents on MongoDB move with its tier. Where its record names the place they stay.
pub fn moves(tenant: &Tenant, from: &Limits, to: &Limits) -> Option<(Isolation, Isolation)> {
    let (from, to) = (from.mongodb.isolation, to.mongodb.isolation);
    (tenant.routes.mongodb.is_none() && from != to).then_some((from, to))
}

/// How far a long call is, for people: the last word counts. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<parking_lot::Mutex<String>>);

impl Progress {
    /// Says how far it is.
    pub fn say(&self, word: impl Into<String>) {
        *self.0.lock() = word.into();
    }

    /// What was said since it was asked last.
    pub fn take(&self) -> Option<String> {
        let word = std::mem::take(&mut *self.0.lock());
        (!word.is_empty()).then_some(word)
    }
}

/// A step of a tenant's life at one database. Each may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Make the tenant's place, or bring it up to date.
    Make,
    /// Let in who comes with the next generation of its credentials, beside the present one.
    TakeNext,
    /// Only the next generation from now on.
    DropPrevious,
    /// Only the present generation from now on.
    DropNext,
    /// Take away all that is the tenant's.
    Purge,
    /// Take away the home that the tenant's SQL databases have left.
    Forget,
}

/// Something that a database holds of a tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holding {
    /// What: `database app`, `keys`, …
    pub what: String,
    /// How many of them, where that is known.
    pub count: Option<u64>,
    /// Their bytes, where that is known.
    pub bytes: Option<u64>,
}

impl Order {
    /// Between which places the tenant's documents on MongoDB move; `None`: they stay.
    pub fn moves(&self) -> Option<(Isolation, Isolation)> {
        moves(&self.tenant, &self.from, &self.to)
    }

    fn mark(&self, stage: u8) -> Mark {
        Mark { fence: self.fence, stage }
    }
}

/// What a participant says before anything is done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// Its settings, to be restored.
    pub prior: Value,
    /// What the tenant has more of than the new limits allow.
    pub over: Vec<Over>,
}

/// What a participant holds, beside what it should.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReadBack {
    /// Whether they are the same.
    pub agrees: bool,
    /// What the decided tier asks for.
    pub expected: Value,
    /// What is there.
    pub found: Value,
}

/// Why a participant did not do it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It can't or must not: nothing was done.
    No(String),
    /// A newer coordinator was there: nothing was done, and nothing is left to do for this one.
    Overtaken,
    /// It can't be reached: nothing was done.
    Failed(String),
    /// No answer, or one that says nothing: it may have been done, or be done yet.
    Unknown(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::No(what) => write!(f, "no: {what}"),
            Trouble::Overtaken => f.write_str("a newer coordinator was here"),
            Trouble::Failed(what) => write!(f, "not reached: {what}"),
            Trouble::Unknown(what) => write!(f, "no answer: {what}"),
        }
    }
}

/// A participant's answer, some time.
pub type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<T, Trouble>> + Send + 'a>>;

/// One database's part. All calls may be repeated; dropping one may leave it done.
pub trait Participant: Send + Sync {
    /// Which database.
    fn database(&self) -> Protocol;

    /// Reads its settings for the tenant and what stands against the new limits. Changes nothing.
    fn look<'a>(&'a self, tenant: &'a Tenant, to: &'a Limits) -> Reply<'a, Look>;

    /// Makes room for the new limits beside the old ones.
    fn prepare<'a>(&'a self, order: &'a Order) -> Reply<'a, ()>;

    /// The last thing before the commit, once every database has prepared: what can be kept up for a moment only. It is
    /// given back by `finish` or `restore`.
    fn seal<'a>(&'a self, _order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Brings it to the new limits, and reads back that it is there.
    fn finish<'a>(&'a self, order: &'a Order) -> Reply<'a, ()>;

    /// Brings it back to the settings before.
    fn restore<'a>(&'a self, order: &'a Order) -> Reply<'a, ()>;

    /// Does its part in a step of the tenant's life. By default nothing of a tenant is kept there by this program.
    fn live<'a>(&'a self, _stage: Stage, _order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Lists what it holds of the tenant: all that [`Stage::Purge`] would take away.
    fn holdings<'a>(&'a self, _tenant: &'a Tenant) -> Reply<'a, Vec<Holding>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// Says what it holds for the tenant, beside what `limits` ask for.
    fn read_back<'a>(&'a self, tenant: &'a Tenant, limits: &'a Limits) -> Reply<'a, ReadBack>;
}

/// Every database of this installation, in the order of [`Protocol::ALL`]; `None` where there is none.
#[derive(Clone, Default)]
pub struct Participants(pub [Option<Arc<dyn Participant>>; SEATS]);

impl Participants {
    /// None at all.
    pub fn none() -> Self {
        Self::default()
    }

    /// With one more.
    #[must_use]
    pub fn with(mut self, participant: Arc<dyn Participant>) -> Self {
        let seat = participant.database() as usize;
        self.0[seat] = Some(participant);
        self
    }

    /// Which are there.
    pub fn present(&self) -> [bool; SEATS] {
        self.0.each_ref().map(Option::is_some)
    }
}

/// A word about something that is over, unless it is not.
fn over(database: Protocol, what: &str, used: u64, max: u64) -> Option<Over> {
    (used > max).then(|| Over { database: database.label().to_owned(), what: what.to_owned(), used, max })
}

fn value(of: &impl Serialize) -> Value {
    // Numbers, texts and lists of them always have a JSON form.
    serde_json::to_value(of).unwrap_or_default()
}
