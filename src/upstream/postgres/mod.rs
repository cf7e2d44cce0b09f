//! Real PostgreSQL servers: dialling, logging in, pooling; and what an administrator's login does there for tenants.
//!
//! Entry points: [`Upstream`] for the data path, [`Provisioner`] and [`Maintenance`] for the administrator's login.

mod about;
mod admin;
mod ceiling;
mod config;
pub mod connection;
mod dial;
mod endpoint;
mod login;
mod moving;
mod pool;
mod provision;
mod size;

use std::{sync::Arc, time::Duration};

use dashmap::DashMap;
use tokio::sync::{Notify, watch};

pub use about::{About, VERSION_MIN};
pub use admin::{Admin, AdminError};
pub use ceiling::{Ceiling, Mark};
pub use config::Config;
pub use connection::Connection;
pub use dial::{Address, DialError, Retry, Step, Target};
pub use endpoint::Endpoint;
pub use login::ConnectError;
pub use moving::{Carried, Dump, Filled, Move, MoveError};
pub use pool::{Home, Lease, Pool, STILL_PATIENCE, TakeError, Taken};
pub use provision::{ProvisionError, Provisioner, Report};
pub use size::Maintenance;

use crate::{
    quota::Slot,
    tenant::{DEFAULT_NAME, Limits, Names, OrgId, Project, Protocol, Tenant},
    upstream::neon::{Projects, at_branch},
};

/// How often pools are tidied.
const TIDY_EVERY: Duration = Duration::from_secs(1);

/// Where tenants' homes lie.
#[derive(Debug)]
enum Ground {
    /// Databases of one server.
    Server {
        target: Target,
        /// Two logins as administrator, which no client waits for.
        maintenance: Box<Maintenance>,
        provisioner: Box<Provisioner>,
    },
    /// A project at Neon for each.
    Projects(Arc<Projects>),
}

/// A tenant's home could not be looked at or changed.
#[derive(Debug)]
pub struct GroundError(String);

impl std::fmt::Display for GroundError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for GroundError {}

fn told(error: impl std::fmt::Display) -> GroundError {
    GroundError(error.to_string())
}

/// Every tenant's pool of connections to its homes of one kind, on one PostgreSQL server or each on its own.
#[derive(Debug)]
pub struct Upstream {
    /// Which of the tenants' homes lie here.
    protocol: Protocol,
    ground: Ground,
    names: Names,
    budget: Arc<pool::Budget>,
    pools: DashMap<OrgId, Arc<Pool>>,
    /// Some pool's role has limits that no longer follow its tier.
    stale: Arc<Notify>,
    patience: pool::Patience,
    idle_timeout: Duration,
    storage_interval: Duration,
}

impl Upstream {
    /// The server that `config` describes; names and passwords of tenants come from `names`.
    ///
    /// # Errors
    /// What is wrong with the configuration, in words.
    pub fn new(config: &Config, names: Names) -> Result<Arc<Self>, String> {
        Self::of(Protocol::Postgres, config, names, Duration::ZERO)
    }

    /// The server that `config` describes, as the place of the tenants' Neon homes. It may sleep, and may take
    /// `waking` to wake up.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_neon_homes(config: &Config, names: Names, waking: Duration) -> Result<Arc<Self>, String> {
        Self::of(Protocol::Neon, config, names, waking)
    }

    /// Projects at Neon, each tenant's Neon home in one of its own; of `config` only what is not of a server counts.
    pub fn of_projects(config: &Config, projects: Arc<Projects>, names: Names, waking: Duration) -> Arc<Self> {
        Self::on(Ground::Projects(projects), Protocol::Neon, config, names, waking)
    }

    fn of(protocol: Protocol, config: &Config, names: Names, waking: Duration) -> Result<Arc<Self>, String> {
        let provisioner = match protocol {
            Protocol::Neon => Provisioner::of_neon_homes(config.admin()?),
            _ => Provisioner::new(config.admin()?),
        };
        let ground = Ground::Server {
            target: config.target()?,
            maintenance: Box::new(Maintenance::new(config.admin()?)),
            provisioner: Box::new(provisioner),
        };
        Ok(Self::on(ground, protocol, config, names, waking))
    }

    fn on(ground: Ground, protocol: Protocol, config: &Config, names: Names, waking: Duration) -> Arc<Self> {
        Arc::new(Self {
            protocol,
            ground,
            names,
            budget: pool::Budget::new(config.max_connections),
            pools: DashMap::new(),
            stale: Arc::default(),
            patience: pool::Patience { connect: config.connect_timeout, waking },
            idle_timeout: config.idle_timeout,
            storage_interval: config.storage_interval,
        })
    }

    /// The tenant's pool.
    pub fn pool(&self, slot: &Arc<Slot>) -> Arc<Pool> {
        let make = || {
            let (slot, budget, stale) = (Arc::clone(slot), Arc::clone(&self.budget), Arc::clone(&self.stale));
            Pool::new(slot, self.protocol, budget, self.patience, stale)
        };
        if let Some(pool) = self.pools.get(slot.org())
            && Arc::ptr_eq(pool.slot(), slot)
        {
            return Arc::clone(&pool);
        }
        let mut entry = self.pools.entry(slot.org().clone()).or_insert_with(make);
        if !Arc::ptr_eq(entry.slot(), slot) {
            // The tenant was dropped from the table and loaded again: its old pool has no clients left.
            *entry = make();
        }
        Arc::clone(&entry)
    }

    /// Where the connections of `pool`, the tenant's, to one of its logical databases lead; `None` while its record
    /// names no project for it.
    pub fn home(&self, pool: &Pool, tenant: &Tenant, database: &str) -> Option<Arc<Home>> {
        let generation = tenant.generation;
        let home = |target: &Target, project: Option<&Project>, inside: &str| {
            pool.home(database, target, generation, |endpoint| {
                let place = self.names.sql(self.protocol, &tenant.org, inside);
                let of = |generation| self.names.password(self.protocol.label(), &tenant.org, generation);
                let others =
                    [generation.checked_sub(1), generation.checked_add(1)].into_iter().flatten().map(of).collect();
                // A branch at Neon has the same databases by the same names, on a host of its own.
                let carried = match project {
                    Some(project) => format!("{} at {}", place.database, project.host),
                    None => place.database.clone(),
                };
                let (logical, project, password) = (database.into(), project.cloned(), of(generation));
                Home { endpoint, project, logical, generation, database: carried.into(), place, password, others }
            })
        };
        match &self.ground {
            Ground::Server { target, .. } => Some(home(target, None, database)),
            Ground::Projects(projects) => {
                let (inside, place) = at_branch(tenant, database)?;
                Some(home(&projects.target(&place.host), Some(place), inside))
            }
        }
    }

    /// Ends a backend that swallows cancels.
    pub async fn terminate(&self, pid: u32, home: &Home) -> bool {
        let Ok(pid) = i32::try_from(pid) else { return false };
        match (&self.ground, &home.project) {
            (Ground::Server { maintenance, .. }, _) => {
                maintenance.terminate(pid, &home.place.role).await.unwrap_or(false)
            }
            (Ground::Projects(projects), Some(place)) => projects.terminate(place, pid, &home.place.role).await,
            (Ground::Projects(_), None) => false,
        }
    }

    /// Measures the tenant's databases now; of projects at Neon, takes what was measured there last, which wakes
    /// nobody. There the server itself is what refuses at once.
    ///
    /// # Errors
    /// What the server said.
    pub async fn measure(&self, slot: &Slot) -> Result<u64, GroundError> {
        let tenant = Arc::clone(&slot.policy().tenant);
        let bytes = match &self.ground {
            Ground::Server { maintenance, .. } => self.on_server(maintenance, &tenant).await.map_err(told)?,
            Ground::Projects(projects) => projects.bytes(&tenant).await.map_err(told)?,
        };
        slot.set_stored(self.protocol, bytes);
        Ok(bytes)
    }

    async fn on_server(&self, maintenance: &Maintenance, tenant: &Tenant) -> Result<u64, AdminError> {
        let mut bytes = 0;
        for database in std::iter::once(DEFAULT_NAME).chain(tenant.databases.iter().map(String::as_str)) {
            let place = self.names.sql(self.protocol, &tenant.org, database);
            bytes += maintenance.database_bytes(&place.database).await?;
            if self.protocol == Protocol::Neon {
                for branch in &tenant.routes.neon.branches {
                    let place = self.names.sql(self.protocol, &tenant.org, &format!("{database}@{}", branch.name));
                    bytes += maintenance.database_bytes(&place.database).await?;
                }
            }
        }
        Ok(bytes)
    }

    /// Connections open to the server, and all that it grants us.
    pub fn connections(&self) -> u32 {
        self.budget.used()
    }

    /// Every pool there is.
    pub fn pools(&self) -> Vec<Arc<Pool>> {
        self.pools.iter().map(|entry| Arc::clone(entry.value())).collect()
    }

    /// Tidies the pools, follows tiers with the roles' own limits, samples sizes, until dropped. None waits for
    /// another: a slow look at a size must not keep clients from their turn.
    ///
    /// `stills` tells when some tenant has begun or ended to stand still.
    pub async fn run_maintenance(&self, mut stills: watch::Receiver<u64>) {
        let tidy = async {
            let mut ticker = tokio::time::interval(TIDY_EVERY);
            ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticker.tick().await;
                for pool in self.pools() {
                    pool.tidy(self.idle_timeout);
                }
                // More than one reference: sessions or connections hold it.
                self.pools.retain(|_, pool| Arc::strong_count(pool) > 1 || !pool.is_unused());
            }
        };
        let follow = async {
            loop {
                self.stale.notified().await;
                self.raise_ceilings().await;
            }
        };
        let sample = async {
            loop {
                tokio::time::sleep(self.storage_interval).await;
                self.sample().await;
            }
        };
        let heed = async {
            // The table goes with the process.
            while stills.changed().await.is_ok() {
                self.pools().iter().for_each(|pool| pool.heed());
            }
            std::future::pending::<()>().await;
        };
        tokio::join!(tidy, follow, sample, heed);
    }

    /// Brings the roles' own limits to those of a tier that was changed in the catalog. Until then the server refuses
    /// what is above the old ones, and connecting is tried again.
    async fn raise_ceilings(&self) {
        for pool in self.pools() {
            let Some(limits) = pool.stale_ceilings() else { continue };
            let tenant = Arc::clone(&pool.slot().policy().tenant);
            match self.follow(&tenant, &limits).await {
                Ok(_) => pool.set_ceilings(limits),
                Err(error) => {
                    tracing::warn!(org = %tenant.org, %error, "the role's own limits could not follow its tier");
                    // Tried again at the next sign of it, not in a loop.
                    tokio::time::sleep(TIDY_EVERY).await;
                }
            }
        }
    }

    async fn follow(&self, tenant: &Tenant, limits: &Limits) -> Result<(), GroundError> {
        match &self.ground {
            Ground::Server { provisioner, .. } => {
                let done = provisioner.ensure(tenant, &self.names, limits.sql(self.protocol)).await;
                done.map(drop).map_err(told)
            }
            Ground::Projects(projects) => projects.settle(tenant, limits).await.map_err(told),
        }
    }

    async fn sample(&self) {
        for pool in self.pools() {
            if let Err(error) = self.measure(pool.slot()).await {
                tracing::warn!(org = %pool.slot().org(), %error, "could not measure the database");
            }
        }
    }
}
