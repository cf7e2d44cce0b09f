//! How often serving one MongoDB request asks for memory, and for how many bytes: from the client's bytes to the
//! server's and back. The front runs on this thread alone, whose requests are counted; the client and a server that
//! answers at once run on others. Counts do not depend on the machine, nor on the profile. Run:
//! `cargo bench --bench mongo_allocations`.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, SystemTime},
};

use bson::{Document, doc};
use dynabase::{
    front::mongo::{Config, Server},
    identity::{self, Secret, Verifier, mint},
    net::{ClientTls, Conn, Drain, Peer, Raw, Stream, TlsMode},
    quota::Table,
    session::Gate,
    tenant::{
        Names, OrgId, Tenant, Tier, Tiers,
        directory::{Absent, Ask, Directory},
        namespace::{NameStyle, RootSecret},
    },
    upstream::mongo::{Target, Upstream},
    usage::Meters,
    wire::mongo::{self, HEADER_BYTES},
};
use tokio::sync::oneshot;

const SECRET: &str = "a secret of at least thirty-two bytes, for measuring";
const ISSUER: &str = "https://bench.dynabase.invalid/auth/v1";

/// A tenant of each isolation.
const TENANTS: [(&str, Tier); 2] = [("globex", Tier::Starter), ("umbrella", Tier::Enterprise)];

/// Requests before those that are counted: what is made once is there then.
const BEFORE: u32 = 100;

/// Requests that are counted.
const COUNTED: u32 = 2000;

/// What the client is to do: send this so often, then tell.
type Order = (Vec<u8>, u32, oneshot::Sender<()>);

fn bytes(document: &Document) -> Vec<u8> {
    bson::serialize_to_vec(document).expect("encodes")
}

fn message(body: &Document) -> Vec<u8> {
    let mut out = Vec::new();
    mongo::begin_message(&mut out, 0, 0);
    out.extend(bytes(body));
    mongo::end(&mut out, 0);
    out
}

/// Reads one message.
fn receive(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; HEADER_BYTES];
    stream.read_exact(&mut message).ok()?;
    let length = u32::from_le_bytes(message[..4].try_into().expect("four bytes"));
    message.resize(usize::try_from(length).expect("small"), 0);
    stream.read_exact(&mut message[HEADER_BYTES..]).ok()?;
    Some(message)
}

/// A server that answers at once; gives its port.
fn server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accepted");
            stream.set_nodelay(true).expect("a socket");
            thread::spawn(move || {
                while let Some(asked) = receive(&mut stream) {
                    let body = Document::from_reader(&asked[HEADER_BYTES + 5..]).expect("a body");
                    let mut told = message(&answer(&body));
                    told[8..12].copy_from_slice(&asked[4..8]);
                    stream.write_all(&told).expect("it listens");
                }
            });
        }
    });
    port
}

fn answer(asked: &Document) -> Document {
    let database = asked.get_str("$db").unwrap_or_default();
    let order = doc! { "_id": 1, "customer": "c-000123", "status": "open", "total": 99.5 };
    let cursor = |name: &str, batch: Vec<Document>| {
        doc! { "cursor": { "firstBatch": batch, "id": 0_i64, "ns": format!("{database}.{name}") }, "ok": 1.0 }
    };
    match asked.keys().next().map(String::as_str) {
        Some("hello") => doc! { "isWritablePrimary": true, "maxWireVersion": 25, "ok": 1.0 },
        Some("find" | "aggregate") => cursor("orders", vec![order]),
        Some("listCollections") => {
            cursor("$cmd.listCollections", vec![doc! { "name": "orders", "type": "collection" }])
        }
        Some("update") => doc! { "n": 1, "nModified": 1, "ok": 1.0 },
        _ => doc! { "n": 1, "ok": 1.0 },
    }
}

/// A client that logs in as each tenant and does what it is told.
fn client(port: u16, org: &OrgId) -> mpsc::Sender<Order> {
    let life = Duration::from_secs(3600);
    let token =
        mint::token(&Secret::new(SECRET), ISSUER, "authenticated", org, &mint::subject(org), life, SystemTime::now());
    let (orders, received) = mpsc::channel::<Order>();
    thread::spawn(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it accepts");
        stream.set_nodelay(true).expect("a socket");
        let payload =
            bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: format!("\0app\0{token}").into() };
        let login = doc! { "saslStart": 1, "mechanism": "PLAIN", "payload": payload, "$db": "$external" };
        stream.write_all(&message(&login)).expect("it listens");
        let told = receive(&mut stream).expect("an answer");
        assert!(
            Document::from_reader(&told[HEADER_BYTES + 5..]).is_ok_and(|it| it.get_bool("done").ok() == Some(true))
        );
        while let Ok((request, times, done)) = received.recv() {
            for _ in 0..times {
                stream.write_all(&request).expect("it listens");
                let told = receive(&mut stream).expect("an answer");
                let body = Document::from_reader(&told[HEADER_BYTES + 5..]).expect("a body");
                assert_eq!(body.get_f64("ok").ok(), Some(1.0), "{body}");
            }
            let _ = done.send(());
        }
    });
    orders
}

/// Both tiers alike, counted and never met.
fn tiers() -> Tiers {
    let text = include_str!("../config/tiers.toml");
    let text = text.replace("per_second = 200, burst = 400", "per_second = 4000000, burst = 8000000");
    Tiers::parse(&text.replace("per_second = 20000, burst = 40000", "per_second = 4000000, burst = 8000000"))
        .expect("tiers")
}

/// The front, on this thread; gives its port.
async fn front(behind: u16) -> u16 {
    let org = |name: &str| OrgId::parse(name).expect("an id");
    let tenants: HashMap<String, Arc<Tenant>> = TENANTS
        .iter()
        .map(|&(name, tier)| (name.to_owned(), Arc::new(Tenant { epoch: 1, ..Tenant::new(org(name), tier) })))
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
    let mut config = identity::Config::new(ISSUER);
    config.hs256_secret = Some(Secret::new(SECRET));
    let verifier = Arc::new(Verifier::new(&config, directory.clone()).expect("a verifier"));
    let table = Arc::new(Table::new(directory, tiers(), 1000));
    let ticking = Arc::clone(&table);
    tokio::spawn(async move { ticking.run_ticker().await });
    let gate = Arc::new(Gate::new(verifier, table, Arc::new(Meters::default()), false));
    let target = Target {
        addresses: vec![format!("127.0.0.1:{behind}")],
        tls: ClientTls::new(TlsMode::Disable, None).expect("no TLS"),
        login: None,
        replica_set: None,
        direct: true,
    };
    let names = Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Opaque);
    let config = Config { login_timeout: Duration::from_secs(20), issuer: ISSUER.into(), member: None };
    let server = Server::new(gate, Upstream::new(target, names), None, config, Drain::new()).expect("a front");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        let mut id = 0;
        while let Ok((tcp, peer)) = listener.accept().await {
            tcp.set_nodelay(true).expect("a socket");
            id += 1;
            let stream = Stream::Plain(Raw::Tcp(tcp));
            let conn = Conn { id, peer: Peer::Ip(peer), local: true, stream, unauthenticated: None };
            tokio::spawn(Arc::clone(&server).serve(conn));
        }
    });
    port
}

fn requests() -> Vec<(&'static str, Document)> {
    let lsid = bson::Binary { subtype: bson::spec::BinarySubtype::Uuid, bytes: vec![7; 16] };
    let with = |mut command: Document| {
        command.extend(doc! { "$db": "app", "lsid": { "id": lsid.clone() } });
        command
    };
    let order = |n: i32| doc! { "_id": n, "customer": "c-000123", "status": "open", "total": 99.5 };
    let open = doc! { "status": { "$in": ["open", "paid"] } };
    let join = doc! { "from": "customers", "localField": "customer", "foreignField": "_id", "as": "c" };
    vec![
        ("find by _id", with(doc! { "find": "orders", "filter": { "_id": 1 }, "limit": 1, "singleBatch": true })),
        ("find, sorted", with(doc! { "find": "orders", "filter": &open, "sort": { "at": -1 }, "limit": 20 })),
        ("count", with(doc! { "count": "orders", "query": &open })),
        ("insert 1", with(doc! { "insert": "orders", "documents": [order(1)], "ordered": true })),
        (
            "insert 100",
            with(doc! { "insert": "orders", "documents": (0..100).map(order).collect::<Vec<_>>(), "ordered": true }),
        ),
        (
            "update",
            with(
                doc! { "update": "orders", "updates": [{ "q": { "_id": 1 }, "u": { "$set": { "status": "paid" } } }] },
            ),
        ),
        (
            "aggregate, $lookup",
            with(doc! { "aggregate": "orders", "pipeline": [{ "$match": &open }, { "$lookup": join }], "cursor": {} }),
        ),
        ("ping", doc! { "ping": 1, "$db": "admin" }),
    ]
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let port = runtime.block_on(front(server()));
    let clients = TENANTS.map(|(name, _)| client(port, &OrgId::parse(name).expect("an id")));
    println!("| request | filter: allocations | KB | database: allocations | KB |");
    println!("|---|---|---|---|---|");
    for (name, request) in requests() {
        let request = message(&request);
        let cells = clients.each_ref().map(|orders| {
            let run = |times: u32| {
                let (done, told) = oneshot::channel();
                orders.send((request.clone(), times, done)).expect("it lives");
                runtime.block_on(told).expect("all were answered");
            };
            run(BEFORE);
            let counted = allocation_counter::measure(|| run(COUNTED));
            // A share of what the runtime asks for now and then is in it.
            let each = |total: u64| total as f64 / f64::from(COUNTED);
            format!("{:.1} | {:.1}", each(counted.count_total), each(counted.bytes_total) / 1024.0)
        });
        println!("| {name} | {} |", cells.join(" | "));
    }
}
