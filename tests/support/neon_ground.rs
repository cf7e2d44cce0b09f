//! What stands behind the double of Neon's API: a PostgreSQL server of its own for each branch, with TLS by the name of
//! its endpoint, a copy of its parent where it is a branch of one; and an edge that leads each connection to the server
//! that it names in TLS (SNI), as Neon's does.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex, mpsc},
};

use dynabase::{
    cli::dev::postgres::{Programs, Server},
    tenant::namespace::Password,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

use super::postgres;

/// Every endpoint's name ends so.
pub const DOMAIN: &str = "eu-central-1.aws.neon.tech";

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

enum Job {
    /// Host, owner, its password, its database.
    Make(String, String, String, String),
    /// Host, and whose copy it is.
    Copy(String, String),
    Remove(String),
}

/// A job, and who hears that it is done.
type Order = (Job, mpsc::Sender<()>);

/// The servers and the edge. They end with the process.
#[derive(Clone)]
pub struct Ground {
    pub port: u16,
    /// The authority that signed the servers' certificates.
    pub ca: String,
    jobs: Arc<Mutex<mpsc::Sender<Order>>>,
    urls: Arc<Mutex<HashMap<String, String>>>,
    named: Arc<Mutex<Vec<String>>>,
}

impl Ground {
    pub fn start() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed");
        let key = KeyPair::generate().expect("a key");
        let cert = CertificateParams::new([format!("*.{DOMAIN}")]).expect("a name");
        let cert = cert.signed_by(&key, &authority).expect("signed").pem();
        let (key, ca) = (key.serialize_pem(), authority.pem());

        let urls: Arc<Mutex<HashMap<String, String>>> = Arc::default();
        let (jobs, todo) = mpsc::channel::<Order>();
        let known = Arc::clone(&urls);
        // The kernel ends servers with the thread that made them.
        std::thread::spawn(move || {
            let mut servers: HashMap<String, (Server, TempDir)> = HashMap::new();
            while let Ok((job, done)) = todo.recv() {
                match job {
                    Job::Make(host, owner, password, database) => {
                        let folder = tempfile::tempdir().expect("a folder");
                        let server = start(&folder);
                        postgres::sql(
                            &server.url(),
                            &format!("create role {owner} login createdb createrole password '{password}'"),
                        );
                        postgres::sql(&server.url(), &format!("create database {database} owner {owner}"));
                        speak_tls(&server, &folder.path().join("data"), &cert, &key);
                        known.lock().expect("no panic").insert(host.clone(), server.url());
                        servers.insert(host, (server, folder));
                    }
                    Job::Copy(host, parent) => {
                        let folder = tempfile::tempdir().expect("a folder");
                        let (from, its_folder) = &servers[&parent];
                        copy(from, its_folder.path(), folder.path());
                        let server = start(&folder);
                        known.lock().expect("no panic").insert(host.clone(), server.url());
                        servers.insert(host, (server, folder));
                    }
                    Job::Remove(host) => {
                        known.lock().expect("no panic").remove(&host);
                        servers.remove(&host);
                    }
                }
                let _ = done.send(());
            }
        });

        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let named: Arc<Mutex<Vec<String>>> = Arc::default();
        let (known, told) = (Arc::clone(&urls), Arc::clone(&named));
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let (known, told) = (Arc::clone(&known), Arc::clone(&told));
                std::thread::spawn(move || lead(client, &known, &told));
            }
        });
        Self { port, ca, jobs: Arc::new(Mutex::new(jobs)), urls, named }
    }

    fn run(&self, job: Job) {
        let (done, finished) = mpsc::channel();
        self.jobs.lock().expect("no panic").send((job, done)).expect("it works");
        finished.recv().expect("it was done");
    }

    pub fn make(&self, host: &str, owner: &str, password: &str, database: &str) {
        self.run(Job::Make(host.into(), owner.into(), password.into(), database.into()));
    }

    pub fn copy(&self, host: &str, parent: &str) {
        self.run(Job::Copy(host.into(), parent.into()));
    }

    pub fn remove(&self, host: &str) {
        self.run(Job::Remove(host.into()));
    }

    /// The superuser's URL of the server behind an endpoint, past the edge.
    pub fn url(&self, host: &str) -> String {
        self.urls.lock().expect("no panic")[host].clone()
    }

    /// The names that connections asked for so far.
    pub fn named(&self) -> Vec<String> {
        self.named.lock().expect("no panic").clone()
    }
}

fn start(folder: &TempDir) -> Server {
    let programs = Programs::find().expect("a PostgreSQL server is installed");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let starting = Server::start(&programs, folder.path(), Password::new("root-password"));
    runtime.block_on(starting).expect("it starts")
}

fn run(command: &mut Command) {
    let output = command.output().expect("it is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn speak_tls(server: &Server, data: &Path, cert: &str, key: &str) {
    for (name, content) in [("server.crt", cert), ("server.key", key)] {
        let path = data.join(name);
        std::fs::write(&path, content).expect("written");
        run(Command::new("chmod").arg("600").arg(&path));
        run(Command::new("chown").arg("--reference").arg(data).arg(&path));
    }
    postgres::sql(&server.url(), "alter system set ssl = on");
    postgres::sql(&server.url(), "select pg_reload_conf()");
    super::until("the server speaks TLS", || postgres::sql(&server.url(), "show ssl") == ["on"]);
}

/// A copy as the server stands now, its roles and passwords with it.
fn copy(from: &Server, its_folder: &Path, folder: &Path) {
    let data = folder.join("data");
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let program = installed.map(|version| version.path().join("bin/pg_basebackup")).find(|path| path.is_file());
    let program = program.unwrap_or_else(|| "pg_basebackup".into());
    run(Command::new(program).args(["-c", "fast", "-X", "stream", "-d", &from.url(), "-D"]).arg(&data));
    run(Command::new("chown").arg("-R").arg("--reference").arg(its_folder.join("data")).arg(&data));
}

/// Leads one connection to the server whose name it says in TLS; without a name it ends.
fn lead(mut client: TcpStream, known: &Mutex<HashMap<String, String>>, told: &Mutex<Vec<String>>) -> Option<()> {
    let mut asked = [0; 8];
    client.read_exact(&mut asked).ok()?;
    assert_eq!(asked, SSL_REQUEST, "nobody speaks to an endpoint in clear text");
    client.write_all(b"S").ok()?;
    let (mut hello, mut acceptor) = (Vec::new(), rustls::server::Acceptor::default());
    let name = loop {
        let mut chunk = [0; 4096];
        let count = client.read(&mut chunk).ok()?;
        if count == 0 {
            return None;
        }
        hello.extend_from_slice(&chunk[..count]);
        acceptor.read_tls(&mut &chunk[..count]).ok()?;
        if let Some(accepted) = acceptor.accept().ok()? {
            break accepted.client_hello().server_name()?.to_owned();
        }
    };
    told.lock().expect("no panic").push(name.clone());
    let url = known.lock().expect("no panic").get(&name)?.clone();
    let port: u16 = url.rsplit_once(':')?.1.split('/').next()?.parse().ok()?;
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    server.write_all(&SSL_REQUEST).ok()?;
    let mut answer = [0; 1];
    server.read_exact(&mut answer).ok()?;
    assert_eq!(&answer, b"S");
    server.write_all(&hello).ok()?;
    let (mut from, mut to) = (client.try_clone().ok()?, server.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    let _ = std::io::copy(&mut server, &mut client);
    let _ = client.shutdown(Shutdown::Both);
    Some(())
}
