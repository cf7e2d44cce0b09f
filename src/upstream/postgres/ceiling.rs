//! The outer ceilings of a tenant on a PostgreSQL server: what its role carries. The proxy's own limits are inside
//! them. Written only by who is newer than the last writer: a mark beside them (the role's comment) says who that was.

use serde::{Deserialize, Serialize};

use super::{
    AdminError, ProvisionError, Provisioner,
    admin::{Connection, quoted},
    provision::{OUTER_GRACE, lock_in_transaction, run, tenant_lock},
};
use crate::tenant::SqlLimits;

/// What the comment of a role begins with.
const MARK: &str = "dynabase fence ";

/// Longest wait for who sets the same role's ceilings, and longest pause within: below a coordinator's lease (15 s), so that
/// who comes after one that stands still goes on at once.
const HELD_MS: u32 = 10_000;

/// Who wrote: newer is larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mark {
    /// The coordinator's fence.
    pub fence: u64,
    /// Its stage: 1 prepares, 2 settles.
    pub stage: u8,
}

/// What a role carries. A field is `None` where nothing is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ceiling {
    /// `rolconnlimit`.
    pub connections: Option<u64>,
    /// `statement_timeout` in milliseconds.
    pub statement_timeout_ms: Option<u64>,
    /// `idle_in_transaction_session_timeout` in milliseconds.
    pub idle_in_transaction_ms: Option<u64>,
    /// `temp_file_limit` in KiB; stays unset where the administrator is no superuser.
    pub temp_file_kib: Option<u64>,
}

impl Ceiling {
    /// The ceilings of a tier's main or Neon home.
    pub fn of(limits: &SqlLimits) -> Self {
        Self {
            connections: Some(limits.connections.into()),
            statement_timeout_ms: Some(ms(limits.statement_timeout + OUTER_GRACE)),
            idle_in_transaction_ms: Some(ms(limits.idle_in_transaction_timeout + OUTER_GRACE)),
            temp_file_kib: Some((limits.storage >> 10).min(i32::MAX as u64)),
        }
    }

    /// Room for both.
    #[must_use]
    pub fn or_more(&self, other: &Self) -> Self {
        // What is unset is unlimited, but on a role that carries nothing yet `other` is what it should carry.
        let more = |a: Option<u64>, b: Option<u64>| a.max(b);
        Self {
            connections: more(self.connections, other.connections),
            statement_timeout_ms: more(self.statement_timeout_ms, other.statement_timeout_ms),
            idle_in_transaction_ms: more(self.idle_in_transaction_ms, other.idle_in_transaction_ms),
            temp_file_kib: more(self.temp_file_kib, other.temp_file_kib),
        }
    }

    /// Whether a role that carries `self` is as `wanted`; `temp_file_limit` can't be set by every administrator.
    pub fn is(&self, wanted: &Self) -> bool {
        let temp = self.temp_file_kib.is_none() || self.temp_file_kib == wanted.temp_file_kib;
        temp && Self { temp_file_kib: None, ..self.clone() } == Self { temp_file_kib: None, ..wanted.clone() }
    }
}

fn ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Provisioner {
    /// What a role carries, and who wrote it; `None` when there is no such role.
    ///
    /// # Errors
    /// The server can't be reached or says no.
    pub async fn ceiling(&self, role: &str) -> Result<Option<(Ceiling, Option<Mark>)>, ProvisionError> {
        let client = self.open().await?;
        Ok(read(&client, role).await?)
    }

    /// Sets what a role carries, in one transaction; not where somebody newer than `mark` has. Says whether it did.
    ///
    /// # Errors
    /// The server can't be reached or says no: nothing was changed. When the connection broke it may have been.
    ///
    /// # Cancel safety
    /// Dropped, it may happen yet.
    pub async fn set_ceiling(&self, role: &str, ceiling: &Ceiling, mark: Mark) -> Result<bool, ProvisionError> {
        let client = self.open().await?;
        let doing = "setting the role's ceilings";
        // A process that stands still here keeps nobody waiting: the server ends its session, and with it the lock.
        let bounds = format!(
            "begin; set local lock_timeout = '{HELD_MS}ms'; set local idle_in_transaction_session_timeout = '{HELD_MS}ms'"
        );
        run(&client, doing, &bounds).await?;
        lock_in_transaction(&client, tenant_lock(role)).await?;
        let Some((_, written)) = read(&client, role).await? else {
            return Err(ProvisionError::Tainted { what: "is not there: `dynabase tenant provision` makes it".into() });
        };
        if written.is_some_and(|written| written > mark) {
            return Ok(false);
        }
        let name = quoted(role);
        let limit = ceiling.connections.map_or_else(|| "-1".to_owned(), |limit| limit.to_string());
        run(&client, doing, &format!("alter role {name} connection limit {limit}")).await?;
        for (setting, value) in [
            ("statement_timeout", ceiling.statement_timeout_ms.map(|ms| format!("'{ms}ms'"))),
            ("idle_in_transaction_session_timeout", ceiling.idle_in_transaction_ms.map(|ms| format!("'{ms}ms'"))),
        ] {
            let change = match value {
                Some(value) => format!("alter role {name} set {setting} = {value}"),
                None => format!("alter role {name} reset {setting}"),
            };
            run(&client, doing, &change).await?;
        }
        if let Some(kib) = ceiling.temp_file_kib {
            let change = format!(
                "do $do$ begin alter role {name} set temp_file_limit = {kib}; \
                 exception when insufficient_privilege then null; end $do$"
            );
            run(&client, doing, &change).await?;
        }
        run(&client, doing, &marking(role, mark)).await?;
        run(&client, doing, "commit").await?;
        Ok(true)
    }

    /// The bytes of a physical database, `None` when there is none.
    ///
    /// # Errors
    /// The server can't be reached or says no.
    pub async fn database_bytes(&self, database: &str) -> Result<Option<u64>, ProvisionError> {
        const SIZE: &str = "select pg_catalog.pg_database_size(oid) from pg_catalog.pg_database \
                            where datname = $1::text::name";
        let doing = "measuring a database";
        let client = self.open().await?;
        let row = client.query_opt(SIZE, &[&database]).await.map_err(AdminError::sql(doing))?;
        let bytes = row.map(|row| row.try_get::<_, i64>(0)).transpose().map_err(AdminError::sql(doing))?;
        Ok(bytes.map(|bytes| u64::try_from(bytes).unwrap_or(0)))
    }
}

/// Who wrote a role's ceilings last; `None` when there is no such role.
pub(super) async fn mark(client: &Connection, role: &str) -> Result<Option<Option<Mark>>, AdminError> {
    Ok(read(client, role).await?.map(|(_, mark)| mark))
}

/// The statement that leaves a mark at a role.
pub(super) fn marking(role: &str, mark: Mark) -> String {
    format!("comment on role {} is '{MARK}{} stage {}'", quoted(role), mark.fence, mark.stage)
}

async fn read(client: &Connection, role: &str) -> Result<Option<(Ceiling, Option<Mark>)>, AdminError> {
    const CARRIES: &str = "select r.rolconnlimit, coalesce(s.setconfig, '{}'), \
         pg_catalog.shobj_description(r.oid, 'pg_authid') from pg_catalog.pg_roles r \
         left join pg_catalog.pg_db_role_setting s on s.setrole = r.oid and s.setdatabase = 0 \
         where r.rolname = $1::text::name";
    let doing = "reading the role's ceilings";
    let Some(row) = client.query_opt(CARRIES, &[&role]).await.map_err(AdminError::sql(doing))? else {
        return Ok(None);
    };
    let limit: i32 = row.try_get(0).map_err(AdminError::sql(doing))?;
    let settings: Vec<String> = row.try_get(1).map_err(AdminError::sql(doing))?;
    let comment: Option<String> = row.try_get(2).map_err(AdminError::sql(doing))?;
    let of = |name: &str| settings.iter().find_map(|it| it.strip_prefix(name)?.strip_prefix('='));
    let ceiling = Ceiling {
        connections: u64::try_from(limit).ok(),
        statement_timeout_ms: of("statement_timeout").and_then(milliseconds),
        idle_in_transaction_ms: of("idle_in_transaction_session_timeout").and_then(milliseconds),
        temp_file_kib: of("temp_file_limit").and_then(|kib| kib.parse().ok()),
    };
    Ok(Some((ceiling, comment.as_deref().and_then(parse_mark))))
}

/// A timeout as we write it, or as an operator may.
fn milliseconds(text: &str) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit.trim() {
        "" | "ms" => Some(number),
        "s" => number.checked_mul(1_000),
        "min" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => None,
    }
}

fn parse_mark(comment: &str) -> Option<Mark> {
    let (fence, stage) = comment.strip_prefix(MARK)?.split_once(" stage ")?;
    Some(Mark { fence: fence.parse().ok()?, stage: stage.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written_and_newer_is_larger() {
        assert_eq!(parse_mark("dynabase fence 12 stage 2"), Some(Mark { fence: 12, stage: 2 }));
        for other in ["", "fence 1 stage 1", "dynabase fence x stage 1", "dynabase fence 1", "the boss's own role"] {
            assert_eq!(parse_mark(other), None, "{other}");
        }
        let mark = |fence, stage| Mark { fence, stage };
        assert!(mark(2, 1) > mark(1, 2) && mark(1, 2) > mark(1, 1));
    }

    #[test]
    fn room_for_both_is_the_larger_of_each() {
        let a = Ceiling { connections: Some(5), statement_timeout_ms: Some(60), ..Ceiling::default() };
        let b = Ceiling { connections: Some(50), statement_timeout_ms: Some(10), ..Ceiling::default() };
        let both = Ceiling { connections: Some(50), statement_timeout_ms: Some(60), ..Ceiling::default() };
        assert_eq!(a.or_more(&b), both);
        assert!(!a.is(&both) && both.is(&both));
        assert_eq!(milliseconds("15000ms"), Some(15_000));
        assert_eq!(milliseconds("2min"), Some(120_000));
        assert_eq!(milliseconds("x"), None);
    }
}
