//! Neon's part where each tenant has a project there: quota and computes over the management API, and the ceilings that
//! the tenant's role carries inside it, as on any server.
//!
//! The role goes first, in the project and in every branch: there a newer coordinator has left its mark, so that an
//! older one stops before it asks the API, which knows no marks.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{
    Holding, Look, Order, PREPARES, Participant, ReadBack, Reply, SETTLES, Stage, Trouble, over, postgres::trouble,
    value,
};
use crate::{
    catalog::{Catalog, Expect, Fault},
    tenant::{Limits, NeonRoute, OrgId, Protocol, Tenant},
    upstream::{
        neon::{
            ProjectError, Projects, Sizes,
            api::{ApiError, Compute},
        },
        postgres::{Ceiling, Mark},
    },
};

/// Tries to write a record that somebody else writes too.
const ATTEMPTS: u32 = 5;

/// The projects of one account; where they are stands in tenants' records.
pub struct Neon(Arc<Projects>, Catalog);

/// What one tenant's project is set to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Set {
    role: Ceiling,
    logical_size_bytes: u64,
    compute: Compute,
}

impl Set {
    fn of(limits: &Limits) -> Self {
        let Sizes { logical_size_bytes, compute } = Sizes::of(limits);
        Self { role: Ceiling::of(&limits.sql(Protocol::Neon)), logical_size_bytes, compute }
    }

    fn sizes(&self) -> Sizes {
        Sizes { logical_size_bytes: self.logical_size_bytes, compute: self.compute }
    }

    fn is(&self, wanted: &Self) -> bool {
        self.role.is(&wanted.role) && self.sizes() == wanted.sizes()
    }

    /// Room for both. A compute is set once, since setting it restarts it: at once where it grows, else at the end.
    fn or_more(&self, to: &Self) -> Self {
        Self {
            role: self.role.or_more(&to.role),
            // 0 is without limit.
            logical_size_bytes: match (self.logical_size_bytes, to.logical_size_bytes) {
                (0, _) | (_, 0) => 0,
                (one, other) => one.max(other),
            },
            compute: if to.compute.max_cu > self.compute.max_cu { to.compute } else { self.compute },
        }
    }
}

impl Neon {
    /// Projects that the API behind `projects` manages, of tenants recorded in `catalog`.
    pub fn new(projects: Arc<Projects>, catalog: Catalog) -> Self {
        Self(projects, catalog)
    }

    /// Writes into the tenant's record where its home is.
    async fn record(&self, org: &OrgId, route: &NeonRoute) -> Result<(), Trouble> {
        for _ in 0..ATTEMPTS {
            let mut record = self.1.get(org).await.map_err(|fault| Trouble::Failed(fault.to_string()))?;
            let (epoch, present) = (record.tenant.epoch, &mut record.tenant.routes.neon);
            // Branches may have come and gone meanwhile: each keeps its own place.
            let mut wanted = NeonRoute { project: route.project.clone(), branches: present.branches.clone() };
            for branch in &mut wanted.branches {
                if let Some(made) = route.branch(&branch.name).filter(|_| branch.place.is_none()) {
                    branch.place.clone_from(&made.place);
                }
            }
            if *present == wanted {
                return Ok(());
            }
            *present = wanted;
            // The epoch of one that is being made is the mark of that, and the decision's to raise.
            record.tenant.epoch += u64::from(epoch > 0);
            match self.1.put(record, Expect::Epoch(epoch)).await {
                Ok(()) => return Ok(()),
                Err(Fault::Stale { .. }) => {}
                Err(fault) => return Err(Trouble::Failed(fault.to_string())),
            }
        }
        Err(Trouble::Unknown("the tenant's record is being changed by others".into()))
    }

    async fn present(&self, tenant: &Tenant, wanted: &Set) -> Result<Set, Trouble> {
        let Sizes { logical_size_bytes, compute } = self.0.sizes(tenant, &wanted.sizes()).await.map_err(said)?;
        match self.0.ceiling(tenant, &wanted.role).await.map_err(said)? {
            Some(role) => Ok(Set { role, logical_size_bytes, compute }),
            None => Err(Trouble::No(format!(
                "the tenant has no role in its project: `dynabase tenant provision {}` makes it",
                tenant.org
            ))),
        }
    }

    async fn set(&self, tenant: &Tenant, wanted: &Set, mark: Mark) -> Result<(), Trouble> {
        if !self.0.set_ceiling(tenant, &wanted.role, mark).await.map_err(said)? {
            return Err(Trouble::Overtaken);
        }
        let main = tenant.routes.neon.project.as_ref().ok_or_else(|| said(ProjectError::NoProject))?;
        self.0.size(main, wanted.sizes()).await.map_err(said)
    }
}

/// What an error says about what was done.
pub(super) fn said(error: ProjectError) -> Trouble {
    match error {
        ProjectError::Server(error) => trouble(error),
        ProjectError::NoProject => Trouble::No(error.to_string()),
        ProjectError::Api(api) => match api {
            ApiError::Unauthorized | ApiError::NotFound | ApiError::Refused { .. } | ApiError::Ambiguous(_) => {
                Trouble::No(api.to_string())
            }
            ApiError::Busy { .. } => Trouble::Failed(api.to_string()),
            ApiError::Unknown(_) | ApiError::Operation { .. } | ApiError::Reply(_) => Trouble::Unknown(api.to_string()),
        },
    }
}

impl Participant for Neon {
    fn database(&self) -> Protocol {
        Protocol::Neon
    }

    fn look<'a>(&'a self, tenant: &'a Tenant, to: &'a Limits) -> Reply<'a, Look> {
        Box::pin(async move {
            let prior = self.present(tenant, &Set::of(to)).await?;
            let bytes = self.0.bytes(tenant).await.map_err(said)?;
            let branches = tenant.routes.neon.branches.len() as u64;
            let storage = over(Protocol::Neon, "storage bytes", bytes, to.neon.storage);
            let branches = over(Protocol::Neon, "branches", branches, to.neon.branches.into());
            Ok(Look { prior: value(&prior), over: storage.into_iter().chain(branches).collect() })
        })
    }

    fn prepare<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let prior = prior(order)?;
            let room = prior.or_more(&Set::of(&order.to));
            let done = self.set(&order.tenant, &room, order.mark(PREPARES)).await;
            if let Err(Trouble::No(why)) = done {
                // A plain no has to mean that nothing was done; here it may come after the role, or after the quota.
                return Err(match self.set(&order.tenant, &prior, order.mark(PREPARES)).await {
                    Ok(()) => Trouble::No(why),
                    Err(Trouble::Overtaken) => Trouble::Overtaken,
                    Err(other) => Trouble::Unknown(format!("{why}; and undoing the rest: {other}")),
                });
            }
            done
        })
    }

    fn finish<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let wanted = Set::of(&order.to);
            self.set(&order.tenant, &wanted, order.mark(SETTLES)).await?;
            match self.present(&order.tenant, &wanted).await?.is(&wanted) {
                true => Ok(()),
                false => Err(Trouble::Unknown("the project is not what it was set to".into())),
            }
        })
    }

    fn restore<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move { self.set(&order.tenant, &prior(order)?, order.mark(SETTLES)).await })
    }

    fn live<'a>(&'a self, stage: Stage, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let (tenant, projects) = (&order.tenant, &self.0);
            match stage {
                Stage::Make => {
                    let (route, report) = projects.ensure(tenant, &order.to).await.map_err(said)?;
                    self.record(&tenant.org, &route).await?;
                    let host = route.project.map_or_else(String::new, |project| project.host);
                    match report.warnings.is_empty() {
                        true => order.progress.say(format!("at {host}")),
                        false => order.progress.say(format!("at {host}; warning: {}", report.warnings.join("; "))),
                    }
                    Ok(())
                }
                // A role has one password: until the switch the proxy comes with either.
                Stage::TakeNext => {
                    let wanted = Ceiling::of(&order.to.sql(Protocol::Neon));
                    projects.ceiling(tenant, &wanted).await.map(drop).map_err(said)
                }
                Stage::DropPrevious => projects.set_password(tenant, tenant.generation + 1).await.map_err(said),
                Stage::DropNext => projects.set_password(tenant, tenant.generation).await.map_err(said),
                Stage::Purge => projects.remove(tenant).await.map_err(said),
                // The project stays; what the main homes' part has moved from it is that part's to forget.
                Stage::Forget => Ok(()),
            }
        })
    }

    fn holdings<'a>(&'a self, tenant: &'a Tenant) -> Reply<'a, Vec<Holding>> {
        Box::pin(async move {
            let held = self.0.holdings(tenant).await.map_err(said)?;
            let project = held.map(|(name, branches, bytes)| Holding {
                what: format!("project {name}, branches"),
                count: Some(branches as u64),
                bytes: Some(bytes),
            });
            Ok(project.into_iter().collect())
        })
    }

    fn read_back<'a>(&'a self, tenant: &'a Tenant, limits: &'a Limits) -> Reply<'a, ReadBack> {
        Box::pin(async move {
            let wanted = Set::of(limits);
            let found = self.present(tenant, &wanted).await?;
            Ok(ReadBack { agrees: found.is(&wanted), expected: value(&wanted), found: value(&found) })
        })
    }
}

fn prior(order: &Order) -> Result<Set, Trouble> {
    serde_json::from_value(order.prior.clone())
        .map_err(|_| Trouble::No("the journal's word on the settings before can't be read".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(connections: u64, bytes: u64, max_cu: f64) -> Set {
        let role = Ceiling { connections: Some(connections), ..Ceiling::default() };
        let compute = Compute { min_cu: 0.25, max_cu, suspend_timeout_seconds: 300 };
        Set { role, logical_size_bytes: bytes, compute }
    }

    #[test]
    fn preparing_makes_room_and_takes_none() {
        let (small, large) = (set(5, 10, 0.25), set(50, 20, 2.0));
        assert_eq!(small.or_more(&large), large);
        assert_eq!(large.or_more(&small), large, "a downgrade changes nothing before it is decided");
        assert_eq!(small.or_more(&set(5, 0, 0.25)).logical_size_bytes, 0);
        assert_eq!(set(5, 0, 0.25).or_more(&small).logical_size_bytes, 0, "0 is without limit");
        assert!(small.is(&small) && !small.is(&large));
    }
}
