//! News from the file system: which documents may have changed. News can be lost (a full queue, a network file
//! system, a folder that was replaced), so whoever follows them also looks by itself now and then.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::sync::mpsc;

use super::{
    document::unhex,
    file::{Folder, stem},
};
use crate::tenant::{OrgId, directory::KeyHash};

/// News that may wait. More are dropped, and [`Watch::take_missed`] says so.
const NEWS_MAX: usize = 4096;

/// A document that may have changed, appeared or gone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Change {
    Org(OrgId),
    Key(KeyHash),
}

/// A watch over the folder's documents.
pub(super) struct Watch {
    sender: mpsc::Sender<Change>,
    news: mpsc::Receiver<Change>,
    missed: Arc<AtomicBool>,
    /// The running watcher and the inodes of the two folders it watches.
    watcher: Option<(RecommendedWatcher, [u64; 2])>,
}

impl Watch {
    pub(super) fn new() -> Self {
        let (sender, news) = mpsc::channel(NEWS_MAX);
        Self { sender, news, missed: Arc::default(), watcher: None }
    }

    /// The next news. Never ends.
    ///
    /// # Cancel safety
    /// Dropping it loses nothing.
    pub(super) async fn next(&mut self) -> Change {
        match self.news.recv().await {
            Some(change) => change,
            // Not reachable: `self.sender` keeps the channel open.
            None => std::future::pending().await,
        }
    }

    /// News that is there already.
    pub(super) fn try_next(&mut self) -> Option<Change> {
        self.news.try_recv().ok()
    }

    /// Whether news was lost since the last call: then everything has to be looked at.
    pub(super) fn take_missed(&self) -> bool {
        self.missed.swap(false, Ordering::AcqRel)
    }

    /// Whether news was lost since the last [`Self::take_missed`].
    pub(super) fn is_missed(&self) -> bool {
        self.missed.load(Ordering::Acquire)
    }

    /// Makes the next [`Self::take_missed`] say yes.
    pub(super) fn set_missed(&self) {
        self.missed.store(true, Ordering::Release);
    }

    /// Watches the two folders, which have these inodes now; nothing to do when they still are the ones watched.
    pub(super) fn keep(&mut self, folder: &Arc<Folder>, inodes: [u64; 2]) {
        if self.watcher.as_ref().is_some_and(|(_, watched)| *watched == inodes) {
            return;
        }
        self.watcher = None;
        match self.start(folder) {
            Ok(watcher) => self.watcher = Some((watcher, inodes)),
            Err(error) => tracing::warn!(%error, "catalog changes can't be watched; they are looked for every 2 s"),
        }
        self.set_missed();
    }

    fn start(&self, folder: &Arc<Folder>) -> notify::Result<RecommendedWatcher> {
        let (sender, missed, place) = (self.sender.clone(), Arc::clone(&self.missed), Arc::clone(folder));
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            let lost = match event {
                Ok(event) => event.need_rescan() || !pass_on(&event, &place, &sender),
                Err(_) => true,
            };
            if lost {
                missed.store(true, Ordering::Release);
            }
        })?;
        watcher.watch(&folder.orgs, RecursiveMode::NonRecursive)?;
        watcher.watch(&folder.keys, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

/// Gives false when news was lost.
fn pass_on(event: &Event, folder: &Folder, sender: &mpsc::Sender<Change>) -> bool {
    let changes = match event.kind {
        // Our own reading opens files, too.
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        _ => true,
    };
    !changes || event.paths.iter().filter_map(|path| change(path, folder)).all(|change| sender.try_send(change).is_ok())
}

fn change(path: &Path, folder: &Folder) -> Option<Change> {
    let name = stem(path)?;
    let parent = path.parent()?;
    if parent == folder.orgs {
        // A name in another spelling is never read, so it can't change anything.
        OrgId::parse(name).filter(|org| org.as_str() == name).map(Change::Org)
    } else if parent == folder.keys {
        unhex(name).map(Change::Key)
    } else {
        None
    }
}
