use super::{words::KNOWN, *};
use crate::upstream::postgres::connection::Value;

fn shape(text: &str) -> Shape {
    scan(text.as_bytes()).shape
}

#[test]
fn the_table_of_known_names_is_sorted() {
    assert!(KNOWN.is_sorted());
}

#[test]
fn plain_work_is_plain() {
    for text in [
        "SELECT abalance FROM pgbench_accounts WHERE aid = 1;",
        "select count(*), max(x), coalesce(a, lower(b)) from t where a in (1,2) and (b or c)",
        "insert into t (a, b) values (1, 'set_config(') returning a",
        "insert into s.t(a) values ($1) on conflict (a) do update set a = excluded.a",
        "with x as (select 1) select * from x for update",
        "select row_number() over (partition by a order by b) from t",
        "select $$ begin; listen x; create temp table $$, $1::numeric(10, 2), '; set a = 1', E'\\'; listen'",
        "select 1 /* ; set x = 1; /* nested */ listen */ -- temp\n",
        "delete from t where pg_advisory_xact_lock(1) is null",
    ] {
        let found = scan(text.as_bytes());
        assert!(found.shape.has(Shape::PLAIN), "{text}");
        assert!(!found.shape.has(Shape::PINS.and(Shape::HIDDEN)), "{text} {:?}", found.shape);
        assert!(found.tracks.is_empty() && found.statements == 1, "{text}");
    }
}

#[test]
fn state_that_outlives_a_transaction_is_seen() {
    for (text, expected) in [
        ("create temp table t (a int)", Shape::TEMP),
        ("CREATE TEMPORARY VIEW v AS SELECT 1", Shape::TEMP),
        ("select 1 into temp t", Shape::TEMP),
        ("select * from pg_temp.t", Shape::TEMP),
        ("select pg_advisory_lock(1)", Shape::ADVISORY),
        ("select pg_catalog.pg_try_advisory_lock (1, 2)", Shape::ADVISORY),
        ("declare c cursor with hold for select 1", Shape::HOLD),
        ("load 'auto_explain'", Shape::LOAD),
        ("select setseed(0.5)", Shape::LOAD),
        ("select my_function(1)", Shape::HIDDEN),
        ("select \"My Function\"(1)", Shape::HIDDEN),
        ("select app.f()", Shape::HIDDEN),
        ("select * from t join f(1) on true", Shape::HIDDEN),
        ("do $$ begin perform set_config('a.b', 'c', false); end $$", Shape::HIDDEN),
        ("call p()", Shape::HIDDEN),
        ("select set_config(name, setting, false) from t", Shape::SETS),
        ("select set_config($1, $2, false)", Shape::SETS),
        ("begin; set x = 1; commit", Shape::SETS),
        ("select currval('s')", Shape::READS_SEQUENCE),
        ("select lastval()", Shape::READS_SEQUENCE),
        ("select nextval('s')", Shape::MOVES_SEQUENCE),
        ("insert into t values (1)", Shape::MOVES_SEQUENCE),
        ("select pg_advisory_unlock_all();", Shape::UNLOCKS_ALL),
        ("close all", Shape::CLOSES_ALL),
    ] {
        assert!(shape(text).has(expected), "{text} {:?}", shape(text));
    }
}

#[test]
fn growth_is_seen_also_where_it_hides() {
    for text in [
        "insert into t values (1)",
        "update t set a = 1",
        "with x as (insert into t values (1) returning *) select * from x",
        "with x as (update t set a = 2 returning *) select 1",
        "select * into u from t",
        "copy t from stdin",
        "create index on t (a)",
        "explain analyze insert into t values (1)",
        "merge into t using u on true when matched then delete",
        "select 1; insert into t values (1)",
        "refresh materialized view v",
    ] {
        assert!(shape(text).has(Shape::GROWS), "{text}");
        assert!(!shape(text).has(Shape::FREES), "{text}");
    }
    for text in [
        "select * from t for update",
        "delete from t",
        "truncate t",
        "vacuum full t",
        "drop table t",
        "copy t to stdout",
        "show all",
        "begin",
    ] {
        assert!(!shape(text).has(Shape::GROWS), "{text}");
        assert!(shape(text).has(Shape::FREES), "{text}");
    }
}

#[test]
fn settings_are_tracked_where_they_can_be_replayed() {
    let one = |text: &str| {
        let found = scan(text.as_bytes());
        assert_eq!(found.tracks.len(), 1, "{text}");
        found.tracks[0].1.clone()
    };
    let set = |name: &str, value: &str| Track::Set(name.into(), Value::Verbatim(value.into()));
    assert_eq!(one("SET search_path TO a, \"B\";"), set("search_path", "a, \"B\""));
    assert_eq!(one("set session statement_timeout='5s'"), set("statement_timeout", "'5s'"));
    assert_eq!(one("SET app.user = 'x;y'"), set("app.user", "'x;y'"));
    assert_eq!(one("SET TIME ZONE 'UTC'"), set("timezone", "'UTC'"));
    assert_eq!(one("SET NAMES 'utf8'"), set("client_encoding", "'utf8'"));
    assert_eq!(one("SET x TO DEFAULT"), Track::Reset("x".into()));
    assert_eq!(one("RESET x"), Track::Reset("x".into()));
    assert_eq!(one("RESET ALL"), Track::ResetAll);
    assert_eq!(one("SET LOCAL x = 1"), Track::Nothing);
    assert_eq!(one("SET TRANSACTION READ ONLY"), Track::Nothing);
    assert_eq!(
        one("SELECT pg_catalog.set_config('search_path', '', false);"),
        Track::Set("search_path".into(), Value::Raw("".into()))
    );
    assert_eq!(one("select set_config('request.jwt.claims', $1, true)"), Track::Nothing);
    for unknown in [
        "SET ROLE x",
        "SET SESSION AUTHORIZATION x",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "SET TIME ZONE INTERVAL '-08:00' HOUR TO MINUTE",
        "SET x = 1 -- comment",
        "SET x",
        "RESET ROLE",
    ] {
        assert_eq!(one(unknown), Track::Unknown, "{unknown}");
    }
    assert_eq!(scan(b"set a = 1; set b = 2").tracks.len(), 2);
}

#[test]
fn a_lone_deallocate_names_its_statement() {
    let name = |text: &str| scan(text.as_bytes()).deallocates.map(|name| String::from_utf8_lossy(&name).into_owned());
    assert_eq!(name("DEALLOCATE s1"), Some("s1".into()));
    assert_eq!(name("deallocate prepare \"S \"\"1\";"), Some("S \"1".into()));
    assert_eq!(name("deallocate S1"), Some("s1".into()));
    assert_eq!(name("deallocate all"), None);
    assert_eq!(name("deallocate s1; select 1"), None);
}

#[test]
fn unclosed_quotes_and_hostile_bytes_end_the_scan() {
    for text in [
        &b"select '"[..],
        b"select E'\\",
        b"/* /*",
        b"$a$ ",
        b"\"",
        b"\xff\xfe(",
        b"$",
        b"$$",
        b";;;",
        b"",
        b"-",
        b"/*/",
    ] {
        scan(text);
    }
}
