//! Counters touched on the hot path: relaxed atomics, added up when a connection's burst of work ends.

use std::sync::{
    Arc,
    atomic::{AtomicI64, AtomicU64},
};

use dashmap::DashMap;

use crate::tenant::{OrgId, Protocol};

/// One tenant's counters for one protocol, since the process started.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Meter {
    /// Sessions open now.
    pub open: AtomicI64,
    /// Sessions admitted.
    pub opened: AtomicU64,
    /// Statements or commands answered.
    pub requests: AtomicU64,
    /// Transactions (Postgres) or batches that took an upstream connection.
    pub transactions: AtomicU64,
    /// Bytes from clients.
    pub bytes_in: AtomicU64,
    /// Bytes to clients.
    pub bytes_out: AtomicU64,
    /// Errors that the upstream reported.
    pub errors: AtomicU64,
    /// Requests refused by us.
    pub refused: AtomicU64,
    /// Microseconds that requests waited for an upstream connection.
    pub waited_us: AtomicU64,
}

/// Every tenant's meters.
#[derive(Debug, Default)]
pub struct Meters(DashMap<(OrgId, Protocol), Arc<Meter>>);

impl Meters {
    /// The meter of one tenant and protocol; made on first use.
    pub fn meter(&self, org: &OrgId, protocol: Protocol) -> Arc<Meter> {
        if let Some(meter) = self.0.get(&(org.clone(), protocol)) {
            return Arc::clone(&meter);
        }
        Arc::clone(&self.0.entry((org.clone(), protocol)).or_default())
    }

    /// Every meter there is.
    pub fn all(&self) -> Vec<(OrgId, Protocol, Arc<Meter>)> {
        self.0.iter().map(|entry| (entry.key().0.clone(), entry.key().1, Arc::clone(entry.value()))).collect()
    }
}
