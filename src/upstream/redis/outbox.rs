//! What waits to be written to one client, filled by whichever connection answers it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Context,
};

use atomic_waker::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};

use super::held::{LARGE_BYTES, Pool, Share, TENANT_MAX_BYTES};

/// Bytes waiting for a client over which the connection that answers it stops reading, if it can.
pub const BEHIND_BYTES: usize = 1 << 20;

/// Bytes that may ever wait for one client: the largest reply that is passed on whole.
const OUTBOX_MAX_BYTES: usize = TENANT_MAX_BYTES;

/// Bytes of messages that may wait for a subscriber that does not read; Redis' own hard limit.
const MESSAGES_MAX_BYTES: usize = 32 << 20;

/// How long a client that had a large value is expected to have another, in milliseconds.
const WIDE_MS: u64 = 10_000;

/// Bytes of buffer kept by a client that has nothing waiting.
const KEPT_BYTES: usize = 4 << 10;

/// The part of a client that connections to the server see.
#[derive(Debug, Default)]
pub struct Outbox {
    state: Mutex<State>,
    waker: AtomicWaker,
    /// More than [`BEHIND_BYTES`] wait.
    behind: AtomicBool,
    /// The connection that waits for the client to take some.
    feeder: AtomicWaker,
    /// Until when large values are expected, in coarse milliseconds; 0 is never.
    wide_ms: AtomicU64,
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
    /// Bytes last taken, which the client is still writing.
    taken: usize,
    /// What `bytes` and `taken` count among all that is large.
    share: Share,
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
                let len = state.bytes.len();
                state.largest = state.largest.max(len - before);
                if len > BEHIND_BYTES {
                    self.behind.store(true, Ordering::Release);
                }
                let held = len + state.taken;
                let max = if answered == 0 && state.unanswered == 0 { MESSAGES_MAX_BYTES } else { OUTBOX_MAX_BYTES };
                if held > LARGE_BYTES && (!state.share.set(held) || len > max) {
                    self.end(&mut state);
                }
            }
        }
        self.waker.wake();
    }

    /// Lets the client go; what comes for it is dropped.
    fn end(&self, state: &mut State) {
        state.lost = true;
        state.bytes = Vec::new();
        state.share.set(0);
        state.taken = 0;
        self.behind.store(false, Ordering::Release);
        self.feeder.wake();
    }

    /// Says that the client must be let go.
    pub fn lose(&self) {
        self.end(&mut self.state.lock());
        self.waker.wake();
    }

    /// The client is gone.
    pub fn leave(&self) {
        let mut state = self.state.lock();
        state.gone = true;
        self.end(&mut state);
    }

    /// Bytes that wait for the client or are being written to it, at most.
    pub fn waiting(&self) -> usize {
        let state = self.state.lock();
        state.bytes.len() + state.taken
    }

    /// Counts what waits for a tenant from now on.
    pub fn join(&self, pool: &Arc<Pool>) {
        self.state.lock().share.join(pool);
    }

    /// Whether so much waits that nothing more should be read for the client; if so `cx` is woken when it took it.
    pub fn is_behind(&self, cx: &Context<'_>) -> bool {
        if !self.behind.load(Ordering::Acquire) {
            return false;
        }
        self.feeder.register(cx.waker());
        self.behind.load(Ordering::Acquire)
    }

    /// Large values were there: more are expected for a while.
    pub fn widen(&self, now_ms: u64) {
        self.wide_ms.store(now_ms.saturating_add(WIDE_MS), Ordering::Relaxed);
    }

    /// Whether large values are expected. Relaxed: a guess.
    pub fn is_wide(&self, now_ms: impl FnOnce() -> u64) -> bool {
        let until = self.wide_ms.load(Ordering::Relaxed);
        until > 0 && now_ms() < until
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
        state.taken = empty.len();
        state.share.set(empty.len());
        if empty.len() > BEHIND_BYTES {
            self.behind.store(false, Ordering::Release);
            drop(state);
            self.feeder.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_take_what_waits_is_behind_until_it_does_or_leaves() {
        let cx = Context::from_waker(std::task::Waker::noop());
        let outbox = Outbox::default();
        outbox.deliver(0, |out| out.resize(BEHIND_BYTES, 0));
        assert!(!outbox.is_behind(&cx));
        outbox.deliver(0, |out| out.push(0));
        assert!(outbox.is_behind(&cx));
        let mut taken = Vec::new();
        outbox.take(&mut taken);
        assert!(!outbox.is_behind(&cx) && taken.len() > BEHIND_BYTES);
        outbox.deliver(0, |out| out.resize(BEHIND_BYTES + 1, 0));
        outbox.leave();
        assert!(!outbox.is_behind(&cx) && outbox.lock().bytes.is_empty());
        outbox.deliver(0, |out| out.push(0));
        assert!(outbox.lock().bytes.is_empty());
    }

    #[test]
    fn large_values_are_expected_for_a_while() {
        let outbox = Outbox::default();
        assert!(!outbox.is_wide(|| 5));
        outbox.widen(5);
        assert!(outbox.is_wide(|| 5 + WIDE_MS - 1) && !outbox.is_wide(|| 5 + WIDE_MS));
    }
}
