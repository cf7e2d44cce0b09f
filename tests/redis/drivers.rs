//! The Rust drivers `redis` and `fred` before the front, in both protocols, over TLS too: what they do at start, and
//! what their error kinds become.

use std::time::Duration;

use dynabase::{
    net::{ClientTls, ServerTls, TlsConfig, TlsMode},
    tenant::namespace::Password,
    upstream::redis::{Target, Via},
};
use fred::{
    interfaces::{
        ClientLike, EventInterface, HashesInterface, KeysInterface, ListInterface, PubsubInterface,
        TransactionInterface,
    },
    types::{Builder, RespVersion, config::Config as FredConfig},
};
use futures_util::StreamExt;
use redis::{AsyncCommands, ErrorKind, ServerErrorKind, aio::MultiplexedConnection};
use std::sync::Arc;

use super::support::{House, PLATFORM, Redis, free_port};

fn url(house: &House, org: &str, more: &str) -> String {
    format!("redis://app:{}@127.0.0.1:{}/0{more}", house.token(org), house.port)
}

async fn connect(url: &str) -> MultiplexedConnection {
    let client = redis::Client::open(url).expect("a good URL");
    let mut connection = client.get_multiplexed_async_connection().await.expect("in");
    connection.set_response_timeout(Duration::from_secs(10));
    connection
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_rs_works_in_both_protocols() {
    let house = House::start().await;
    for more in ["", "?protocol=resp3"] {
        let url = url(&house, "umbrella", more);
        let mut client = connect(&url).await;
        let () = redis::cmd("FLUSHALL").query_async(&mut client).await.expect("flushed");
        let () = client.set("k", "v").await.expect("set");
        assert_eq!(client.get::<_, String>("k").await.expect("got"), "v");
        assert_eq!(client.keys::<_, Vec<String>>("*").await.expect("listed"), ["k"]);
        let scanned: Vec<String> = {
            let mut scan = client.scan_match::<_, String>("k*").await.expect("scanned");
            let mut found = Vec::new();
            while let Some(key) = scan.next_item().await {
                found.push(key.expect("a key"));
            }
            found
        };
        assert_eq!(scanned, ["k"]);
        let (one, two): (i64, i64) =
            redis::pipe().incr("n", 1).incr("n", 1).query_async(&mut client).await.expect("run");
        assert_eq!((one, two), (1, 2));
        let (three, text): (i64, String) =
            redis::pipe().atomic().incr("n", 1).get("n").query_async(&mut client).await.expect("run");
        assert_eq!((three, text.as_str()), (3, "3"));
        let script =
            redis::Script::new("redis.call('SET', 'made:' .. ARGV[1], KEYS[1]) return redis.call('GET', 'made:b')");
        assert_eq!(script.key("a").arg("b").invoke_async::<String>(&mut client).await.expect("run"), "a");
        let id: String = client.xadd("s", "1-1", &[("f", "v")]).await.expect("added");
        assert_eq!(id, "1-1");
        let streams: redis::streams::StreamReadReply = client.xread(&["s"], &["0"]).await.expect("read");
        assert_eq!(streams.keys[0].key, "s");

        let mut listener = redis::Client::open(url.as_str()).expect("good").get_async_pubsub().await.expect("in");
        listener.subscribe("news").await.expect("subscribed");
        listener.psubscribe("p*").await.expect("subscribed");
        assert_eq!(client.publish::<_, _, i64>("news", "hello").await.expect("sent"), 1);
        assert_eq!(client.publish::<_, _, i64>("px", "there").await.expect("sent"), 1);
        let mut messages = listener.on_message();
        let first = messages.next().await.expect("a message");
        assert_eq!(
            (first.get_channel_name(), first.get_payload::<String>().expect("text").as_str()),
            ("news", "hello")
        );
        let second = messages.next().await.expect("a message");
        assert_eq!((second.get_channel_name(), second.get_pattern::<String>().expect("one").as_str()), ("px", "p*"));
        drop(messages);

        let mut blocked = connect(&url).await;
        let waiting = tokio::spawn(async move { blocked.blpop::<_, (String, String)>("q", 9.0).await });
        let () = client.rpush("q", "x").await.expect("pushed");
        assert_eq!(waiting.await.expect("ends").expect("popped"), ("q".to_owned(), "x".to_owned()));
    }
}

/// What a driver's user sees of each refusal: the kind that its own server would give.
#[tokio::test(flavor = "multi_thread")]
async fn redis_rs_gives_each_refusal_its_kind() {
    let house = House::start().await;
    let mut client = connect(&url(&house, "acme", "")).await;
    let kind = |error: redis::RedisError| (error.kind(), error.code().map(str::to_owned));
    let error = redis::cmd("CONFIG").arg("SET").arg("a").arg("b").query_async::<()>(&mut client).await.expect_err("no");
    assert_eq!(error.kind(), ErrorKind::Server(ServerErrorKind::NoPerm));
    let error = redis::cmd("EVALSHA").arg("0".repeat(40)).arg(0).query_async::<()>(&mut client).await.expect_err("no");
    assert_eq!(error.kind(), ErrorKind::Server(ServerErrorKind::NoScript));
    let error = redis::cmd("SETRANGE").arg("k").arg(100_000_000).arg("x").query_async::<()>(&mut client).await;
    let (kind_of, code) = kind(error.expect_err("100 MB do not fit into FREE"));
    assert_eq!((kind_of, code.as_deref()), (ErrorKind::Extension, Some("OOM")));
    let () = client.lpush("l", "x").await.expect("pushed");
    let error = client.get::<_, String>("l").await.expect_err("a list");
    assert_eq!(error.code(), Some("WRONGTYPE"));
    let error = redis::cmd("NOSUCH").query_async::<()>(&mut client).await.expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::Server(ServerErrorKind::ResponseError));
    assert!(error.to_string().contains("unknown command"), "{error}");
    // The rate: an error that no driver answers by reconnecting or by trying again.
    let mut refused = None;
    for _ in 0..40 {
        let mut pipe = redis::pipe();
        (0..50).for_each(|_| {
            pipe.cmd("PING").ignore();
        });
        if let Err(error) = pipe.query_async::<()>(&mut client).await {
            refused = Some(error);
            break;
        }
    }
    let refused = refused.expect("2 000 commands at once are over the rate of FREE");
    assert!(refused.to_string().contains("max requests limit exceeded"), "{refused}");
    assert!(!refused.is_connection_dropped() && !refused.is_io_error(), "{refused:?}");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(redis::cmd("PING").query_async::<String>(&mut client).await.expect("still there"), "PONG");

    let bad = format!("redis://app:nonsense@127.0.0.1:{}/0", house.port);
    let client = redis::Client::open(bad).expect("a good URL");
    let Err(error) = client.get_multiplexed_async_connection().await else { panic!("refused") };
    assert_eq!(error.kind(), ErrorKind::AuthenticationFailed, "{error:?}");
    let without = redis::Client::open(format!("redis://127.0.0.1:{}/0", house.port)).expect("a good URL");
    let mut client = without.get_multiplexed_async_connection().await.expect("it connects");
    let error = client.get::<_, String>("k").await.expect_err("refused");
    assert_eq!(error.code(), Some("NOAUTH"));
}

async fn fred(url: &str, three: bool) -> fred::clients::Client {
    let mut config = FredConfig::from_url(url).expect("a good URL");
    if three {
        config.version = RespVersion::RESP3;
    }
    let client = Builder::from_config(config).build().expect("a client");
    client.init().await.expect("in");
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn fred_works_in_both_protocols() {
    let house = House::start().await;
    let url = url(&house, "umbrella", "");
    for three in [false, true] {
        let client = fred(&url, three).await;
        let () = client.flushall(false).await.expect("flushed");
        let () = client.set("k", "v", None, None, false).await.expect("set");
        assert_eq!(client.get::<String, _>("k").await.expect("got"), "v");
        let () = client.hset("h", [("a", "1")]).await.expect("set");
        assert_eq!(client.hget::<String, _, _>("h", "a").await.expect("got"), "1");
        let pipeline = client.pipeline();
        let () = pipeline.incr("n").await.expect("queued");
        let () = pipeline.incr("n").await.expect("queued");
        assert_eq!(pipeline.all::<Vec<i64>>().await.expect("run"), [1, 2]);
        let transaction = client.multi();
        let () = transaction.incr("n").await.expect("queued");
        let () = transaction.get("n").await.expect("queued");
        assert_eq!(transaction.exec::<(i64, String)>(true).await.expect("run"), (3, "3".to_owned()));

        let listener = fred(&url, three).await;
        let mut messages = listener.message_rx();
        let () = listener.subscribe("news").await.expect("subscribed");
        // The driver does not wait for the server's confirmation.
        while client.publish::<i64, _, _>("news", "hello").await.expect("sent") == 0 {}
        let message = messages.recv().await.expect("a message");
        assert_eq!((&*message.channel, message.value.as_str().as_deref()), ("news", Some("hello")));

        let blocked = fred(&url, three).await;
        let waiting = tokio::spawn({
            let blocked = blocked.clone();
            async move { blocked.blpop::<(String, String), _>("q", 9.0).await }
        });
        let () = client.rpush("q", "x").await.expect("pushed");
        assert_eq!(waiting.await.expect("ends").expect("popped"), ("q".to_owned(), "x".to_owned()));
        for client in [client, listener, blocked] {
            client.quit().await.expect("out");
        }
    }
    let small = fred(&self::url(&house, "acme", ""), false).await;
    let error = small.setrange::<(), _, _>("k", 100_000_000, "x").await.expect_err("100 MB do not fit into FREE");
    assert!(error.details().starts_with("OOM "), "{error:?}");
    let () = small.lpush("l", "x").await.expect("pushed");
    let error = small.get::<String, _>("l").await.expect_err("a list");
    assert_eq!(*error.kind(), fred::error::ErrorKind::InvalidArgument);
    let config = FredConfig::from_url(&format!("redis://app:nonsense@127.0.0.1:{}/0", house.port)).expect("good");
    let client =
        Builder::from_config(config).with_connection_config(|c| c.max_command_attempts = 1).build().expect("a client");
    let error = client.init().await.expect_err("refused");
    assert_eq!(*error.kind(), fred::error::ErrorKind::Auth, "{error:?}");
}

/// `rediss://` to the front and from the front to the server, both verified.
#[tokio::test(flavor = "multi_thread")]
async fn tls_on_both_sides() {
    // The driver takes the process' own provider.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let folder = tempfile::tempdir().expect("a folder");
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).expect("written");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("written");
    let (cert_text, key_text) = (cert.to_string_lossy().into_owned(), key.to_string_lossy().into_owned());
    let (plain, secure) = (free_port(), free_port());
    let options = [
        "--tls-port",
        &secure.to_string(),
        "--tls-cert-file",
        &cert_text,
        "--tls-key-file",
        &key_text,
        "--tls-ca-cert-file",
        &cert_text,
        "--tls-auth-clients",
        "no",
        "--databases",
        "64",
        "--requirepass",
        PLATFORM,
    ];
    let server = Redis::with(tempfile::tempdir().expect("a folder"), plain, &options).await;
    let target = Target {
        address: format!("127.0.0.1:{secure}"),
        others: Vec::new(),
        via: Via::Itself,
        tls: ClientTls::new(TlsMode::VerifyFull, Some(cert.clone())).expect("good authorities"),
        user: None,
        password: Some(Password::new(PLATFORM)),
    };
    let config =
        TlsConfig { cert_file: cert.clone(), key_file: key, client_ca_file: None, client_auth: Default::default() };
    let tls = Arc::new(ServerTls::load(&config, &[]).expect("good files"));
    let house = House::before(server, target, Some(tls), include_str!("../../config/tiers.toml")).await;

    let secure = format!("rediss://app:{}@127.0.0.1:{}/0", house.token("umbrella"), house.port);
    let trust = |root: Vec<u8>| redis::TlsCertificates { client_tls: None, root_cert: Some(root) };
    let client = redis::Client::build_with_tls(secure.as_str(), trust(made.cert.pem().into_bytes())).expect("a client");
    let mut connection = client.get_multiplexed_async_connection().await.expect("in, over TLS");
    let big = "x".repeat(3 << 20);
    let () = connection.set("big", &big).await.expect("set");
    assert_eq!(connection.get::<_, String>("big").await.expect("got").len(), big.len());
    let listed: String = house.admin().await.line("CLIENT LIST").await;
    assert!(listed.contains("user=org_umbrella"), "{listed}");
    // Somebody else's certificate is not trusted.
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate").cert.pem();
    let stranger = redis::Client::build_with_tls(secure.as_str(), trust(other.into_bytes())).expect("a client");
    assert!(stranger.get_multiplexed_async_connection().await.is_err());
}
