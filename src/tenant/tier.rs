//! Plans and their numbers. The numbers are data (`config/tiers.toml`); only their shape is code.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Home, Isolation, Protocol, unit};

/// A plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Tier {
    /// The smallest plan.
    Free,
    /// The first paid plan.
    Starter,
    /// For production.
    Pro,
    /// The largest plan.
    Enterprise,
}

impl Tier {
    /// Every tier, smallest first.
    pub const ALL: [Tier; 4] = [Tier::Free, Tier::Starter, Tier::Pro, Tier::Enterprise];

    /// The name used everywhere outside: `FREE`, `STARTER`, `PRO`, `ENTERPRISE`.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Free => "FREE",
            Tier::Starter => "STARTER",
            Tier::Pro => "PRO",
            Tier::Enterprise => "ENTERPRISE",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Tier::ALL
            .into_iter()
            .find(|tier| tier.name() == text)
            .ok_or_else(|| format!("{text:?} is not a tier: use FREE, STARTER, PRO or ENTERPRISE"))
    }
}

/// What happens to a live session whose token has expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expiry {
    /// It ends at the next safe point after `exp` plus leeway.
    Strict,
    /// The token is checked when connecting only.
    ConnectOnly,
}

/// What happens to a request over the tenant's rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverRate {
    /// It gets the database's native error with a retry hint.
    Refuse,
    /// It waits up to `max_delay`, then is refused.
    Delay,
}

/// How a Postgres client shares the tenant's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolMode {
    /// A connection is held for a transaction.
    Transaction,
    /// A connection is held until the client leaves.
    Session,
}

/// A request rate: so many per second or per minute sustained, `burst` at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Requests per second, sustained; 0 where `per_minute` says it.
    #[serde(default)]
    pub per_second: u32,
    /// Requests per minute, sustained; 0 where `per_second` says it.
    #[serde(default)]
    pub per_minute: u32,
    /// Requests that may come at once after a pause.
    pub burst: u32,
    /// Refuse or delay what is over.
    pub over: OverRate,
    /// Longest delay of one request under `over = "delay"`.
    #[serde(deserialize_with = "unit::duration")]
    pub max_delay: Duration,
}

impl RateLimit {
    /// The pause between two requests at the sustained rate, in nanoseconds.
    pub fn interval_ns(&self) -> u64 {
        let (units, within) = match self.per_second {
            0 => (self.per_minute, 60_000_000_000),
            units => (units, 1_000_000_000),
        };
        (within / u64::from(units.max(1))).max(1)
    }

    /// The number that the tier's owner reads, in its own unit.
    pub fn units(&self) -> u32 {
        self.per_second.max(self.per_minute)
    }

    fn is_good(&self) -> bool {
        (self.per_second == 0) != (self.per_minute == 0) && self.burst >= 1
    }
}

/// The Postgres column of a tier.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresLimits {
    /// Upstream connections: the size of the tenant's pool.
    pub connections: u32,
    /// Client sockets.
    pub client_sockets: u32,
    /// Database size in bytes, over which growing writes are refused.
    #[serde(deserialize_with = "unit::size")]
    pub storage: u64,
    /// Longest statement.
    #[serde(deserialize_with = "unit::duration")]
    pub statement_timeout: Duration,
    /// Longest pause inside a transaction.
    #[serde(deserialize_with = "unit::duration")]
    pub idle_in_transaction_timeout: Duration,
    /// Longest wait for an upstream connection.
    #[serde(deserialize_with = "unit::duration")]
    pub queue_timeout: Duration,
    /// Pool mode for clients that do not ask for one.
    pub pool_mode: PoolMode,
    /// Where a tenant that is made on this tier has its home; the main one where there are no Neon homes. Its record
    /// keeps that: whoever is there stays there.
    pub home: Home,
    /// Statements (transactions count each statement) per second.
    pub rate: RateLimit,
}

/// The Redis column of a tier.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedisLimits {
    /// Bytes that the tenant's keys and values may take in the server's memory.
    #[serde(deserialize_with = "unit::size")]
    pub memory: u64,
    /// Keys, over all logical databases of the tenant.
    pub keys: u64,
    /// Longest life of a key; `None` is for ever. A key without one gets this.
    #[serde(deserialize_with = "unit::duration_or_never")]
    pub max_ttl: Option<Duration>,
    /// Client sockets.
    pub client_sockets: u32,
    /// Upstream connections of clients that block, watch or subscribe; all others share a few.
    pub connections: u32,
    /// Commands per second.
    pub rate: RateLimit,
}

/// The MongoDB column of a tier.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MongodbLimits {
    /// How documents are kept apart, unless the tenant's own record says otherwise.
    pub isolation: Isolation,
    /// Operations at the server at a time: running requests, open transactions, awaiting cursors.
    pub connections: u32,
    /// Client sockets.
    pub client_sockets: u32,
    /// Longest operation.
    #[serde(deserialize_with = "unit::duration")]
    pub timeout: Duration,
    /// Longest wait for one of `connections`.
    #[serde(deserialize_with = "unit::duration")]
    pub queue_timeout: Duration,
    /// Open cursors.
    pub cursors: u32,
    /// Collections: of its own databases, and shared ones that came into being by its requests.
    #[serde(default = "collections")]
    pub collections: u32,
    /// Indexes of its own on one collection, beside the one over `_id`; `None` is what [`Self::indexes`] says.
    #[serde(default)]
    pub indexes: Option<u32>,
    /// Whether documents of shared collections come back with the platform's `org_id`.
    #[serde(default)]
    pub show_org_id: bool,
    /// Requests per second.
    pub rate: RateLimit,
}

/// Collections of a tier that does not say: what a small deployment bears of one tenant.
fn collections() -> u32 {
    500
}

/// Most collections of a tier: the names of those in shared databases stand in one document.
const COLLECTIONS_MAX: u32 = 20_000;

/// Indexes that the server lets a collection have beside the one over `_id`.
pub const INDEXES_OF_SERVER: u32 = 63;

/// Indexes of one tenant on a shared collection where the tier does not say: the server has 63 for all of them, so that
/// five tenants can have filled it, and not one.
const INDEXES_OF_SHARED: u32 = 12;

impl MongodbLimits {
    /// Indexes of one tenant on one collection.
    pub fn indexes(&self, isolation: Isolation) -> u32 {
        self.indexes.unwrap_or(match isolation {
            Isolation::Filter => INDEXES_OF_SHARED,
            Isolation::Database => INDEXES_OF_SERVER,
        })
    }
}

/// The Convex column of a tier.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvexLimits {
    /// Client sockets.
    pub client_sockets: u32,
    /// Subscribed queries over all sockets.
    pub subscriptions: u32,
    /// Subscribed queries of one socket.
    pub subscriptions_per_socket: u32,
    /// Function calls.
    pub rate: RateLimit,
    /// Mutations and actions running at a time.
    pub in_flight_writes: u32,
    /// Bytes of one request or message.
    #[serde(deserialize_with = "unit::size")]
    pub payload: u64,
    /// Bytes of one uploaded file.
    #[serde(deserialize_with = "unit::size")]
    pub upload: u64,
}

/// The Neon column of a tier.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeonLimits {
    /// Upstream connections over WebSocket, HTTP and routed Postgres sessions.
    pub connections: u32,
    /// Client sockets.
    pub client_sockets: u32,
    /// Database size in bytes.
    #[serde(deserialize_with = "unit::size")]
    pub storage: u64,
    /// Longest statement.
    #[serde(deserialize_with = "unit::duration")]
    pub statement_timeout: Duration,
    /// Longest wait for an upstream connection.
    #[serde(deserialize_with = "unit::duration")]
    pub queue_timeout: Duration,
    /// Bytes of one HTTP response.
    #[serde(deserialize_with = "unit::size")]
    pub response: u64,
    /// Smallest compute, in hundredths of a compute unit.
    pub min_cu_hundredths: u32,
    /// Largest compute, in hundredths of a compute unit.
    pub max_cu_hundredths: u32,
    /// Idle time after which the compute sleeps; `None` is never.
    #[serde(deserialize_with = "unit::duration_or_never")]
    pub suspend_after: Option<Duration>,
    /// Branches.
    pub branches: u32,
    /// Requests per second.
    pub rate: RateLimit,
}

/// One tier's numbers, for every database.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Live sessions after their token's expiry.
    pub expiry: Expiry,
    /// Postgres.
    pub postgres: PostgresLimits,
    /// Redis.
    pub redis: RedisLimits,
    /// MongoDB.
    pub mongodb: MongodbLimits,
    /// Convex.
    pub convex: ConvexLimits,
    /// Neon.
    pub neon: NeonLimits,
}

impl Limits {
    /// The rate of one protocol.
    pub fn rate(&self, protocol: Protocol) -> &RateLimit {
        match protocol {
            Protocol::Postgres => &self.postgres.rate,
            Protocol::Redis => &self.redis.rate,
            Protocol::Mongodb => &self.mongodb.rate,
            Protocol::Convex => &self.convex.rate,
            Protocol::Neon => &self.neon.rate,
        }
    }

    /// The cap on one protocol's client sockets.
    pub fn client_sockets(&self, protocol: Protocol) -> u32 {
        match protocol {
            Protocol::Postgres => self.postgres.client_sockets,
            Protocol::Redis => self.redis.client_sockets,
            Protocol::Mongodb => self.mongodb.client_sockets,
            Protocol::Convex => self.convex.client_sockets,
            Protocol::Neon => self.neon.client_sockets,
        }
    }

    /// The cap on one protocol's upstream connections; for Convex, where calls share sockets, on writes under way.
    pub fn connections(&self, protocol: Protocol) -> u32 {
        match protocol {
            Protocol::Postgres => self.postgres.connections,
            Protocol::Redis => self.redis.connections,
            Protocol::Mongodb => self.mongodb.connections,
            Protocol::Convex => self.convex.in_flight_writes,
            Protocol::Neon => self.neon.connections,
        }
    }

    fn faults(&self, tier: Tier) -> Vec<String> {
        let pg = &self.postgres;
        let mut faults = Vec::new();
        let mut need = |good: bool, what: &str| {
            if !good {
                faults.push(format!("{tier}: {what}"));
            }
        };
        need(pg.client_sockets >= pg.connections, "postgres.client_sockets must not be below postgres.connections");
        need(!pg.statement_timeout.is_zero(), "postgres.statement_timeout must be above zero");
        need(!pg.queue_timeout.is_zero(), "postgres.queue_timeout must be above zero");
        let redis = &self.redis;
        need(redis.keys >= 1, "redis.keys must be at least 1");
        need(redis.memory >= 1, "redis.memory must be above zero");
        need(redis.max_ttl.is_none_or(|ttl| ttl.as_secs() >= 1), "redis.max_ttl must be at least 1s, or \"never\"");
        for protocol in Protocol::ALL {
            let (label, rate) = (protocol.label(), self.rate(protocol));
            need(rate.is_good(), &format!("{label}.rate needs per_second or per_minute, and burst, of at least 1"));
            need(self.client_sockets(protocol) >= 1, &format!("{label}.client_sockets must be at least 1"));
            need(self.connections(protocol) >= 1, &format!("{label}: no connection or write would ever be let in"));
        }
        let mongodb = &self.mongodb;
        need(!mongodb.timeout.is_zero(), "mongodb.timeout must be above zero");
        need(!mongodb.queue_timeout.is_zero(), "mongodb.queue_timeout must be above zero");
        need(mongodb.cursors >= 1, "mongodb.cursors must be at least 1");
        let collections = 1..=COLLECTIONS_MAX;
        need(
            collections.contains(&mongodb.collections),
            &format!("mongodb.collections must be 1 to {COLLECTIONS_MAX}"),
        );
        need(
            mongodb.indexes.is_none_or(|indexes| (1..=INDEXES_OF_SERVER).contains(&indexes)),
            &format!("mongodb.indexes must be 1 to {INDEXES_OF_SERVER}, all that the server has"),
        );
        let convex = &self.convex;
        need(convex.subscriptions >= 1, "convex.subscriptions must be at least 1");
        need(convex.subscriptions_per_socket >= 1, "convex.subscriptions_per_socket must be at least 1");
        let neon = &self.neon;
        need(!neon.statement_timeout.is_zero(), "neon.statement_timeout must be above zero");
        need(!neon.queue_timeout.is_zero(), "neon.queue_timeout must be above zero");
        need(
            (25..=neon.max_cu_hundredths).contains(&neon.min_cu_hundredths),
            "neon.min_cu_hundredths must be 25 to neon.max_cu_hundredths",
        );
        need(neon.branches >= 1, "neon.branches must be at least 1");
        faults
    }
}

/// All tiers of one `tiers.toml`.
#[derive(Clone, Debug)]
pub struct Tiers([Arc<Limits>; 4]);

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "UPPERCASE")]
struct TiersFile {
    free: Limits,
    starter: Limits,
    pro: Limits,
    enterprise: Limits,
}

impl Tiers {
    /// Parses `tiers.toml`.
    ///
    /// # Errors
    /// Every fault in words, with its place where the parser knows it.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let file: TiersFile = toml::from_str(text).map_err(|error| vec![error.to_string()])?;
        let tiers = [file.free, file.starter, file.pro, file.enterprise];
        let faults: Vec<String> =
            Tier::ALL.into_iter().zip(&tiers).flat_map(|(tier, limits)| limits.faults(tier)).collect();
        if faults.is_empty() { Ok(Self(tiers.map(Arc::new))) } else { Err(faults) }
    }

    /// These tiers, with `old`'s own values where nothing has changed: who compares by pointer sees what did.
    #[must_use]
    pub fn keeping(self, old: &Tiers) -> Self {
        let mut tiers = self.0;
        for (new, old) in tiers.iter_mut().zip(&old.0) {
            if *new == *old {
                *new = Arc::clone(old);
            }
        }
        Self(tiers)
    }

    /// The numbers of one tier.
    pub fn limits(&self, tier: Tier) -> &Arc<Limits> {
        &self.0[tier as usize]
    }
}

#[cfg(test)]
mod tests;
