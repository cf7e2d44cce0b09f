//! Admission: one door for all protocols. Only [`Gate::admit`] makes a [`Session`]; only a session gets an
//! upstream connection.

mod gate;

use std::sync::{Arc, atomic::Ordering};

pub use gate::{Gate, Transport};

use crate::{
    identity::Identity,
    quota::{Live, Permit, Slot, Stop, clock},
    refusal::{Over, Refusal},
    tenant::Protocol,
    usage::Meter,
};

/// An admitted connection: its caller, its tenant's live limits, its place among the tenant's client sockets.
/// Dropping it gives the place back and ends its visibility.
#[derive(Debug)]
pub struct Session {
    identity: Arc<Identity>,
    protocol: Protocol,
    slot: Arc<Slot>,
    live: Arc<Live>,
    meter: Arc<Meter>,
    _place: Permit<Slot>,
}

impl Session {
    /// The verified caller.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What its client speaks.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The tenant's live limits and counters.
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// What others see of this session, and how they signal it.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// The tenant's counters for this protocol.
    pub fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// Takes `units` requests of the tenant's rate.
    ///
    /// # Errors
    /// The limit, with the time after which it would have been admitted.
    pub fn take(&self, units: u64) -> Result<(), Over> {
        self.slot.admit(self.protocol, clock::now_ns(), units)
    }

    /// Charges requests that were only counted after they ran.
    pub fn charge(&self, units: u64) {
        self.slot.charge(self.protocol, clock::now_ns(), units);
    }

    /// The refusal that a stopped session tells its client.
    pub fn farewell(stop: Stop) -> Refusal {
        match stop {
            Stop::Expired | Stop::Revoked => Refusal::Revoked,
            Stop::Suspended => Refusal::Suspended,
            Stop::Shed | Stop::Draining => Refusal::Draining,
        }
    }
}

/// One request without a credential, in its place among the tenant's client sockets. It opens nothing that a
/// credential is needed for.
#[derive(Debug)]
pub struct Visit {
    slot: Arc<Slot>,
    meter: Arc<Meter>,
    _places: [Permit<Slot>; 2],
}

impl Visit {
    /// The tenant's live limits and counters.
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// The tenant's counters for this protocol.
    pub fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.slot.leave(self.live.id);
        self.meter.open.fetch_sub(1, Ordering::Relaxed);
    }
}
