//! Where the Neon homes of an installation are made: on one PostgreSQL server, or each as a project at Neon.

use std::{fmt, sync::Arc};

use super::{ProjectError, Projects};
use crate::{
    tenant::{Branch, Limits, Names, Tenant},
    upstream::postgres::{ProvisionError, Provisioner},
};

/// What makes Neon homes. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Homes {
    /// Databases of a PostgreSQL server.
    Server(Box<Provisioner>),
    /// Projects at Neon.
    Projects(Arc<Projects>),
}

/// Why a home could not be made or taken away. Calling again continues.
#[derive(Debug)]
pub enum HomeError {
    /// The server said no or can't be reached.
    Server(ProvisionError),
    /// Neon did.
    Project(ProjectError),
}

impl HomeError {
    /// Whether a database could not be copied because somebody uses it.
    pub fn is_in_use(&self) -> bool {
        matches!(self, HomeError::Server(error) if error.is_in_use())
    }
}

impl fmt::Display for HomeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HomeError::Server(error) => error.fmt(f),
            HomeError::Project(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for HomeError {}

impl From<ProvisionError> for HomeError {
    fn from(error: ProvisionError) -> Self {
        HomeError::Server(error)
    }
}

impl From<ProjectError> for HomeError {
    fn from(error: ProjectError) -> Self {
        HomeError::Project(error)
    }
}

impl Homes {
    /// Makes a branch; `make_quiet` is asked to close what is idle in a database that can only be copied then.
    ///
    /// # Errors
    /// The first step that failed.
    pub async fn make_branch(
        &self,
        tenant: &Tenant,
        names: &Names,
        limits: &Limits,
        name: &str,
        make_quiet: impl Fn(&str),
    ) -> Result<Branch, HomeError> {
        let place = match self {
            Homes::Server(provisioner) => {
                // What an earlier attempt left must not pass for a copy of now.
                provisioner.drop_branch(tenant, names, name).await?;
                provisioner.branch(tenant, names, name, make_quiet).await?;
                None
            }
            Homes::Projects(projects) => Some(projects.make_branch(tenant, limits, name).await?),
        };
        Ok(Branch { name: name.to_owned(), place })
    }

    /// Removes a branch. Nothing there is no error.
    ///
    /// # Errors
    /// The first step that failed.
    pub async fn drop_branch(&self, tenant: &Tenant, names: &Names, branch: &Branch) -> Result<(), HomeError> {
        match self {
            Homes::Server(provisioner) => Ok(provisioner.drop_branch(tenant, names, &branch.name).await?),
            Homes::Projects(projects) => Ok(projects.drop_branch(tenant, branch).await?),
        }
    }
}
