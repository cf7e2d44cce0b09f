//! The table of resident tenants: organisation to [`Slot`].

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use dashmap::{DashMap, Entry};
use moka::sync::Cache;
use tokio::sync::watch;

pub use super::slot::{Policy, Slot, StaleEpoch};
use super::{Live, Stop, clock};
use crate::{
    refusal::Refusal,
    tenant::{
        OrgId, Tenant, Tiers,
        directory::{Absent, Directory, KeyHash},
    },
};

/// How often deadlines and expiries are looked at.
pub const TICK: Duration = Duration::from_millis(100);

/// How long an unknown organisation is remembered as unknown, against hammering the catalog.
const UNKNOWN_FOR: Duration = Duration::from_secs(1);

/// Unknown organisations remembered at once.
const UNKNOWN_MAX: u64 = 10_000;

/// Longest wait for the catalog, turn included: shorter than the handshake deadline, so that the client gets a reason.
const LOAD_WITHIN: Duration = Duration::from_secs(5);

/// Loads of one tenant that may be overtaken by changes of it before we give up.
const LOADS_MAX: usize = 4;

/// Desks at which loads queue: two tenants seldom share one, and all of them take a few KiB.
const DESKS: usize = 256;

/// Where loads of a tenant wait for each other, so that a thousand clients arriving at once ask one question.
#[derive(Default)]
struct Desk {
    turn: tokio::sync::Mutex<()>,
    /// Changes reported of tenants at this desk: an answer that is older than one of them is not used.
    changes: AtomicU64,
}

/// All resident tenants. Bounded: tenants without sessions are dropped by least recent use and loaded again on
/// demand; a tenant with a live session always keeps its one slot.
pub struct Table {
    directory: Directory,
    tiers: ArcSwap<Tiers>,
    /// Every slot that anybody holds. Weak: sessions and `resident` keep slots alive.
    slots: DashMap<OrgId, Weak<Slot>>,
    resident: Cache<OrgId, Arc<Slot>>,
    desks: Box<[Desk]>,
    load_within: Duration,
    unknown: Cache<OrgId, ()>,
    ids: AtomicU64,
    /// Counts beginnings and ends of tenants' standing still.
    stills: watch::Sender<u64>,
}

impl Table {
    /// An empty table that loads through `directory` and keeps at most `resident_max` tenants without sessions.
    pub fn new(directory: Directory, tiers: Tiers, resident_max: u64) -> Self {
        Self {
            directory,
            tiers: ArcSwap::from_pointee(tiers),
            slots: DashMap::new(),
            resident: Cache::new(resident_max),
            desks: std::iter::repeat_with(Desk::default).take(DESKS).collect(),
            load_within: LOAD_WITHIN,
            unknown: Cache::builder().max_capacity(UNKNOWN_MAX).time_to_live(UNKNOWN_FOR).build(),
            ids: AtomicU64::new(1),
            stills: watch::Sender::new(0),
        }
    }

    /// Tells when some tenant has begun or ended to stand still ([`Tenant::still`]).
    pub fn stills(&self) -> watch::Receiver<u64> {
        self.stills.subscribe()
    }

    /// A session id, unique in this process.
    pub fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// The tenant's slot if it is resident.
    pub fn resident(&self, org: &OrgId) -> Option<Arc<Slot>> {
        self.resident.get(org).or_else(|| self.slots.get(org).and_then(|weak| weak.upgrade()))
    }

    /// The tenant's slot, loaded from the catalog if need be.
    ///
    /// # Errors
    /// [`Refusal::UnknownOrg`], or [`Refusal::CatalogDown`] when nobody can say.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn slot(&self, org: &OrgId) -> Result<Arc<Slot>, Refusal> {
        if let Some(slot) = self.resident(org) {
            return Ok(slot);
        }
        tokio::time::timeout(self.load_within, self.load(org)).await.unwrap_or(Err(Refusal::CatalogDown))
    }

    async fn load(&self, org: &OrgId) -> Result<Arc<Slot>, Refusal> {
        if self.unknown.contains_key(org) {
            return Err(Refusal::UnknownOrg);
        }
        let desk = self.desk(org);
        let _turn = desk.turn.lock().await;
        for _ in 0..LOADS_MAX {
            if let Some(slot) = self.resident(org) {
                return Ok(slot);
            }
            if self.unknown.contains_key(org) {
                return Err(Refusal::UnknownOrg);
            }
            let changes = desk.changes.load(Ordering::Acquire);
            match self.directory.tenant(org).await {
                Ok(tenant) if tenant.org != *org => return Err(Refusal::Internal),
                Ok(tenant) => {
                    if let Some(slot) = self.place(tenant, changes) {
                        return Ok(slot);
                    }
                }
                Err(Absent::Unknown) if desk.changes.load(Ordering::Acquire) == changes => {
                    self.unknown.insert(org.clone(), ());
                    return Err(Refusal::UnknownOrg);
                }
                Err(Absent::Unknown) => {}
                Err(Absent::Unavailable) => return Err(Refusal::CatalogDown),
            }
        }
        Err(Refusal::CatalogDown)
    }

    fn desk(&self, org: &OrgId) -> &Desk {
        &self.desks[self.slots.hash_usize(org) % self.desks.len()]
    }

    /// Makes a loaded tenant resident, in its present slot if it has one; `None` when it changed since `changes` was
    /// read. Under the entry's lock, as [`Self::changed`] is: a change comes wholly before or wholly after.
    fn place(&self, tenant: Arc<Tenant>, changes: u64) -> Option<Arc<Slot>> {
        let org = tenant.org.clone();
        let mut entry = self.slots.entry(org.clone()).or_default();
        if self.desk(&org).changes.load(Ordering::Acquire) != changes {
            return None;
        }
        let slot = entry.upgrade().unwrap_or_else(|| {
            let slot = Arc::new(Slot::new(Policy::new(tenant, &self.tiers.load())));
            *entry = Arc::downgrade(&slot);
            slot
        });
        drop(entry);
        self.resident.insert(org, Arc::clone(&slot));
        Some(slot)
    }

    /// Outdates every load of `org` that is under way, and gives the slot it has.
    fn changed(&self, org: &OrgId) -> Option<Arc<Slot>> {
        let entry = self.slots.entry(org.clone());
        self.desk(org).changes.fetch_add(1, Ordering::Release);
        self.unknown.invalidate(org);
        match entry {
            Entry::Occupied(entry) => entry.get().upgrade(),
            Entry::Vacant(_) => None,
        }
    }

    /// Takes the news that an organisation which nobody holds may have changed: what was said of it before is asked again.
    pub fn outdate(&self, org: &OrgId) {
        let _ = self.changed(org);
    }

    /// Takes a changed record from the catalog. Tenants that are not resident are left to be loaded when needed.
    ///
    /// # Errors
    /// [`StaleEpoch`] when the record is older than the one in force, which stays.
    pub fn apply(&self, tenant: Arc<Tenant>) -> Result<(), StaleEpoch> {
        let Some(slot) = self.changed(&tenant.org) else { return Ok(()) };
        let (before, now) = (slot.policy().tenant.still, tenant.still);
        slot.change(Some(tenant), &self.tiers)?;
        if before || now {
            self.stills.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// Takes the news that a record is gone: its sessions end as suspended ones do.
    pub fn remove(&self, org: &OrgId) {
        if let Some(slot) = self.changed(org) {
            self.resident.invalidate(org);
            slot.retire(&self.tiers);
        }
    }

    /// Swaps the tiers and gives every resident tenant its new limits.
    pub fn set_tiers(&self, tiers: Tiers) {
        self.tiers.store(Arc::new(tiers.keeping(&self.tiers.load())));
        for slot in self.slots() {
            // The present record under the new numbers is never stale.
            let _ = slot.change(None, &self.tiers);
        }
    }

    /// Every slot that is held by anybody.
    pub fn slots(&self) -> Vec<Arc<Slot>> {
        self.slots.iter().filter_map(|entry| entry.value().upgrade()).collect()
    }

    /// Stops the live sessions that `doomed` picks.
    pub fn stop_where(&self, reason: Stop, doomed: impl Fn(&Live) -> bool) {
        for slot in self.slots() {
            slot.stop_where(reason, &doomed);
        }
    }

    /// Stops the sessions that came with a revoked service key.
    pub fn revoke_key(&self, hash: &KeyHash) {
        self.stop_where(Stop::Revoked, |live| live.service_key.as_ref() == Some(hash));
    }

    /// Passes deadlines and expiries on to the sessions; runs until dropped.
    pub async fn run_ticker(&self) {
        let mut ticker = tokio::time::interval(TICK);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticks = 0u64;
        loop {
            ticker.tick().await;
            let now_ms = clock::now_ms();
            for slot in self.slots() {
                slot.tick(now_ms);
            }
            ticks += 1;
            if ticks.is_multiple_of(100) {
                self.slots.retain(|_, weak| weak.strong_count() > 0);
            }
        }
    }
}

#[cfg(test)]
mod tests;
