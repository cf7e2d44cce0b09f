//! The feeder: one task that answers questions and carries changes into the table.
//!
//! What was handed out is remembered with its stamp, for as long as the table holds it: after lost news, and in a
//! catalog that loses them silently every [`SCAN`], those documents are looked at again.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroUsize,
    ops::Range,
    sync::Arc,
    time::Duration,
};

use lru::LruCache;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior},
};

use super::{
    document::{KeyRecord, Record},
    source::{Change, Document, Found, Source, Stamp, Why},
};
use crate::{
    quota::{Slot, Table},
    tenant::{
        OrgId, Tenant,
        directory::{Absent, Ask, KeyHash, ServiceKey},
    },
};

/// When a change is enforced again that overtook its organisation on the way into the table.
const AGAIN: Duration = Duration::from_millis(50);

/// How often handed-out documents are looked at without news.
const SCAN: Duration = Duration::from_secs(2);

/// Questions answered by one visit to the source.
const BATCH: usize = 64;

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
pub(super) struct Feeder<S, F> {
    source: S,
    table: Arc<Table>,
    forget: F,
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

enum Asked {
    Tenant(oneshot::Sender<Result<Arc<Tenant>, Absent>>),
    Key(oneshot::Sender<Result<Arc<ServiceKey>, Absent>>),
}

impl<S: Source, F: Fn(&KeyHash) + Send + Sync> Feeder<S, F> {
    pub(super) fn new(source: S, table: Arc<Table>, forget: F) -> Self {
        Self {
            source,
            table,
            forget,
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
            // Every arm is safe to drop: what it has not given out stays in its queue.
            tokio::select! {
                taken = asks.recv_many(&mut batch, BATCH) => match taken {
                    0 => return,
                    _ => self.answer(&mut batch).await,
                },
                news = self.source.news().next() => match news {
                    Some(change) => {
                        changes.insert(change);
                        due = due.or_else(|| Some(Instant::now() + S::GATHER));
                    }
                    None if !hurried => {
                        scan.reset_after(S::SCAN_SOON);
                        hurried = true;
                    }
                    None => {}
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    due = None;
                    while let Some(change) = self.source.news().try_next() {
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
        for (document, asker) in self.read(wanted, Why::Asked).await.into_iter().zip(askers) {
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
    async fn follow(&mut self, mut changes: Vec<Change>) {
        changes.retain(|change| self.concerns(change));
        if changes.is_empty() {
            return;
        }
        for document in self.read(changes, Why::Changed).await {
            match document {
                Document::Org(org, found) => self.follow_org(org, found),
                Document::Key(hash, found) => self.follow_key(hash, found),
            }
        }
    }

    /// Whether anybody holds what may have changed. An organisation that nobody holds is read when it is asked for; a
    /// key that we forgot may have sessions all the same.
    fn concerns(&self, change: &Change) -> bool {
        let Change::Org(org) = change else { return true };
        let held = self.orgs.contains_key(org) || self.table.resident(org).is_some();
        if !held {
            self.table.outdate(org);
        }
        held
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
        let everything = self.source.news().take_missed();
        let held: Vec<Change> = if everything {
            // Also those that were handed out and are not yet in the table.
            let mut orgs: HashSet<&OrgId> = self.orgs.keys().collect();
            orgs.extend(slots.iter().map(|slot| slot.org()));
            let orgs = orgs.into_iter().cloned().map(Change::Org);
            orgs.chain(self.keys.iter().map(|(hash, _)| Change::Key(*hash))).collect()
        } else {
            let [orgs_at, keys_at] = &mut self.cursors;
            let orgs = &slots[window::<S>(orgs_at, slots.len())];
            let part = window::<S>(keys_at, self.keys.len());
            let keys = self.keys.iter().skip(part.start).take(part.len()).map(|(hash, _)| Change::Key(*hash));
            orgs.iter().map(|slot| Change::Org(slot.org().clone())).chain(keys).collect()
        };
        let Some(stamps) = self.source.stamps(held).await else {
            if everything {
                self.source.news().set_missed();
            }
            return self.set_away(Some("it can't be read"));
        };
        self.set_away(None);
        let changed = stamps.into_iter().filter(|(change, stamp)| self.is_news(change, *stamp));
        let changed: Vec<Change> = changed.map(|(change, _)| change).collect();
        if !changed.is_empty() {
            self.follow(changed).await;
        }
        self.settle(&slots);
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

    /// Reads documents, in the order they are named in; none when the source hangs. What could not be read, though it
    /// may have changed, is looked at once the source is back.
    async fn read(&mut self, wanted: Vec<Change>, why: Why) -> Vec<Document> {
        let documents = self.source.read(wanted, why).await;
        if documents.is_empty() {
            self.set_away(Some("it does not answer"));
        }
        let away = |document: &Document| match document {
            Document::Org(_, found) => matches!(found, Found::Away(_)),
            Document::Key(_, found) => matches!(found, Found::Away(_)),
        };
        if why == Why::Changed && (documents.is_empty() || documents.iter().any(away)) {
            self.source.news().set_missed();
        }
        documents
    }

    fn report(&mut self, which: Change, what: &str, digest: u64) {
        if self.damaged.get(&which) == Some(&digest) {
            return;
        }
        self.source.health().count_damaged();
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
            (None, true) => tracing::info!("the catalog is back; it was away for {:?}", self.source.health().age()),
            _ => {}
        }
        self.away = what.is_some();
    }
}

/// The part of `len` documents that this scan looks at.
fn window<S: Source>(cursor: &mut usize, len: usize) -> Range<usize> {
    let start = if *cursor < len { *cursor } else { 0 };
    *cursor = (start + S::SCAN_MAX).min(len);
    start..*cursor
}
