//! Counted places: taken by compare-and-swap against a cap that the caller reads from the present policy, given
//! back on drop.

use std::sync::Arc;

use super::atomic::{AtomicU32, Ordering};

/// A counter of taken places.
#[derive(Debug)]
pub struct Place(AtomicU32);

impl Default for Place {
    fn default() -> Self {
        Self(AtomicU32::new(0))
    }
}

impl Place {
    /// Takes a place while fewer than `cap` are taken. Never overshoots, not even for an instant: an increment
    /// that is rolled back would refuse somebody else wrongly.
    ///
    /// Ordering: `AcqRel` so that what the last holder did is visible to the next.
    pub fn take(&self, cap: u32) -> bool {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            if seen >= cap {
                return false;
            }
            match self.0.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(other) => seen = other,
            }
        }
    }

    /// Gives a taken place back.
    pub fn give(&self) {
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before > 0, "a place is given back once");
    }

    /// Places taken now.
    pub fn taken(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A taken place of something that owns [`Place`]s; gives it back when dropped.
pub struct Permit<T> {
    owner: Arc<T>,
    place: fn(&T) -> &Place,
}

impl<T> Permit<T> {
    /// Takes a place of `owner` while fewer than `cap` are taken.
    pub fn take(owner: &Arc<T>, place: fn(&T) -> &Place, cap: u32) -> Option<Self> {
        place(owner).take(cap).then(|| Self { owner: Arc::clone(owner), place })
    }
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        (self.place)(&self.owner).give();
    }
}

impl<T> std::fmt::Debug for Permit<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Permit")
    }
}
