//! Rows: copied as COPY's text from one server to the other, and compared by digests.
//!
//! A table is cut into buckets by a hash of each row's text; of a bucket, its count and the sum of its hashes are compared.
//! Where they differ the bucket is carried over anew: on the target all of it that is there goes first. A row that was
//! changed is in another bucket than before, so that a table needs no key for this, and no unique index is ever violated
//! on the way: what stays on the target is on the source too.
//!
//! A table that was found the same before the pause, and of which the server has counted no change since before it was
//! copied, need not be read again in it ([`counted`]): a session tells its counts when it ends, and in the pause all have.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, TryStreamExt};

use super::{Ends, MoveError};
use crate::upstream::postgres::{
    AdminError,
    admin::{Connection, quoted},
    provision::run,
};

/// Rows of one bucket, about: so many travel for each one that has changed.
const BUCKET_ROWS: u64 = 32;

/// Most buckets of a table: their digests are kept in memory, some tens of bytes each.
const BUCKETS_MAX: u64 = 1 << 17;

/// Bytes gathered before they are passed on.
const CHUNK: usize = 64 << 10;

/// Longest wait for a lock that the tenant holds.
const LOCK_TIMEOUT: &str = "10s";

/// Bytes of a small row: a table has no more rows than its bytes by this.
const ROW_BYTES: u64 = 48;

/// A table with rows of its own.
pub(super) struct Table {
    /// Its number on the source.
    pub(super) id: i64,
    /// As SQL names it.
    name: String,
    /// Its bytes.
    bytes: u64,
    /// Its columns as COPY takes them: those that are not computed.
    columns: String,
}

/// What a server has counted of a table's changes, and since when; and which file it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Count(Vec<i64>, String);

/// The changes of every table that the server has counted: of sessions that have ended, all of them.
pub(super) async fn counted(client: &Connection) -> Result<BTreeMap<i64, Count>, AdminError> {
    const ALL: &str = "select c.oid::pg_catalog.int8, array[c.relfilenode::pg_catalog.int8, \
         pg_catalog.pg_stat_get_tuples_inserted(c.oid), pg_catalog.pg_stat_get_tuples_updated(c.oid), \
         pg_catalog.pg_stat_get_tuples_deleted(c.oid)], pg_catalog.concat_ws(' ', pg_catalog.pg_postmaster_start_time(), \
         pg_catalog.current_setting('track_counts'), (select d.stats_reset from pg_catalog.pg_stat_database d \
         where d.datname = pg_catalog.current_database())) from pg_catalog.pg_class c where c.relkind = 'r'";
    let doing = || AdminError::sql("reading what was counted");
    let mut all = BTreeMap::new();
    for row in client.query(ALL, &[]).await.map_err(doing())? {
        let counts = Count(row.try_get(1).map_err(doing())?, row.try_get(2).map_err(doing())?);
        // Where nothing is counted nothing is known.
        if counts.1.split(' ').any(|word| word == "on") {
            all.insert(row.try_get(0).map_err(doing())?, counts);
        }
    }
    Ok(all)
}

/// Of each bucket: its rows, and the sum of their hashes.
type Digest = BTreeMap<i64, (i64, String)>;

/// Brings a session to what makes a row's text the same on both sides, and to the tenant's role.
pub(super) async fn prepare(client: &Connection, role: &str) -> Result<(), AdminError> {
    let settings = format!(
        "set datestyle = 'ISO, YMD'; set intervalstyle = 'postgres'; set timezone = 'UTC'; set extra_float_digits = 1; \
         set bytea_output = 'hex'; set xmlbinary = 'base64'; set lc_monetary = 'C'; set client_encoding = 'UTF8'; \
         set standard_conforming_strings = on; set check_function_bodies = off; set row_security = off; \
         set client_min_messages = error; set statement_timeout = 0; set lock_timeout = '{LOCK_TIMEOUT}'; \
         set idle_in_transaction_session_timeout = 0; set default_transaction_read_only = off; \
         select pg_catalog.set_config('search_path', '', false); set role {}",
        quoted(role)
    );
    run(client, "preparing the move's session", &settings).await
}

/// Every table that has rows of its own: partitions and children too, without what belongs to extensions.
pub(super) async fn tables(client: &Connection) -> Result<Vec<Table>, AdminError> {
    const ALL: &str = "select n.nspname::text, c.relname::text, array(select a.attname::text from \
         pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped \
         and a.attgenerated = '' order by a.attnum), c.oid::pg_catalog.int8, pg_catalog.pg_relation_size(c.oid) \
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
         where c.relkind = 'r' and c.relpersistence <> 't' and n.nspname not like 'pg\\_%' \
         and n.nspname <> 'information_schema' and not exists (select 1 from pg_catalog.pg_depend d \
         where d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.objid = c.oid and d.deptype = 'e') \
         order by 1, 2";
    let doing = || AdminError::sql("listing tables");
    let mut tables = Vec::new();
    for row in client.query(ALL, &[]).await.map_err(doing())? {
        let schema: String = row.try_get(0).map_err(doing())?;
        let name: String = row.try_get(1).map_err(doing())?;
        let columns: Vec<String> = row.try_get(2).map_err(doing())?;
        let columns: Vec<String> = columns.iter().map(|column| quoted(column)).collect();
        // A table without columns has nothing that could be carried; where it has rows, the comparison says so.
        if !columns.is_empty() {
            let bytes: i64 = row.try_get(4).map_err(doing())?;
            tables.push(Table {
                id: row.try_get(3).map_err(doing())?,
                name: format!("{}.{}", quoted(&schema), quoted(&name)),
                bytes: u64::try_from(bytes).unwrap_or(0),
                columns: columns.join(", "),
            });
        }
    }
    Ok(tables)
}

/// The hash of a row. `r.*` is the row even where a column is called `r`.
const HASH: &str = "pg_catalog.hashtextextended((r.*)::pg_catalog.text collate \"C\", 0)";

/// Carries rows over, all or those that `which` says. Gives how many.
pub(super) async fn copy(ends: &Ends, table: &Table, which: Option<&str>) -> Result<u64, MoveError> {
    let doing = || AdminError::sql(format!("copying {}", table.name));
    let filter = which.map_or_else(String::new, |which| format!(" where {which}"));
    let out = format!("copy (select {} from only {} r{filter}) to stdout", table.columns, table.name);
    let into = format!("copy {} ({}) from stdin", table.name, table.columns);
    let rows = ends.from.copy_out(&out).await.map_err(doing())?;
    let sink = ends.to.copy_in::<_, Bytes>(&into).await.map_err(doing())?;
    let (mut rows, mut sink) = (std::pin::pin!(rows), std::pin::pin!(sink));
    let mut chunk = BytesMut::with_capacity(CHUNK);
    // One message is one row.
    while let Some(row) = rows.try_next().await.map_err(doing())? {
        chunk.extend_from_slice(&row);
        if chunk.len() >= CHUNK {
            sink.send(chunk.split().freeze()).await.map_err(doing())?;
        }
    }
    if !chunk.is_empty() {
        sink.send(chunk.freeze()).await.map_err(doing())?;
    }
    Ok(sink.as_mut().finish().await.map_err(doing())?)
}

/// What is taken of a hash to number a bucket.
fn mask(table: &Table) -> u64 {
    (table.bytes / ROW_BYTES / BUCKET_ROWS).clamp(1, BUCKETS_MAX).next_power_of_two() - 1
}

fn total(digest: &Digest) -> u64 {
    digest.values().map(|(count, _)| u64::try_from(*count).unwrap_or(0)).sum()
}

/// The rows of a table that is the same on both sides now.
pub(super) async fn same(ends: &Ends, table: &Table) -> Result<Option<u64>, AdminError> {
    let mask = mask(table);
    let (source, target) = tokio::try_join!(digest(&ends.from, table, mask), digest(&ends.to, table, mask))?;
    Ok((source == target).then(|| total(&source)))
}

/// Makes a table on the target like that on the source, and sees that it is. Gives its rows, and how many travelled.
pub(super) async fn level(ends: &Ends, table: &Table) -> Result<(u64, u64), MoveError> {
    let mask = mask(table);
    let (source, target) = tokio::try_join!(digest(&ends.from, table, mask), digest(&ends.to, table, mask))?;
    if source == target {
        return Ok((total(&source), 0));
    }
    let differs = |bucket: &&i64| source.get(*bucket) != target.get(*bucket);
    let buckets: Vec<String> = source.keys().chain(target.keys()).filter(differs).map(i64::to_string).collect();
    let which = format!("{HASH} & {mask} = any('{{{}}}'::pg_catalog.int8[])", buckets.join(","));
    run(&ends.to, "taking away what has changed", &format!("delete from only {} r where {which}", table.name)).await?;
    let late = copy(ends, table, Some(&which)).await?;
    match digest(&ends.to, table, mask).await? == source {
        true => Ok((total(&source), late)),
        false => Err(MoveError::Unfit(format!("the rows of {} are not the same in both places", table.name))),
    }
}

async fn digest(client: &Connection, table: &Table, mask: u64) -> Result<Digest, AdminError> {
    let doing = || AdminError::sql(format!("comparing {}", table.name));
    let question = format!(
        "select h & {mask}, count(*), sum(h)::pg_catalog.text from (select {HASH} as h from only {} r) s group by 1",
        table.name
    );
    let mut digest = Digest::new();
    for row in client.query(&question, &[]).await.map_err(doing())? {
        let bucket: i64 = row.try_get(0).map_err(doing())?;
        digest.insert(bucket, (row.try_get(1).map_err(doing())?, row.try_get(2).map_err(doing())?));
    }
    Ok(digest)
}

/// Where each sequence stands: its name, its last value, whether that was given out.
type Sequences = Vec<(String, i64, bool)>;

async fn stand(client: &Connection) -> Result<Sequences, AdminError> {
    const ALL: &str = "select pg_catalog.format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_class c \
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.relkind = 'S' and c.relpersistence <> 't' \
         and n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema' and not exists (select 1 from \
         pg_catalog.pg_depend d where d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.objid = c.oid \
         and d.deptype = 'e') order by 1";
    let doing = || AdminError::sql("reading sequences");
    let mut all = Vec::new();
    for row in client.query(ALL, &[]).await.map_err(doing())? {
        let name: String = row.try_get(0).map_err(doing())?;
        let now = client.query_one(&format!("select last_value, is_called from {name}"), &[]).await.map_err(doing())?;
        all.push((name, now.try_get(0).map_err(doing())?, now.try_get(1).map_err(doing())?));
    }
    Ok(all)
}

/// Brings the sequences of the target to where those of the source stand.
pub(super) async fn sequences(ends: &Ends) -> Result<(), AdminError> {
    for (name, value, called) in stand(&ends.from).await? {
        let set = format!("select pg_catalog.setval($1::pg_catalog.text::pg_catalog.regclass, {value}, {called})");
        ends.to.query_one(&set, &[&name]).await.map_err(AdminError::sql(format!("setting {name}")))?;
    }
    Ok(())
}

/// Whether the sequences of both stand alike.
pub(super) async fn same_sequences(ends: &Ends) -> Result<(), MoveError> {
    let (from, to) = tokio::try_join!(stand(&ends.from), stand(&ends.to))?;
    match from == to {
        true => Ok(()),
        false => Err(MoveError::Unfit("the sequences do not stand alike in both places".into())),
    }
}
