//! Redis' part: the caps that the server keeps of the tenant, and whether it has more than the new ones allow. Redis has
//! no caps per user; the proxy's table enforces them, on live sessions too.

use std::sync::Arc;

use super::{Holding, Look, Order, PREPARES, Participant, ReadBack, Reply, SETTLES, Stage, Trouble, over, value};
use crate::{
    tenant::{Limits, Protocol, Tenant},
    upstream::redis::{DialError, Standing, Upstream, Valid},
};

/// The tenants' Redis server.
pub struct Redis {
    upstream: Arc<Upstream>,
}

impl Redis {
    /// The server behind `upstream`.
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

fn trouble(error: DialError) -> Trouble {
    match &error {
        DialError::Unreachable(cause) if cause.kind() == std::io::ErrorKind::ConnectionRefused => {
            Trouble::Failed(error.to_string())
        }
        DialError::Unreachable(_) | DialError::Slow => Trouble::Unknown(error.to_string()),
        // A server that loads its data, runs a script, or is a replica for the moment says so and does nothing.
        DialError::Refused(text)
            if ["LOADING", "BUSY", "MASTERDOWN", "READONLY", "OOM"].iter().any(|word| text.starts_with(word)) =>
        {
            Trouble::Failed(error.to_string())
        }
        DialError::Refused(_) => Trouble::No(error.to_string()),
    }
}

/// The caps before: what the server keeps, or, before the first transition, what the tier gives.
fn prior(order: &Order) -> Standing {
    serde_json::from_value(order.prior.clone()).unwrap_or_else(|_| Standing::of(order.tenant.tier, &order.from.redis))
}

impl Participant for Redis {
    fn database(&self) -> Protocol {
        Protocol::Redis
    }

    fn look<'a>(&'a self, tenant: &'a Tenant, to: &'a Limits) -> Reply<'a, Look> {
        Box::pin(async move {
            let prior = self.upstream.standing(&tenant.org).await.map_err(trouble)?;
            let usage = self.upstream.usage(&tenant.org).await.map_err(trouble)?;
            let over = [
                over(Protocol::Redis, "keys", usage.keys, to.redis.keys),
                over(Protocol::Redis, "memory bytes", usage.bytes, to.redis.memory),
            ];
            Ok(Look { prior: value(&prior), over: over.into_iter().flatten().collect() })
        })
    }

    fn prepare<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let room = prior(order).or_more(&Standing::of(order.to_tier, &order.to.redis));
            self.set(order, &room, PREPARES).await
        })
    }

    fn finish<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let wanted = Standing::of(order.to_tier, &order.to.redis);
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
                Stage::Make => self.upstream.provision(org, *generation).await,
                Stage::TakeNext => self.upstream.set_valid(org, Valid::Also(generation + 1)).await,
                Stage::DropPrevious => self.upstream.set_valid(org, Valid::Only(generation + 1)).await,
                Stage::DropNext => self.upstream.set_valid(org, Valid::Only(*generation)).await,
                Stage::Purge => self.upstream.remove(org, true).await,
                Stage::Forget => Ok(()),
            };
            done.map_err(trouble)
        })
    }

    fn holdings<'a>(&'a self, tenant: &'a Tenant) -> Reply<'a, Vec<Holding>> {
        Box::pin(async move {
            let usage = self.upstream.usage(&tenant.org).await.map_err(trouble)?;
            Ok(vec![Holding { what: "keys".into(), count: Some(usage.keys), bytes: Some(usage.bytes) }])
        })
    }

    fn read_back<'a>(&'a self, tenant: &'a Tenant, limits: &'a Limits) -> Reply<'a, ReadBack> {
        Box::pin(async move {
            let wanted = Standing::of(tenant.tier, &limits.redis);
            let found = self.upstream.standing(&tenant.org).await.map_err(trouble)?;
            // Before its first transition a tenant has no caps of its own there: the proxy's are the tier's.
            let agrees = found.as_ref().is_none_or(|found| *found == wanted);
            Ok(ReadBack { agrees, expected: value(&wanted), found: value(&found) })
        })
    }
}
