use std::{net::IpAddr, os::unix::fs::PermissionsExt, process::Command};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    sync::mpsc,
    task::JoinHandle,
};

use super::{
    super::bind::{KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, UNIX_MODE},
    *,
};

/// A listener whose connections are handed to the test.
struct Running {
    port: u16,
    conns: mpsc::UnboundedReceiver<Conn>,
    limits: Arc<AcceptLimits>,
    drain: Drain,
    loop_: JoinHandle<()>,
}

fn local(proxy_from: &[&str]) -> ListenConfig {
    let mut config = ListenConfig::new("127.0.0.1:0".parse().unwrap());
    config.proxy_from = proxy_from.iter().map(|net| net.parse().unwrap()).collect();
    config
}

fn start(config: &ListenConfig, limits: AcceptLimits) -> Running {
    let (sender, conns) = mpsc::unbounded_channel();
    let (limits, drain) = (Arc::new(limits), Drain::new());
    let listener = Listener::bind(config).unwrap();
    let port = listener.port().unwrap_or(0);
    let loop_ = tokio::spawn(run(listener, Arc::clone(&limits), drain.clone(), move |conn| {
        let sender = sender.clone();
        // The task lives until the test calls `close`.
        async move {
            let (closed, wait) = tokio::sync::oneshot::channel::<()>();
            CLOSERS.lock().insert(conn.id, closed);
            let _ = sender.send(conn);
            let _ = wait.await;
        }
    }));
    Running { port, conns, limits, drain, loop_ }
}

/// What ends the task of a connection, by its id.
static CLOSERS: parking_lot::Mutex<std::collections::BTreeMap<u64, tokio::sync::oneshot::Sender<()>>> =
    parking_lot::Mutex::new(std::collections::BTreeMap::new());

fn close(conn: Conn) {
    CLOSERS.lock().remove(&conn.id);
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).await.unwrap()
    }
}

fn v2(ip: [u8; 4], port: u16, claimed: u16) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    header.extend(claimed.to_be_bytes());
    header.extend(ip);
    header.extend([127, 0, 0, 1]);
    header.extend(port.to_be_bytes());
    header.extend(1u16.to_be_bytes());
    header
}

/// Gives once the other side has closed.
async fn closed(mut client: TcpStream) {
    let mut rest = Vec::new();
    // A reset is as good: we close with unread bytes.
    let _ = client.read_to_end(&mut rest).await;
    assert!(rest.is_empty());
}

#[tokio::test]
async fn an_accepted_socket_says_who_where_and_has_its_options_set() {
    let mut running = start(&local(&[]), AcceptLimits::new(10, 10));
    let client = running.connect().await;
    let conn = running.conns.recv().await.unwrap();
    assert_eq!(conn.peer, Peer::Ip(client.local_addr().unwrap()));
    assert!(conn.local);
    let Stream::Plain(Raw::Tcp(tcp)) = &conn.stream else { panic!("plain TCP") };
    assert!(tcp.nodelay().unwrap());
    let socket = socket2::SockRef::from(tcp);
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE_INTERVAL);
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
}

#[tokio::test]
async fn over_the_cap_a_client_waits_and_is_served_when_a_place_is_free() {
    let mut running = start(&local(&[]), AcceptLimits::new(2, 10));
    let _clients = [running.connect().await, running.connect().await, running.connect().await];
    let first = running.conns.recv().await.unwrap();
    let _second = running.conns.recv().await.unwrap();
    // The loop holds the third and waits for a place: it runs, and hands nobody out.
    while running.limits.connections() < 2 {
        tokio::task::yield_now().await;
    }
    tokio::task::yield_now().await;
    assert!(running.conns.try_recv().is_err());
    assert_eq!(running.drain.live(), 2);
    close(first);
    assert!(running.conns.recv().await.is_some());
}

#[tokio::test]
async fn a_panic_in_one_connection_ends_neither_the_loop_nor_its_count() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let (sender, mut seen) = mpsc::unbounded_channel();
    let drain = Drain::new();
    let limits = Arc::new(AcceptLimits::new(1, 10));
    let listener = Listener::bind(&local(&[])).unwrap();
    let port = listener.port().unwrap();
    tokio::spawn(run(listener, Arc::clone(&limits), drain.clone(), move |_conn| {
        let sender = sender.clone();
        async move {
            sender.send(()).unwrap();
            panic!("a front may panic");
        }
    }));
    for _ in 0..3 {
        closed(TcpStream::connect(("127.0.0.1", port)).await.unwrap()).await;
        seen.recv().await.unwrap();
    }
    drain.start();
    assert_eq!(drain.drained(Duration::from_secs(10)).await, Ok(()));
    assert_eq!(limits.connections(), 0);
    assert!(recorder.handle().render().contains("dynabase_connection_panics_total 3"));
}

#[tokio::test]
async fn draining_serves_what_is_queued_then_stops_listening() {
    let mut running = start(&local(&[]), AcceptLimits::new(10, 10));
    // Two clients are in the kernel's queue before the loop first runs.
    let _queued: Vec<_> = (0..2).map(|_| std::net::TcpStream::connect(("127.0.0.1", running.port)).unwrap()).collect();
    running.drain.start();
    running.loop_.await.unwrap();
    let queued = [running.conns.recv().await.unwrap(), running.conns.recv().await.unwrap()];
    assert!(TcpStream::connect(("127.0.0.1", running.port)).await.is_err());
    assert_eq!(running.drain.drained(Duration::ZERO).await, Err(2));
    queued.into_iter().for_each(close);
    assert_eq!(running.drain.drained(Duration::from_secs(10)).await, Ok(()));
}

#[tokio::test]
async fn a_balancers_word_is_taken_and_the_bytes_after_it_are_the_clients() {
    let mut running = start(&local(&["127.0.0.0/8"]), AcceptLimits::new(10, 10));
    let mut client = running.connect().await;
    client.write_all(&[v2([192, 0, 2, 7], 999, 12), b"hello".to_vec()].concat()).await.unwrap();
    let mut conn = running.conns.recv().await.unwrap();
    assert_eq!(conn.peer, Peer::Ip("192.0.2.7:999".parse().unwrap()));
    assert!(!conn.local, "the client is elsewhere");
    let mut bytes = [0; 5];
    conn.stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"hello");
}

#[tokio::test]
async fn from_a_balancers_network_nothing_but_a_good_header_is_served() {
    let mut running = start(&local(&["127.0.0.1/32"]), AcceptLimits::new(10, 10));
    for hostile in [
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f and more".to_vec(),
        b"PROXY TCP4 192.0.2.7 127.0.0.1 999 6432\r\n".to_vec(),
        v2([192, 0, 2, 7], 999, 5),
        v2([192, 0, 2, 7], 999, u16::MAX),
    ] {
        let mut client = running.connect().await;
        client.write_all(&hostile).await.unwrap();
        closed(client).await;
    }
    let mut truncated = running.connect().await;
    truncated.write_all(&v2([192, 0, 2, 7], 999, 40)).await.unwrap();
    truncated.shutdown().await.unwrap();
    closed(truncated).await;
    assert!(running.conns.try_recv().is_err());
    running.drain.start();
    assert_eq!(running.drain.drained(Duration::from_secs(10)).await, Ok(()));
}

#[tokio::test]
async fn from_other_networks_a_header_is_only_bytes() {
    let mut running = start(&local(&["192.0.2.0/24"]), AcceptLimits::new(10, 10));
    let mut client = running.connect().await;
    let header = v2([192, 0, 2, 7], 999, 12);
    client.write_all(&header).await.unwrap();
    let mut conn = running.conns.recv().await.unwrap();
    assert_eq!(conn.peer, Peer::Ip(client.local_addr().unwrap()));
    let mut bytes = vec![0; header.len()];
    conn.stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, header);
}

#[tokio::test]
async fn one_network_cannot_hold_more_unauthenticated_connections_than_its_share() {
    let mut running = start(&local(&["127.0.0.1/32"]), AcceptLimits::new(10, 1));
    let port = running.port;
    let connect = async |ip| {
        let mut client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        client.write_all(&v2(ip, 999, 12)).await.unwrap();
        client
    };
    let _a = connect([192, 0, 2, 1]).await;
    let mut first = running.conns.recv().await.unwrap();
    closed(connect([192, 0, 2, 2]).await).await;
    let _other = connect([192, 0, 3, 1]).await;
    assert_eq!(running.conns.recv().await.unwrap().peer, Peer::Ip("192.0.3.1:999".parse().unwrap()));
    first.unauthenticated = None;
    let _b = connect([192, 0, 2, 2]).await;
    assert_eq!(running.conns.recv().await.unwrap().peer, Peer::Ip("192.0.2.2:999".parse().unwrap()));
}

#[tokio::test]
async fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pg.sock");
    let config = ListenConfig::new(Address::Unix(path.clone()));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let mut running = start(&config, AcceptLimits::new(10, 10));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, UNIX_MODE);
    let _client = UnixStream::connect(&path).await.unwrap();
    let conn = running.conns.recv().await.unwrap();
    assert!(conn.peer == Peer::Unix && conn.local);
    let error = Listener::bind(&config).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("pg.sock"), "{error}");
    running.drain.start();
    running.loop_.await.unwrap();
    assert!(!path.exists(), "the socket's file goes with it");
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(Listener::bind(&config).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
}

#[tokio::test]
async fn a_successors_unix_socket_survives_its_predecessor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pg.sock");
    let old = Listener::bind(&ListenConfig::new(Address::Unix(path.clone()))).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _new = Listener::bind(&ListenConfig::new(Address::Unix(path.clone()))).unwrap();
    drop(old);
    assert!(path.exists());
}

const CHILD: &str = "DYNABASE_TEST_OUT_OF_DESCRIPTORS";

#[test]
fn running_out_of_descriptors_does_not_end_the_loop() {
    let output = Command::new("sh")
        .args([
            "-c",
            "ulimit -n 48 && exec \"$0\" --exact net::listen::tests::out_of_descriptors --ignored --nocapture",
        ])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("served again"), "{text}\n{output:?}");
}

#[test]
#[ignore = "run by running_out_of_descriptors_does_not_end_the_loop, with few descriptors"]
fn out_of_descriptors() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut running = start(&local(&[]), AcceptLimits::new(1000, 1000));
        let mut clients = Vec::new();
        // Each client and its accepted side take a descriptor of this process, until there are none.
        while let Ok(client) = std::net::TcpStream::connect(("127.0.0.1", running.port)) {
            clients.push(client);
        }
        let failed = || {
            let text = recorder.handle().render();
            let line =
                text.lines().find_map(|line| line.strip_prefix("dynabase_accept_errors_total{reason=\"resources\"} "));
            line.map_or(0, |count| count.parse::<u32>().unwrap())
        };
        let began = std::time::Instant::now();
        while failed() < 4 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Three pauses lie between four failures, each twice the one before; the first may have begun earlier.
        assert!(began.elapsed() >= 6 * BACK_OFF, "it backs off");
        drop(clients);
        while let Ok(conn) = running.conns.try_recv() {
            close(conn);
        }
        let mut last = None;
        while last.is_none() {
            // Connections that were queued meanwhile come first; their clients have gone.
            let conn = tokio::time::timeout(Duration::from_millis(50), running.conns.recv()).await;
            if let Ok(Some(conn)) = conn {
                close(conn);
            }
            last = TcpStream::connect(("127.0.0.1", running.port)).await.ok();
        }
        let ours = Peer::Ip(last.as_ref().unwrap().local_addr().unwrap());
        loop {
            let conn = running.conns.recv().await.unwrap();
            if conn.peer == ours {
                break;
            }
            close(conn);
        }
    });
    println!("served again");
}

#[test]
fn configuration_says_what_is_wrong_with_it() {
    let good: ListenConfig =
        toml::from_str("address = \"[::]:6432\"\nproxy_from = [\"10.0.0.0/8\", \"192.0.2.1\"]").unwrap();
    assert_eq!(good.backlog, BACKLOG);
    assert!(good.proxy_from[1].contains(&"192.0.2.1".parse::<IpAddr>().unwrap()));
    for (text, want) in [
        ("address = \"localhost\"", "127.0.0.1:6432"),
        ("address = \"unix:\"", "needs a path"),
        ("address = \"[::]:1\"\nproxy_from = [\"ten\"]", "10.0.0.0/8"),
        ("address = \"[::]:1\"\nbaklog = 1", "baklog"),
    ] {
        let error = toml::from_str::<ListenConfig>(text).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}
