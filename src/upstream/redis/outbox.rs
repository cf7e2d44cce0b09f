//! What waits to be written to one client, filled by whichever connection answers it.

use std::task::Context;

use atomic_waker::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};

/// Bytes that may wait for a client that does not read. More and it is let go: its window of outstanding
/// commands keeps an honest client far below.
pub const OUTBOX_MAX_BYTES: usize = 256 << 20;

/// Bytes of messages that may wait for a subscriber that does not read; Redis' own hard limit.
pub const MESSAGES_MAX_BYTES: usize = 32 << 20;

/// Bytes of buffer kept by a client that has nothing waiting.
const KEPT_BYTES: usize = 4 << 10;

/// The part of a client that connections to the server see.
#[derive(Debug, Default)]
pub struct Outbox {
    state: Mutex<State>,
    waker: AtomicWaker,
}

/// See [`Outbox`].
#[derive(Debug, Default)]
pub struct State {
    /// Bytes for the client.
    pub bytes: Vec<u8>,
    /// Commands sent on and not yet answered.
    pub unanswered: usize,
    /// The client is gone; nobody reads what comes.
    pub gone: bool,
    /// A connection that held state for this client was lost, or too much waited: the client must be let go.
    pub lost: bool,
    /// The largest delivery of late, in bytes, halved each time the outbox is emptied.
    pub largest: usize,
}

impl Outbox {
    /// The state, locked. Never hold it across an await.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Appends what `write` gives and counts `answered` commands as answered, then wakes the client.
    pub fn deliver(&self, answered: usize, write: impl FnOnce(&mut Vec<u8>)) {
        {
            let mut state = self.state.lock();
            state.unanswered = state.unanswered.saturating_sub(answered);
            if !state.gone && !state.lost {
                let before = state.bytes.len();
                write(&mut state.bytes);
                let grown = state.bytes.len() - before;
                state.largest = state.largest.max(grown);
                let max = if answered == 0 && state.unanswered == 0 { MESSAGES_MAX_BYTES } else { OUTBOX_MAX_BYTES };
                if state.bytes.len() > max {
                    state.lost = true;
                    state.bytes = Vec::new();
                }
            }
        }
        self.waker.wake();
    }

    /// Says that the client must be let go.
    pub fn lose(&self) {
        self.state.lock().lost = true;
        self.waker.wake();
    }

    /// Wakes the client to look again.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Registers the client's task. Call before looking at the state and going to sleep.
    pub fn register(&self, cx: &Context<'_>) {
        self.waker.register(cx.waker());
    }

    /// Takes what waits in exchange for `empty`.
    pub fn take(&self, empty: &mut Vec<u8>) {
        let mut state = self.state.lock();
        std::mem::swap(&mut state.bytes, empty);
        state.largest /= 2;
        if state.bytes.capacity() > KEPT_BYTES && state.unanswered == 0 {
            state.bytes = Vec::new();
        }
    }
}
