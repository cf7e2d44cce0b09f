//! A live session as others see it: something that can be told to stop, that has a deadline, and that sleeps
//! most of the time.
//!
//! The session's task reads one atomic per wake-up; whoever signals sets a bit and wakes exactly that task.

use std::task::Context;

use super::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicWaker, Ordering};
use crate::tenant::directory::KeyHash;

/// Why a live session has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stop {
    /// Its token expired.
    Expired = 1,
    /// Its service key, or the key that signed its token, was revoked.
    Revoked = 2,
    /// Its tenant is suspended or being deleted.
    Suspended = 3,
    /// The cap on client sockets shrank below what is open.
    Shed = 4,
    /// The process is draining.
    Draining = 5,
}

const STOP_MASK: u32 = 0b111;
/// Only a hint to look at the deadline, which alone says whether it has passed: see [`FIRED`].
const DUE: u32 = 1 << 3;
const CANCEL: u32 = 1 << 4;

/// The deadline that has passed and whose news was not taken yet. One atomic holds both the deadline and its having
/// passed, so that a new deadline can neither be lost to a tick that saw the old one nor inherit its news.
const FIRED: u64 = 0;
const NO_DEADLINE: u64 = u64::MAX;

/// One live session.
#[derive(Debug)]
pub struct Live {
    /// Unique in this process.
    pub id: u64,
    /// When it was admitted, on [`super::clock::now_ms`].
    pub opened_ms: u64,
    /// When its credential ends, on [`super::clock::now_ms`]; `u64::MAX` is never. Renewed by a re-authentication.
    pub expires_ms: AtomicU64,
    /// The service key it came with.
    pub service_key: Option<KeyHash>,
    /// The signing key of its token.
    pub signing_key: Option<std::sync::Arc<str>>,
    signals: AtomicU32,
    deadline_ms: AtomicU64,
    idle: AtomicBool,
    waker: AtomicWaker,
}

impl Live {
    /// A session that starts idle.
    pub fn new(
        id: u64,
        opened_ms: u64,
        expires_ms: u64,
        service_key: Option<KeyHash>,
        signing_key: Option<std::sync::Arc<str>>,
    ) -> Self {
        Self {
            id,
            opened_ms,
            expires_ms: AtomicU64::new(expires_ms),
            service_key,
            signing_key,
            signals: AtomicU32::new(0),
            deadline_ms: AtomicU64::new(NO_DEADLINE),
            idle: AtomicBool::new(true),
            waker: AtomicWaker::new(),
        }
    }

    /// Tells the session to stop at its next safe point. The first reason stays.
    pub fn stop(&self, reason: Stop) {
        let set = self.signals.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
            (bits & STOP_MASK == 0).then_some(bits | reason as u32)
        });
        if set.is_ok() {
            self.waker.wake();
        }
    }

    /// Asks the session to cancel what it is running.
    pub fn cancel(&self) {
        self.signals.fetch_or(CANCEL, Ordering::AcqRel);
        self.waker.wake();
    }

    /// Why the session has to stop, if it has to.
    pub fn stopped(&self) -> Option<Stop> {
        match self.signals.load(Ordering::Acquire) & STOP_MASK {
            1 => Some(Stop::Expired),
            2 => Some(Stop::Revoked),
            3 => Some(Stop::Suspended),
            4 => Some(Stop::Shed),
            5 => Some(Stop::Draining),
            _ => None,
        }
    }

    /// Takes the request to cancel, if there is one.
    pub fn take_cancel(&self) -> bool {
        self.signals.load(Ordering::Relaxed) & CANCEL != 0
            && self.signals.fetch_and(!CANCEL, Ordering::AcqRel) & CANCEL != 0
    }

    /// Takes the news that the deadline has passed, if it has. For the session's own task only.
    pub fn take_due(&self) -> bool {
        if self.signals.load(Ordering::Relaxed) & DUE == 0 {
            return false;
        }
        self.signals.fetch_and(!DUE, Ordering::AcqRel);
        self.deadline_ms.compare_exchange(FIRED, NO_DEADLINE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Whether any signal is set: the one load that a busy session pays per wake-up. It stays so until everything was
    /// taken ([`Self::take_cancel`], [`Self::take_due`]) and may turn out to be nothing: an outdated deadline.
    pub fn signalled(&self) -> bool {
        self.signals.load(Ordering::Acquire) != 0
    }

    /// Sets the deadline (on [`super::clock::now_ms`]); `u64::MAX` is none. News of an earlier one is dropped. For the
    /// session's own task only.
    pub fn set_deadline(&self, at_ms: u64) {
        self.deadline_ms.store(at_ms.max(FIRED + 1), Ordering::Release);
    }

    /// Says whether the session is at a safe point with nothing running; idle sessions are shed first.
    pub fn set_idle(&self, idle: bool) {
        self.idle.store(idle, Ordering::Relaxed);
    }

    /// Whether the session said that nothing is running.
    pub fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Relaxed)
    }

    /// Registers the task to wake on a signal. Call before going to sleep, then look at [`Self::signalled`].
    pub fn register(&self, cx: &Context<'_>) {
        self.waker.register(cx.waker());
    }

    /// Called by the table's ticker: passes on an expired credential and a passed deadline.
    pub fn tick(&self, now_ms: u64) {
        if now_ms >= self.expires_ms.load(Ordering::Relaxed) {
            self.stop(Stop::Expired);
        }
        let deadline = self.deadline_ms.load(Ordering::Relaxed);
        if deadline != FIRED
            && now_ms >= deadline
            && self.deadline_ms.compare_exchange(deadline, FIRED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        {
            self.signals.fetch_or(DUE, Ordering::AcqRel);
            self.waker.wake();
        }
    }
}
