//! Moving a tenant's SQL databases from one home to the other: between any two servers, by nothing but logins to both.
//!
//! ```text
//! begin        both ends are this coordinator's
//! fill         the new place: made, filled while the tenant goes on writing
//! stand_still  nobody of the tenant is in the old place, and nobody comes in       ─┐
//! carry        what has changed since; the rest of the schema; both are the same    │ the pause
//! open         the new place lets the tenant in                                    ─┘
//! ```
//!
//! The schema is `pg_dump`'s, rows travel as COPY through here without touching a disk. What differs is found by digests
//! of rows in buckets, on both sides, so that catching up needs neither replication nor a way from server to server, and
//! the comparison that finds what to carry is the proof that nothing is left.
//!
//! Who may do what, and how a coordinator that comes too late is kept out: [`super::provision`]'s `closed`.

mod fit;
mod rows;
mod schema;

use std::{collections::BTreeMap, fmt, time::Duration};

use tokio::time::Instant;

pub use schema::Dump;
use schema::Script;

use super::{AdminError, Mark, ProvisionError, Provisioner, admin::Connection, provision::Open};
use crate::{
    catalog::ledger::failpoint::reach,
    tenant::{DEFAULT_NAME, Names, Tenant},
};

/// After this long the tenant's sessions that hold a connection without a transaction are ended: those that could be
/// given back have been by then, also by a process that looks at the catalog once a second only.
const IDLE_GRACE: Duration = Duration::from_secs(3);

/// Between two looks at the tenant's sessions.
const LOOK: Duration = Duration::from_millis(5);

/// What is moved, and between what.
#[derive(Debug)]
pub struct Move<'a> {
    /// Whose.
    pub tenant: &'a Tenant,
    /// The home it is in.
    pub from: &'a Provisioner,
    /// The home it is to be in.
    pub to: &'a Provisioner,
    /// What derives names.
    pub names: &'a Names,
    /// The coordinator.
    pub by: Mark,
    /// Whether the new place is one that the tenant has left before: what is kept there is no longer needed.
    pub returns: bool,
}

/// Why databases were not moved.
#[derive(Debug)]
pub enum MoveError {
    /// A later coordinator was here.
    Overtaken,
    /// They can't be where they are to be.
    Unfit(String),
    /// The tenant did not stand still in time.
    Busy {
        /// Its transactions that go on.
        transactions: usize,
    },
    /// A server's own.
    Server(ProvisionError),
}

impl fmt::Display for MoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MoveError::Overtaken => f.write_str("a later coordinator was here"),
            MoveError::Unfit(why) => f.write_str(why),
            MoveError::Busy { transactions } => {
                write!(f, "{transactions} transaction(s) of the tenant did not come to an end")
            }
            MoveError::Server(error) => error.fmt(f),
        }
    }
}

impl From<ProvisionError> for MoveError {
    fn from(error: ProvisionError) -> Self {
        MoveError::Server(error)
    }
}

impl From<AdminError> for MoveError {
    fn from(error: AdminError) -> Self {
        MoveError::Server(error.into())
    }
}

/// What has been brought to the new place while the tenant goes on.
#[derive(Debug)]
pub struct Filled {
    scripts: Vec<Script>,
    /// Of each database, the tables that were the same on both sides, their rows, and what was counted of them before.
    same: Vec<BTreeMap<i64, (rows::Count, u64)>>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Tables.
    pub tables: usize,
    /// Their rows.
    pub rows: u64,
    /// Rows that travelled during the pause.
    pub late: u64,
}

/// Both sides of one logical database.
struct Ends {
    from: Connection,
    to: Connection,
    /// The tenant's role there.
    to_role: String,
}

fn taken(done: bool) -> Result<(), MoveError> {
    if done { Ok(()) } else { Err(MoveError::Overtaken) }
}

impl Move<'_> {
    fn databases(&self) -> impl Iterator<Item = &str> {
        let further = self.tenant.databases.iter().map(String::as_str).filter(|name| *name != DEFAULT_NAME);
        std::iter::once(DEFAULT_NAME).chain(further)
    }

    /// Makes both ends this coordinator's. The old place is open again, if an earlier one had closed it.
    ///
    /// # Errors
    /// [`MoveError::Overtaken`], a server's.
    pub async fn begin(&self) -> Result<(), MoveError> {
        self.take_over().await?;
        taken(self.from.turn(self.tenant, self.names, self.by, Open::Yes).await?)?;
        if self.to.is_open(self.tenant, self.names).await? == Open::Yes {
            // Nobody makes anything there any more; and nobody has.
            taken(self.to.turn(self.tenant, self.names, self.by, Open::Filling).await?)?;
            let client = self.to.open().await?;
            self.to.end_all(self.tenant, self.names, &client).await?;
            if let Err(error) = self.is_empty().await {
                taken(self.to.turn(self.tenant, self.names, self.by, Open::Yes).await?)?;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn take_over(&self) -> Result<(), MoveError> {
        let (from, to) = tokio::try_join!(
            self.from.take_over(self.tenant, self.names, self.by),
            self.to.take_over(self.tenant, self.names, self.by)
        )?;
        reach("after a take-over");
        taken(from && to)
    }

    async fn ends(&self, database: &str) -> Result<Ends, MoveError> {
        let (from, here) = self.from.mover(self.tenant, self.names, self.by, database);
        let (to, there) = self.to.mover(self.tenant, self.names, self.by, database);
        let (from, to) = tokio::try_join!(from.connect(None), to.connect(None))?;
        for (client, role) in [(&from, &here.role), (&to, &there.role)] {
            // Now that the session stands: who comes later ends it.
            if Provisioner::is_overtaken(client, role, self.by).await? {
                return Err(MoveError::Overtaken);
            }
            rows::prepare(client, role).await?;
        }
        Ok(Ends { from, to, to_role: there.role })
    }

    /// Makes the new place and fills it. The old one is only read, and the tenant writes on.
    ///
    /// # Errors
    /// [`MoveError`]: what was filled stays closed.
    pub async fn fill(&self, dump: &Dump, say: &(dyn Fn(String) + Sync)) -> Result<Filled, MoveError> {
        taken(self.to.remake(self.tenant, self.names, self.by).await?)?;
        reach("after a place was made");
        let mut filled = Filled { scripts: Vec::new(), same: Vec::new() };
        for database in self.databases() {
            let script = self.script(dump, database).await?;
            let ends = self.ends(database).await?;
            script.begin(&ends).await?;
            reach("after a schema");
            let tables = rows::tables(&ends.from).await?;
            let before = rows::counted(&ends.from).await?;
            let mut rows = 0;
            for (at, table) in tables.iter().enumerate() {
                rows += rows::copy(&ends, table, None).await?;
                say(format!("{database}: {} of {} tables, {rows} rows", at + 1, tables.len()));
                reach("after a table");
            }
            script.index(&ends).await?;
            let now = rows::counted(&ends.from).await?;
            let mut same = BTreeMap::new();
            for table in &tables {
                // What has changed already will have to be read again.
                if let Some(count) = before.get(&table.id).filter(|count| now.get(&table.id) == Some(count))
                    && let Some(rows) = rows::same(&ends, table).await?
                {
                    same.insert(table.id, (count.clone(), rows));
                }
            }
            say(format!("{database}: {rows} rows; {} of {} tables are as they were", same.len(), tables.len()));
            filled.scripts.push(script);
            filled.same.push(same);
        }
        Ok(filled)
    }

    async fn script(&self, dump: &Dump, database: &str) -> Result<Script, MoveError> {
        let (login, from) = self.from.mover(self.tenant, self.names, self.by, database);
        let to = self.to.place(self.tenant, self.names, database);
        // One program for both sides, so that they can be compared.
        Script::read(&dump.schema(&login, self.to.release().await?).await?, &from.role, &to.role)
    }

    /// Waits until nobody of the tenant is in the old place, and closes it. The tenant's sessions have been asked to wait
    /// before.
    ///
    /// # Errors
    /// [`MoveError::Busy`]: not within `patience`; it is open as before. [`MoveError::Overtaken`], a server's.
    pub async fn stand_still(&self, patience: Duration) -> Result<(), MoveError> {
        let client = self.from.open().await?;
        let began = Instant::now();
        let mut told = None;
        let mut closed = false;
        loop {
            let there = self.from.backends(self.tenant, self.names, &client).await?;
            match there.all {
                // Who was just connecting has come in meanwhile, or never does.
                0 if closed => return Ok(()),
                0 => {
                    taken(self.from.turn(self.tenant, self.names, self.by, Open::Left).await?)?;
                    closed = true;
                    reach("after a place was closed");
                    continue;
                }
                _ if began.elapsed() > patience => {
                    taken(self.from.turn(self.tenant, self.names, self.by, Open::Yes).await?)?;
                    return Err(MoveError::Busy { transactions: there.all - there.idle });
                }
                _ => {}
            }
            let due = told.is_none_or(|at: Instant| at.elapsed() > IDLE_GRACE) && began.elapsed() > IDLE_GRACE;
            if there.idle > 0 && due {
                self.from.end_idle(self.tenant, self.names, &client).await?;
                told = Some(Instant::now());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Brings what has changed to the new place, then the rest of the schema, and compares. The tenant stands still.
    ///
    /// # Errors
    /// [`MoveError::Unfit`] where both are not the same in the end; the others.
    pub async fn carry(&self, dump: &Dump, filled: Option<Filled>) -> Result<Carried, MoveError> {
        let scripts = async {
            let mut scripts = Vec::new();
            for database in self.databases() {
                scripts.push(self.script(dump, database).await?);
            }
            Ok::<Vec<Script>, MoveError>(scripts)
        };
        let (scripts, carried) = match filled {
            Some(Filled { scripts: before, same }) => {
                let (now, carried) = tokio::join!(scripts, self.level(&same));
                if now? == before { (before, carried?) } else { self.begin_anew(dump).await? }
            }
            None => self.begin_anew(dump).await?,
        };
        reach("after the rows");
        for (database, script) in self.databases().zip(&scripts) {
            let ends = self.ends(database).await?;
            rows::sequences(&ends).await?;
            script.end(&ends).await?;
            let there = self.to.mover(self.tenant, self.names, self.by, database).0;
            let result = dump.schema(&there, self.to.release().await?).await?;
            script.compare(&Script::read(&result, &ends.to_role, &ends.to_role)?)?;
            rows::same_sequences(&ends).await?;
            schema::settings(&ends, &self.to.place(self.tenant, self.names, database).database).await?;
        }
        reach("after the comparison");
        Ok(carried)
    }

    /// Everything in the pause: nothing was brought before, or the schema has changed since.
    async fn begin_anew(&self, dump: &Dump) -> Result<(Vec<Script>, Carried), MoveError> {
        let Filled { scripts, same } = self.fill(dump, &|_| {}).await?;
        let carried = self.level(&same).await?;
        Ok((scripts, Carried { late: carried.rows, ..carried }))
    }

    /// Makes the rows of every table the same on both sides, and sees that they are; those in `same` have been.
    async fn level(&self, same: &[BTreeMap<i64, (rows::Count, u64)>]) -> Result<Carried, MoveError> {
        let mut carried = Carried::default();
        for (database, same) in self.databases().zip(same) {
            let ends = self.ends(database).await?;
            let now = rows::counted(&ends.from).await?;
            for table in rows::tables(&ends.from).await? {
                let unchanged = same.get(&table.id).filter(|(before, _)| now.get(&table.id) == Some(before));
                let (rows, late) = match unchanged {
                    Some((_, rows)) => (*rows, 0),
                    None => rows::level(&ends, &table).await?,
                };
                carried.tables += 1;
                carried.rows += rows;
                carried.late += late;
            }
        }
        Ok(carried)
    }

    /// Lets the tenant into the new place.
    ///
    /// # Errors
    /// [`MoveError::Overtaken`], the server's.
    pub async fn open(&self) -> Result<(), MoveError> {
        taken(self.to.turn(self.tenant, self.names, self.by, Open::Yes).await?)
    }

    /// After the commit: the new place is open, the old one closed, and nothing of the move logs in any more.
    ///
    /// # Errors
    /// [`MoveError::Overtaken`], a server's.
    pub async fn finish(&self) -> Result<(), MoveError> {
        self.take_over().await?;
        self.open().await?;
        taken(self.from.turn(self.tenant, self.names, self.by, Open::Left).await?)?;
        reach("after a place was left");
        self.retire().await
    }

    /// After an abort: the old place is open, the new one as empty as before.
    ///
    /// # Errors
    /// [`MoveError::Overtaken`], a server's.
    pub async fn restore(&self) -> Result<(), MoveError> {
        self.take_over().await?;
        let (from, to) =
            tokio::try_join!(self.from.is_open(self.tenant, self.names), self.to.is_open(self.tenant, self.names))?;
        if (from, to) == (Open::Left, Open::Yes) {
            // It was opened by the very last step of this move.
            taken(self.to.turn(self.tenant, self.names, self.by, Open::Filling).await?)?;
        }
        taken(self.from.turn(self.tenant, self.names, self.by, Open::Yes).await?)?;
        reach("after a place was opened");
        // Open, it is none of this move's; left, it was not touched yet.
        if self.to.is_open(self.tenant, self.names).await? == Open::Filling {
            taken(self.to.remake(self.tenant, self.names, self.by).await?)?;
            taken(match self.returns {
                true => self.to.turn(self.tenant, self.names, self.by, Open::Left).await?,
                false => self.to.turn(self.tenant, self.names, self.by, Open::Yes).await?,
            })?;
        }
        self.retire().await
    }

    /// Drops what the tenant has left, at one end alone.
    ///
    /// # Errors
    /// [`MoveError::Overtaken`], the server's.
    pub async fn forget(place: &Provisioner, tenant: &Tenant, names: &Names, by: Mark) -> Result<(), MoveError> {
        taken(place.take_over(tenant, names, by).await?)?;
        taken(place.forget(tenant, names, by).await?)?;
        reach("after a place was forgotten");
        taken(place.retire(tenant, names, by).await?)
    }

    async fn retire(&self) -> Result<(), MoveError> {
        taken(self.from.retire(self.tenant, self.names, self.by).await?)?;
        taken(self.to.retire(self.tenant, self.names, self.by).await?)
    }
}
