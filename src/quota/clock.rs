//! The coarse monotonic clock: milliseconds of resolution for a few nanoseconds of cost. Enough for limits that
//! are counted in requests per second, and for deadlines that are checked every [`crate::quota::table::TICK`].

use std::time::Duration;

/// How far the clock may lag behind: one kernel tick at 100 Hz, the coarsest in use.
pub const RESOLUTION: Duration = Duration::from_millis(10);

/// Nanoseconds since an arbitrary start, never zero.
pub fn now_ns() -> u64 {
    // 32.32 fixed-point seconds. Not `now()`: that also stores into a static, which would make every core write
    // one cache line on every request.
    let ticks = coarsetime::Instant::now_without_cache_update().as_ticks();
    let seconds = ticks >> 32;
    let fraction = ((ticks & 0xffff_ffff) * 1_000_000_000) >> 32;
    seconds * 1_000_000_000 + fraction + 1
}

/// Milliseconds since the same start, never zero.
pub fn now_ms() -> u64 {
    now_ns() / 1_000_000 + 1
}
