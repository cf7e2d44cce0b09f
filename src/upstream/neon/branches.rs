//! A tenant's branches: reserved in its record first, which counts them exactly over all processes, then made; removed
//! from the record first, so that nobody comes in any more, then dropped.
//!
//! Entry points: [`Branches::make`], [`Branches::remove`].

use std::{fmt, sync::Arc, time::Duration};

use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::{runtime::Handle, task::JoinHandle};

use crate::{
    catalog::{Catalog, Expect, Fault, Record},
    quota::Slot,
    refusal::{Limit, Over},
    tenant::{Branch, DEFAULT_NAME, Home, Names, OrgId},
    upstream::{
        neon::{HomeError, Homes},
        postgres::Upstream,
    },
};

/// Tries to write a record that somebody else writes too.
const ATTEMPTS: u32 = 5;

/// Longest wait for this process to hear of the new record, and between two looks. Other processes hear of it when the
/// catalog tells them.
const HEARD_WITHIN: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(10);

/// Makes and removes branches.
pub struct Branches {
    catalog: Catalog,
    homes: Homes,
    upstream: Arc<Upstream>,
    names: Names,
    /// Where the upstream's connections live; who asks may be on another.
    runtime: Handle,
}

impl fmt::Debug for Branches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Branches")
    }
}

/// Why a branch was not made or removed.
#[derive(Debug)]
pub enum BranchError {
    /// Not a name.
    BadName,
    /// There is one with this name, or a database with the name that it would have.
    Exists,
    /// There is none with this name.
    Unknown,
    /// The tier has no more.
    Over(Over),
    /// The databases are in use and can't be copied now.
    InUse,
    /// The databases are not in the Neon home.
    Elsewhere,
    /// The catalog can't be read or written now.
    Catalog(Fault),
    /// The server said no, or Neon did.
    Home(HomeError),
}

impl BranchError {
    /// How both doors answer it, the admin port and tenants' `/neon/branches`: the status, and the word for programs.
    pub fn answer(&self) -> (StatusCode, &'static str) {
        match self {
            BranchError::BadName => (StatusCode::BAD_REQUEST, "bad_name"),
            BranchError::Exists => (StatusCode::CONFLICT, "exists"),
            BranchError::Unknown => (StatusCode::NOT_FOUND, "unknown_branch"),
            // As Neon's own API refuses one too many.
            BranchError::Over(_) => (StatusCode::UNPROCESSABLE_ENTITY, "branches_limit_exceeded"),
            BranchError::Elsewhere => (StatusCode::CONFLICT, "elsewhere"),
            BranchError::InUse => (StatusCode::LOCKED, "in_use"),
            BranchError::Catalog(_) => (StatusCode::SERVICE_UNAVAILABLE, "catalog_down"),
            BranchError::Home(_) => (StatusCode::BAD_GATEWAY, "database_down"),
        }
    }
}

impl fmt::Display for BranchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BranchError::BadName => {
                f.write_str("a branch is named with 1 to 40 of a-z, 0-9, - and _, a letter or digit first")
            }
            BranchError::Exists => f.write_str("there is a branch with this name"),
            BranchError::Unknown => f.write_str("there is no branch with this name"),
            BranchError::Over(over) => {
                write!(f, "tier {} allows {} branches, {} are there", over.tier, over.max, over.in_use)
            }
            BranchError::Elsewhere => {
                f.write_str("the tenant's databases have moved to the main server, which has no branches")
            }
            BranchError::InUse => f.write_str("the database is in use; try again when its sessions are idle"),
            BranchError::Catalog(fault) => fault.fmt(f),
            BranchError::Home(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for BranchError {}

impl Branches {
    /// Branches of the homes behind `upstream`, recorded in `catalog`. To be called on the runtime that serves.
    pub fn new(catalog: Catalog, homes: Homes, upstream: Arc<Upstream>, names: Names) -> Arc<Self> {
        Arc::new(Self { catalog, homes, upstream, names, runtime: Handle::current() })
    }

    /// The tenant's branches, as the catalog has them now.
    ///
    /// # Errors
    /// [`BranchError::Catalog`].
    pub async fn list(&self, org: &OrgId) -> Result<Vec<Branch>, BranchError> {
        self.catalog.get(org).await.map(|record| record.tenant.routes.neon.branches).map_err(BranchError::Catalog)
    }

    /// [`Self::create`] in a task of its own: it goes on if who asked goes away, since half a branch would have to be
    /// cleared away.
    pub fn make(self: &Arc<Self>, slot: &Arc<Slot>, name: String) -> JoinHandle<Result<Branch, BranchError>> {
        let (branches, slot) = (Arc::clone(self), Arc::clone(slot));
        self.runtime.spawn(async move { branches.create(&slot, &name).await })
    }

    /// [`Self::delete`] in a task of its own.
    pub fn remove(self: &Arc<Self>, slot: &Arc<Slot>, name: String) -> JoinHandle<Result<(), BranchError>> {
        let (branches, slot) = (Arc::clone(self), Arc::clone(slot));
        self.runtime.spawn(async move { branches.delete(&slot, &name).await })
    }

    /// A branch as those who may have one see it.
    pub fn described(branch: &Branch) -> Value {
        json!({"name": branch.name, "database": on_branch(&branch.name)})
    }

    /// Makes a branch: a copy of the tenant's databases as they are now. Until it stands its name is taken and leads
    /// nowhere.
    ///
    /// # Errors
    /// Nothing is left behind; except that a server which has gone meanwhile may keep a copy that a later branch of
    /// the name takes over.
    ///
    /// # Cancel safety
    /// None: run it in a task of its own.
    async fn create(&self, slot: &Arc<Slot>, name: &str) -> Result<Branch, BranchError> {
        if !Branch::is_name(name) {
            return Err(BranchError::BadName);
        }
        let branch = Branch { name: name.to_owned(), place: None };
        let record = self
            .change(slot.org(), |record| {
                if record.tenant.routes.sql == Some(Home::Main) {
                    return Err(BranchError::Elsewhere);
                }
                let route = &mut record.tenant.routes.neon;
                if route.branch(name).is_some() || record.tenant.databases.contains(&on_branch(name)) {
                    return Err(BranchError::Exists);
                }
                let policy = slot.policy();
                let (max, in_use) = (policy.limits.neon.branches, route.branches.len() as u64);
                if in_use >= u64::from(max) {
                    let tier = policy.tenant.tier;
                    let over = Over { limit: Limit::Branches, tier, max: max.into(), in_use, retry_after: None };
                    return Err(BranchError::Over(over));
                }
                route.branches.push(branch.clone());
                Ok(())
            })
            .await?;
        let pool = self.upstream.pool(slot);
        let limits = Arc::clone(&slot.policy().limits);
        let quiet = |database: &str| pool.close_idle(database);
        let made = self.homes.make_branch(&record.tenant, &self.names, &limits, name, quiet).await;
        let branch = match made {
            Ok(made) => made,
            Err(error) => {
                let forget = |record: &mut Record| {
                    record.tenant.routes.neon.branches.retain(|it| it.name != name);
                    Ok(())
                };
                if let Err(error) = self.change(slot.org(), forget).await {
                    tracing::error!(org = %slot.org(), branch = name, %error, "a branch that was not made stays recorded: delete it");
                }
                return Err(if error.is_in_use() { BranchError::InUse } else { BranchError::Home(error) });
            }
        };
        if branch.place.is_some() {
            let place = |record: &mut Record| {
                let there = record.tenant.routes.neon.branches.iter_mut().find(|it| it.name == name);
                // Deleted meanwhile: what was made has lost its name, and a later branch of the name takes it away.
                there.ok_or(BranchError::Unknown)?.place.clone_from(&branch.place);
                Ok(())
            };
            self.change(slot.org(), place).await?;
        }
        heard(|| slot.policy().tenant.routes.neon.branch(name) == Some(&branch)).await;
        Ok(branch)
    }

    /// Removes a branch with all that is in it; its sessions end.
    ///
    /// # Errors
    /// [`BranchError::Unknown`]; others may leave the copy without a record, for a later branch of the name.
    ///
    /// # Cancel safety
    /// None: run it in a task of its own.
    async fn delete(&self, slot: &Arc<Slot>, name: &str) -> Result<(), BranchError> {
        let mut branch = Branch { name: name.to_owned(), place: None };
        let record = self
            .change(slot.org(), |record| {
                let branches = &mut record.tenant.routes.neon.branches;
                let at = branches.iter().position(|it| it.name == name).ok_or(BranchError::Unknown)?;
                branch = branches.remove(at);
                Ok(())
            })
            .await?;
        heard(|| slot.policy().tenant.routes.neon.branch(name).is_none()).await;
        self.homes.drop_branch(&record.tenant, &self.names, &branch).await.map_err(BranchError::Home)
    }

    /// Changes a record, again if somebody else changed it meanwhile.
    async fn change(
        &self,
        org: &OrgId,
        mut change: impl FnMut(&mut Record) -> Result<(), BranchError>,
    ) -> Result<Record, BranchError> {
        let mut attempt = 1;
        loop {
            let mut record = self.catalog.get(org).await.map_err(BranchError::Catalog)?;
            let epoch = record.tenant.epoch;
            change(&mut record)?;
            // A new epoch: whoever still holds the record of before can't write it back.
            record.tenant.epoch += 1;
            match self.catalog.put(record.clone(), Expect::Epoch(epoch)).await {
                Ok(()) => return Ok(record),
                Err(Fault::Stale { .. }) if attempt < ATTEMPTS => attempt += 1,
                Err(fault) => return Err(BranchError::Catalog(fault)),
            }
        }
    }
}

/// What the default database is called on a branch.
fn on_branch(name: &str) -> String {
    format!("{DEFAULT_NAME}@{name}")
}

/// Waits until this process enforces the new record.
async fn heard(is_so: impl Fn() -> bool) {
    let looking = async {
        while !is_so() {
            tokio::time::sleep(LOOK).await;
        }
    };
    // A catalog that is slow to tell costs the next connection a refusal, nothing else.
    let _ = tokio::time::timeout(HEARD_WITHIN, looking).await;
}
