//! Ends the process at the n-th point of a transition, or freezes it at the first one of a name, for the tests that do it
//! everywhere. Nothing in a release.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

use rustix::process::{Signal, getpid, kill_process};

/// Points to pass before the end; 0 is never. Of the process, since a kill is.
static LEFT: AtomicU64 = AtomicU64::new(0);

/// The point at which the process stands still until it is told to go on.
static FREEZE: OnceLock<String> = OnceLock::new();

/// Ends the process at the `nth` point from now on.
pub fn arm(nth: u64) {
    if cfg!(debug_assertions) {
        LEFT.store(nth, Ordering::SeqCst);
    }
}

/// Freezes the process at the first point with this name.
pub fn arm_freeze(name: String) {
    if cfg!(debug_assertions) {
        FREEZE.set(name).ok();
        LEFT.store(u64::MAX, Ordering::SeqCst);
    }
}

/// A point before or after a durable write or a participant's call.
pub fn reach(name: &str) {
    if !cfg!(debug_assertions) || LEFT.load(Ordering::Relaxed) == 0 {
        return;
    }
    if FREEZE.get().is_some_and(|it| it == name) {
        if LEFT.swap(0, Ordering::SeqCst) != 0 {
            eprintln!("failpoint {name}");
            // It goes on later, as a process does that was frozen with its machine.
            let _ = kill_process(getpid(), Signal::STOP);
        }
        return;
    }
    if LEFT.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) == Ok(1) {
        eprintln!("failpoint {name}");
        // Not an orderly end: what a power cut leaves is what the test is about.
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}
