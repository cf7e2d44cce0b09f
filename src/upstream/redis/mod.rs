//! Redis servers: one ACL user, one prefix and (per logical database in use) one physical database for each tenant.
//!
//! [`Upstream::place`] gives a tenant's [`Place`]; [`Place::open`] one of its logical databases; `Database::shared`
//! the connection that all its clients share, `Database::dedicated` and `Database::subscriber` those of one
//! client. Every connection that carries a tenant's commands is logged in as the tenant's ACL user and stands in
//! the tenant's database, which that user can't leave.

mod config;
pub mod dial;
pub mod ledger;
pub mod link;
pub mod message;
pub mod outbox;
mod place;
pub mod reply;
mod standing;

use std::{
    collections::HashSet,
    sync::{Arc, Weak},
    time::Duration,
};

use dashmap::DashMap;
use moka::sync::Cache;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

pub use config::Config;
pub use dial::{DialError, Target};
pub use outbox::Outbox;
pub use place::{Database, Place, Script};
pub use standing::{Standing, Usage};

use crate::{
    net::Stream,
    tenant::{Names, OrgId},
    wire::resp,
};

/// Logical databases of one tenant, as many as Redis has by default.
pub const DATABASES: u32 = 16;

/// How long a tenant without clients keeps its connections.
const KEEP: Duration = Duration::from_secs(60);

/// Tenants without clients that are kept at once.
const KEEP_MAX: u64 = 1000;

/// Idle connections of the platform's own user.
const PLATFORM_IDLE_MAX: usize = 4;

/// Longest time for one command that is run for a tenant by the platform's user.
const PLATFORM_TIMEOUT: Duration = Duration::from_secs(60);

/// RESP2 or RESP3. A reply can't be translated from one into the other, so they have connections of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// RESP2.
    Two = 2,
    /// RESP3.
    Three = 3,
}

/// What the server said about itself.
#[derive(Debug)]
pub struct Server {
    /// `redis_version`.
    pub version: String,
    /// Its commands and subcommands (`xgroup|create`), lower case.
    pub commands: HashSet<String>,
    /// Its number of logical databases.
    pub databases: u32,
    /// `notify-keyspace-events`.
    pub notifications: String,
}

/// The way to one Redis server. One per process.
#[derive(Debug)]
pub struct Upstream {
    target: Target,
    names: Names,
    /// Commands that tenants' ACL users may run, where the server has them.
    allowed: Vec<&'static str>,
    places: DashMap<OrgId, Weak<Place>>,
    kept: Cache<OrgId, Arc<Place>>,
    idle: Mutex<Vec<Stream>>,
    server: OnceCell<Server>,
}

impl Upstream {
    /// The way to `target`. `allowed` are the commands that a tenant's ACL user gets.
    pub fn new(target: Target, names: Names, allowed: Vec<&'static str>) -> Arc<Self> {
        Arc::new(Self {
            target,
            names,
            allowed,
            places: DashMap::new(),
            kept: Cache::builder().max_capacity(KEEP_MAX).time_to_idle(KEEP).build(),
            idle: Mutex::default(),
            server: OnceCell::new(),
        })
    }

    /// What the server says about itself; asked once.
    ///
    /// # Errors
    /// It can't be reached, or refuses the platform.
    pub async fn server(&self) -> Result<&Server, DialError> {
        self.server
            .get_or_try_init(|| async {
                let mut ask = Vec::new();
                resp::put_request(&mut ask, &[b"INFO", b"server"]);
                resp::put_request(&mut ask, &[b"COMMAND"]);
                resp::put_request(&mut ask, &[b"CONFIG", b"GET", b"databases"]);
                resp::put_request(&mut ask, &[b"CONFIG", b"GET", b"notify-keyspace-events"]);
                let answers = self.platform(&ask, 4).await?;
                dial::refused(&answers[1])?;
                let info = String::from_utf8_lossy(&answers[0]).into_owned();
                let version = info
                    .lines()
                    .find_map(|line| line.strip_prefix("redis_version:"))
                    .unwrap_or("7.0.0")
                    .trim()
                    .to_owned();
                // Names of commands are the only strings of their reply that ACL rules could mean.
                let commands = dial::strings(&answers[1]).into_iter().map(|name| name.to_lowercase()).collect();
                let databases = dial::strings(&answers[2]).get(1).and_then(|n| n.parse().ok()).unwrap_or(1);
                let notifications = dial::strings(&answers[3]).into_iter().nth(1).unwrap_or_default();
                Ok(Server { version, commands, databases, notifications })
            })
            .await
    }

    /// The server's version if it is known already.
    pub fn version(&self) -> &str {
        self.server.get().map_or("7.0.0", |server| &server.version)
    }

    /// Which keyspace events the server sends, if it is known already.
    pub fn notifications(&self) -> &str {
        self.server.get().map_or("", |server| &server.notifications)
    }

    /// Runs requests as the platform's user and gives that many replies. The connection is in database 0 before and
    /// after: who selects another one selects 0 at the end.
    ///
    /// # Errors
    /// The connection failed; the requests may have run.
    ///
    /// # Cancel safety
    /// Dropping it closes the connection; the requests may have run.
    pub async fn platform(&self, requests: &[u8], replies: usize) -> Result<Vec<Vec<u8>>, DialError> {
        let run = async {
            let kept = self.idle.lock().pop();
            // An idle connection may have been closed by the server; it says so at once.
            let kept = kept.and_then(|mut stream| is_alive(&mut stream).then_some(stream));
            let mut stream = match kept {
                Some(stream) => stream,
                None => self.target.platform().await?,
            };
            let answers = dial::exchange(&mut stream, requests, replies).await?;
            let mut idle = self.idle.lock();
            if idle.len() < PLATFORM_IDLE_MAX {
                idle.push(stream);
            }
            Ok(answers)
        };
        tokio::time::timeout(PLATFORM_TIMEOUT, run).await.unwrap_or(Err(DialError::Slow))
    }

    /// The tenant's place; one at a time per tenant, so that its keys are counted once.
    pub fn place(self: &Arc<Self>, org: &OrgId, generation: u32) -> Arc<Place> {
        let mut entry = self.places.entry(org.clone()).or_default();
        let place = match entry.upgrade() {
            Some(place) if place.generation == generation => place,
            _ => {
                let place = Arc::new(Place::new(Arc::clone(self), org, generation));
                *entry = Arc::downgrade(&place);
                place
            }
        };
        drop(entry);
        self.kept.insert(org.clone(), Arc::clone(&place));
        place
    }

    /// Makes the tenant's ACL user and its first database, or brings them up to date. May be repeated.
    ///
    /// # Errors
    /// The server can't be reached, refuses the platform, or has no database left.
    pub async fn provision(self: &Arc<Self>, org: &OrgId, generation: u32) -> Result<(), DialError> {
        let place = Place::new(Arc::clone(self), org, generation);
        place.open(0).await.map(drop)
    }

    /// Takes the tenant's ACL user away (which ends its connections), and all its keys with `purge`.
    ///
    /// # Errors
    /// The server can't be reached or refuses the platform. May be repeated.
    pub async fn remove(&self, org: &OrgId, purge: bool) -> Result<(), DialError> {
        let space = self.names.redis(org);
        let mut requests = Vec::new();
        resp::put_request(&mut requests, &[b"ACL", b"DELUSER", space.user.as_bytes()]);
        resp::put_request(&mut requests, &[b"HVALS", space.registry().as_bytes()]);
        let answers = self.platform(&requests, 2).await?;
        answers.iter().try_for_each(|answer| dial::refused(answer))?;
        self.kept.invalidate(org);
        if !purge {
            return Ok(());
        }
        let indexes = dial::strings(&answers[1]);
        let mut requests = Vec::new();
        for index in &indexes {
            resp::put_request(&mut requests, &[b"SELECT", index.as_bytes()]);
            resp::put_request(&mut requests, &[b"FLUSHDB", b"ASYNC"]);
        }
        resp::put_request(&mut requests, &[b"SELECT", b"0"]);
        for index in &indexes {
            resp::put_request(&mut requests, &[b"RPUSH", place::FREE.as_bytes(), index.as_bytes()]);
        }
        resp::put_request(&mut requests, &[b"DEL", space.registry().as_bytes()]);
        let answers = self.platform(&requests, indexes.len() * 3 + 2).await?;
        answers.iter().try_for_each(|answer| dial::refused(answer))
    }

    /// Asks the server for a sign of life.
    ///
    /// # Errors
    /// What stands in the way.
    pub async fn ping(&self) -> Result<(), DialError> {
        let answers = self.platform(b"*1\r\n$4\r\nPING\r\n", 1).await?;
        answers.iter().try_for_each(|answer| dial::refused(answer))
    }
}

/// Whether an idle connection is still open: nothing to read, and no end either.
fn is_alive(stream: &mut Stream) -> bool {
    use std::{
        pin::Pin,
        task::{Context, Waker},
    };

    use tokio::io::{AsyncRead, ReadBuf};
    let mut byte = [0];
    let mut buffer = ReadBuf::new(&mut byte);
    Pin::new(stream).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer).is_pending()
}
