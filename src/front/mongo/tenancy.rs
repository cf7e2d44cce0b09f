//! What all clients of one tenant share: its turns, its cursors, its open transactions, the way its requests go.
//!
//! A driver's cursors and sessions move between its pooled connections, so they belong to the tenant and not to a
//! client: cursors end when the tenant's last client goes or after [`CURSOR_IDLE`]; a transaction ends with the client
//! that used it last, since it holds locks.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use hashbrown::{HashMap, HashSet};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::{
    large::Rooms,
    mask::Mask,
    rewrite::Failed,
    threshold::{Inside, Threshold, Thresholds},
    turn::{Turn, Turns},
};
use crate::{
    quota::{Policy, Slot, clock},
    tenant::{Isolation, OrgId, namespace::MongoNamespace},
    upstream::mongo::{Account, Error, Lease, Upstream},
    wire::mongo::bson,
};

/// How long an unused cursor is kept: as long as the server keeps it.
const CURSOR_IDLE: Duration = Duration::from_secs(600);

/// How long an unused transaction is kept: the server's own limit on the life of one.
const TRANSACTION_IDLE: Duration = Duration::from_secs(60);

/// Prepared collections that are remembered; to prepare one again costs an errand.
const PREPARED_MAX: usize = 1000;

/// Collections of all tenants that are remembered to be there; to look again costs an errand.
const KNOWN_MAX: usize = 10_000;

/// Refused operations of which a tenant's open cursors remember why, some hundred bytes each. Of those beyond, and where
/// another process reads on, the results say that they were refused in the server's words.
const REFUSED_MAX: usize = 1000;

/// Requests of one tenant that give things back at a time: they take no turns.
pub const RETURNS_MAX: usize = 2;

/// How a tenant's requests go: it changes with the tenant's isolation and with its credentials.
#[derive(Debug)]
pub struct Way {
    /// How its documents are kept apart.
    pub isolation: Isolation,
    /// The names of its databases.
    pub place: MongoNamespace,
    generation: u32,
    account: Arc<Account>,
}

impl Way {
    fn new(upstream: &Upstream, slot: &Slot) -> Self {
        let (isolation, generation) = wanted(slot);
        let place = upstream.place(slot.org(), isolation);
        Self { isolation, place, generation, account: upstream.account(slot.org(), generation) }
    }

    /// Makes sure that the tenant's user may use a logical database.
    ///
    /// # Errors
    /// See [`Account::open`].
    pub async fn open(&self, upstream: &Upstream, database: &str) -> Result<(), Error> {
        match self.isolation {
            Isolation::Filter => Ok(()),
            Isolation::Database => self.account.open(upstream, database).await,
        }
    }

    /// A connection for one request on a logical database.
    ///
    /// # Errors
    /// See [`Account::lease`].
    pub async fn lease(&self, upstream: &Upstream, database: Option<&str>) -> Result<Lease, Error> {
        match self.isolation {
            Isolation::Filter => upstream.platform().await,
            Isolation::Database => self.account.lease(upstream, database).await,
        }
    }
}

/// The isolation and the generation of credentials that the present policy wants.
fn wanted(slot: &Slot) -> (Isolation, u32) {
    let policy = slot.policy();
    (policy.tenant.routes.mongodb.unwrap_or(policy.limits.mongodb.isolation), policy.tenant.generation)
}

/// A server-side session's id.
pub type SessionId = [u8; 16];

/// A transaction that is open at the server.
#[derive(Debug)]
pub struct Open {
    /// `txnNumber`.
    pub number: i64,
    /// Its turn, held until it ends.
    pub _turn: Turn,
    /// It is inside until it ends.
    pub _inside: Inside,
    /// The client that used it last.
    pub client: u64,
    /// The way it went.
    pub way: Arc<Way>,
    /// When it was used last, in coarse milliseconds.
    pub used_ms: u64,
}

#[derive(Debug)]
struct Cursor {
    /// The physical `database.collection`.
    namespace: String,
    way: Arc<Way>,
    used_ms: u64,
    /// Operations of a `bulkWrite` that were refused and whose results are still to come.
    refused: Arc<[Failed]>,
}

/// One tenant.
#[derive(Debug)]
pub struct Tenancy {
    /// Its turns.
    pub turns: Arc<Turns>,
    /// Places for what gives things back.
    pub returns: Arc<Semaphore>,
    /// Its permutations.
    pub mask: Mask,
    /// Its room for large messages.
    pub rooms: Rooms,
    /// Where its requests may have to wait.
    pub threshold: Arc<Threshold>,
    slot: Arc<Slot>,
    way: ArcSwap<Way>,
    clients: AtomicU32,
    cursors: Mutex<HashMap<i64, Cursor>>,
    transactions: Mutex<HashMap<SessionId, Open>>,
    /// Shared collections of which something was asked and done.
    prepared: Mutex<HashSet<(bool, String)>>,
}

impl Tenancy {
    fn new(upstream: &Upstream, slot: &Arc<Slot>, thresholds: &Thresholds) -> Option<Self> {
        let org = slot.org();
        let mask = Mask::new(&upstream.mask("mongodb sessions", org), &upstream.mask("mongodb cursors", org)).ok()?;
        Some(Self {
            turns: Turns::new(Arc::clone(slot)),
            returns: Arc::new(Semaphore::new(RETURNS_MAX)),
            mask,
            rooms: Rooms::of_tenant(),
            threshold: thresholds.of(org),
            slot: Arc::clone(slot),
            way: ArcSwap::from_pointee(Way::new(upstream, slot)),
            clients: AtomicU32::new(0),
            cursors: Mutex::default(),
            transactions: Mutex::default(),
            prepared: Mutex::default(),
        })
    }

    /// The tenant.
    pub fn org(&self) -> &OrgId {
        self.slot.org()
    }

    /// Its tier and limits now.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.slot.policy())
    }

    /// How a request goes now.
    pub fn way(&self, upstream: &Upstream) -> Arc<Way> {
        let way = self.way.load_full();
        if (way.isolation, way.generation) == wanted(&self.slot) {
            return way;
        }
        let way = Arc::new(Way::new(upstream, &self.slot));
        self.way.store(Arc::clone(&way));
        way
    }

    /// Whether a collection was made what a request needs.
    pub fn is_prepared(&self, what: &(bool, String)) -> bool {
        self.prepared.lock().contains(what)
    }

    /// Notes that it was.
    pub fn set_prepared(&self, what: (bool, String)) {
        let mut prepared = self.prepared.lock();
        if prepared.len() >= PREPARED_MAX {
            prepared.clear();
        }
        prepared.insert(what);
    }

    /// Open cursors now.
    pub fn cursors(&self) -> usize {
        self.cursors.lock().len()
    }

    /// Whether a cursor is known to be open.
    pub fn has_cursor(&self, id: i64) -> bool {
        self.cursors.lock().contains_key(&id)
    }

    /// Notes a cursor that a reply left open, or that was used. False, and nothing noted, when it would be one more
    /// than `max`.
    pub fn keep_cursor(&self, id: i64, namespace: &str, way: &Arc<Way>, max: usize, refused: &[Failed]) -> bool {
        let mut cursors = self.cursors.lock();
        let used_ms = clock::now_ms();
        if let Some(cursor) = cursors.get_mut(&id) {
            cursor.used_ms = used_ms;
            return true;
        }
        let fits = cursors.len() < max;
        if fits {
            let kept: usize = match refused {
                [] => 0,
                _ => cursors.values().map(|cursor| cursor.refused.len()).sum(),
            };
            let refused = if kept + refused.len() <= REFUSED_MAX { refused } else { &[] };
            let (namespace, way, refused) = (namespace.to_owned(), Arc::clone(way), refused.into());
            cursors.insert(id, Cursor { namespace, way, used_ms, refused });
        }
        fits
    }

    /// The operations that were refused of the `bulkWrite` whose results a cursor holds.
    pub fn refused_of(&self, id: i64) -> Option<Arc<[Failed]>> {
        self.cursors.lock().get(&id).map(|cursor| Arc::clone(&cursor.refused))
    }

    /// Forgets a cursor.
    pub fn drop_cursor(&self, id: i64) {
        self.cursors.lock().remove(&id);
    }

    /// Takes the open transaction of a session, if it has that number.
    pub fn take_transaction(&self, session: &SessionId, number: i64) -> Option<Open> {
        let mut transactions = self.transactions.lock();
        if transactions.get(session).is_some_and(|open| open.number == number) {
            return transactions.remove(session);
        }
        None
    }

    /// Forgets whatever transaction a session has open: the server ends it when the session's next one starts.
    pub fn replace_transaction(&self, session: &SessionId) {
        let before = self.transactions.lock().remove(session);
        drop(before);
    }

    /// Keeps an open transaction until its next statement.
    pub fn keep_transaction(&self, session: SessionId, open: Open) {
        let before = self.transactions.lock().insert(session, open);
        drop(before);
    }

    /// Takes the transactions that `doomed` picks.
    fn take_transactions(&self, doomed: impl Fn(&Open) -> bool) -> Vec<(SessionId, Open)> {
        self.transactions.lock().extract_if(|_, open| doomed(open)).collect()
    }

    /// Takes the transactions that a client used last.
    pub fn take_transactions_of(&self, client: u64) -> Vec<(SessionId, Open)> {
        self.take_transactions(|open| open.client == client)
    }

    /// Ends what was not used for long.
    async fn sweep(&self, upstream: &Upstream) {
        let now = clock::now_ms();
        let idle = |used_ms: u64, max: Duration| u128::from(now.saturating_sub(used_ms)) > max.as_millis();
        for (session, open) in self.take_transactions(|open| idle(open.used_ms, TRANSACTION_IDLE)) {
            abort(upstream, &session, open).await;
        }
        let stale: Vec<(i64, Cursor)> =
            self.cursors.lock().extract_if(|_, cursor| idle(cursor.used_ms, CURSOR_IDLE)).collect();
        for (id, cursor) in stale {
            kill_cursor(upstream, &cursor.way, id, &cursor.namespace).await;
        }
    }

    /// Ends everything at the server: the last client has gone.
    async fn end(&self, upstream: &Upstream) {
        for (session, open) in self.take_transactions(|_| true) {
            abort(upstream, &session, open).await;
        }
        let cursors = std::mem::take(&mut *self.cursors.lock());
        for (id, cursor) in cursors {
            kill_cursor(upstream, &cursor.way, id, &cursor.namespace).await;
        }
    }
}

/// Every tenant that has a client.
#[derive(Debug, Default)]
pub struct Registry {
    tenancies: DashMap<OrgId, Arc<Tenancy>>,
    /// Of tenants without a client, too.
    pub thresholds: Thresholds,
    /// Collections that are there.
    pub known: Arc<Known>,
}

/// Collections that are known to this process to be there, by their physical `database.collection`. One that an operator
/// drops is so until the next start.
#[derive(Debug, Default)]
pub struct Known(Mutex<HashMap<String, Indexed>>);

/// Whether the platform's index was asked for, which a shared collection needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Indexed {
    Yes,
    No,
}

impl Known {
    /// Whether it is there; of a shared one, whether its index was asked for as well.
    pub fn has(&self, namespace: &str, isolation: Isolation) -> bool {
        match self.0.lock().get(namespace) {
            Some(Indexed::Yes) => true,
            Some(Indexed::No) => isolation == Isolation::Database,
            None => false,
        }
    }

    /// Notes one that is there.
    pub fn note(&self, namespace: &str) {
        self.put(namespace, Indexed::No);
    }

    /// Notes that the index of one is asked for; false when it was before.
    pub fn index(&self, namespace: &str) -> bool {
        self.put(namespace, Indexed::Yes) != Some(Indexed::Yes)
    }

    fn put(&self, namespace: &str, indexed: Indexed) -> Option<Indexed> {
        let mut noted = self.0.lock();
        if noted.len() >= KNOWN_MAX && !noted.contains_key(namespace) {
            noted.clear();
        }
        noted.insert(namespace.to_owned(), indexed)
    }

    /// Looks again the next time.
    pub fn forget(&self, namespace: &str) {
        self.0.lock().remove(namespace);
    }

    /// Looks again the next time at all whose names begin so.
    pub fn forget_all(&self, prefix: &str) {
        self.0.lock().retain(|name, _| !name.starts_with(prefix));
    }
}

impl Registry {
    /// A client of a tenant came.
    ///
    /// # Errors
    /// `None`: the cipher can't be made.
    pub fn enter(&self, upstream: &Upstream, slot: &Arc<Slot>) -> Option<Arc<Tenancy>> {
        let entry = self.tenancies.entry(slot.org().clone());
        let tenancy = match entry {
            // A slot that was let go and made anew has limits and permits of its own.
            dashmap::Entry::Occupied(at) if Arc::ptr_eq(&at.get().slot, slot) => Arc::clone(at.get()),
            dashmap::Entry::Occupied(mut at) => {
                let tenancy = Arc::new(Tenancy::new(upstream, slot, &self.thresholds)?);
                at.insert(Arc::clone(&tenancy));
                tenancy
            }
            dashmap::Entry::Vacant(at) => {
                let tenancy = Arc::new(Tenancy::new(upstream, slot, &self.thresholds)?);
                at.insert(Arc::clone(&tenancy));
                tenancy
            }
        };
        tenancy.clients.fetch_add(1, Ordering::AcqRel);
        Some(tenancy)
    }

    /// A client of a tenant went; ends the tenant's cursors with the last one.
    pub async fn leave(&self, upstream: &Upstream, tenancy: &Arc<Tenancy>) {
        if tenancy.clients.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        // Under the entry's lock: a client that comes now either was counted before or makes a new one.
        self.tenancies.remove_if(tenancy.slot.org(), |_, present| {
            Arc::ptr_eq(present, tenancy) && present.clients.load(Ordering::Acquire) == 0
        });
        if tenancy.clients.load(Ordering::Acquire) == 0 {
            tenancy.end(upstream).await;
        }
    }

    /// Ends what tenants left unused.
    pub async fn sweep(&self, upstream: &Upstream) {
        let all: Vec<Arc<Tenancy>> = self.tenancies.iter().map(|entry| Arc::clone(entry.value())).collect();
        for tenancy in all {
            tenancy.sweep(upstream).await;
        }
    }
}

/// Ends a transaction at the server; its turn is held until that is done.
pub async fn abort(upstream: &Upstream, session: &SessionId, open: Open) {
    let mut request = Vec::new();
    let body = bson::open(&mut request);
    bson::put_i32(&mut request, "abortTransaction", 1);
    let lsid = bson::open_document(&mut request, "lsid");
    bson::put_binary(&mut request, "id", 4, session);
    bson::close(&mut request, lsid);
    bson::put_i64(&mut request, "txnNumber", open.number);
    bson::put_bool(&mut request, "autocommit", false);
    bson::put_str(&mut request, "$db", "admin");
    bson::close(&mut request, body);
    errand(upstream, &open.way, &request, "aborting a transaction").await;
}

/// Ends a cursor at the server.
pub async fn kill_cursor(upstream: &Upstream, way: &Way, id: i64, namespace: &str) {
    let Some((database, collection)) = namespace.split_once('.') else { return };
    let mut request = Vec::new();
    let body = bson::open(&mut request);
    bson::put_str(&mut request, "killCursors", collection);
    let ids = bson::open_array(&mut request, "cursors");
    bson::put_i64(&mut request, "0", id);
    bson::close(&mut request, ids);
    bson::put_str(&mut request, "$db", database);
    bson::close(&mut request, body);
    errand(upstream, way, &request, "closing a cursor").await;
}

/// Something that has to be done at the server for a client that does not wait for it. The server ends it by itself
/// in time where this fails.
async fn errand(upstream: &Upstream, way: &Way, request: &[u8], what: &'static str) {
    /// Longest time for one.
    const PATIENCE: Duration = Duration::from_secs(10);
    let run = async {
        let mut lease = way.lease(upstream, None).await?;
        let reply = lease.connection.command(request).await;
        if matches!(reply, Ok(_) | Err(Error::Refused { .. })) {
            lease.release();
        }
        reply.map(drop)
    };
    match tokio::time::timeout(PATIENCE, run).await {
        Ok(Ok(()) | Err(Error::Refused { .. })) => {}
        Ok(Err(error)) => tracing::debug!(%error, "{what} failed"),
        Err(_) => tracing::debug!("{what} took too long"),
    }
}
