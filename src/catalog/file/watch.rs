//! News from the file system: which documents may have changed. News can be lost (a full queue, a network file
//! system, a folder that was replaced), so whoever follows them also looks by itself now and then.

use std::{path::Path, sync::Arc};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};

use super::{Folder, stem, unhex};
use crate::{
    catalog::source::{Change, News, Teller},
    tenant::OrgId,
};

/// A watch over the folder's documents.
pub(super) struct Watch {
    pub(super) news: News,
    /// The running watcher and the inodes of the two folders it watches.
    watcher: Option<(RecommendedWatcher, [u64; 2])>,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self { news: News::new(), watcher: None }
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
        self.news.teller().tell_lost();
    }

    fn start(&self, folder: &Arc<Folder>) -> notify::Result<RecommendedWatcher> {
        let (teller, place) = (self.news.teller(), Arc::clone(folder));
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| match event {
            Ok(event) if event.need_rescan() => teller.tell_lost(),
            Ok(event) => pass_on(&event, &place, &teller),
            Err(_) => teller.tell_lost(),
        })?;
        watcher.watch(&folder.orgs, RecursiveMode::NonRecursive)?;
        watcher.watch(&folder.keys, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

fn pass_on(event: &Event, folder: &Folder, teller: &Teller) {
    let changes = match event.kind {
        // Our own reading opens files, too.
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        _ => true,
    };
    if changes {
        event.paths.iter().filter_map(|path| change(path, folder)).for_each(|change| teller.tell(change));
    }
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
