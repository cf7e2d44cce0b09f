//! The HTTP door over TLS, as curl comes in: both protocols by ALPN, WebSockets, clients' certificates.

use std::process::Command;

use dynabase::tenant::Tier;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::{
    neon::{door, tenant},
    support::{
        postgres,
        proxy::{Org, Proxy, Setup},
    },
};

type Authority = CertifiedIssuer<'static, KeyPair>;

const NAME: &str = "door.example";

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Another name than those that it signs: OpenSSL takes equal ones for signed by themselves.
    params.distinguished_name.push(DnType::CommonName, "the authority");
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed")
}

/// Certificate and key for `name`, as PEM.
fn issue(authority: &Authority, name: &str) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let cert = CertificateParams::new([name.to_owned()]).expect("a name").signed_by(&key, authority).expect("signed");
    (cert.pem(), key.serialize_pem())
}

/// A proxy whose HTTP door speaks TLS, and what clients need for it, in a folder.
struct Door {
    proxy: Proxy,
    files: tempfile::TempDir,
}

impl Door {
    fn open(client_auth: &str) -> Self {
        let (ours, clients, strangers) = (authority(), authority(), authority());
        let (cert, key) = issue(&ours, NAME);
        let files = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| std::fs::write(files.path().join(name), text).expect("written");
        write("ca.pem", &ours.pem());
        for (name, signer) in [("client", &clients), ("stranger", &strangers)] {
            let (cert, key) = issue(signer, "somebody");
            write(&format!("{name}.crt"), &cert);
            write(&format!("{name}.key"), &key);
        }
        let url = &postgres::shared().url;
        let known = if client_auth == "none" { "" } else { "client_ca_file = \"clients.pem\"\n" };
        let proxy = Proxy::start(&Setup {
            listen: "http = \"127.0.0.1:0\"".into(),
            sections: format!(
                "[upstream.neon]\nurl = \"{url}\"\nstorage_interval = \"1h\"\n[tls]\ncert_file = \"server.crt\"\n\
                 key_file = \"server.key\"\n{known}client_auth = \"{client_auth}\""
            ),
            files: vec![("server.crt", cert), ("server.key", key), ("clients.pem", clients.pem())],
            ..Setup::default()
        });
        Self { proxy, files }
    }

    /// What curl says: its exit code, the protocol's version and status, the body.
    fn curl(&self, words: &[&str], org: &Org<'_>, path: &str) -> (i32, String, String) {
        let port = door(&self.proxy);
        let mut command = Command::new("curl");
        command.args(["--silent", "--max-time", "20", "--resolve", &format!("{NAME}:{port}:127.0.0.1")]);
        command.args(["--write-out", "\n%{http_version} %{http_code}"]).args(words).current_dir(self.files.path());
        command.arg("--header").arg(format!("Neon-Connection-String: postgres://app:{}@x/app", org.token()));
        let output = command.arg(format!("https://{NAME}:{port}{path}")).output().expect("curl is installed");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let (body, last) = text.rsplit_once('\n').expect("what was asked for");
        (output.status.code().expect("it ended by itself"), last.to_owned(), body.to_owned())
    }
}

const QUERY: [&str; 4] = ["--cacert", "ca.pem", "--data", r#"{"query":"select 7 as n"}"#];

#[test]
fn one_door_speaks_both_protocols_over_tls() {
    let open = Door::open("none");
    let org = tenant(&open.proxy, "tls_both", Tier::Pro);
    for (flag, wanted) in [("--http2", "2 200"), ("--http1.1", "1.1 200")] {
        let (code, status, body) = open.curl(&[&QUERY[..], &[flag]].concat(), &org, "/sql");
        assert_eq!((code, status.as_str()), (0, wanted), "{body}");
        assert!(body.contains(r#""rows":[{"n":7}]"#), "{body}");
    }
    // Who does not know the authority does not talk to us.
    assert_eq!(open.curl(&["--data", "{}"], &org, "/sql").0, 60);
    // A socket, which is HTTP/1.1 only.
    let socket = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"];
    let mut words = vec!["--cacert", "ca.pem", "--http1.1", "--max-time", "1", "--header"];
    words.push("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==");
    socket.iter().for_each(|header| words.extend(["--header", header]));
    let (_, status, _) = open.curl(&words, &org, "/v2");
    assert_eq!(status, "1.1 101");
}

#[test]
fn where_clients_have_to_show_a_certificate_a_token_alone_is_not_enough() {
    let open = Door::open("required");
    let org = tenant(&open.proxy, "tls_mutual", Tier::Pro);
    for flag in ["--http2", "--http1.1"] {
        let with = |cert: &[&str]| open.curl(&[&QUERY[..], &[flag], cert].concat(), &org, "/sql");
        let (code, status, body) = with(&["--cert", "client.crt", "--key", "client.key"]);
        assert!(code == 0 && status.ends_with(" 200"), "{status} {body}");
        for refused in [&[][..], &["--cert", "stranger.crt", "--key", "stranger.key"]] {
            let (code, status, body) = with(refused);
            assert!(code != 0 && status.ends_with(" 000") && body.is_empty(), "{code} {status} {body}");
        }
    }
}
