//! `dynabase dev` as a developer meets it: one command, a line to paste, the same data next time, nothing left behind.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio_postgres::NoTls;

/// Longest start, on a busy machine.
const START: Duration = Duration::from_secs(120);

/// A running one, killed when dropped.
pub struct Dev(Child);

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts it; gives what its ready file says.
pub fn start(folder: &Path, offset: u16) -> (Dev, Value) {
    let ready = folder.join("ready.json");
    let child = Command::new(env!("CARGO_BIN_EXE_dynabase"))
        .args(["dev", "--port-offset", &offset.to_string(), "--data-dir"])
        .arg(folder.join("dev"))
        .arg("--ready-file")
        .arg(&ready)
        .stdout(Stdio::null())
        // Why it ended, if it does.
        .stderr(Stdio::inherit())
        .spawn()
        .expect("it starts");
    let mut dev = Dev(child);
    let deadline = Instant::now() + START;
    while !ready.exists() {
        assert!(dev.0.try_wait().expect("a child").is_none(), "it ended");
        assert!(Instant::now() < deadline, "not ready in time");
        std::thread::sleep(Duration::from_millis(50));
    }
    let json = std::fs::read(&ready).expect("written whole");
    (dev, serde_json::from_slice(&json).expect("JSON"))
}

fn text<'a>(json: &'a Value, pointer: &str) -> &'a str {
    json.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("no {pointer}"))
}

async fn ask(url: &str, question: &str) -> String {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a connection");
    tokio::spawn(connection);
    let rows = client.simple_query(question).await.expect("an answer");
    rows.iter()
        .find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .unwrap_or_default()
}

/// A free run of ports for the listeners, off the defaults. All below 32 768, where the kernel takes the ports of
/// outgoing connections from: the other tests' would get in the way between two starts.
pub fn offset() -> u16 {
    const DEFAULTS: [u16; 5] = [6432, 6380, 27_018, 8080, 9900];
    let first = u16::try_from(std::process::id() % 5_000).expect("below 5 000");
    (0..5_000)
        .map(|n| 500 + (first + n) % 5_000)
        .find(|offset| DEFAULTS.iter().all(|port| std::net::TcpListener::bind(("127.0.0.1", port + offset)).is_ok()))
        .expect("five free ports")
}

#[tokio::test]
async fn one_command_gives_a_prompt_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let offset = offset();
    let (mut dev, first) = start(folder.path(), offset);
    let url = text(&first, "/tenants/0/urls/postgres");
    ask(url, "create table t (x int)").await;
    ask(url, "insert into t values (41), (42)").await;
    let tiers: Vec<&str> = (0..4).map(|n| text(&first, &format!("/tenants/{n}/tier"))).collect();
    assert_eq!(tiers, ["FREE", "STARTER", "PRO", "ENTERPRISE"]);
    assert_eq!(first["ports"]["postgres"], 6432 + offset);
    assert_eq!(text(&first, "/catalog/kind"), "mongodb");
    let upstream = text(&first, "/upstreams/postgres");
    assert_eq!(ask(upstream, "select count(*) from pg_database where datname like 't\\_%'").await, "4");

    let documents = mongodb::Client::with_uri_str(text(&first, "/upstreams/mongodb")).await.expect("a URL");
    // The demo tenants' homes are where their tiers say.
    let orgs = documents.database("dynabase").collection::<bson::Document>("orgs");
    for (org, home) in [("acme", "neon"), ("globex", "main"), ("initech", "main"), ("umbrella", "main")] {
        let found = orgs.count_documents(bson::doc! {"_id": org, "routes.postgres": home}).await.expect("asked");
        assert_eq!(found, 1, "{org}");
    }
    let notes = documents.database("dynabase_tests").collection("notes");
    notes.insert_one(bson::doc! {"_id": 1}).await.expect("written");

    // Killed without a chance to tidy up: the server goes with it, and the next start finds the data.
    dev.0.kill().expect("killed");
    dev.0.wait().expect("ended");
    drop(dev);
    std::fs::remove_file(folder.path().join("ready.json")).expect("the killed run's");
    let (mut dev, second) = start(folder.path(), offset);
    assert_eq!(ask(text(&second, "/tenants/0/urls/postgres"), "select sum(x) from t").await, "83");
    let documents = mongodb::Client::with_uri_str(text(&second, "/upstreams/mongodb")).await.expect("a URL");
    let notes = documents.database("dynabase_tests").collection::<bson::Document>("notes");
    assert_eq!(notes.count_documents(bson::doc! {}).await.expect("read"), 1);
    assert_eq!(text(&first, "/tenants/0/service_key"), text(&second, "/tenants/0/service_key"));

    let pid = rustix::process::Pid::from_child(&dev.0);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("told to end");
    assert!(dev.0.wait().expect("ended").success());
    assert!(!folder.path().join("ready.json").exists());
    let upstream = text(&second, "/upstreams/postgres").to_owned();
    assert!(tokio_postgres::connect(&upstream, NoTls).await.is_err(), "PostgreSQL is still there");
}
