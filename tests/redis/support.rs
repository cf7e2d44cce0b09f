//! A real Redis server, a front before it, and clients that speak raw bytes. No assertions here.

use std::{
    collections::HashMap,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use dynabase::{
    front::redis::{Config, Server, commands},
    identity::{self, Secret, Verifier, mint},
    net::{ClientTls, Conn, Drain, Peer, Raw, ServerTls, Stream, TlsMode},
    quota::Table,
    session::Gate,
    tenant::{
        Names, OrgId, Status, Tenant, Tier, Tiers,
        directory::{Absent, Ask, Directory},
        namespace::{NameStyle, Password, RootSecret},
    },
    upstream::redis::{Target, Upstream, Via},
    usage::Meters,
    wire::resp,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const SECRET: &str = "a secret of at least thirty-two bytes, for tests";
pub const PLATFORM: &str = "platform-password";

pub struct Redis {
    child: Child,
    pub port: u16,
    pub folder: tempfile::TempDir,
    options: Vec<String>,
}

pub use super::super::support::free_port;

impl Redis {
    /// Starts a server; `password` is asked of `default` if it is not empty.
    pub async fn start(password: &str) -> Self {
        let mut options = vec!["--databases", "4096"];
        if !password.is_empty() {
            options.extend(["--requirepass", password]);
        }
        Self::with(tempfile::tempdir().expect("a folder"), free_port(), &options).await
    }

    /// Starts one with these options.
    pub async fn with(folder: tempfile::TempDir, port: u16, options: &[&str]) -> Self {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let child = Self::spawn(port, folder.path(), &options).await;
        Self { child, port, folder, options }
    }

    /// Starts it once more, empty, after [`Self::kill`].
    pub async fn start_again(&mut self) {
        self.child = Self::spawn(self.port, self.folder.path(), &self.options).await;
    }

    async fn spawn(port: u16, folder: &std::path::Path, options: &[String]) -> Child {
        let mut command = Command::new("redis-server");
        command
            .args(["--port", &port.to_string(), "--save", "", "--appendonly", "no"])
            .args(["--sanitize-dump-payload", "clients", "--bind", "127.0.0.1", "--dir"])
            .arg(folder)
            .args(options)
            .stdout(Stdio::null());
        let child = command.spawn().expect("redis-server is installed");
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        child
    }

    /// The platform's own client of this server.
    pub async fn admin(&self) -> Client {
        let mut client = Client::connect(self.port).await;
        assert_eq!(client.run(&["AUTH", PLATFORM]).await, "+OK");
        client
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What stands behind the front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A server with a database for each tenant.
    Own,
    /// A server with a single database.
    One,
    /// A cluster of three masters.
    Cluster,
}

thread_local! {
    static KIND: std::cell::Cell<Kind> = const { std::cell::Cell::new(Kind::Own) };
}

/// Runs a test before servers of another kind.
pub fn on(kind: Kind, test: fn()) {
    KIND.set(kind);
    test();
    KIND.set(Kind::Own);
}

pub fn kind() -> Kind {
    KIND.get()
}

/// Three masters that know each other and share the slots.
pub async fn cluster() -> Vec<Redis> {
    let mut nodes = Vec::new();
    let mut buses = Vec::new();
    for _ in 0..3 {
        let (port, bus) = (free_port(), free_port().to_string());
        let options = [
            "--cluster-enabled",
            "yes",
            "--cluster-port",
            &bus,
            "--cluster-node-timeout",
            "1500",
            "--requirepass",
            PLATFORM,
            "--masterauth",
            PLATFORM,
        ];
        nodes.push(Redis::with(tempfile::tempdir().expect("a folder"), port, &options).await);
        buses.push(bus);
    }
    for (i, (node, slots)) in nodes.iter().zip(["0 5460", "5461 10922", "10923 16383"]).enumerate() {
        let mut admin = node.admin().await;
        assert_eq!(admin.line(&format!("CLUSTER ADDSLOTSRANGE {slots}")).await, "+OK");
        let next = (i + 1) % 3;
        let meet = format!("CLUSTER MEET 127.0.0.1 {} {}", nodes[next].port, buses[next]);
        assert_eq!(admin.line(&meet).await, "+OK");
    }
    for node in &nodes {
        let mut admin = node.admin().await;
        while !admin.line("CLUSTER INFO").await.contains("cluster_state:ok")
            || admin.line("CLUSTER SLOTS").await.matches("127.0.0.1").count() < 3
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    nodes
}

pub struct House {
    /// The other nodes of a cluster.
    pub more: Vec<Redis>,
    pub redis: Redis,
    pub port: u16,
    pub table: Arc<Table>,
    tenants: HashMap<String, Arc<Tenant>>,
    tiers: String,
    target: Target,
}

pub fn tenant(org: &str, tier: Tier, epoch: u64) -> Tenant {
    Tenant {
        org: OrgId::parse(org).expect("an id"),
        tier,
        status: Status::Active,
        epoch,
        generation: 1,
        databases: Vec::new(),
        users: Vec::new(),
        routes: Default::default(),
        still: false,
    }
}

pub fn names() -> Names {
    Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Plain)
}

/// The way to a server on this machine.
pub fn target(port: u16) -> Target {
    Target {
        address: format!("127.0.0.1:{port}"),
        others: Vec::new(),
        via: Via::Itself,
        tls: ClientTls::new(TlsMode::Disable, None).expect("no TLS"),
        user: None,
        password: Some(Password::new(PLATFORM)),
    }
}

async fn front(
    target: Target,
    tls: Option<Arc<ServerTls>>,
    tenants: &HashMap<String, Arc<Tenant>>,
    tiers: &str,
) -> (u16, Arc<Table>) {
    let (directory, mut asks) = Directory::new();
    let known = tenants.clone();
    tokio::spawn(async move {
        while let Some(ask) = asks.recv().await {
            match ask {
                Ask::Tenant(org, answer) => {
                    let _ = answer.send(known.get(org.as_str()).cloned().ok_or(Absent::Unknown));
                }
                Ask::Key(_, answer) => {
                    let _ = answer.send(Err(Absent::Unknown));
                }
            }
        }
    });
    let mut config = identity::Config::new("https://test.supabase.co/auth/v1");
    config.hs256_secret = Some(Secret::new(SECRET));
    let verifier = Arc::new(Verifier::new(&config, directory.clone()).expect("a verifier"));
    let table = Arc::new(Table::new(directory, Tiers::parse(tiers).expect("tiers"), 1000));
    let ticking = Arc::clone(&table);
    tokio::spawn(async move { ticking.run_ticker().await });
    let gate = Arc::new(Gate::new(verifier, Arc::clone(&table), Arc::new(Meters::default()), false));
    let upstream = Upstream::new(target, names(), commands::for_acl());
    let server = Server::new(gate, upstream, tls, Config::default(), Drain::new());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        static IDS: AtomicU64 = AtomicU64::new(1);
        while let Ok((tcp, peer)) = listener.accept().await {
            let _ = tcp.set_nodelay(true);
            let conn = Conn {
                id: IDS.fetch_add(1, Ordering::Relaxed),
                peer: Peer::Ip(peer),
                local: true,
                stream: Stream::Plain(Raw::Tcp(tcp)),
                unauthenticated: None,
            };
            tokio::spawn(Arc::clone(&server).serve(conn));
        }
    });
    (port, table)
}

impl House {
    pub async fn start() -> Self {
        Self::with_tiers(include_str!("../../config/tiers.toml")).await
    }

    pub async fn with_tiers(tiers: &str) -> Self {
        match kind() {
            Kind::Own => {
                let redis = Redis::start(PLATFORM).await;
                let target = target(redis.port);
                Self::before(redis, target, None, tiers).await
            }
            Kind::One => {
                let options = ["--databases", "1", "--requirepass", PLATFORM];
                let redis = Redis::with(tempfile::tempdir().expect("a folder"), free_port(), &options).await;
                let target = target(redis.port);
                Self::before(redis, target, None, tiers).await
            }
            Kind::Cluster => {
                let mut nodes = cluster().await;
                let mut target = target(nodes[0].port);
                target.others = nodes[1..].iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
                target.via = Via::Cluster;
                let mut house = Self::before(nodes.remove(0), target, None, tiers).await;
                house.more = nodes;
                house
            }
        }
    }

    /// A front before a server that was started in some other way.
    pub async fn before(redis: Redis, target: Target, tls: Option<Arc<ServerTls>>, tiers: &str) -> Self {
        let tenants: HashMap<String, Arc<Tenant>> = [
            ("acme", Tier::Free),
            ("globex", Tier::Starter),
            ("initech", Tier::Pro),
            ("umbrella", Tier::Enterprise),
            ("hooli", Tier::Enterprise),
        ]
        .into_iter()
        .map(|(org, tier)| (org.to_owned(), Arc::new(tenant(org, tier, 1))))
        .collect();
        let (port, table) = front(target.clone(), tls, &tenants, tiers).await;
        Self { more: Vec::new(), redis, port, table, tenants, tiers: tiers.to_owned(), target }
    }

    /// The way to the server, as another part of the platform has it.
    pub fn upstream(&self) -> Arc<Upstream> {
        Upstream::new(self.target.clone(), names(), commands::for_acl())
    }

    /// Another dynabase process before the same server: its port.
    pub async fn second_front(&self) -> u16 {
        front(self.target.clone(), None, &self.tenants, &self.tiers).await.0
    }

    pub fn token(&self, org: &str) -> String {
        let org = OrgId::parse(org).expect("an id");
        mint::token(
            &Secret::new(SECRET),
            "https://test.supabase.co/auth/v1",
            "authenticated",
            &org,
            &mint::subject(&org),
            Duration::from_secs(3600),
            SystemTime::now(),
        )
    }

    pub fn set_tier(&self, org: &str, tier: Tier, epoch: u64) {
        assert!(self.tenants.contains_key(org));
        self.table.apply(Arc::new(tenant(org, tier, epoch))).expect("a newer epoch");
    }

    /// A logged-in client of a tenant.
    pub async fn client(&self, org: &str) -> Client {
        let mut client = Client::connect(self.port).await;
        let token = self.token(org);
        assert_eq!(client.run(&["AUTH", "app", &token]).await, "+OK");
        client
    }

    /// The same in RESP3.
    pub async fn client3(&self, org: &str) -> Client {
        let mut client = self.client(org).await;
        assert!(client.run(&["HELLO", "3"]).await.starts_with('%'));
        client
    }

    /// The platform's own client, behind the front.
    pub async fn admin(&self) -> Client {
        self.redis.admin().await
    }
}

/// A client that shows replies as text: `+OK`, `"bulk"`, `[…]`, `(nil)` for both nulls of RESP2.
pub struct Client {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub async fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("it accepts");
        stream.set_nodelay(true).expect("a socket");
        Self { stream, buffer: Vec::new() }
    }

    pub async fn send(&mut self, words: &[&str]) {
        self.send_raw(&words.iter().map(|word| word.as_bytes()).collect::<Vec<_>>()).await;
    }

    pub async fn send_raw(&mut self, words: &[&[u8]]) {
        let mut out = Vec::new();
        resp::put_request(&mut out, words);
        self.stream.write_all(&out).await.expect("it reads");
    }

    /// The next frame's bytes; `None` at the end of the stream.
    pub async fn frame(&mut self) -> Option<Vec<u8>> {
        loop {
            let (len, done) = resp::Reply::default().advance(&self.buffer).expect("a reply");
            if done {
                return Some(self.buffer.drain(..len).collect());
            }
            let read = tokio::time::timeout(Duration::from_secs(10), self.stream.read_buf(&mut self.buffer));
            if read.await.expect("an answer in time").unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub async fn reply(&mut self) -> String {
        match self.frame().await {
            Some(frame) => show(&frame),
            None => "(closed)".to_owned(),
        }
    }

    pub async fn run(&mut self, words: &[&str]) -> String {
        self.send(words).await;
        self.reply().await
    }

    /// Words separated by blanks.
    pub async fn line(&mut self, line: &str) -> String {
        self.run(&line.split(' ').collect::<Vec<_>>()).await
    }
}

pub fn show(frame: &[u8]) -> String {
    let mut cursor = resp::Cursor { rest: frame };
    value(&mut cursor)
}

fn value(cursor: &mut resp::Cursor<'_>) -> String {
    match cursor.item() {
        Some(resp::Item::Bulk(bytes)) => format!("\"{}\"", bytes.escape_ascii()),
        Some(resp::Item::Many(mark, count)) => {
            let inner: Vec<String> = (0..count).map(|_| value(cursor)).collect();
            let sign = if mark == b'*' { String::new() } else { char::from(mark).to_string() };
            format!("{sign}[{}]", inner.join(" "))
        }
        Some(resp::Item::Other(b"$-1\r\n")) => "(nil)".to_owned(),
        Some(resp::Item::Other(b"*-1\r\n")) => "(nil*)".to_owned(),
        Some(resp::Item::Other(bytes)) => String::from_utf8_lossy(bytes).trim_end().to_owned(),
        None => "(nothing)".to_owned(),
    }
}
