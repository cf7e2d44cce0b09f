//! `dynabase doctor`: each fault is named, beside real servers that have it; what is good is called so.

use std::{path::Path, process::Command};

use serde_json::Value;

use crate::support::{self, free_port, mongo, postgres};

/// Exit code and findings.
fn doctor(config: &Path) -> (i32, Vec<(String, String, String)>) {
    let run = Command::new(env!("CARGO_BIN_EXE_dynabase")).args(["doctor", "--json", "--config"]).arg(config).output();
    let run = run.expect("it starts");
    let out: Value = serde_json::from_slice(&run.stdout).expect("JSON");
    let text = |finding: &Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
    let findings = out["findings"].as_array().expect("a list");
    let findings = findings.iter().map(|it| (text(it, "part"), text(it, "state"), text(it, "what"))).collect();
    assert!(
        out["findings"].as_array().expect("a list").iter().all(|it| it["state"] == "good" || !it["mend"].is_null())
    );
    (run.status.code().unwrap_or(-1), findings)
}

struct Setup {
    postgres: String,
    catalog: String,
    mongodb: Option<String>,
    redis: Option<String>,
    identity: String,
    tiers: &'static str,
    /// More of the file.
    more: String,
}

impl Setup {
    /// What is good, but for the shared secret.
    fn good() -> Self {
        Self {
            postgres: postgres::shared().url.clone(),
            catalog: "path = \"catalog\"".into(),
            mongodb: None,
            redis: None,
            identity: "hs256_secret = \"0123456789abcdef0123456789abcdef\"".into(),
            tiers: include_str!("../config/tiers.toml"),
            more: String::new(),
        }
    }

    fn run(&self) -> (i32, Vec<(String, String, String)>) {
        let folder = tempfile::tempdir().expect("a folder");
        let url = |name: &str, url: &Option<String>| {
            url.as_ref().map_or_else(String::new, |url| format!("[upstream.{name}]\nurl = \"{url}\"\n"))
        };
        let text = format!(
            "[identity]\nissuer = \"https://doctor.invalid\"\n{}\n[catalog]\n{}\n\
             [names]\nroot_secret = \"0123456789abcdef0123456789abcdef\"\n[upstream.postgres]\nurl = \"{}\"\n{}{}\
             [admin]\ntoken = \"operators-of-the-tests\"\n{}",
            self.identity,
            self.catalog,
            self.postgres,
            url("mongodb", &self.mongodb),
            url("redis", &self.redis),
            self.more,
        );
        let path = folder.path().join("dynabase.toml");
        std::fs::write(&path, text).expect("written");
        std::fs::write(folder.path().join("tiers.toml"), self.tiers).expect("written");
        doctor(&path)
    }

    /// Its one fault is of `part` and says `what`.
    fn has_fault(&self, part: &str, what: &str) {
        let (code, findings) = self.run();
        let faults: Vec<_> = findings.iter().filter(|(_, state, _)| state == "fault").collect();
        assert!(faults.iter().any(|(of, _, said)| of == part && said.contains(what)), "{part}, {what}: {findings:?}");
        assert!(faults.iter().all(|(of, ..)| of == part), "no other part: {findings:?}");
        assert_eq!(code, 1);
    }
}

#[test]
fn what_is_good_is_called_good() {
    let place = mongo::shared();
    let setup = Setup {
        catalog: format!("kind = \"mongodb\"\nurl = \"{}\"", place.url),
        mongodb: Some(place.url.clone()),
        ..Setup::good()
    };
    let (code, findings) = setup.run();
    assert_eq!(code, 0, "{findings:?}");
    let good = |part: &str| findings.iter().any(|(of, state, _)| of == part && state == "good");
    assert!(["configuration", "catalog", "tiers", "postgres", "mongodb"].into_iter().all(good), "{findings:?}");
    // It works without them, and says what would be better.
    let warns = |what: &str| findings.iter().any(|(_, state, said)| state == "warning" && said.contains(what));
    assert!(warns("shared secret") && warns("without the collections") && warns("nobody is logged in"), "{findings:?}");
}

#[test]
fn a_fault_of_postgres_is_named() {
    let place = postgres::shared();
    place.sql("drop role if exists doctor_poor; create role doctor_poor login createdb password 'x'");
    let poor = format!("postgres://doctor_poor:x@127.0.0.1:{}/postgres", place.port);
    Setup { postgres: poor, ..Setup::good() }.has_fault("postgres", "may not make roles");
    let wrong = format!("postgres://postgres:wrong@127.0.0.1:{}/postgres", place.port);
    Setup { postgres: wrong, ..Setup::good() }.has_fault("postgres", "28P01");
    let nobody = format!("postgres://postgres:x@127.0.0.1:{}/postgres", free_port());
    Setup { postgres: nobody, ..Setup::good() }.has_fault("postgres", "refused");
}

#[test]
fn a_fault_of_redis_and_mongodb_is_named() {
    let nobody = free_port();
    Setup { redis: Some(format!("redis://127.0.0.1:{nobody}")), ..Setup::good() }.has_fault("redis", "unreachable");
    let away = format!("mongodb://127.0.0.1:{nobody}/?directConnection=true");
    Setup { mongodb: Some(away), ..Setup::good() }.has_fault("mongodb", "");
}

#[test]
fn a_redis_that_believes_payloads_or_gives_without_a_limit_is_warned_of() {
    for (value, limit, expected) in [("no", "0", true), ("clients", "1gb", false)] {
        let port = free_port().to_string();
        let server = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--sanitize-dump-payload", value])
            .args(["--client-output-buffer-limit", "normal", limit, "0", "0"])
            .stdout(std::process::Stdio::null())
            .spawn();
        let mut server = server.expect("redis-server is installed");
        while std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let (_, findings) = Setup { redis: Some(format!("redis://127.0.0.1:{port}")), ..Setup::good() }.run();
        let _ = server.kill();
        let _ = server.wait();
        for words in ["sanitize-dump-payload is off", "client-output-buffer-limit has none"] {
            let warned =
                findings.iter().any(|(of, state, said)| of == "redis" && state == "warning" && said.contains(words));
            assert_eq!(warned, expected, "{words}, {value}: {findings:?}");
        }
    }
}

#[test]
fn a_fault_of_neon_and_convex_is_named_and_what_is_good_called_so() {
    let url = |part: &str, url: &str| format!("[upstream.{part}]\nurl = \"{url}\"\n");
    let nobody = free_port();
    let neon = url("neon", &format!("postgres://postgres:x@127.0.0.1:{nobody}/postgres"));
    Setup { more: neon, ..Setup::good() }.has_fault("neon", "refused");
    let issuer = "public_url = \"http://127.0.0.1:8080\"\n";
    let away = url("convex", &format!("http://127.0.0.1:{nobody}")) + issuer;
    Setup { more: away, ..Setup::good() }.has_fault("convex", "");
    // Anything that answers, and says whether it is one.
    let served = |status: &'static str| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("asked");
            let mut head = [0; 4096];
            let n = std::io::Read::read(&mut stream, &mut head).expect("a request");
            assert!(head[..n].starts_with(b"GET /version "));
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok");
            std::io::Write::write_all(&mut stream, answer.as_bytes()).expect("answered");
        });
        url("convex", &format!("http://127.0.0.1:{port}")) + issuer
    };
    Setup { more: served("404 Not Found"), ..Setup::good() }.has_fault("convex", "404");
    let more = url("neon", &postgres::shared().url) + &served("200 OK");
    let (code, findings) = Setup { more, ..Setup::good() }.run();
    let good = |part: &str| findings.iter().any(|(of, state, _)| of == part && state == "good");
    assert!(code == 0 && ["neon", "convex"].into_iter().all(good), "{findings:?}");
}

#[test]
fn a_fault_of_the_catalog_is_named() {
    let catalog = |url: &str| format!("kind = \"mongodb\"\nurl = \"{url}\"\ndatabase = \"doctor\"");
    let away = format!("mongodb://127.0.0.1:{}/?directConnection=true", free_port());
    Setup { catalog: catalog(&away), ..Setup::good() }.has_fault("catalog", "");
    let place = mongo::shared();
    support::block_on(async {
        let database = place.client().await.database("doctor");
        database.collection("orgs").insert_one(bson::doc! {"_id": "acme", "tier": "GOLD"}).await.expect("written");
    });
    Setup { catalog: catalog(&place.url), ..Setup::good() }.has_fault("catalog", "damaged document, acme");
    support::block_on(async {
        let database = place.client().await.database("doctor");
        database.collection::<bson::Document>("orgs").drop().await.expect("dropped");
        let over = bson::doc! {"_id": "FREE", "postgres": {"conections": 7}};
        database.collection("tiers").insert_one(over).await.expect("written");
    });
    Setup { catalog: catalog(&place.url), ..Setup::good() }.has_fault("tiers", "does not fit");
}

#[test]
fn a_fault_of_the_issuer_is_named() {
    let away = format!("jwks_url = \"http://127.0.0.1:{}/jwks.json\"", free_port());
    Setup { identity: away, ..Setup::good() }.has_fault("identity", "can't be read");
}

#[test]
fn a_fault_of_the_configuration_is_named_with_its_line() {
    let (code, findings) = Setup { catalog: "kind = \"mongodb\"".into(), ..Setup::good() }.run();
    assert_eq!(code, 2);
    assert!(findings.iter().any(|(of, _, said)| of == "configuration" && said.contains("catalog.url")), "{findings:?}");
    let (code, findings) = Setup { tiers: "[FREE]\n", ..Setup::good() }.run();
    assert_eq!(code, 2);
    assert!(findings.iter().any(|(_, state, said)| state == "fault" && said.contains("tiers")), "{findings:?}");
}
