//! One end of a move between homes, as its administrator sees it: who may come into the databases, and the role by which
//! they are read and written.
//!
//! # Fencing
//! A coordinator that was stopped and goes on after its successor must not change anything. It begins by taking an end
//! over ([`Provisioner::take_over`]): its mark at the tenant's role, a new password for the move's role, and an end to
//! every session of that role. What the move's role does is done by a session that has seen its own coordinator's mark
//! after it stood ([`Provisioner::mover`]); what the administrator does is done under the tenant's lock with the mark
//! seen under it, and whoever sits on that lock for long loses its session.
//!
//! # Who runs the tenant's own words
//! Reading and writing runs functions of the tenant: of constraints, indexes, generated columns. So it is done by a login
//! that may do what the tenant may and nothing else, never by the administrator's.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use super::{
    LOCK_SPACE, ProvisionError, Provisioner, exists, lock, logical_databases, number, prepare, quoted, role_exists,
    run, tenant_lock,
};
use crate::{
    tenant::{DEFAULT_NAME, Names, Namespace, Tenant, namespace::Password},
    upstream::postgres::{
        Admin, AdminError, Mark,
        admin::Connection,
        ceiling::{mark, marking},
        provision::Report,
    },
};

/// How a closed database is marked, by its comment: it was left and is kept, or a move fills it.
const LEFT: &str = "dynabase: closed, what was in it has another home";
const FILLING: &str = "dynabase: closed, what will be in it is on its way";

/// After this long whoever holds the tenant's lock loses its session: it may be a coordinator that stands still.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Asks for a physical database.
const THERE: &str = "select 1 from pg_catalog.pg_database where datname = $1::text::name";

/// Longest wait for a session to end that was told to.
const END_WITHIN_MS: i64 = 5_000;

/// Whether the tenant may connect to a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::upstream::postgres) enum Open {
    /// It may, or there is no such database.
    Yes,
    /// It was left, and is kept for a while.
    Left,
    /// A move fills it.
    Filling,
}

/// Sessions of the tenant in its databases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::upstream::postgres) struct Backends {
    /// All of them.
    pub all: usize,
    /// Those between two transactions.
    pub idle: usize,
}

/// The role by which a move reads and writes; no tenant's role is called so.
pub(super) fn mover(role: &str) -> String {
    format!("{role}!move")
}

pub(super) async fn state(client: &Connection, database: &str) -> Result<Open, AdminError> {
    const SAID: &str = "select pg_catalog.shobj_description(oid, 'pg_database') from pg_catalog.pg_database \
                        where datname = $1::text::name";
    let doing = "looking at what is there";
    let row = client.query_opt(SAID, &[&database]).await.map_err(AdminError::sql(doing))?;
    let said: Option<String> = row.map(|row| row.try_get(0)).transpose().map_err(AdminError::sql(doing))?.flatten();
    Ok(match said.as_deref() {
        Some(LEFT) => Open::Left,
        Some(FILLING) => Open::Filling,
        _ => Open::Yes,
    })
}

impl Provisioner {
    /// The tenant's place of a logical database here.
    pub(in crate::upstream::postgres) fn place(&self, tenant: &Tenant, names: &Names, database: &str) -> Namespace {
        names.sql(self.protocol, &tenant.org, database)
    }

    fn role_of(&self, tenant: &Tenant, names: &Names) -> String {
        self.place(tenant, names, DEFAULT_NAME).role
    }

    fn databases(&self, tenant: &Tenant, names: &Names) -> Vec<String> {
        logical_databases(tenant).map(|database| self.place(tenant, names, database).database).collect()
    }

    fn move_password(&self, tenant: &Tenant, names: &Names, fence: u64) -> Password {
        let purpose = format!("move {}", self.protocol.label());
        names.password(&purpose, &tenant.org, u32::try_from(fence).unwrap_or(u32::MAX))
    }

    /// Makes this end the coordinator's with this mark: nothing of an earlier one goes on. False: a later one is here.
    pub(in crate::upstream::postgres) async fn take_over(
        &self,
        tenant: &Tenant,
        names: &Names,
        by: Mark,
    ) -> Result<bool, ProvisionError> {
        let role = self.role_of(tenant, names);
        let mover = mover(&role);
        let client = self.open().await?;
        let doing = "taking the tenant's place over";
        self.locked(&client, &role).await?;
        match mark(&client, &role).await? {
            None => {
                return Err(ProvisionError::Tainted {
                    what: "is not there: `dynabase tenant provision` makes it".into(),
                });
            }
            Some(Some(written)) if written > by => return Ok(false),
            Some(_) => {}
        }
        run(&client, doing, &marking(&role, by)).await?;
        let (name, tenant_role) = (quoted(&mover), quoted(&role));
        if !role_exists(&client, &mover).await? {
            run(&client, doing, &format!("create role {name} nologin")).await?;
        }
        let secret = self.secret(&self.move_password(tenant, names, by.fence));
        run(&client, doing, &format!("alter role {name} login password '{secret}'")).await?;
        run(&client, doing, &format!("grant {tenant_role} to {name}")).await?;
        let superuser = "select rolsuper::int from pg_catalog.pg_roles where rolname = current_user";
        if number(&client, superuser).await? == 0 {
            // To see and to end the sessions of both.
            run(&client, doing, &format!("grant {tenant_role}, {name} to current_user")).await?;
        }
        for database in self.databases(tenant, names) {
            self.let_mover_in(&client, &database, &mover).await?;
        }
        const END: &str = "select pg_catalog.pg_terminate_backend(pid, $2) from pg_catalog.pg_stat_activity \
                           where usename = $1::text::name";
        client.query(END, &[&mover, &END_WITHIN_MS]).await.map_err(AdminError::sql(doing))?;
        Ok(true)
    }

    async fn let_mover_in(&self, client: &Connection, database: &str, mover: &str) -> Result<(), AdminError> {
        if exists(client, THERE, database).await? {
            let grant = format!("grant connect, temporary on database {} to {}", quoted(database), quoted(mover));
            run(client, "letting the move in", &grant).await?;
        }
        Ok(())
    }

    /// Takes the tenant's lock on this session; from whoever does not let it go.
    async fn locked(&self, client: &Connection, role: &str) -> Result<(), AdminError> {
        let doing = "waiting for another provisioner";
        let brief = format!("set lock_timeout = {}", LOCK_PATIENCE.as_millis());
        run(client, doing, &brief).await?;
        let key = tenant_lock(role);
        match lock(client, key).await {
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                let end = format!(
                    "select pg_catalog.pg_terminate_backend(pid, {END_WITHIN_MS}) from pg_catalog.pg_locks \
                     where locktype = 'advisory' and granted and classid = {LOCK_SPACE} \
                     and objid = ({key}::bigint & 4294967295)::oid and pid <> pg_catalog.pg_backend_pid()"
                );
                run(client, doing, &end).await?;
                lock(client, key).await
            }
            done => done,
        }
    }

    /// A session of the administrator's with the tenant's lock, on condition that nobody later than `by` was here.
    /// `None`: somebody was.
    async fn as_owner(&self, tenant: &Tenant, names: &Names, by: Mark) -> Result<Option<Connection>, ProvisionError> {
        let role = self.role_of(tenant, names);
        let client = self.open().await?;
        self.locked(&client, &role).await?;
        match mark(&client, &role).await?.flatten() {
            Some(written) if written > by => Ok(None),
            _ => Ok(Some(client)),
        }
    }

    /// The login of the move's role, for a logical database.
    pub(in crate::upstream::postgres) fn mover(
        &self,
        tenant: &Tenant,
        names: &Names,
        by: Mark,
        database: &str,
    ) -> (Admin, Namespace) {
        let place = self.place(tenant, names, database);
        let password = self.move_password(tenant, names, by.fence);
        (Admin::of(self.admin.target().clone(), &mover(&place.role), &password, &place.database), place)
    }

    /// Whether somebody later than `by` has taken this end over, as the move's own session sees it.
    pub(in crate::upstream::postgres) async fn is_overtaken(
        client: &Connection,
        role: &str,
        by: Mark,
    ) -> Result<bool, AdminError> {
        Ok(mark(client, role).await?.flatten().is_some_and(|written| written.fence > by.fence))
    }

    /// The administrator inside a physical database.
    pub(in crate::upstream::postgres) async fn inside(&self, database: &str) -> Result<Connection, ProvisionError> {
        let client = self.admin.connect(Some(database)).await?;
        prepare(&client).await?;
        Ok(client)
    }

    /// Whether there is such a physical database.
    pub(in crate::upstream::postgres) async fn has(&self, database: &str) -> Result<bool, ProvisionError> {
        let client = self.open().await?;
        Ok(exists(&client, THERE, database).await?)
    }

    /// The release of the server.
    pub(in crate::upstream::postgres) async fn release(&self) -> Result<u32, ProvisionError> {
        let client = self.open().await?;
        let version = number(&client, "select pg_catalog.current_setting('server_version_num')::int / 10000").await?;
        Ok(u32::try_from(version).unwrap_or(0))
    }

    /// How many sessions of the tenant are in its databases.
    pub(in crate::upstream::postgres) async fn backends(
        &self,
        tenant: &Tenant,
        names: &Names,
        client: &Connection,
    ) -> Result<Backends, AdminError> {
        const SEEN: &str = "select count(*), count(*) filter (where state = 'idle') from pg_catalog.pg_stat_activity \
                            where usename = $1::text::name and datname = any($2::text[]::name[])";
        let doing = "looking at the tenant's sessions";
        let (role, databases) = (self.role_of(tenant, names), self.databases(tenant, names));
        let row = client.query_one(SEEN, &[&role, &databases]).await.map_err(AdminError::sql(doing))?;
        let count = |at: usize| row.try_get::<_, i64>(at).map(|count| usize::try_from(count).unwrap_or(0));
        let (all, idle) = (count(0).map_err(AdminError::sql(doing))?, count(1).map_err(AdminError::sql(doing))?);
        Ok(Backends { all, idle })
    }

    /// Ends the tenant's sessions that are between two transactions.
    pub(in crate::upstream::postgres) async fn end_idle(
        &self,
        tenant: &Tenant,
        names: &Names,
        client: &Connection,
    ) -> Result<(), AdminError> {
        const END: &str = "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
             where usename = $1::text::name and datname = any($2::text[]::name[]) and state = 'idle'";
        let (role, databases) = (self.role_of(tenant, names), self.databases(tenant, names));
        client.query(END, &[&role, &databases]).await.map_err(AdminError::sql("ending the tenant's sessions"))?;
        Ok(())
    }

    /// Ends all of the tenant's sessions in its databases here.
    pub(in crate::upstream::postgres) async fn end_all(
        &self,
        tenant: &Tenant,
        names: &Names,
        client: &Connection,
    ) -> Result<(), AdminError> {
        const END: &str = "select pg_catalog.pg_terminate_backend(pid, $3) from pg_catalog.pg_stat_activity \
             where usename = $1::text::name and datname = any($2::text[]::name[])";
        let (role, databases) = (self.role_of(tenant, names), self.databases(tenant, names));
        let with: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&role, &databases, &END_WITHIN_MS];
        client.query(END, &with).await.map_err(AdminError::sql("ending the tenant's sessions"))?;
        Ok(())
    }

    /// Opens the databases to the tenant, or closes them. False: a later coordinator was here.
    pub(in crate::upstream::postgres) async fn turn(
        &self,
        tenant: &Tenant,
        names: &Names,
        by: Mark,
        to: Open,
    ) -> Result<bool, ProvisionError> {
        let Some(client) = self.as_owner(tenant, names, by).await? else { return Ok(false) };
        self.set_open(&client, tenant, names, to).await?;
        Ok(true)
    }

    async fn set_open(
        &self,
        client: &Connection,
        tenant: &Tenant,
        names: &Names,
        to: Open,
    ) -> Result<(), ProvisionError> {
        let doing = "saying who may connect";
        let role = quoted(&self.role_of(tenant, names));
        for database in self.databases(tenant, names) {
            let there = exists(client, THERE, &database).await?;
            if !there || (state(client, &database).await? == to && to != Open::Yes) {
                continue;
            }
            let database = quoted(&database);
            let (who, said) = match to {
                Open::Yes => (format!("grant connect on database {database} to {role}"), "null".to_owned()),
                Open::Left => (format!("revoke connect on database {database} from {role}"), format!("'{LEFT}'")),
                Open::Filling => (format!("revoke connect on database {database} from {role}"), format!("'{FILLING}'")),
            };
            run(client, doing, "begin").await?;
            run(client, doing, &who).await?;
            run(client, doing, &format!("comment on database {database} is {said}")).await?;
            run(client, doing, "commit").await?;
        }
        Ok(())
    }

    /// Whether the default database is open, left, or being filled.
    pub(in crate::upstream::postgres) async fn is_open(
        &self,
        tenant: &Tenant,
        names: &Names,
    ) -> Result<Open, ProvisionError> {
        let client = self.open().await?;
        Ok(state(&client, &self.place(tenant, names, DEFAULT_NAME).database).await?)
    }

    /// Whether the tenant may connect to its default database, which is there.
    ///
    /// # Errors
    /// The server can't be reached or says no.
    pub async fn lets_in(&self, tenant: &Tenant, names: &Names) -> Result<bool, ProvisionError> {
        let database = self.place(tenant, names, DEFAULT_NAME).database;
        let client = self.open().await?;
        Ok(exists(&client, THERE, &database).await? && state(&client, &database).await? == Open::Yes)
    }

    /// Makes each database anew: empty, and closed until it is filled. False: a later coordinator was here.
    pub(in crate::upstream::postgres) async fn remake(
        &self,
        tenant: &Tenant,
        names: &Names,
        by: Mark,
    ) -> Result<bool, ProvisionError> {
        let Some(client) = self.as_owner(tenant, names, by).await? else { return Ok(false) };
        let mover = mover(&self.role_of(tenant, names));
        for logical in logical_databases(tenant) {
            let place = self.place(tenant, names, logical);
            let database = quoted(&place.database);
            let drop = format!("drop database if exists {database} with (force)");
            run(&client, "making room for a database", &drop).await?;
            let create =
                format!("create database {database} template template0 encoding 'UTF8' allow_connections false");
            run(&client, "creating a database", &create).await?;
            let said = format!("comment on database {database} is '{FILLING}'");
            run(&client, "closing a database", &said).await?;
            self.database(&client, &place, None, &mut Report::default()).await?;
            self.let_mover_in(&client, &place.database, &mover).await?;
        }
        Ok(true)
    }

    /// Drops the databases that the tenant has left. False: a later coordinator was here.
    pub(in crate::upstream::postgres) async fn forget(
        &self,
        tenant: &Tenant,
        names: &Names,
        by: Mark,
    ) -> Result<bool, ProvisionError> {
        let Some(client) = self.as_owner(tenant, names, by).await? else { return Ok(false) };
        for database in self.databases(tenant, names) {
            // What is open is somebody's home.
            if state(&client, &database).await? == Open::Left {
                let drop = format!("drop database if exists {} with (force)", quoted(&database));
                run(&client, "dropping a database that was left", &drop).await?;
            }
        }
        Ok(true)
    }

    /// Has the move's role log in no more.
    pub(in crate::upstream::postgres) async fn retire(
        &self,
        tenant: &Tenant,
        names: &Names,
        by: Mark,
    ) -> Result<bool, ProvisionError> {
        let Some(client) = self.as_owner(tenant, names, by).await? else { return Ok(false) };
        let mover = mover(&self.role_of(tenant, names));
        if !role_exists(&client, &mover).await? {
            return Ok(true);
        }
        let name = quoted(&mover);
        for database in self.databases(tenant, names) {
            if exists(&client, THERE, &database).await? {
                let revoke = format!("revoke all on database {} from {name}", quoted(&database));
                run(&client, "putting the move's role away", &revoke).await?;
            }
        }
        if let Err(error) = run(&client, "putting the move's role away", &format!("drop role {name}")).await {
            // The tenant's own words may have made something that is the role's: then it stays, and opens nothing.
            tracing::debug!(org = %tenant.org, %error, "the role of a move stays");
            run(&client, "putting the move's role away", &format!("alter role {name} nologin password null")).await?;
        }
        Ok(true)
    }
}
