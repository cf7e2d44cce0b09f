//! How many bytes of large requests and replies this process holds whole.
//!
//! Most large values pass in pieces. What has to be seen whole (a large command inside `MULTI`, a reply in which names
//! stand, what a client does not read while others wait behind it) takes its bytes from one cap for all clients.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes from which on something counts as large.
pub const LARGE_BYTES: usize = 1 << 20;

/// Bytes of large things held at once by the whole process: who would exceed it is refused or let go.
pub const HELD_MAX_BYTES: usize = 1 << 30;

/// The memory is the process's, so is the sum.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// What one holder counts; given back when dropped.
#[derive(Debug, Default)]
pub struct Share(usize);

impl Share {
    /// Says how much is held now; false when it grew and all together are too much.
    pub fn set(&mut self, bytes: usize) -> bool {
        let now = if bytes > LARGE_BYTES { bytes } else { 0 };
        let before = std::mem::replace(&mut self.0, now);
        if now == before {
            return true;
        }
        // Relaxed: a sum that is read for nothing but its size.
        HELD.fetch_sub(before, Ordering::Relaxed);
        let total = HELD.fetch_add(now, Ordering::Relaxed) + now;
        now < before || total <= HELD_MAX_BYTES
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        HELD.fetch_sub(self.0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_together_have_one_cap_and_give_back_what_they_took() {
        let (mut one, mut other) = (Share::default(), Share::default());
        assert!(one.set(LARGE_BYTES) && one.0 == 0, "not large");
        assert!(one.set(HELD_MAX_BYTES - LARGE_BYTES));
        assert!(!other.set(LARGE_BYTES + 1));
        assert!(other.set(0) && one.set(HELD_MAX_BYTES));
        drop(one);
        assert!(other.set(HELD_MAX_BYTES));
        drop(other);
        assert_eq!(HELD.load(Ordering::Relaxed), 0);
    }
}
