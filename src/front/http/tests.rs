//! Raw bytes against the door.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;
use crate::net::{Peer, Raw};

fn door(first: Duration) -> (Arc<Server>, Drain) {
    let drain = Drain::new();
    (Server::new(Fronts::default(), None, Config { first_request_timeout: first }, drain.clone()), drain)
}

/// A client of the door, and the task that serves it.
fn connect(server: &Arc<Server>, space: usize) -> (DuplexStream, tokio::task::JoinHandle<()>) {
    let (near, far) = duplex(space);
    let stream = Stream::Plain(Raw::Memory(near));
    let conn = Conn { id: 1, peer: Peer::Unix, local: true, stream, unauthenticated: None };
    (far, tokio::spawn(Arc::clone(server).serve(conn)))
}

async fn ask(client: &mut DuplexStream, request: &str) -> String {
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        let n = client.read_buf(&mut answer).await.unwrap();
        assert!(n > 0, "closed after {:?}", String::from_utf8_lossy(&answer));
    }
    String::from_utf8(answer).unwrap()
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn paths_have_one_owner() {
    for (path, upgrade, wanted) in [
        ("/sql", false, Owner::Neon),
        ("/sql", true, Owner::Neon),
        ("/v2", true, Owner::Neon),
        ("/v1", true, Owner::Neon),
        ("/", true, Owner::Neon),
        ("/neon/branches", false, Owner::Neon),
        ("/neon/branches/x", false, Owner::Neon),
        ("/neonlights", false, Owner::Convex),
        ("/sql/", false, Owner::Convex),
        ("/v2", false, Owner::Convex),
        ("/api/sync", true, Owner::Convex),
        ("/api/1.48.0/sync", true, Owner::Convex),
        ("/api/query", false, Owner::Convex),
        ("/version", false, Owner::Convex),
        ("/http/hook", false, Owner::Convex),
    ] {
        assert_eq!(owner(path, upgrade), wanted, "{path} {upgrade}");
    }
}

#[tokio::test]
async fn what_is_not_configured_says_so_and_the_connection_lives_on() {
    let (server, drain) = door(LONG);
    let (mut client, task) = connect(&server, 1 << 16);
    let answer = ask(&mut client, "POST /sql HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("[upstream.neon]"), "{answer}");
    let answer = ask(&mut client, "GET /version HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("[upstream.convex]"), "{answer}");
    drain.start();
    task.await.unwrap();
}

#[tokio::test]
async fn the_drain_ends_an_idle_connection_at_once() {
    let (server, drain) = door(LONG);
    let (mut client, task) = connect(&server, 1 << 16);
    ask(&mut client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    drain.start();
    task.await.unwrap();
    assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_silent_client_is_closed_after_the_first_request_s_time() {
    let (server, _drain) = door(Duration::from_millis(50));
    let (_client, task) = connect(&server, 1 << 16);
    task.await.unwrap();
}

#[tokio::test]
async fn a_head_that_drips_is_cut_off() {
    let (server, _drain) = door(LONG);
    let (mut client, task) = connect(&server, 1 << 16);
    client.write_all(b"GET / HTTP/1.1\r\nX: ").await.unwrap();
    let drip = async {
        // A byte now and then gives it no more time; once the door has closed, writing fails.
        while client.write_all(b"a").await.is_ok() {
            tokio::time::sleep(HEAD_WITHIN / 10).await;
        }
    };
    tokio::time::timeout(LONG, drip).await.expect("cut off");
    task.await.unwrap();
}

#[tokio::test]
async fn a_head_over_the_cap_is_refused() {
    let (server, _drain) = door(LONG);
    let (mut client, task) = connect(&server, 1 << 20);
    let head = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(HEAD_MAX_BYTES as usize + 1));
    client.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    task.await.unwrap();
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_given_up() {
    let (server, _drain) = door(LONG);
    // Space for less than one answer.
    let (mut client, task) = connect(&server, 16);
    client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    client.write_all(b"Host: x\r\n\r\n").await.unwrap();
    task.await.unwrap();
}

#[tokio::test]
async fn http_2_is_spoken_without_tls_too() {
    let (server, drain) = door(LONG);
    let (client, task) = connect(&server, 1 << 16);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(client)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::builder().uri("http://x/sql").method("POST").body(body::empty()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    drain.start();
    task.await.unwrap();
    drop(sender);
    let _ = driver.await;
}

#[tokio::test]
async fn garbage_closes_the_connection() {
    let (server, _drain) = door(LONG);
    let (mut client, task) = connect(&server, 1 << 16);
    client.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await.unwrap();
    task.await.unwrap();
}
