//! The table of resident tenants: organisation to [`Slot`].

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use hashbrown::HashMap;
use moka::sync::Cache;
use parking_lot::Mutex;

use super::{
    Live, Permit, Place, Stop, clock,
    rate::{Pace, Rate},
};
use crate::{
    refusal::{Limit, Over, Refusal},
    tenant::{
        Limits, OrgId, Protocol, Status, Tenant, Tiers,
        directory::{Absent, Directory, KeyHash},
    },
};

/// How often deadlines and expiries are looked at.
pub const TICK: Duration = Duration::from_millis(100);

/// How long an unknown organisation is remembered as unknown, against hammering the catalog.
const UNKNOWN_FOR: Duration = Duration::from_secs(1);

/// Unknown organisations remembered at once.
const UNKNOWN_MAX: u64 = 10_000;

/// What a tenant may do, all of it, at one instant. Immutable.
#[derive(Debug)]
pub struct Policy {
    /// The catalog's record.
    pub tenant: Arc<Tenant>,
    /// Its tier's numbers.
    pub limits: Arc<Limits>,
    paces: [Pace; Protocol::ALL.len()],
}

impl Policy {
    fn new(tenant: Arc<Tenant>, tiers: &Tiers) -> Self {
        let limits = Arc::clone(tiers.limits(tenant.tier));
        let paces = Protocol::ALL.map(|protocol| {
            let rate = limits.rate(protocol);
            Pace::new(rate.per_second, rate.burst)
        });
        Self { tenant, limits, paces }
    }
}

/// One protocol's counters of one tenant, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Lane {
    rate: Rate,
    clients: Place,
    connections: Place,
}

/// One tenant's live limits, counters and sessions.
#[derive(Debug)]
pub struct Slot {
    org: OrgId,
    policy: ArcSwap<Policy>,
    lanes: [Lane; Protocol::ALL.len()],
    /// Bytes stored per protocol, as last sampled.
    stored: [AtomicU64; Protocol::ALL.len()],
    live: Mutex<HashMap<u64, Arc<Live>>>,
}

impl Slot {
    fn new(policy: Policy) -> Self {
        Self {
            org: policy.tenant.org.clone(),
            policy: ArcSwap::from_pointee(policy),
            lanes: Default::default(),
            stored: Default::default(),
            live: Mutex::default(),
        }
    }

    /// Whose slot this is.
    pub fn org(&self) -> &OrgId {
        &self.org
    }

    /// The present policy. Load it once per decision, so that no decision sees two.
    pub fn policy(&self) -> arc_swap::Guard<Arc<Policy>> {
        self.policy.load()
    }

    /// Admits `units` requests at `now_ns` ([`clock::now_ns`]), or gives the refusal with the time to wait.
    pub fn admit(&self, protocol: Protocol, now_ns: u64, units: u64) -> Result<(), Over> {
        let policy = self.policy.load();
        self.lanes[protocol as usize].rate.admit(now_ns, units, policy.paces[protocol as usize]).map_err(|wait| {
            let rate = policy.limits.rate(protocol);
            Over {
                limit: Limit::Rate,
                tier: policy.tenant.tier,
                max: rate.per_second.into(),
                in_use: u64::from(rate.per_second) + 1,
                retry_after: Some(wait),
            }
        })
    }

    /// Charges `units` requests that were only counted after they ran.
    pub fn charge(&self, protocol: Protocol, now_ns: u64, units: u64) {
        let policy = self.policy.load();
        self.lanes[protocol as usize].rate.charge(now_ns, units, policy.paces[protocol as usize]);
    }

    /// Takes a client socket's place.
    pub fn client(self: &Arc<Self>, protocol: Protocol) -> Result<Permit<Slot>, Over> {
        let policy = self.policy.load();
        let max = policy.limits.client_sockets(protocol);
        let place: fn(&Slot) -> &Place = match protocol {
            Protocol::Postgres => |slot| &slot.lanes[Protocol::Postgres as usize].clients,
            Protocol::Redis => |slot| &slot.lanes[Protocol::Redis as usize].clients,
        };
        Permit::take(self, place, max).ok_or_else(|| Over {
            limit: Limit::ClientSockets,
            tier: policy.tenant.tier,
            max: max.into(),
            in_use: self.clients(protocol).into(),
            retry_after: None,
        })
    }

    /// Takes an upstream connection's place, if one is free.
    pub fn connection(self: &Arc<Self>, protocol: Protocol) -> Option<Permit<Slot>> {
        let max = self.policy.load().limits.connections(protocol);
        let place: fn(&Slot) -> &Place = match protocol {
            Protocol::Postgres => |slot| &slot.lanes[Protocol::Postgres as usize].connections,
            Protocol::Redis => |slot| &slot.lanes[Protocol::Redis as usize].connections,
        };
        Permit::take(self, place, max)
    }

    /// Client sockets open now.
    pub fn clients(&self, protocol: Protocol) -> u32 {
        self.lanes[protocol as usize].clients.taken()
    }

    /// Upstream connections open now.
    pub fn connections(&self, protocol: Protocol) -> u32 {
        self.lanes[protocol as usize].connections.taken()
    }

    /// Bytes stored, as last sampled; 0 before the first sample.
    pub fn stored(&self, protocol: Protocol) -> u64 {
        self.stored[protocol as usize].load(Ordering::Relaxed)
    }

    /// Keeps a new sample of the bytes stored.
    pub fn set_stored(&self, protocol: Protocol, bytes: u64) {
        self.stored[protocol as usize].store(bytes, Ordering::Relaxed);
    }

    /// Makes a session visible to [`Table`]; it is so until [`Self::leave`].
    pub fn enter(&self, live: Arc<Live>) {
        self.live.lock().insert(live.id, live);
    }

    /// Forgets a session.
    pub fn leave(&self, id: u64) {
        self.live.lock().remove(&id);
    }

    /// Live sessions now.
    pub fn sessions(&self) -> Vec<Arc<Live>> {
        self.live.lock().values().cloned().collect()
    }

    /// Swaps the policy and tells the sessions that can't stay. An older epoch than the present one is refused.
    fn apply(&self, policy: Policy) -> Result<(), StaleEpoch> {
        let present = self.policy.load().tenant.epoch;
        if policy.tenant.epoch < present {
            return Err(StaleEpoch { present, offered: policy.tenant.epoch });
        }
        let status = policy.tenant.status;
        let caps = Protocol::ALL.map(|protocol| policy.limits.client_sockets(protocol));
        self.policy.store(Arc::new(policy));
        if status != Status::Active {
            self.live.lock().values().for_each(|live| live.stop(Stop::Suspended));
        }
        for (protocol, cap) in Protocol::ALL.into_iter().zip(caps) {
            self.shed(self.clients(protocol).saturating_sub(cap));
        }
        Ok(())
    }

    /// Stops `surplus` sessions: idle ones first, then the oldest.
    fn shed(&self, surplus: u32) {
        if surplus == 0 {
            return;
        }
        let mut sessions = self.sessions();
        sessions.sort_by_key(|live| (!live.is_idle(), live.opened_ms));
        sessions.iter().take(surplus as usize).for_each(|live| live.stop(Stop::Shed));
    }
}

/// A record older than the one in force was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleEpoch {
    /// In force.
    pub present: u64,
    /// Offered.
    pub offered: u64,
}

/// All resident tenants. Bounded: tenants without sessions are dropped by least recent use and loaded again on
/// demand; a tenant with a live session always keeps its one slot.
pub struct Table {
    directory: Directory,
    tiers: ArcSwap<Tiers>,
    /// Every slot that anybody holds. Weak: sessions and `resident` keep slots alive.
    slots: DashMap<OrgId, Weak<Slot>>,
    resident: Cache<OrgId, Arc<Slot>>,
    unknown: Cache<OrgId, ()>,
    ids: AtomicU64,
}

impl Table {
    /// An empty table that loads through `directory` and keeps at most `resident_max` tenants without sessions.
    pub fn new(directory: Directory, tiers: Tiers, resident_max: u64) -> Self {
        Self {
            directory,
            tiers: ArcSwap::from_pointee(tiers),
            slots: DashMap::new(),
            resident: Cache::new(resident_max),
            unknown: Cache::builder().max_capacity(UNKNOWN_MAX).time_to_live(UNKNOWN_FOR).build(),
            ids: AtomicU64::new(1),
        }
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
        if self.unknown.contains_key(org) {
            return Err(Refusal::UnknownOrg);
        }
        match self.directory.tenant(org).await {
            Ok(tenant) => Ok(self.place(tenant)),
            Err(Absent::Unknown) => {
                self.unknown.insert(org.clone(), ());
                Err(Refusal::UnknownOrg)
            }
            Err(Absent::Unavailable) => Err(Refusal::CatalogDown),
        }
    }

    /// Makes the tenant resident, in its present slot if it has one.
    fn place(&self, tenant: Arc<Tenant>) -> Arc<Slot> {
        let org = tenant.org.clone();
        let policy = Policy::new(tenant, &self.tiers.load());
        let mut entry = self.slots.entry(org.clone()).or_default();
        let slot = match entry.upgrade() {
            Some(slot) => {
                // A load that was overtaken by a change says nothing new.
                let _ = slot.apply(policy);
                slot
            }
            None => {
                let slot = Arc::new(Slot::new(policy));
                *entry = Arc::downgrade(&slot);
                slot
            }
        };
        drop(entry);
        self.resident.insert(org, Arc::clone(&slot));
        slot
    }

    /// Takes a changed record from the catalog. Tenants that are not resident are left to be loaded when needed.
    ///
    /// # Errors
    /// [`StaleEpoch`] when the record is older than the one in force, which stays.
    pub fn apply(&self, tenant: Arc<Tenant>) -> Result<(), StaleEpoch> {
        self.unknown.invalidate(&tenant.org);
        match self.resident(&tenant.org) {
            Some(slot) => slot.apply(Policy::new(tenant, &self.tiers.load())),
            None => Ok(()),
        }
    }

    /// Takes the news that a record is gone: its sessions end as suspended ones do.
    pub fn remove(&self, org: &OrgId) {
        if let Some(slot) = self.resident(org) {
            self.resident.invalidate(org);
            let mut tenant = Tenant::clone(&slot.policy.load().tenant);
            tenant.status = Status::Deleting;
            let _ = slot.apply(Policy::new(Arc::new(tenant), &self.tiers.load()));
        }
    }

    /// Swaps the tiers and gives every resident tenant its new limits.
    pub fn set_tiers(&self, tiers: Tiers) {
        self.tiers.store(Arc::new(tiers));
        for slot in self.slots() {
            let tenant = Arc::clone(&slot.policy.load().tenant);
            let _ = slot.apply(Policy::new(tenant, &self.tiers.load()));
        }
    }

    /// Every slot that is held by anybody.
    pub fn slots(&self) -> Vec<Arc<Slot>> {
        self.slots.iter().filter_map(|entry| entry.value().upgrade()).collect()
    }

    /// Stops the live sessions that `doomed` picks.
    pub fn stop_where(&self, reason: Stop, doomed: impl Fn(&Live) -> bool) {
        for slot in self.slots() {
            slot.live.lock().values().filter(|live| doomed(live)).for_each(|live| live.stop(reason));
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
                slot.live.lock().values().for_each(|live| live.tick(now_ms));
            }
            ticks += 1;
            if ticks.is_multiple_of(100) {
                self.slots.retain(|_, weak| weak.strong_count() > 0);
            }
        }
    }
}
