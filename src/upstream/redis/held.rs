//! How many bytes of large requests and replies this process holds whole.
//!
//! Most large values pass in pieces. What has to be seen whole (a large command inside `MULTI`, a reply in which names
//! stand, what a client does not read while others wait behind it) takes its bytes from one cap for each tenant, and
//! one for all.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Bytes from which on something counts as large.
pub const LARGE_BYTES: usize = 1 << 20;

/// Bytes of large things held at once for one tenant: who would exceed it is refused or let go. A reply of a million
/// keys fits, and four tenants that try can't yet take what there is.
pub const TENANT_MAX_BYTES: usize = 256 << 20;

/// The same for the whole process.
pub const HELD_MAX_BYTES: usize = 1 << 30;

/// The memory is the process's, so is the sum.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// What is held for one tenant.
#[derive(Debug, Default)]
pub struct Pool(AtomicUsize);

/// What one holder counts; given back when dropped.
#[derive(Debug, Default)]
pub struct Share {
    bytes: usize,
    /// Whose it is, once that is known.
    pool: Option<Arc<Pool>>,
}

impl Share {
    /// Counts for a tenant from now on.
    pub fn join(&mut self, pool: &Arc<Pool>) {
        let bytes = self.bytes;
        *self = Self { bytes: 0, pool: Some(Arc::clone(pool)) };
        self.count(bytes);
    }

    /// Says how much is held now; false when it grew and all together are too much.
    pub fn set(&mut self, bytes: usize) -> bool {
        let now = if bytes > LARGE_BYTES { bytes } else { 0 };
        let before = self.bytes;
        if now == before {
            return true;
        }
        let (pool, all) = self.count(now);
        now < before || pool <= TENANT_MAX_BYTES && all <= HELD_MAX_BYTES
    }

    /// Counts so much; gives what the tenant and the process hold with it.
    fn count(&mut self, now: usize) -> (usize, usize) {
        let before = std::mem::replace(&mut self.bytes, now);
        // Relaxed: sums that are read for nothing but their size.
        let change = |sum: &AtomicUsize| {
            sum.fetch_sub(before, Ordering::Relaxed);
            sum.fetch_add(now, Ordering::Relaxed) + now
        };
        (self.pool.as_ref().map_or(0, |pool| change(&pool.0)), change(&HELD))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.count(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_and_all_together_have_a_cap_and_give_back_what_they_took() {
        let pools: Vec<Arc<Pool>> = (0..5).map(|_| Arc::default()).collect();
        let mut shares: Vec<Share> = pools
            .iter()
            .map(|pool| {
                let mut share = Share::default();
                share.join(pool);
                share
            })
            .collect();
        assert!(shares[0].set(LARGE_BYTES) && shares[0].bytes == 0, "not large");
        assert!(shares[0].set(TENANT_MAX_BYTES - 2 * LARGE_BYTES));
        let mut second = Share::default();
        assert!(second.set(2 * LARGE_BYTES + 1), "nobody's yet");
        second.join(&pools[0]);
        assert!(!second.set(2 * LARGE_BYTES + 2), "the tenant has too much");
        assert!(second.set(2 * LARGE_BYTES), "less is always taken");
        assert!(shares[1..4].iter_mut().all(|share| share.set(TENANT_MAX_BYTES)), "others have their own");
        assert!(!shares[4].set(TENANT_MAX_BYTES), "all have too much");
        drop(second);
        drop(shares);
        assert_eq!(HELD.load(Ordering::Relaxed), 0);
        assert!(pools.iter().all(|pool| pool.0.load(Ordering::Relaxed) == 0));
    }
}
