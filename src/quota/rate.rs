//! Rate arithmetic: GCRA on one atomic. The state is a time, so it keeps its meaning when the rate changes.

use std::time::Duration;

use super::atomic::{AtomicU64, Ordering};

/// Most units one decision may ask for; keeps the products below overflow.
pub const UNITS_MAX: u64 = 1 << 20;

/// Longest debt that charges after the fact can run up beyond a burst. A pipeline of a million statements has run by
/// the time it is counted; at 50 per second it would shut its tenant out for five hours.
pub const DEBT_MAX: Duration = Duration::from_nanos(DEBT_MAX_NS);
const DEBT_MAX_NS: u64 = 60 * 1_000_000_000;

/// Longest interval between two units, some four seconds (15 a minute): it shares one word with the burst.
const INTERVAL_MAX_NS: u64 = u32::MAX as u64;

/// A rate as the limiter needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Nanoseconds per unit.
    pub interval_ns: u64,
    /// How far ahead of now the arrival time may run: `burst` units' worth of nanoseconds.
    pub tolerance_ns: u64,
}

impl Pace {
    /// One unit every `interval_ns` sustained, `burst` at once; both at least 1.
    pub fn new(interval_ns: u64, burst: u32) -> Self {
        let interval_ns = interval_ns.clamp(1, INTERVAL_MAX_NS);
        Self { interval_ns, tolerance_ns: interval_ns * u64::from(burst.max(1)) }
    }
}

/// The pace in force, in one word: read by every decision, where loading the whole policy would cost three times the
/// decision itself, and never half of one pace and half of another.
#[derive(Debug)]
pub struct Present(AtomicU64);

impl Present {
    /// Starts with a pace, as [`Pace::new`].
    pub fn new(interval_ns: u64, burst: u32) -> Self {
        Self(AtomicU64::new(Self::pack(interval_ns, burst)))
    }

    /// Replaces the pace.
    pub fn set(&self, interval_ns: u64, burst: u32) {
        self.0.store(Self::pack(interval_ns, burst), Ordering::Relaxed);
    }

    /// The pace. `Relaxed`: it orders nothing but itself.
    pub fn pace(&self) -> Pace {
        let word = self.0.load(Ordering::Relaxed);
        let interval_ns = word >> 32;
        Pace { interval_ns, tolerance_ns: interval_ns * (word & u64::from(u32::MAX)) }
    }

    /// The interval, within 32 bits, above the burst.
    fn pack(interval_ns: u64, burst: u32) -> u64 {
        Pace::new(interval_ns, burst).interval_ns << 32 | u64::from(burst.max(1))
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
    /// More units than a whole burst are admitted when nothing is owed, or they never could be.
    ///
    /// Ordering: the atomic orders nothing but itself, so `Relaxed` suffices.
    pub fn admit(&self, now_ns: u64, units: u64, pace: Pace) -> Result<(), Duration> {
        let cost = units.min(UNITS_MAX).saturating_mul(pace.interval_ns);
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let start = seen.max(now_ns);
            let next = start.saturating_add(cost);
            let ahead = next - now_ns;
            if ahead > pace.tolerance_ns && start > now_ns {
                return Err(Duration::from_nanos((ahead - pace.tolerance_ns).min(start - now_ns)));
            }
            match self.0.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(other) => seen = other,
            }
        }
    }

    /// Charges `units` that have already happened, going into debt if need be: at most [`DEBT_MAX`] beyond a burst.
    pub fn charge(&self, now_ns: u64, units: u64, pace: Pace) {
        let cost = units.min(UNITS_MAX).saturating_mul(pace.interval_ns);
        let furthest = now_ns.saturating_add(pace.tolerance_ns).saturating_add(DEBT_MAX_NS);
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let start = seen.max(now_ns);
            let next = start.saturating_add(cost).min(furthest.max(start));
            match self.0.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }

    /// Cuts what is owed to one burst of `pace`: a debt made under a slower pace would outlast an upgrade.
    pub fn forgive(&self, now_ns: u64, pace: Pace) {
        self.0.fetch_min(now_ns.saturating_add(pace.tolerance_ns), Ordering::Relaxed);
    }

    /// How long, from `now_ns` on, until nothing is owed.
    pub fn owed(&self, now_ns: u64) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed).saturating_sub(now_ns))
    }
}
