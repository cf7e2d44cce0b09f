//! One connection to the server, fed by many clients or by one.
//!
//! Clients append requests under a short lock ([`Link::lock`]) and say in the same breath what becomes of the
//! replies ([`Pending`]); the link's task writes them in one piece, walks the replies once and hands each span to
//! its client's [`Outbox`]. While replies are outstanding, new requests gather and leave with the next wake-up:
//! the server works on one command at a time anyway, so nothing is delayed, and one write serves many clients.
//!
//! What the task does with large values and slow clients stands there ([`task`]).
//!
//! A large request comes in pieces on a dedicated link ([`State::partial`]): its bytes leave before anything is
//! expected for them, and a link with half a request is never used again, only closed.

mod task;

use std::{
    collections::HashSet,
    sync::{Arc, Weak, atomic::AtomicU64},
};

use atomic_waker::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};

use super::{
    Place, Version,
    again::Group,
    ledger::Ledger,
    outbox::Outbox,
    reply::{Shape, Transaction},
};

/// Unsent request bytes over which clients wait before they add more.
pub const OUT_HIGH_BYTES: usize = 1 << 20;

/// The text that commands get whose reply was lost with the connection. Nothing is sent again: it may have run.
pub const LOST: &str = "ERR upstream connection lost; the command may or may not have been executed";

/// What becomes of replies.
#[derive(Debug)]
pub enum How {
    /// They pass.
    Raw,
    /// They are swallowed.
    Discard,
    /// They lose their prefix.
    Strip(Shape),
    /// They are the frames of one transaction.
    Transaction(Box<Transaction>),
    /// Nothing comes from the server: these bytes are the reply, in its place among the others.
    Local(Box<[u8]>),
    /// The reply is the number of keys, asked when this many creations were done.
    Count(u64),
    /// A reply that is no error is replaced by these bytes.
    Instead(Box<[u8]>),
    /// A pair of how many keys were created, of so many that were reserved, and the reply.
    Learn(u64),
    /// Confirmations on a subscriber's link.
    Confirm,
}

/// Replies outstanding for one client.
#[derive(Debug)]
pub struct Pending {
    /// Whose.
    pub to: Arc<Outbox>,
    /// How many commands of the client they answer.
    pub count: usize,
    /// How many keys the commands may create, for the ledger.
    pub creates: u64,
    /// What becomes of them.
    pub how: How,
    /// The requests, where they may have to be sent elsewhere.
    pub group: Option<Group>,
}

/// Where a link goes, and how its task finds what is elsewhere.
#[derive(Debug)]
pub struct Home {
    /// The tenant.
    pub place: Weak<Place>,
    /// Its slot.
    pub slot: u16,
    /// The server.
    pub address: Arc<str>,
    /// The protocol version.
    pub version: Version,
}

/// What the link is for.
#[derive(Clone, Debug)]
pub enum Role {
    /// Requests and replies of many clients.
    Shared,
    /// Requests and replies of one client, with pushes between them.
    Dedicated(Arc<Outbox>),
    /// Messages for one client.
    Subscriber(Arc<Outbox>),
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    state: Mutex<State>,
    waker: AtomicWaker,
    role: Mutex<Role>,
    prefix: Box<[u8]>,
    ledger: Arc<Ledger>,
    used: AtomicU64,
    /// The server's id of the connection, where somebody asked for it.
    id: i64,
    /// Databases whose events a subscriber listens to: the server's number, the tenant's.
    listened: Mutex<Vec<(u32, u32)>>,
}

/// What clients append to.
#[derive(Debug, Default)]
pub struct State {
    /// Request bytes not yet taken by the link's task.
    pub out: Vec<u8>,
    fresh: Vec<Pending>,
    stalled: Vec<Arc<Outbox>>,
    closed: bool,
    /// Nothing more is taken; what is outstanding is waited for.
    retired: bool,
    /// A request is under way in pieces: what is in `out` leaves although no reply to it is expected yet.
    pub partial: bool,
    /// Requests are kept until they are answered.
    keeps: bool,
    /// Where in `out` the next group begins.
    mark: usize,
    /// Scripts loaded through this connection, and the ledger's `scripts_lost` when that was true.
    loaded: (HashSet<[u8; 40]>, u64),
}

impl State {
    /// Whether a script has to be loaded before it is called; says so once.
    pub fn must_load(&mut self, sha: &[u8; 40], lost: u64) -> bool {
        if self.loaded.1 != lost {
            self.loaded.0.clear();
            self.loaded.1 = lost;
        }
        self.loaded.0.insert(*sha)
    }

    /// Adds what becomes of the requests just appended; runs of the same kind become one entry.
    #[inline]
    pub fn expect(&mut self, to: &Arc<Outbox>, count: usize, creates: u64, how: How) {
        let group = if self.keeps { self.group(count, &how) } else { None };
        if let (How::Raw, Some(last), None) = (&how, self.fresh.last_mut(), &group)
            && matches!(last.how, How::Raw)
            && Arc::ptr_eq(&last.to, to)
        {
            last.count += count;
            last.creates += creates;
            return;
        }
        self.fresh.push(Pending { to: Arc::clone(to), count, creates, how, group });
    }

    /// The requests appended since the last group.
    #[cold]
    fn group(&mut self, count: usize, how: &How) -> Option<Group> {
        let bytes: Box<[u8]> = self.out[self.mark..].into();
        self.mark = self.out.len();
        let frames = match how {
            How::Local(_) | How::Confirm | How::Count(_) => return None,
            How::Transaction(transaction) => transaction.acks + 1,
            How::Discard => count,
            How::Raw | How::Strip(_) | How::Instead(_) | How::Learn(_) => 1,
        };
        Some(Group { bytes, frames })
    }

    /// Whether scripts have to be sent with every call, since it may have to be made elsewhere.
    pub fn keeps_groups(&self) -> bool {
        self.keeps
    }

    /// Whether so much waits to be sent that the client should wait; if so it will be woken.
    pub fn is_full(&mut self, client: &Arc<Outbox>) -> bool {
        self.is_over(OUT_HIGH_BYTES, client)
    }

    /// The same for another number of bytes.
    pub fn is_over(&mut self, max: usize, client: &Arc<Outbox>) -> bool {
        let full = self.out.len() > max;
        if full && !self.stalled.iter().any(|other| Arc::ptr_eq(other, client)) {
            self.stalled.push(Arc::clone(client));
        }
        full
    }
}

impl Link {
    /// A link whose task ([`Self::run`]) is to be spawned by the caller.
    pub fn new(role: Role, prefix: &[u8], ledger: Arc<Ledger>) -> Arc<Self> {
        Self::with_id(role, prefix, ledger, 0)
    }

    /// The same for a connection that the server knows as `id`.
    pub fn with_id(role: Role, prefix: &[u8], ledger: Arc<Ledger>, id: i64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            waker: AtomicWaker::new(),
            role: Mutex::new(role),
            prefix: prefix.into(),
            ledger,
            used: AtomicU64::new(0),
            id,
            listened: Mutex::default(),
        })
    }

    /// The server's id of this connection, 0 if it was not asked.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Says that events of a database may come, and what the tenant calls it.
    pub fn listen(&self, index: u32, number: u32) {
        let mut listened = self.listened.lock();
        if !listened.contains(&(index, number)) {
            listened.push((index, number));
        }
    }

    /// The state to append to, or `None` once the connection is lost. Call [`Self::wake`] after dropping it.
    pub fn lock(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.state.lock();
        (!state.closed && !state.retired).then_some(state)
    }

    /// The state for replies of our own, which have their place among the outstanding ones to the end.
    pub fn lock_for_local(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.state.lock();
        (!state.closed).then_some(state)
    }

    /// Keeps every request until it is answered, since it may have to be sent elsewhere.
    pub fn keep_groups(&self) {
        self.state.lock().keeps = true;
    }

    /// Takes nothing more, and ends once everything is answered.
    fn retire(&self) {
        self.state.lock().retired = true;
        self.waker.wake();
    }

    /// Tells the link's task that there is something new.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Closes the connection; what is outstanding is lost.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.waker.wake();
    }

    /// Closes a connection of one client without letting the client go with it.
    pub fn part(&self) {
        {
            let mut role = self.role.lock();
            if let Role::Dedicated(client) | Role::Subscriber(client) = &mut *role {
                *client = Arc::default();
            }
        }
        self.close();
    }

    /// Whether the connection is lost or closed.
    pub fn is_closed(&self) -> bool {
        let state = self.state.lock();
        state.closed || state.retired
    }

    /// Gives a dedicated link to another client.
    pub fn hand_to(&self, client: Arc<Outbox>) {
        *self.role.lock() = Role::Dedicated(client);
    }
}
