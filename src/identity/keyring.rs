//! The key set in force and how it follows its source.
//!
//! - Readers load one pointer; a refresh swaps it.
//! - One refresh at a time, whoever asks; everybody who asks meanwhile waits for that one.
//! - A refresh that fails leaves the last good set in force, for [`STALE_MAX`] at most.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::{
    keys::KeySet,
    source::{LOAD_TIMEOUT, Source, Stamp},
};

/// How long a key set is trusted when its source can't be read. Then nothing is verified by it any more.
const STALE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Refreshes that tokens may cause at once, before the pace below.
const ASKED_BURST: u32 = 2;

/// The pace of refreshes caused by tokens whose key is unknown. A new key is published long before it signs, so this
/// is for emergencies; and anybody can make up key ids.
const ASKED_EVERY: Duration = Duration::from_secs(30);

/// Pause after a refresh that failed: short while nobody can log in, longer while the last good set serves.
const RETRY_WITHOUT_KEYS: Duration = Duration::from_secs(2);
const RETRY_WITH_KEYS: Duration = Duration::from_secs(30);

/// How often a key file is looked at.
const FILE_POLL: Duration = Duration::from_secs(1);

/// A key set and when its source was last known to say the same.
struct Good {
    set: Arc<KeySet>,
    at: Instant,
}

/// The last attempt to read the source.
#[derive(Clone, Copy)]
struct Attempt {
    at: Instant,
    failed: bool,
    stamp: Option<Stamp>,
}

/// Follows one source.
pub(super) struct Keyring {
    source: Source,
    refresh_every: Duration,
    good: ArcSwapOption<Good>,
    /// Grows with every change of the set: what was concluded from an older one has to be concluded again.
    generation: AtomicU64,
    attempt: Mutex<Option<Attempt>>,
    flight: Mutex<Option<watch::Receiver<bool>>>,
    asked: Mutex<Bucket>,
    changed: Notify,
}

impl Keyring {
    pub(super) fn new(source: Source, refresh_every: Duration) -> Self {
        let good = match source {
            Source::None => Some(Arc::new(Good { set: Arc::default(), at: Instant::now() })),
            _ => None,
        };
        Self {
            source,
            refresh_every,
            good: ArcSwapOption::new(good),
            generation: AtomicU64::new(0),
            attempt: Mutex::new(None),
            flight: Mutex::new(None),
            asked: Mutex::new(Bucket::new(Instant::now())),
            changed: Notify::new(),
        }
    }

    /// The set to verify by, or `None` when there is none that may be trusted.
    pub(super) fn usable(&self) -> Option<Arc<KeySet>> {
        let good = self.good.load();
        let good = good.as_ref()?;
        let trusted = matches!(self.source, Source::None) || good.at.elapsed() < STALE_MAX;
        trusted.then(|| Arc::clone(&good.set))
    }

    /// See the field. Acquire: whoever sees a new generation sees the set that caused it.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Time since the source was last read well; `None` before the first time and when there is no source.
    pub(super) fn age(&self) -> Option<Duration> {
        match self.source {
            Source::None => None,
            _ => self.good.load().as_ref().map(|good| good.at.elapsed()),
        }
    }

    /// Reads the source for a token that can't be verified by the present set, if the pace allows it.
    ///
    /// # Cancel safety
    /// May be dropped; the refresh goes on for the others.
    pub(super) async fn ask(self: &Arc<Self>) {
        if matches!(self.source, Source::None) {
            return;
        }
        // Joining a refresh under way costs the issuer nothing.
        if self.in_flight().is_some() || self.asked.lock().take(Instant::now()) {
            self.refresh().await;
        }
    }

    /// Reads the source now, or waits for the reading under way.
    ///
    /// # Cancel safety
    /// May be dropped; the refresh goes on for the others.
    pub(super) async fn refresh(self: &Arc<Self>) {
        let mut done = {
            let mut flight = self.flight.lock();
            match flight.as_ref().filter(|done| under_way(done)) {
                Some(done) => done.clone(),
                None => flight.insert(self.depart()).clone(),
            }
        };
        // A task of its own, so that a client who leaves does not take the keys away from those who wait with it;
        // it ends by itself within the timeout.
        let _ = tokio::time::timeout(LOAD_TIMEOUT * 2, done.wait_for(|done| *done)).await;
    }

    fn in_flight(&self) -> Option<watch::Receiver<bool>> {
        self.flight.lock().clone().filter(under_way)
    }

    fn depart(self: &Arc<Self>) -> watch::Receiver<bool> {
        let (sender, receiver) = watch::channel(false);
        let keyring = Arc::clone(self);
        tokio::spawn(async move {
            let stamp = keyring.source.stamp().await;
            let loaded = keyring.source.load().await;
            *keyring.attempt.lock() = Some(Attempt { at: Instant::now(), failed: loaded.is_err(), stamp });
            match loaded {
                Ok(set) => keyring.install(set),
                Err(error) => tracing::warn!(%error, "the signing keys can't be read; the last good ones serve"),
            }
            let _ = sender.send(true);
        });
        receiver
    }

    fn install(&self, set: KeySet) {
        let present = self.good.load_full();
        let kept = present.filter(|good| good.set.same(&set)).map(|good| Arc::clone(&good.set));
        let changed = kept.is_none();
        let set = kept.unwrap_or_else(|| Arc::new(set));
        if changed {
            tracing::info!(keys = set.count(), "signing keys changed");
        }
        self.good.store(Some(Arc::new(Good { set, at: Instant::now() })));
        if changed {
            // Release: pairs with `generation()`.
            self.generation.fetch_add(1, Ordering::Release);
            self.changed.notify_one();
        }
    }

    /// Keeps the set fresh and calls `revoked` with a test for key ids whenever keys were lost. Runs until dropped.
    pub(super) async fn run(self: &Arc<Self>, revoked: impl Fn(&dyn Fn(Option<&str>) -> bool)) {
        let mut seen = self.good.load().as_ref().map(|good| Arc::clone(&good.set)).unwrap_or_default();
        loop {
            tokio::select! {
                () = self.keep() => {}
                () = self.changed.notified() => {}
            }
            let present = self.good.load().as_ref().map(|good| Arc::clone(&good.set)).unwrap_or_default();
            if !Arc::ptr_eq(&seen, &present) {
                revoked(&|kid| kid.is_some_and(|kid| present.lost(&seen, kid)));
                seen = present;
            }
        }
    }

    /// Waits until the source is due, and reads it.
    async fn keep(self: &Arc<Self>) {
        let attempt = *self.attempt.lock();
        match (&self.source, attempt) {
            (Source::None, _) => std::future::pending().await,
            (_, None) => self.refresh().await,
            (Source::File(_), Some(attempt)) => {
                tokio::time::sleep(FILE_POLL).await;
                let stamp = self.source.stamp().await;
                let again = attempt.failed && attempt.at.elapsed() >= RETRY_WITH_KEYS;
                if stamp != attempt.stamp || again {
                    self.refresh().await;
                } else if !attempt.failed {
                    self.renew();
                }
            }
            (Source::Url(..), Some(attempt)) => {
                let pause = match (attempt.failed, self.usable().is_some()) {
                    (false, _) => self.refresh_every,
                    (true, true) => RETRY_WITH_KEYS,
                    (true, false) => RETRY_WITHOUT_KEYS,
                };
                tokio::time::sleep(pause.saturating_sub(attempt.at.elapsed())).await;
                self.refresh().await;
            }
        }
        if self.usable().is_none() {
            // What was verified by keys that are too old to be trusted must not be remembered either.
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    fn renew(&self) {
        if let Some(good) = self.good.load_full() {
            self.good.store(Some(Arc::new(Good { set: Arc::clone(&good.set), at: Instant::now() })));
        }
    }
}

fn under_way(done: &watch::Receiver<bool>) -> bool {
    // An error means that the task is gone without an answer.
    !*done.borrow() && done.has_changed().is_ok()
}

/// A token bucket: [`ASKED_BURST`] at once, one more every [`ASKED_EVERY`].
struct Bucket {
    left: u32,
    filled_at: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { left: ASKED_BURST, filled_at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        while self.left < ASKED_BURST && now.saturating_duration_since(self.filled_at) >= ASKED_EVERY {
            self.left += 1;
            self.filled_at += ASKED_EVERY;
        }
        if self.left == ASKED_BURST {
            self.filled_at = now;
        }
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_of_asked_refreshes() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let taken = |bucket: &mut Bucket, at: u64| bucket.take(start + Duration::from_secs(at));
        assert_eq!([0, 0, 0, 29].map(|at| taken(&mut bucket, at)), [true, true, false, false]);
        assert_eq!([30, 30, 59, 60].map(|at| taken(&mut bucket, at)), [true, false, false, true]);
        assert_eq!([1000, 1000, 1000].map(|at| taken(&mut bucket, at)), [true, true, false]);
    }

    #[tokio::test]
    async fn a_set_that_could_not_be_confirmed_for_a_day_is_trusted_no_more() {
        let keyring = Arc::new(Keyring::new(Source::File("/nowhere/jwks.json".into()), Duration::from_secs(300)));
        let hours_ago =
            |hours: u64| Instant::now().checked_sub(Duration::from_secs(hours * 3600)).expect("representable");
        let good = |hours| Some(Arc::new(Good { set: Arc::default(), at: hours_ago(hours) }));
        keyring.good.store(good(23));
        keyring.keep().await;
        assert!(keyring.usable().is_some());
        assert_eq!(keyring.generation(), 0);
        keyring.good.store(good(25));
        *keyring.attempt.lock() = None;
        keyring.keep().await;
        assert!(keyring.usable().is_none());
        assert_eq!(keyring.generation(), 1, "what was concluded from it is forgotten, too");
    }
}
