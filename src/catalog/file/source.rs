//! The file catalog as its feeder reads it. So that lost news costs two seconds and not an enforcement, what was
//! handed out is looked at again and again, by its files' stamps.

use std::{io, os::unix::fs::MetadataExt, sync::Arc, time::Duration};

use super::{FileCatalog, Folder, hex, watch::Watch};
use crate::catalog::source::{Change, Document, Health, News, Source, Stamp, Why};

/// Longest wait for the disk. A disk that hangs must not hang clients: they are told to try later.
const DISK_TIMEOUT: Duration = Duration::from_secs(5);

/// The folder with its watch.
pub(in crate::catalog) struct FileSource {
    folder: Arc<Folder>,
    watch: Watch,
}

impl FileSource {
    pub(in crate::catalog) fn new(catalog: &FileCatalog) -> Self {
        Self { folder: Arc::clone(&catalog.0), watch: Watch::new() }
    }
}

impl Source for FileSource {
    /// A file that is written piece by piece is read once.
    const GATHER: Duration = Duration::from_millis(10);

    /// Not at once and again and again.
    const SCAN_SOON: Duration = Duration::from_millis(200);

    /// They cost about 5 ms.
    const SCAN_MAX: usize = 5_000;

    fn news(&mut self) -> &mut News {
        &mut self.watch.news
    }

    fn health(&self) -> &Health {
        &self.folder.health
    }

    async fn read(&mut self, wanted: Vec<Change>, _why: Why) -> Vec<Document> {
        let folder = Arc::clone(&self.folder);
        let reading = disk(move || {
            let read = |change| match change {
                Change::Org(org) => Document::Org(org.clone(), folder.org(&org)),
                Change::Key(hash) => Document::Key(hash, folder.key(&hash)),
            };
            wanted.into_iter().map(read).collect()
        });
        reading.await.unwrap_or_default()
    }

    async fn stamps(&mut self, of: Vec<Change>) -> Option<Vec<(Change, Option<Stamp>)>> {
        let folder = Arc::clone(&self.folder);
        let (inodes, stamps) = disk(move || stamps(&folder, of)).await?.ok()?;
        self.watch.keep(&self.folder, inodes);
        self.folder.health.set_good();
        Some(stamps)
    }
}

/// Runs `work` where it may block; `None` when it does not end in time.
async fn disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::time::timeout(DISK_TIMEOUT, tokio::task::spawn_blocking(work)).await.ok()?.ok()
}

type Stamps = ([u64; 2], Vec<(Change, Option<Stamp>)>);

/// The inodes of the two folders, and the stamps of documents in them.
fn stamps(folder: &Folder, of: Vec<Change>) -> io::Result<Stamps> {
    // Without its folder a document is not gone, but out of reach.
    let inodes = [std::fs::metadata(&folder.orgs)?.ino(), std::fs::metadata(&folder.keys)?.ino()];
    let stamp = |change: &Change| match change {
        Change::Org(org) => Folder::stamp(&folder.orgs, org.as_str()),
        Change::Key(hash) => Folder::stamp(&folder.keys, &hex(hash)),
    };
    let stamps = of.into_iter().map(|change| stamp(&change).map(|stamp| (change, stamp)));
    let stamps: io::Result<_> = stamps.collect();
    Ok((inodes, stamps?))
}
