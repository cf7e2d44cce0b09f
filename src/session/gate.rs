//! The checks, in order, once.

use std::{
    sync::{Arc, atomic::Ordering},
    time::SystemTime,
};

use super::{Session, Visit};
use crate::{
    identity::{Identity, Proof, Verifier},
    quota::{Live, Permit, Slot, Table, clock},
    refusal::Refusal,
    tenant::{Expiry, OrgId, Protocol, Status},
    usage::Meters,
};

/// What a credential would travel over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TLS, loopback or a Unix socket: nobody else reads it.
    Private,
    /// Plaintext over a network.
    Open,
}

/// The door. One per process.
pub struct Gate {
    verifier: Arc<Verifier>,
    table: Arc<Table>,
    meters: Arc<Meters>,
    allow_plaintext: bool,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

impl Gate {
    /// A door before `table`, trusting `verifier`.
    pub fn new(verifier: Arc<Verifier>, table: Arc<Table>, meters: Arc<Meters>, allow_plaintext: bool) -> Self {
        Self { verifier, table, meters, allow_plaintext }
    }

    /// The epoch of an organisation's policy in this process, if there is one.
    pub fn epoch(&self, org: &OrgId) -> Option<u64> {
        self.table.resident(org).map(|slot| slot.policy().tenant.epoch)
    }

    /// Whether a credential may be asked for over `transport`; to be asked before the client is invited to send one.
    ///
    /// # Errors
    /// [`Refusal::PlaintextToken`].
    pub fn may_carry(&self, transport: Transport) -> Result<(), Refusal> {
        match transport {
            Transport::Open if !self.allow_plaintext => Err(Refusal::PlaintextToken),
            _ => Ok(()),
        }
    }

    /// Admits a caller: verifies the credential, finds its tenant, checks that the tenant is served, takes a place
    /// among its client sockets.
    ///
    /// # Errors
    /// The first check that says no.
    ///
    /// # Cancel safety
    /// Dropping it before the end leaves nothing behind.
    pub async fn admit(&self, credential: &[u8], protocol: Protocol) -> Result<Session, Refusal> {
        let identity = self.verifier.verify(credential).await?;
        self.admit_as(identity, protocol).await
    }

    /// Admits whom [`Self::identify`] found just now: [`Self::admit`] without verifying twice.
    ///
    /// # Errors
    /// The first check that says no.
    ///
    /// # Cancel safety
    /// Dropping it before the end leaves nothing behind.
    pub async fn admit_as(&self, identity: Arc<Identity>, protocol: Protocol) -> Result<Session, Refusal> {
        let slot = self.table.slot(&identity.org).await?;
        let policy = slot.policy();
        if policy.tenant.status != Status::Active {
            return Err(Refusal::Suspended);
        }
        let expires_ms = match policy.limits.expiry {
            Expiry::Strict => expiry_ms(&identity),
            Expiry::ConnectOnly => u64::MAX,
        };
        drop(policy);
        let place = slot.client(protocol).map_err(Refusal::OverLimit)?;
        let (service_key, signing_key) = match &identity.proof {
            Proof::Token(kid) => (None, kid.clone()),
            Proof::ServiceKey(hash) => (Some(*hash), None),
        };
        let live = Arc::new(Live::new(self.table.next_id(), clock::now_ms(), expires_ms, service_key, signing_key));
        slot.enter(Arc::clone(&live));
        let meter = self.meters.meter(slot.org(), protocol);
        meter.open.fetch_add(1, Ordering::Relaxed);
        meter.opened.fetch_add(1, Ordering::Relaxed);
        let session = Session { identity, protocol, slot, live, meter, _place: place };
        // A suspension between the check and `enter` would have missed this session.
        if session.slot.policy().tenant.status != Status::Active {
            return Err(Refusal::Suspended);
        }
        Ok(session)
    }

    /// Who a credential speaks for, without admitting anybody.
    ///
    /// # Errors
    /// The credential's fault.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn identify(&self, credential: &[u8]) -> Result<Arc<Identity>, Refusal> {
        self.verifier.verify(credential).await
    }

    /// Lets a request in that carries no credential by its protocol's design (a file by its unguessable address, a
    /// webhook): for one short request to what the tenant itself made public, counted as the tenant's, and among those
    /// of its kind, which get a part of the tenant's limits.
    ///
    /// # Errors
    /// The first check that says no.
    ///
    /// # Cancel safety
    /// Dropping it before the end leaves nothing behind.
    pub async fn visit(&self, org: &OrgId, protocol: Protocol) -> Result<Visit, Refusal> {
        let slot = self.table.slot(org).await?;
        if slot.policy().tenant.status != Status::Active {
            return Err(Refusal::Suspended);
        }
        let places = slot.guest(protocol).map_err(Refusal::OverLimit)?;
        let meter = self.meters.meter(slot.org(), protocol);
        Ok(Visit { slot, meter, _places: places })
    }

    /// A place of `org`'s for a socket that is kept though it can't be served; `None` if there is none left.
    ///
    /// # Errors
    /// The tenant is not known, or the catalog can't be asked.
    ///
    /// # Cancel safety
    /// Dropping it before the end leaves nothing behind.
    pub async fn wait(&self, org: &OrgId) -> Result<Option<Permit<Slot>>, Refusal> {
        Ok(self.table.slot(org).await?.wait())
    }

    /// Takes a new credential for a session in its place, so that a token can be renewed at the cap of sockets.
    /// Gives false, and changes nothing, when it speaks for another organisation.
    ///
    /// # Errors
    /// The first check that says no; the session stays as it was.
    ///
    /// # Cancel safety
    /// Dropping it before the end changes nothing.
    pub async fn renew(&self, session: &mut Session, credential: &[u8]) -> Result<bool, Refusal> {
        let identity = self.verifier.verify(credential).await?;
        if identity.org != session.identity.org {
            return Ok(false);
        }
        let policy = session.slot.policy();
        if policy.tenant.status != Status::Active {
            return Err(Refusal::Suspended);
        }
        let expires_ms = match policy.limits.expiry {
            Expiry::Strict => expiry_ms(&identity),
            Expiry::ConnectOnly => u64::MAX,
        };
        drop(policy);
        let (service_key, signing_key) = match &identity.proof {
            Proof::Token(kid) => (None, kid.clone()),
            Proof::ServiceKey(hash) => (Some(*hash), None),
        };
        let live = Arc::new(Live::new(self.table.next_id(), clock::now_ms(), expires_ms, service_key, signing_key));
        session.slot.enter(Arc::clone(&live));
        session.slot.leave(session.live.id);
        session.live = live;
        session.identity = identity;
        Ok(true)
    }
}

/// The end of a credential on the coarse clock.
fn expiry_ms(identity: &Identity) -> u64 {
    let Some(at) = identity.expires_at else { return u64::MAX };
    let left = at.duration_since(SystemTime::now()).unwrap_or_default();
    clock::now_ms().saturating_add(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
}
