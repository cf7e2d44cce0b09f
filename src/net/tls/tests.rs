use std::{fs, io::Write};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A folder with `ca.pem`, `cert.pem` and `key.pem` for `name`.
struct Files {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Files {
    fn new(name: &str) -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap(), authority: authority() };
        fs::write(files.path("ca.pem"), files.authority.pem()).unwrap();
        files.issue(name);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn issue(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.authority).unwrap();
        fs::write(self.path("cert.pem"), cert.pem()).unwrap();
        fs::write(self.path("key.pem"), key.serialize_pem()).unwrap();
    }

    fn config(&self) -> TlsConfig {
        TlsConfig {
            cert_file: self.path("cert.pem"),
            key_file: self.path("key.pem"),
            client_ca_file: None,
            client_auth: ClientAuth::None,
        }
    }
}

fn pipe() -> (DuplexStream, DuplexStream) {
    tokio::io::duplex(64 * 1024)
}

/// Both ends of a handshake.
async fn shake(
    server: &ServerTls,
    client: &ClientTls,
    host: &str,
    alpn: &[&str],
) -> (io::Result<Stream>, io::Result<Stream>) {
    let (left, right) = pipe();
    tokio::join!(
        accept_tls(Stream::Plain(Raw::Memory(left)), server.acceptor()),
        client.connect(Raw::Memory(right), host, alpn),
    )
}

async fn talks(server: &mut Stream, client: &mut Stream) {
    client.write_all(b"ping").await.unwrap();
    client.flush().await.unwrap();
    let mut bytes = [0; 4];
    server.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"ping");
    server.write_all(b"pong").await.unwrap();
    server.flush().await.unwrap();
    client.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"pong");
}

fn alpn_of(stream: &Stream) -> Option<Vec<u8>> {
    let Stream::Tls(tls) = stream else { panic!("TLS") };
    tls.get_ref().1.alpn_protocol().map(<[u8]>::to_vec)
}

fn verifying(files: &Files) -> ClientTls {
    ClientTls::new(TlsMode::VerifyFull, Some(files.path("ca.pem"))).unwrap()
}

#[tokio::test]
async fn both_ends_talk_and_agree_on_a_protocol() {
    let files = Files::new("db.example");
    let server = ServerTls::load(&files.config(), &["postgresql"]).unwrap();
    let (s, c) = shake(&server, &verifying(&files), "db.example", &["postgresql"]).await;
    let (mut s, mut c) = (s.unwrap(), c.unwrap());
    assert!(s.is_tls() && c.is_tls());
    assert_eq!(alpn_of(&s).unwrap(), b"postgresql");
    talks(&mut s, &mut c).await;
    let (s, c) = shake(&server, &verifying(&files), "db.example", &[]).await;
    assert!(alpn_of(&s.unwrap()).is_none() && c.is_ok(), "no offer is no fault");
    let (s, c) = shake(&server, &verifying(&files), "db.example", &["h2"]).await;
    assert!(s.is_err() && c.is_err(), "an offer of something else is");
}

#[tokio::test]
async fn sessions_are_resumed_until_a_reload() {
    let files = Files::new("db.example");
    let server = ServerTls::load(&files.config(), &[]).unwrap();
    let client = verifying(&files);
    use rustls::HandshakeKind::{Full, Resumed};
    for (reload, want) in [(false, Full), (false, Resumed), (false, Resumed), (true, Full), (false, Resumed)] {
        if reload {
            server.reload().unwrap();
        }
        let (s, c) = shake(&server, &client, "db.example", &[]).await;
        let (mut s, mut c) = (s.unwrap(), c.unwrap());
        // The ticket comes with the first bytes.
        talks(&mut s, &mut c).await;
        let Stream::Tls(tls) = &s else { panic!("TLS") };
        assert_eq!(tls.get_ref().1.handshake_kind(), Some(want));
    }
}

#[tokio::test]
async fn each_mode_trusts_what_it_says() {
    let files = Files::new("db.example");
    let other = Files::new("db.example");
    let server = ServerTls::load(&files.config(), &[]).unwrap();
    let ours = || Some(files.path("ca.pem"));
    let theirs = || Some(other.path("ca.pem"));
    for (mode, ca, host, good) in [
        (TlsMode::VerifyFull, ours(), "db.example", true),
        (TlsMode::VerifyFull, ours(), "elsewhere.example", false),
        (TlsMode::VerifyFull, theirs(), "db.example", false),
        (TlsMode::Require, ours(), "elsewhere.example", true),
        (TlsMode::Require, ours(), "127.0.0.1", true),
        (TlsMode::Require, theirs(), "db.example", false),
        (TlsMode::Require, None, "elsewhere.example", true),
    ] {
        let client = ClientTls::new(mode, ca.clone()).unwrap();
        let (_, c) = shake(&server, &client, host, &[]).await;
        assert_eq!(c.is_ok(), good, "{mode:?} {ca:?} {host}: {c:?}");
    }
    let off = ClientTls::new(TlsMode::Disable, None).unwrap();
    assert!(!off.connect(Raw::Memory(pipe().0), "db.example", &[]).await.unwrap().is_tls());
    let error = ClientTls::new(TlsMode::Require, None).unwrap().connect(Raw::Memory(pipe().0), "a b", &[]).await;
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_bad_new_certificate_keeps_the_old_one_and_a_good_one_is_taken() {
    let files = Files::new("old.example");
    let server = ServerTls::load(&files.config(), &[]).unwrap();
    let good_key = fs::read(files.path("key.pem")).unwrap();
    fs::write(files.path("key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let error = server.reload().unwrap_err().to_string();
    assert!(error.contains("is not the key of"), "{error}");
    fs::write(files.path("key.pem"), good_key).unwrap();
    assert!(shake(&server, &verifying(&files), "old.example", &[]).await.1.is_ok());
    files.issue("new.example");
    server.reload().unwrap();
    assert!(shake(&server, &verifying(&files), "new.example", &[]).await.1.is_ok());
    assert!(shake(&server, &verifying(&files), "old.example", &[]).await.1.is_err());
}

#[test]
fn faults_say_what_to_mend() {
    let files = Files::new("db.example");
    let load = |change: &dyn Fn(&mut TlsConfig)| {
        let mut config = files.config();
        change(&mut config);
        ServerTls::load(&config, &[]).unwrap_err().to_string()
    };
    fs::write(files.path("empty.pem"), "").unwrap();
    let missing = load(&|config| config.cert_file = files.path("none.pem"));
    assert!(missing.contains("can't read the certificate") && missing.contains("none.pem"), "{missing}");
    let empty = load(&|config| config.cert_file = files.path("empty.pem"));
    assert!(empty.contains("holds no certificate"), "{empty}");
    let swapped = load(&|config| config.key_file = files.path("cert.pem"));
    assert!(swapped.contains("holds no private key"), "{swapped}");
    let idle = load(&|config| config.client_ca_file = Some(files.path("ca.pem")));
    assert!(idle.contains("has no effect"), "{idle}");
    let lost = load(&|config| config.client_auth = ClientAuth::Required);
    assert!(lost.contains("needs client_ca_file"), "{lost}");
    let mut garbled = fs::File::create(files.path("garbled.pem")).unwrap();
    garbled.write_all(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let refused = load(&|config| config.cert_file = files.path("garbled.pem"));
    assert!(refused.contains("can't be used"), "{refused}");
}

#[tokio::test]
async fn clients_show_a_certificate_where_it_is_required() {
    let files = Files::new("db.example");
    let stranger = Files::new("client.example");
    for auth in [ClientAuth::Optional, ClientAuth::Required] {
        let config = TlsConfig { client_ca_file: Some(files.path("ca.pem")), client_auth: auth, ..files.config() };
        let server = ServerTls::load(&config, &[]).unwrap();
        let (s, _c) = shake(&server, &verifying(&files), "db.example", &[]).await;
        assert_eq!(s.is_ok(), auth == ClientAuth::Optional, "without one");
        for (from, good) in [(&files, true), (&stranger, false)] {
            let chain = certificates("certificate", &from.path("cert.pem")).unwrap();
            let key = PrivateKeyDer::from_pem_file(from.path("key.pem")).unwrap();
            let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("its own versions")
                .with_root_certificates(authorities(&files.path("ca.pem")).unwrap())
                .with_client_auth_cert(chain, key)
                .unwrap();
            let client = ClientTls(Some(TlsConnector::from(Arc::new(config))));
            let (s, _c) = shake(&server, &client, "db.example", &[]).await;
            assert_eq!(s.is_ok(), good, "{auth:?}");
        }
    }
}

#[tokio::test]
async fn bytes_read_to_find_the_protocol_are_read_again_by_tls() {
    let files = Files::new("db.example");
    let server = ServerTls::load(&files.config(), &[]).unwrap();
    let (mut left, right) = pipe();
    let serving = async {
        let mut first = [0; 8];
        left.read_exact(&mut first).await.unwrap();
        assert_eq!(first[0], 0x16, "a ClientHello");
        let stream = Stream::Plain(Raw::Memory(left)).replaying(first.to_vec()).unwrap();
        accept_tls(stream, server.acceptor()).await.unwrap()
    };
    let client = verifying(&files);
    let (mut s, c) = tokio::join!(serving, client.connect(Raw::Memory(right), "db.example", &[]));
    talks(&mut s, &mut c.unwrap()).await;
    let Stream::Tls(tls) = &s else { panic!("TLS") };
    assert!(matches!(tls.get_ref().0, Raw::Memory(_)), "the replay has turned into the socket");
    assert_eq!(s.replaying(vec![1]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn only_a_plain_stream_can_become_tls_and_junk_does_not() {
    let files = Files::new("db.example");
    let server = ServerTls::load(&files.config(), &[]).unwrap();
    let (s, _c) = shake(&server, &verifying(&files), "db.example", &[]).await;
    let error = accept_tls(s.unwrap(), server.acceptor()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    let (left, mut right) = pipe();
    right.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let error = accept_tls(Stream::Plain(Raw::Memory(left)), server.acceptor()).await.unwrap_err();
    assert_eq!(reason(&error), "not_tls");
}
