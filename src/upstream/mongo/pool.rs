//! Idle connections of one login, the most recently used first. How many are in use is the tenant's limit, not the
//! pool's: who takes a [`Lease`] holds a place of its tenant already.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    Login, Target,
    connection::{Connection, Error},
};
use crate::upstream::scram::Keys;

/// How long an idle connection is kept.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Idle connections that are kept at once.
const IDLE_COUNT_MAX: usize = 64;

/// Connections of one login.
#[derive(Debug)]
pub struct Pool {
    target: Arc<Target>,
    login: Option<Login>,
    keys: Mutex<Option<Keys>>,
    idle: Mutex<Vec<Idle>>,
    /// Connections of an earlier age are closed instead of used again.
    age: AtomicU64,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    age: u64,
    since: Instant,
}

impl Pool {
    /// A pool without connections.
    pub fn new(target: Arc<Target>, login: Option<Login>) -> Arc<Self> {
        Arc::new(Self { target, login, keys: Mutex::default(), idle: Mutex::default(), age: AtomicU64::new(0) })
    }

    /// Gives an idle connection, or makes one.
    ///
    /// # Errors
    /// See [`Connection::open`].
    ///
    /// # Cancel safety
    /// Dropping it leaves nothing behind.
    pub async fn lease(self: &Arc<Self>) -> Result<Lease, Error> {
        let age = self.age.load(Ordering::Acquire);
        loop {
            let Some(mut idle) = self.idle.lock().pop() else { break };
            // The server may have closed it meanwhile; it says so at once.
            if idle.age == age && idle.connection.is_alive() {
                return Ok(Lease { connection: idle.connection, age, pool: Arc::clone(self) });
            }
        }
        let connection = Connection::open(&self.target, self.login.as_ref(), &self.keys).await?;
        Ok(Lease { connection, age, pool: Arc::clone(self) })
    }

    /// Lets no present connection be used again: what they know of the login's rights is old, or they lead to a server
    /// that is no longer the primary.
    pub fn renew(&self) {
        self.age.fetch_add(1, Ordering::AcqRel);
        self.idle.lock().clear();
    }

    /// Closes what was idle for long.
    pub fn tidy(&self) {
        let mut idle = self.idle.lock();
        // The oldest stand first.
        let stale = idle.partition_point(|idle| idle.since.elapsed() > IDLE_MAX);
        idle.drain(..stale);
    }
}

/// A connection in use. [`Lease::release`] gives it back; dropping it closes it.
#[derive(Debug)]
pub struct Lease {
    /// The connection.
    pub connection: Connection,
    age: u64,
    pool: Arc<Pool>,
}

impl Lease {
    /// Gives the connection back. No reply may be outstanding on it.
    pub fn release(self) {
        let Lease { connection, age, pool } = self;
        let mut idle = pool.idle.lock();
        if age == pool.age.load(Ordering::Acquire) && idle.len() < IDLE_COUNT_MAX {
            idle.push(Idle { connection, age, since: Instant::now() });
        }
    }
}
