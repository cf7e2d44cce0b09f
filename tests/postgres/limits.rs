//! A tier's limits on sessions that are open, and what a tenant can try to escape them.

use std::time::{Duration, Instant};

use dynabase::tenant::{Status, Tier};

use crate::support::{
    postgres::{shared, sql},
    proxy::{Limits, Org, Proxy, Setup},
    until,
    wire::{Wire, bind, copy_data, copy_done, execute, flush, parse, query, sync},
};

fn refused(org: &Org<'_>, secret: &str) -> String {
    Wire::login(org.proxy.address(), secret, &[]).map_or_else(|error| error.field(b'C'), |_| "in".into())
}

#[test]
fn a_tier_that_changes_binds_open_sessions() {
    let proxy = Proxy::start(&Setup::free(Limits { queue_timeout: "200ms", ..Limits::default() }));
    let org = proxy.tenant("acme", Tier::Free);
    let (mut one, mut two) = (org.wire(), org.wire());
    one.ask("begin");
    let full = two.query("select 1");
    assert_eq!((full.code().as_str(), full.error(b'S').as_str(), full.status()), ("53300", "ERROR", 'I'));
    let detail = full.error(b'D');
    for fact in ["limit=connections", "tier=FREE", "max=1", "in_use=1", "waited_ms=200"] {
        assert!(detail.contains(fact), "{detail}");
    }
    // In the extended protocol all up to the Sync is refused, and the session goes on.
    let full = two.extended("select 1");
    assert_eq!((full.kinds().as_str(), full.code().as_str()), ("EZ", "53300"));
    org.edit(|tenant| tenant.tier = Tier::Starter);
    until("the larger tier is in force", || two.code("select 1").is_empty());
    org.edit(|tenant| tenant.tier = Tier::Free);
    one.ask("commit");
    until("the smaller tier is in force", || org.backends() <= 1);
    one.ask("begin");
    until("the smaller tier binds", || two.code("select 1") == "53300");
}

#[test]
fn client_sockets_have_a_limit_of_their_own() {
    let proxy = Proxy::start(&Setup::free(Limits { client_sockets: 3, ..Limits::default() }));
    let org = proxy.tenant("acme", Tier::Free);
    let mut clients: Vec<Wire> = (0..3).map(|_| org.wire()).collect();
    let error = Wire::login(proxy.address(), &org.token(), &[]).expect_err("one too many");
    assert_eq!((error.field(b'S').as_str(), error.field(b'C').as_str()), ("FATAL", "53300"));
    assert!(error.field(b'D').contains("limit=client_sockets tier=FREE max=3 in_use=3"), "{error:?}");
    assert_eq!(clients[2].ask("select 1"), "1");
    clients.pop().expect("three").close();
    until("its place is free", || refused(&org, &org.token()) == "in");
}

#[test]
fn a_suspended_tenant_is_out_at_once_and_back_when_resumed() {
    let proxy = Proxy::start(&Setup::default());
    let (org, other) = (proxy.tenant("acme", Tier::Starter), proxy.tenant("globex", Tier::Free));
    let (mut idle, mut busy, mut bystander) = (org.wire(), org.wire(), other.wire());
    idle.ask("select 1");
    busy.send(&query("select pg_sleep(60)"));
    until("it sleeps", || {
        shared().value(&format!(
            "select count(*) from pg_stat_activity where usename = '{}' and wait_event = 'PgSleep'",
            org.role()
        )) == "1"
    });
    org.edit(|tenant| tenant.status = Status::Suspended);
    assert_eq!(idle.rest().codes(), ["57P01"]);
    assert_eq!(busy.rest().codes().last().map(String::as_str), Some("57P01"));
    assert_eq!(refused(&org, &org.token()), "55000");
    until("its backends are gone", || org.backends() == 0);
    assert_eq!(bystander.ask("select 1"), "1");
    org.edit(|tenant| tenant.status = Status::Active);
    until("it is served again", || refused(&org, &org.token()) == "in");
}

#[test]
fn a_revoked_key_ends_its_sessions_and_no_others() {
    let proxy = Proxy::start(&Setup::default());
    let org = proxy.tenant("acme", Tier::Starter);
    let ((key, hash), (kept, _)) = (org.key(), org.key());
    let login = |secret: &str| Wire::login(proxy.address(), secret, &[]).expect("a good key");
    let (mut doomed, mut other, mut by_token) = (login(&key), login(&kept), org.wire());
    doomed.ask("begin");
    org.revoke(&hash);
    assert_eq!(doomed.rest().codes(), ["57P01"]);
    until("the key opens nothing", || refused(&org, &key) == "28P01");
    assert_eq!((other.ask("select 1"), by_token.ask("select 1")), ("1".into(), "1".into()));
}

#[test]
fn an_expired_token_ends_a_strict_session_between_transactions() {
    let mut setup = Setup::default();
    setup.tiers[1].expiry = "connect-only";
    let proxy = Proxy::start(&setup);
    let (strict, lax) = (proxy.tenant("acme", Tier::Pro), proxy.tenant("globex", Tier::Starter));
    let login = |token: &str| Wire::login(proxy.address(), token, &[]).expect("not expired yet");
    let ttl = Duration::from_secs(2);
    let (token, lax_token) = (strict.token_for(ttl), lax.token_for(ttl));
    let (mut idle, mut working, mut stays) = (login(&token), login(&token), login(&lax_token));
    working.ask("begin; create table survives (x int)");
    assert_eq!(idle.rest().codes(), ["57P01"]);
    // Expired meanwhile; what it has begun it may finish.
    working.ask("insert into survives values (1)");
    working.send(&query("commit"));
    let said = working.rest();
    assert_eq!((said.tags(), said.codes()), (vec!["COMMIT".to_owned()], vec!["57P01".to_owned()]));
    assert_eq!(strict.wire().ask("select count(*) from survives"), "1");
    assert_eq!(stays.ask("select 1"), "1");
    assert_eq!((refused(&strict, &token), refused(&lax, &lax_token)), ("28P01".into(), "28P01".into()));
}

#[test]
fn a_statement_timeout_has_no_way_around_it() {
    let proxy = Proxy::start(&Setup::free(Limits { statement_timeout: "400ms", ..Limits::default() }));
    let org = proxy.tenant("acme", Tier::Free);
    let role = org.role();
    let timed_out = |client: &mut Wire, what: &str, text: &str| {
        let began = Instant::now();
        let reply = client.query(text);
        assert_eq!(reply.codes().last().map(String::as_str), Some("57014"), "{what}: {reply:?}");
        assert_eq!(reply.error(b'M'), "canceling statement due to statement timeout", "{what}");
        assert!(reply.error(b'D').contains("limit=statement_timeout tier=FREE max_ms=400"), "{what}: {reply:?}");
        assert!(began.elapsed() >= Duration::from_millis(400), "{what}: too early");
        assert_eq!(client.ask("rollback; select 1"), "1", "{what}: the session goes on");
    };
    let mut client = org.wire();
    timed_out(&mut client, "plainly", "select pg_sleep(30)");
    client.close();
    for escape in [
        "set statement_timeout = 0",
        "set session statement_timeout to '1h'",
        "select set_config('statement_timeout', '0', false)",
        "begin; set local statement_timeout = 0",
        "do $$ begin perform set_config('statement_timeout', '0', false); end $$",
        &format!("alter role {role} set statement_timeout = 0"),
        "create or replace function patient() returns void language sql set statement_timeout = 0 as 'select pg_sleep(30)'",
    ] {
        let mut client = org.wire();
        client.ask(escape);
        timed_out(&mut client, escape, "select pg_sleep(30)");
        client.close();
    }
    timed_out(&mut org.wire(), "by a function", "select patient()");
    let mut by_options = org.wire_with(&[("options", "-c statement_timeout=0")]);
    timed_out(&mut by_options, "options", "select pg_sleep(30)");
    by_options.close();
    let mut by_parameter = org.wire_with(&[("statement_timeout", "0")]);
    timed_out(&mut by_parameter, "a startup parameter", "select pg_sleep(30)");
    by_parameter.close();
    // A shorter one is the client's own business.
    let mut client = org.wire();
    client.ask("set statement_timeout = '100ms'");
    let own = client.query("select pg_sleep(30)");
    assert_eq!((own.code().as_str(), own.error(b'D').as_str()), ("57014", ""));
    client.close();
    // The statements of one Query share the time, for PostgreSQL keeps their answers back until the last; a slow COPY
    // client is on the clock too.
    let mut client = org.wire();
    timed_out(&mut client, "two of which each is short enough", "select pg_sleep(0.3); select pg_sleep(0.3)");
    assert_eq!(client.extended("select pg_sleep(30)").code(), "57014");
    client.ask("create table slow (x int)");
    client.send(&query("copy slow from stdin"));
    client.up_to(b'G');
    assert_eq!(client.up_to(b'Z').code(), "57014");
    client.close();
    org.settles(1);
}

#[test]
fn after_a_statement_that_took_too_long_the_next_one_has_its_own_time() {
    let proxy = Proxy::start(&Setup::free(Limits { statement_timeout: "600ms", ..Limits::default() }));
    let org = proxy.tenant("acme", Tier::Free);
    let mut client = org.wire();
    let sleep = |seconds: &str| {
        let text = format!("select pg_sleep({seconds})");
        [parse("", &text), bind("", "", &[]), execute("", 0), sync()].concat()
    };
    for _ in 0..5 {
        // The cancel of the first may still be on its way home when the next one begins.
        assert_eq!(client.run(&sleep("30"), 1).code(), "57014");
        assert_eq!(client.run(&sleep("0.3"), 1).code(), "");
        assert_eq!(client.run(&sleep("30"), 1).code(), "57014");
        assert_eq!(client.query("select pg_sleep(30)").code(), "57014");
        assert_eq!(client.ask("select 1"), "1");
    }
}

#[test]
fn a_statement_that_swallows_cancels_loses_its_backend() {
    let proxy = Proxy::start(&Setup::free(Limits { statement_timeout: "300ms", ..Limits::default() }));
    let org = proxy.tenant("acme", Tier::Free);
    let mut client = org.wire();
    client.send(&query(
        "do $$ begin loop begin perform pg_sleep(60); exception when query_canceled then null; end; end loop; end $$",
    ));
    let said = client.rest();
    assert!(["57014", "57P01"].contains(&said.codes().last().map_or("", String::as_str)), "{said:?}");
    until("its backend is gone", || org.backends() == 0);
    assert_eq!(org.wire().ask("select 1"), "1");
}

#[test]
fn a_pause_in_a_transaction_has_an_end() {
    let limits = Limits { idle_in_transaction: "300ms", ..Limits::default() };
    let proxy = Proxy::start(&Setup::free(limits));
    let org = proxy.tenant("acme", Tier::Free);
    let mut client = org.wire();
    client.ask("set idle_in_transaction_session_timeout = 0; create table t (x int)");
    client.ask("begin; insert into t values (1)");
    let said = client.rest();
    assert_eq!((said.code().as_str(), said.error(b'S').as_str()), ("25P03", "FATAL"));
    let mut client = org.wire();
    assert_eq!(client.ask("select count(*) from t"), "0");
    client.close();
    // A pipeline without Sync holds a connection just the same.
    let mut client = org.wire();
    client.send(&[parse("", "select 1"), bind("", "", &[]), execute("", 0), flush()].concat());
    assert_eq!(client.rest().code(), "25P03");
    // Half a message holds none: more such clients than the tenant has connections keep nobody waiting.
    let halves: Vec<_> = [query("select 'half'")[..8].to_vec(), bind("", "", &[])[..6].to_vec()]
        .iter()
        .cycle()
        .take(12)
        .map(|half| {
            let mut client = org.wire();
            client.send(half);
            client
        })
        .collect();
    assert_eq!(org.wire().ask("select 1"), "1");
    drop(halves);
}

#[test]
fn a_tenant_over_its_storage_can_only_shrink() {
    let setup = Setup {
        upstream: "storage_interval = \"200ms\"".into(),
        ..Setup::free(Limits { storage: "16MB", connections: 2, ..Limits::default() })
    };
    let proxy = Proxy::start(&setup);
    let org = proxy.tenant("acme", Tier::Free);
    let mut client = org.wire();
    client.ask("create table t (x int, s text); create table spare (x int); insert into spare values (1), (2)");
    client.ask("create function grows() returns void language sql as $$ insert into t values (7, 'by a function') $$");
    client.run(
        &[parse("grows", "insert into t values (3, 'prepared')"), parse("reads", "select count(*) from spare"), sync()]
            .concat(),
        1,
    );
    client.ask("insert into t select n, repeat('x', 1000) from generate_series(1, 20000) n");
    until("the sample has seen it", || client.code("insert into spare values (3)") == "53100");
    // From a tenth over on, a function that is not PostgreSQL's own is not even looked for.
    until("the sample has seen all of it", || client.code("select no_such_function()") == "53100");
    let denied = client.query("insert into t values (1, 'a')");
    assert!(denied.error(b'D').contains("limit=storage tier=FREE"), "{denied:?}");
    for text in [
        "update t set s = s || 'y'",
        "with w as (insert into t values (1, 'b') returning x) select * from w",
        "create table more as select * from t",
        "select * into more from t",
        "insert into spare select 1",
        "merge into spare using (values (9)) v (x) on false when not matched then insert values (v.x)",
        "create index on t (s)",
        "/* hidden */ insert into t values (1, 'c')",
        "select 1; insert into t values (1, 'd')",
        "select grows()",
        "do $$ begin insert into t values (1, 'e'); end $$",
        "explain analyze insert into t values (1, 'f')",
    ] {
        assert_eq!(client.code(text), "53100", "{text}");
        client.ask("begin");
        let inside = client.query(text);
        assert_eq!((inside.code().as_str(), inside.status()), ("53100", 'E'), "in a transaction: {text}");
        client.ask("rollback");
        let alone = text.strip_prefix("select 1;").unwrap_or(text);
        assert_eq!(client.extended(alone).code(), "53100", "extended: {text}");
    }
    let bound = |name: &str| [bind("", name, &[]), execute("", 0), sync()].concat();
    assert_eq!(client.run(&bound("grows"), 1).code(), "53100");
    assert_eq!(client.run(&bound("reads"), 1).code(), "");
    client.send(&[query("copy t from stdin"), copy_data(b"5\tx\n"), copy_done()].concat());
    assert_eq!(client.up_to(b'Z').code(), "53100");
    assert_eq!(client.ask("select count(*) from t"), "20000");
    for text in [
        "select 1",
        "delete from spare where x = 1",
        "copy spare to stdout",
        "show work_mem",
        "begin",
        "delete from spare",
        "rollback",
        "vacuum spare",
        "drop table spare",
        "explain select * from t",
    ] {
        assert_eq!(client.code(text), "", "{text}");
    }
    client.ask("truncate t");
    until("the sample has seen the room", || client.code("insert into t values (1, 'again')").is_empty());
}

#[test]
fn a_rate_refuses_or_delays_and_never_inside_a_transaction() {
    let mut setup = Setup::default();
    setup.tiers[0].rate = "{ per_second = 5, burst = 10, over = \"refuse\", max_delay = \"1s\" }";
    setup.tiers[1].rate = "{ per_second = 50, burst = 5, over = \"delay\", max_delay = \"5s\" }";
    let proxy = Proxy::start(&setup);
    let (hasty, patient) = (proxy.tenant("acme", Tier::Free), proxy.tenant("globex", Tier::Starter));
    let mut client = hasty.wire();
    let replies: Vec<_> = (0..30).map(|_| client.query("select 1")).collect();
    let refused = replies.iter().filter(|reply| reply.code() == "53400").collect::<Vec<_>>();
    assert!((10..=22).contains(&refused.len()), "{} of 30 refused", refused.len());
    assert!(refused[0].error(b'D').contains("limit=rate tier=FREE max_per_second=5 retry_after_ms="), "{refused:?}");
    assert_eq!((refused[0].kinds().as_str(), refused[0].status()), ("EZ", 'I'));
    assert_eq!(client.extended("select 1").kinds(), "EZ");
    until("the next one is admitted", || client.code("begin").is_empty());
    for n in 0..30 {
        assert_eq!(client.code("select 1"), "", "statement {n} of a transaction");
    }
    assert_eq!(client.code("commit"), "");
    let mut client = patient.wire();
    let began = Instant::now();
    for _ in 0..30 {
        assert_eq!(client.code("select 1"), "");
    }
    // 5 at once, 25 at 50 a second.
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
}

#[test]
fn session_mode_holds_one_connection_per_client() {
    let proxy = Proxy::start(&Setup::free(Limits { connections: 2, queue_timeout: "200ms", ..Limits::default() }));
    let org = proxy.tenant("acme", Tier::Free);
    let session = [("options", "-c dynabase.pool_mode=session")];
    let (mut one, two) = (org.wire_with(&session), org.wire_with(&session));
    let error = Wire::login(proxy.address(), &org.token(), &session).expect_err("both are held");
    assert_eq!((error.field(b'S').as_str(), error.field(b'C').as_str()), ("FATAL", "53300"));
    let pid = one.ask("select pg_backend_pid()");
    assert_eq!(u32::from_be_bytes(one.key[..4].try_into().expect("four")).to_string(), pid);
    one.ask("set work_mem = '7MB'; create temp table kept (x int); listen here; prepare p as select 3");
    assert_eq!(one.ask("select pg_backend_pid()"), pid);
    assert_eq!((one.ask("show work_mem"), one.ask("execute p")), ("7MB".into(), "3".into()));
    one.close();
    two.close();
    org.settles(2);
    let mut next = org.wire();
    assert_eq!(next.ask("show work_mem"), "4MB");
    assert_eq!(next.code("execute p"), "26000");
    assert_eq!(sql(&org.behind(), "select 1"), ["1"]);
}
