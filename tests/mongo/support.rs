//! A front, tenants and their tokens, clients that speak raw bytes, a server that does as it is told. No assertions.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bson::{Document, RawDocumentBuf, doc};
use dynabase::{
    front::mongo::{Config, Server, member::Settings},
    identity::{self, Secret, Verifier, mint},
    net::{ClientTls, Conn, Drain, Peer, Raw, ServerTls, Stream, TlsMode},
    quota::Table,
    session::Gate,
    tenant::{
        Isolation, Names, OrgId, Tenant, Tier, Tiers,
        directory::{Absent, Ask, Directory},
        namespace::{NameStyle, RootSecret},
    },
    upstream::mongo::{Target, Upstream},
    usage::Meters,
    wire::mongo::{self, HEADER_BYTES, Header, OP_MSG},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

const SECRET: &str = "a secret of at least thirty-two bytes, for tests";

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct House {
    pub port: u16,
    pub table: Arc<Table>,
    pub drain: Drain,
}

fn names() -> Names {
    Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Plain)
}

/// The way to the server on `port`, which asks for no login.
pub fn upstream(port: u16) -> Arc<Upstream> {
    let target = Target {
        addresses: vec![format!("127.0.0.1:{port}")],
        tls: ClientTls::new(TlsMode::Disable, None).expect("no TLS"),
        login: None,
        replica_set: None,
        direct: true,
    };
    Upstream::new(target, names())
}

pub fn tenant(org: &str, tier: Tier, epoch: u64) -> Tenant {
    Tenant { epoch, ..Tenant::new(OrgId::parse(org).expect("an id"), tier) }
}

pub fn token(org: &str) -> String {
    let org = OrgId::parse(org).expect("an id");
    let subject = mint::subject(&org);
    let (issuer, life) = ("https://test.supabase.co/auth/v1", Duration::from_secs(3600));
    mint::token(&Secret::new(SECRET), issuer, "authenticated", &org, &subject, life, SystemTime::now())
}

impl House {
    /// A front before the server on `port`, which asks for no login.
    pub async fn before(port: u16) -> Self {
        Self::with_tiers(port, include_str!("../../config/tiers.toml")).await
    }

    pub async fn with_tiers(port: u16, tiers: &str) -> Self {
        Self::start(port, tiers, None, None).await
    }

    /// A front that is seen as the primary of a set of one, on this machine or as `localhost` over TLS.
    pub async fn with_set(port: u16, set: &str, tls: Option<Arc<ServerTls>>) -> Self {
        Self::start(port, include_str!("../../config/tiers.toml"), tls, Some(set)).await
    }

    /// A front that speaks TLS alone; its clients come over a network.
    pub async fn with_tls(port: u16, tls: Arc<ServerTls>) -> Self {
        Self::start(port, include_str!("../../config/tiers.toml"), Some(tls), None).await
    }

    async fn start(port: u16, tiers: &str, tls: Option<Arc<ServerTls>>, set: Option<&str>) -> Self {
        let local = tls.is_none();
        let host = if local { "127.0.0.1" } else { "localhost" };
        let tenants: HashMap<String, Arc<Tenant>> =
            [("acme", Tier::Free), ("globex", Tier::Starter), ("initech", Tier::Pro), ("umbrella", Tier::Enterprise)]
                .into_iter()
                .map(|(org, tier)| (org.to_owned(), Arc::new(tenant(org, tier, 1))))
                .collect();
        let (directory, mut asks) = Directory::new();
        tokio::spawn(async move {
            while let Some(ask) = asks.recv().await {
                match ask {
                    Ask::Tenant(org, answer) => {
                        let _ = answer.send(tenants.get(org.as_str()).cloned().ok_or(Absent::Unknown));
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
        let upstream = upstream(port);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let member = set.map(|set| {
            let settings = Settings { replica_set: Some(set.into()), advertise: Some(format!("{host}:{port}")) };
            settings.member().expect("good").expect("there")
        });
        let config = Config { login_timeout: PATIENCE, issuer: "https://test.supabase.co/auth/v1".into(), member };
        let drain = Drain::new();
        let server = Server::new(gate, upstream, tls, config, drain.clone()).expect("a front");
        tokio::spawn(async move {
            static IDS: AtomicU64 = AtomicU64::new(1);
            while let Ok((tcp, peer)) = listener.accept().await {
                let _ = tcp.set_nodelay(true);
                let conn = Conn {
                    id: IDS.fetch_add(1, Ordering::Relaxed),
                    peer: Peer::Ip(peer),
                    local,
                    stream: Stream::Plain(Raw::Tcp(tcp)),
                    unauthenticated: None,
                };
                tokio::spawn(Arc::clone(&server).serve(conn));
            }
        });
        Self { port, table, drain }
    }

    /// A tenant's own physical database.
    pub fn place(&self, org: &str, database: &str) -> String {
        let place = names().mongodb(&OrgId::parse(org).expect("an id"), Isolation::Database);
        place.physical(database).expect("a name")
    }

    pub async fn stranger(&self) -> Client {
        Client::connect(self.port).await
    }

    /// A client that has logged in.
    pub async fn client(&self, org: &str) -> Client {
        let mut client = self.stranger().await;
        let told = client.log_in(&token(org)).await;
        assert_eq!(told.get_bool("done").ok(), Some(true), "{told}");
        client
    }

    /// What a driver of the tenant is configured with.
    pub fn url(&self, org: &str) -> String {
        format!("mongodb://app:{}@127.0.0.1:{}/app?authMechanism=PLAIN&directConnection=true", token(org), self.port)
    }

    /// What other clients would notice: a new one gets in and is answered.
    pub async fn is_well(&self) {
        let told = self.client("initech").await.run(doc! { "ping": 1, "$db": "admin" }).await;
        assert_eq!(told, doc! { "ok": 1.0 });
    }
}

pub fn plain(token: &str) -> Document {
    let payload = bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: format!("\0app\0{token}").into() };
    doc! { "saslStart": 1, "mechanism": "PLAIN", "payload": payload, "$db": "$external" }
}

pub fn bytes(document: &Document) -> Vec<u8> {
    RawDocumentBuf::try_from(document).expect("encodes").into_bytes()
}

/// A whole OP_MSG of one body.
pub fn message(id: i32, flags: u32, body: &[u8]) -> Vec<u8> {
    payload(id, OP_MSG, &[&flags.to_le_bytes()[..], &[0], body].concat())
}

/// A whole message.
pub fn payload(id: i32, opcode: i32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    mongo::begin(&mut out, id, 0, opcode);
    out.extend_from_slice(payload);
    mongo::end(&mut out, 0);
    out
}

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

    /// Sends bytes; whether they arrive is not known.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next message; `None` at the end.
    pub async fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        tokio::time::timeout(PATIENCE, receive(&mut self.stream, &mut self.buffer)).await.expect("an answer in time")
    }

    /// The next message's number and document; `None` at the end.
    pub async fn reply(&mut self) -> Option<(i32, Document)> {
        let (header, message) = self.receive().await?;
        assert_eq!(header.opcode, OP_MSG);
        Some((header.response_to, body(&message)))
    }

    pub async fn run(&mut self, command: Document) -> Document {
        self.run_raw(&bytes(&command)).await
    }

    pub async fn run_raw(&mut self, body: &[u8]) -> Document {
        static IDS: AtomicI32 = AtomicI32::new(1);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        self.send(&message(id, 0, body)).await;
        let (to, document) = self.reply().await.expect("an answer");
        assert_eq!(to, id);
        document
    }

    pub async fn log_in(&mut self, token: &str) -> Document {
        self.run(plain(token)).await
    }

    /// Waits until the other side has closed.
    pub async fn closed(&mut self) {
        while self.receive().await.is_some() {}
    }
}

async fn receive(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(Header, Vec<u8>)> {
    loop {
        if let Some(header) = Header::read(buffer, 100_000_000).expect("a header")
            && buffer.len() >= header.length
        {
            return Some((header, buffer.drain(..header.length).collect()));
        }
        if stream.read_buf(buffer).await.unwrap_or(0) == 0 {
            return None;
        }
    }
}

/// The document of an OP_MSG of one body.
pub fn body(message: &[u8]) -> Document {
    Document::from_reader(&message[HEADER_BYTES + 5..]).expect("a document")
}

/// What the server of ours does with a command.
pub enum Act {
    Answer(Document),
    Stall,
    Hang,
}

/// What happened at the server of ours.
#[derive(Debug, PartialEq)]
pub enum Event {
    Asked(Document),
    Closed,
}

/// Starts a server that answers hello and does with everything else as `act` says; gives its port and what happens.
pub async fn server(act: impl Fn(&Document) -> Act + Send + Sync + 'static) -> (u16, mpsc::UnboundedReceiver<Event>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let (happens, events) = mpsc::unbounded_channel();
    let act = Arc::new(act);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (happens, act) = (happens.clone(), Arc::clone(&act));
            tokio::spawn(async move {
                let mut buffer = Vec::new();
                while let Some((header, bytes)) = receive(&mut stream, &mut buffer).await {
                    let asked = body(&bytes);
                    let act = if asked.contains_key("hello") {
                        Act::Answer(doc! { "isWritablePrimary": true, "maxWireVersion": 27, "ok": 1.0 })
                    } else if let Some(there) = looked_for(&asked) {
                        Act::Answer(there)
                    } else {
                        let _ = happens.send(Event::Asked(asked.clone()));
                        act(&asked)
                    };
                    match act {
                        Act::Answer(document) => {
                            let mut out = Vec::new();
                            mongo::begin_message(&mut out, 0, header.request_id);
                            out.extend_from_slice(&super::support::bytes(&document));
                            mongo::end(&mut out, 0);
                            let _ = stream.write_all(&out).await;
                        }
                        Act::Stall => {}
                        Act::Hang => break,
                    }
                }
                let _ = happens.send(Event::Closed);
            });
        }
    });
    (port, events)
}

/// The answer to who looks whether collections are there: they are.
fn looked_for(asked: &Document) -> Option<Document> {
    asked.get("listCollections")?;
    let names = asked.get_document("filter").ok()?.get_document("name").ok()?.get_array("$in").ok()?;
    let batch: Vec<Document> = names.iter().map(|name| doc! { "name": name.clone(), "type": "collection" }).collect();
    Some(doc! { "cursor": { "id": 0_i64, "ns": "x.$cmd.listCollections", "firstBatch": batch }, "ok": 1.0 })
}

/// Waits for an event that `wanted` picks.
pub async fn wait(events: &mut mpsc::UnboundedReceiver<Event>, wanted: impl Fn(&Event) -> bool) -> Event {
    let find = async {
        loop {
            let event = events.recv().await.expect("the server lives");
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(PATIENCE, find).await.expect("it happens in time")
}

/// All that is asked up to what `last` picks.
pub async fn asked_until(
    events: &mut mpsc::UnboundedReceiver<Event>,
    last: impl Fn(&Document) -> bool,
) -> Vec<Document> {
    let mut all = Vec::new();
    loop {
        if let Event::Asked(command) = wait(events, |event| matches!(event, Event::Asked(_))).await {
            let done = last(&command);
            all.push(command);
            if done {
                return all;
            }
        }
    }
}
