//! What an administrator's login answers while tenants work: how big a database is, and "end that backend".

use std::{sync::Arc, time::Duration};

use tokio::sync::Mutex;
use tokio_postgres::{Row, types::ToSql};

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
}

impl Maintenance {
    /// Works with this login; nothing is dialled yet.
    pub fn new(admin: Admin) -> Self {
        Self { sizes: Line::new(admin.clone()), signals: Line::new(admin) }
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
