//! The file catalog: `orgs/<ORG>.json` and `service_keys/<hex of SHA-256>.json` in one folder. Documents are written
//! whole or not at all, and writers of several processes take turns. Files are read when they are asked for; nothing
//! holds all of them in memory.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::mpsc;

use super::{
    Expect, Fault,
    document::{KeyRecord, Record, hex, unhex},
};
use crate::tenant::{OrgId, directory::KeyHash};

/// Largest document in bytes. Real ones are below 4 KiB.
const DOCUMENT_MAX_BYTES: u64 = 256 * 1024;

/// Documents read ahead of whoever lists them.
const LIST_AHEAD: usize = 64;

/// Longest wait for another process that is writing; a write takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// When a file was written, its size and its inode: whether it may have changed.
pub(super) type Stamp = (SystemTime, u64, u64);

/// A document as read.
pub(super) enum Found<T> {
    /// Understood.
    Good(T, Stamp),
    /// There is none.
    Absent,
    /// Not understood: what is wrong, a digest of the content, and when it was written.
    Damaged(String, u64, Stamp),
    /// Nobody can say.
    Away(String),
}

/// A folder of documents. Cheap to clone.
#[derive(Clone)]
pub struct FileCatalog(Arc<Folder>);

/// What is shared by all clones.
pub(super) struct Folder {
    path: PathBuf,
    pub(super) orgs: PathBuf,
    pub(super) keys: PathBuf,
    pub(super) open_transitions: PathBuf,
    pub(super) closed_transitions: PathBuf,
    opened: Instant,
    /// Milliseconds after `opened` when the source was last known good.
    good_ms: AtomicU64,
    damaged: AtomicU64,
}

impl FileCatalog {
    /// Opens the folder, making it if need be.
    pub(super) async fn open(path: PathBuf) -> Result<Self, Fault> {
        let folder = Folder {
            orgs: path.join("orgs"),
            keys: path.join("service_keys"),
            open_transitions: path.join("transitions").join("open"),
            closed_transitions: path.join("transitions").join("closed"),
            path,
            opened: Instant::now(),
            good_ms: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        };
        let catalog = Self(Arc::new(folder));
        catalog
            .blocking(|folder| {
                [&folder.orgs, &folder.keys, &folder.open_transitions, &folder.closed_transitions]
                    .into_iter()
                    .try_for_each(|folder| fs::create_dir_all(folder).map_err(unavailable))
            })
            .await?;
        Ok(catalog)
    }

    pub(super) fn folder(&self) -> Arc<Folder> {
        Arc::clone(&self.0)
    }

    pub(super) async fn get(&self, org: &OrgId) -> Result<Record, Fault> {
        let org = org.clone();
        self.blocking(move |folder| known(folder.org(&org))).await
    }

    pub(super) fn list(&self) -> mpsc::Receiver<Result<Record, Fault>> {
        self.stream(
            |folder| &folder.orgs,
            |folder, stem| {
                let org = OrgId::parse(stem).filter(|org| org.as_str() == stem)?;
                named(stem, folder.org(&org))
            },
        )
    }

    pub(super) async fn put(&self, record: Record, expect: Expect) -> Result<(), Fault> {
        self.blocking(move |folder| {
            let _turn = folder.lock()?;
            let present = match (folder.org(&record.tenant.org), expect) {
                (Found::Away(what), _) => return Err(Fault::Unavailable(what)),
                (Found::Absent, Expect::Absent) => None,
                (Found::Good(..) | Found::Damaged(..), Expect::Absent) => return Err(Fault::Exists),
                (Found::Absent, Expect::Epoch(_)) => return Err(Fault::Unknown),
                (Found::Damaged(what, ..), Expect::Epoch(_)) => return Err(Fault::Damaged(what)),
                (Found::Good(present, _), Expect::Epoch(epoch)) => {
                    if present.tenant.epoch != epoch || record.tenant.epoch < epoch {
                        return Err(Fault::Stale { present: present.tenant.epoch });
                    }
                    Some(present)
                }
            };
            let name = record.tenant.org.as_str().to_owned();
            let record = match present {
                Some(present) => record.over(present),
                None => record,
            };
            let text = record.to_json();
            // What could not be read again must not be written.
            Record::parse(&text, &record.tenant.org).map_err(Fault::Damaged)?;
            write(&folder.orgs, &name, &text).map_err(unavailable)
        })
        .await
    }

    pub(super) async fn delete(&self, org: &OrgId) -> Result<(), Fault> {
        let name = org.as_str().to_owned();
        self.blocking(move |folder| folder.remove(&folder.orgs, &name)).await
    }

    pub(super) async fn create_key(&self, record: KeyRecord) -> Result<(), Fault> {
        self.blocking(move |folder| {
            let (hash, text) = (record.key.hash, record.to_json());
            KeyRecord::parse(&text, &hash).map_err(Fault::Damaged)?;
            let _turn = folder.lock()?;
            match folder.key(&hash) {
                Found::Absent => write(&folder.keys, &hex(&hash), &text).map_err(unavailable),
                Found::Away(what) => Err(Fault::Unavailable(what)),
                Found::Good(..) | Found::Damaged(..) => Err(Fault::Exists),
            }
        })
        .await
    }

    pub(super) fn list_keys(&self, org: Option<OrgId>) -> mpsc::Receiver<Result<KeyRecord, Fault>> {
        self.stream(
            |folder| &folder.keys,
            move |folder, stem| {
                let found = named(stem, folder.key(&unhex(stem)?))?;
                let wanted = match (&found, &org) {
                    (Ok(record), Some(org)) => record.key.org == *org,
                    _ => true,
                };
                wanted.then_some(found)
            },
        )
    }

    pub(super) async fn revoke_key(&self, hash: &KeyHash) -> Result<(), Fault> {
        let name = hex(hash);
        self.blocking(move |folder| folder.remove(&folder.keys, &name)).await
    }

    pub(super) fn age(&self) -> Duration {
        let good = Duration::from_millis(self.0.good_ms.load(Ordering::Relaxed));
        self.0.opened.elapsed().saturating_sub(good)
    }

    pub(super) fn damaged(&self) -> u64 {
        self.0.damaged.load(Ordering::Relaxed)
    }

    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let folder = self.folder();
        let done = tokio::task::spawn_blocking(move || work(&folder)).await;
        done.unwrap_or_else(|_| Err(Fault::Unavailable("the process is stopping".to_owned())))
    }

    pub(super) fn stream<T: Send + 'static>(
        &self,
        place: impl FnOnce(&Folder) -> &Path + Send + 'static,
        read: impl Fn(&Folder, &str) -> Option<Result<T, Fault>> + Send + 'static,
    ) -> mpsc::Receiver<Result<T, Fault>> {
        let (sender, receiver) = mpsc::channel(LIST_AHEAD);
        let folder = self.folder();
        tokio::task::spawn_blocking(move || {
            let entries = match fs::read_dir(place(&folder)) {
                Ok(entries) => entries,
                Err(error) => return drop(sender.blocking_send(Err(unavailable(error)))),
            };
            for entry in entries {
                let item = match entry {
                    Ok(entry) => stem(&entry.path()).and_then(|stem| read(&folder, stem)),
                    Err(error) => Some(Err(unavailable(error))),
                };
                if item.is_some_and(|item| sender.blocking_send(item).is_err()) {
                    return;
                }
            }
        });
        receiver
    }
}

impl Folder {
    /// Reads an organisation's document.
    pub(super) fn org(&self, org: &OrgId) -> Found<Record> {
        read(&self.orgs, org.as_str(), |bytes| Record::parse(bytes, org))
    }

    /// Reads a service key's document.
    pub(super) fn key(&self, hash: &KeyHash) -> Found<KeyRecord> {
        read(&self.keys, &hex(hash), |bytes| KeyRecord::parse(bytes, hash))
    }

    /// The stamp of a document, `None` when there is none.
    pub(super) fn stamp(folder: &Path, name: &str) -> io::Result<Option<Stamp>> {
        match fs::metadata(path(folder, name)) {
            Ok(about) => Ok(Some(stamp(&about)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Says that the source was readable just now.
    pub(super) fn set_good(&self) {
        let now_ms = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.good_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Counts a damaged document.
    pub(super) fn count_damaged(&self) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
    }

    fn remove(&self, folder: &Path, name: &str) -> Result<(), Fault> {
        let _turn = self.lock()?;
        self.remove_locked(folder, name)
    }

    /// As `remove`, for who has the turn already.
    pub(super) fn remove_locked(&self, folder: &Path, name: &str) -> Result<(), Fault> {
        match fs::remove_file(path(folder, name)) {
            Ok(()) => sync(folder).map_err(unavailable),
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder.is_dir() => Err(Fault::Unknown),
            Err(error) => Err(unavailable(error)),
        }
    }

    /// Takes the turn among all writers of the folder; dropping the file gives it back.
    pub(super) fn lock(&self) -> Result<File, Fault> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path.join("lock"))
            .map_err(unavailable)?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
                Err(TryLockError::WouldBlock) => {
                    return Err(Fault::Unavailable("another process is writing for more than 2 s".to_owned()));
                }
                Err(TryLockError::Error(error)) => return Err(unavailable(error)),
            }
        }
    }
}

/// The name of a document's file without its ending; `None` for any other file (ours under way start with a dot).
pub(super) fn stem(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".json").filter(|stem| !stem.is_empty() && !stem.starts_with('.'))
}

fn path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.json"))
}

fn stamp(about: &fs::Metadata) -> io::Result<Stamp> {
    Ok((about.modified()?, about.len(), about.ino()))
}

pub(super) fn read<T>(folder: &Path, name: &str, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Found<T> {
    let mut file = match File::open(path(folder, name)) {
        Ok(file) => file,
        // A folder that is gone (an unmounted disk) says nothing about its documents.
        Err(error) if error.kind() == io::ErrorKind::NotFound && folder.is_dir() => return Found::Absent,
        Err(error) => return Found::Away(error.to_string()),
    };
    let mut bytes = Vec::new();
    // The stamp before the content: a write in between makes the stamp look old, never new.
    let stamp = file.metadata().and_then(|about| stamp(&about));
    let stamp = match stamp.and_then(|stamp| {
        (&mut file).take(DOCUMENT_MAX_BYTES + 1).read_to_end(&mut bytes)?;
        Ok(stamp)
    }) {
        Ok(stamp) => stamp,
        Err(error) => return Found::Away(error.to_string()),
    };
    let parsed = if bytes.len() as u64 > DOCUMENT_MAX_BYTES { Err("over 256 KiB".to_owned()) } else { parse(&bytes) };
    match parsed {
        Ok(found) => Found::Good(found, stamp),
        Err(what) => Found::Damaged(what, digest(&bytes), stamp),
    }
}

/// Writes a document so that a reader, or a crash, meets the old one or the new one, whole. Callers hold the lock, so
/// the file under way is theirs; what a crash left of one is overwritten.
pub(super) fn write(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let under_way = folder.join(format!(".{name}.tmp"));
    let written = File::create(&under_way).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    match written.and_then(|()| fs::rename(&under_way, path(folder, name))) {
        Ok(()) => sync(folder),
        Err(error) => {
            let _ = fs::remove_file(&under_way);
            Err(error)
        }
    }
}

/// Makes a rename or removal last.
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn digest(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

pub(super) fn known<T>(read: Found<T>) -> Result<T, Fault> {
    match read {
        Found::Good(found, _) => Ok(found),
        Found::Absent => Err(Fault::Unknown),
        Found::Damaged(what, ..) => Err(Fault::Damaged(what)),
        Found::Away(what) => Err(Fault::Unavailable(what)),
    }
}

/// One item of a list. What was deleted while listing is left out; a damaged document is named.
pub(super) fn named<T>(stem: &str, read: Found<T>) -> Option<Result<T, Fault>> {
    match known(read) {
        Err(Fault::Unknown) => None,
        Err(Fault::Damaged(what)) => Some(Err(Fault::Damaged(format!("{stem}: {what}")))),
        found => Some(found),
    }
}

pub(super) fn unavailable(error: io::Error) -> Fault {
    Fault::Unavailable(error.to_string())
}
