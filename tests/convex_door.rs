//! What outsiders and crowded tenants can do to others at Convex's door; before a deployment that answers everything.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use dynabase::tenant::{Status, Tier};
use futures_util::{SinkExt, StreamExt};
use jsonwebtoken::{DecodingKey, Validation, jwk::JwkSet};
use serde_json::Value;
use tokio_tungstenite::{WebSocketStream, client_async, tungstenite::Message};

use crate::{
    neon::door,
    support::{
        PATIENCE, eventually, postgres,
        proxy::{Limits, Proxy, Setup},
    },
};

/// Sync sockets that a tenant may have open beside those that are served.
const WAITING: usize = 32;

/// A deployment: whatever is asked gets the same answer, once its body is there.
#[derive(Clone)]
struct Deployment {
    port: u16,
    /// Requests whose head has come.
    heads: Arc<AtomicU32>,
    /// Locked, files are not answered.
    files: Arc<Mutex<()>>,
    /// The credential that came last.
    shown: Arc<Mutex<String>>,
}

impl Deployment {
    fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let heads = Arc::new(AtomicU32::new(0));
        let deployment = Self { port, heads, files: Arc::default(), shown: Arc::default() };
        let told = deployment.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, told) = (stream.expect("a connection"), told.clone());
                std::thread::spawn(move || told.answer(stream));
            }
        });
        deployment
    }

    fn answer(&self, mut stream: TcpStream) {
        let (mut got, mut piece) = (Vec::new(), [0; 4096]);
        let mut missing = None;
        while missing.is_none_or(|missing| missing > got.len()) {
            match stream.read(&mut piece) {
                Ok(n @ 1..) => got.extend_from_slice(&piece[..n]),
                _ => return,
            }
            let Some(end) = got.windows(4).position(|it| it == b"\r\n\r\n") else { continue };
            if missing.is_none() {
                self.heads.fetch_add(1, Ordering::SeqCst);
                let head = String::from_utf8_lossy(&got[..end]);
                let credential = head
                    .lines()
                    .find_map(|line| line.split_once(": ").filter(|it| it.0.eq_ignore_ascii_case("authorization")));
                if let Some((_, credential)) = credential {
                    *self.shown.lock().expect("no panic") = credential.to_owned();
                }
                let head = head.to_lowercase();
                let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
                missing = Some(end + 4 + length.unwrap_or(0));
            }
        }
        if got.starts_with(b"GET /api/storage/") {
            drop(self.files.lock());
        }
        let _ = write!(stream, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}");
    }

    fn setup(&self, free: Limits) -> Setup {
        Setup {
            listen: "http = \"127.0.0.1:0\"".into(),
            sections: format!(
                "[upstream.convex]\nurl = \"http://127.0.0.1:{}\"\npublic_url = \"http://127.0.0.1:8080\"\n\
                 domain = \"example.test\"",
                self.port
            ),
            ..Setup::free(free)
        }
    }
}

/// Sends a request's head and the beginning of its body.
fn begin(port: u16, head: &str, length: usize, body: &str) -> TcpStream {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the door");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    write!(socket, "{head}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").expect("sent");
    socket
}

/// The answer's status and text.
fn end(mut socket: TcpStream) -> (u16, String) {
    let mut answer = Vec::new();
    let read = socket.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).expect("text");
    let status = answer.split(' ').nth(1).and_then(|it| it.parse().ok());
    (status.unwrap_or_else(|| panic!("no answer: {read:?}")), answer)
}

#[test]
fn who_shows_no_token_does_not_use_up_a_tenant_s_limits() {
    let deployment = Deployment::start();
    let rate = "{ per_minute = 15, burst = 60, over = \"refuse\", max_delay = \"1s\" }";
    let proxy = Proxy::start(&deployment.setup(Limits { rate, ..Limits::default() }));
    let port = door(&proxy);
    let org = proxy.tenant("opendoor", Tier::Free);
    let own = |path: &str| {
        let body = r#"{"path":"a:b","args":{},"format":"json"}"#;
        let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}", org.token());
        end(begin(port, &head, body.len(), body))
    };
    let hook = "POST /http/hook HTTP/1.1\r\nHost: opendoor.example.test";
    // Half of the eight writes that may be under way, and no more.
    let held: Vec<TcpStream> = (0..4).map(|_| begin(port, hook, 1000, "x")).collect();
    eventually("all are under way", || (deployment.heads.load(Ordering::SeqCst) == 4).then_some(()));
    let (status, answer) = end(begin(port, hook, 1, "x"));
    assert!(status == 429 && answer.contains("in_flight"), "{answer}");
    let (status, answer) = own("/api/mutation");
    assert_eq!(status, 200, "{answer}");
    // Whoever does not go on loses the place.
    for socket in held {
        let (status, answer) = end(socket);
        assert!(status == 400 && answer.contains("the body did not come"), "{answer}");
    }
    assert_eq!(end(begin(port, hook, 1, "x")).0, 200);
    let hello = "GET /http/hello HTTP/1.1\r\nHost: opendoor.example.test";
    let told: Vec<u16> = (0..70).map(|_| end(begin(port, hello, 0, "")).0).collect();
    assert!(told.contains(&200) && told.contains(&429), "{told:?}");
    let (status, answer) = own("/api/query");
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn who_shows_no_token_has_half_of_a_tenant_s_client_sockets() {
    /// What a FREE tenant of these tests may have.
    const SOCKETS: u32 = 50;
    let deployment = Deployment::start();
    let proxy = Proxy::start(&deployment.setup(Limits::default()));
    let port = door(&proxy);
    let org = proxy.tenant("openfiles", Tier::Free);
    let file = "GET /api/storage/8dc8a8bb-13ec-48d9-a321-785d7178358a HTTP/1.1\r\nHost: openfiles.example.test";
    let closed = deployment.files.lock().expect("no panic");
    let held: Vec<TcpStream> = (0..SOCKETS / 2).map(|_| begin(port, file, 0, "")).collect();
    eventually("all are under way", || (deployment.heads.load(Ordering::SeqCst) == SOCKETS / 2).then_some(()));
    let (status, answer) = end(begin(port, file, 0, ""));
    assert!(status == 429 && answer.contains("client_sockets"), "{answer}");
    // The tenant's own find room beside them.
    let body = r#"{"path":"a:b","args":{},"format":"json"}"#;
    let head = format!("POST /api/query HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}", org.token());
    let (status, answer) = end(begin(port, &head, body.len(), body));
    assert_eq!(status, 200, "{answer}");
    drop(closed);
    for socket in held {
        assert_eq!(end(socket).0, 200);
    }
    eventually("the places are given back", || (end(begin(port, file, 0, "")).0 == 200).then_some(()));
}

#[test]
fn a_deployment_that_trusts_what_tenant_show_prints_takes_the_tokens_that_it_gets() {
    let deployment = Deployment::start();
    let proxy = Proxy::start(&deployment.setup(Limits::default()));
    let port = door(&proxy);
    let org = proxy.tenant("printed", Tier::Free);
    let (code, out, err) = proxy.command(&["tenant", "show", "printed", "--json"], &[]);
    assert_eq!(code, Some(0), "{err}");
    let shown: Value = serde_json::from_str(&out).expect("JSON");
    let snippet = shown["convex"]["auth_config"].as_str().expect("text");
    let (_, plain, _) = proxy.command(&["tenant", "show", "printed"], &[]);
    assert!(plain.contains(snippet) && snippet.contains(r#"type: "customJwt""#), "{plain}");
    let value = |key: &str| {
        let line = snippet.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(": ")).expect("a line");
        line.trim_end_matches(',').trim_matches('"').to_owned()
    };
    // As Convex reads it: the keys from there, and nothing but what is said there.
    let path = value("jwks").strip_prefix("http://127.0.0.1:8080").expect("below the public URL").to_owned();
    let (status, answer) = end(begin(port, &format!("GET {path} HTTP/1.1\r\nHost: x"), 0, ""));
    assert_eq!(status, 200, "{answer}");
    let keys: JwkSet = serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("a key set");
    let body = r#"{"path":"a:b","args":{},"format":"json"}"#;
    let head = format!("POST /api/query HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}", org.token());
    assert_eq!(end(begin(port, &head, body.len(), body)).0, 200);
    let credential = deployment.shown.lock().expect("no panic").clone();
    let token = credential.strip_prefix("Bearer ").expect("a bearer token");
    let algorithm = value("algorithm").parse().expect("an algorithm");
    let header = jsonwebtoken::decode_header(token).expect("a token");
    let key = keys.find(&header.kid.expect("Convex needs it")).expect("its key is published");
    let mut validation = Validation::new(algorithm);
    validation.set_issuer(&[value("issuer")]);
    validation.set_audience(&[value("applicationID")]);
    validation.set_required_spec_claims(&["iss", "sub", "aud", "exp"]);
    let key = DecodingKey::from_jwk(key).expect("a key");
    let read = jsonwebtoken::decode::<Value>(token, &key, &validation).expect("it is taken");
    assert_eq!((&read.claims["org_id"], token == org.token()), (&Value::from("printed"), false));
    // One that is another deployment's is not.
    validation.set_audience(&["convex-shared-elsewhere"]);
    assert!(jsonwebtoken::decode::<Value>(token, &key, &validation).is_err());
}

type Socket = WebSocketStream<tokio::net::TcpStream>;

/// A sync socket that has shown its token, and the first answer to it.
async fn sync(port: u16, session: usize, token: &str) -> (Socket, Message) {
    let stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("the door");
    let (mut socket, _) = client_async("ws://x/api/1.48.0/sync", stream).await.expect("a socket");
    for frame in [
        format!(r#"{{"type":"Connect","sessionId":"s{session}","connectionCount":0,"lastCloseReason":null}}"#),
        format!(r#"{{"type":"Authenticate","baseVersion":0,"tokenType":"User","value":"{token}"}}"#),
    ] {
        socket.send(Message::text(frame)).await.expect("sent");
    }
    let answer = tokio::time::timeout(PATIENCE, socket.next()).await.expect("in time").expect("a word").expect("good");
    (socket, answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_can_t_be_served_are_few_of_one_tenant() {
    let deployment = Deployment::start();
    let proxy = Proxy::before(postgres::shared(), &deployment.setup(Limits::default()));
    let port = door(&proxy);
    let (crowd, other) = (proxy.tenant("crowd", Tier::Free), proxy.tenant("other", Tier::Free));
    for org in [&crowd, &other] {
        org.edit(|tenant| tenant.status = Status::Suspended);
        eventually("it is suspended", || {
            let body = r#"{"path":"a:b","args":{},"format":"json"}"#;
            let head = format!("POST /api/query HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}", org.token());
            (end(begin(port, &head, body.len(), body)).0 == 403).then_some(())
        });
    }
    let mut kept = Vec::new();
    for session in 0..WAITING {
        let (socket, answer) = sync(port, session, &crowd.token()).await;
        assert!(matches!(answer, Message::Text(_)), "{session}: {answer:?}");
        kept.push(socket);
    }
    let (_, answer) = sync(port, WAITING, &crowd.token()).await;
    let Message::Close(Some(frame)) = answer else { panic!("{answer:?}") };
    assert_eq!(u16::from(frame.code), 1013);
    assert!(frame.reason.starts_with("TooManyConcurrentRequests"), "clients come back in no hurry: {}", frame.reason);
    let (_other, answer) = sync(port, 0, &other.token()).await;
    assert!(matches!(answer, Message::Text(_)), "another tenant's are its own: {answer:?}");
    // A place that is left is free.
    drop(kept);
    let token = crowd.token();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !matches!(sync(port, WAITING + 1, &token).await.1, Message::Text(_)) {
        assert!(tokio::time::Instant::now() < deadline, "no place was given back");
    }
}
