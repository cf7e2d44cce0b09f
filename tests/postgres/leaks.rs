//! Nothing that one client of a tenant leaves behind is ever seen by the next one on the same server connection.

use dynabase::tenant::Tier;

use crate::support::{
    proxy::{Org, Proxy, Setup},
    until,
    wire::{Wire, bind, close, describe, execute, parse, sync},
};

/// All that a session can hold, as the session itself can see it.
const FINGERPRINT: &str = "select json_build_object(
    'settings', (select json_agg(name || '=' || setting order by name) from pg_settings
                 where source in ('session', 'database', 'user') and name not like '%timeout'),
    'user', current_user || ' ' || session_user,
    'schemas', current_schemas(false)::text,
    'listens', (select json_agg(channel) from pg_listening_channels() channel),
    'cursors', (select json_agg(name) from pg_cursors where name <> ''),
    'statements', (select json_agg(name) from pg_prepared_statements where from_sql),
    'locks', (select json_agg(objid) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
    'relations', (select json_agg(relname) from pg_class where relnamespace = pg_my_temp_schema()),
    'secret', coalesce(current_setting('my.secret', true), ''))";

fn fingerprint(client: &mut Wire) -> String {
    // An error stands for itself: what it is compared with is none.
    let reply = client.query(FINGERPRINT);
    format!("{}{}", reply.code(), reply.value())
}

/// What the session knows of sequences. Asking holds a client to its connection.
fn sequences(client: &mut Wire) -> [String; 2] {
    [client.code("select lastval()"), client.code("select currval('leak_seq')")]
}

/// What a client does, and a question to which it has an answer of its own afterwards.
struct Trace {
    does: &'static str,
    asks: &'static str,
    gets: &'static str,
}

const fn trace(does: &'static str, asks: &'static str, gets: &'static str) -> Trace {
    Trace { does, asks, gets }
}

/// What does not hold a client to its connection: it stays, and the other one works on the same connection.
const FOLLOWS: &[Trace] = &[
    trace("set work_mem = '7MB'", "show work_mem", "7MB"),
    trace("set session work_mem to '7MB'; set statement_timeout = '7s'", "show statement_timeout", "7s"),
    trace("set search_path = leaky, public", "show search_path", "leaky, public"),
    trace("set timezone = 'Asia/Kathmandu'", "show timezone", "Asia/Kathmandu"),
    trace("set time zone 'Asia/Kathmandu'", "show timezone", "Asia/Kathmandu"),
    trace("set my.secret = 'mine'", "show my.secret", "mine"),
    trace("select set_config('work_mem', '7MB', false)", "show work_mem", "7MB"),
    trace("set application_name = 'leaky'", "show application_name", "leaky"),
    trace("set default_transaction_read_only = on", "show default_transaction_read_only", "on"),
    trace("set names 'latin1'", "show client_encoding", "LATIN1"),
    trace("begin; set local work_mem = '7MB'; commit", "show work_mem", "4MB"),
    trace("set work_mem = '7MB'; reset all", "show work_mem", "4MB"),
    trace("set work_mem = '7MB'; select 1/0", "show work_mem", "4MB"),
    trace("select nextval('leak_seq')", "select 1", "1"),
    trace("insert into leak_t default values", "select 1", "1"),
];

/// What holds a client to its connection, or can't be seen at all: the other one comes after it.
const HOLDS: &[Trace] = &[
    trace("begin; set work_mem = '7MB'; rollback", "show work_mem", "4MB"),
    trace(
        "set session characteristics as transaction isolation level serializable",
        "show default_transaction_isolation",
        "serializable",
    ),
    trace("begin; set work_mem = '7MB'; commit", "show work_mem", "7MB"),
    trace("create temp table leak_temp (x int); insert into leak_temp values (5)", "select x from leak_temp", "5"),
    trace("select 6 as x into temporary leak_temp", "select x from leak_temp", "6"),
    trace("create table pg_temp.leak_temp as select 7 as x", "select x from pg_temp.leak_temp", "7"),
    trace("create temp view leak_view as select 8 as x", "select x from leak_view", "8"),
    trace("create temporary sequence leak_temp_seq", "select nextval('leak_temp_seq')", "1"),
    trace("listen leaky", "select * from pg_listening_channels()", "leaky"),
    trace(
        "select pg_advisory_lock(77)",
        "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
        "1",
    ),
    trace(
        "select pg_try_advisory_lock_shared(77)",
        "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
        "1",
    ),
    trace("begin; declare leak_cursor cursor with hold for select 9; commit", "fetch 1 from leak_cursor", "9"),
    trace("prepare leak_statement as select 10", "execute leak_statement", "10"),
    trace("select nextval('leak_seq'); select setval('leak_seq', 11)", "select currval('leak_seq')", "11"),
    trace("do $$ begin perform set_config('work_mem', '7MB', false); end $$", "select 1", "1"),
    trace("do $$ begin perform set_config('my.secret', 'hidden', false); end $$", "select 1", "1"),
    trace("do $$ begin perform pg_advisory_lock(78); end $$", "select 1", "1"),
    trace("do $$ begin execute 'create temp table leak_hidden (x int)'; end $$", "select 1", "1"),
    trace("do $$ begin execute 'listen leaky_hidden'; end $$", "select 1", "1"),
    trace("do $$ begin execute 'prepare leak_hidden as select 1'; end $$", "select 1", "1"),
    trace("select leak_function()", "select 1", "1"),
    trace("call leak_procedure()", "select 1", "1"),
    trace("select leak_prepares()", "select 1", "1"),
    trace("insert into leak_t default values returning leak_function()", "select 1", "1"),
    trace("set role none; set session authorization default", "select 1", "1"),
    trace("do $$ begin perform nextval('leak_seq'); end $$", "select 1", "1"),
];

fn prepare(org: &Org<'_>) {
    let mut client = org.wire();
    client.ask(
        "create sequence leak_seq; create schema leaky; create table leak_t (id serial);
         create function leak_function() returns void language plpgsql as $$ begin
             perform set_config('my.secret', 'from a function', false), pg_advisory_lock(79), nextval('leak_seq');
             perform set_config('search_path', 'leaky', false);
             execute 'create temp table if not exists leak_function_temp (x int)'; execute 'listen leaky_function';
         end $$;
         create function leak_prepares() returns void language plpgsql as $$ begin
             execute 'prepare leak_by_function as select 1'; end $$;
         create procedure leak_procedure() language plpgsql as $$ begin perform leak_function(); commit; end $$",
    );
    client.close();
    org.settles(1);
}

#[test]
fn what_a_client_sets_follows_it_and_nobody_else() {
    let org = Proxy::shared().tenant("leaks-follow", Tier::Free);
    prepare(&org);
    let clean = fingerprint(&mut org.wire());
    for Trace { does, asks, gets } in FOLLOWS {
        for extended in [false, true] {
            if extended && does.contains(';') {
                continue;
            }
            let (mut leaver, mut next) = (org.wire(), org.wire());
            if extended {
                assert_eq!(leaver.extended(does).code(), "", "{does}");
            } else {
                leaver.query(does);
            }
            assert_eq!(fingerprint(&mut next), clean, "{does}");
            assert_eq!(leaver.ask(asks), *gets, "{does}: its own");
            assert_eq!(fingerprint(&mut next), clean, "{does}: again");
            leaver.close();
            let mut last = org.wire();
            assert_eq!(fingerprint(&mut last), clean, "{does}: after it left");
            assert_eq!(sequences(&mut last), ["55000", "55000"], "{does}");
        }
    }
}

#[test]
fn what_holds_a_client_is_gone_before_the_next_one_comes() {
    let org = Proxy::shared().tenant("leaks-hold", Tier::Free);
    prepare(&org);
    let clean = fingerprint(&mut org.wire());
    for Trace { does, asks, gets } in HOLDS {
        for extended in [false, true] {
            if extended && does.contains(';') && !does.starts_with("do ") {
                continue;
            }
            let mut leaver = org.wire();
            if extended {
                assert_eq!(leaver.extended(does).code(), "", "{does}");
            } else {
                leaver.ask(does);
            }
            assert_eq!(leaver.ask(asks), *gets, "{does}: its own");
            leaver.close();
            let mut next = org.wire();
            assert_eq!(fingerprint(&mut next), clean, "{does} (extended: {extended})");
            assert_eq!(sequences(&mut next), ["55000", "55000"], "{does} (extended: {extended})");
        }
    }
}

#[test]
fn what_is_not_seen_is_gone_also_while_its_maker_stays() {
    let org = Proxy::shared().tenant("leaks-hidden", Tier::Starter);
    prepare(&org);
    let clean = fingerprint(&mut org.wire());
    for Trace { does, .. } in HOLDS.iter().filter(|it| it.does.starts_with("do ") || it.does.contains("leak_f")) {
        let (mut stayer, mut next) = (org.wire(), org.wire());
        stayer.ask(does);
        assert_eq!(fingerprint(&mut next), clean, "{does}");
        assert_eq!(sequences(&mut next), ["55000", "55000"], "{does}");
        stayer.close();
    }
}

#[test]
fn a_client_is_held_only_by_what_needs_it_and_that_is_counted() {
    let proxy = Proxy::start(&Setup::default());
    let org = proxy.tenant("acme", Tier::Pro);
    let pins = |reason: &str| proxy.metric("dynabase_pins_total", reason);
    let held = |client: &mut Wire| {
        // Another client gets the connection of this one, if it may.
        let mine = client.ask("select pg_backend_pid()");
        mine != org.wire().ask("select pg_backend_pid()")
    };
    for (does, undoes) in [
        ("listen a", "unlisten *"),
        ("select pg_advisory_lock(1)", "select pg_advisory_unlock_all()"),
        ("create temp table held_temp (x int)", "discard temp"),
        ("begin; declare held_cursor cursor with hold for select 1; commit", "close all"),
        ("prepare held_statement as select 1", "deallocate all"),
        ("begin; set work_mem = '7MB'; commit", "discard all"),
    ] {
        let mut client = org.wire();
        let before = pins("");
        assert!(!held(&mut client), "{does}: before");
        client.ask(does);
        assert!(held(&mut client), "{does}");
        assert!((pins("") - before - 1.0).abs() < 0.1, "{does} is counted once");
        client.ask(undoes);
        assert!(!held(&mut client), "{does}, then {undoes}");
        client.close();
    }
    for harmless in [
        "begin; set local work_mem = '7MB'; commit",
        "select set_config('work_mem', '7MB', true)",
        "select pg_advisory_xact_lock(1)",
        "begin; declare c cursor for select 1; fetch c; commit",
        "set work_mem = '7MB'",
        "select nextval('pg_catalog.nosuch')",
        "select 'listen', 'prepare', 'create temp table' -- pg_advisory_lock",
    ] {
        let mut client = org.wire();
        client.query(harmless);
        assert!(!held(&mut client), "{harmless}");
    }
}

#[test]
fn reset_goes_back_to_what_the_client_asked_for_at_startup() {
    let org = Proxy::shared().tenant("leaks-reset", Tier::Free);
    let mut one = org.wire_with(&[
        ("options", "-c work_mem=5MB --search-path=leaky,\\ public -cTimeZone=UTC"),
        ("DateStyle", "german"),
        ("application_name", "one"),
        ("my.secret", "kept"),
    ]);
    let mut other = org.wire_with(&[("application_name", "other")]);
    let own = |client: &mut Wire| {
        ["work_mem", "search_path", "timezone", "datestyle", "application_name", "my.secret"]
            .map(|name| client.ask(&format!("show {name}")))
    };
    let asked = ["5MB", "leaky, public", "UTC", "German, DMY", "one", "kept"];
    // The names come as the server spells them.
    assert_eq!(one.parameter("DateStyle"), "German, DMY");
    assert_eq!(one.parameter("TimeZone"), "UTC");
    assert_eq!(one.parameter("application_name"), "one");
    for undo in ["reset all", "discard all", "reset work_mem; reset search_path; reset timezone; reset my.secret"] {
        assert_eq!(own(&mut one), asked);
        one.ask("set work_mem = '9MB'; set search_path = public; set timezone = 'Asia/Tokyo'; set my.secret = 'x'");
        assert_eq!(other.ask("show work_mem"), "4MB");
        assert_eq!(one.ask("show timezone"), "Asia/Tokyo");
        one.ask(undo);
        assert_eq!(other.ask("show timezone"), other.parameter("TimeZone"));
        assert_eq!(own(&mut one), asked, "{undo}");
    }
}

#[test]
fn startup_values_are_judged_at_login() {
    let org = Proxy::shared().tenant("leaks-startup", Tier::Free);
    let login = |parameters: &[(&str, &str)]| {
        Wire::login(org.proxy.address(), &org.token(), parameters)
            .map_err(|error| (error.field(b'C'), error.field(b'M')))
    };
    let code = |parameters: &[(&str, &str)]| login(parameters).expect_err("refused").0;
    assert_eq!(code(&[("work_mem", "much")]), "22023");
    assert_eq!(code(&[("nosuch", "1")]), "42704");
    assert_eq!(code(&[("options", "-c shared_buffers=1GB")]), "55P02");
    assert_eq!(code(&[("options", "-c temp_file_limit=-1")]), "42501");
    assert_eq!(code(&[("options", "nonsense")]), "42601");
    assert_eq!(code(&[("role", "postgres")]), "42501");
    assert_eq!(code(&[("session_authorization", "postgres")]), "42501");
    assert_eq!(code(&[("search_path", "x; drop table y")]), "22023");
    // A value is a value, whatever stands in it.
    let mut client = login(&[("application_name", "'; drop table x; --"), ("my.x", "it's \\ \"quoted\"")]).expect("in");
    assert_eq!(client.ask("show application_name"), "'; drop table x; --");
    assert_eq!(client.ask("show my.x"), "it's \\ \"quoted\"");
    let mut client = login(&[("client_encoding", "utf-8"), ("options", "")]).expect("in");
    assert_eq!(client.parameter("client_encoding"), "UTF8");
    assert_eq!(client.ask("show client_encoding"), "UTF8");
    org.proxy.server.value("select 1");
}

#[test]
fn notifications_reach_who_listens_and_nobody_else() {
    let org = Proxy::shared().tenant("leaks-listen", Tier::Pro);
    let (mut listener, mut sender, mut other) = (org.wire(), org.wire(), org.wire());
    listener.ask("listen news");
    sender.ask("notify news, 'first'");
    let heard = listener.up_to(b'A').0.pop().expect("a notification");
    assert!(heard.body.ends_with(b"news\0first\0"), "{heard:?}");
    // On the other connections nobody listens.
    assert_eq!(other.ask("select count(*) from pg_listening_channels()"), "0");
    listener.ask("unlisten *");
    sender.ask("notify news, 'second'");
    assert_eq!(listener.query("select 1").kinds(), "TDCZ");
    assert_eq!(other.query("select 1").kinds(), "TDCZ");
}

#[test]
fn statement_names_of_two_clients_never_meet() {
    let org = Proxy::shared().tenant("leaks-names", Tier::Free);
    let mut clients: Vec<Wire> = (0..3).map(|_| org.wire()).collect();
    for (at, client) in clients.iter_mut().enumerate() {
        let texts = [parse("s", &format!("select 'named {at}'")), parse("", &format!("select 'unnamed {at}'"))];
        assert_eq!(client.run(&[texts.concat(), sync()].concat(), 1).kinds(), "11Z");
    }
    let run = |name: &str| [bind("", name, &[]), execute("", 0), sync()].concat();
    for _ in 0..2 {
        for (at, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.run(&run("s"), 1).value(), format!("named {at}"));
            assert_eq!(client.run(&run(""), 1).value(), format!("unnamed {at}"));
        }
    }
    clients[0].run(&[close(b'S', "s"), sync()].concat(), 1);
    assert_eq!(clients[0].run(&run("s"), 1).code(), "26000");
    assert_eq!(clients[1].run(&run("s"), 1).value(), "named 1");
    clients[1].ask("discard all");
    assert_eq!(clients[1].run(&run("s"), 1).error(b'M'), "prepared statement \"s\" does not exist");
    assert_eq!(clients[2].run(&run("s"), 1).value(), "named 2");
    let described = clients[2].run(&[describe(b'S', "s"), sync()].concat(), 1);
    assert_eq!(described.kinds(), "tTZ");
    // A statement of another client is not there, by whatever name the server knows it.
    let inside = clients[2].query("select name from pg_prepared_statements");
    for name in inside.rows().into_iter().filter_map(|row| row[0].clone()) {
        assert_eq!(clients[0].run(&run(&name), 1).code(), "26000", "{name}");
        assert_eq!(clients[0].run(&[describe(b'S', &name), sync()].concat(), 1).code(), "26000", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drivers_with_statement_caches_share_one_connection() {
    let org = Proxy::shared().tenant("leaks-drivers", Tier::Free);
    let setup = org.connect().await;
    setup.batch_execute("create table shared_t (client int, n int)").await.expect("made");
    let mut tasks = Vec::new();
    for me in 0..8i32 {
        let mut client = org.connect().await;
        tasks.push(tokio::spawn(async move {
            let text = format!("select {me}, $1::int");
            let kept = client.prepare(&text).await.expect("prepared");
            for n in 0..25i32 {
                let row = client.query_one(&kept, &[&n]).await.expect("a row");
                assert_eq!((row.get::<_, i32>(0), row.get::<_, i32>(1)), (me, n));
                let once = client.query_one("select $1::text || 'x'", &[&format!("{me}")]).await.expect("a row");
                assert_eq!(once.get::<_, String>(0), format!("{me}x"));
                let work = client.transaction().await.expect("begun");
                work.execute("insert into shared_t values ($1, $2)", &[&me, &n]).await.expect("written");
                let seen =
                    work.query_one("select count(*) from shared_t where client = $1", &[&me]).await.expect("read");
                assert_eq!(seen.get::<_, i64>(0), i64::from((n + 1) / 2) + 1);
                if n % 2 == 0 {
                    work.commit().await.expect("committed");
                } else {
                    work.rollback().await.expect("rolled back");
                }
            }
        }));
    }
    for task in tasks {
        task.await.expect("no client saw another");
    }
    drop(setup);
    until("all are gone", || org.counted().0 == 0);
    assert!(org.backends() <= 1);
}

#[test]
fn a_preparation_takes_the_unnamed_statement_away_and_it_is_sent_again() {
    let org = Proxy::shared().tenant("leaks-unnamed", Tier::Free);
    let (mut one, mut other) = (org.wire(), org.wire());
    one.ask("set work_mem = '5MB'");
    other.ask("set work_mem = '6MB'");
    let named = [parse("s", "select 'another'"), sync()].concat();
    assert_eq!(other.run(&named, 1).kinds(), "1Z");
    assert_eq!(one.run(&[parse("", "select 'mine'"), sync()].concat(), 1).kinds(), "1Z");
    // On the one connection there is: settings change hands by a Query, which destroys the unnamed statement. A named
    // one, unlike a Query of the client's, says nothing of that.
    let run = |name: &str| [bind("", name, &[]), execute("", 0), sync()].concat();
    assert_eq!(other.run(&run("s"), 1).value(), "another");
    assert_eq!(one.run(&run(""), 1).value(), "mine");
}

#[test]
fn letters_mean_the_same_after_a_client_with_another_encoding() {
    let org = Proxy::shared().tenant("leaks-encoding", Tier::Free);
    let mut latin = org.wire();
    latin.ask("set names 'latin1'");
    // From its startup packet, which the server has to be told while it still takes letters as Latin-1.
    let mut other = org.wire_with(&[("my.word", "é")]);
    assert_eq!(other.ask("show my.word"), "é");
    other.ask("set my.other = 'ü'");
    assert_eq!(latin.ask("show client_encoding"), "LATIN1");
    assert_eq!((other.ask("show my.other"), other.ask("show my.word")), ("ü".into(), "é".into()));
    // And the other way round: what was SET in Latin-1 stays that. The two bytes of "é" are two letters there.
    latin.ask("set my.word = 'é'");
    assert_eq!(other.ask("show client_encoding"), "UTF8");
    assert_eq!(latin.ask("select length(current_setting('my.word'))"), "2");
}
