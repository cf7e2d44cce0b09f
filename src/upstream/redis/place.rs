//! One tenant on the server: its ACL user, its logical databases, and their connections.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use hashbrown::HashMap;
use parking_lot::Mutex;

use super::{
    DATABASES, Upstream, Version,
    dial::{self, CONNECT_TIMEOUT, DialError},
    ledger::Ledger,
    link::{Link, Role},
    outbox::Outbox,
};
use crate::{
    net::Stream,
    tenant::{OrgId, namespace::RedisNamespace},
    wire::resp::{put_array, put_bulk, put_request},
};

/// Databases given back by deleted tenants, in the platform's own database.
pub const FREE: &str = "dynabase:databases:free";

/// The highest database given out so far.
const NEXT: &str = "dynabase:databases:next";

/// Idle dedicated connections of one database.
const DEDICATED_IDLE_MAX: usize = 8;

/// How long a failed connection attempt is remembered, doubled with every further one.
const BACKOFF_MIN_MS: u64 = 50;

/// The longest such pause.
const BACKOFF_MAX_MS: u64 = 2_000;

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
    upstream: Arc<Upstream>,
    org: OrgId,
    /// The generation of its credentials.
    pub generation: u32,
    /// Its ACL user and prefix.
    pub space: RedisNamespace,
    databases: Mutex<HashMap<u32, Arc<Database>>>,
    opening: tokio::sync::Mutex<bool>,
    /// Bytes in memory as last measured.
    memory: AtomicU64,
    /// When they were measured, in coarse milliseconds; held while measuring.
    pub measuring: tokio::sync::Mutex<u64>,
}

impl Place {
    pub(super) fn new(upstream: Arc<Upstream>, org: &OrgId, generation: u32) -> Self {
        let space = upstream.names.redis(org);
        Self {
            upstream,
            org: org.clone(),
            generation,
            space,
            databases: Mutex::default(),
            opening: tokio::sync::Mutex::new(false),
            memory: AtomicU64::new(0),
            measuring: tokio::sync::Mutex::new(0),
        }
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

    /// Bytes in memory as last measured, with all that was written since.
    pub fn memory(&self) -> u64 {
        let written: u64 =
            self.databases.lock().values().map(|database| database.ledger.written.load(Ordering::Relaxed)).sum();
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
            self.set_user().await?;
            let mut ask = Vec::new();
            put_request(&mut ask, &[b"HKEYS", self.space.registry().as_bytes()]);
            let answer = self.upstream.platform(&ask, 1).await?;
            dial::refused(&answer[0])?;
            for known in dial::strings(&answer[0]).iter().filter_map(|n| n.parse().ok()).filter(|n| *n < DATABASES) {
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
        let words = ["EVAL", ALLOT, "3", &registry, FREE, NEXT, &name, &databases];
        put_request(&mut ask, &words.map(str::as_bytes));
        let answer = self.upstream.platform(&ask, 1).await?;
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
        let answers = self.upstream.platform(&ask, 3).await?;
        dial::refused(&answers[0])?;
        let keys = dial::integer(&answers[1]).and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        let database = Arc::new(Database {
            number,
            index,
            prefix: self.space.prefix(number).into(),
            ledger: Arc::new(Ledger::new(keys)),
            channels: self.space.channel_prefix().into(),
            user: self.space.user.clone(),
            scripts: Mutex::default(),
            shared: Default::default(),
            idle: Mutex::default(),
        });
        self.databases.lock().insert(number, Arc::clone(&database));
        Ok(database)
    }

    /// Makes the ACL user or replaces its rules and password.
    async fn set_user(&self) -> Result<(), DialError> {
        let server = self.upstream.server().await?;
        let password = self.password();
        let mut rules: Vec<String> = ["reset", "on", "resetchannels", "-@all"].map(str::to_owned).into();
        rules.push(format!(">{}", password.expose()));
        rules.extend(self.space.key_patterns());
        rules.push(self.space.channel_pattern());
        let known = self.upstream.allowed.iter().filter(|name| server.commands.contains(**name));
        rules.extend(known.map(|name| format!("+{name}")));
        let mut ask = Vec::new();
        put_array(&mut ask, 3 + rules.len());
        [&b"ACL"[..], b"SETUSER", self.space.user.as_bytes()].iter().for_each(|word| put_bulk(&mut ask, word));
        rules.iter().for_each(|rule| put_bulk(&mut ask, rule.as_bytes()));
        let answer = self.upstream.platform(&ask, 1).await?;
        dial::refused(&answer[0])
    }

    fn password(&self) -> crate::tenant::namespace::Password {
        self.upstream.names.password("redis", &self.org, self.generation)
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
            Ok((stream, _)) => {
                *failed = None;
                let link = self.spawn(Role::Shared, database, stream);
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
        let (stream, _) = self.log_in(database, version, &[]).await?;
        Ok(self.spawn(Role::Dedicated(Arc::clone(client)), database, stream))
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
        let (stream, answer) = self.log_in(database, version, request).await?;
        if answer.starts_with(b"-") {
            return Ok((None, answer));
        }
        Ok((Some(self.spawn(Role::Dedicated(Arc::clone(client)), database, stream)), answer))
    }

    fn spawn(&self, role: Role, database: &Database, stream: Stream) -> Arc<Link> {
        let link = Link::new(role, &database.prefix, Arc::clone(&database.ledger));
        tokio::spawn(Arc::clone(&link).run(stream));
        link
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
            let mut stream = self.upstream.target.platform().await?;
            let mut ask = Vec::new();
            put_request(&mut ask, &[b"HELLO", (version as u8).to_string().as_bytes()]);
            put_request(&mut ask, &[b"CLIENT", b"ID"]);
            let answers = dial::exchange(&mut stream, &ask, 2).await?;
            answers.iter().try_for_each(|answer| dial::refused(answer))?;
            Ok((stream, dial::integer(&answers[1]).unwrap_or(0)))
        };
        let (stream, id) = tokio::time::timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or(Err(DialError::Slow))?;
        let prefix = self.space.channel_prefix();
        let link = Link::with_id(Role::Subscriber(Arc::clone(client)), &prefix, Arc::new(Ledger::new(0)), id);
        tokio::spawn(Arc::clone(&link).run(stream));
        Ok(link)
    }

    /// Connects as the platform, goes into the database, becomes the tenant's user: one round trip. A user that the
    /// server has forgotten (it was restarted without its ACL file) is made again.
    /// `first` is a request that the platform's user runs before, if it is not empty; its answer comes back.
    async fn log_in(
        &self,
        database: &Database,
        version: Version,
        first: &[u8],
    ) -> Result<(Stream, Vec<u8>), DialError> {
        let password = self.password();
        let attempt = || async {
            let mut stream = self.upstream.target.connect().await?;
            let mut hello = Vec::new();
            let mut replies = self.upstream.target.put_login(&mut hello);
            put_request(&mut hello, &[b"SELECT", database.index.to_string().as_bytes()]);
            put_request(&mut hello, &[b"DBSIZE"]);
            hello.extend_from_slice(first);
            let user = self.space.user.as_bytes();
            match version {
                Version::Two => put_request(&mut hello, &[b"AUTH", user, password.expose().as_bytes()]),
                Version::Three => {
                    put_request(&mut hello, &[b"HELLO", b"3", b"AUTH", user, password.expose().as_bytes()]);
                }
            }
            replies += 3;
            let extra = usize::from(!first.is_empty());
            let mark = database.ledger.mark();
            let mut answers = dial::exchange(&mut stream, &hello, replies + extra).await?;
            let answer = if extra > 0 { answers.remove(replies - 1) } else { Vec::new() };
            answers.iter().try_for_each(|answer| dial::refused(answer))?;
            let keys = answers.get(replies - 2).and_then(|answer| dial::integer(answer));
            if let Some(keys) = keys.and_then(|n| u64::try_from(n).ok()) {
                database.ledger.counted(keys, mark);
            }
            Ok((stream, answer))
        };
        let bounded =
            || async { tokio::time::timeout(CONNECT_TIMEOUT, attempt()).await.unwrap_or(Err(DialError::Slow)) };
        match bounded().await {
            Err(DialError::Refused(text)) if text.starts_with("WRONGPASS") => {
                self.set_user().await?;
                bounded().await
            }
            other => other,
        }
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
        let answers = self.upstream.platform(&ask, databases.len() * 2 + 1).await?;
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
        self.upstream.platform(requests, replies).await
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
        let mut answers = self.upstream.platform(&ask, 3).await?;
        dial::refused(&answers[0])?;
        Ok(answers.swap_remove(1))
    }
}

/// One logical database of a tenant.
#[derive(Debug)]
pub struct Database {
    /// As the tenant knows it.
    pub number: u32,
    /// As the server knows it.
    pub index: u32,
    /// What stands before its keys.
    pub prefix: Box<[u8]>,
    /// How many keys it can hold at most now.
    pub ledger: Arc<Ledger>,
    /// What stands before its channels.
    pub channels: Box<[u8]>,
    /// The tenant's ACL user.
    pub user: String,
    /// Scripts of the tenant by the SHA-1 that its clients know them by.
    pub scripts: Mutex<HashMap<[u8; 20], Arc<Script>>>,
    shared: [Slot; 2],
    idle: Mutex<Vec<(Version, Arc<Link>)>>,
}

impl Database {
    /// The shared connection if it is open.
    pub fn shared_open(&self, version: Version) -> Option<Arc<Link>> {
        self.shared[version as usize - 2].open()
    }

    /// Takes a dedicated connection back that holds no state and no outstanding reply.
    pub fn give_back(&self, version: Version, link: Arc<Link>) {
        let mut idle = self.idle.lock();
        if idle.len() < DEDICATED_IDLE_MAX && !link.is_closed() {
            link.hand_to(Arc::default());
            idle.push((version, link));
        } else {
            link.part();
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.shared.iter().filter_map(Slot::open).for_each(|link| link.close());
        self.idle.lock().drain(..).for_each(|(_, link)| link.close());
    }
}

/// A tenant's script as the server knows it.
#[derive(Debug)]
pub struct Script {
    /// Its text.
    pub text: Box<[u8]>,
    /// Its SHA-1 in hexadecimal.
    pub sha: [u8; 40],
}

#[derive(Debug, Default)]
struct Slot {
    link: Mutex<Option<Arc<Link>>>,
    /// Held while dialing; the pause after a failure, and until when.
    dialing: tokio::sync::Mutex<Option<(tokio::time::Instant, u64)>>,
}

impl Slot {
    fn open(&self) -> Option<Arc<Link>> {
        self.link.lock().as_ref().filter(|link| !link.is_closed()).cloned()
    }
}

impl Place {
    /// Keeps a new sample of the tenant's memory.
    pub fn set_memory(&self, bytes: u64) {
        self.memory.store(bytes, Ordering::Relaxed);
    }
}
