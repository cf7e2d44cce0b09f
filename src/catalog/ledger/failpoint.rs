//! Ends the process at the n-th point of a transition, for the tests that kill it everywhere. Nothing in a release.

use std::sync::atomic::{AtomicU64, Ordering};

/// Points to pass before the end; 0 is never. Of the process, since a kill is.
static LEFT: AtomicU64 = AtomicU64::new(0);

/// Ends the process at the `nth` point from now on.
pub fn arm(nth: u64) {
    if cfg!(debug_assertions) {
        LEFT.store(nth, Ordering::SeqCst);
    }
}

/// A point before or after a durable write or a participant's call.
pub fn reach(name: &str) {
    if !cfg!(debug_assertions) || LEFT.load(Ordering::Relaxed) == 0 {
        return;
    }
    if LEFT.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) == Ok(1) {
        eprintln!("failpoint {name}");
        // Not an orderly end: what a power cut leaves is what the test is about.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}
