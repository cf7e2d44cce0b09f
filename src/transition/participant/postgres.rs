//! PostgreSQL's part, of the main homes and of Neon homes that lie on one server: the ceilings that the tenant's role
//! carries (connections, timeouts, temporary files). An upgrade raises them before the switch, a downgrade lowers them
//! after it; the proxy's own limits are always inside.

use serde_json::{Value, json};

use super::{
    Holding, Homecoming, Look, Order, PREPARES, Participant, ReadBack, Reply, SETTLES, Stage, Trouble, over, rehomes,
    value,
};
use crate::{
    tenant::{Branch, DEFAULT_NAME, Home, Limits, Names, Protocol, Tenant},
    upstream::postgres::{AdminError, Ceiling, Mark, ProvisionError, Provisioner},
};

/// A server with a role for each tenant: that of their main homes, or that of their Neon homes.
pub struct Postgres {
    provisioner: Provisioner,
    names: Names,
    /// Which home, and so which column of the tier.
    home: Protocol,
    /// Moves databases between the main homes and the Neon ones, where there are both; the main homes' part.
    homecoming: Option<Homecoming>,
}

impl Postgres {
    /// The main homes.
    pub fn new(provisioner: Provisioner, names: Names) -> Self {
        Self { provisioner, names, home: Protocol::Postgres, homecoming: None }
    }

    /// With Neon homes, between which and the main ones databases move.
    #[must_use]
    pub fn with_neon(mut self, homecoming: Homecoming) -> Self {
        self.homecoming = Some(homecoming);
        self
    }

    /// The Neon homes that are databases of a server: without computes, which sleep and grow at Neon only.
    pub fn of_neon_homes(provisioner: Provisioner, names: Names) -> Self {
        Self { provisioner, names, home: Protocol::Neon, homecoming: None }
    }

    fn ceiling(&self, limits: &Limits) -> Ceiling {
        Ceiling::of(&limits.sql(self.home))
    }

    fn role(&self, tenant: &Tenant) -> String {
        self.names.sql(self.home, &tenant.org, DEFAULT_NAME).role
    }

    /// What counts against the tier beside the databases themselves.
    fn branches<'t>(&self, tenant: &'t Tenant) -> &'t [Branch] {
        if self.home == Protocol::Neon { &tenant.routes.neon.branches } else { &[] }
    }

    async fn present(&self, tenant: &Tenant) -> Result<Ceiling, Trouble> {
        match self.provisioner.ceiling(&self.role(tenant)).await.map_err(trouble)? {
            Some((ceiling, _)) => Ok(ceiling),
            None => Err(Trouble::No(format!(
                "the tenant has no role there: `dynabase tenant provision {}` makes it",
                tenant.org
            ))),
        }
    }

    /// What moves, and between what, if anything does and this is the part that moves it.
    fn moving(&self, order: &Order) -> Option<(&Homecoming, (Home, Home))> {
        Some((self.homecoming.as_ref()?, order.homes?))
    }

    async fn set(&self, tenant: &Tenant, ceiling: &Ceiling, mark: Mark) -> Result<(), Trouble> {
        match self.provisioner.set_ceiling(&self.role(tenant), ceiling, mark).await.map_err(trouble)? {
            true => Ok(()),
            false => Err(Trouble::Overtaken),
        }
    }
}

pub(super) fn trouble(error: ProvisionError) -> Trouble {
    match &error {
        ProvisionError::Admin(AdminError::Dial(_)) => Trouble::Failed(error.to_string()),
        // With a code the server has said no, and rolled back; without one the connection broke.
        ProvisionError::Admin(AdminError::Sql { cause, .. }) => match cause.code() {
            // 25P03: it stood still in its transaction for so long that the server ended it.
            Some(code) if matches!(&code.code()[..2], "57" | "53" | "55" | "40" | "08") || code.code() == "25P03" => {
                Trouble::Unknown(error.to_string())
            }
            Some(_) => Trouble::No(error.to_string()),
            None => Trouble::Unknown(error.to_string()),
        },
        ProvisionError::Admin(AdminError::TimedOut { .. }) => Trouble::Unknown(error.to_string()),
        ProvisionError::TooOld { .. } | ProvisionError::Tainted { .. } => Trouble::No(error.to_string()),
    }
}

impl Participant for Postgres {
    fn database(&self) -> Protocol {
        self.home
    }

    fn look<'a>(&'a self, tenant: &'a Tenant, to: &'a Limits) -> Reply<'a, Look> {
        Box::pin(async move {
            let prior = self.present(tenant).await?;
            let mut bytes = 0;
            for database in std::iter::once(DEFAULT_NAME).chain(tenant.databases.iter().map(String::as_str)) {
                let place = self.names.sql(self.home, &tenant.org, database);
                bytes += self.provisioner.database_bytes(&place.database).await.map_err(trouble)?.unwrap_or(0);
                for branch in self.branches(tenant) {
                    let place = self.names.sql(self.home, &tenant.org, &format!("{database}@{}", branch.name));
                    bytes += self.provisioner.database_bytes(&place.database).await.map_err(trouble)?.unwrap_or(0);
                }
            }
            let storage = over(self.home, "storage bytes", bytes, to.sql(self.home).storage);
            let homes = rehomes(tenant, to, self.homecoming.is_some());
            let moved = match self.homecoming.as_ref().zip(homes) {
                None => None,
                Some((homecoming, homes)) => {
                    let bytes = homecoming.look(&self.provisioner, tenant, homes).await?;
                    let there = homes.1.protocol();
                    over(there, "bytes to move", bytes, to.sql(there).storage)
                }
            };
            let storage = storage.into_iter().chain(moved);
            let branches = over(self.home, "branches", self.branches(tenant).len() as u64, to.neon.branches.into());
            Ok(Look { prior: value(&prior), over: storage.chain(branches).collect() })
        })
    }

    fn prepare<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let prior = prior(order)?;
            let room = prior.or_more(&self.ceiling(&order.to));
            self.set(&order.tenant, &room, order.mark(PREPARES)).await?;
            let Some((homecoming, homes)) = self.moving(order) else { return Ok(()) };
            match homecoming.prepare(&self.provisioner, order, homes).await {
                Err(Trouble::No(why)) => {
                    // A no has done nothing.
                    self.set(&order.tenant, &prior, order.mark(SETTLES)).await?;
                    Err(Trouble::No(why))
                }
                done => done,
            }
        })
    }

    fn seal<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            match self.moving(order) {
                Some((homecoming, homes)) => homecoming.seal(&self.provisioner, order, homes).await,
                None => Ok(()),
            }
        })
    }

    fn finish<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let wanted = self.ceiling(&order.to);
            self.set(&order.tenant, &wanted, order.mark(SETTLES)).await?;
            if !self.present(&order.tenant).await?.is(&wanted) {
                return Err(Trouble::Unknown("the role does not carry what was set".into()));
            }
            match self.moving(order) {
                Some((homecoming, homes)) => homecoming.finish(&self.provisioner, order, homes).await,
                None => Ok(()),
            }
        })
    }

    fn restore<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            if let Some((homecoming, homes)) = self.moving(order) {
                homecoming.restore(&self.provisioner, order, homes).await?;
            }
            self.set(&order.tenant, &prior(order)?, order.mark(SETTLES)).await
        })
    }

    fn live<'a>(&'a self, stage: Stage, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(async move {
            let (tenant, names) = (&order.tenant, &self.names);
            let set = |generation| self.provisioner.set_password(tenant, names, generation);
            match stage {
                Stage::Make => {
                    let limits = order.to.sql(self.home);
                    let report = self.provisioner.ensure(tenant, names, limits).await.map_err(trouble)?;
                    if !report.warnings.is_empty() {
                        order.progress.say(format!("warning: {}", report.warnings.join("; ")));
                    }
                    Ok(())
                }
                // A role has one password: until the switch the proxy comes with either
                // ([`crate::upstream::postgres::Home::others`]).
                Stage::TakeNext => self.provisioner.ceiling(&self.role(tenant)).await.map(drop).map_err(trouble),
                Stage::DropPrevious => set(tenant.generation + 1).await.map_err(trouble),
                Stage::DropNext => set(tenant.generation).await.map_err(trouble),
                Stage::Purge => self.provisioner.drop(tenant, names).await.map_err(trouble),
                Stage::Forget => match self.homecoming.as_ref().zip(order.left) {
                    Some((homecoming, left)) => homecoming.forget(&self.provisioner, order, left).await,
                    None => Ok(()),
                },
            }
        })
    }

    fn holdings<'a>(&'a self, tenant: &'a Tenant) -> Reply<'a, Vec<Holding>> {
        Box::pin(async move {
            let held = self.provisioner.holdings(tenant, &self.names).await.map_err(trouble)?;
            let databases = held.into_iter().map(|(name, bytes)| Holding {
                what: format!("database {name}"),
                count: None,
                bytes: Some(bytes),
            });
            Ok(databases.collect())
        })
    }

    fn read_back<'a>(&'a self, tenant: &'a Tenant, limits: &'a Limits) -> Reply<'a, ReadBack> {
        Box::pin(async move {
            let wanted = self.ceiling(limits);
            let found = self.present(tenant).await?;
            let (mut expected, mut told) = (value(&wanted), value(&found));
            let mut agrees = found.is(&wanted);
            if let Some(homecoming) = &self.homecoming {
                let home = tenant.home();
                let open = homecoming.is_open(&self.provisioner, tenant, home).await?;
                agrees &= open;
                expected["home"] = json!(home);
                told["home"] = if open { json!(home) } else { Value::Null };
            }
            Ok(ReadBack { agrees, expected, found: told })
        })
    }
}

fn prior(order: &Order) -> Result<Ceiling, Trouble> {
    serde_json::from_value(order.prior.clone())
        .map_err(|_| Trouble::No("the journal's word on the settings before can't be read".into()))
}
