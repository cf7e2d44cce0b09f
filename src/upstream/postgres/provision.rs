//! Makes a tenant's place on a PostgreSQL server, or takes it away: its login role, its databases, who may what.
//!
//! Every step may be repeated and every order of crash resumed: [`Provisioner::ensure`] looks at what is there and
//! does the rest. A tenant's database is closed to everybody until its privileges are right, and its own role is let
//! in last. The tenant never owns its database: an owner could let others in and lift limits.

mod branch;
mod closed;
mod verifier;

use std::{fmt, time::Duration};

use aws_lc_rs::digest;

pub(super) use closed::Open;
use verifier::scram_verifier;

use super::{
    Admin, AdminError,
    admin::{Connection, quoted},
};
use crate::tenant::{DEFAULT_NAME, Names, Namespace, Protocol, SqlLimits, Tenant, namespace::Password};

/// How much later than the proxy the server itself ends a statement or an idle transaction: the proxy's error, with
/// the tier's numbers in it, is the one a client should see.
pub(super) const OUTER_GRACE: Duration = Duration::from_secs(5);

/// Longest wait for another provisioner of the same tenant.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest single statement here; `CREATE DATABASE` copies some 7 MB and waits for a checkpoint.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(120);

/// First half of every advisory lock here, "dyna" in ASCII, so as not to meet an application's.
const LOCK_SPACE: i32 = 0x6479_6e61;

/// Second half of the lock around what all tenants share; tenants' own have the lowest bit set.
const LOCK_SHARED: i32 = 0;

/// Does administrator's work for tenants on one server.
#[derive(Clone, Debug)]
pub struct Provisioner {
    admin: Admin,
    /// Of which home.
    protocol: Protocol,
    passwords: Passwords,
}

/// How a server is told a role's password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passwords {
    /// As what PostgreSQL would keep of it.
    Verifier,
    /// As it is: Neon takes no other ("Neon only supports being given plaintext passwords"). Its connection is TLS.
    Plain,
}

/// What [`Provisioner::ensure`] found to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The role did not exist.
    pub created_role: bool,
    /// The databases that did not exist.
    pub created_databases: Vec<String>,
    /// What the administrator's role was not allowed to do, and what that means.
    pub warnings: Vec<String>,
}

/// Why a tenant's place could not be made or taken away. Trying again continues where it stopped.
#[derive(Debug)]
pub enum ProvisionError {
    /// The server can't be reached or said no.
    Admin(AdminError),
    /// The server is older than what isolation rests on.
    TooOld {
        /// Its `server_version_num`.
        version: i32,
    },
    /// The tenant's role carries privileges that nobody here gave it, and they can't be taken back.
    Tainted {
        /// What it has.
        what: String,
    },
}

impl fmt::Display for ProvisionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProvisionError::Admin(error) => error.fmt(f),
            ProvisionError::TooOld { version } => write!(
                f,
                "the server is PostgreSQL {}; 15 is the oldest that keeps tenants apart (schema public, memberships)",
                version / 10_000
            ),
            ProvisionError::Tainted { what } => write!(f, "the tenant's role {what}; take that from it first"),
        }
    }
}

impl std::error::Error for ProvisionError {}

impl From<AdminError> for ProvisionError {
    fn from(error: AdminError) -> Self {
        ProvisionError::Admin(error)
    }
}

impl Provisioner {
    /// Works with this login, on the tenants' main homes.
    pub fn new(admin: Admin) -> Self {
        Self { admin, protocol: Protocol::Postgres, passwords: Passwords::Verifier }
    }

    /// Works with this login, on the tenants' Neon homes.
    pub fn of_neon_homes(admin: Admin) -> Self {
        Self { admin, protocol: Protocol::Neon, passwords: Passwords::Verifier }
    }

    /// Works with this login, the owner's of a tenant's project at Neon.
    pub fn of_project(admin: Admin) -> Self {
        Self { admin, protocol: Protocol::Neon, passwords: Passwords::Plain }
    }

    /// Makes the tenant's role and all of its databases what they should be.
    ///
    /// # Errors
    /// The first step that failed; calling again continues.
    ///
    /// # Cancel safety
    /// May be dropped at any point: what was done stays, a later call does the rest.
    pub async fn ensure(
        &self,
        tenant: &Tenant,
        names: &Names,
        limits: impl Into<SqlLimits>,
    ) -> Result<Report, ProvisionError> {
        let limits = limits.into();
        let place = names.sql(self.protocol, &tenant.org, DEFAULT_NAME);
        // The purpose of a password is the protocol's label: as `Upstream::home` derives it.
        let password = names.password(self.protocol.label(), &tenant.org, tenant.generation);
        let client = self.open().await?;
        let mut report = Report::default();
        self.close_shared(&client, &mut report).await?;
        lock(&client, tenant_lock(&place.role)).await?;
        self.role(&client, &place.role, &password, &limits, &mut report).await?;
        for database in logical_databases(tenant) {
            self.database(&client, &names.sql(self.protocol, &tenant.org, database), None, &mut report).await?;
        }
        Ok(report)
    }

    /// Removes the tenant's databases, with all that is in them, and its role. Nothing there is no error.
    ///
    /// # Errors
    /// The first step that failed; calling again continues.
    ///
    /// # Cancel safety
    /// As [`Self::ensure`].
    pub async fn drop(&self, tenant: &Tenant, names: &Names) -> Result<(), ProvisionError> {
        let role = names.sql(self.protocol, &tenant.org, DEFAULT_NAME).role;
        let client = self.open().await?;
        lock(&client, tenant_lock(&role)).await?;
        if role_exists(&client, &role).await? {
            // Nobody may come back in while databases go one by one.
            run(&client, "closing the role", &format!("alter role {} nologin", quoted(&role))).await?;
            const END: &str = "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity where usename = $1::text::name";
            client.query(END, &[&role]).await.map_err(AdminError::sql("ending the tenant's sessions"))?;
        }
        let mut databases: Vec<String> =
            logical_databases(tenant).map(|it| names.sql(self.protocol, &tenant.org, it).database).collect();
        databases.extend(forgotten_databases(&client, &role).await?);
        for database in databases {
            let drop = format!("drop database if exists {} with (force)", quoted(&database));
            run(&client, "dropping a database", &drop).await?;
        }
        for role in [&closed::mover(&role), &role] {
            run(&client, "dropping the role", &format!("drop role if exists {}", quoted(role))).await?;
        }
        Ok(())
    }

    /// Sets the role's password to that of a generation; open connections keep going. No role is no error.
    ///
    /// # Errors
    /// The server can't be reached or says no; calling again sets it again.
    ///
    /// # Cancel safety
    /// Dropped, it may happen yet.
    pub async fn set_password(&self, tenant: &Tenant, names: &Names, generation: u32) -> Result<(), ProvisionError> {
        let role = names.sql(self.protocol, &tenant.org, DEFAULT_NAME).role;
        let client = self.open().await?;
        lock(&client, tenant_lock(&role)).await?;
        if role_exists(&client, &role).await? {
            let secret = self.secret(&names.password(self.protocol.label(), &tenant.org, generation));
            let change = format!("alter role {} password '{secret}'", quoted(&role));
            run(&client, "setting the role's password", &change).await?;
        }
        Ok(())
    }

    /// The tenant's physical databases with their bytes, those that its record no longer lists included.
    ///
    /// # Errors
    /// The server can't be reached or says no.
    pub async fn holdings(&self, tenant: &Tenant, names: &Names) -> Result<Vec<(String, u64)>, ProvisionError> {
        let role = names.sql(self.protocol, &tenant.org, DEFAULT_NAME).role;
        let client = self.open().await?;
        let mut databases: Vec<String> =
            logical_databases(tenant).map(|it| names.sql(self.protocol, &tenant.org, it).database).collect();
        databases.extend(forgotten_databases(&client, &role).await?);
        databases.sort();
        databases.dedup();
        let mut held = Vec::new();
        for database in databases {
            if let Some(bytes) = self.database_bytes(&database).await? {
                held.push((database, bytes));
            }
        }
        Ok(held)
    }

    /// What the server is told of a password; nothing in it ends a literal (derived ones are base64url).
    fn secret(&self, password: &Password) -> String {
        match self.passwords {
            Passwords::Verifier => scram_verifier(password),
            Passwords::Plain => password.expose().to_owned(),
        }
    }

    pub(super) async fn open(&self) -> Result<Connection, ProvisionError> {
        let client = self.admin.connect(None).await?;
        prepare(&client).await?;
        let version = number(&client, "select pg_catalog.current_setting('server_version_num')::int").await?;
        if version < 150_000 { Err(ProvisionError::TooOld { version }) } else { Ok(client) }
    }

    /// Takes CONNECT and TEMP on the administrator's databases from PUBLIC: tenants could meet there otherwise.
    async fn close_shared(&self, client: &Connection, report: &mut Report) -> Result<(), ProvisionError> {
        const OPEN: &str = "select datname::text from pg_catalog.pg_database \
             where datallowconn and datname in ('postgres', 'template1', pg_catalog.current_database()) and \
             (pg_catalog.has_database_privilege('public', oid, 'CONNECT') \
              or pg_catalog.has_database_privilege('public', oid, 'TEMP'))";
        let open = async || {
            let rows = client.query(OPEN, &[]).await.map_err(AdminError::sql("looking at shared databases"))?;
            Ok::<Vec<String>, AdminError>(rows.iter().filter_map(|row| row.try_get(0).ok()).collect())
        };
        if open().await?.is_empty() {
            return Ok(());
        }
        lock(client, LOCK_SHARED).await?;
        for database in open().await? {
            let revoke = format!("revoke connect, temporary on database {} from public", quoted(&database));
            // Not being allowed to is a warning below, not the end: a managed server owns these databases itself.
            if let Err(error) = run(client, "closing a shared database", &revoke).await
                && error.code() != Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE)
            {
                return Err(error.into());
            }
        }
        unlock(client, LOCK_SHARED).await?;
        for database in open().await? {
            report.warnings.push(format!(
                "every role may connect to database {database}: run REVOKE CONNECT, TEMP ON DATABASE {} FROM PUBLIC \
                 as its owner",
                quoted(&database)
            ));
        }
        Ok(())
    }

    async fn role(
        &self,
        client: &Connection,
        role: &str,
        password: &Password,
        limits: &SqlLimits,
        report: &mut Report,
    ) -> Result<(), ProvisionError> {
        let name = quoted(role);
        if !role_exists(client, role).await? {
            // Born without a password and without login: nobody is in before the next statements are through.
            run(client, "creating the role", &format!("create role {name} nologin")).await?;
            report.created_role = true;
        }
        strip(client, role).await?;
        let secret = self.secret(password);
        let login = format!("alter role {name} login connection limit {} password '{secret}'", limits.connections);
        run(client, "setting the role's login", &login).await?;
        let outer = |inner: Duration| (inner + OUTER_GRACE).as_millis();
        for (setting, value) in [
            ("statement_timeout", format!("{}ms", outer(limits.statement_timeout))),
            ("idle_in_transaction_session_timeout", format!("{}ms", outer(limits.idle_in_transaction_timeout))),
        ] {
            run(client, "setting the role's ceilings", &format!("alter role {name} set {setting} = '{value}'")).await?;
        }
        let temp_kb = (limits.storage >> 10).min(i32::MAX as u64);
        let temp = format!("alter role {name} set temp_file_limit = {temp_kb}");
        match run(client, "capping temporary files", &temp).await {
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) => {
                report.warnings.push("temporary files are not capped: temp_file_limit is for superusers".into());
                Ok(())
            }
            done => Ok(done?),
        }
    }

    /// One database, closed until it is right; a copy of `template`, if there is one.
    async fn database(
        &self,
        client: &Connection,
        place: &Namespace,
        template: Option<&str>,
        report: &mut Report,
    ) -> Result<(), ProvisionError> {
        let (database, role) = (quoted(&place.database), quoted(&place.role));
        if !exists(client, "select 1 from pg_catalog.pg_database where datname = $1::text::name", &place.database)
            .await?
        {
            // template0 carries nothing that somebody added to template1.
            let from = template.map_or_else(|| "template0 encoding 'UTF8'".to_owned(), quoted);
            let create = format!("create database {database} template {from} allow_connections false");
            run(client, "creating a database", &create).await?;
            report.created_databases.push(place.database.clone());
        }
        const OWNED: &str = "select 1 from pg_catalog.pg_database d join pg_catalog.pg_roles r on r.oid = d.datdba \
                             where d.datname = $1::text::name and r.rolname = current_user";
        if !exists(client, OWNED, &place.database).await? {
            run(client, "taking the database over", &format!("alter database {database} owner to current_user"))
                .await?;
        }
        run(client, "closing the database to others", &format!("revoke all on database {database} from public"))
            .await?;
        run(client, "opening the database", &format!("alter database {database} allow_connections true")).await?;
        self.schema(place).await?;
        let grant = format!("grant temporary, create on database {database} to {role}");
        run(client, "letting the tenant in", &grant).await?;
        // What is being moved, or was left behind, stays closed until the move opens it.
        if closed::state(client, &place.database).await? == closed::Open::Yes {
            run(client, "letting the tenant in", &format!("grant connect on database {database} to {role}")).await?;
        }
        Ok(())
    }

    /// Inside the database: the tenant owns schema public, nobody else may create there.
    async fn schema(&self, place: &Namespace) -> Result<(), ProvisionError> {
        let inside = self.admin.connect(Some(&place.database)).await?;
        prepare(&inside).await?;
        const OWNER: &str = "select 1 from pg_catalog.pg_namespace n join pg_catalog.pg_roles r on r.oid = n.nspowner \
                             where n.nspname = 'public' and r.rolname = $1::text::name";
        const THERE: &str = "select 1 from pg_catalog.pg_namespace where nspname = $1::text::name";
        // A tenant may drop its schema; bringing it back would surprise its owner.
        if !exists(&inside, THERE, "public").await? {
            return Ok(());
        }
        if !exists(&inside, OWNER, &place.role).await? {
            let role = quoted(&place.role);
            let superuser =
                number(&inside, "select rolsuper::int from pg_catalog.pg_roles where rolname = current_user");
            if superuser.await? == 0 {
                // Giving a schema away takes membership in the receiving role.
                run(&inside, "joining the tenant's role", &format!("grant {role} to current_user")).await?;
            }
            run(&inside, "giving schema public to the tenant", &format!("alter schema public owner to {role}")).await?;
        }
        run(&inside, "closing schema public", "revoke create on schema public from public").await?;
        Ok(())
    }
}

/// The tenant's logical databases, the default one first.
fn logical_databases(tenant: &Tenant) -> impl Iterator<Item = &str> {
    let further = tenant.databases.iter().map(String::as_str).filter(|name| *name != DEFAULT_NAME);
    std::iter::once(DEFAULT_NAME).chain(further)
}

/// Bounds every statement of this connection, and looks names up in the system's schema alone.
async fn prepare(client: &Connection) -> Result<(), AdminError> {
    let settings = format!(
        "set search_path = pg_catalog, pg_temp; set statement_timeout = {}; set lock_timeout = {}; \
         set client_min_messages = error",
        STATEMENT_TIMEOUT.as_millis(),
        LOCK_TIMEOUT.as_millis()
    );
    run(client, "preparing the administrator's session", &settings).await
}

/// Takes back what a tenant's role must never have.
async fn strip(client: &Connection, role: &str) -> Result<(), ProvisionError> {
    const TOO_MUCH: &str = "select rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls \
                            from pg_catalog.pg_roles where rolname = $1::text::name";
    const MEMBER_OF: &str = "select g.rolname::text from pg_catalog.pg_auth_members m \
         join pg_catalog.pg_roles g on g.oid = m.roleid join pg_catalog.pg_roles r on r.oid = m.member \
         where r.rolname = $1::text::name";
    let doing = "looking at the role's privileges";
    let row = client.query_one(TOO_MUCH, &[&role]).await.map_err(AdminError::sql(doing))?;
    for (column, word) in ["superuser", "createdb", "createrole", "replication", "bypassrls"].into_iter().enumerate() {
        if row.try_get::<_, bool>(column).map_err(AdminError::sql(doing))? {
            // Only said when needed: an administrator who is no superuser may not even say NOSUPERUSER.
            run(client, "taking a privilege back", &format!("alter role {} no{word}", quoted(role)))
                .await
                .map_err(|_| ProvisionError::Tainted { what: format!("is {word}") })?;
        }
    }
    for row in client.query(MEMBER_OF, &[&role]).await.map_err(AdminError::sql(doing))? {
        let group: String = row.try_get(0).map_err(AdminError::sql(doing))?;
        run(client, "ending a membership", &format!("revoke {} from {}", quoted(&group), quoted(role)))
            .await
            .map_err(|_| ProvisionError::Tainted { what: format!("is a member of {group}") })?;
    }
    Ok(())
}

/// Databases that the catalog no longer lists but that are this tenant's: named after its role *and* opened to it.
/// Neither is enough alone: a long readable name may begin another one, and an operator may open a database to a
/// tenant for reasons of his own.
async fn forgotten_databases(client: &Connection, role: &str) -> Result<Vec<String>, AdminError> {
    const OPENED: &str = "select distinct d.datname::text from pg_catalog.pg_database d \
         cross join lateral pg_catalog.aclexplode(d.datacl) a join pg_catalog.pg_roles r on r.oid = a.grantee \
         where r.rolname = $1::text::name and pg_catalog.starts_with(d.datname::text, $2) and not d.datistemplate";
    let prefix = &role[..role.len().min(40)];
    let rows = client
        .query(OPENED, &[&role, &format!("{prefix}.")])
        .await
        .map_err(AdminError::sql("looking for further databases"))?;
    Ok(rows.iter().filter_map(|row| row.try_get(0).ok()).collect())
}

async fn role_exists(client: &Connection, role: &str) -> Result<bool, AdminError> {
    exists(client, "select 1 from pg_catalog.pg_roles where rolname = $1::text::name", role).await
}

async fn exists(client: &Connection, question: &str, name: &str) -> Result<bool, AdminError> {
    let row = client.query_opt(question, &[&name]).await.map_err(AdminError::sql("looking at what is there"))?;
    Ok(row.is_some())
}

async fn number(client: &Connection, question: &str) -> Result<i32, AdminError> {
    let doing = "asking the server about itself";
    let row = client.query_one(question, &[]).await.map_err(AdminError::sql(doing))?;
    row.try_get(0).map_err(AdminError::sql(doing))
}

/// Runs one statement, or several where none needs to stand alone.
pub(super) async fn run(client: &Connection, doing: &str, statement: &str) -> Result<(), AdminError> {
    client.batch_execute(statement).await.map_err(AdminError::sql(doing))
}

/// Held until unlocked or until the connection ends, however it ends.
async fn lock(client: &Connection, key: i32) -> Result<(), AdminError> {
    run(client, "waiting for another provisioner", &format!("select pg_advisory_lock({LOCK_SPACE}, {key})")).await
}

/// As [`lock`], until the transaction ends.
pub(super) async fn lock_in_transaction(client: &Connection, key: i32) -> Result<(), AdminError> {
    run(client, "waiting for another provisioner", &format!("select pg_advisory_xact_lock({LOCK_SPACE}, {key})")).await
}

async fn unlock(client: &Connection, key: i32) -> Result<(), AdminError> {
    run(client, "letting other provisioners in", &format!("select pg_advisory_unlock({LOCK_SPACE}, {key})")).await
}

/// The same for every process: from a digest of the role's name. Two tenants sharing a lock only wait for each other.
pub(super) fn tenant_lock(role: &str) -> i32 {
    let hash = digest::digest(&digest::SHA256, role.as_bytes());
    let mut first = [0; 4];
    first.copy_from_slice(&hash.as_ref()[..4]);
    i32::from_be_bytes(first) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_lock_is_never_the_shared_one() {
        assert!((0..1000).all(|n| tenant_lock(&format!("t_{n}")) != LOCK_SHARED));
    }
}
