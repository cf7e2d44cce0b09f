//! A branch of a tenant's databases on a plain server: a copy of each under a name of its own.

use tokio_postgres::error::SqlState;

use super::{AdminError, ProvisionError, Provisioner, lock, logical_databases, run, tenant_lock};
use crate::{
    tenant::{DEFAULT_NAME, Names, Tenant},
    upstream::postgres::admin::quoted,
};

/// Attempts to copy a database that somebody uses; the server itself waits 5 s for them in each.
const ATTEMPTS: u32 = 3;

/// The logical name of a database on a branch.
pub fn on_branch(database: &str, branch: &str) -> String {
    format!("{database}@{branch}")
}

impl Provisioner {
    /// Copies each of the tenant's databases. A database can be copied only while nobody is connected to it:
    /// `make_quiet` is asked, with its physical name, to close what is idle.
    ///
    /// # Errors
    /// The first step that failed, `55006` for a database that stayed in use; calling again continues.
    ///
    /// # Cancel safety
    /// May be dropped at any point: what was done stays, a later call does the rest.
    pub async fn branch(
        &self,
        tenant: &Tenant,
        names: &Names,
        branch: &str,
        make_quiet: impl Fn(&str),
    ) -> Result<(), ProvisionError> {
        let client = self.open().await?;
        let role = names.sql(self.protocol, &tenant.org, DEFAULT_NAME).role;
        lock(&client, tenant_lock(&role)).await?;
        for database in logical_databases(tenant) {
            let template = names.sql(self.protocol, &tenant.org, database).database;
            let place = names.sql(self.protocol, &tenant.org, &on_branch(database, branch));
            let mut attempt = 1;
            loop {
                make_quiet(&template);
                match self.database(&client, &place, Some(&template), &mut super::Report::default()).await {
                    Err(ProvisionError::Admin(error))
                        if error.code() == Some(&SqlState::OBJECT_IN_USE) && attempt < ATTEMPTS =>
                    {
                        attempt += 1;
                    }
                    done => break done?,
                }
            }
        }
        Ok(())
    }

    /// Drops the copies, with whoever is connected to them. Nothing there is no error.
    ///
    /// # Errors
    /// The first step that failed; calling again continues.
    ///
    /// # Cancel safety
    /// As [`Self::branch`].
    pub async fn drop_branch(&self, tenant: &Tenant, names: &Names, branch: &str) -> Result<(), ProvisionError> {
        let client = self.open().await?;
        let role = names.sql(self.protocol, &tenant.org, DEFAULT_NAME).role;
        lock(&client, tenant_lock(&role)).await?;
        for database in logical_databases(tenant) {
            let place = names.sql(self.protocol, &tenant.org, &on_branch(database, branch));
            let drop = format!("drop database if exists {} with (force)", quoted(&place.database));
            run(&client, "dropping a branch", &drop).await?;
        }
        Ok(())
    }
}

impl ProvisionError {
    /// Whether a database could not be copied because somebody uses it.
    pub fn is_in_use(&self) -> bool {
        matches!(self, ProvisionError::Admin(error @ AdminError::Sql { .. }) if error.code() == Some(&SqlState::OBJECT_IN_USE))
    }
}
