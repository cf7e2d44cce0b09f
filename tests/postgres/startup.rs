//! The first bytes of a connection: versions, TLS, tokens, cancel requests.

use std::{net::TcpStream, sync::Arc};

use dynabase::tenant::Tier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::ServerName};

use crate::support::{
    postgres::shared,
    proxy::{Org, Proxy, Setup},
    until,
    wire::{GSS, Reply, SSL, Socket, Wire, cancel, message_of, password, query, request, sasl_initial, startup},
};

/// A proxy with a certificate, and how to trust it.
fn with_tls(mut setup: Setup) -> (Proxy, RootCertStore) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    setup.files.push(("server.crt", made.cert.pem()));
    setup.files.push(("server.key", made.signing_key.serialize_pem()));
    setup.sections.push_str("[tls]\ncert_file = \"server.crt\"\nkey_file = \"server.key\"\n");
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a good certificate");
    (Proxy::start(&setup), roots)
}

fn tls(roots: &RootCertStore, alpn: &[&str], tcp: TcpStream) -> Box<dyn Socket> {
    // Named: other drivers among the tests bring a second provider along.
    let provider = rustls::crypto::aws_lc_rs::default_provider().into();
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("its own versions")
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from("localhost").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    Box::new(StreamOwned::new(connection, tcp))
}

fn hello(version: u32) -> Vec<u8> {
    startup(version, &[("user", "app"), ("database", "app")])
}

/// Logs in over what `client` is by now.
fn login(client: &mut Wire, org: &Org<'_>) {
    client.send(&hello(196_608));
    client.authenticate(&org.token(), "app").unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(client.ask("select 1"), "1");
}

#[test]
fn versions_are_negotiated_as_the_server_does() {
    let org = Proxy::shared().tenant("startup-versions", Tier::Free);
    // Version; whether it is negotiated; the length of the cancel key.
    for (version, negotiated, key) in
        [(196_608, None, 8), (196_610, None, 36), (196_609, Some(196_608), 8), (196_608 + 9999, Some(196_610), 36)]
    {
        let mut client = Wire::connect(org.proxy.address());
        client.send(&hello(version));
        if let Some(offered) = negotiated {
            let message = client.read().expect("a message");
            assert_eq!(message.kind, b'v', "{version}");
            assert_eq!(message.body[..4], u32::to_be_bytes(offered), "{version}");
        }
        client.authenticate(&org.token(), "app").expect("in");
        assert_eq!(client.key.len(), key, "{version}");
        assert_eq!(client.ask("select 1"), "1");
    }
    let mut client = Wire::connect(org.proxy.address());
    client.send(&startup(196_608, &[("user", "app"), ("_pq_.one", "1"), ("_pq_.two", "2")]));
    let message = client.read().expect("a message");
    assert_eq!((message.kind, message.body), (b'v', b"\0\x03\0\0\0\0\0\x02_pq_.one\0_pq_.two\0".to_vec()));
    client.authenticate(&org.token(), "app").expect("in");
    for (version, code) in [(2 << 16, "0A000"), (4 << 16, "0A000"), (1234 << 16 | 9999, "0A000")] {
        let mut client = Wire::connect(org.proxy.address());
        client.send(&hello(version));
        assert_eq!(client.rest().code(), code, "{version}");
    }
}

#[test]
fn packets_that_are_none_are_refused() {
    let org = Proxy::shared().tenant("startup-packets", Tier::Free);
    let said = |bytes: &[u8]| -> Reply {
        let mut client = Wire::connect(org.proxy.address());
        client.send(bytes);
        client.rest()
    };
    assert_eq!(said(&startup(196_608, &[("database", "app")])).code(), "28000");
    for replication in ["true", "database", "1"] {
        assert_eq!(said(&startup(196_608, &[("user", "app"), ("replication", replication)])).code(), "0A000");
    }
    // Longer than any startup packet, cut short, or with something behind its end.
    assert_eq!(said(&startup(196_608, &[("user", &"x".repeat(10_001))])).code(), "08P01");
    let mut unended = hello(196_608);
    unended.pop();
    let len = u32::try_from(unended.len()).expect("small");
    unended[..4].copy_from_slice(&len.to_be_bytes());
    assert_eq!(said(&unended).code(), "08P01");
    assert_eq!(said(&[0, 0, 0, 4]).kinds(), "");
    assert_eq!(org.wire().ask("select 1"), "1");
}

#[test]
fn who_may_come_in_and_what_the_others_are_told() {
    let org = Proxy::shared().tenant("startup-users", Tier::Free);
    let code = |user: &str, database: &str, secret: &str| {
        Wire::login_as(org.proxy.address(), secret, user, database, &[])
            .map_or_else(|error| (error.field(b'C'), error.field(b'M')), |_| ("in".into(), String::new()))
    };
    let token = org.token();
    assert_eq!(code("app", "app", &token).0, "in");
    assert_eq!(code("app", "", &token).0, "in");
    let wrong = "password authentication failed for user \"app\"".to_owned();
    assert_eq!(code("app", "app", "nonsense"), ("28P01".into(), wrong.clone()));
    assert_eq!(code("app", "app", ""), ("28P01".into(), wrong.clone()));
    assert_eq!(code("app", "app", &format!("{token}x")), ("28P01".into(), wrong.clone()));
    assert_eq!(code("app", "app", &"x".repeat(65_000)), ("28P01".into(), wrong));
    assert_eq!(code("postgres", "app", &token).0, "28P01");
    assert_eq!(code(&org.role(), "app", &token).0, "28P01");
    assert_eq!(code("app", "postgres", &token), ("3D000".into(), "database \"postgres\" does not exist".into()));
    // The physical name of a database, one's own or another's, is no name here.
    assert_eq!(code("app", &org.role(), &token).0, "3D000");
    // Longer than a password may be: refused before it is read.
    let mut client = Wire::connect(org.proxy.address());
    client.send(&hello(196_608));
    client.up_to(b'R');
    let _ = client.try_send(&password(&"x".repeat(70_000)));
    assert_eq!(client.rest().code(), "08P01");
    // Nothing but a password is taken for one.
    let mut client = Wire::connect(org.proxy.address());
    client.send(&hello(196_608));
    client.up_to(b'R');
    client.send(&query("select 1"));
    assert_eq!(client.rest().code(), "08P01");
}

#[test]
fn tls_begins_as_the_client_asks_for_it() {
    let (proxy, roots) = with_tls(Setup::default());
    let org = proxy.tenant("acme", Tier::Free);
    let asked = |before: &[u32], alpn: &'static [&'static str]| {
        let mut client = Wire::connect(proxy.address());
        for code in before {
            client.send(&request(*code));
            assert_eq!(client.byte(), Some(if *code == SSL { b'S' } else { b'N' }));
        }
        client.through(|tcp| tls(&roots, alpn, tcp))
    };
    login(&mut asked(&[SSL], &[]), &org);
    login(&mut asked(&[SSL], &["postgresql"]), &org);
    login(&mut asked(&[GSS, SSL], &[]), &org);
    login(&mut asked(&[], &["postgresql"]), &org);
    login(&mut Wire::connect(proxy.address()), &org);
    // Direct TLS without ALPN could be anybody's protocol.
    for alpn in [&[][..], &["http/1.1"]] {
        let mut client = asked(&[], if alpn.is_empty() { &[] } else { &["http/1.1"] });
        let _ = client.try_send(&hello(196_608));
        assert_eq!(client.rest().kinds(), "");
    }
    // What is slipped in behind the request before TLS never counts.
    let mut client = Wire::connect(proxy.address());
    client.send(&[request(SSL), hello(196_608)].concat());
    assert_eq!(client.byte(), Some(b'S'));
    assert_eq!(client.byte().filter(|byte| *byte != 0x15), None, "an alert or the end");
    // Twice is once too often.
    let mut client = asked(&[SSL], &[]);
    client.send(&request(SSL));
    assert_eq!(client.rest().code(), "08P01");
    let mut plain = Wire::connect(Proxy::shared().address());
    plain.send(&request(GSS));
    assert_eq!(plain.byte(), Some(b'N'));
    plain.send(&request(SSL));
    assert_eq!(plain.byte(), Some(b'N'));
    login(&mut plain, &Proxy::shared().tenant("startup-plain", Tier::Free));
}

#[test]
fn a_token_is_not_asked_for_in_plaintext_over_a_network() {
    let header = |source: [u8; 4]| {
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        header.extend(source);
        header.extend([10, 0, 0, 1, 0x30, 0x39, 0x19, 0x20]);
        header
    };
    let balanced = || Setup { listen: "proxy_from = [\"127.0.0.0/8\"]".into(), ..Setup::default() };
    let (proxy, roots) = with_tls(balanced());
    let org = proxy.tenant("acme", Tier::Free);
    let from_network = |proxy: &Proxy| {
        let mut client = Wire::connect(proxy.address());
        client.send(&header([203, 0, 113, 9]));
        client
    };
    let mut client = from_network(&proxy);
    client.send(&hello(196_608));
    let said = client.rest();
    // Before any R: the password was never asked for.
    assert_eq!((said.kinds().as_str(), said.code().as_str()), ("E", "28000"));
    let mut client = from_network(&proxy);
    client.send(&request(SSL));
    assert_eq!(client.byte(), Some(b'S'));
    login(&mut client.through(|tcp| tls(&roots, &[], tcp)), &org);
    drop(proxy);
    let proxy = Proxy::start(&Setup { top: "allow_plaintext = true".into(), ..balanced() });
    let org = proxy.tenant("acme", Tier::Free);
    login(&mut from_network(&proxy), &org);
    // From where it is required a connection without the header is none.
    let mut client = Wire::connect(proxy.address());
    client.send(&hello(196_608));
    assert_eq!(client.rest().kinds(), "");
}

#[test]
fn a_token_can_come_by_sasl() {
    let org = Proxy::shared().tenant("startup-oauth", Tier::Free);
    let begin = || {
        let mut client = Wire::connect(org.proxy.address());
        client.send(&startup(196_608, &[("user", "app"), ("options", "-c dynabase.auth=oauth")]));
        let asked = client.read().expect("a message");
        assert_eq!((asked.kind, asked.body), (b'R', b"\0\0\0\x0aOAUTHBEARER\0\0".to_vec()));
        client
    };
    let bearer = |token: &str| sasl_initial("OAUTHBEARER", format!("n,,\x01auth=Bearer {token}\x01\x01").as_bytes());
    let mut client = begin();
    client.send(&bearer(&org.token()));
    client.authenticate("", "app").expect("in");
    assert_eq!(client.ask("select 1"), "1");
    let mut client = begin();
    client.send(&bearer("nonsense"));
    assert_eq!(client.up_to(b'E').code(), "28P01");
    // Discovery: where is a token to be had?
    let mut client = begin();
    client.send(&sasl_initial("OAUTHBEARER", b"n,,\x01auth=\x01\x01"));
    let told = client.read().expect("a message");
    assert_eq!(told.body[..4], [0, 0, 0, 11]);
    let json: serde_json::Value = serde_json::from_slice(&told.body[4..]).expect("JSON");
    assert_eq!(json["status"], "invalid_token");
    assert!(json["openid-configuration"].as_str().is_some_and(|it| it.ends_with("/.well-known/openid-configuration")));
    client.send(&message_of(b'p', b"\x01"));
    assert_eq!(client.rest().code(), "28P01");
    let mut client = begin();
    client.send(&sasl_initial("SCRAM-SHA-256", b"n,,n=,r=x"));
    assert_eq!(client.rest().code(), "08P01");
}

#[test]
fn a_cancel_request_hits_what_it_was_meant_for() {
    let org = Proxy::shared().tenant("startup-cancel", Tier::Free);
    let cancel_with = |key: &[u8]| {
        let mut request = Wire::connect(org.proxy.address());
        request.send(&cancel(key));
        assert_eq!(request.rest().kinds(), "");
    };
    let sleeps = || {
        let sleeping = format!(
            "select count(*) from pg_stat_activity where usename = '{}' and wait_event = 'PgSleep'",
            org.role()
        );
        until("it sleeps", || shared().value(&sleeping) == "1");
    };
    for version in [196_608, 196_610] {
        let mut client = Wire::connect(org.proxy.address());
        client.send(&hello(version));
        client.authenticate(&org.token(), "app").expect("in");
        let key = client.key.clone();
        client.send(&query("select pg_sleep(60)"));
        sleeps();
        // Neither a wrong secret nor a shorter one does anything.
        let mut wrong = key.clone();
        *wrong.last_mut().expect("a secret") ^= 1;
        for bad in [&wrong[..], &[&key[..4], &[0; 4]].concat(), &[0; 8]] {
            cancel_with(bad);
        }
        let mut second = Wire::connect(org.proxy.address());
        second.send(&hello(196_608));
        second.authenticate(&org.token(), "app").expect("in");
        cancel_with(&second.key.clone());
        sleeps();
        cancel_with(&key);
        let said = client.up_to(b'Z');
        assert_eq!(
            (said.code().as_str(), said.error(b'M').as_str()),
            ("57014", "canceling statement due to user request")
        );
        assert_eq!(client.ask("select 1"), "1");
        // The same connection is another client's now: a late cancel is nobody's.
        second.send(&query("select 'unharmed' from pg_sleep(0.3)"));
        sleeps();
        cancel_with(&key);
        assert_eq!(second.up_to(b'Z').value(), "unharmed");
        // A client that waits for its turn is cancelled in the queue.
        second.ask("begin");
        client.send(&query("select 2"));
        // Whether it waits already can't be seen from outside: a cancel that comes too early is dropped, so again.
        client.tcp.set_nonblocking(true).expect("set");
        until("it is cancelled", || {
            cancel_with(&key);
            client.tcp.peek(&mut [0]).is_ok()
        });
        client.tcp.set_nonblocking(false).expect("set");
        assert_eq!(client.up_to(b'Z').code(), "57014");
        second.ask("commit");
        assert_eq!(client.ask("select 3"), "3");
    }
}

#[test]
fn a_slow_handshake_has_an_end() {
    let proxy = Proxy::start(&Setup { listen: "handshake_timeout = \"1s\"".into(), ..Setup::default() });
    let org = proxy.tenant("acme", Tier::Free);
    for bytes in [vec![], hello(196_608)[..5].to_vec(), hello(196_608)] {
        let mut client = Wire::connect(proxy.address());
        client.send(&bytes);
        assert!(client.rest().0.iter().all(|message| message.kind == b'R'), "{bytes:?}");
    }
    assert_eq!(org.wire().ask("select 1"), "1");
}
