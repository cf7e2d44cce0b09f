//! What integration tests stand on: a real PostgreSQL, dynabase as a child process on free ports, tenants and their
//! tokens, raw protocol bytes. No assertions about dynabase's behaviour here, but one: no log may tell of a panic.

pub mod cable;
#[allow(dead_code)]
pub mod mongo;
pub mod neon_double;
pub mod neon_ground;
pub mod postgres;
pub mod proxy;
pub mod wire;

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// Longest wait for what has to happen, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Runs `work` to its end, from inside or outside a runtime.
pub fn block_on<T: Send>(work: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        scope.spawn(move || runtime().block_on(work)).join().expect("the work did not panic")
    })
}

/// Waits until `condition` gives something.
///
/// # Panics
/// It does not within [`PATIENCE`]; `what` says what was waited for.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until `condition` holds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    eventually(what, || condition().then_some(()));
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    dynabase::cli::dev::port::free().expect("a free port")
}
