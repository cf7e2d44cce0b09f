//! What an administrator's login answers while tenants work: how big a database is, "end that backend", and who holds so
//! many locks that nobody else gets any.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Mutex, OnceCell};
use tokio_postgres::{Row, error::SqlState, types::ToSql};

use super::{Admin, AdminError, admin::Connection};

/// Longest measurement: `pg_database_size` looks at every file of the database, seconds with very many tables.
const SIZE_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest signal: it is one system call in the server.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The administrator at work. Connects when first asked and again whenever the connection is lost.
#[derive(Debug)]
pub struct Maintenance {
    sizes: Line,
    /// Apart from `sizes`: ending a runaway backend must not wait behind a slow measurement.
    signals: Line,
    /// Our own role.
    own: OnceCell<u32>,
}

impl Maintenance {
    /// Works with this login; nothing is dialled yet.
    pub fn new(admin: Admin) -> Self {
        Self { sizes: Line::new(admin.clone()), signals: Line::new(admin), own: OnceCell::new() }
    }

    /// The size of a physical database in bytes, everything in it counted.
    ///
    /// # Errors
    /// The server is away, refuses, has no such database, or takes longer than 30 s.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn database_bytes(&self, database: &str) -> Result<u64, AdminError> {
        const SIZE: &str = "select pg_catalog.pg_database_size($1::text::name)";
        let row = self.sizes.ask("measuring a database", SIZE_TIMEOUT, SIZE, &[&database]).await?;
        Ok(row.and_then(|row| row.try_get::<_, i64>(0).ok()).and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0))
    }

    /// Ends the backend `pid` if it still belongs to `role`: process ids are used again, and the next one may be
    /// another tenant's. Says whether there was such a backend.
    ///
    /// # Errors
    /// The server is away, refuses, or takes longer than 5 s.
    ///
    /// # Cancel safety
    /// May be dropped at any point; the signal was then sent or not.
    pub async fn terminate(&self, pid: i32, role: &str) -> Result<bool, AdminError> {
        const END: &str = "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
                           where pid = $1 and usename = $2::text::name";
        let row = self.signals.ask("ending a backend", SIGNAL_TIMEOUT, END, &[&pid, &role]).await?;
        Ok(row.is_some())
    }
}

impl Maintenance {
    /// Ends, of each of these roles that together hold more than a quarter of the server's lock table, the backend that
    /// holds most; of anybody's, where the table is full. The table is the server's only one: who fills it, with advisory
    /// locks say, keeps every other tenant from creating a table, and from logging in. Says whom it ended.
    ///
    /// # Errors
    /// The server is away, refuses, or takes longer than 5 s.
    ///
    /// # Cancel safety
    /// May be dropped at any point; backends were then ended or not.
    pub async fn end_hoarders(&self, roles: &[String]) -> Result<Option<String>, AdminError> {
        // Functions, not the views over them, which read catalogs of the whole server: those take room in the table.
        const GREEDY: &str = "with held as materialized (select a.usesysid, l.pid, pg_catalog.count(*) as locks \
                 from pg_catalog.pg_lock_status() l join pg_catalog.pg_stat_get_activity(null) a on a.pid = l.pid \
                 where not l.fastpath and l.granted and a.usesysid <> $1 group by 1, 2), \
             most as materialized (select held.*, pg_catalog.sum(locks) over (partition by usesysid) as total, \
                 pg_catalog.row_number() over (partition by usesysid order by locks desc) as place from held), \
             room as (select pg_catalog.current_setting('max_locks_per_transaction')::int8 \
                 * (pg_catalog.current_setting('max_connections')::int8 \
                    + pg_catalog.current_setting('max_prepared_transactions')::int8) as locks), ";
        let own = self.own.get_or_try_init(|| async {
            const OWN: &str = "select oid from pg_catalog.pg_roles where rolname = session_user";
            let row = self.signals.ask("looking for ourselves", SIGNAL_TIMEOUT, OWN, &[]).await?;
            Ok::<u32, AdminError>(row.and_then(|row| row.try_get(0).ok()).unwrap_or(0))
        });
        let own = *own.await?;
        let tenants = format!(
            "{GREEDY} named as materialized (select pg_catalog.pg_get_userbyid(usesysid)::text as role, most.* from most), \
             ended as materialized (select role || ' held ' || total as who, pg_catalog.pg_terminate_backend(pid) \
                 from named, room where place = 1 and total * 4 > room.locks and role = any($2)) \
             select pg_catalog.string_agg(who, ', ') from ended"
        );
        let doing = "looking for who holds too many locks";
        let said = match self.signals.ask(doing, SIGNAL_TIMEOUT, &tenants, &[&own, &roles]).await {
            Err(error) if error.code() == Some(&SqlState::OUT_OF_MEMORY) => {
                let anybody = format!(
                    "{GREEDY} ended as materialized (select usesysid || ' held ' || locks as who, \
                         pg_catalog.pg_terminate_backend(pid) from most order by locks desc limit 1) \
                     select pg_catalog.string_agg(who, ', ') from ended"
                );
                self.signals.ask(doing, SIGNAL_TIMEOUT, &anybody, &[&own]).await?
            }
            answer => answer?,
        };
        Ok(said.and_then(|row| row.try_get(0).ok()).flatten())
    }
}

/// One connection, made again when lost. Questions of several tasks travel on it together.
#[derive(Debug)]
struct Line {
    admin: Admin,
    /// Held while dialling only, so that one task dials and the others wait for it.
    connection: Mutex<Option<Arc<Connection>>>,
}

impl Line {
    fn new(admin: Admin) -> Self {
        Self { admin, connection: Mutex::new(None) }
    }

    /// Asks; once more on a fresh connection when the present one turns out to be dead. Every question here may be
    /// asked twice.
    async fn ask(
        &self,
        doing: &str,
        limit: Duration,
        question: &str,
        names: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, AdminError> {
        let asking = async {
            let first = self.connected().await?;
            match first.query_opt(question, names).await.map_err(AdminError::sql(doing)) {
                Err(error) if error.is_broken_connection() => {
                    self.forget(&first).await;
                    let second = self.connected().await?;
                    second.query_opt(question, names).await.map_err(AdminError::sql(doing))
                }
                answer => answer,
            }
        };
        match tokio::time::timeout(limit, asking).await {
            Ok(answer) => answer,
            Err(_) => {
                // What did not answer in time won't be asked again.
                self.connection.lock().await.take();
                Err(AdminError::TimedOut { doing: doing.into(), after: limit })
            }
        }
    }

    /// Lets a dead connection go, unless another task has replaced it already.
    async fn forget(&self, dead: &Arc<Connection>) {
        let mut slot = self.connection.lock().await;
        if slot.as_ref().is_some_and(|present| Arc::ptr_eq(present, dead)) {
            *slot = None;
        }
    }

    async fn connected(&self) -> Result<Arc<Connection>, AdminError> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok(Arc::clone(connection));
        }
        let fresh = Arc::new(self.admin.connect(None).await?);
        *slot = Some(Arc::clone(&fresh));
        Ok(fresh)
    }
}
