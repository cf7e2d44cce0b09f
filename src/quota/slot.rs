//! One tenant's live limits, counters and sessions.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use parking_lot::Mutex;

use super::{
    Live, Permit, Place, Stop, clock,
    rate::{DEBT_MAX, Pace, Present, Rate},
};
use crate::{
    refusal::{Limit, Over},
    tenant::{Limits, OrgId, Protocol, Status, Tenant, Tiers, tier::RateLimit},
};

/// What a tenant may do, all of it, at one instant. Immutable.
#[derive(Debug)]
pub struct Policy {
    /// The catalog's record.
    pub tenant: Arc<Tenant>,
    /// Its tier's numbers.
    pub limits: Arc<Limits>,
    /// The record is gone: whatever comes next is a new organisation of the same name, with epochs of its own.
    gone: bool,
}

impl Policy {
    pub(super) fn new(tenant: Arc<Tenant>, tiers: &Tiers) -> Self {
        let limits = Arc::clone(tiers.limits(tenant.tier));
        Self { tenant, limits, gone: false }
    }
}

/// One protocol's counters of one tenant, on cache lines of their own.
#[derive(Debug)]
#[repr(align(128))]
struct Lane {
    rate: Rate,
    pace: Present,
    clients: Place,
    connections: Place,
}

impl Lane {
    fn new(rate: &RateLimit) -> Self {
        Self {
            rate: Rate::default(),
            pace: Present::new(rate.interval_ns(), rate.burst),
            clients: Place::default(),
            connections: Place::default(),
        }
    }
}

/// Sync sockets of one tenant that are kept though there is no place for them: closing a few would make them come back
/// at once, and many would be a way around the cap.
const WAITING_MAX: u32 = 32;

/// The part of a tenant's limits that requests without a credential get together, as a divisor: whoever knows a
/// tenant's name can send them, and the tenant's own have to find room beside them.
const GUESTS_PART: u32 = 2;

/// What requests without a credential use of a tenant's Convex limits. All of it counts there too.
#[derive(Debug, Default)]
struct Guests {
    sockets: Place,
    writes: Place,
    rate: Rate,
}

/// One tenant's live limits, counters and sessions.
#[derive(Debug)]
pub struct Slot {
    org: OrgId,
    /// Swapped only under the lock of `live`, so that a session that enters either is seen by the change or sees it.
    policy: ArcSwap<Policy>,
    lanes: [Lane; Protocol::ALL.len()],
    /// Convex queries subscribed over all sockets.
    subscriptions: Place,
    /// Convex sockets over the cap.
    waiting: Place,
    guests: Guests,
    /// Bytes stored per protocol, as last sampled.
    stored: [AtomicU64; Protocol::ALL.len()],
    live: Mutex<HashMap<u64, Arc<Live>>>,
}

impl Slot {
    pub(super) fn new(policy: Policy) -> Self {
        Self {
            org: policy.tenant.org.clone(),
            lanes: Protocol::ALL.map(|protocol| Lane::new(policy.limits.rate(protocol))),
            policy: ArcSwap::from_pointee(policy),
            subscriptions: Place::default(),
            waiting: Place::default(),
            guests: Guests::default(),
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
        let lane = &self.lanes[protocol as usize];
        lane.rate.admit(now_ns, units, lane.pace.pace()).map_err(|wait| {
            let policy = self.policy.load();
            let rate = policy.limits.rate(protocol);
            Over {
                limit: Limit::Rate,
                tier: policy.tenant.tier,
                max: rate.units().into(),
                in_use: u64::from(rate.units()) + 1,
                retry_after: Some(wait),
            }
        })
    }

    /// Admits a Convex request without a credential, at its part of the rate.
    pub fn admit_guest(&self, now_ns: u64, units: u64) -> Result<(), Over> {
        let Pace { interval_ns, tolerance_ns } = self.lanes[Protocol::Convex as usize].pace.pace();
        let part = Pace { interval_ns: interval_ns.saturating_mul(GUESTS_PART.into()), tolerance_ns };
        self.guests.rate.admit(now_ns, units, part).map_err(|wait| {
            let policy = self.policy.load();
            let max = u64::from(policy.limits.rate(Protocol::Convex).units() / GUESTS_PART);
            let tier = policy.tenant.tier;
            Over { limit: Limit::Rate, tier, max, in_use: max + 1, retry_after: Some(wait) }
        })?;
        self.admit(Protocol::Convex, now_ns, units)
    }

    /// Charges `units` requests that were only counted after they ran.
    pub fn charge(&self, protocol: Protocol, now_ns: u64, units: u64) {
        let lane = &self.lanes[protocol as usize];
        lane.rate.charge(now_ns, units, lane.pace.pace());
    }

    /// Charges `units` requests that ran before and run again through no fault of their caller's: a reconnecting
    /// client's subscriptions. They may run into debt, as far as a debt goes ([`super::rate::DEBT_MAX`]).
    pub fn repeat(&self, protocol: Protocol, now_ns: u64, units: u64) -> Result<(), Over> {
        let lane = &self.lanes[protocol as usize];
        let furthest = Duration::from_nanos(lane.pace.pace().tolerance_ns) + DEBT_MAX;
        if lane.rate.owed(now_ns) >= furthest {
            return self.admit(protocol, now_ns, units);
        }
        self.charge(protocol, now_ns, units);
        Ok(())
    }

    /// Takes a place among the tenant's subscribed Convex queries.
    pub fn subscription(self: &Arc<Self>) -> Result<Permit<Slot>, Over> {
        let policy = self.policy.load();
        let max = policy.limits.convex.subscriptions;
        Permit::take(self, |slot| &slot.subscriptions, max).ok_or_else(|| Over {
            limit: Limit::Subscriptions,
            tier: policy.tenant.tier,
            max: max.into(),
            in_use: self.subscriptions().into(),
            retry_after: None,
        })
    }

    /// Convex queries subscribed now.
    pub fn subscriptions(&self) -> u32 {
        self.subscriptions.taken()
    }

    /// Takes a place among the Convex mutations and actions under way.
    pub fn write(self: &Arc<Self>) -> Result<Permit<Slot>, Over> {
        let policy = self.policy.load();
        self.connection(Protocol::Convex).ok_or_else(|| Over {
            limit: Limit::InFlight,
            tier: policy.tenant.tier,
            max: policy.limits.convex.in_flight_writes.into(),
            in_use: self.connections(Protocol::Convex).into(),
            retry_after: None,
        })
    }

    /// Takes a place among the writes under way for a request without a credential, and one among all.
    pub fn guest_write(self: &Arc<Self>) -> Result<[Permit<Slot>; 2], Over> {
        let policy = self.policy.load();
        let max = (policy.limits.convex.in_flight_writes / GUESTS_PART).max(1);
        let part = Permit::take(self, |slot| &slot.guests.writes, max).ok_or_else(|| Over {
            limit: Limit::InFlight,
            tier: policy.tenant.tier,
            max: max.into(),
            in_use: self.guests.writes.taken().into(),
            retry_after: None,
        })?;
        Ok([part, self.write()?])
    }

    /// Takes a client socket's place for a request without a credential: among them, and among all.
    pub fn guest(self: &Arc<Self>, protocol: Protocol) -> Result<[Permit<Slot>; 2], Over> {
        let policy = self.policy.load();
        let max = (policy.limits.client_sockets(protocol) / GUESTS_PART).max(1);
        let part = Permit::take(self, |slot| &slot.guests.sockets, max).ok_or_else(|| Over {
            limit: Limit::ClientSockets,
            tier: policy.tenant.tier,
            max: max.into(),
            in_use: self.guests.sockets.taken().into(),
            retry_after: None,
        })?;
        Ok([part, self.client(protocol)?])
    }

    /// Takes a place for a Convex socket that is kept though it can't be served, if one is free.
    pub fn wait(self: &Arc<Self>) -> Option<Permit<Slot>> {
        Permit::take(self, |slot| &slot.waiting, WAITING_MAX)
    }

    /// Takes a client socket's place.
    pub fn client(self: &Arc<Self>, protocol: Protocol) -> Result<Permit<Slot>, Over> {
        let policy = self.policy.load();
        let max = policy.limits.client_sockets(protocol);
        let place: fn(&Slot) -> &Place = match protocol {
            Protocol::Postgres => |slot| &slot.lanes[Protocol::Postgres as usize].clients,
            Protocol::Redis => |slot| &slot.lanes[Protocol::Redis as usize].clients,
            Protocol::Mongodb => |slot| &slot.lanes[Protocol::Mongodb as usize].clients,
            Protocol::Convex => |slot| &slot.lanes[Protocol::Convex as usize].clients,
            Protocol::Neon => |slot| &slot.lanes[Protocol::Neon as usize].clients,
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
            Protocol::Mongodb => |slot| &slot.lanes[Protocol::Mongodb as usize].connections,
            Protocol::Convex => |slot| &slot.lanes[Protocol::Convex as usize].connections,
            Protocol::Neon => |slot| &slot.lanes[Protocol::Neon as usize].connections,
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

    /// Makes a session visible to [`Table`](super::Table); it is so until [`Self::leave`]. A session that was admitted
    /// under a policy which has changed since is stopped here as the others were.
    pub fn enter(&self, live: Arc<Live>) {
        let mut sessions = self.live.lock();
        sessions.insert(live.id, live);
        self.enforce(&sessions);
    }

    /// Forgets a session.
    pub fn leave(&self, id: u64) {
        self.live.lock().remove(&id);
    }

    /// Live sessions now.
    pub fn sessions(&self) -> Vec<Arc<Live>> {
        self.live.lock().values().cloned().collect()
    }

    /// Swaps the policy for the one that `tenant` (`None`: the present record) has under `tiers`, and tells the
    /// sessions that can't stay. An older epoch than the present one is refused.
    pub(super) fn change(&self, tenant: Option<Arc<Tenant>>, tiers: &ArcSwap<Tiers>) -> Result<(), StaleEpoch> {
        let sessions = self.live.lock();
        let present = self.policy.load_full();
        let policy = match tenant {
            Some(tenant) if tenant.epoch < present.tenant.epoch && !present.gone => {
                return Err(StaleEpoch { present: present.tenant.epoch, offered: tenant.epoch });
            }
            Some(tenant) => Policy::new(tenant, &tiers.load()),
            None => Policy { gone: present.gone, ..Policy::new(Arc::clone(&present.tenant), &tiers.load()) },
        };
        self.swap(policy, &sessions);
        Ok(())
    }

    /// Ends the tenant's sessions for good: its record is gone.
    pub(super) fn retire(&self, tiers: &ArcSwap<Tiers>) {
        let sessions = self.live.lock();
        let present = self.policy.load_full();
        let tenant = Tenant { status: Status::Deleting, ..Tenant::clone(&present.tenant) };
        let policy = Policy { gone: true, ..Policy::new(Arc::new(tenant), &tiers.load()) };
        self.swap(policy, &sessions);
    }

    /// Passes deadlines and expired credentials on.
    pub(super) fn tick(&self, now_ms: u64) {
        self.live.lock().values().for_each(|live| live.tick(now_ms));
    }

    /// Stops the sessions that `doomed` picks.
    pub(super) fn stop_where(&self, reason: Stop, doomed: impl Fn(&Live) -> bool) {
        self.live.lock().values().filter(|live| doomed(live)).for_each(|live| live.stop(reason));
    }

    fn swap(&self, next: Policy, sessions: &HashMap<u64, Arc<Live>>) {
        let limits = Arc::clone(&next.limits);
        self.policy.store(Arc::new(next));
        for (lane, protocol) in self.lanes.iter().zip(Protocol::ALL) {
            let rate = limits.rate(protocol);
            let before = lane.pace.pace();
            lane.pace.set(rate.interval_ns(), rate.burst);
            if lane.pace.pace().interval_ns < before.interval_ns {
                lane.rate.forgive(clock::now_ns(), lane.pace.pace());
            }
        }
        self.enforce(sessions);
    }

    /// Stops the sessions that the present policy has no place for.
    fn enforce(&self, sessions: &HashMap<u64, Arc<Live>>) {
        let policy = self.policy.load();
        if policy.tenant.status != Status::Active {
            sessions.values().for_each(|live| live.stop(Stop::Suspended));
            return;
        }
        for protocol in Protocol::ALL {
            let surplus = self.clients(protocol).saturating_sub(policy.limits.client_sockets(protocol));
            if surplus > 0 {
                shed(sessions, surplus as usize);
            }
        }
    }
}

/// Stops `surplus` sessions: idle ones first, then the oldest. Those that are stopping already count.
fn shed(sessions: &HashMap<u64, Arc<Live>>, surplus: usize) {
    let (staying, leaving): (Vec<_>, Vec<_>) = sessions.values().partition(|live| live.stopped().is_none());
    let Some(surplus) = surplus.checked_sub(leaving.len()) else { return };
    let mut staying: Vec<(bool, u64, &Live)> =
        staying.into_iter().map(|live| (!live.is_idle(), live.opened_ms, &**live)).collect();
    staying.sort_by_key(|&(busy, opened_ms, live)| (busy, opened_ms, live.id));
    staying.iter().take(surplus).for_each(|(_, _, live)| live.stop(Stop::Shed));
}

/// A record older than the one in force was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleEpoch {
    /// In force.
    pub present: u64,
    /// Offered.
    pub offered: u64,
}
