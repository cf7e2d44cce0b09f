//! Tenants as operators see them: the record in force, and what is in use of it.

use std::sync::Arc;

use serde::Serialize;

use crate::{
    quota::Slot,
    tenant::{Home, OrgId, Protocol, Status, Tier},
};

/// Tenants on one page unless asked for fewer or more.
const PAGE: usize = 100;

/// Most tenants on one page: some 300 KiB of JSON.
pub(super) const PAGE_MAX: usize = 1000;

#[derive(Serialize)]
struct Count {
    used: u32,
    max: u32,
}

#[derive(Serialize)]
struct Protocols {
    protocol: &'static str,
    sessions: Count,
    connections: Count,
    stored_bytes: u64,
}

/// One tenant.
#[derive(Serialize)]
pub(super) struct View {
    org: OrgId,
    tier: Tier,
    status: Status,
    epoch: u64,
    home: Home,
    sessions: usize,
    protocols: Vec<Protocols>,
}

impl View {
    pub(super) fn of(slot: &Slot) -> Self {
        let policy = slot.policy();
        let protocols = Protocol::ALL.map(|protocol| Protocols {
            protocol: protocol.label(),
            sessions: Count { used: slot.clients(protocol), max: policy.limits.client_sockets(protocol) },
            connections: Count { used: slot.connections(protocol), max: policy.limits.connections(protocol) },
            stored_bytes: slot.stored(protocol),
        });
        Self {
            org: slot.org().clone(),
            tier: policy.tenant.tier,
            status: policy.tenant.status,
            epoch: policy.tenant.epoch,
            home: policy.tenant.home(),
            sessions: slot.sessions().len(),
            protocols: protocols.into(),
        }
    }
}

/// A page of tenants, in the order of their ids.
#[derive(Serialize)]
pub(super) struct Page {
    tenants: Vec<View>,
    /// What to pass as `after` for the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<OrgId>,
}

/// Which page.
#[derive(Debug, PartialEq)]
pub(super) struct Wanted {
    limit: usize,
    after: Option<OrgId>,
}

impl Wanted {
    /// Parses `limit=N&after=ORG`. Values need no decoding: their alphabets hold nothing that is encoded.
    pub(super) fn parse(query: &str) -> Result<Self, &'static str> {
        let mut wanted = Self { limit: PAGE, after: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("limit", value)) => {
                    wanted.limit = value
                        .parse()
                        .ok()
                        .filter(|limit| (1..=PAGE_MAX).contains(limit))
                        .ok_or("limit has to be a number from 1 to 1000")?;
                }
                Some(("after", value)) => {
                    wanted.after = Some(OrgId::parse(value).ok_or("after has to be an organisation id")?);
                }
                _ => return Err("only limit and after can be asked for"),
            }
        }
        Ok(wanted)
    }

    pub(super) fn page(self, mut slots: Vec<Arc<Slot>>) -> Page {
        slots.retain(|slot| self.after.as_ref().is_none_or(|after| slot.org() > after));
        slots.sort_unstable_by(|a, b| a.org().cmp(b.org()));
        let more = slots.len() > self.limit;
        slots.truncate(self.limit);
        let next = slots.last().filter(|_| more).map(|slot| slot.org().clone());
        Page { tenants: slots.iter().map(|slot| View::of(slot)).collect(), next }
    }
}
