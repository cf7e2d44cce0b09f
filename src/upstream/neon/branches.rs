//! A tenant's branches: reserved in its record first, which counts them exactly over all processes, then made; removed
//! from the record first, so that nobody comes in any more, then dropped.
//!
//! Entry points: [`Branches::create`], [`Branches::delete`].

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    catalog::{Catalog, Expect, Fault, Record},
    quota::Slot,
    refusal::{Limit, Over},
    tenant::{Branch, DEFAULT_NAME, Names, OrgId},
    upstream::postgres::{ProvisionError, Provisioner, Upstream},
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
    provisioner: Provisioner,
    upstream: Arc<Upstream>,
    names: Names,
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
    /// The catalog can't be read or written now.
    Catalog(Fault),
    /// The server said no.
    Server(ProvisionError),
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
            BranchError::InUse => f.write_str("the database is in use; try again when its sessions are idle"),
            BranchError::Catalog(fault) => fault.fmt(f),
            BranchError::Server(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for BranchError {}

impl Branches {
    /// Branches of the homes behind `upstream`, recorded in `catalog`.
    pub fn new(catalog: Catalog, provisioner: Provisioner, upstream: Arc<Upstream>, names: Names) -> Arc<Self> {
        Arc::new(Self { catalog, provisioner, upstream, names })
    }

    /// The tenant's branches, as the catalog has them now.
    ///
    /// # Errors
    /// [`BranchError::Catalog`].
    pub async fn list(&self, org: &OrgId) -> Result<Vec<Branch>, BranchError> {
        self.catalog.get(org).await.map(|record| record.tenant.routes.neon.branches).map_err(BranchError::Catalog)
    }

    /// Makes a branch: a copy of the tenant's databases as they are now.
    ///
    /// # Errors
    /// Nothing is left behind; except that a server which has gone meanwhile may keep a copy that a later branch of
    /// the name takes over.
    ///
    /// # Cancel safety
    /// None: run it in a task of its own.
    pub async fn create(&self, slot: &Arc<Slot>, name: &str) -> Result<Branch, BranchError> {
        if !Branch::is_name(name) {
            return Err(BranchError::BadName);
        }
        let branch = Branch { name: name.to_owned(), place: None };
        let record = self
            .change(slot.org(), |record| {
                let route = &mut record.tenant.routes.neon;
                let on_branch = format!("{DEFAULT_NAME}@{name}");
                if route.branch(name).is_some() || record.tenant.databases.contains(&on_branch) {
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
        // What an earlier attempt left must not pass for a copy of now.
        let made = match self.provisioner.drop_branch(&record.tenant, &self.names, name).await {
            Ok(()) => self.provisioner.branch(&record.tenant, &self.names, name, |it| pool.close_idle(it)).await,
            failed => failed,
        };
        if let Err(error) = made {
            let forget = |record: &mut Record| {
                record.tenant.routes.neon.branches.retain(|it| it.name != name);
                Ok(())
            };
            if let Err(error) = self.change(slot.org(), forget).await {
                tracing::error!(org = %slot.org(), branch = name, %error, "a branch that was not made stays recorded: delete it");
            }
            return Err(if error.is_in_use() { BranchError::InUse } else { BranchError::Server(error) });
        }
        heard(|| slot.policy().tenant.routes.neon.branch(name).is_some()).await;
        Ok(branch)
    }

    /// Removes a branch with all that is in it; its sessions end.
    ///
    /// # Errors
    /// [`BranchError::Unknown`]; others may leave the copy without a record, for a later branch of the name.
    ///
    /// # Cancel safety
    /// None: run it in a task of its own.
    pub async fn delete(&self, slot: &Arc<Slot>, name: &str) -> Result<(), BranchError> {
        let record = self
            .change(slot.org(), |record| {
                let branches = &mut record.tenant.routes.neon.branches;
                let before = branches.len();
                branches.retain(|it| it.name != name);
                if branches.len() == before { Err(BranchError::Unknown) } else { Ok(()) }
            })
            .await?;
        heard(|| slot.policy().tenant.routes.neon.branch(name).is_none()).await;
        self.provisioner.drop_branch(&record.tenant, &self.names, name).await.map_err(BranchError::Server)
    }

    /// Changes a record, again if somebody else changed it meanwhile.
    async fn change(
        &self,
        org: &OrgId,
        change: impl Fn(&mut Record) -> Result<(), BranchError>,
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
