//! One client's conversation with whatever upstream connection it is linked to: a pure machine, bytes in, pieces to
//! write out. No socket, no clock.
//!
//! What it knows: which answers are owed ([`Ledger`]), the client's prepared statements and settings, what pins it
//! to its connection. What it decides: whether a message needs a connection, what is sent in its place, which of
//! the server's messages the client gets to see, and when the connection may serve somebody else.
//!
//! Its rooms: [`request`] takes the client's bytes, [`prepare`] makes statements be there under their names upstream,
//! [`reply`] takes the server's bytes, [`settle`] what outlives a transaction.
//!
//! Invariants:
//! - While not linked, nothing of the client's is on any server: everything it relies on is here.
//! - A statement name reaches a server only as one of ours, or as the client's own while it is pinned.
//! - Every message is forwarded by its length; a body is read only where a name, a tag or a state hides in it.

mod prepare;
mod reply;
mod request;
#[cfg(any(test, fuzzing))]
pub mod script;
mod settle;

use std::{collections::VecDeque, num::NonZeroU64, sync::Arc};

use super::{
    ledger::{Fate, How, Ledger, Owed, Unasked},
    out::Out,
    scan::{By, Shape, Track},
    statement::{Names, Shared, Statement, Types},
};
use crate::{
    refusal::Over,
    upstream::postgres::connection::{Parameters, Remote, Settings},
    wire::{self, postgres::backend},
};

/// What undoes whatever a client may have left in a server session without our seeing it.
pub const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;\
    SELECT pg_catalog.pg_advisory_unlock_all();DISCARD TEMP;DISCARD SEQUENCES;\
    DO $$DECLARE it text;BEGIN FOR it IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql LOOP \
    EXECUTE pg_catalog.format('DEALLOCATE %I',it);END LOOP;END$$";

/// How far the client's bytes were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes that are done with; the rest is given again, with more behind it or after `want` is met.
    pub consumed: usize,
    /// What has to happen before the rest.
    pub want: Want,
}

/// What has to happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// More bytes.
    More,
    /// An upstream connection: [`Conversation::pace`], then link.
    Link,
    /// The tenant's rate has to be asked: [`Conversation::pace`].
    Pace,
    /// The server's answer: the rest goes on once [`Conversation::is_holding`] says no.
    Hold,
    /// What there is to write has to leave first: it is more than the client sent.
    Again,
    /// Nothing: the client has said goodbye.
    Close,
}

/// How much of a reply was taken, and what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Bytes that are done with.
    pub consumed: usize,
    /// The server said that it ends this session.
    pub fatal: bool,
}

/// Why a conversation can't go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The client does not follow the protocol.
    Client(wire::Error),
    /// The server does not follow the protocol.
    Server(wire::Error),
    /// The server answered what nobody asked.
    Unasked,
}

impl From<Unasked> for Fault {
    fn from(_: Unasked) -> Self {
        Fault::Unasked
    }
}

#[derive(Debug)]
enum Note {
    /// A Parse that was sent: its statement, and the client's name for it.
    Parse { id: u64, own: Option<Box<[u8]>> },
    /// A Close of ours that was sent.
    Close { id: u64 },
    /// A Describe of a statement that was sent, by the client.
    Describe(Option<Arc<Statement>>),
    /// A Describe of ours: what the client was told is compared with the answer.
    Compare,
    /// A Parse or Close that is answered here: the client's name, and what it stood for before.
    Own { name: Box<[u8]>, was: Option<Arc<Statement>> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Forward,
    Drop,
}

/// What a client can't use while its session is refused something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusing {
    No,
    /// Everything up to the next Sync is dropped, as a server does after an error.
    UntilSync,
}

/// See the module's description.
#[derive(Debug)]
pub struct Conversation {
    id: u64,
    minor: u16,
    ledger: Ledger,
    shared: Arc<Shared>,
    names: Names,
    /// The settings of its startup packet, and those plus what it has SET since.
    base: Arc<Settings>,
    settings: Arc<Settings>,
    /// What the client was last told by ParameterStatus.
    reported: Arc<Parameters>,
    /// SET and RESET statements sent, by the number of their Query or Sync; and those that succeeded.
    staged: VecDeque<(u64, By, Track)>,
    done: Vec<Track>,
    sent: u64,
    answered: u64,
    pins: Shape,
    notes: VecDeque<Note>,
    /// The types that a server is just describing.
    types: Types,
    /// The statement whose types are being compared; and one of which they differ from what the client was told.
    holding: Option<Arc<Statement>>,
    changed: Option<NonZeroU64>,
    /// A portal was bound, then a statement sent, that may take all prepared statements away; and what the client
    /// sent behind it waits until it is known whether it did.
    wipe_bound: bool,
    wiping: bool,
    waits: bool,
    /// Bytes of a message that is passing, in each direction.
    client_rest: (usize, Rest),
    server_rest: (usize, Fate),
    paced: bool,
    refusing: Refusing,
    /// Executes sent since the last Sync.
    executes: u32,
    /// Pins that are undone once the transaction that undoes them is over.
    undoing: Shape,
    /// How the present transaction went: COMMITs, ROLLBACKs and errors seen.
    committed: bool,
    rolled_back: bool,
    failed: bool,
    /// An unnamed statement that is too large to follow the client is on the server; whether it was bound.
    large_unnamed: Option<bool>,
    large_named: bool,
    /// The connection must not serve anybody else.
    spoilt: bool,
    moved_sequence: bool,
    changed_schema: bool,
    /// Boxed, as few clients ever have them.
    over_storage: Option<Box<Over>>,
    timed_out: Option<Box<Over>>,
    errors: u64,
}

impl Conversation {
    /// A conversation of session `id` in minor protocol version `minor`, with the settings of its startup packet and
    /// what a server reports under them.
    pub fn new(id: u64, minor: u16, shared: Arc<Shared>, base: Arc<Settings>, reported: Arc<Parameters>) -> Self {
        Self {
            id,
            minor,
            ledger: Ledger::default(),
            shared,
            names: Names::default(),
            settings: Arc::clone(&base),
            base,
            reported,
            staged: VecDeque::new(),
            done: Vec::new(),
            sent: 0,
            answered: 0,
            pins: Shape::default(),
            notes: VecDeque::new(),
            types: Types::default(),
            holding: None,
            changed: None,
            wipe_bound: false,
            wiping: false,
            waits: false,
            client_rest: (0, Rest::Drop),
            server_rest: (0, Fate::Drop),
            paced: false,
            refusing: Refusing::No,
            executes: 0,
            undoing: Shape::default(),
            committed: false,
            rolled_back: false,
            failed: false,
            large_unnamed: None,
            large_named: false,
            spoilt: false,
            moved_sequence: false,
            changed_schema: false,
            over_storage: None,
            timed_out: None,
            errors: 0,
        }
    }

    /// The minor protocol version.
    pub fn minor(&self) -> u16 {
        self.minor
    }

    /// What the client was last told by ParameterStatus.
    pub fn reported(&self) -> &Parameters {
        &self.reported
    }

    /// Whether the client has been given whole messages only, so that one of ours can stand next.
    pub fn is_between_replies(&self) -> bool {
        self.server_rest.0 == 0 || self.server_rest.1 == Fate::Drop
    }

    /// Which answers are owed.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Errors that the server reported, ever.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// Whether the connection may serve somebody else.
    pub fn may_release(&self) -> bool {
        self.ledger.is_idle()
            && !self.paced
            && self.pins.is_empty()
            && self.client_rest.0 == 0
            && self.server_rest.0 == 0
    }

    /// Takes the news that the connection must not serve anybody else.
    pub fn take_spoilt(&mut self) -> bool {
        std::mem::take(&mut self.spoilt)
    }

    /// Whether the client's next message waits for the server's answer to a question of ours.
    pub fn is_holding(&self) -> bool {
        self.holding.is_some() || self.waits
    }

    /// Whether the session can end without cutting anything short.
    pub fn is_at_safe_point(&self) -> bool {
        self.ledger.is_idle() && self.client_rest.0 == 0
    }

    /// Notes that the tenant's rate has admitted the next transaction.
    pub fn pace(&mut self) {
        self.paced = true;
    }

    /// Sets whether growing statements are refused, and with which numbers.
    pub fn set_over_storage(&mut self, over: Option<Over>) {
        self.over_storage = over.map(Box::new);
    }

    /// Whether a statement that is being cancelled because it exceeded its time has not ended yet.
    pub fn is_timed_out(&self) -> bool {
        self.timed_out.is_some()
    }

    /// Notes that the running statement is being cancelled because it exceeded its time.
    pub fn set_timed_out(&mut self, over: Option<Over>) {
        self.timed_out = over.map(Box::new);
    }

    /// The queries that have to run on a server before it is this client's: what undoes another client's traces, and
    /// this client's settings. None in the usual case.
    pub fn preparation(&self, remote: &Remote) -> Vec<String> {
        let foreign = remote.soiled && remote.owner != self.id;
        if !foreign && Arc::ptr_eq(&remote.settings, &self.settings) {
            return Vec::new();
        }
        if foreign {
            let mut queries = Settings::default().script(&self.settings);
            match queries.first_mut() {
                Some(first) => {
                    first.insert(0, ';');
                    first.insert_str(0, RESET);
                }
                None => queries.push(RESET.into()),
            }
            queries
        } else {
            remote.settings.script(&self.settings)
        }
    }

    /// Goes on in another database, which its present one has become: between two transactions, without pins. Types are
    /// numbered anew there, so that its statements are compared before they are used.
    pub fn move_to(&mut self, shared: Arc<Shared>) {
        shared.raise_above(self.shared.epoch());
        self.base = shared.intern(Settings::clone(&self.base));
        self.settings = shared.intern(Settings::clone(&self.settings));
        self.shared = shared;
    }

    /// Takes a server that is prepared as [`Self::preparation`] says. Tells the client of parameters that differ
    /// from what it was told last.
    pub fn link(&mut self, remote: &mut Remote, down: &mut Out) {
        if remote.owner != self.id {
            // What was foreign and soiled has been reset, sequences included.
            remote.sequences &= !remote.soiled;
            remote.owner = self.id;
            remote.soiled = false;
            self.moved_sequence = false;
        }
        remote.settings = Arc::clone(&self.settings);
        if !Arc::ptr_eq(&remote.parameters, &self.reported) {
            if *remote.parameters != *self.reported {
                // Under equal settings this server reports something new, so new clients have to be told anew.
                self.shared.forget_profiles();
                for (name, value) in remote.parameters.iter() {
                    if self.reported.value(name) != Some(value) {
                        down.own(|own| backend::put_parameter(own, name, value));
                    }
                }
                self.reported = Arc::clone(&remote.parameters);
            } else {
                // From now on one comparison of pointers tells.
                remote.parameters = Arc::clone(&self.reported);
            }
        }
        self.ledger.shrink();
    }

    fn push(&mut self, owed: Owed, how: How) -> bool {
        self.ledger.push(owed, how)
    }
}
