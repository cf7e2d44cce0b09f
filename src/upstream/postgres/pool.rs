//! Upstream connections, shared among a tenant's clients and, through one budget, among all tenants of a server.
//!
//! The journey of a lease: the most recently used idle connection to the same database, else a new one if the
//! tenant's limit and the server's budget have a place, else a turn in the tenant's queue. Tenants that wait for
//! the server's budget stand in a ring and are served one connection each in turn, so that none starves.
//!
//! Invariants:
//! - A connection holds its [`Places`] from before it is dialled until the server has closed it, so that the
//!   server never sees more connections than the limits say.
//! - A lease is released clean or closed; dropping it closes it.
//! - While the tenant stands still ([`crate::tenant::Tenant::still`]) nobody gets a connection and none is kept: what ends is closed, and
//!   who waits is told to look again when it goes on, since the database may be somewhere else then.
//! - No lock is held while another pool's is taken, or while a grant is dropped (which may come back here).

use std::{
    collections::VecDeque,
    mem::MaybeUninit,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadBuf},
    sync::{Notify, oneshot},
};

use super::{
    connection::Connection,
    dial::Target,
    endpoint::Endpoint,
    login::{self, ConnectError},
};
use crate::{
    quota::{Permit, Place, Slot, clock},
    tenant::{Limits, Namespace, Project, Protocol, Status, namespace::Password},
    upstream::scram::Keys,
    wire::postgres::{self as wire, HEAD, backend, frontend::TERMINATE},
};

/// Longest wait for a server to close its end of a connection that we closed.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

/// An idle connection that may hold invisible state (an advisory lock, say) is closed after this long.
const SOILED_IDLE: Duration = Duration::from_secs(1);

/// First pause before connecting is tried again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// Longest wait of one transaction for the tenant's database to change its home: longer than the longest pause
/// ([`crate::transition::participant::HOME_PAUSE_MAX`]), after which the move is called off.
pub const STILL_PATIENCE: Duration = Duration::from_secs(75);

/// Bytes an idle server may have sent before we look; more, and it is closed.
const IDLE_READ: usize = 4096;

/// How long connecting may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// One attempt, login included.
    pub connect: Duration,
    /// All attempts together, beyond a client's time in the queue, where the server may have to wake up first; zero
    /// where it never sleeps.
    pub waking: Duration,
}

/// Where a client's connections lead: server, role, database, password. One for all clients of a database
/// ([`Pool::home`]).
#[derive(Debug)]
pub struct Home {
    /// The server.
    pub endpoint: Arc<Endpoint>,
    /// The project at Neon that it belongs to, where it does.
    pub project: Option<Project>,
    /// The database as the tenant calls it.
    pub logical: Box<str>,
    /// The generation of the tenant's credentials that the password is of.
    pub generation: u32,
    /// Role and physical database.
    pub place: Namespace,
    /// The role's password.
    pub password: Password,
    /// The passwords of the generations next to it: while the credentials are being rotated the server may have either.
    pub others: Vec<Password>,
    /// The database as connections carry it: one word for one database on one server.
    pub database: Arc<str>,
}

/// The connections that one server grants to all tenants together.
#[derive(Debug)]
pub struct Budget {
    max: u32,
    used: Place,
    /// Pools that wait for a place, in turn.
    hungry: Mutex<VecDeque<Weak<Pool>>>,
    waiting: AtomicUsize,
    /// Pools that may have idle connections to give up; and how many there are, which every release may ask.
    pools: Mutex<Vec<Weak<Pool>>>,
    pool_count: AtomicU32,
}

impl Budget {
    /// A budget of `max` connections.
    pub fn new(max: u32) -> Arc<Self> {
        Arc::new(Self {
            max,
            used: Place::default(),
            hungry: Mutex::default(),
            waiting: AtomicUsize::new(0),
            pools: Mutex::default(),
            pool_count: AtomicU32::new(0),
        })
    }

    /// Connections open now.
    pub fn used(&self) -> u32 {
        self.used.taken()
    }

    /// Puts a pool at the end of the ring and takes an idle connection away from the pool that has most.
    fn ask(&self, pool: &Arc<Pool>) {
        let mut hungry = self.hungry.lock();
        if !hungry.iter().any(|weak| std::ptr::eq(weak.as_ptr(), Arc::as_ptr(pool))) {
            hungry.push_back(Arc::downgrade(pool));
            self.waiting.store(hungry.len(), Ordering::Release);
        }
        drop(hungry);
        // A place that was given back before we stood in the ring was offered to nobody.
        if self.used.taken() < self.max {
            self.freed();
            return;
        }
        let pools: Vec<Arc<Pool>> = self.pools.lock().iter().filter_map(Weak::upgrade).collect();
        let richest = pools.iter().max_by_key(|pool| pool.state.lock().idle.len());
        if let Some(pool) = richest {
            pool.close_oldest_idle();
        }
    }

    /// Serves the next pool in the ring.
    fn freed(&self) {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return;
        }
        loop {
            let next = {
                let mut hungry = self.hungry.lock();
                let next = hungry.pop_front();
                self.waiting.store(hungry.len(), Ordering::Release);
                next
            };
            let Some(next) = next else { return };
            // One whose clients have all gone meanwhile passes its turn on.
            if let Some(pool) = next.upgrade()
                && pool.wake()
            {
                return;
            }
        }
    }

    /// Connections a pool may keep while others wait: an equal share, at least one.
    fn share(&self) -> u32 {
        (self.max / self.pool_count.load(Ordering::Relaxed).max(1)).max(1)
    }
}

/// The places that one connection holds: in its tenant's limit and in its server's budget.
#[derive(Debug)]
pub struct Places {
    held: Option<(Permit<Slot>, Permit<Budget>)>,
    pool: Arc<Pool>,
    /// The tier's numbers when it was dialled: the role's own settings, which a server reads at login, follow them.
    limits: Arc<Limits>,
}

impl Drop for Places {
    fn drop(&mut self) {
        self.held = None;
        self.pool.budget.freed();
        self.pool.wake();
    }
}

/// One tenant's connections.
#[derive(Debug)]
pub struct Pool {
    slot: Arc<Slot>,
    /// What its connections are counted as.
    protocol: Protocol,
    budget: Arc<Budget>,
    keys: Mutex<Option<Keys>>,
    patience: Patience,
    /// The numbers that the role's own limits follow; and who is told that they don't any more.
    ceilings: Mutex<Arc<Limits>>,
    stale: Arc<Notify>,
    /// The server knows none of the role's passwords: a tenant can give its own role another one, by accident too.
    locked_out: AtomicBool,
    /// Somebody was made to wait because the tenant stood still.
    held: AtomicBool,
    homes: Mutex<Vec<Arc<Home>>>,
    endpoints: Mutex<Vec<Arc<Endpoint>>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Most recently used last.
    idle: Vec<Idle>,
    waiting: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Idle {
    held: Box<Held>,
    /// On [`clock::now_ms`].
    since_ms: u64,
}

/// A connection and the places it holds; one pointer, as every client has room for it.
#[derive(Debug)]
struct Held {
    connection: Connection,
    places: Places,
}

#[derive(Debug)]
struct Waiter {
    database: Arc<str>,
    grant: oneshot::Sender<Grant>,
}

#[derive(Debug)]
enum Grant {
    Connection(Box<Held>),
    Places(Places),
    /// The tenant goes on after it stood still.
    Again,
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.budget.pool_count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A borrowed connection. [`Lease::release`] returns it; dropping it closes it.
#[derive(Debug)]
pub struct Lease {
    held: Option<Box<Held>>,
}

impl Lease {
    /// Gives the connection back for others to use: idle, outside any transaction, nothing unanswered.
    pub fn release(mut self) {
        if let Some(held) = self.held.take() {
            Pool::give(held);
        }
    }
}

impl std::ops::Deref for Lease {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.held.as_ref().expect("a lease holds its connection until it is released").connection
    }
}

impl std::ops::DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.held.as_mut().expect("a lease holds its connection until it is released").connection
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            close(held);
        }
    }
}

/// Why there is no lease.
#[derive(Debug)]
pub enum TakeError {
    /// The tenant's own connections were all in use until the deadline.
    TenantFull {
        /// Connections the tenant has open.
        in_use: u32,
    },
    /// The server's budget was in use until the deadline.
    ServerFull,
    /// The tenant has stood still, or its database is closed here: look again where it is.
    Moved,
    /// The tenant stood still for too long.
    Still,
    /// The server could not be reached, or refused us.
    Connect(ConnectError),
}

/// What can be had at once.
#[derive(Debug)]
pub enum Taken {
    /// A connection.
    Lease(Lease),
    /// Places, to connect with: `Pool::connect`.
    Places(Places),
    /// A turn in the queue.
    Turn(Turn),
}

/// A turn in a pool's queue.
#[derive(Debug)]
pub struct Turn(oneshot::Receiver<Grant>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.close();
        // A grant that came too late goes to the next one instead of being closed.
        if let Ok(Grant::Connection(held)) = self.0.try_recv() {
            Pool::give(held);
        }
    }
}

impl Pool {
    /// A pool of connections for the tenant of `slot`, counted as `protocol`'s. `stale` is notified when the role's own
    /// limits no longer follow the tier ([`Self::stale_ceilings`]).
    pub fn new(
        slot: Arc<Slot>,
        protocol: Protocol,
        budget: Arc<Budget>,
        patience: Patience,
        stale: Arc<Notify>,
    ) -> Arc<Self> {
        let pool = Arc::new(Self {
            ceilings: Mutex::new(Arc::clone(&slot.policy().limits)),
            stale,
            locked_out: AtomicBool::new(false),
            held: AtomicBool::new(false),
            slot,
            protocol,
            budget,
            keys: Mutex::default(),
            patience,
            homes: Mutex::default(),
            endpoints: Mutex::default(),
            state: Mutex::default(),
        });
        pool.budget.pool_count.fetch_add(1, Ordering::Relaxed);
        let mut pools = pool.budget.pools.lock();
        pools.retain(|weak| weak.strong_count() > 0);
        pools.push(Arc::downgrade(&pool));
        drop(pools);
        pool
    }

    /// What its connections are counted as.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The tenant's slot.
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// The server at `target`, one for all connections of this pool to it.
    pub fn endpoint(&self, target: &Target) -> Arc<Endpoint> {
        let mut endpoints = self.endpoints.lock();
        if let Some(known) = endpoints.iter().find(|it| it.target().address() == target.address()) {
            return Arc::clone(known);
        }
        // Bounded by those in use.
        endpoints.retain(|endpoint| Arc::strong_count(endpoint) > 1);
        let endpoint = Arc::new(Endpoint::new(target.clone()));
        endpoints.push(Arc::clone(&endpoint));
        endpoint
    }

    /// Where connections to the logical `database` on the server at `target` lead under this generation of the
    /// tenant's credentials: as known, else as `make` says.
    pub fn home(
        &self,
        database: &str,
        target: &Target,
        generation: u32,
        make: impl FnOnce(Arc<Endpoint>) -> Home,
    ) -> Arc<Home> {
        let mut homes = self.homes.lock();
        let is_it = |home: &Home| {
            *home.logical == *database
                && home.generation == generation
                && home.endpoint.target().address() == target.address()
        };
        if let Some(known) = homes.iter().find(|home| is_it(home)) {
            return Arc::clone(known);
        }
        // Bounded by those in use.
        homes.retain(|home| Arc::strong_count(home) > 1);
        let home = Arc::new(make(self.endpoint(target)));
        homes.push(Arc::clone(&home));
        home
    }

    /// The present limits, if the role's own do not follow them yet or its password is not ours. Nobody else's role is
    /// made anew: a tenant that is being deleted may have none any more.
    pub fn stale_ceilings(&self) -> Option<Arc<Limits>> {
        let policy = self.slot.policy();
        let stale = self.locked_out.load(Ordering::Acquire) || !Arc::ptr_eq(&policy.limits, &self.ceilings.lock());
        (stale && policy.tenant.status == Status::Active).then(|| Arc::clone(&policy.limits))
    }

    /// Notes that the role's own limits follow `limits` now, and that its password is ours.
    pub fn set_ceilings(&self, limits: Arc<Limits>) {
        self.locked_out.store(false, Ordering::Release);
        *self.ceilings.lock() = limits;
    }

    /// Idle connections and waiting clients, now.
    pub fn depth(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.idle.len(), state.waiting.len())
    }

    /// Takes what can be had without waiting; an idle connection is checked for a server that has gone.
    pub fn try_take(self: &Arc<Self>, home: &Home) -> Taken {
        while !self.is_still() {
            let mut state = self.state.lock();
            state.waiting.retain(|waiter| !waiter.grant.is_closed());
            if !state.waiting.is_empty() {
                break;
            }
            let Some(at) = state.idle.iter().rposition(|idle| idle.held.connection.database == home.database) else {
                break;
            };
            let Idle { mut held, .. } = state.idle.remove(at);
            // Asking the socket is not done under the lock; neither is giving the places of a dead one back.
            drop(state);
            if alive(&mut held.connection) {
                return Taken::Lease(Lease { held: Some(held) });
            }
        }
        let mut state = self.state.lock();
        state.waiting.retain(|waiter| !waiter.grant.is_closed());
        if state.waiting.is_empty()
            && let Some(places) = self.places()
        {
            return Taken::Places(places);
        }
        let (grant, turn) = oneshot::channel();
        state.waiting.push_back(Waiter { database: Arc::clone(&home.database), grant });
        if self.is_still() {
            self.held.store(true, Ordering::SeqCst);
            drop(state);
            // It may have gone on since it was asked: then nobody else sends this waiter on.
            self.heed();
            return Taken::Turn(Turn(turn));
        }
        // An idle connection to another of the tenant's databases makes room.
        let other = (!state.idle.is_empty()).then(|| state.idle.remove(0));
        drop(state);
        match other {
            Some(idle) => close(idle.held),
            None if self.tenant_has_room() => self.budget.ask(self),
            None => {}
        }
        Taken::Turn(Turn(turn))
    }

    /// Takes a lease, waiting in the queue and connecting as needed, until `deadline`.
    ///
    /// # Cancel safety
    /// Dropping it gives up the turn; nothing is lost.
    pub async fn take(self: &Arc<Self>, home: &Home, first: Taken, deadline: Instant) -> Result<Lease, TakeError> {
        if self.stale_ceilings().is_some() {
            self.stale.notify_one();
        }
        let places = match first {
            Taken::Lease(lease) => return Ok(lease),
            Taken::Places(places) => places,
            Taken::Turn(mut turn) => match self.turn(&mut turn, deadline).await {
                Ok(Ok(Grant::Connection(held))) => return Ok(Lease { held: Some(held) }),
                Ok(Ok(Grant::Places(places))) => places,
                Ok(Ok(Grant::Again)) => return Err(TakeError::Moved),
                Ok(Err(_)) | Err(_) if self.is_still() => return Err(TakeError::Still),
                Ok(Err(_)) | Err(_) if self.tenant_has_room() => return Err(TakeError::ServerFull),
                Ok(Err(_)) | Err(_) => {
                    return Err(TakeError::TenantFull { in_use: self.slot.connections(self.protocol) });
                }
            },
        };
        self.connect(home, places, deadline).await.map_err(|error| match error.is_closed_database() {
            true => TakeError::Moved,
            false => TakeError::Connect(error),
        })
    }

    /// Waits for a grant until `deadline`; while the tenant stands still, longer.
    async fn turn(
        &self,
        turn: &mut Turn,
        deadline: Instant,
    ) -> Result<Result<Grant, oneshot::error::RecvError>, tokio::time::error::Elapsed> {
        let longest = Instant::now() + STILL_PATIENCE;
        let mut until = if self.is_still() { longest } else { deadline };
        loop {
            match tokio::time::timeout_at(until.into(), &mut turn.0).await {
                // It began to stand still while this one waited for a connection.
                Err(_) if self.is_still() && until < longest => until = longest,
                ended => return ended,
            }
        }
    }

    /// Whether the tenant stands still: its database is about to change its home.
    fn is_still(&self) -> bool {
        self.slot.policy().tenant.still
    }

    /// Does what the tenant's standing still, or its end, asks for: closes what is idle, or sends on who waits.
    pub fn heed(&self) {
        let mut state = self.state.lock();
        let (mut idle, mut waiting) = (Vec::new(), VecDeque::new());
        if self.is_still() {
            self.held.store(true, Ordering::SeqCst);
            idle = std::mem::take(&mut state.idle);
        } else if self.held.swap(false, Ordering::SeqCst) {
            waiting = std::mem::take(&mut state.waiting);
        }
        drop(state);
        idle.into_iter().for_each(|idle| close(idle.held));
        // Who does not wait any more misses it.
        waiting.into_iter().for_each(|waiter| drop(waiter.grant.send(Grant::Again)));
    }

    /// Connects, trying again while the server is starting or full and `deadline` has not passed. Nothing of a
    /// client has been sent, so that trying again is always safe.
    ///
    /// A server that sleeps is woken by one connection; the others wait for it. Its client's time in the queue is one
    /// thing and waking another: a compute that starts takes as long as it takes.
    async fn connect(self: &Arc<Self>, home: &Home, places: Places, deadline: Instant) -> Result<Lease, ConnectError> {
        let deadline = deadline.max(Instant::now() + self.patience.waking);
        let endpoint = &home.endpoint;
        let _turn = if self.patience.waking.is_zero() { None } else { endpoint.turn(deadline).await };
        let mut passwords = std::iter::once(&home.password).chain(&home.others);
        let mut password = passwords.next().unwrap_or(&home.password);
        let mut pause = RETRY_MIN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(RETRY_MIN);
            let login = login::Login { place: &home.place, database: &home.database, password, keys: &self.keys };
            let error = match login::connect(endpoint.target(), &login, self.patience.connect.min(left)).await {
                Ok(connection) => {
                    endpoint.is_up();
                    return Ok(Lease { held: Some(Box::new(Held { connection, places })) });
                }
                Err(error) => error,
            };
            let wrong = error.is_wrong_password();
            if wrong {
                // The keys are of this password; the salt is the other one's.
                *self.keys.lock() = None;
                if let Some(other) = passwords.next() {
                    password = other;
                    continue;
                }
                // Set anew by the maintenance, and tried again meanwhile.
                if !self.locked_out.swap(true, Ordering::AcqRel) {
                    tracing::warn!(org = %self.slot.org(), %error, "the role has another password: ours is set anew");
                }
                self.stale.notify_one();
                password = &home.password;
            }
            metrics::counter!("dynabase_upstream_errors_total", "protocol" => self.protocol.label(), "step" => error.step())
                .increment(1);
            if !(wrong || error.retry()) || Instant::now() + pause >= deadline {
                tracing::warn!(org = %self.slot.org(), upstream = %endpoint.target().address(), %error, "could not connect upstream");
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    fn give(mut held: Box<Held>) {
        let pool = Arc::clone(&held.places.pool);
        let policy = pool.slot.policy();
        let open = pool.slot.connections(pool.protocol);
        let over_tier = open > policy.limits.connections(pool.protocol);
        let outdated = !Arc::ptr_eq(&held.places.limits, &policy.limits) || policy.tenant.still;
        drop(policy);
        let hungry = pool.budget.waiting.load(Ordering::Relaxed) > 0;
        if over_tier || outdated || (hungry && open > pool.budget.share()) {
            return close(held);
        }
        let mut state = pool.state.lock();
        while let Some(waiter) = state.waiting.pop_front() {
            if waiter.grant.is_closed() {
                continue;
            }
            if waiter.database != held.connection.database {
                state.waiting.push_front(waiter);
                break;
            }
            match waiter.grant.send(Grant::Connection(held)) {
                Err(Grant::Connection(back)) => held = back,
                Ok(()) | Err(Grant::Places(_) | Grant::Again) => return,
            }
        }
        if state.waiting.is_empty() {
            state.idle.push(Idle { held, since_ms: clock::now_ms() });
        } else {
            drop(state);
            close(held);
        }
    }

    /// Gives free places to whoever waits first; tells whether anybody was waiting.
    fn wake(self: &Arc<Self>) -> bool {
        let mut late = Vec::new();
        let mut state = self.state.lock();
        state.waiting.retain(|waiter| !waiter.grant.is_closed());
        let waited = !state.waiting.is_empty();
        while !state.waiting.is_empty() {
            let Some(places) = self.places() else { break };
            let Some(waiter) = state.waiting.pop_front() else { break };
            if let Err(grant) = waiter.grant.send(Grant::Places(places)) {
                late.push(grant);
            }
        }
        let hungry = !state.waiting.is_empty();
        drop(state);
        if hungry && self.tenant_has_room() {
            self.budget.ask(self);
        }
        waited
    }

    fn places(self: &Arc<Self>) -> Option<Places> {
        if self.is_still() {
            return None;
        }
        let tenant = self.slot.connection(self.protocol)?;
        let server = Permit::take(&self.budget, |budget| &budget.used, self.budget.max)?;
        let limits = Arc::clone(&self.slot.policy().limits);
        Some(Places { held: Some((tenant, server)), pool: Arc::clone(self), limits })
    }

    fn tenant_has_room(&self) -> bool {
        !self.is_still() && self.slot.connections(self.protocol) < self.slot.policy().limits.connections(self.protocol)
    }

    fn close_oldest_idle(&self) {
        let oldest = {
            let mut state = self.state.lock();
            (!state.idle.is_empty()).then(|| state.idle.remove(0))
        };
        if let Some(idle) = oldest {
            close(idle.held);
        }
    }

    /// Closes what has been idle too long, what is soiled, what is over a shrunken limit, and what its server has
    /// closed; wakes whoever a raised limit has made room for. Called every second.
    pub fn tidy(self: &Arc<Self>, idle_timeout: Duration) {
        let mut doomed = Vec::new();
        let mut state = self.state.lock();
        let limits = Arc::clone(&self.slot.policy().limits);
        let cap = limits.connections(self.protocol);
        if self.stale_ceilings().is_some() {
            self.stale.notify_one();
        }
        let mut over = self.slot.connections(self.protocol).saturating_sub(cap);
        let mut kept = Vec::with_capacity(state.idle.len());
        let now_ms = clock::now_ms();
        for mut idle in state.idle.drain(..) {
            let age = Duration::from_millis(now_ms.saturating_sub(idle.since_ms));
            let Held { connection, places } = &mut *idle.held;
            let old = age >= idle_timeout || (connection.remote.soiled && age >= SOILED_IDLE);
            let outdated = !Arc::ptr_eq(&places.limits, &limits);
            if over > 0 || old || outdated || !alive(connection) {
                over = over.saturating_sub(1);
                doomed.push(idle);
            } else {
                kept.push(idle);
            }
        }
        state.idle = kept;
        let waiting = !state.waiting.is_empty();
        drop(state);
        doomed.into_iter().for_each(|idle| close(idle.held));
        if waiting {
            self.wake();
        }
    }

    /// Closes the idle connections to one physical database, so that it can be copied.
    pub fn close_idle(&self, database: &str) {
        let mut state = self.state.lock();
        let (doomed, kept): (Vec<Idle>, _) =
            state.idle.drain(..).partition(|idle| &*idle.held.connection.database == database);
        state.idle = kept;
        drop(state);
        doomed.into_iter().for_each(|idle| close(idle.held));
    }

    /// Whether nobody needs this pool: no connection, nobody waiting.
    pub fn is_unused(&self) -> bool {
        let state = self.state.lock();
        state.idle.is_empty() && state.waiting.is_empty()
    }
}

/// Whether an idle connection's server is still there. What it may say unasked is read and kept: notices,
/// parameters; anything else, and its end, means it is not usable.
fn alive(connection: &mut Connection) -> bool {
    // Not zeroed: this is on the way of every transaction, and hardly ever is there anything to read.
    let mut space = [MaybeUninit::uninit(); IDLE_READ];
    let mut read = ReadBuf::uninit(&mut space);
    match connection.stream.read_now(&mut read) {
        Poll::Pending => return true,
        Poll::Ready(Err(_)) => return false,
        Poll::Ready(Ok(())) if read.filled().is_empty() || read.remaining() == 0 => return false,
        Poll::Ready(Ok(())) => {}
    }
    let mut bytes = read.filled();
    while let Ok(Some(head)) = wire::head(bytes) {
        let Some(message) = bytes.get(..head.len) else { return false };
        match head.kind {
            b'S' => match backend::parameter(message) {
                Ok((name, value)) => {
                    Arc::make_mut(&mut connection.remote.parameters).set(name, value);
                }
                Err(_) => return false,
            },
            b'N' => {}
            _ => return false,
        }
        bytes = &bytes[head.len..];
    }
    debug_assert!(bytes.len() < HEAD || wire::head(bytes).is_err());
    bytes.is_empty()
}

/// Says goodbye and keeps the places until the server has closed its end: only then has its backend gone.
fn close(mut held: Box<Held>) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    runtime.spawn(async move {
        let connection = &mut held.connection;
        let goodbye = async {
            connection.stream.write_all(&TERMINATE).await?;
            connection.stream.shutdown().await?;
            let mut rest = [0; 512];
            while connection.stream.read(&mut rest).await? > 0 {}
            std::io::Result::Ok(())
        };
        // A server that does not close in time, or an error, ends the same way: the socket is dropped.
        let _ = tokio::time::timeout(CLOSE_WAIT, goodbye).await;
        // The socket first, then the places.
        let Held { connection, places } = *held;
        drop(connection);
        drop(places);
    });
}
