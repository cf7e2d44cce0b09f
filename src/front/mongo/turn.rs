//! Turns at the server: a tenant's tier says how many of its requests run at a time; the others wait in order.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{
    quota::{Permit, Slot},
    refusal::{Limit, Over},
    tenant::Protocol,
    usage::Meter,
};

/// How often the waiting look by themselves whether there are more places: a tier that was raised tells nobody.
const LOOK: Duration = Duration::from_millis(100);

/// A tenant's queue. No longer than its client sockets, each of which waits for one turn at most.
#[derive(Debug)]
pub struct Turns {
    slot: Arc<Slot>,
    waiting: Mutex<VecDeque<oneshot::Sender<Turn>>>,
}

/// A turn: one of the tenant's connections. The next one waiting gets it when it is dropped.
#[derive(Debug)]
pub struct Turn {
    permit: Option<Permit<Slot>>,
    turns: Arc<Turns>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.permit.take().is_some() {
            self.turns.pass();
        }
    }
}

impl Turns {
    /// The queue for a tenant's places.
    pub fn new(slot: Arc<Slot>) -> Arc<Self> {
        Arc::new(Self { slot, waiting: Mutex::default() })
    }

    /// Waits for a turn, in order, as long as the tier says.
    ///
    /// # Errors
    /// The limit on connections.
    ///
    /// # Cancel safety
    /// Dropping it gives up the place in the queue, or passes the turn on.
    pub async fn take(self: &Arc<Self>, meter: &Meter) -> Result<Turn, Over> {
        let mut asked = {
            let mut waiting = self.waiting.lock();
            if waiting.is_empty()
                && let Some(turn) = self.free()
            {
                return Ok(turn);
            }
            let (give, asked) = oneshot::channel();
            waiting.push_back(give);
            asked
        };
        let began = Instant::now();
        let policy = Arc::clone(&self.slot.policy());
        let patience = tokio::time::sleep(policy.limits.mongodb.queue_timeout);
        let mut patience = std::pin::pin!(patience);
        let given = loop {
            tokio::select! {
                biased;
                given = &mut asked => break given.ok(),
                () = &mut patience => break None,
                () = tokio::time::sleep(LOOK) => self.pass(),
            }
        };
        let waited = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        meter.waited_us.fetch_add(waited, Ordering::Relaxed);
        given.ok_or_else(|| Over {
            limit: Limit::Connections,
            tier: policy.tenant.tier,
            max: policy.limits.mongodb.connections.into(),
            in_use: self.slot.connections(Protocol::Mongodb).into(),
            retry_after: None,
        })
    }

    fn free(self: &Arc<Self>) -> Option<Turn> {
        let permit = self.slot.connection(Protocol::Mongodb)?;
        Some(Turn { permit: Some(permit), turns: Arc::clone(self) })
    }

    /// Hands free places to those who wait. Those who have gone are passed over without a turn's own drop, which would
    /// come back here.
    fn pass(self: &Arc<Self>) {
        loop {
            let (next, turn) = {
                let mut waiting = self.waiting.lock();
                while waiting.front().is_some_and(oneshot::Sender::is_closed) {
                    waiting.pop_front();
                }
                if waiting.is_empty() {
                    return;
                }
                let Some(turn) = self.free() else { return };
                (waiting.pop_front(), turn)
            };
            if let Some(Err(mut left)) = next.map(|next| next.send(turn)) {
                drop(left.permit.take());
            }
        }
    }
}
