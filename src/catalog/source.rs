//! What every kind of catalog gives the feeder: news that documents may have changed, and the documents themselves.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, mpsc};

use super::document::{KeyRecord, Record};
use crate::tenant::{OrgId, directory::KeyHash};

/// News that may wait. More are dropped, and [`News::take_missed`] says so.
const NEWS_MAX: usize = 4096;

/// A document that may have changed, appeared or gone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Change {
    Org(OrgId),
    Key(KeyHash),
}

/// Tells one content of a document from another. Nothing follows from its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(pub [u64; 3]);

/// A document as read.
pub(super) enum Found<T> {
    /// Understood.
    Good(T, Stamp),
    /// There is none.
    Absent,
    /// Not understood: what is wrong, and a digest of the content.
    Damaged(String, u64, Stamp),
    /// Nobody can say.
    Away(String),
}

/// A document with its name.
pub(super) enum Document {
    Org(OrgId, Found<Record>),
    Key(KeyHash, Found<KeyRecord>),
}

/// Why a document is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Somebody asked for it.
    Asked,
    /// It may have changed: that it is gone would end sessions, and is believed only of a source that is whole.
    Changed,
}

/// One catalog, as its feeder reads it.
pub(super) trait Source: Send {
    /// How long changes are gathered before they are read.
    const GATHER: Duration;

    /// When all that was handed out is looked at after news was lost.
    const SCAN_SOON: Duration;

    /// Documents looked at in one scan without lost news; the next one goes on from there.
    const SCAN_MAX: usize;

    /// What the source has to tell.
    fn news(&mut self) -> &mut News;

    /// Whether it can be read, and how often it could not.
    fn health(&self) -> &Health;

    /// Reads documents, in the order they are named in; none when the source hangs.
    fn read(&mut self, wanted: Vec<Change>, why: Why) -> impl Future<Output = Vec<Document>> + Send;

    /// The present stamps of documents, `None` for one that is gone. `None` when the source can't be read.
    fn stamps(&mut self, of: Vec<Change>) -> impl Future<Output = Option<Vec<(Change, Option<Stamp>)>>> + Send;
}

/// Since when a source is in step, and how many of its documents were not understood.
#[derive(Debug)]
pub(super) struct Health {
    opened: Instant,
    /// Milliseconds after `opened` when the source was last known good.
    good_ms: AtomicU64,
    damaged: AtomicU64,
}

impl Health {
    pub(super) fn new() -> Self {
        Self { opened: Instant::now(), good_ms: AtomicU64::new(0), damaged: AtomicU64::new(0) }
    }

    /// Says that the source was readable, and followed to its end, just now.
    pub(super) fn set_good(&self) {
        let now_ms = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.good_ms.store(now_ms, Ordering::Relaxed);
    }

    pub(super) fn age(&self) -> Duration {
        let good = Duration::from_millis(self.good_ms.load(Ordering::Relaxed));
        self.opened.elapsed().saturating_sub(good)
    }

    pub(super) fn count_damaged(&self) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }
}

/// The end of the news that tells. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Teller {
    sender: mpsc::Sender<Change>,
    missed: Arc<AtomicBool>,
    look: Arc<Notify>,
}

impl Teller {
    /// Tells of a document; never waits. Where too much is told already, everything will be looked at.
    pub(super) fn tell(&self, change: Change) {
        if self.sender.try_send(change).is_err() {
            self.tell_lost();
        }
    }

    /// Tells that news may have been lost: everything has to be looked at.
    pub(super) fn tell_lost(&self) {
        self.missed.store(true, Ordering::Release);
        self.look_again();
    }

    /// Has what was lost before looked at soon.
    pub(super) fn look_again(&self) {
        self.look.notify_one();
    }
}

/// The end of the news that hears.
#[derive(Debug)]
pub(super) struct News {
    receiver: mpsc::Receiver<Change>,
    teller: Teller,
}

impl News {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::channel(NEWS_MAX);
        Self { receiver, teller: Teller { sender, missed: Arc::default(), look: Arc::default() } }
    }

    pub(super) fn teller(&self) -> Teller {
        self.teller.clone()
    }

    /// The next news; `None` when it is time to look at what was lost. Never ends.
    ///
    /// # Cancel safety
    /// Dropping it loses nothing.
    pub(super) async fn next(&mut self) -> Option<Change> {
        tokio::select! {
            change = self.receiver.recv() => match change {
                Some(change) => Some(change),
                // Not reachable: `self.teller` keeps the channel open.
                None => std::future::pending().await,
            },
            () = self.teller.look.notified() => None,
        }
    }

    /// News that is there already.
    pub(super) fn try_next(&mut self) -> Option<Change> {
        self.receiver.try_recv().ok()
    }

    /// Whether news was lost since the last call: then everything has to be looked at.
    pub(super) fn take_missed(&self) -> bool {
        self.teller.missed.swap(false, Ordering::AcqRel)
    }

    /// Makes the next [`Self::take_missed`] say yes, in its own time.
    pub(super) fn set_missed(&self) {
        self.teller.missed.store(true, Ordering::Release);
    }
}
