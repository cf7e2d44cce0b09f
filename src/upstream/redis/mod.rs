//! Redis servers: one ACL user, one prefix and (per logical database in use) one physical database for each tenant.
//!
//! [`Upstream::place`] gives a tenant's [`Place`]; [`Place::open`] one of its logical databases; `Database::shared`
//! the connection that all its clients share, `Database::dedicated` and `Database::subscriber` those of one
//! client. Every connection that carries a tenant's commands is logged in as the tenant's ACL user and stands in
//! the tenant's database, which that user can't leave.

mod again;
mod config;
mod database;
pub mod dial;
mod guard;
pub mod held;
pub mod ledger;
pub mod library;
pub mod link;
mod login;
pub mod message;
pub mod nodes;
pub mod outbox;
mod place;
pub mod reply;
mod rotate;
mod standing;
mod walk;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak, atomic::AtomicU64},
    time::Duration,
};

use dashmap::DashMap;
use moka::sync::Cache;
use nodes::Nodes;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

pub use config::Config;
pub use database::{Database, Script};
pub use dial::{DialError, Target};
pub use nodes::Via;
pub use outbox::Outbox;
pub use place::Place;
pub use rotate::Valid;
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

/// How often a request of the platform is sent elsewhere.
const HOPS_MAX: usize = 5;

/// Pause while a slot is being moved.
const MOVING_PAUSE: Duration = Duration::from_millis(50);

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
    /// `sanitize-dump-payload`: whether it looks into what a client gives to `RESTORE`. Where it does not, or does not
    /// say so, a made-up payload can end it for everybody.
    pub sanitizes: bool,
}

/// The way to one Redis: a server, the master that Sentinel names, or a cluster. One per process.
#[derive(Debug)]
pub struct Upstream {
    nodes: Arc<Nodes>,
    names: Names,
    /// Commands that tenants' ACL users may run, where the server has them.
    allowed: Vec<&'static str>,
    places: DashMap<OrgId, Weak<Place>>,
    kept: Cache<OrgId, Arc<Place>>,
    idle: Mutex<Vec<(Arc<str>, Stream)>>,
    server: OnceCell<Server>,
    /// Servers that are looked after while scripts run there, and when the last one was sent.
    guarded: Mutex<HashMap<Arc<str>, tokio::time::Instant>>,
    /// Bytes of different scripts of tenants so far.
    script_bytes: Arc<AtomicU64>,
    /// Held by the walk over a database under way; when the next may begin.
    walking: tokio::sync::Mutex<tokio::time::Instant>,
}

impl Upstream {
    /// The way to `target`. `allowed` are the commands that a tenant's ACL user gets.
    pub fn new(target: Target, names: Names, allowed: Vec<&'static str>) -> Arc<Self> {
        Arc::new(Self {
            nodes: Nodes::new(target),
            names,
            allowed,
            places: DashMap::new(),
            kept: Cache::builder().max_capacity(KEEP_MAX).time_to_idle(KEEP).build(),
            idle: Mutex::default(),
            server: OnceCell::new(),
            guarded: Mutex::default(),
            script_bytes: Arc::default(),
            walking: tokio::sync::Mutex::new(tokio::time::Instant::now()),
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
                resp::put_request(&mut ask, &[b"CONFIG", b"GET", b"sanitize-dump-payload"]);
                let answers = self.platform(&ask, 5).await?;
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
                let sanitizes =
                    dial::strings(&answers[4]).get(1).is_some_and(|value| value == "yes" || value == "clients");
                Ok(Server { version, commands, databases, notifications, sanitizes })
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

    /// Whether the server is known to look into what `RESTORE` is given.
    pub fn sanitizes(&self) -> bool {
        self.server.get().is_some_and(|server| server.sanitizes)
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
        self.platform_of(0, requests, replies).await
    }

    /// The same on the server of a slot. A cluster's node that is not it any more is found out by its answer, and the
    /// requests, none of which it has run, go where the cluster says then.
    async fn platform_of(&self, slot: u16, requests: &[u8], replies: usize) -> Result<Vec<Vec<u8>>, DialError> {
        for _ in 0..HOPS_MAX {
            let address = self.nodes.address(slot).await?;
            let answers = self.platform_at(&address, requests, replies).await?;
            match answers.iter().find_map(|answer| again::Elsewhere::parse(answer, &address, slot)) {
                None => return Ok(answers),
                Some(to) if to.once => tokio::time::sleep(MOVING_PAUSE).await,
                Some(_) => self.nodes.doubt(&address),
            }
        }
        Err(DialError::Refused("the slot is being moved".to_owned()))
    }

    /// The same on one server.
    async fn platform_at(
        &self,
        address: &Arc<str>,
        requests: &[u8],
        replies: usize,
    ) -> Result<Vec<Vec<u8>>, DialError> {
        let run = async {
            let kept = {
                let mut idle = self.idle.lock();
                let at = idle.iter().rposition(|(known, _)| known == address);
                at.map(|at| idle.swap_remove(at).1)
            };
            // An idle connection may have been closed by the server; it says so at once.
            let kept = kept.and_then(|mut stream| is_alive(&mut stream).then_some(stream));
            let mut stream = match kept {
                Some(stream) => stream,
                None => self.nodes.target().platform(address).await?,
            };
            let answers = dial::exchange(&mut stream, requests, replies).await?;
            if self.nodes.may_change() && answers.iter().any(|answer| answer.starts_with(b"-READONLY")) {
                return Err(DialError::Refused("READONLY it is no master any more".to_owned()));
            }
            let mut idle = self.idle.lock();
            if idle.len() >= PLATFORM_IDLE_MAX {
                idle.remove(0);
            }
            idle.push((Arc::clone(address), stream));
            Ok(answers)
        };
        let result = tokio::time::timeout(PLATFORM_TIMEOUT, run).await.unwrap_or(Err(DialError::Slow));
        if result.is_err() {
            self.nodes.failed(address);
        }
        result
    }

    /// What a tenant is called here.
    fn space(&self, org: &OrgId) -> crate::tenant::namespace::RedisNamespace {
        let space = self.names.redis(org);
        if self.nodes.is_cluster() { space.tagged() } else { space }
    }

    /// The tenant's place; one at a time per tenant, so that its keys are counted once.
    pub fn place(self: &Arc<Self>, org: &OrgId, generation: u32) -> Arc<Place> {
        let mut entry = self.places.entry(org.clone()).or_default();
        let place = match entry.upgrade() {
            Some(place) => {
                place.follow(generation);
                place
            }
            None => {
                let place = Place::new(Arc::clone(self), org, generation);
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
    pub async fn remove(self: &Arc<Self>, org: &OrgId, purge: bool) -> Result<(), DialError> {
        let place = Place::new(Arc::clone(self), org, 0);
        let space = &place.space;
        let mut requests = Vec::new();
        resp::put_request(&mut requests, &[b"ACL", b"DELUSER", space.user.as_bytes()]);
        resp::put_request(&mut requests, &[b"HVALS", space.registry().as_bytes()]);
        let answers = place.ask(&requests, 2).await?;
        answers.iter().try_for_each(|answer| dial::refused(answer))?;
        self.kept.invalidate(org);
        if !purge {
            return Ok(());
        }
        place.flush_libraries().await?;
        let mut indexes = dial::strings(&answers[1]);
        // What is in the database that several tenants share goes key by key.
        if indexes.iter().any(|index| index == "0") {
            place.purge().await?;
            indexes.retain(|index| index != "0");
        }
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
        let answers = place.ask(&requests, indexes.len() * 3 + 2).await?;
        answers.iter().try_for_each(|answer| dial::refused(answer))?;
        // The next tenant of this name begins with a fence of its own.
        self.forget_standing(org).await
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
