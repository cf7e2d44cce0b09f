//! One tenant on the server: its ACL user, its logical databases, and their connections.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use hashbrown::HashMap;
use parking_lot::Mutex;

use super::{
    DATABASES, Database, Upstream, Version,
    dial::{self, CONNECT_TIMEOUT, DialError},
    held::Pool,
    ledger::Ledger,
    link::{Home, Link, Role},
    nodes,
    outbox::Outbox,
};
use crate::{
    net::Stream,
    tenant::{OrgId, namespace::RedisNamespace},
    wire::resp::put_request,
};

/// Databases given back by deleted tenants, in the platform's own database.
pub const FREE: &str = "dynabase:databases:free";

/// The highest database given out so far.
const NEXT: &str = "dynabase:databases:next";

/// How long a failed connection attempt is remembered, doubled with every further one.
const BACKOFF_MIN_MS: u64 = 50;

/// The longest such pause.
const BACKOFF_MAX_MS: u64 = 2_000;

/// How long it is not said again that a server runs a tenant's scripts, in milliseconds.
const GUARD_PAUSE_MS: u64 = 1_000;

/// Gives the physical database of a tenant's logical one, taking a free one on first use: never one that holds keys.
/// Physical database 0 is the platform's own.
const ALLOT: &str = r"local i = redis.call('HGET', KEYS[1], ARGV[1])
if i then return tonumber(i) end
i = redis.call('LPOP', KEYS[2])
if not i then
  while true do
    i = redis.call('INCR', KEYS[3])
    if i >= tonumber(ARGV[2]) then redis.call('DECR', KEYS[3]) return -1 end
    redis.call('SELECT', i)
    local keys = redis.call('DBSIZE')
    redis.call('SELECT', 0)
    if keys == 0 then break end
  end
end
redis.call('HSET', KEYS[1], ARGV[1], i)
return tonumber(i)";

/// See the module.
#[derive(Debug)]
pub struct Place {
    me: Weak<Place>,
    pub(super) upstream: Arc<Upstream>,
    /// Its slot, where the server is a cluster.
    pub(super) slot: u16,
    /// Its databases are physical database 0, which others use too. Known once `open` has run.
    shared: AtomicBool,
    /// Servers that have its ACL user as it should be.
    pub(super) users: Mutex<Vec<Arc<str>>>,
    pub(super) org: OrgId,
    /// The generation of its credentials.
    generation: AtomicU32,
    /// Its ACL user and prefix.
    pub space: RedisNamespace,
    databases: Mutex<HashMap<u32, Arc<Database>>>,
    opening: tokio::sync::Mutex<bool>,
    /// Bytes in memory as last measured.
    memory: AtomicU64,
    /// When the server was last said to run a script, in coarse milliseconds.
    guarded_ms: AtomicU64,
    /// What of large requests and replies is held for the tenant.
    pub held: Arc<Pool>,
    /// Held while the tenant's libraries are asked about or changed; when the next may begin.
    pub(super) libraries_turn: tokio::sync::Mutex<tokio::time::Instant>,
    /// Held while the keys are counted by a walk.
    pub counting: tokio::sync::Mutex<()>,
    /// When the last measurement began, in coarse milliseconds; held while measuring.
    pub measuring: tokio::sync::Mutex<u64>,
}

impl Place {
    pub(super) fn new(upstream: Arc<Upstream>, org: &OrgId, generation: u32) -> Arc<Self> {
        let space = upstream.space(org);
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            slot: nodes::slot(&space.channel_prefix()),
            shared: AtomicBool::new(false),
            users: Mutex::default(),
            upstream,
            org: org.clone(),
            generation: AtomicU32::new(generation),
            space,
            databases: Mutex::default(),
            opening: tokio::sync::Mutex::new(false),
            memory: AtomicU64::new(0),
            guarded_ms: AtomicU64::new(0),
            held: Arc::default(),
            libraries_turn: tokio::sync::Mutex::new(tokio::time::Instant::now()),
            counting: tokio::sync::Mutex::new(()),
            measuring: tokio::sync::Mutex::new(0),
        })
    }

    /// The generation of the tenant's credentials, as far as is known here.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Takes a later generation over: sessions of before share what comes after.
    pub(super) fn follow(&self, generation: u32) {
        self.generation.fetch_max(generation, Ordering::AcqRel);
    }

    /// Whether the tenant's keys are in a database that others use too.
    pub fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// The tenant's slot, where the server is a cluster.
    pub fn slot(&self) -> Option<u16> {
        self.upstream.nodes.is_cluster().then_some(self.slot)
    }

    pub(super) fn walking(&self) -> &tokio::sync::Mutex<tokio::time::Instant> {
        &self.upstream.walking
    }

    /// The node `here` said that the slot is elsewhere.
    pub(super) fn doubt(&self, here: &Arc<str>) {
        self.upstream.nodes.doubt(here);
    }

    /// The server at `address` failed, or is no master any more.
    pub(super) fn failed(&self, address: &str) {
        self.upstream.nodes.failed(address);
    }

    /// Tells when other servers serve, where they can change.
    pub(super) fn watch(&self) -> Option<tokio::sync::watch::Receiver<Arc<nodes::View>>> {
        let nodes = &self.upstream.nodes;
        nodes.may_change().then(|| nodes.watch())
    }

    /// One of the tenant's logical databases if it is open.
    pub fn opened(&self, number: u32) -> Option<Arc<Database>> {
        self.databases.lock().get(&number).cloned()
    }

    /// All logical databases that the tenant has ever used, as far as they are open here.
    pub fn all(&self) -> Vec<Arc<Database>> {
        self.databases.lock().values().cloned().collect()
    }

    /// Keys that the tenant's other logical databases can hold at most now.
    pub fn elsewhere(&self, number: u32) -> u64 {
        let databases = self.databases.lock();
        databases.values().filter(|other| other.number != number).map(|other| other.ledger.bound()).sum()
    }

    /// Bytes in memory as last measured, with all that was written since or is being written.
    pub fn memory(&self) -> u64 {
        let of = |ledger: &Ledger| ledger.written.load(Ordering::Relaxed) + ledger.flowing.load(Ordering::Relaxed);
        let written: u64 = self.databases.lock().values().map(|database| of(&database.ledger)).sum();
        self.memory.load(Ordering::Relaxed).saturating_add(written)
    }

    /// Opens a logical database. The first time this also brings the tenant's ACL user up to date and opens every
    /// database that the tenant has used before, since its limits are for all of them together.
    ///
    /// # Errors
    /// The server can't be reached, refuses the platform, or has no database left.
    ///
    /// # Cancel safety
    /// May be dropped; what was done is done again next time.
    pub async fn open(&self, number: u32) -> Result<Arc<Database>, DialError> {
        if let Some(database) = self.opened(number) {
            return Ok(database);
        }
        let mut ready = self.opening.lock().await;
        if !*ready {
            let server = self.upstream.server().await?;
            let mut ask = Vec::new();
            put_request(&mut ask, &[b"HGETALL", self.space.registry().as_bytes()]);
            let answer = self.ask(&ask, 1).await?;
            dial::refused(&answer[0])?;
            let known = dial::strings(&answer[0]);
            let known: Vec<(u32, u32)> =
                known.chunks_exact(2).filter_map(|pair| Some((pair[0].parse().ok()?, pair[1].parse().ok()?))).collect();
            // Who began in the common database stays there, whatever the server has become since.
            let shared =
                server.databases <= 1 || self.upstream.nodes.is_cluster() || known.iter().any(|(_, index)| *index == 0);
            self.shared.store(shared, Ordering::Relaxed);
            let address = self.upstream.nodes.address(self.slot).await?;
            self.set_user(&address).await?;
            for (known, _) in known.into_iter().filter(|(number, _)| *number < DATABASES) {
                self.allot(known).await?;
            }
            *ready = true;
        }
        match self.opened(number) {
            Some(database) => Ok(database),
            None => self.allot(number).await,
        }
    }

    /// Takes or finds the physical database and counts its keys.
    async fn allot(&self, number: u32) -> Result<Arc<Database>, DialError> {
        let databases = self.upstream.server().await?.databases.to_string();
        let registry = self.space.registry();
        let mut ask = Vec::new();
        let name = number.to_string();
        if self.is_shared() {
            put_request(&mut ask, &[b"HSET", registry.as_bytes(), name.as_bytes(), b"0"]);
            dial::refused(&self.ask(&ask, 1).await?[0])?;
            return Ok(self.opened_as(number, 0, Ledger::unknown()));
        }
        let words = ["EVAL", ALLOT, "3", &registry, FREE, NEXT, &name, &databases];
        put_request(&mut ask, &words.map(str::as_bytes));
        let answer = self.ask(&ask, 1).await?;
        dial::refused(&answer[0])?;
        let index = match dial::integer(&answer[0]).map(u32::try_from) {
            Some(Ok(index)) => index,
            _ => {
                return Err(DialError::Refused(format!(
                    "the server has no free logical database ({databases} in all): raise `databases` in its configuration"
                )));
            }
        };
        let mut ask = Vec::new();
        put_request(&mut ask, &[b"SELECT", index.to_string().as_bytes()]);
        put_request(&mut ask, &[b"DBSIZE"]);
        put_request(&mut ask, &[b"SELECT", b"0"]);
        let answers = self.ask(&ask, 3).await?;
        dial::refused(&answers[0])?;
        let keys = dial::integer(&answers[1]).and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        Ok(self.opened_as(number, index, Ledger::new(keys)))
    }

    fn opened_as(&self, number: u32, index: u32, ledger: Ledger) -> Arc<Database> {
        let database = Arc::new(Database {
            number,
            index,
            alone: !self.is_shared(),
            prefix: self.space.prefix(number).into(),
            ledger: Arc::new(ledger),
            channels: self.space.channel_prefix().into(),
            user: self.space.user.clone(),
            scripts: Mutex::default(),
            script_bytes: Arc::clone(&self.upstream.script_bytes),
            shared: Default::default(),
            idle: Mutex::default(),
        });
        self.databases.lock().insert(number, Arc::clone(&database));
        database
    }

    /// The connection that all clients of `database` share, made if there is none.
    ///
    /// # Errors
    /// There is none, and none can be made now.
    ///
    /// # Cancel safety
    /// May be dropped.
    pub async fn shared(&self, database: &Database, version: Version) -> Result<Arc<Link>, DialError> {
        let slot = &database.shared[version as usize - 2];
        if let Some(link) = slot.open() {
            return Ok(link);
        }
        let mut failed = slot.dialing.lock().await;
        if let Some(link) = slot.open() {
            return Ok(link);
        }
        if let Some((until, _)) = *failed
            && tokio::time::Instant::now() < until
        {
            return Err(DialError::Slow);
        }
        match self.log_in(database, version, &[]).await {
            Ok((stream, address, _)) => {
                *failed = None;
                let link = self.spawn(Role::Shared, database, stream, address, version);
                *slot.link.lock() = Some(Arc::clone(&link));
                Ok(link)
            }
            Err(error) => {
                let pause = failed.map_or(BACKOFF_MIN_MS, |(_, pause)| (pause * 2).min(BACKOFF_MAX_MS));
                let until = tokio::time::Instant::now() + std::time::Duration::from_millis(pause);
                *failed = Some((until, pause));
                tracing::warn!(%error, "no connection to Redis");
                Err(error)
            }
        }
    }

    /// A connection for one client, in the tenant's database.
    ///
    /// # Errors
    /// None can be made now.
    ///
    /// # Cancel safety
    /// May be dropped.
    pub async fn dedicated(
        &self,
        database: &Database,
        version: Version,
        client: &Arc<Outbox>,
    ) -> Result<Arc<Link>, DialError> {
        loop {
            let kept = {
                let mut idle = database.idle.lock();
                let at = idle.iter().position(|(v, _)| *v == version);
                at.map(|at| idle.swap_remove(at).1)
            };
            match kept {
                Some(link) if link.is_closed() => {}
                Some(link) => {
                    link.hand_to(Arc::clone(client));
                    return Ok(link);
                }
                None => break,
            }
        }
        let (stream, address, _) = self.log_in(database, version, &[]).await?;
        Ok(self.spawn(Role::Dedicated(Arc::clone(client)), database, stream, address, version))
    }

    /// A connection for one client on which tracking is on: `request`, which the caller has put inside the prefix, is
    /// run by the platform's user before the connection becomes the tenant's. Without a link it was refused, as the
    /// bytes say.
    ///
    /// # Errors
    /// None can be made now.
    ///
    /// # Cancel safety
    /// May be dropped.
    pub async fn tracking(
        &self,
        database: &Database,
        version: Version,
        client: &Arc<Outbox>,
        request: &[u8],
    ) -> Result<(Option<Arc<Link>>, Vec<u8>), DialError> {
        let (stream, address, answer) = self.log_in(database, version, request).await?;
        if answer.starts_with(b"-") {
            return Ok((None, answer));
        }
        let link = self.spawn(Role::Dedicated(Arc::clone(client)), database, stream, address, version);
        Ok((Some(link), answer))
    }

    fn spawn(&self, role: Role, database: &Database, stream: Stream, address: Arc<str>, version: Version) -> Arc<Link> {
        let tracked = self.slot().is_some() && matches!(role, Role::Shared);
        let link = Link::new(role, &database.prefix, Arc::clone(&database.ledger));
        if tracked {
            link.keep_groups();
        }
        tokio::spawn(Arc::clone(&link).run(stream, self.home(address, version)));
        link
    }

    fn home(&self, address: Arc<str>, version: Version) -> Home {
        Home { place: self.me.clone(), slot: self.slot, address, version }
    }

    /// A connection that only brings messages: the platform's own login, since an ACL can't confine patterns. The
    /// caller sends nothing but subscriptions inside the prefix.
    ///
    /// # Errors
    /// None can be made now.
    ///
    /// # Cancel safety
    /// May be dropped.
    pub async fn subscriber(&self, version: Version, client: &Arc<Outbox>) -> Result<Arc<Link>, DialError> {
        let attempt = async {
            let address = self.upstream.nodes.address(self.slot).await?;
            let mut stream = self.upstream.nodes.target().platform(&address).await.inspect_err(|_| {
                self.failed(&address);
            })?;
            let mut ask = Vec::new();
            put_request(&mut ask, &[b"HELLO", (version as u8).to_string().as_bytes()]);
            put_request(&mut ask, &[b"CLIENT", b"ID"]);
            let answers = dial::exchange(&mut stream, &ask, 2).await?;
            answers.iter().try_for_each(|answer| dial::refused(answer))?;
            Ok((stream, address, dial::integer(&answers[1]).unwrap_or(0)))
        };
        let (stream, address, id) =
            tokio::time::timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or(Err(DialError::Slow))?;
        let prefix = self.space.channel_prefix();
        let link = Link::with_id(Role::Subscriber(Arc::clone(client)), &prefix, Arc::new(Ledger::new(0)), id);
        tokio::spawn(Arc::clone(&link).run(stream, self.home(address, version)));
        Ok(link)
    }

    /// Counts the keys of every logical database.
    ///
    /// # Errors
    /// The server can't be asked; the old counts stay.
    pub async fn count(&self) -> Result<(), DialError> {
        let databases = self.all();
        let mut ask = Vec::new();
        for database in &databases {
            put_request(&mut ask, &[b"SELECT", database.index.to_string().as_bytes()]);
            put_request(&mut ask, &[b"DBSIZE"]);
        }
        put_request(&mut ask, &[b"SELECT", b"0"]);
        let marks: Vec<u64> = databases.iter().map(|database| database.ledger.mark()).collect();
        let answers = self.ask(&ask, databases.len() * 2 + 1).await?;
        for (i, (database, mark)) in databases.iter().zip(marks).enumerate() {
            if let Some(keys) = answers.get(i * 2 + 1).and_then(|answer| dial::integer(answer)) {
                database.ledger.counted(u64::try_from(keys).unwrap_or(0), mark);
            }
        }
        Ok(())
    }

    /// Runs requests as the platform's user.
    ///
    /// # Errors
    /// The connection failed; they may have run.
    pub async fn ask(&self, requests: &[u8], replies: usize) -> Result<Vec<Vec<u8>>, DialError> {
        self.upstream.platform_of(self.slot, requests, replies).await
    }

    /// Runs one command for the tenant as the platform's user, inside `database`. The caller has put every name
    /// inside the tenant's prefix.
    ///
    /// # Errors
    /// The connection failed; the command may have run.
    ///
    /// # Cancel safety
    /// Dropping it may leave the command run.
    pub async fn as_platform(&self, index: u32, request: &[u8]) -> Result<Vec<u8>, DialError> {
        let mut ask = Vec::with_capacity(request.len() + 64);
        put_request(&mut ask, &[b"SELECT", index.to_string().as_bytes()]);
        ask.extend_from_slice(request);
        put_request(&mut ask, &[b"SELECT", b"0"]);
        let mut answers = self.ask(&ask, 3).await?;
        dial::refused(&answers[0])?;
        Ok(answers.swap_remove(1))
    }

    /// One of the tenant's scripts is about to be sent: its server is looked after meanwhile.
    pub fn runs_script(&self, now_ms: u64) {
        let last = self.guarded_ms.load(Ordering::Relaxed);
        if last == 0 || now_ms.saturating_sub(last) > GUARD_PAUSE_MS {
            self.guarded_ms.store(now_ms.max(1), Ordering::Relaxed);
            self.upstream.guard(self.slot);
        }
    }

    /// Keeps a new sample of the tenant's memory.
    pub fn set_memory(&self, bytes: u64) {
        self.memory.store(bytes, Ordering::Relaxed);
    }
}
