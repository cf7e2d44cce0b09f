//! The file catalog's feeder: one task that answers questions and carries changes into the table.
//!
//! What was handed out is remembered with the file's stamp, for as long as the table holds it. So that lost news
//! costs two seconds and not an enforcement: every [`SCAN`] those files are looked at again.

use std::{
    collections::{HashMap, HashSet},
    io,
    num::NonZeroUsize,
    ops::Range,
    os::unix::fs::MetadataExt,
    sync::Arc,
    time::Duration,
};

use lru::LruCache;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior},
};

use super::{
    document::{KeyRecord, Record, hex},
    file::{FileCatalog, Folder, Found, Stamp},
    watch::{Change, Watch},
};
use crate::{
    quota::{Slot, Table},
    tenant::{
        OrgId, Tenant,
        directory::{Absent, Ask, KeyHash, ServiceKey},
    },
};

/// How long changes are gathered, so that a file that is written piece by piece is read once.
const GATHER: Duration = Duration::from_millis(10);

/// When a change is enforced again that overtook its organisation on the way into the table.
const AGAIN: Duration = Duration::from_millis(50);

/// How often handed-out documents are looked at without news.
const SCAN: Duration = Duration::from_secs(2);

/// When they are looked at after news was lost. Everything is looked at then, so not at once and again and again.
const SCAN_SOON: Duration = Duration::from_millis(200);

/// Documents looked at in one scan; the next one goes on from there. 5 000 cost about 5 ms.
const SCAN_MAX: usize = 5_000;

/// Questions answered by one visit to the disk.
const BATCH: usize = 64;

/// Longest wait for the disk. A disk that hangs must not hang clients: they are told to try later.
const DISK_TIMEOUT: Duration = Duration::from_secs(5);

/// Service keys remembered as handed out; the least recently used one is forgotten, and asked for again.
const KEYS_MAX: NonZeroUsize = NonZeroUsize::new(100_000).expect("not zero");

/// Damaged documents remembered, so that each content is reported once.
const DAMAGED_MAX: NonZeroUsize = NonZeroUsize::new(1_000).expect("not zero");

/// What was last handed out of an organisation's document; `None` twice when it was gone.
struct Seen {
    stamp: Option<Stamp>,
    tenant: Option<Arc<Tenant>>,
    at: Instant,
}

impl Seen {
    fn new(stamp: Option<Stamp>, tenant: Option<Arc<Tenant>>) -> Self {
        Self { stamp, tenant, at: Instant::now() }
    }
}

/// See the module.
pub(super) struct Feeder<F> {
    catalog: FileCatalog,
    folder: Arc<Folder>,
    table: Arc<Table>,
    forget: F,
    watch: Watch,
    /// Only organisations that the table holds, or is about to.
    orgs: HashMap<OrgId, Seen>,
    keys: LruCache<KeyHash, (Stamp, Arc<ServiceKey>)>,
    damaged: LruCache<Change, u64>,
    /// Keys revoked since the last scan: a session that was just being admitted then is stopped by the second call.
    revoked: Vec<KeyHash>,
    /// Organisations that changed between being handed out and being in the table: to be enforced again.
    again: Vec<Change>,
    /// Where the next scan goes on among organisations and among keys.
    cursors: [usize; 2],
    away: bool,
}

enum Document {
    Org(OrgId, Found<Record>),
    Key(KeyHash, Found<KeyRecord>),
}

enum Asked {
    Tenant(oneshot::Sender<Result<Arc<Tenant>, Absent>>),
    Key(oneshot::Sender<Result<Arc<ServiceKey>, Absent>>),
}

impl<F: Fn(&KeyHash) + Send + Sync> Feeder<F> {
    pub(super) fn new(catalog: FileCatalog, table: Arc<Table>, forget: F) -> Self {
        Self {
            folder: catalog.folder(),
            catalog,
            table,
            forget,
            watch: Watch::new(),
            orgs: HashMap::new(),
            keys: LruCache::new(KEYS_MAX),
            damaged: LruCache::new(DAMAGED_MAX),
            revoked: Vec::new(),
            again: Vec::new(),
            cursors: [0; 2],
            away: false,
        }
    }

    /// Runs until nobody can ask any more.
    pub(super) async fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        let mut scan = tokio::time::interval(SCAN);
        scan.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        let mut changes = HashSet::new();
        let mut due = None;
        // Before the first answer, so that nothing changes unseen after it.
        self.scan().await;
        scan.reset();
        let mut hurried = false;
        loop {
            if !hurried && self.watch.is_missed() {
                scan.reset_after(SCAN_SOON);
                hurried = true;
            }
            // Every arm is safe to drop: what it has not given out stays in its queue.
            tokio::select! {
                taken = asks.recv_many(&mut batch, BATCH) => match taken {
                    0 => return,
                    _ => self.answer(&mut batch).await,
                },
                change = self.watch.next() => {
                    changes.insert(change);
                    due = due.or_else(|| Some(Instant::now() + GATHER));
                }
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    due = None;
                    while let Some(change) = self.watch.try_next() {
                        changes.insert(change);
                    }
                    self.follow(changes.drain().collect()).await;
                    if !self.again.is_empty() {
                        changes.extend(self.again.drain(..));
                        due = Some(Instant::now() + AGAIN);
                    }
                }
                _ = scan.tick() => {
                    hurried = false;
                    self.scan().await;
                }
            }
        }
    }

    /// Answers questions. One that gets no answer is dropped, which its asker takes for "try later".
    async fn answer(&mut self, batch: &mut Vec<Ask>) {
        let (wanted, askers): (Vec<Change>, Vec<Asked>) = batch
            .drain(..)
            .map(|ask| match ask {
                Ask::Tenant(org, answer) => (Change::Org(org), Asked::Tenant(answer)),
                Ask::Key(hash, answer) => (Change::Key(hash), Asked::Key(answer)),
            })
            .unzip();
        for (document, asker) in self.read(wanted).await.into_iter().zip(askers) {
            match (document, asker) {
                (Document::Org(org, found), Asked::Tenant(asker)) => {
                    let _ = asker.send(self.tenant(org, found));
                }
                (Document::Key(hash, found), Asked::Key(asker)) => {
                    let _ = asker.send(self.key(hash, found));
                }
                _ => {}
            }
        }
    }

    fn tenant(&mut self, org: OrgId, found: Found<Record>) -> Result<Arc<Tenant>, Absent> {
        match found {
            Found::Good(record, stamp) => {
                let tenant = Arc::new(record.tenant);
                self.orgs.insert(org, Seen::new(Some(stamp), Some(Arc::clone(&tenant))));
                Ok(tenant)
            }
            Found::Absent => Err(Absent::Unknown),
            Found::Damaged(what, digest, _) => {
                self.report(Change::Org(org), &what, digest);
                Err(Absent::Unavailable)
            }
            Found::Away(what) => {
                self.set_away(Some(&what));
                Err(Absent::Unavailable)
            }
        }
    }

    fn key(&mut self, hash: KeyHash, found: Found<KeyRecord>) -> Result<Arc<ServiceKey>, Absent> {
        match found {
            Found::Good(record, stamp) => {
                let key = Arc::new(record.key);
                let pushed_out = self.keys.push(hash, (stamp, Arc::clone(&key)));
                if let Some((other, _)) = pushed_out.filter(|(other, _)| *other != hash) {
                    (self.forget)(&other);
                }
                Ok(key)
            }
            Found::Absent => Err(Absent::Unknown),
            Found::Damaged(what, digest, _) => {
                self.report(Change::Key(hash), &what, digest);
                Err(Absent::Unavailable)
            }
            Found::Away(what) => {
                self.set_away(Some(&what));
                Err(Absent::Unavailable)
            }
        }
    }

    /// Reads what may have changed and enforces it.
    async fn follow(&mut self, changes: Vec<Change>) {
        for document in self.read(changes).await {
            match document {
                Document::Org(org, found) => self.follow_org(org, found),
                Document::Key(hash, found) => self.follow_key(hash, found),
            }
        }
    }

    fn follow_org(&mut self, org: OrgId, found: Found<Record>) {
        let resident = self.table.resident(&org).is_some();
        if !resident && self.orgs.contains_key(&org) {
            // An older document may be on its way into the table. Until a scan finds that it never came there, its
            // stamp stays as handed out and the change is tried again.
            self.again.push(Change::Org(org.clone()));
        }
        match found {
            Found::Good(record, stamp) => {
                let tenant = Arc::new(record.tenant);
                match self.table.apply(Arc::clone(&tenant)) {
                    Ok(()) if resident => {
                        self.orgs.insert(org, Seen::new(Some(stamp), Some(tenant)));
                    }
                    Ok(()) => {}
                    Err(stale) => {
                        let what = format!("epoch {} is below {}, which is in force", stale.offered, stale.present);
                        self.orgs.entry(org.clone()).or_insert_with(|| Seen::new(None, None)).stamp = Some(stamp);
                        self.report(Change::Org(org), &what, stale.offered);
                    }
                }
            }
            Found::Absent => {
                self.table.remove(&org);
                if resident {
                    self.orgs.insert(org, Seen::new(None, None));
                }
            }
            Found::Damaged(what, digest, stamp) => {
                if let Some(seen) = self.orgs.get_mut(&org) {
                    seen.stamp = Some(stamp);
                }
                self.report(Change::Org(org), &what, digest);
            }
            Found::Away(what) => self.set_away(Some(&what)),
        }
    }

    fn follow_key(&mut self, hash: KeyHash, found: Found<KeyRecord>) {
        match found {
            Found::Good(record, stamp) => {
                (self.forget)(&hash);
                let handed_out = self.keys.peek(&hash).is_some_and(|(_, key)| **key != record.key);
                if handed_out {
                    // Whose it is or when it ends was changed: sessions have to come again.
                    self.revoke(hash);
                }
                if let Some(seen) = self.keys.peek_mut(&hash) {
                    *seen = (stamp, Arc::new(record.key));
                }
            }
            Found::Absent => self.revoke(hash),
            Found::Damaged(what, digest, stamp) => {
                if let Some(seen) = self.keys.peek_mut(&hash) {
                    seen.0 = stamp;
                }
                self.report(Change::Key(hash), &what, digest);
            }
            Found::Away(what) => self.set_away(Some(&what)),
        }
    }

    fn revoke(&mut self, hash: KeyHash) {
        (self.forget)(&hash);
        self.table.revoke_key(&hash);
        self.keys.pop(&hash);
        self.revoked.push(hash);
    }

    /// Looks at handed-out documents whether or not there was news.
    async fn scan(&mut self) {
        for hash in std::mem::take(&mut self.revoked) {
            (self.forget)(&hash);
            self.table.revoke_key(&hash);
        }
        let slots = self.table.slots();
        let everything = self.watch.take_missed();
        let [orgs_at, keys_at] = &mut self.cursors;
        let orgs = slots[window(orgs_at, slots.len(), everything)].iter().map(|slot| slot.org().clone()).collect();
        let part = window(keys_at, self.keys.len(), everything);
        let keys = self.keys.iter().skip(part.start).take(part.len()).map(|(hash, _)| *hash).collect();
        let folder = Arc::clone(&self.folder);
        let Some(Ok((inodes, stamps))) = disk(move || stamps(&folder, orgs, keys)).await else {
            if everything {
                self.watch.set_missed();
            }
            return self.set_away(Some("its folders can't be read"));
        };
        self.set_away(None);
        self.watch.keep(&self.folder, inodes);
        let changed = stamps.into_iter().filter(|(change, stamp)| self.is_news(change, *stamp));
        let changed: Vec<Change> = changed.map(|(change, _)| change).collect();
        if !changed.is_empty() {
            self.follow(changed).await;
        }
        self.settle(&slots);
        if !self.away {
            self.folder.set_good();
        }
    }

    fn is_news(&self, change: &Change, stamp: Option<Stamp>) -> bool {
        match change {
            Change::Org(org) => self.orgs.get(org).is_none_or(|seen| seen.stamp != stamp),
            Change::Key(hash) => self.keys.peek(hash).is_some_and(|(seen, _)| Some(*seen) != stamp),
        }
    }

    /// Mends what two overlapping look-ups of one organisation may have left, and forgets those that left the table.
    fn settle(&mut self, slots: &[Arc<Slot>]) {
        for slot in slots {
            let seen = self.orgs.get(slot.org()).and_then(|seen| seen.tenant.as_ref());
            if let Some(tenant) = seen.filter(|tenant| slot.policy().tenant != **tenant) {
                let _ = self.table.apply(Arc::clone(tenant));
            }
        }
        let held: HashSet<&OrgId> = slots.iter().map(|slot| slot.org()).collect();
        // What was handed out just now may still be on its way into the table.
        self.orgs.retain(|org, seen| held.contains(org) || seen.at.elapsed() < SCAN);
    }

    /// Reads documents, in the order they are named in; none when the disk hangs.
    async fn read(&mut self, wanted: Vec<Change>) -> Vec<Document> {
        let folder = Arc::clone(&self.folder);
        let reading = disk(move || {
            let read = |change| match change {
                Change::Org(org) => Document::Org(org.clone(), folder.org(&org)),
                Change::Key(hash) => Document::Key(hash, folder.key(&hash)),
            };
            wanted.into_iter().map(read).collect()
        });
        let documents = reading.await;
        if documents.is_none() {
            self.set_away(Some("the disk does not answer"));
            // What was not read has to be looked at once the disk is back.
            self.watch.set_missed();
        }
        documents.unwrap_or_default()
    }

    fn report(&mut self, which: Change, what: &str, digest: u64) {
        if self.damaged.get(&which) == Some(&digest) {
            return;
        }
        self.folder.count_damaged();
        match &which {
            Change::Org(org) => tracing::warn!(%org, what, "damaged organisation; its last good state serves"),
            Change::Key(hash) => {
                let key = crate::identity::service_key::fingerprint(hash);
                tracing::warn!(key, what, "damaged service key; its last good state serves");
            }
        }
        self.damaged.put(which, digest);
    }

    fn set_away(&mut self, what: Option<&str>) {
        match (what, self.away) {
            (Some(what), false) => tracing::warn!(what, "the catalog is away; the last known state serves"),
            (None, true) => tracing::info!("the catalog is back; it was away for {:?}", self.catalog.age()),
            _ => {}
        }
        self.away = what.is_some();
    }
}

/// The part of `len` documents that this scan looks at: everything after lost news, else the next [`SCAN_MAX`].
fn window(cursor: &mut usize, len: usize, everything: bool) -> Range<usize> {
    let start = if *cursor < len && !everything { *cursor } else { 0 };
    *cursor = if everything { len } else { (start + SCAN_MAX).min(len) };
    start..*cursor
}

/// Runs `work` where it may block; `None` when it does not end in time.
async fn disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::time::timeout(DISK_TIMEOUT, tokio::task::spawn_blocking(work)).await.ok()?.ok()
}

type Stamps = ([u64; 2], Vec<(Change, Option<Stamp>)>);

/// The inodes of the two folders, and the stamps of documents in them.
fn stamps(folder: &Folder, orgs: Vec<OrgId>, keys: Vec<KeyHash>) -> io::Result<Stamps> {
    // Without its folder a document is not gone, but out of reach.
    let inodes = [std::fs::metadata(&folder.orgs)?.ino(), std::fs::metadata(&folder.keys)?.ino()];
    let orgs = orgs.into_iter().map(|org| {
        let stamp = Folder::stamp(&folder.orgs, org.as_str())?;
        Ok((Change::Org(org), stamp))
    });
    let keys = keys.into_iter().map(|hash| {
        let stamp = Folder::stamp(&folder.keys, &hex(&hash))?;
        Ok((Change::Key(hash), stamp))
    });
    let stamps: io::Result<_> = orgs.chain(keys).collect();
    Ok((inodes, stamps?))
}
