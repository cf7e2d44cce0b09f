//! The way to MongoDB: one deployment, in which a tenant of `database` isolation has a server user of its own.
//!
//! [`Upstream::account`] gives what a tenant's requests are sent with; [`Account::lease`] a connection for one
//! request. `filter` isolation and the platform's own errands use the platform's user. The tenant's user is the
//! second wall: it may use the tenant's databases and no other, whatever a rewritten request says. A deployment
//! without users (no login in the URL) has no second wall, which is said once at the start.

pub mod account;
mod config;
pub mod connection;
mod hold;
mod holdings;
mod made;
mod moving;
mod pool;
mod standing;

use std::{
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;

pub use account::Account;
pub use config::{Config, Login, Target};
pub use connection::{Error, Reply};
pub use hold::{Hold, STALE};
pub use holdings::Held;
pub use made::Room;
pub use moving::{Known, Move, MoveError, Round};
pub use pool::{Lease, Pool};
pub use standing::Standing;

use crate::{
    tenant::{Isolation, Names, OrgId, namespace::MongoNamespace},
    wire::mongo::bson,
};

/// Longest time for an errand of the platform's own.
const PLATFORM_TIMEOUT: Duration = Duration::from_secs(60);

/// How often idle connections and accounts are looked at.
const TIDY_EVERY: Duration = Duration::from_secs(10);

/// The protocol version that is assumed until a server was reached: 7.0's.
const WIRE_VERSION_ASSUMED: i32 = 21;

/// The newest protocol version that is known here: 8.2's.
const WIRE_VERSION_KNOWN: i32 = 27;

/// The way to one deployment. One per process.
#[derive(Debug)]
pub struct Upstream {
    target: Arc<Target>,
    names: Names,
    platform: Arc<Pool>,
    accounts: DashMap<OrgId, Arc<Account>>,
    wire_version: AtomicI32,
}

impl Upstream {
    /// The way to `target`.
    pub fn new(target: Target, names: Names) -> Arc<Self> {
        let target = Arc::new(target);
        if target.login.is_none() {
            tracing::warn!(
                "the MongoDB URL has no login: tenants of database isolation get no server user of their own"
            );
        }
        let platform = Pool::new(Arc::clone(&target), target.login.clone());
        let wire_version = AtomicI32::new(WIRE_VERSION_ASSUMED);
        Arc::new(Self { target, names, platform, accounts: DashMap::new(), wire_version })
    }

    /// What a tenant's requests are sent with.
    pub fn account(&self, org: &OrgId, generation: u32) -> Arc<Account> {
        if let Some(account) = self.accounts.get(org)
            && account.generation == generation
        {
            return Arc::clone(&account);
        }
        let account = Arc::new(Account::new(org, generation, &self.names, &self.target));
        self.accounts.insert(org.clone(), Arc::clone(&account));
        account
    }

    /// A tenant's account of a later generation than this one, if there is one.
    fn newer(&self, org: &OrgId, generation: u32) -> Option<Arc<Account>> {
        let account = self.accounts.get(org)?;
        (account.generation > generation).then(|| Arc::clone(&account))
    }

    /// Names of a tenant's databases.
    pub fn place(&self, org: &OrgId, isolation: Isolation) -> MongoNamespace {
        self.names.mongodb(org, isolation)
    }

    /// A key of 32 bytes, the tenant's alone, for one purpose.
    pub fn mask(&self, purpose: &str, org: &OrgId) -> [u8; 32] {
        self.names.mask(purpose, org)
    }

    /// A connection of the platform's user.
    ///
    /// # Errors
    /// The deployment can't be reached or refuses the platform.
    pub async fn platform(&self) -> Result<Lease, Error> {
        let lease = self.platform.lease().await?;
        self.saw(&lease);
        Ok(lease)
    }

    /// Runs one command, `$db` included, as the platform's user.
    ///
    /// # Errors
    /// Also [`Error::Refused`] for a reply that is not `ok`.
    ///
    /// # Cancel safety
    /// Dropping it closes the connection; the command may have run.
    pub async fn command(&self, body: &[u8]) -> Result<Reply, Error> {
        let run = async {
            let mut lease = self.platform().await?;
            let reply = lease.connection.command(body).await;
            if matches!(reply, Ok(_) | Err(Error::Refused { .. })) {
                lease.release();
            }
            reply
        };
        tokio::time::timeout(PLATFORM_TIMEOUT, run).await.unwrap_or(Err(Error::Slow))
    }

    /// Asks the deployment for a sign of life.
    ///
    /// # Errors
    /// What stands in the way.
    pub async fn ping(&self) -> Result<(), Error> {
        let mut ping = Vec::new();
        let body = bson::open(&mut ping);
        bson::put_i32(&mut ping, "ping", 1);
        bson::put_str(&mut ping, "$db", "admin");
        bson::close(&mut ping, body);
        self.command(&ping).await.map(drop)
    }

    /// The newest protocol version that both sides know.
    pub fn wire_version(&self) -> i32 {
        self.wire_version.load(Ordering::Relaxed)
    }

    fn saw(&self, lease: &Lease) {
        self.wire_version.store(lease.connection.wire_version.min(WIRE_VERSION_KNOWN), Ordering::Relaxed);
    }

    /// The primary has changed: no present connection is used again.
    pub fn renew(&self) {
        self.platform.renew();
        self.accounts.iter().for_each(|account| account.renew());
    }

    /// Closes what is idle for long. Runs until it is dropped.
    pub async fn run_maintenance(&self) {
        // The version that hello tells is the server's from the first client on.
        if let Err(error) = self.ping().await {
            tracing::warn!(%error, "MongoDB can't be reached");
        }
        loop {
            tokio::time::sleep(TIDY_EVERY).await;
            self.platform.tidy();
            self.accounts.iter().for_each(|account| account.tidy());
            // Under the shard's lock a count of one is exact: another holder can only come through the map.
            self.accounts.retain(|_, account| Arc::strong_count(account) > 1 || account.is_fresh());
        }
    }

    /// Makes the tenant's server user, or brings its password and rights up to date. May be repeated.
    ///
    /// # Errors
    /// The deployment can't be reached or refuses the platform.
    pub async fn provision(&self, org: &OrgId, generation: u32) -> Result<(), Error> {
        match self.account(org, generation).user() {
            Some(user) => account::put_user(self, user, true).await.map(drop),
            None => Ok(()),
        }
    }

    /// Takes the tenant's server user away, and its databases and documents with `purge`. May be repeated.
    ///
    /// # Errors
    /// The deployment can't be reached or refuses the platform.
    pub async fn remove(&self, org: &OrgId, purge: bool) -> Result<(), Error> {
        account::drop_user(self, &self.place(org, Isolation::Database).user).await?;
        self.accounts.remove(org);
        if purge {
            account::purge(self, org).await?;
            self.forget_standing(org).await?;
            self.forget_hold(org).await?;
            self.forget_made(org).await?;
        }
        Ok(())
    }
}
