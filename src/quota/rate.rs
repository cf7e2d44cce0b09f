//! Rate arithmetic: GCRA on one atomic. The state is a time, so it keeps its meaning when the rate changes.

use std::time::Duration;

use super::atomic::{AtomicU64, Ordering};

/// Most units one decision may ask for; keeps the products below overflow.
pub const UNITS_MAX: u64 = 1 << 20;

/// A rate as the limiter needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Nanoseconds per unit.
    pub interval_ns: u64,
    /// How far ahead of now the arrival time may run: `burst` units' worth of nanoseconds.
    pub tolerance_ns: u64,
}

impl Pace {
    /// `per_second` sustained, `burst` at once; both at least 1.
    pub fn new(per_second: u32, burst: u32) -> Self {
        let interval_ns = (1_000_000_000 / u64::from(per_second.max(1))).max(1);
        Self { interval_ns, tolerance_ns: interval_ns * u64::from(burst.max(1)) }
    }
}

/// One limiter. The atomic is the theoretical arrival time of the next unit in nanoseconds of the caller's
/// clock; zero means never used, so the clock must start above zero.
#[derive(Debug)]
pub struct Rate(AtomicU64);

impl Default for Rate {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Rate {
    /// Admits `units` at `now_ns`, or says how long to wait before they would be admitted. A refusal writes nothing.
    ///
    /// Ordering: the atomic orders nothing but itself, so `Relaxed` suffices.
    pub fn admit(&self, now_ns: u64, units: u64, pace: Pace) -> Result<(), Duration> {
        let cost = units.min(UNITS_MAX).saturating_mul(pace.interval_ns);
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            // A debt made under a slower pace is cut to what the present one tolerates: an upgrade acts at once.
            let start = seen.clamp(now_ns, now_ns.saturating_add(pace.tolerance_ns));
            let next = start.saturating_add(cost);
            let ahead = next - now_ns;
            // More than a whole burst is admitted when nothing is owed, or it could never be.
            if ahead > pace.tolerance_ns && start > now_ns {
                return Err(Duration::from_nanos((ahead - pace.tolerance_ns).min(start - now_ns)));
            }
            match self.0.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(other) => seen = other,
            }
        }
    }

    /// Charges `units` that have already happened, going into debt if need be.
    pub fn charge(&self, now_ns: u64, units: u64, pace: Pace) {
        let cost = units.min(UNITS_MAX).saturating_mul(pace.interval_ns);
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let next = seen.max(now_ns).saturating_add(cost);
            match self.0.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }
}
