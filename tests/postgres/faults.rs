//! What breaks, breaks for the one concerned only, is said in PostgreSQL's words, and leaves nothing behind.

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    time::Duration,
};

use dynabase::tenant::Tier;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{
    cable::Cable,
    eventually,
    postgres::{Own, shared},
    proxy::{Limits, Org, Proxy, Setup},
    until,
    wire::{
        SSL, Wire, bind, copy_data, copy_done, execute, message_of, parse, password, query, request, startup, sync,
    },
};

/// A proxy whose upstream can be cut off, and one tenant.
fn behind_a_cable(limits: Limits) -> (Cable, Proxy) {
    let cable = Cable::to(shared().port);
    let setup = Setup { url: Some(cable.url(&shared().url)), ..Setup::free(limits) };
    let proxy = Proxy::start(&setup);
    (cable, proxy)
}

fn signal(pid: &str, signal: Signal) {
    let pid = Pid::from_raw(pid.parse().expect("a process id")).expect("above 0");
    kill_process(pid, signal).expect("ours");
}

/// Nobody is inside any more, and the next client is served.
fn is_unharmed(org: &Org<'_>) {
    org.settles(50);
    assert_eq!(org.wire().ask("select 1"), "1");
    org.settles(50);
}

#[test]
fn an_upstream_that_is_down_is_57p03_and_comes_back() {
    let (cable, proxy) = behind_a_cable(Limits { queue_timeout: "500ms", ..Limits::default() });
    let org = proxy.tenant("acme", Tier::Free);
    cable.cut();
    let refused = Wire::login(proxy.address(), &org.token(), &[]).expect_err("no server");
    assert_eq!((refused.field(b'S').as_str(), refused.field(b'C').as_str()), ("FATAL", "57P03"));
    org.settles(0);
    cable.mend();
    let mut client = org.wire();
    assert_eq!(client.ask("select 1"), "1");
    // The client is in; the server goes while nobody uses it.
    cable.cut();
    let reply = client.query("select 2");
    assert!(["57P03", "08006"].contains(&reply.code().as_str()), "{reply:?}");
    assert_eq!(client.read(), None);
    cable.mend();
    is_unharmed(&org);
}

#[test]
fn a_server_that_restarts_is_waited_for_and_no_statement_runs_twice() {
    let (cable, proxy) = behind_a_cable(Limits { queue_timeout: "20s", ..Limits::default() });
    let org = proxy.tenant("acme", Tier::Free);
    let mut client = org.wire();
    client.ask("create table once (x int)");
    for round in 0..3 {
        cable.cut();
        // Nothing of it has gone out: it may be tried until the server is there.
        client.send(&query(&format!("insert into once values ({round})")));
        until("it is being tried", || org.counted().0 == 1);
        std::thread::sleep(Duration::from_millis(50));
        cable.mend();
        assert_eq!(client.up_to(b'Z').tags(), ["INSERT 0 1"]);
    }
    assert_eq!(client.ask("select string_agg(x::text, ' ' order by x) from once"), "0 1 2");
    // This one has gone out; whether it ran is not known, so it is not repeated.
    client.send(&query("insert into once select 9 from pg_sleep(0.5)"));
    until("it runs", || {
        shared().value("select count(*) from pg_stat_activity where query like 'insert into once select 9%' and state = 'active' and pid <> pg_backend_pid()") == "1"
    });
    cable.cut();
    assert_eq!(client.rest().code(), "08006");
    cable.mend();
    let mut client = org.wire();
    until("the backend has ended", || {
        shared().value("select count(*) from pg_stat_activity where query like 'insert into once select 9%' and state = 'active' and pid <> pg_backend_pid()") == "0"
    });
    assert!(["0", "1"].contains(&client.ask("select count(*) from once where x = 9").as_str()));
    drop(client);
    is_unharmed(&org);
}

#[test]
fn the_servers_own_last_words_are_forwarded() {
    let org = Proxy::shared().tenant("faults-fatal", Tier::Starter);
    let mut client = org.wire();
    let pid = client.ask("begin; select pg_backend_pid()");
    client.send(&query("select pg_sleep(60)"));
    until("it sleeps", || {
        shared().value(&format!("select wait_event from pg_stat_activity where pid = {pid}")) == "PgSleep"
    });
    shared().value(&format!("select pg_terminate_backend({pid})"));
    let said = client.rest();
    assert_eq!((said.code().as_str(), said.error(b'S').as_str()), ("57P01", "FATAL"));
    assert_eq!(said.error(b'M'), "terminating connection due to administrator command");
    is_unharmed(&org);
    // One that is idle in the pool is replaced without the client's knowing.
    let mut client = org.wire();
    for _ in 0..3 {
        let pid = client.ask("select pg_backend_pid()");
        shared().value(&format!("select pg_terminate_backend({pid})"));
        until("it has ended", || {
            shared().value(&format!("select count(*) from pg_stat_activity where pid = {pid}")) == "0"
        });
        assert_eq!(client.ask("select 1"), "1");
    }
}

#[test]
fn a_server_that_crashes_is_08006_and_is_found_again() {
    let mut server = Own::start();
    let proxy = Proxy::before(&server.place, &Setup::default());
    let org = proxy.tenant("acme", Tier::Starter);
    let mut client = org.wire();
    client.ask("create table t (x int)");
    let pid = client.ask("begin; insert into t values (1); select pg_backend_pid()");
    let mut idle = org.wire();
    // A backend that is killed takes all others with it; the postmaster begins anew on the same port.
    signal(&pid, Signal::KILL);
    let said = client.rest().codes();
    assert!(["08006", "57P02"].contains(&said.last().map_or("", String::as_str)), "{said:?}");
    assert_eq!(idle.ask("select count(*) from t"), "0");
    drop(idle);
    is_unharmed(&org);
    let mut client = org.wire();
    client.send(&query("select pg_sleep(60)"));
    until("it sleeps", || {
        server.place.value("select count(*) from pg_stat_activity where wait_event = 'PgSleep'") == "1"
    });
    signal(&server.place.pid().to_string(), Signal::KILL);
    server.stop();
    let said = client.rest().codes();
    assert!(["08006", "57P01"].contains(&said.last().map_or("", String::as_str)), "{said:?}");
    org.settles(0);
}

#[test]
fn a_stalled_server_ends_with_the_statement_timeout() {
    let limits = Limits { statement_timeout: "300ms", ..Limits::default() };
    let proxy = Proxy::start(&Setup::free(limits));
    let org = proxy.tenant("acme", Tier::Free);
    let mut client = org.wire();
    let pid = client.ask("select pg_backend_pid()");
    signal(&pid, Signal::STOP);
    let said = client.query("select 1");
    assert!(["57014", "57P01"].contains(&said.code().as_str()), "{said:?}");
    drop(client);
    until("the session is over", || org.counted().0 == 0);
    signal(&pid, Signal::CONT);
    is_unharmed(&org);
}

#[test]
fn a_client_that_vanishes_in_a_transaction_leaves_no_row_and_no_connection() {
    let proxy = Proxy::start(&Setup::default());
    let org = proxy.tenant("acme", Tier::Free);
    let mut watcher = org.wire();
    watcher.ask("create table vanish (x int)");
    type Leave = fn(&mut Wire);
    let leaves: [(&str, Leave); 5] = [
        ("idle in a transaction", |_| {}),
        ("in a running statement", |client| client.send(&query("select pg_sleep(60)"))),
        ("in the middle of a message", |client| client.send(&query("insert into vanish values (2)")[..12])),
        ("in COPY", |client| {
            client.send(&query("copy vanish from stdin"));
            client.up_to(b'G');
            client.send(&copy_data(b"3\n"));
        }),
        ("in a pipeline without Sync", |client| {
            client.send(&[parse("", "insert into vanish values (4)"), bind("", "", &[]), execute("", 0)].concat());
        }),
    ];
    for (name, leave) in leaves {
        for close in [Shutdown::Both, Shutdown::Write] {
            let mut client = org.wire();
            client.ask("begin; insert into vanish values (1)");
            leave(&mut client);
            let _ = client.tcp.shutdown(close);
            // The only connection comes back, without what was not committed.
            let reply = watcher.query("select count(*) from vanish");
            assert_eq!((reply.code().as_str(), reply.value().as_str()), ("", "0"), "{name} {close:?}: {}", proxy.log());
        }
    }
    until("only the watcher is left", || org.counted().0 == 1);
    assert!(org.backends() <= 1);
}

#[test]
fn a_slow_reader_costs_little_memory() {
    let proxy = Proxy::start(&Setup::default());
    let org = proxy.tenant("acme", Tier::Pro);
    org.wire().ask("select 1");
    let before = proxy.resident();
    let mut slow: Vec<Wire> = (0..4).map(|_| org.wire()).collect();
    for client in &mut slow {
        client.send(&query("select repeat('x', 10000) from generate_series(1, 20000)"));
    }
    // The server has filled all there is on its way and waits.
    until("the servers wait for the client", || {
        let waiting = format!(
            "select count(*) from pg_stat_activity where usename = '{}' and wait_event = 'ClientWrite'",
            org.role()
        );
        shared().value(&waiting) == "4"
    });
    let grown = proxy.resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes for four slow readers");
    // Others go on meanwhile.
    assert_eq!(org.wire().ask("select 1"), "1");
    let whole = slow[0].up_to(b'Z');
    assert_eq!(whole.of(b'D').len(), 20_000);
    drop(slow);
    org.settles(5);
}

#[test]
fn values_of_hundreds_of_megabytes_pass_through_in_little_memory() {
    const LEN: usize = 600 << 20;
    let proxy = Proxy::start(&Setup::default());
    let org = proxy.tenant("acme", Tier::Starter);
    let mut client = org.wire();
    client.ask("create table large (t text)");
    let before = proxy.resident();
    let mut most = 0;
    let mut watch = || {
        most = most.max(proxy.resident().saturating_sub(before));
        assert!(most < 64 << 20, "{most} bytes above the beginning");
    };
    // A COPY row of that size to the server; it refuses it at the end, for it is a table nobody wants full.
    client.send(&query("begin; copy large from stdin"));
    client.up_to(b'G');
    let piece = copy_data(&[b'x'; 1 << 20]);
    for _ in 0..LEN >> 20 {
        client.send(&piece);
        watch();
    }
    client.send(&[copy_data(b"\n"), copy_done()].concat());
    assert_eq!(client.up_to(b'Z').tags(), ["COPY 1"]);
    assert_eq!(client.ask("select length(t) from large"), LEN.to_string());
    // One value of that size from the server, in one DataRow.
    client.send(&query("select t from large"));
    let mut socket = client.tcp.try_clone().expect("a second handle");
    let mut left = LEN;
    let mut buffer = vec![0; 1 << 20];
    while left > 0 {
        let n = std::io::Read::read(&mut socket, &mut buffer).expect("more");
        assert!(n > 0, "it ended early");
        left = left.saturating_sub(n);
        watch();
    }
    // And in one Bind to the server.
    drop(client);
    let mut client = org.wire();
    client.send(&parse("", "select length($1::text)"));
    let head_len = 4 + 2 + 2 + 2 + 4 + LEN + 2;
    let mut head = vec![b'B'];
    head.extend(u32::try_from(head_len).expect("below 4 GiB").to_be_bytes());
    head.extend([0, 0, 0, 0, 0, 1]);
    head.extend(u32::try_from(LEN).expect("below 4 GiB").to_be_bytes());
    client.send(&head);
    let piece = vec![b'y'; 1 << 20];
    for _ in 0..LEN >> 20 {
        client.send(&piece);
        watch();
    }
    client.send(&[vec![0, 0], execute("", 0), sync()].concat());
    assert_eq!(client.up_to(b'Z').value(), LEN.to_string());
    eprintln!("most memory above the beginning: {most} bytes");
}

#[test]
fn two_thousand_clients_at_once_are_all_served() {
    const CLIENTS: usize = 2000;
    let proxy = Proxy::start(&Setup::default());
    let org = proxy.tenant("acme", Tier::Enterprise);
    let token = org.token();
    let hello = startup(196_608, &[("user", "app"), ("database", "app")]);
    let mut sockets: Vec<TcpStream> = (0..CLIENTS)
        .map(|_| {
            let mut socket = TcpStream::connect(proxy.address()).expect("accepted");
            socket.write_all(&[&hello[..], &password(&token), &query("select 1")].concat()).expect("sent");
            socket
        })
        .collect();
    until("all are in", || org.counted().0 == CLIENTS as u64);
    for socket in &mut sockets {
        socket.set_read_timeout(Some(crate::support::PATIENCE)).expect("set");
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        let answered = b"SELECT 1\0Z\0\0\0\x05I";
        while !seen.ends_with(answered) {
            let n = std::io::Read::read(socket, &mut buffer).expect("an answer");
            assert!(n > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buffer[..n]);
        }
    }
    assert!(org.backends() <= 50);
    drop(sockets);
    is_unharmed(&org);
}

/// xorshift: the same bytes on every run.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Random bytes, or messages with random bodies, or good messages with one byte changed.
    fn garbage(&mut self) -> Vec<u8> {
        let bytes: Vec<u8> = (0..self.below(300)).map(|_| self.next().to_be_bytes()[0]).collect();
        match self.below(4) {
            0 => bytes,
            1 => {
                let kinds = b"QPBDECHSFXdcfp";
                let kind = kinds[usize::try_from(self.below(kinds.len() as u64)).expect("small")];
                message_of(kind, &bytes)
            }
            2 => {
                let mut good =
                    [parse("s", "select 1"), bind("", "s", &["x"]), execute("", 0), sync(), query("select 2")].concat();
                for _ in 0..=self.below(3) {
                    let at = usize::try_from(self.below(good.len() as u64)).expect("small");
                    good[at] = bytes.first().copied().unwrap_or(0);
                }
                good
            }
            _ => [&b"Q"[..], &u32::MAX.to_be_bytes(), &bytes].concat(),
        }
    }
}

#[test]
fn garbage_in_any_state_harms_nobody_else() {
    let proxy = Proxy::start(&Setup::default());
    let org = proxy.tenant("acme", Tier::Starter);
    let mut bystander = org.wire();
    type Enter = fn(&Org<'_>) -> Wire;
    let states: [(&str, Enter); 7] = [
        ("startup", |org| Wire::connect(org.proxy.address())),
        ("after SSLRequest", |org| {
            let mut client = Wire::connect(org.proxy.address());
            client.send(&request(SSL));
            client.byte();
            client
        }),
        ("password", |org| {
            let mut client = Wire::connect(org.proxy.address());
            client.send(&startup(196_608, &[("user", "app")]));
            client.up_to(b'R');
            client
        }),
        ("idle", |org| org.wire()),
        ("transaction", |org| {
            let mut client = org.wire();
            client.ask("begin");
            client
        }),
        ("COPY", |org| {
            let mut client = org.wire();
            client.ask("create table if not exists garbage (x text)");
            client.send(&query("copy garbage from stdin"));
            client.up_to(b'G');
            client
        }),
        ("skipping to Sync", |org| {
            let mut client = org.wire();
            client.send(&parse("", "selec"));
            client
        }),
    ];
    let mut random = Seeded(0x5eed_dba5);
    for round in 0..60 {
        for (name, enter) in &states {
            let mut client = enter(&org);
            for _ in 0..=random.below(3) {
                if client.try_send(&random.garbage()).is_err() {
                    break;
                }
            }
            let _ = client.tcp.shutdown(Shutdown::Write);
            client.tcp.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
            // Whatever is said, the connection ends.
            let mut rest = Vec::new();
            let ended = std::io::Read::read_to_end(&mut client.tcp, &mut rest);
            assert!(
                !matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
                "{name}, round {round}: it stays open"
            );
        }
        assert_eq!(bystander.ask("select 1"), "1", "round {round}");
    }
    drop(bystander);
    is_unharmed(&org);
    eventually("no connection is kept", || (org.backends() <= 2).then_some(()));
    assert!(!proxy.log().contains("answered what nobody asked"), "{}", proxy.log());
}
