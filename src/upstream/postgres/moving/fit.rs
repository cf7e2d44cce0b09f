//! Whether a tenant's databases can be where they are to be. Asked before anything is done.

use tokio_postgres::types::ToSql;

use super::{Dump, Move, MoveError};
use crate::upstream::postgres::{AdminError, admin::Connection, provision::Open};

/// What belongs to no extension and lies in no schema of the system, as a condition on `c` and `n`.
const OWN: &str = "n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema' and not exists (select 1 from \
                   pg_catalog.pg_depend d where d.classid = c.tableoid and d.objid = c.oid and d.deptype = 'e')";

impl Move<'_> {
    /// Says what of the tenant can't be moved. Changes nothing.
    ///
    /// # Errors
    /// [`MoveError::Unfit`], a server's.
    pub async fn fit(&self, dump: &Dump) -> Result<(), MoveError> {
        let (from, to) = (self.from.release().await?, self.to.release().await?);
        if to < from {
            return Err(unfit(format_args!("it is on PostgreSQL {from}, and there is {to} only")));
        }
        dump.find(to.max(from)).map_err(MoveError::Unfit)?;
        for database in self.databases() {
            let place = self.from.place(self.tenant, self.names, database);
            let client = self.from.inside(&place.database).await?;
            movable(&client, database, &place.role).await?;
            self.extensions(&client, database, &place.role).await?;
        }
        if self.to.is_open(self.tenant, self.names).await? == Open::Yes {
            self.is_empty().await?;
        }
        Ok(())
    }

    /// Whether nothing of the tenant's is in the place to go to.
    pub(super) async fn is_empty(&self) -> Result<(), MoveError> {
        for database in self.databases() {
            let place = self.to.place(self.tenant, self.names, database);
            if !self.to.has(&place.database).await? {
                continue;
            }
            let client = self.to.inside(&place.database).await?;
            let objects = format!(
                "select c.relname::text from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
                 where c.relkind in ('r', 'p', 'v', 'm', 'S', 'f') and {OWN} union all \
                 select c.proname::text from pg_catalog.pg_proc c join pg_catalog.pg_namespace n on n.oid = c.pronamespace \
                 where {OWN} limit 1"
            );
            if let Some(name) = first(&client, &objects, &[]).await? {
                return Err(unfit(format_args!(
                    "there is a database {database} with something in it ({name}): take that away, or keep the tier"
                )));
            }
        }
        Ok(())
    }

    /// Whether the server to go to lets the tenant make its extensions.
    async fn extensions(&self, client: &Connection, database: &str, role: &str) -> Result<(), MoveError> {
        const THERE: &str = "select e.extname::text, r.rolname = $1 from pg_catalog.pg_extension e \
             join pg_catalog.pg_roles r on r.oid = e.extowner where e.extname <> 'plpgsql' order by 1";
        const MAY: &str = "select 1 from pg_catalog.pg_available_extension_versions \
                           where name = $1::text::name and (trusted or not superuser) limit 1";
        let doing = || AdminError::sql("looking at extensions");
        let target = self.to.open().await?;
        let mut missing = Vec::new();
        for row in client.query(THERE, &[&role]).await.map_err(doing())? {
            let (name, own): (String, bool) = (row.try_get(0).map_err(doing())?, row.try_get(1).map_err(doing())?);
            if !own {
                return Err(unfit(format_args!("extension {name} of database {database} was made by somebody else")));
            }
            if target.query_opt(MAY, &[&name]).await.map_err(doing())?.is_none() {
                missing.push(name);
            }
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(unfit(format_args!(
                "database {database} uses extensions that it may not have there: {}",
                missing.join(", ")
            ))),
        }
    }
}

async fn movable(client: &Connection, database: &str, role: &str) -> Result<(), MoveError> {
    let foreign = format!(
        "select pg_catalog.format('%s.%s', n.nspname, c.relname) from pg_catalog.pg_class c \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace join pg_catalog.pg_roles r on r.oid = c.relowner \
         where r.rolname <> $1 and c.relkind in ('r', 'p', 'v', 'm', 'S', 'f') and {OWN} limit 1"
    );
    let forced = format!(
        "select pg_catalog.format('%s.%s', n.nspname, c.relname) from pg_catalog.pg_class c \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.relforcerowsecurity and {OWN} limit 1"
    );
    if let Some(name) = first(client, &foreign, &[&role]).await? {
        return Err(unfit(format_args!("{name} of database {database} belongs to somebody else")));
    }
    if let Some(name) = first(client, &forced, &[]).await? {
        return Err(unfit(format_args!(
            "{name} of database {database} forces row-level security on its owner, which hides rows from the move: \
             ALTER TABLE … NO FORCE ROW LEVEL SECURITY for the time of it"
        )));
    }
    for (question, what) in [
        (
            "select oid::text from pg_catalog.pg_largeobject_metadata limit 1",
            "large objects, which are not moved: keep them as bytea",
        ),
        ("select srvname::text from pg_catalog.pg_foreign_server limit 1", "a foreign server, which is not moved"),
        (
            "select gid from pg_catalog.pg_prepared_xacts where database = pg_catalog.current_database() limit 1",
            "a prepared transaction: COMMIT PREPARED or ROLLBACK PREPARED comes first",
        ),
    ] {
        if let Some(name) = first(client, question, &[]).await? {
            return Err(unfit(format_args!("database {database} has {what} ({name})")));
        }
    }
    Ok(())
}

fn unfit(why: std::fmt::Arguments<'_>) -> MoveError {
    MoveError::Unfit(why.to_string())
}

/// The first column of the first row.
async fn first(
    client: &Connection,
    question: &str,
    with: &[&(dyn ToSql + Sync)],
) -> Result<Option<String>, AdminError> {
    let doing = || AdminError::sql("looking at what is to be moved");
    let row = client.query_opt(question, with).await.map_err(doing())?;
    row.map(|row| row.try_get(0)).transpose().map_err(doing())
}
