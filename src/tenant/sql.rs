//! A tenant's two SQL homes, the main one and the Neon one, have limits of one shape.

use std::time::Duration;

use super::{Limits, Protocol, tier::PostgresLimits};

/// What a tier allows in one of a tenant's two SQL homes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqlLimits {
    /// Upstream connections.
    pub connections: u32,
    /// Database size in bytes.
    pub storage: u64,
    /// Longest statement.
    pub statement_timeout: Duration,
    /// Longest pause inside a transaction.
    pub idle_in_transaction_timeout: Duration,
    /// Longest wait for an upstream connection.
    pub queue_timeout: Duration,
}

impl From<&PostgresLimits> for SqlLimits {
    fn from(limits: &PostgresLimits) -> Self {
        Self {
            connections: limits.connections,
            storage: limits.storage,
            statement_timeout: limits.statement_timeout,
            idle_in_transaction_timeout: limits.idle_in_transaction_timeout,
            queue_timeout: limits.queue_timeout,
        }
    }
}

impl Limits {
    /// The limits of one SQL home: the Neon one's for [`Protocol::Neon`], else the main one's. A pause inside a
    /// transaction is as long in both: an open transaction keeps a compute awake, and the tier says once how long.
    pub fn sql(&self, protocol: Protocol) -> SqlLimits {
        let main = SqlLimits::from(&self.postgres);
        match protocol {
            Protocol::Neon => SqlLimits {
                connections: self.neon.connections,
                storage: self.neon.storage,
                statement_timeout: self.neon.statement_timeout,
                queue_timeout: self.neon.queue_timeout,
                ..main
            },
            _ => main,
        }
    }
}
