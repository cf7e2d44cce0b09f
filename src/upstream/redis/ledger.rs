//! How many keys one logical database of a tenant can hold at most right now, without asking for each write.
//!
//! Every command that may create keys reserves them before it is sent, and they count as done once it is answered.
//! When the server is asked for the true number, creations that were done before the question are in the answer,
//! all others are added to it: `bound = counted + (reserved - done before)`. So the bound is never below the truth
//! (for this process), and a command is let through without a check only while the bound is below the cap.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

/// Keys that a script may create as far as we know before it ran: the bound is unknown until the next count.
pub const UNKNOWN: u64 = 1 << 20;

/// The floor of a database that was never counted: above any cap, far from overflow.
const ANY: i64 = 1 << 50;

/// See the module. `SeqCst` nowhere: every count is confirmed through the server, whose answers order it.
#[derive(Debug)]
pub struct Ledger {
    reserved: AtomicU64,
    done: AtomicU64,
    /// `counted - done before`; the bound is this plus `reserved`.
    floor: AtomicI64,
    keys: AtomicU64,
    counting: AtomicBool,
    counted_ms: AtomicU64,
    /// When a count was last known, in coarse milliseconds; only where counting is dear.
    known_ms: AtomicU64,
    /// Something that may have deleted keys was sent on since.
    shrunk: AtomicBool,
    /// Bytes written since the last memory sample.
    pub written: AtomicU64,
    /// Bytes of commands that are sent in pieces and not yet complete: no sample sees them.
    pub flowing: AtomicU64,
    /// Raised when the server turns out to have forgotten a script.
    pub scripts_lost: AtomicU64,
    /// Set by commands whose result may be far larger than their request.
    pub grown: AtomicBool,
}

impl Ledger {
    /// A ledger of a database that holds `keys` keys.
    pub fn new(keys: u64) -> Self {
        Self {
            reserved: AtomicU64::new(0),
            done: AtomicU64::new(0),
            floor: AtomicI64::new(i64::try_from(keys).unwrap_or(i64::MAX / 2)),
            keys: AtomicU64::new(keys),
            counting: AtomicBool::new(false),
            counted_ms: AtomicU64::new(0),
            known_ms: AtomicU64::new(0),
            shrunk: AtomicBool::new(true),
            written: AtomicU64::new(0),
            flowing: AtomicU64::new(0),
            scripts_lost: AtomicU64::new(0),
            grown: AtomicBool::new(false),
        }
    }

    /// A ledger of a database that nobody has counted yet: it may hold any number.
    pub fn unknown() -> Self {
        let ledger = Self::new(0);
        ledger.floor.store(ANY, Ordering::Release);
        ledger
    }

    /// Whether a count that was made at the earliest `fresh_ms` ago still holds, as far as this process knows.
    pub fn is_fresh(&self, now_ms: u64, fresh_ms: u64) -> bool {
        !self.shrunk.load(Ordering::Acquire) && now_ms < self.known_ms.load(Ordering::Acquire).saturating_add(fresh_ms)
    }

    /// Something that may delete keys is sent on.
    pub fn shrink(&self) {
        self.shrunk.store(true, Ordering::Release);
    }

    /// A count by a walk begins: gives what is reserved and what of it is done. What shrinks the database from now on
    /// makes it stale.
    pub fn begin(&self) -> (u64, u64) {
        self.shrunk.store(false, Ordering::Release);
        let mark = self.mark();
        (self.reserved.load(Ordering::Acquire), mark)
    }

    /// The answer to a count by a walk that began at `now_ms` with `mark`, when `reserved` keys were reserved, `own` of
    /// them in a transaction that waits for the walk. What was on its way or was begun meanwhile may be in the answer
    /// and in what is added to it: then the bound is too high, and not to be relied on. Gives whether it is exact.
    pub fn known(&self, keys: u64, (reserved, mark): (u64, u64), own: u64, now_ms: u64) -> bool {
        self.counted(keys, mark);
        let exact = reserved.saturating_sub(mark) <= own && self.reserved.load(Ordering::Acquire) == reserved;
        if exact {
            self.known_ms.store(now_ms, Ordering::Release);
        } else {
            self.shrink();
        }
        exact
    }

    /// What is reserved and not yet done.
    pub fn under_way(&self) -> u64 {
        let done = self.done.load(Ordering::Acquire);
        self.reserved.load(Ordering::Acquire).saturating_sub(done)
    }

    /// A command that had reserved keys, and is about to be done, turned out to create `fewer` than that. Before
    /// [`Self::done`]: a count that includes the command replaces this, and one that does not must not lower the bound
    /// after it.
    pub fn learned(&self, fewer: i64) {
        self.floor.fetch_sub(fewer, Ordering::AcqRel);
    }

    /// Reserves `keys` creations and gives the bound with them. They stay reserved until [`Self::done`].
    #[inline]
    pub fn reserve(&self, keys: u64) -> u64 {
        let reserved = self.reserved.fetch_add(keys, Ordering::AcqRel) + keys;
        self.at(reserved)
    }

    /// The bound.
    pub fn bound(&self) -> u64 {
        self.at(self.reserved.load(Ordering::Acquire))
    }

    fn at(&self, reserved: u64) -> u64 {
        let reserved = i64::try_from(reserved).unwrap_or(i64::MAX / 2);
        u64::try_from(self.floor.load(Ordering::Acquire).saturating_add(reserved)).unwrap_or(0)
    }

    /// The number of keys when last counted.
    pub fn keys(&self) -> u64 {
        self.keys.load(Ordering::Relaxed)
    }

    /// Commands that had reserved `keys` are answered.
    pub fn done(&self, keys: u64) {
        self.done.fetch_add(keys, Ordering::AcqRel);
    }

    /// Whether it is time to count: no count is under way and the last is `pause_ms` old. If so the caller must ask
    /// the server and bring the answer to [`Self::counted`] with the mark given here.
    pub fn begin_count(&self, now_ms: u64, pause_ms: u64) -> Option<u64> {
        let last = self.counted_ms.load(Ordering::Relaxed);
        if now_ms < last.saturating_add(pause_ms) || self.counting.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.counted_ms.store(now_ms, Ordering::Relaxed);
        Some(self.done.load(Ordering::Acquire))
    }

    /// The mark for a count that nobody else makes.
    pub fn mark(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// Takes the server's answer to a count that began with `mark`.
    pub fn counted(&self, keys: u64, mark: u64) {
        let floor = i64::try_from(keys).unwrap_or(i64::MAX / 2) - i64::try_from(mark).unwrap_or(i64::MAX / 2);
        self.floor.store(floor, Ordering::Release);
        self.keys.store(keys, Ordering::Relaxed);
        self.counting.store(false, Ordering::Release);
    }

    /// A count got no answer.
    pub fn not_counted(&self) {
        self.counting.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_never_below_the_truth_whenever_the_count_was_taken() {
        let ledger = Ledger::new(10);
        assert_eq!(ledger.reserve(3), 13);
        ledger.done(1);
        // Asked now: one is done, two are on their way; the server may answer 11, 12 or 13.
        let mark = ledger.begin_count(1_000, 50).expect("none under way");
        assert_eq!(ledger.begin_count(2_000, 50), None, "one count at a time");
        ledger.reserve(1);
        ledger.done(2);
        for answer in [11, 12, 13] {
            ledger.counted(answer, mark);
            assert!(ledger.bound() >= 14, "{answer}");
        }
        ledger.done(1);
        ledger.counted(14, ledger.mark());
        assert_eq!(ledger.bound(), 14);
    }

    #[test]
    fn an_unknown_database_is_full_until_it_is_counted() {
        let ledger = Ledger::unknown();
        assert!(ledger.reserve(1) > 1 << 40 && !ledger.is_fresh(10, 1000));
        let begun = ledger.begin();
        assert!(!ledger.known(5, begun, 0, 100) && !ledger.is_fresh(101, 1000), "one was on its way");
        let begun = ledger.begin();
        ledger.reserve(3);
        assert!(!ledger.known(5, begun, 1, 100), "three were begun meanwhile");
        ledger.done(3);
        let begun = ledger.begin();
        assert!(ledger.known(5, begun, 1, 100), "the one that is on its way waits for this");
        assert_eq!(ledger.bound(), 6);
        assert!(ledger.is_fresh(1099, 1000) && !ledger.is_fresh(1100, 1000));
        ledger.learned(1);
        ledger.done(1);
        assert_eq!(ledger.bound(), 5, "it overwrote a key");
        ledger.shrink();
        assert!(!ledger.is_fresh(101, 1000));
    }

    #[test]
    fn deletions_lower_the_bound_at_the_next_count() {
        let ledger = Ledger::new(1000);
        ledger.reserve(1);
        ledger.done(1);
        ledger.counted(3, ledger.mark());
        assert_eq!(ledger.bound(), 3);
    }
}
