//! What a Neon home costs and keeps: one budget of connections by every way in, none that would keep a compute awake, and
//! nothing that goes on after its client has gone.

use std::net::Ipv4Addr;

use dynabase::tenant::{Home, Protocol, Tier};
use futures_util::{SinkExt, StreamExt};
use http_body_util::Full;
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_tungstenite::{WebSocketStream, client_async, tungstenite::Message};

use crate::{
    neon::{ask_at, door, setup, sql, sql_in, tenant},
    support::{
        PATIENCE, eventually, postgres,
        proxy::{Org, Proxy},
        until,
    },
};

/// A message of the Postgres protocol.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("short");
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

/// A session over a WebSocket to that host, in which `query` was asked: until `tag` was heard.
async fn session(host: &str, port: u16, org: &Org<'_>, query: &str, tag: &str) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("the door");
    let (mut socket, _) = client_async(format!("ws://{host}/v2"), stream).await.expect("a socket");
    let startup = message(0, b"\0\x03\0\0user\0app\0database\0app\0\0")[1..].to_vec();
    let password = message(b'p', &[org.token().as_bytes(), b"\0"].concat());
    let query = message(b'Q', &[query.as_bytes(), b"\0"].concat());
    socket.send(Message::binary([startup, password, query].concat())).await.expect("sent");
    let mut heard = Vec::new();
    while !heard.windows(tag.len()).any(|it| it == tag.as_bytes()) {
        let frame = tokio::time::timeout(PATIENCE, socket.next()).await.expect("in time").expect("open").expect("good");
        heard.extend_from_slice(&frame.into_data());
    }
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn http_sockets_and_the_postgres_port_share_one_budget() {
    let mut setup = setup(&postgres::shared().url);
    setup.neon_connections = 2;
    let proxy = Proxy::start(&setup);
    let port = door(&proxy);
    let org = tenant(&proxy, "neon_budget", Tier::Pro);
    org.edit(|tenant| tenant.routes.postgres = Some(Home::Neon));
    sql(port, &org, "create table t (i int)");
    eventually("the new home is heard of", || (org.wire().code("select * from t") != "42P01").then_some(()));
    // One by the Postgres port, one by a socket: nothing is left for a request.
    let mut wire = org.wire();
    wire.query("begin");
    let mut socket = session("x", port, &org, "begin", "BEGIN\0Z").await;
    let (status, answer) = sql_in(port, &org, "app", "select 1");
    assert_eq!((status, &answer["code"]), (400, &json!("53300")), "{answer}");
    assert!(answer["detail"].as_str().expect("text").contains("limit=connections"), "{answer}");
    // Whichever of the two goes, its place is the request's.
    wire.query("commit");
    assert_eq!(sql(port, &org, "select 1 as one"), json!([{"one": 1}]));
    wire.query("begin");
    assert_eq!(sql_in(port, &org, "app", "select 1").1["code"], "53300");
    socket.close(None).await.expect("closed");
    eventually("the socket's place is free", || (sql_in(port, &org, "app", "select 1").0 == 200).then_some(()));
}

#[test]
fn an_idle_connection_is_let_alone_and_closed() {
    let mut setup = setup(&postgres::shared().url);
    setup.sections.push_str("\nidle_timeout = \"1s\"\n");
    let proxy = Proxy::start(&setup);
    let org = tenant(&proxy, "neon_idle", Tier::Pro);
    sql(door(&proxy), &org, "select 1");
    let role = proxy.config.names().expect("our own").sql(Protocol::Neon, &org.org, "app").role;
    let question =
        format!("select coalesce(max(state || state_change), '') from pg_stat_activity where usename = '{role}'");
    let look = || proxy.server.value(&question);
    let idle = eventually("it is idle", || Some(look()).filter(|it| it.starts_with("idle2")));
    // A compute goes to sleep by what was asked last, not by who is connected: nothing more is asked, until it is closed.
    until("it is closed", || {
        let now = look();
        assert!(now.is_empty() || now == idle, "{now}, not {idle}");
        now.is_empty()
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_taken_back_on_http_2_is_cancelled() {
    let proxy = Proxy::start(&setup(&postgres::shared().url));
    let port = door(&proxy);
    let org = tenant(&proxy, "neon_reset", Tier::Pro);
    sql(port, &org, "create table t (i int)");
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("the door");
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("HTTP/2 without TLS");
    tokio::spawn(connection);
    let ask = |query: &str| {
        let body = Full::new(Bytes::from(json!({ "query": query }).to_string()));
        let request = Request::post("http://x/sql")
            .header("Neon-Connection-String", format!("postgres://app:{}@x/app", org.token()))
            .body(body)
            .expect("a request");
        let mut sender = sender.clone();
        tokio::spawn(async move { sender.send_request(request).await })
    };
    let slow = ask("with w as (select pg_sleep(30)) insert into t select 1 from w /* neon_reset */");
    let running = || {
        let question =
            "select count(*) from pg_stat_activity where state = 'active' and query like 'with%/* neon_reset */'";
        proxy.server.value(question) == "1"
    };
    until("it runs", running);
    slow.abort();
    until("it no longer runs", || !running());
    // The others of the connection go on.
    let answer = ask("select count(*) from t").await.expect("no panic").expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(sql(port, &org, "select count(*)::int as n from t"), json!([{"n": 0}]));
}

#[tokio::test(flavor = "multi_thread")]
async fn at_a_tenant_s_own_host_nobody_else_s_token_opens_anything() {
    let mut setup = setup(&postgres::shared().url);
    setup.sections.push_str("\ndomain = \"db.example.test\"\n");
    let proxy = Proxy::start(&setup);
    let port = door(&proxy);
    let (mine, theirs) = (tenant(&proxy, "neon-mine", Tier::Pro), tenant(&proxy, "neon-theirs", Tier::Pro));
    let token = mine.token();
    let own = "neon-mine.db.example.test";
    for (host, named, good) in [
        // The driver's ways: the tenant's host in the string, `api` before the domain over HTTP.
        ("api.db.example.test", own, true),
        ("apiauth.db.example.test:8443", own, true),
        ("x", own, true),
        (own, "x", true),
        ("NEON-MINE.db.example.test.", "neon-mine.db.example.test:5432", true),
        ("x", "x", true),
        ("x", "neon-theirs.db.example.test", false),
        ("neon-theirs.db.example.test", "x", false),
        ("neon-theirs.db.example.test:8080", own, false),
        (own, "neon-theirs.db.example.test", false),
        ("x", "nobody.db.example.test", false),
    ] {
        let head = format!("POST /sql HTTP/1.1\r\nNeon-Connection-String: postgres://app:{token}@{named}/app");
        let (status, body) = ask_at(host, port, &head, r#"{"query":"select 1 as one"}"#);
        assert_eq!(status, if good { 200 } else { 400 }, "{host} {named}: {body}");
        assert_eq!(body.contains(r#""code":"28P01""#), !good, "{host} {named}: {body}");
        if named == "x" {
            let head = format!("GET /neon/branches HTTP/1.1\r\nAuthorization: Bearer {token}");
            assert_eq!(ask_at(host, port, &head, "").0, if good { 200 } else { 401 }, "{host}");
        }
    }
    session(own, port, &mine, "select 1", "SELECT 1\0Z").await;
    session("x", port, &mine, "select 1", "SELECT 1\0Z").await;
    session("neon-theirs.db.example.test", port, &mine, "select 1", "C28P01").await;
    session("neon-theirs.db.example.test", port, &theirs, "select 1", "SELECT 1\0Z").await;
}
