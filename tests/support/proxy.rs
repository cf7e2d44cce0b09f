//! dynabase as a child process: its configuration in a temporary folder, its ports free ones, its log read along.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use dynabase::{
    catalog::{Catalog, Expect, KeyRecord},
    config::Config,
    identity::{mint, service_key},
    tenant::{
        OrgId, Status, Tenant, Tier,
        directory::{KeyHash, ServiceKey},
    },
    upstream::postgres::Provisioner,
};
use serde_json::Value;
use tempfile::TempDir;

use super::{
    block_on, eventually, free_port,
    postgres::{self, Place},
    until,
    wire::Wire,
};

/// Longest run of a command, on a busy machine: one that hangs fails its test.
const COMMAND_ENDS_WITHIN: Duration = Duration::from_secs(180);

const ADMIN_TOKEN: &str = "operators-of-the-tests";
const ISSUER: &str = "https://tests.dynabase.invalid/auth/v1";

/// The limits of one tier, in the words of the tiers' file.
#[derive(Clone, Debug)]
pub struct Limits {
    pub expiry: &'static str,
    pub connections: u32,
    pub client_sockets: u32,
    pub storage: &'static str,
    pub statement_timeout: &'static str,
    pub idle_in_transaction: &'static str,
    pub queue_timeout: &'static str,
    pub rate: &'static str,
    /// Of MongoDB.
    pub isolation: &'static str,
    pub collections: u32,
    /// Of the Postgres port's database.
    pub home: &'static str,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            expiry: "strict",
            connections: 1,
            client_sockets: 100,
            storage: "4GB",
            statement_timeout: "60s",
            idle_in_transaction: "60s",
            queue_timeout: "10s",
            rate: "{ per_second = 100000, burst = 100000, over = \"refuse\", max_delay = \"1s\" }",
            isolation: "filter",
            collections: 500,
            home: "main",
        }
    }
}

/// How a proxy differs from the usual one: FREE has one connection, STARTER two, PRO five, ENTERPRISE fifty.
#[derive(Clone, Debug)]
pub struct Setup {
    pub tiers: [Limits; 4],
    /// Lines of the top level and of sections, as TOML.
    pub top: String,
    pub listen: String,
    pub upstream: String,
    /// The upstream's URL, where it is not the server's own.
    pub url: Option<String>,
    /// Upstream connections to a Neon home, in every tier.
    pub neon_connections: u32,
    /// Lines of `[catalog]`; a folder, by default.
    pub catalog: String,
    /// Whole sections.
    pub sections: String,
    /// Files to put beside the configuration.
    pub files: Vec<(&'static str, String)>,
}

impl Default for Setup {
    fn default() -> Self {
        let tier = |connections| Limits { connections, ..Limits::default() };
        Self {
            tiers: [tier(1), tier(2), tier(5), Limits { client_sockets: 5000, ..tier(50) }],
            top: String::new(),
            listen: String::new(),
            upstream: String::new(),
            url: None,
            neon_connections: 25,
            catalog: "path = \"catalog\"".into(),
            sections: String::new(),
            files: Vec::new(),
        }
    }
}

impl Setup {
    /// With other limits for FREE.
    pub fn free(limits: Limits) -> Self {
        let mut setup = Self::default();
        setup.tiers[0] = limits;
        setup
    }

    fn tiers_toml(&self) -> String {
        let (mut text, neon) = (String::new(), self.neon_connections);
        for (name, limits) in ["FREE", "STARTER", "PRO", "ENTERPRISE"].iter().zip(&self.tiers) {
            let Limits { expiry, connections, client_sockets, storage, .. } = limits;
            let Limits {
                statement_timeout,
                idle_in_transaction,
                queue_timeout,
                rate,
                isolation,
                collections,
                home,
                ..
            } = limits;
            write!(
                text,
                "[{name}]\nexpiry = \"{expiry}\"\n[{name}.postgres]\nconnections = {connections}\n\
                 client_sockets = {client_sockets}\nstorage = \"{storage}\"\n\
                 statement_timeout = \"{statement_timeout}\"\nidle_in_transaction_timeout = \"{idle_in_transaction}\"\n\
                 queue_timeout = \"{queue_timeout}\"\npool_mode = \"transaction\"\nhome = \"{home}\"\nrate = {rate}\n\
                 [{name}.redis]\nmemory = \"50MB\"\nkeys = 1000\nmax_ttl = \"1h\"\nclient_sockets = 50\n\
                 connections = 25\nrate = {rate}\n\
                 [{name}.mongodb]\nisolation = \"{isolation}\"\nconnections = 25\nclient_sockets = 50\ntimeout = \"30s\"\n\
                 queue_timeout = \"5s\"\ncursors = 100\ncollections = {collections}\nrate = {rate}\n\
                 [{name}.convex]\nclient_sockets = 50\nsubscriptions = 100\nsubscriptions_per_socket = 50\n\
                 in_flight_writes = 8\npayload = \"1MiB\"\nupload = \"10MiB\"\nrate = {rate}\n\
                 [{name}.neon]\nconnections = {neon}\nclient_sockets = 50\nstorage = \"4GB\"\nstatement_timeout = \"30s\"\n\
                 queue_timeout = \"5s\"\nresponse = \"10MiB\"\nmin_cu_hundredths = 25\nmax_cu_hundredths = 25\n\
                 suspend_after = \"300s\"\nbranches = 3\nrate = {rate}\n"
            )
            .expect("a string takes it");
        }
        text
    }
}

/// A running dynabase. Dropping it kills it and looks whether it panicked.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    pub port: u16,
    admin: u16,
    pub config: Config,
    log: Arc<Mutex<String>>,
    pub server: Place,
    folder: TempDir,
}

impl Proxy {
    /// Starts one in front of the shared server.
    pub fn start(setup: &Setup) -> Self {
        Self::before(postgres::shared(), setup)
    }

    /// Starts one in front of `server`.
    pub fn before(server: &Place, setup: &Setup) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let admin = free_port();
        let url = setup.url.as_ref().unwrap_or(&server.url);
        let Setup { top, listen, upstream, catalog, sections, .. } = setup;
        // A root secret of its own: two proxies before one server don't share roles and databases.
        let root = folder.path().display().to_string().repeat(3);
        let text = format!(
            "{top}\n[listen]\npostgres = \"127.0.0.1:0\"\nunadmitted_per_network = 0\n{listen}\n\
             [identity]\nissuer = \"{ISSUER}\"\nhs256_secret = \"{root}\"\nleeway = \"0s\"\n\
             [catalog]\n{catalog}\n[names]\nroot_secret = \"{root}\"\n\
             [upstream.postgres]\nurl = \"{url}\"\n{upstream}\n\
             [admin]\nlisten = \"127.0.0.1:{admin}\"\ntoken = \"{ADMIN_TOKEN}\"\n\
             [log]\nfilter = \"info\"\n{sections}\n"
        );
        let path = folder.path().join("dynabase.toml");
        std::fs::write(&path, text).expect("written");
        std::fs::write(folder.path().join("tiers.toml"), setup.tiers_toml()).expect("written");
        for (name, content) in &setup.files {
            std::fs::write(folder.path().join(name), content).expect("written");
        }
        let config = Config::load(&path).unwrap_or_else(|error| panic!("{error}"));
        let mut child = spawn(&path);
        let log = Arc::new(Mutex::new(String::new()));
        read_along(&mut child, &log);
        let mut proxy = Self { child, port: 0, admin, config, log, server: server.clone(), folder };
        proxy.await_port();
        proxy
    }

    /// Waits until it says where it listens.
    fn await_port(&mut self) {
        self.port = eventually("dynabase listens", || {
            assert!(self.child.try_wait().expect("a child").is_none(), "it ended: {}", self.log());
            self.logged_port("PostgreSQL")
        });
    }

    /// Kills it as it is (SIGKILL).
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }

    /// Starts it once more after [`Self::kill`], from the same configuration.
    pub fn start_again(&mut self) {
        self.log = Arc::new(Mutex::new(String::new()));
        self.child = spawn(&self.folder.path().join("dynabase.toml"));
        read_along(&mut self.child, &self.log);
        self.await_port();
    }

    fn logged_port(&self, clients: &str) -> Option<u16> {
        let log = self.log();
        let (_, rest) = log.split_once(&format!("listening for {clients} clients"))?;
        let (_, port) = rest.lines().next()?.rsplit_once(':')?;
        port.trim().parse().ok()
    }

    /// The usual one, which tests share. Every test has tenants of its own.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Proxy> = OnceLock::new();
        SHARED.get_or_init(|| {
            let (sender, receiver) = std::sync::mpsc::channel();
            // As with the server: the kernel ends the child with its thread, and that with the process.
            std::thread::spawn(move || {
                let proxy = Self::start(&Setup::default());
                let pid = i32::try_from(proxy.pid()).expect("small");
                postgres::keep(pid, proxy.folder.path().into());
                sender.send(proxy).expect("somebody waits");
                loop {
                    std::thread::park();
                }
            });
            receiver.recv().expect("it starts")
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic").clone()
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Makes a tenant: role, database, record.
    pub fn tenant(&self, org: &str, tier: Tier) -> Org<'_> {
        let org = OrgId::parse(org).expect("an id");
        let tenant = Tenant {
            org: org.clone(),
            tier,
            status: Status::Active,
            epoch: 1,
            generation: 1,
            databases: Vec::new(),
            users: Vec::new(),
            routes: Default::default(),
            still: false,
        };
        block_on(async {
            let tiers = self.config.load_tiers().expect("our own");
            let admin = Proxy::admin_of(&self.server);
            let names = self.config.names().expect("our own");
            let limits = &tiers.limits(tier).postgres;
            Provisioner::new(admin).ensure(&tenant, &names, limits).await.expect("provisioned");
            let record = dynabase::catalog::Record::new(tenant);
            self.catalog().await.put(record, Expect::Absent).await.expect("a new record");
        });
        Org { proxy: self, org }
    }

    fn admin_of(server: &Place) -> dynabase::upstream::postgres::Admin {
        let url = dynabase::tenant::namespace::Password::new(&server.url);
        let config = dynabase::upstream::postgres::Config { url: Some(url), ..Default::default() };
        config.admin().expect("a good URL")
    }

    async fn catalog(&self) -> Catalog {
        Catalog::open(self.config.catalog.as_ref().expect("configured")).await.expect("a folder")
    }

    /// What `path` of the admin port answers.
    pub fn admin(&self, path: &str) -> String {
        let mut socket = TcpStream::connect(("127.0.0.1", self.admin)).expect("the admin port");
        socket.set_read_timeout(Some(super::PATIENCE)).expect("set");
        write!(
            socket,
            "GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\nConnection: close\r\n\r\n"
        )
        .expect("sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("answered");
        answer.split_once("\r\n\r\n").expect("head and body").1.to_owned()
    }

    /// What the admin port answers to a PUT.
    pub fn admin_put(&self, path: &str, body: &str) -> (u16, Value) {
        self.admin_send("PUT", path, body)
    }

    /// What the admin port answers to any method: its status, and the body as JSON.
    pub fn admin_send(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut socket = TcpStream::connect(("127.0.0.1", self.admin)).expect("the admin port");
        socket.set_read_timeout(Some(super::PATIENCE)).expect("set");
        write!(
            socket,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("answered");
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).expect("a status");
        (status, serde_json::from_str(body).expect("JSON"))
    }

    /// The port of a front, by the word of its log: `Redis`, `MongoDB`, `HTTP`.
    pub fn port_of(&self, front: &str) -> u16 {
        eventually("the front listens", || self.logged_port(front))
    }

    /// A tenant that is there already.
    pub fn org(&self, org: &str) -> Org<'_> {
        Org { proxy: self, org: OrgId::parse(org).expect("an id") }
    }

    /// Begins a command of ours about this installation, its standard error piped.
    pub fn begin(&self, words: &[&str], environment: &[(&str, &str)]) -> Child {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_dynabase")]).args(words);
        command.arg("--config").arg(self.folder.path().join("dynabase.toml")).envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().expect("setpriv of util-linux is installed")
    }

    /// Runs a command of ours about this installation: exit code, standard output, standard error.
    pub fn command(&self, words: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dynabase"));
        command.args(words).arg("--config").arg(self.folder.path().join("dynabase.toml"));
        command.envs(environment.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let read = |mut pipe: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                let mut text = String::new();
                pipe.read_to_string(&mut text).expect("UTF-8");
                text
            })
        };
        let out = read(Box::new(child.stdout.take().expect("piped")));
        let err = read(Box::new(child.stderr.take().expect("piped")));
        let deadline = Instant::now() + COMMAND_ENDS_WITHIN;
        let status = loop {
            if let Some(status) = child.try_wait().expect("its parent may ask") {
                break status;
            }
            if Instant::now() >= deadline {
                let _ = child.kill();
                panic!("{words:?} did not come to an end: {}", err.join().expect("it was read"));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        (status.code(), out.join().expect("it was read"), err.join().expect("it was read"))
    }

    /// The value of a metric, summed over all its labels that contain `labels`.
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let text = self.admin("/metrics");
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(labels));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
        line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).expect("a number") * 1024
    }
}

fn spawn(config: &Path) -> Child {
    let program = env!("CARGO_BIN_EXE_dynabase");
    // It must not outlive a test that is killed.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program, "serve", "--config"]).arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().expect("setpriv of util-linux is installed")
}

fn read_along(child: &mut Child, log: &Arc<Mutex<String>>) {
    let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let mut log = log.lock().expect("no panic");
            log.push_str(&line);
            log.push('\n');
        }
    });
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let log = self.log();
        if !std::thread::panicking() {
            assert!(!log.contains("panicked at"), "{log}");
        }
    }
}

/// A tenant of one proxy.
#[derive(Clone, Debug)]
pub struct Org<'a> {
    pub proxy: &'a Proxy,
    pub org: OrgId,
}

impl Org<'_> {
    pub fn token(&self) -> String {
        self.token_for(Duration::from_secs(3600))
    }

    /// A token that lives for `ttl` from now.
    pub fn token_for(&self, ttl: Duration) -> String {
        let identity = self.proxy.config.identity.as_ref().expect("configured");
        let secret = identity.secret().expect("readable").expect("given");
        mint::token(&secret, ISSUER, "authenticated", &self.org, &mint::subject(&self.org), ttl, SystemTime::now())
    }

    /// A new service key, and what revokes it.
    pub fn key(&self) -> (String, KeyHash) {
        let key = service_key::mint().expect("randomness");
        let record = ServiceKey { hash: key.hash(), org: self.org.clone(), user: "app".into(), expires_at: None };
        block_on(async { self.proxy.catalog().await.create_key(KeyRecord::new(record)).await.expect("kept") });
        (key.reveal().to_owned(), key.hash())
    }

    pub fn revoke(&self, key: &KeyHash) {
        block_on(async { self.proxy.catalog().await.revoke_key(key).await.expect("revoked") });
    }

    /// Changes the record.
    pub fn edit(&self, change: impl FnOnce(&mut Tenant) + Send) {
        block_on(async {
            let catalog = self.proxy.catalog().await;
            let mut record = catalog.get(&self.org).await.expect("its record");
            let epoch = record.tenant.epoch;
            change(&mut record.tenant);
            record.tenant.epoch += 1;
            catalog.put(record, Expect::Epoch(epoch)).await.expect("written");
        });
    }

    /// A logged-in client that speaks raw protocol.
    pub fn wire(&self) -> Wire {
        self.wire_with(&[])
    }

    /// The same with further startup parameters.
    pub fn wire_with(&self, parameters: &[(&str, &str)]) -> Wire {
        Wire::login(self.proxy.address(), &self.token(), parameters).unwrap_or_else(|error| panic!("{error:?}"))
    }

    /// A connection string for drivers.
    pub fn url(&self) -> String {
        format!("postgres://app:{}@127.0.0.1:{}/app", self.token(), self.proxy.port)
    }

    /// A driver's connection.
    pub async fn connect(&self) -> tokio_postgres::Client {
        let (client, connection) =
            tokio_postgres::connect(&self.url(), tokio_postgres::NoTls).await.expect("a connection");
        tokio::spawn(connection);
        client
    }

    /// Its role on the server, which is its database's name too.
    pub fn role(&self) -> String {
        self.proxy.config.names().expect("our own").base(&self.org)
    }

    /// The administrator's URL into its database.
    pub fn behind(&self) -> String {
        let database = self.proxy.config.names().expect("our own").postgres(&self.org, "app").database;
        let (server, _) = self.proxy.server.url.rsplit_once('/').expect("a database");
        format!("{server}/{database}")
    }

    /// The tenant's own role straight at the server, past the proxy.
    pub fn direct(&self) -> Wire {
        let names = self.proxy.config.names().expect("our own");
        let place = names.postgres(&self.org, "app");
        let password = names.password("postgres", &self.org, 1);
        // Its connection limit is dynabase's to use up.
        self.proxy.server.sql(&format!("alter role {} connection limit -1", place.role));
        let address = (Ipv4Addr::LOCALHOST, self.proxy.server.port).into();
        Wire::login_as(address, password.expose(), &place.role, &place.database, &[("application_name", "dynabase")])
            .unwrap_or_else(|error| panic!("{error:?}"))
    }

    /// Backends of its role on the server, as the server counts them.
    pub fn backends(&self) -> u32 {
        let role = self.role();
        let count = format!("select count(*) from pg_stat_activity where usename = '{role}'");
        self.proxy.server.value(&count).parse().expect("a number")
    }

    /// Client sockets and upstream connections, as dynabase counts them.
    pub fn counted(&self) -> (u64, u64) {
        let view: Value = serde_json::from_str(&self.proxy.admin(&format!("/v1/tenants/{}", self.org))).expect("JSON");
        let protocols = view["protocols"].as_array().cloned().unwrap_or_default();
        let postgres = protocols.iter().find(|one| one["protocol"] == "postgres").cloned().unwrap_or_default();
        let used = |what: &str| postgres[what]["used"].as_u64().unwrap_or(0);
        (used("sessions"), used("connections"))
    }

    /// Waits until nobody is connected and all places are given back but those of `idle` pooled connections.
    pub fn settles(&self, idle: u64) {
        until("sessions and connections are given back", || {
            let (sessions, connections) = self.counted();
            sessions == 0 && connections <= idle
        });
    }
}
