//! How dynabase logs in upstream, whatever the server asks for, and whom it does not talk to.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use dynabase::tenant::Tier;

use crate::support::{
    postgres::Own,
    proxy::{Org, Proxy, Setup},
    until,
    wire::Wire,
};

/// The server asks tenants for `method`; its administrator as ever.
fn ask_for(server: &Own, method: &str) {
    let rules = format!("host all postgres 127.0.0.1/32 scram-sha-256\n{method}\n");
    std::fs::write(server.place.data.join("pg_hba.conf"), rules).expect("written");
    server.place.value("select pg_reload_conf()");
    let (_, last) = method.rsplit_once(' ').expect("a method");
    let kind = method.split(' ').next().expect("a kind");
    let read = format!("select count(*) from pg_hba_file_rules where auth_method = '{last}' and type = '{kind}'");
    until("the rules are read", || server.place.value(&read) != "0");
}

/// Gives the server a certificate for `name`; gives the same as authority.
fn certify(server: &Own, name: &str) -> String {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    let owner = std::fs::metadata(&server.place.data).expect("there");
    for (file, content) in [("server.crt", made.cert.pem()), ("server.key", made.signing_key.serialize_pem())] {
        let path = server.place.data.join(file);
        std::fs::write(&path, content).expect("written");
        chown(&path, Some(owner.uid()), Some(owner.gid())).expect("the server's own");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("the server's alone");
    }
    server.place.sql("alter system set ssl = on");
    server.place.sql("select pg_reload_conf()");
    until("TLS is on", || server.place.value("show ssl") == "on");
    made.cert.pem()
}

fn setup(tls: &str, authority: &str) -> Setup {
    let mut setup = Setup { upstream: format!("tls = \"{tls}\"\n"), ..Setup::default() };
    if !authority.is_empty() {
        setup.upstream.push_str("ca_file = \"ca.crt\"\n");
        setup.files.push(("ca.crt", authority.to_owned()));
    }
    setup
}

/// What the server says of the connection that the tenant is on: TLS or not.
fn encrypted(org: &Org<'_>) -> String {
    org.wire().ask("select ssl from pg_stat_ssl where pid = pg_backend_pid()")
}

/// Ends the tenant's connections, so that the next client needs a login.
fn forget(server: &Own, org: &Org<'_>) {
    let role = org.role();
    server.place.sql(&format!("select pg_terminate_backend(pid) from pg_stat_activity where usename = '{role}'"));
    until("they have ended", || org.backends() == 0);
}

#[test]
fn every_method_that_a_server_asks_for() {
    let server = Own::start();
    let plain = Proxy::before(&server.place, &setup("disable", ""));
    let org = plain.tenant("acme", Tier::Free);
    for method in ["scram-sha-256", "password", "trust"] {
        ask_for(&server, &format!("host all all 127.0.0.1/32 {method}"));
        forget(&server, &org);
        assert_eq!(encrypted(&org), "f", "{method}");
    }
    let names = plain.config.names().expect("our own");
    let password = names.password("postgres", &org.org, 1);
    ask_for(&server, "host all all 127.0.0.1/32 md5");
    server.place.sql(&format!(
        "set password_encryption = md5; alter role {} password '{}'",
        org.role(),
        password.expose()
    ));
    forget(&server, &org);
    assert_eq!(encrypted(&org), "f", "md5");
    // A password that the tenant gave its role is set back, and its next session does not notice.
    assert_eq!(org.wire().query("alter role current_user password 'another'").code(), "");
    forget(&server, &org);
    assert_eq!(encrypted(&org), "f", "mended");
    assert!(plain.log().contains("28P01"));
    assert!(!plain.log().contains(password.expose()));
}

#[test]
fn tls_towards_the_server_as_strict_as_configured() {
    let server = Own::start();
    let authority = certify(&server, "127.0.0.1");
    for method in ["scram-sha-256", "password", "trust"] {
        ask_for(&server, &format!("hostssl all all 127.0.0.1/32 {method}"));
        for (mode, authority) in [("require", ""), ("verify-full", authority.as_str())] {
            let proxy = Proxy::before(&server.place, &setup(mode, authority));
            let org = proxy.tenant("acme", Tier::Free);
            assert_eq!(encrypted(&org), "t", "{method} {mode}");
            // A cancel goes the same way.
            let mut client = org.wire();
            client.send(&crate::support::wire::query("select pg_sleep(60)"));
            until("it sleeps", || {
                server.place.value("select count(*) from pg_stat_activity where wait_event = 'PgSleep'") == "1"
            });
            let mut request = Wire::connect(proxy.address());
            request.send(&crate::support::wire::cancel(&client.key));
            assert_eq!(client.up_to(b'Z').code(), "57014");
        }
    }
    let refused = |setup: &Setup| {
        let proxy = Proxy::before(&server.place, setup);
        let org = proxy.tenant("acme", Tier::Free);
        Wire::login(proxy.address(), &org.token(), &[]).expect_err("refused").field(b'C')
    };
    // Without TLS the server does not let us in.
    assert_eq!(refused(&setup("disable", "")), "57P03");
    // Signed by somebody else; then for somebody else.
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate").cert.pem();
    assert_eq!(refused(&setup("verify-full", &other)), "57P03");
    let stranger = certify(&server, "db.example");
    assert_eq!(refused(&setup("verify-full", &stranger)), "57P03");
}
