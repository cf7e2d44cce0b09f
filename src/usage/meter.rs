//! Counters touched on the hot path: relaxed atomics, added up when a connection's burst of work ends.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;

use crate::tenant::{OrgId, Protocol};

/// How long a meter is kept after its last session has gone. Who adds meters up looks more often than this, so that
/// the last counts are not missed.
pub const KEPT_FOR: Duration = Duration::from_secs(600);

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
    /// Since when nobody holds it, in the milliseconds of [`Meters::sweep`]; 0 while somebody may.
    unheld_since_ms: AtomicU64,
}

/// Every tenant's meters, as long as somebody holds them and [`KEPT_FOR`] longer.
#[derive(Debug, Default)]
pub struct Meters(DashMap<(OrgId, Protocol), Arc<Meter>>);

impl Meters {
    /// The meter of one tenant and protocol; made on first use. Keep it: this is a look-up.
    pub fn meter(&self, org: &OrgId, protocol: Protocol) -> Arc<Meter> {
        let meter = match self.0.get(&(org.clone(), protocol)) {
            Some(meter) => Arc::clone(&meter),
            None => Arc::clone(&self.0.entry((org.clone(), protocol)).or_default()),
        };
        meter.unheld_since_ms.store(0, Ordering::Relaxed);
        meter
    }

    /// Every meter there is.
    pub fn all(&self) -> Vec<(OrgId, Protocol, Arc<Meter>)> {
        self.0.iter().map(|entry| (entry.key().0.clone(), entry.key().1, Arc::clone(entry.value()))).collect()
    }

    /// Removes the meters that nobody has held for [`KEPT_FOR`], and gives them, for their last counts. To be called
    /// about once a minute, with the time on any clock that starts above zero.
    pub fn sweep(&self, now_ms: u64) -> Vec<(OrgId, Protocol, Arc<Meter>)> {
        let kept_ms = u64::try_from(KEPT_FOR.as_millis()).unwrap_or(u64::MAX);
        let mut swept = Vec::new();
        // Under the shard's lock a count of one is exact: another holder can only come through the map.
        self.0.retain(|(org, protocol), meter| {
            let since = &meter.unheld_since_ms;
            if Arc::strong_count(meter) > 1 {
                since.store(0, Ordering::Relaxed);
                return true;
            }
            match since.load(Ordering::Relaxed) {
                0 => since.store(now_ms, Ordering::Relaxed),
                at if now_ms.saturating_sub(at) >= kept_ms => {
                    swept.push((org.clone(), *protocol, Arc::clone(meter)));
                    return false;
                }
                _ => {}
            }
            true
        });
        swept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_goes_only_after_nobody_has_held_it_for_long_and_hands_over_its_counts() {
        let meters = Meters::default();
        let org = OrgId::parse("acme").unwrap();
        let kept_ms = u64::try_from(KEPT_FOR.as_millis()).unwrap();
        let held = meters.meter(&org, Protocol::Postgres);
        held.requests.fetch_add(7, Ordering::Relaxed);
        assert!(meters.sweep(1).is_empty() && meters.sweep(1 + 2 * kept_ms).is_empty());
        drop(held);
        assert!(meters.sweep(10).is_empty() && meters.sweep(9 + kept_ms).is_empty());
        // Held again in between: the wait starts anew.
        drop(meters.meter(&org, Protocol::Postgres));
        assert!(meters.sweep(10 + kept_ms).is_empty());
        let swept = meters.sweep(10 + 2 * kept_ms);
        assert_eq!(swept.len(), 1);
        assert_eq!(swept[0].2.requests.load(Ordering::Relaxed), 7);
        assert!(meters.all().is_empty());
    }
}
