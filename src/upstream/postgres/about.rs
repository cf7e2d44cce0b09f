//! What the server and the administrator's role are like, for `dynabase doctor`.

use super::admin::{Admin, AdminError};

/// The oldest release that tenants can be provisioned on.
pub const VERSION_MIN: u32 = 15;

/// A server, as its administrator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Its major release.
    pub version: u32,
    /// The role is a superuser, which may do all that follows.
    pub is_superuser: bool,
    /// The role may make databases.
    pub may_create_databases: bool,
    /// The role may make roles.
    pub may_create_roles: bool,
    /// Connections that the server takes from those who are no superusers.
    pub max_connections: u32,
    /// It is a standby, which takes no writes.
    pub is_standby: bool,
}

const QUESTION: &str = "select current_setting('server_version_num')::int / 10000, rolsuper, rolcreatedb, rolcreaterole, \
     current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int, \
     pg_is_in_recovery() from pg_roles where rolname = current_user";

impl Admin {
    /// Asks the server.
    ///
    /// # Errors
    /// Why it does not answer.
    pub async fn about(&self) -> Result<About, AdminError> {
        let client = self.connect(None).await?;
        let doing = || AdminError::sql("asking what the role may do");
        let row = client.query_one(QUESTION, &[]).await.map_err(doing())?;
        let number = |at: usize| row.try_get::<_, i32>(at).map(|number| u32::try_from(number).unwrap_or(0));
        let is = |at: usize| row.try_get::<_, bool>(at);
        Ok(About {
            version: number(0).map_err(doing())?,
            is_superuser: is(1).map_err(doing())?,
            may_create_databases: is(2).map_err(doing())?,
            may_create_roles: is(3).map_err(doing())?,
            max_connections: number(4).map_err(doing())?,
            is_standby: is(5).map_err(doing())?,
        })
    }
}
