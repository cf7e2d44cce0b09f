//! Where a tenant's requests stand still for a moment while its documents change their place.
//!
//! Every request is inside from before its way is chosen until its answer has been read; an open transaction is inside
//! from its first statement to its end, and its statements pass. Whoever holds the threshold and finds nobody inside
//! knows that no request of this process is under way, and that the next one is rewritten after it is opened again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use tokio::sync::Notify;

use crate::{
    quota::clock,
    session::Gate,
    tenant::OrgId,
    upstream::mongo::{Error, STALE, Upstream},
    wire::mongo::bson::{self, Document},
};

/// Longest wait of one request; a move takes its pause of some tenths of a second once.
const PATIENCE: Duration = Duration::from_secs(20);

/// Between two looks at the notices; while there is one, and while there is none.
const LOOK_HELD: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_millis(200);

/// Between two signs of life.
const BEAT_EVERY_MS: u64 = 1_000;

/// Whether a request is a further one of a transaction.
pub fn continues(body: Document<'_>) -> bool {
    let is = |key, wanted| {
        body.get(key).ok().flatten().is_some_and(|it: bson::Element<'_>| it.bool().unwrap_or(false) == wanted)
    };
    is("autocommit", false) && !is("startTransaction", true)
}

/// One tenant's.
#[derive(Debug, Default)]
pub struct Threshold {
    held: AtomicBool,
    inside: AtomicUsize,
    opened: Notify,
}

/// Somebody inside.
#[derive(Debug)]
pub struct Inside(Arc<Threshold>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Threshold {
    /// Goes in, held or not: what is inside already goes on.
    pub fn pass(self: &Arc<Self>) -> Inside {
        self.inside.fetch_add(1, Ordering::SeqCst);
        Inside(Arc::clone(self))
    }

    /// Goes in as soon as it is not held.
    ///
    /// # Cancel safety
    /// Dropping it leaves nobody inside.
    pub async fn enter(self: &Arc<Self>) -> Inside {
        loop {
            // First in, then looking: who holds it looks in the other order, and one of both sees the other.
            let inside = self.pass();
            if !self.held.load(Ordering::SeqCst) {
                return inside;
            }
            drop(inside);
            let mut opened = std::pin::pin!(self.opened.notified());
            opened.as_mut().enable();
            if self.held.load(Ordering::SeqCst) {
                opened.await;
            }
        }
    }

    /// Lets nobody new in. Says whether nobody is inside.
    fn hold(&self) -> bool {
        self.held.store(true, Ordering::SeqCst);
        self.inside.load(Ordering::SeqCst) == 0
    }

    fn open(&self) {
        if self.held.swap(false, Ordering::SeqCst) {
            self.opened.notify_waiters();
        }
    }
}

/// Every tenant's of this process.
#[derive(Debug, Default)]
pub struct Thresholds {
    all: DashMap<OrgId, Arc<Threshold>>,
    /// Whether notices are followed: not by a front that stands alone in a test.
    follows: AtomicBool,
    /// When the notices were read last, in coarse milliseconds; 0 before the first time.
    read_ms: AtomicU64,
}

impl Thresholds {
    /// A tenant's.
    pub fn of(&self, org: &OrgId) -> Arc<Threshold> {
        Arc::clone(&self.all.entry(org.clone()).or_default())
    }

    /// From now on nobody is let in while the notices are not read.
    pub fn follow(&self) {
        self.follows.store(true, Ordering::Release);
    }

    /// Goes in; `None` when it took too long.
    ///
    /// # Cancel safety
    /// As [`Threshold::enter`].
    pub async fn enter(&self, threshold: &Arc<Threshold>) -> Option<Inside> {
        let inside = async {
            while !self.is_current() {
                tokio::time::sleep(LOOK_HELD).await;
            }
            threshold.enter().await
        };
        tokio::time::timeout(PATIENCE, inside).await.ok()
    }

    fn is_current(&self) -> bool {
        if !self.follows.load(Ordering::Acquire) {
            return true;
        }
        let read = self.read_ms.load(Ordering::Acquire);
        read != 0 && u128::from(clock::now_ms().saturating_sub(read)) < STALE.as_millis()
    }

    /// Follows the notices until it is dropped.
    pub async fn run(&self, upstream: &Upstream, gate: &Gate) {
        let mut told: Vec<(OrgId, i64)> = Vec::new();
        let mut beat_ms = 0;
        loop {
            let pause = match self.look(upstream, gate, &mut told, &mut beat_ms).await {
                Ok(true) => LOOK_HELD,
                Ok(false) => LOOK,
                Err(error) => {
                    tracing::debug!(%error, "notices of moves can't be read");
                    LOOK
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Reads the notices once and complies. Says whether there is one.
    async fn look(
        &self,
        upstream: &Upstream,
        gate: &Gate,
        told: &mut Vec<(OrgId, i64)>,
        beat_ms: &mut u64,
    ) -> Result<bool, Error> {
        let now = clock::now_ms().max(1);
        if *beat_ms == 0 {
            // Known before anybody is let in, so that nobody moves anything without asking.
            upstream.beat(told).await?;
            *beat_ms = now;
        }
        let holds = upstream.holds().await?;
        let mut acks = Vec::new();
        for hold in &holds {
            let threshold = self.of(&hold.org);
            let complied = match hold.until {
                None => threshold.hold(),
                // A policy of before would lead to where the documents are no longer.
                Some(epoch) if gate.epoch(&hold.org).is_none_or(|known| known >= epoch) => {
                    threshold.open();
                    true
                }
                Some(_) => {
                    threshold.hold();
                    false
                }
            };
            if complied {
                acks.push((hold.org.clone(), hold.ack()));
            }
        }
        self.all.retain(|org, threshold| {
            if !holds.iter().any(|hold| hold.org == *org) {
                threshold.open();
                return Arc::strong_count(threshold) > 1;
            }
            true
        });
        self.read_ms.store(now, Ordering::Release);
        if acks != *told || now.saturating_sub(*beat_ms) >= BEAT_EVERY_MS {
            upstream.beat(&acks).await?;
            *told = acks;
            *beat_ms = now;
        }
        Ok(!holds.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_comes_waits_who_is_inside_goes_on() {
        let threshold = Arc::new(Threshold::default());
        let inside = threshold.enter().await;
        assert!(!threshold.hold(), "somebody is inside");
        let coming = tokio::spawn({
            let threshold = Arc::clone(&threshold);
            async move { threshold.enter().await }
        });
        tokio::task::yield_now().await;
        assert!(!coming.is_finished());
        drop(threshold.pass());
        drop(inside);
        assert!(threshold.hold(), "nobody is inside, and who waits is not");
        threshold.open();
        drop(coming.await.expect("it goes in"));
        assert_eq!(threshold.inside.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn without_the_notices_nobody_is_let_in() {
        let thresholds = Thresholds::default();
        let threshold = thresholds.of(&OrgId::parse("acme").expect("an id"));
        assert!(thresholds.enter(&threshold).await.is_some());
        thresholds.follow();
        assert!(!thresholds.is_current());
        let coming = tokio::spawn(async move {
            let inside = thresholds.enter(&threshold).await;
            (inside.is_some(), thresholds)
        });
        tokio::task::yield_now().await;
        assert!(!coming.is_finished());
        coming.abort();
    }
}
