//! MongoDB's part: the caps that the deployment keeps of the tenant. MongoDB has none per user; the proxy's table enforces
//! them, on live sessions too. Where documents are is not changed here: the record pins it.

use std::sync::Arc;

use super::{Holding, Look, Order, PREPARES, Participant, ReadBack, Reply, SETTLES, Stage, Trouble, value};
use crate::{
    tenant::{Limits, Protocol, Tenant},
    upstream::mongo::{Error, Standing, Upstream},
};

/// The tenants' MongoDB deployment.
pub struct Mongo {
    upstream: Arc<Upstream>,
}

impl Mongo {
    /// The deployment behind `upstream`.
    pub fn new(upstream: Arc<Upstream>) -> Self {
        Self { upstream }
    }

    async fn set(&self, order: &Order, standing: &Standing, stage: u8) -> Result<(), Trouble> {
        match self.upstream.set_standing(&order.tenant.org, standing, order.fence, stage).await.map_err(trouble)? {
            true => Ok(()),
            false => Err(Trouble::Overtaken),
        }
    }
}

fn trouble(error: Error) -> Trouble {
    match &error {
        Error::Lost(cause) if cause.kind() == std::io::ErrorKind::ConnectionRefused => {
            Trouble::Failed(error.to_string())
        }
        Error::NoPrimary => Trouble::Failed(error.to_string()),
        Error::Lost(_) | Error::Slow | Error::Protocol(_) => Trouble::Unknown(error.to_string()),
        // Retryable by its own word (a primary that steps down, a node that starts): it may have been done.
        Error::Refused { code: 11600 | 11602 | 10107 | 13435 | 13436 | 189 | 91 | 64, .. } => {
            Trouble::Unknown(error.to_string())
        }
        Error::Refused { .. } | Error::Login(_) | Error::Scram(_) => Trouble::No(error.to_string()),
    }
}

/// The caps before: what the server keeps, or, before the first transition, what the tier gives.
fn prior(order: &Order) -> Standing {
    serde_json::from_value(order.prior.clone()).unwrap_or_else(|_| Standing::of(order.tenant.tier, &order.from.mongodb))
}

impl Participant for Mongo {
    fn database(&self) -> Protocol {
        Protocol::Mongodb
    }

    fn look<'a>(&'a self, tenant: &'a Tenant, _to: &'a Limits) -> Reply<'a, Look> {
        Box::pin(async move {
            let prior = self.upstream.standing(&tenant.org).await.map_err(trouble)?;
            Ok(Look { prior: value(&prior), over: Vec::new() })
        })
    }

    fn prepare<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let room = prior(order).or_more(&Standing::of(order.to_tier, &order.to.mongodb));
            self.set(order, &room, PREPARES).await
        })
    }

    fn finish<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let wanted = Standing::of(order.to_tier, &order.to.mongodb);
            self.set(order, &wanted, SETTLES).await?;
            match self.upstream.standing(&order.tenant.org).await.map_err(trouble)? {
                Some(found) if found == wanted => Ok(()),
                _ => Err(Trouble::Unknown("the server does not keep what was set".into())),
            }
        })
    }

    fn restore<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move { self.set(order, &prior(order), SETTLES).await })
    }

    fn live<'a>(&'a self, stage: Stage, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let Tenant { org, generation, .. } = &order.tenant;
            let done = match stage {
                Stage::Make | Stage::DropNext => self.upstream.provision(org, *generation).await,
                // A user has one password. Who comes with the next one before it is set sets it, as who comes with a
                // present one that the server has forgotten does; open connections keep going.
                Stage::TakeNext => self.upstream.ping().await,
                Stage::DropPrevious => self.upstream.provision(org, generation + 1).await,
                Stage::Purge => self.upstream.remove(org, true).await,
            };
            done.map_err(trouble)
        })
    }

    fn holdings<'a>(&'a self, tenant: &'a Tenant) -> Reply<'a, Vec<Holding>> {
        Box::pin(async move {
            let held = self.upstream.holdings(&tenant.org).await.map_err(trouble)?;
            let places = held.into_iter().map(|held| Holding {
                what: format!("{} {}", if held.own { "database" } else { "shared collection" }, held.name),
                count: Some(held.documents),
                bytes: held.bytes,
            });
            Ok(places.collect())
        })
    }

    fn read_back<'a>(&'a self, tenant: &'a Tenant, limits: &'a Limits) -> Reply<'a, ReadBack> {
        Box::pin(async move {
            let wanted = Standing::of(tenant.tier, &limits.mongodb);
            let found = self.upstream.standing(&tenant.org).await.map_err(trouble)?;
            // Before its first transition a tenant has no caps of its own there: the proxy's are the tier's.
            let agrees = found.as_ref().is_none_or(|found| *found == wanted);
            Ok(ReadBack { agrees, expected: value(&wanted), found: value(&found) })
        })
    }
}
