//! A client can't tell dynabase from PostgreSQL: the same bytes get the same messages, word for word, also when
//! another client of the tenant uses the same server connection between any two of its steps.

use dynabase::tenant::Tier;

use crate::support::{
    proxy::{Org, Proxy},
    wire::{
        Reply, Wire, bind, close, copy_data, copy_done, copy_fail, describe, execute, flush, message_of, parse, query,
        sync,
    },
};

/// What a client sends in one write, and the message with which the answer ends, how often.
struct Step(Vec<u8>, u8, usize);

fn ask(text: &str) -> Step {
    Step(query(text), b'Z', 1)
}

/// Messages in one write, with so many answers to wait for.
fn send(messages: &[Vec<u8>], ready: usize) -> Step {
    Step(messages.concat(), b'Z', ready)
}

fn up_to(messages: &[Vec<u8>], kind: u8) -> Step {
    Step(messages.concat(), kind, 1)
}

/// Binds, describes and executes.
fn run(statement: &str) -> Vec<u8> {
    [bind("", statement, &[]), describe(b'P', ""), execute("", 0)].concat()
}

type Said = Vec<(char, String)>;

fn play(client: &mut Wire, steps: &[Step], mut between: impl FnMut(usize)) -> Vec<Said> {
    let play_one = |(at, Step(bytes, kind, times)): (usize, &Step)| {
        between(at);
        client.send(bytes);
        let mut all = Vec::new();
        for _ in 0..*times {
            all.extend(client.up_to(*kind).0);
        }
        for message in &mut all {
            if message.kind == b'A' {
                // The sender's process id.
                message.body.drain(..4);
            }
        }
        Reply(all).comparable()
    };
    steps.iter().enumerate().map(play_one).collect()
}

/// Another client of the tenant, which leaves everything behind that it may.
fn interloper(other: &mut Wire, at: usize) {
    let text = format!("select 'foreign {at}'");
    let named = ["s1", "s2", "mine"].map(|name| parse(name, &text)).concat();
    other.run(&[parse("", &text), named, sync()].concat(), 1);
    other.query("set timezone = 'Asia/Kathmandu'; set extra_float_digits = -3");
    other.query("set datestyle = 'German'");
    let closes = ["s1", "s2", "mine"].map(|name| close(b'S', name)).concat();
    other.run(&[parse("", &text), closes, sync()].concat(), 1);
}

fn same(org: &Org<'_>, name: &str, steps: &[Step]) {
    let direct = play(&mut org.direct(), steps, |_| {});
    let through = play(&mut org.wire(), steps, |_| {});
    for (at, (one, other)) in direct.iter().zip(&through).enumerate() {
        assert_eq!(one, other, "{name}, step {at} (left: PostgreSQL)");
    }
    let mut other = org.wire();
    let disturbed = play(&mut org.wire(), steps, |at| interloper(&mut other, at));
    for (at, (one, other)) in direct.iter().zip(&disturbed).enumerate() {
        assert_eq!(one, other, "{name}, step {at}, with another client between (left: PostgreSQL)");
    }
}

/// Two connections: the second is for the other client while this one holds its own.
fn org(name: &str) -> Org<'static> {
    Proxy::shared().tenant(name, Tier::Starter)
}

#[test]
fn simple_queries() {
    let org = org("parity-simple");
    same(
        &org,
        "texts",
        &[
            ask("select 1 as one, null as nothing"),
            ask("select 1; select 2; select 3"),
            ask(""),
            ask(" ; ;"),
            ask("-- nothing"),
            ask("select 1/0"),
            ask("select 1; select 1/0; select 2"),
            ask("selec"),
            ask("select 'unterminated"),
            ask("create table parity_t (x int); insert into parity_t values (1), (2); drop table parity_t"),
            ask("do $$ begin raise notice 'noted'; raise warning 'warned'; end $$"),
            ask("select nosuch from nosuch"),
            ask("vacuum; select 1"),
            ask("explain (costs off) select 1"),
            ask("show server_version"),
            ask("values (repeat('x', 100000))"),
        ],
    );
    same(
        &org,
        "transactions",
        &[
            ask("begin"),
            ask("select 1/0"),
            ask("select 1"),
            ask("commit"),
            ask("begin; select 1; commit; select 2"),
            ask("begin; select 1; rollback and chain"),
            ask("savepoint a"),
            ask("select 1/0"),
            ask("rollback to a"),
            ask("commit and chain"),
            ask("select 2"),
            ask("begin"),
            ask("commit"),
            ask("commit"),
            ask("start transaction isolation level serializable read only"),
            ask("show transaction_isolation"),
            ask("create table no (x int)"),
            ask("end"),
        ],
    );
}

#[test]
fn prepared_statements() {
    let org = org("parity-prepared");
    same(
        &org,
        "names",
        &[
            send(&[parse("s1", "select 1 as a"), sync()], 1),
            send(&[run("s1"), sync()], 1),
            send(&[describe(b'S', "s1"), sync()], 1),
            // Taken, and still what it was.
            send(&[parse("s1", "select 'second'"), sync()], 1),
            send(&[run("s1"), sync()], 1),
            // Unknown.
            send(&[run("nosuch"), sync()], 1),
            send(&[describe(b'S', "nosuch"), sync()], 1),
            send(&[describe(b'P', "nosuch"), sync()], 1),
            send(&[execute("nosuch", 0), sync()], 1),
            send(&[run("dynabase_1"), sync()], 1),
            // A Parse that fails registers nothing.
            send(&[parse("s2", "selec 2"), sync()], 1),
            send(&[run("s2"), sync()], 1),
            send(&[parse("s2", "select 2"), run("s2"), sync()], 1),
            // Closing.
            send(&[close(b'S', "nosuch"), close(b'P', "nosuch"), sync()], 1),
            send(&[close(b'S', "s1"), sync()], 1),
            send(&[run("s1"), sync()], 1),
            send(&[parse("s1", "select 'again'"), run("s1"), close(b'S', "s1"), sync()], 1),
            send(&[close(b'S', "s2"), run("s2"), sync()], 1),
        ],
    );
    same(
        &org,
        "deallocate",
        &[
            send(&[parse("s1", "select 1"), parse("s2", "select 2"), parse("mine", "select 3"), sync()], 1),
            ask("deallocate s1"),
            send(&[run("s1"), sync()], 1),
            send(&[run("s2"), sync()], 1),
            ask("deallocate s1"),
            ask("DEALLOCATE PREPARE \"s2\""),
            send(&[run("s2"), sync()], 1),
            send(&[run("mine"), sync()], 1),
            ask("deallocate all"),
            send(&[run("mine"), sync()], 1),
            send(&[parse("mine", "select 4"), run("mine"), sync()], 1),
            ask("discard all"),
            send(&[run("mine"), sync()], 1),
            ask("prepare by_sql as select $1::int + 1"),
            ask("execute by_sql (41)"),
            send(&[bind("", "by_sql", &["1"]), execute("", 0), sync()], 1),
            ask("deallocate by_sql"),
            ask("execute by_sql (41)"),
        ],
    );
    same(
        &org,
        "transactions",
        &[
            ask("begin"),
            send(&[parse("s1", "select 1"), sync()], 1),
            ask("select 1/0"),
            send(&[parse("s2", "select 2"), sync()], 1),
            send(&[parse("s2", "rollback"), sync()], 1),
            ask("rollback"),
            // It outlives the transaction that it was made in.
            send(&[run("s1"), sync()], 1),
            send(&[run("s2"), sync()], 1),
        ],
    );
    same(
        &org,
        "the unnamed statement",
        &[
            send(&[run(""), sync()], 1),
            send(&[parse("", "select 'mine'"), sync()], 1),
            send(&[run(""), sync()], 1),
            send(&[describe(b'S', ""), sync()], 1),
            ask("select 1"),
            send(&[run(""), sync()], 1),
            send(&[parse("", "select 'mine'"), sync()], 1),
            send(&[parse("", "selec"), sync()], 1),
            send(&[run(""), sync()], 1),
            send(&[parse("", "select 'mine'"), close(b'S', ""), sync()], 1),
            send(&[run(""), sync()], 1),
            send(&[parse("", "select $1::text"), describe(b'S', ""), sync()], 1),
            send(&[bind("", "", &["x"]), execute("", 0), sync()], 1),
            send(&[bind("", "", &[]), execute("", 0), sync()], 1),
            send(&[parse("", ""), run(""), sync()], 1),
        ],
    );
}

#[test]
fn pipelines() {
    let org = org("parity-pipelines");
    let one = |text| [parse("", text), run("")].concat();
    same(
        &org,
        "pipelines",
        &[
            send(&[one("select 1"), sync(), one("select 2"), sync(), one("select 3"), sync()], 3),
            send(&[one("select 1"), sync(), one("select 1/0"), one("select 2"), sync(), one("select 3"), sync()], 3),
            send(&[one("selec"), one("select 2"), sync(), sync(), sync()], 3),
            send(&[parse("s1", "select 1"), one("select 1/0"), parse("s2", "select 2"), sync()], 1),
            send(&[run("s1"), sync(), run("s2"), sync()], 2),
            send(&[close(b'S', "s1"), one("select 1/0"), close(b'S', "s2"), sync()], 1),
            send(&[run("s1"), sync()], 1),
            // Skipped: what is closed is there still, what is prepared is not, whoever answers.
            send(&[parse("s2", "select 2"), sync()], 1),
            send(&[one("select 1/0"), close(b'S', "s2"), parse("s2", "select 'new'"), close(b'S', "s1"), sync()], 1),
            send(&[run("s2"), sync(), run("s1"), sync()], 2),
            send(&[close(b'S', "s2"), sync()], 1),
            up_to(&[one("select 1/0"), flush()], b'E'),
            send(&[close(b'S', "s1"), parse("s2", "select 2"), sync()], 1),
            send(&[run("s2"), sync(), run("s1"), sync()], 2),
            // A Query while the server skips to Sync is skipped, and is no end of the skipping.
            send(&[one("select 1/0"), query("select 'skipped'"), one("select 2"), sync()], 1),
            send(&[one("select 1/0"), query("begin"), close(b'S', "x"), flush(), sync(), query("select 3")], 2),
            send(&[query("select 1"), query("select 1/0"), query("select 2"), one("select 3"), sync()], 4),
            send(&[one("begin"), one("select 1/0"), one("commit"), sync()], 1),
            ask("rollback"),
            send(&[one("begin"), one("create table no (x int)"), one("rollback"), sync()], 1),
            send(&[one("select 1"), query("select 2"), sync()], 2),
            send(&[sync(), sync()], 2),
        ],
    );
    same(
        &org,
        "Flush without Sync",
        &[
            up_to(&[one("select 1"), flush()], b'C'),
            up_to(&[parse("s1", "select 2"), flush()], b'1'),
            up_to(&[describe(b'S', "s1"), flush()], b'T'),
            up_to(&[run("s1"), flush()], b'C'),
            up_to(&[one("select 1/0"), flush()], b'E'),
            send(&[one("select 'skipped'"), sync()], 1),
            up_to(&[close(b'S', "s1"), flush()], b'3'),
            send(&[sync()], 1),
        ],
    );
}

#[test]
fn portals_and_rows() {
    let org = org("parity-portals");
    same(
        &org,
        "portals",
        &[
            ask("begin"),
            send(&[parse("s1", "select generate_series(1, 5)"), bind("p", "s1", &[]), execute("p", 2), sync()], 1),
            send(&[bind("q", "s1", &[]), execute("q", 1), execute("p", 2), sync()], 1),
            send(&[execute("p", 2), execute("p", 2), sync()], 1),
            send(&[bind("q", "s1", &[]), sync()], 1),
            ask("rollback"),
            send(&[execute("p", 1), sync()], 1),
            // Outside a transaction it ends with the Sync.
            send(&[bind("p", "s1", &[]), execute("p", 2), sync()], 1),
            send(&[execute("p", 2), sync()], 1),
            send(&[bind("p", "s1", &[]), close(b'P', "p"), execute("p", 2), sync()], 1),
            ask("begin; declare c cursor for select generate_series(1, 5)"),
            ask("fetch 2 from c"),
            send(&[describe(b'P', "c"), execute("c", 2), sync()], 1),
            ask("commit"),
            ask("fetch 2 from c"),
        ],
    );
    let add = [&177u32.to_be_bytes()[..], &[0, 0, 0, 2], &[0, 0, 0, 2], b"40", &[0, 0, 0, 1], b"2", &[0, 0]].concat();
    let bad = [&9999u32.to_be_bytes()[..], &[0, 0, 0, 0, 0, 0]].concat();
    same(&org, "function calls", &[Step(message_of(b'F', &add), b'Z', 1), Step(message_of(b'F', &bad), b'Z', 1)]);
}

#[test]
fn copy() {
    let org = org("parity-copy");
    let copy_in = |data: &[Vec<u8>]| [query("copy parity_c from stdin"), data.concat()].concat();
    same(
        &org,
        "COPY",
        &[
            ask("create table parity_c (x int primary key, t text)"),
            up_to(&[query("copy parity_c from stdin")], b'G'),
            send(&[copy_data(b"1\ta\n"), copy_data(b"2\tb"), copy_data(b"\n"), copy_done()], 1),
            // Data that comes before the server asks for it.
            send(&[copy_in(&[copy_data(b"3\tc\n"), copy_done()])], 1),
            send(&[copy_in(&[copy_data(b"4\td\n"), copy_fail("changed my mind")])], 1),
            // An error in the middle; what comes after it is dropped.
            up_to(&[copy_in(&[copy_data(b"nonsense\n")])], b'Z'),
            send(&[copy_data(b"5\te\n"), copy_data(b"6\tf\n"), copy_done(), query("select count(*) from parity_c")], 1),
            send(&[copy_in(&[copy_data(b"1\tdup\n"), copy_done(), query("select 'after'")])], 2),
            send(&[copy_in(&[sync(), flush(), copy_data(b"7\tg\n"), copy_done()])], 1),
            ask("copy parity_c to stdout"),
            ask("copy parity_c from stdin with (format nonsense)"),
            ask("begin; copy parity_c (x) to stdout; select 1/0; copy parity_c to stdout"),
            ask("rollback"),
            send(&[copy_data(b"late\n"), copy_done(), query("select 1")], 1),
            send(
                &[
                    parse("", "copy parity_c from stdin"),
                    bind("", "", &[]),
                    execute("", 0),
                    copy_data(b"8\th\n"),
                    copy_done(),
                    sync(),
                ],
                1,
            ),
            up_to(&[parse("", "copy parity_c from stdin"), bind("", "", &[]), execute("", 0), flush()], b'G'),
            send(&[copy_data(b"broken\n"), copy_data(b"9\ti\n"), copy_fail("enough"), sync()], 1),
            ask("select 2"),
            send(&[parse("", "copy parity_c to stdout"), run(""), sync()], 1),
            ask("drop table parity_c"),
        ],
    );
}

#[test]
fn settings_as_their_owner_sees_them() {
    let org = org("parity-settings");
    same(
        &org,
        "SET",
        &[
            ask("show timezone"),
            ask("set timezone = 'utc'"),
            ask("show timezone"),
            ask("set client_encoding = 'utf-8'"),
            ask("set datestyle to sql, dmy"),
            ask("select '2026-11-23'::date"),
            ask("set timezone = 'nosuch/zone'"),
            ask("show timezone"),
            ask("set nosuch = 1"),
            ask("set my.own = 'mine'"),
            ask("show my.own"),
            ask("begin; set local timezone = 'Europe/Paris'"),
            ask("show timezone"),
            ask("commit"),
            ask("show timezone"),
            ask("begin"),
            ask("set timezone = 'Europe/Paris'"),
            ask("rollback"),
            ask("show timezone"),
            ask("set timezone = 'Europe/Paris'; select 1/0"),
            ask("show timezone"),
            ask("set search_path = 'nosuch', 'public'"),
            ask("show search_path"),
            ask("reset search_path"),
            ask("show search_path"),
            ask("select set_config('timezone', 'Asia/Tokyo', false)"),
            ask("show timezone"),
            ask("reset timezone"),
            ask("show timezone"),
            ask("set application_name = 'me'"),
            ask("show application_name"),
            ask("set session characteristics as transaction read only"),
            ask("show default_transaction_read_only"),
            ask("create table no (x int)"),
            ask("reset all"),
            ask("show datestyle"),
            ask("show application_name"),
            ask("show my.own"),
            send(&[parse("", "set timezone = 'America/Lima'"), run(""), sync()], 1),
            ask("show timezone"),
            ask("set role none"),
            ask("set time zone default"),
            ask("show timezone"),
            ask("discard all"),
            ask("show extra_float_digits"),
        ],
    );
}

#[test]
fn session_state_as_its_owner_sees_it() {
    let org = org("parity-session");
    same(
        &org,
        "state",
        &[
            ask("listen here"),
            ask("notify here, 'hello'"),
            ask("unlisten *"),
            ask("notify here, 'not heard'"),
            ask("create temp table tt (x int)"),
            ask("insert into tt values (1)"),
            ask("select * from tt"),
            ask("discard temp"),
            ask("select * from tt"),
            ask("select pg_advisory_lock(7)"),
            ask("select pg_advisory_unlock(7), pg_advisory_unlock(7)"),
            ask("begin; declare held cursor with hold for select generate_series(1, 3); commit"),
            ask("fetch 1 from held"),
            ask("close held"),
            ask("fetch 1 from held"),
            ask("create sequence parity_seq"),
            ask("select currval('parity_seq')"),
            ask("select nextval('parity_seq')"),
            ask("select currval('parity_seq'), lastval()"),
            ask("discard sequences"),
            ask("select lastval()"),
            ask("drop sequence parity_seq"),
            ask("prepare p as select 5"),
            ask("execute p"),
            ask("discard plans"),
            ask("execute p"),
            ask("discard all"),
            ask("execute p"),
        ],
    );
}

#[test]
fn a_message_that_is_none_ends_the_connection_as_the_server_would() {
    let org = org("parity-garbage");
    for (name, bytes) in
        [("a kind that is none", message_of(b'!', b"x")), ("a Query without its end", message_of(b'Q', b"select 1"))]
    {
        let said = |mut client: Wire| {
            client.send(&bytes);
            client.up_to(b'E').code()
        };
        assert_eq!(said(org.wire()), said(org.direct()), "{name}");
    }
    // PostgreSQL closes without a word.
    let mut client = org.wire();
    client.send(&message_of(b'S', &[0; 20_000]));
    assert_eq!(client.rest().code(), "08P01");
    assert_eq!(org.wire().ask("select 1"), "1");
}

#[test]
fn statements_and_a_schema_that_changes_under_them() {
    let org = org("parity-schema");
    let ask = |text: &str| query(text);
    let prepared = |name: &str| [parse(name, "select * from changing"), describe(b'S', name), sync()].concat();
    let bound = |name: &str| [run(name), sync()].concat();
    let steps = [
        (1, ask("create table changing (a int); insert into changing values (1)")),
        (0, prepared("s1")),
        (0, bound("s1")),
        (1, prepared("s1")),
        (1, ask("alter table changing add b text")),
        // What was prepared before keeps its shape and fails; what is prepared now has the new one.
        (0, bound("s1")),
        (0, prepared("s2")),
        (0, bound("s2")),
        (1, prepared("s2")),
        (1, ask("alter table changing alter a type text")),
        (1, prepared("s3")),
        (0, prepared("s3")),
        (0, bound("s3")),
        (0, bound("s2")),
        (0, [close(b'S', "s2"), prepared("s2"), bound("s2")].concat()),
        (1, ask("drop table changing; create table changing (c date)")),
        (0, prepared("s4")),
        (0, bound("s4")),
        (1, bound("s3")),
        (1, ask("drop table changing")),
        (0, bound("s4")),
        (0, prepared("s5")),
    ];
    let play = |clients: &mut [Wire; 2]| {
        let one = |(who, bytes): &(usize, Vec<u8>)| {
            let syncs = if bytes.ends_with(&[prepared("s2"), bound("s2")].concat()) { 2 } else { 1 };
            clients[*who].run(bytes, syncs).comparable()
        };
        steps.iter().map(one).collect::<Vec<_>>()
    };
    let direct = play(&mut [org.direct(), org.direct()]);
    let through = play(&mut [org.wire(), org.wire()]);
    for (at, (one, other)) in direct.iter().zip(&through).enumerate() {
        assert_eq!(one, other, "step {at} (left: PostgreSQL)");
    }
}
