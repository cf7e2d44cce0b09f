//! Convex' part: nothing is set at a deployment. Sockets, subscriptions, calls, writes and payloads are limited by the
//! proxy's table, which follows the tenant's record; the record's tier is what is read back.

use super::{Look, Order, Participant, ReadBack, Reply, value};
use crate::tenant::{Limits, Protocol, Tenant};

/// The proxy's own table.
pub struct Convex;

impl Participant for Convex {
    fn database(&self) -> Protocol {
        Protocol::Convex
    }

    fn look<'a>(&'a self, _tenant: &'a Tenant, _to: &'a Limits) -> Reply<'a, Look> {
        Box::pin(async { Ok(Look::default()) })
    }

    fn prepare<'a>(&'a self, _order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn finish<'a>(&'a self, _order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn restore<'a>(&'a self, _order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn read_back<'a>(&'a self, tenant: &'a Tenant, _limits: &'a Limits) -> Reply<'a, ReadBack> {
        Box::pin(async move {
            let tier = value(&tenant.tier);
            Ok(ReadBack { agrees: true, expected: tier.clone(), found: tier })
        })
    }
}
