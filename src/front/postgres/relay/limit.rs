//! What a session is held to while it runs: the time of a statement, of a pause inside a transaction and of a farewell,
//! the tenant's storage, and what others want of it.
//!
//! A session has one deadline, set by [`Relay::arm`] for what is happening now. A statement that exceeds its time is
//! cancelled at the server, which ends it with an error of its own; if it does not obey, its backend is terminated.

use std::{sync::Arc, time::Duration};

use super::{Event, Relay, UNARMED};
use crate::{
    front::postgres::count_refusal,
    quota::{Stop, clock},
    refusal::{Limit, Over, Refusal},
};

/// How long a session that has to end may take to reach a safe point.
const STOP_GRACE: Duration = Duration::from_secs(60);
/// The same where the tenant is suspended or its key revoked.
const CUT_GRACE: Duration = Duration::from_secs(1);

/// How long a server may take to obey a cancel before its backend is terminated.
pub(super) const CANCEL_GRACE: Duration = Duration::from_secs(1);

impl Relay {
    pub(super) fn over_storage(&self) -> Option<Over> {
        let slot = self.session.slot();
        let used = slot.stored(self.pool.protocol());
        let policy = slot.policy();
        let max = policy.limits.sql(self.pool.protocol()).storage;
        (used >= max).then(|| Over {
            limit: Limit::Storage,
            tier: policy.tenant.tier,
            max,
            in_use: used,
            retry_after: None,
        })
    }

    /// What others want of this session, if anything.
    pub(super) fn signal(&mut self) -> Option<Event> {
        if !self.session.live().signalled() && self.stopping.is_none() {
            return None;
        }
        let live = Arc::clone(self.session.live());
        if live.take_cancel() {
            return Some(Event::Cancel);
        }
        if self.stopping.is_none()
            && let Some(stop) = live.stopped()
        {
            let grace = if matches!(stop, Stop::Suspended | Stop::Revoked) { CUT_GRACE } else { STOP_GRACE };
            let at = clock::now_ms() + u64::try_from(grace.as_millis()).unwrap_or(0);
            self.stopping = Some(Box::new((stop, at)));
            self.armed = UNARMED;
        }
        if let Some(stop) = self.stopping.as_ref().map(|it| it.0)
            && self.conversation.is_at_safe_point()
        {
            return Some(Event::Stop(stop));
        }
        live.take_due().then_some(Event::Due)
    }

    /// Sets the deadline for what is happening now, if that has changed.
    pub(super) fn arm(&mut self) {
        self.forget_timeout();
        let ledger = self.conversation.ledger();
        let busy = self.link.is_some() && !ledger.is_settled();
        // A pipeline without its Sync or half a message holds the connection as an open transaction does.
        let idle = self.link.is_none() || (ledger.is_idle() && self.tail.is_empty());
        let state = ledger.completed() << 2 | u64::from(busy) << 1 | u64::from(idle);
        if state == self.armed {
            return;
        }
        self.armed = state;
        let deadline = match self.timed_out.as_ref().map(|it| it.1) {
            Some(at) => at,
            None if busy || !idle => {
                let policy = self.session.slot().policy();
                let limits = policy.limits.sql(self.pool.protocol());
                let limit = if busy { limits.statement_timeout } else { limits.idle_in_transaction_timeout };
                // The clock may lag; nobody's statement is cut before its time.
                let whole = limit + clock::RESOLUTION;
                clock::now_ms() + u64::try_from(whole.as_millis()).unwrap_or(u64::MAX / 2)
            }
            None => u64::MAX,
        };
        self.session.live().set_deadline(deadline.min(self.stopping.as_ref().map_or(u64::MAX, |it| it.1)));
    }

    /// The statement that was cancelled for its time has ended: the next one has all of its own.
    pub(super) fn forget_timeout(&mut self) -> bool {
        let Some(errors) = self.timed_out.as_ref().map(|it| it.0) else { return false };
        let busy = self.link.is_some() && !self.conversation.ledger().is_settled();
        let over = !busy || self.conversation.errors() != errors || !self.conversation.is_timed_out();
        if over {
            self.timed_out = None;
            self.conversation.set_timed_out(None);
            self.armed = UNARMED;
        }
        over
    }

    /// Asks the server to cancel what is running, if anything is. The connection stays leased until the server has
    /// taken the request, so that it can't hit another client's statement.
    pub(super) fn cancel(&mut self) {
        let Some(link) = &self.link else { return };
        if self.cancelling.is_some() || self.conversation.ledger().is_settled() || link.key.is_empty() {
            return;
        }
        let (home, key) = (Arc::clone(&self.home), link.key.clone());
        self.cancelling = Some(tokio::spawn(async move { home.endpoint.cancel(&key).await }));
    }

    /// The deadline has passed: of a statement, of a pause inside a transaction, or of the grace of a stop.
    pub(super) async fn due(&mut self) -> Result<(), &'static str> {
        if let Some((stop, at)) = self.stopping.as_deref().copied()
            && clock::now_ms() >= at
        {
            self.cancel();
            return Err(self.stop(stop).await);
        }
        if self.forget_timeout() {
            return Ok(());
        }
        let policy = Arc::clone(&self.session.slot().policy());
        let limits = policy.limits.sql(self.pool.protocol());
        let over = |limit, max: Duration| Over {
            limit,
            tier: policy.tenant.tier,
            max: u64::try_from(max.as_millis()).unwrap_or(u64::MAX),
            in_use: u64::try_from(max.as_millis()).unwrap_or(u64::MAX),
            retry_after: None,
        };
        if self.link.is_none() || (self.conversation.ledger().is_idle() && self.tail.is_empty()) {
            return Ok(());
        }
        if self.conversation.ledger().is_settled() {
            let refusal = Refusal::OverLimit(over(Limit::IdleInTransaction, limits.idle_in_transaction_timeout));
            return Err(self.end(&refusal).await);
        }
        let refusal = over(Limit::StatementTimeout, limits.statement_timeout);
        if self.timed_out.is_none() {
            count_refusal(self.session.protocol(), &Refusal::OverLimit(refusal));
            let at = clock::now_ms() + u64::try_from(CANCEL_GRACE.as_millis()).unwrap_or(0);
            self.timed_out = Some(Box::new((self.conversation.errors(), at)));
            self.armed = UNARMED;
            self.conversation.set_timed_out(Some(refusal));
            self.cancel();
            return Ok(());
        }
        // The statement swallows cancels: its backend has to go.
        if let Some(link) = &self.link
            && let Some(pid) = link.pid()
        {
            self.upstream().terminate(pid, &self.home).await;
        }
        Err(self.end(&Refusal::OverLimit(refusal)).await)
    }
}
