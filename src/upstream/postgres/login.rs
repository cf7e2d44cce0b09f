//! Logging in upstream: StartupMessage to ReadyForQuery, with whatever authentication the server asks for.
//!
//! What goes wrong here is ours, never the tenant's: a client is not told that its derived password is wrong.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    connection::{Connection, Parameters},
    dial::{DialError, Target},
};
use crate::{
    net::{Stream, stream::Raw},
    tenant::{Namespace, namespace::Password},
    upstream::scram::{self, Binding, Exchange, Keys},
    wire::postgres::{self as wire, HEAD, backend},
};

/// Longest message during a login; a server that sends more is not PostgreSQL.
const MESSAGE_MAX: usize = 64 * 1024;

/// Most bytes of a whole login.
const LOGIN_MAX: usize = 1024 * 1024;

/// What Neon's edge says while a compute is on its way. Quotas and endpoints that are not there have other words, and
/// trying again would only make it worse.
const WAKING: [&str; 3] =
    ["Couldn't connect to compute node", "Too many database connection attempts", "Too many connections attempts"];

/// Why an upstream connection could not be had.
#[derive(Debug)]
pub enum ConnectError {
    /// The socket or TLS.
    Dial(DialError),
    /// Nothing came of it within the time allowed.
    Timeout,
    /// The server closed the connection or broke it.
    Io(std::io::Error),
    /// The server said no: SQLSTATE and message, for the log.
    Refused {
        /// SQLSTATE, empty if it sent none.
        code: String,
        /// Its words.
        message: String,
    },
    /// The server does not follow the protocol, or asks for what we don't do.
    Protocol(&'static str),
    /// SCRAM failed.
    Scram(scram::Fault),
}

impl ConnectError {
    /// Whether the server has another password for the role.
    pub fn is_wrong_password(&self) -> bool {
        matches!(self, ConnectError::Refused { code, .. } if code == "28P01")
    }

    /// Whether the database takes the role no more: it is being moved, or was. Nothing else takes CONNECT from a tenant.
    pub fn is_closed_database(&self) -> bool {
        matches!(self, ConnectError::Refused { code, .. } if code == "42501")
    }

    /// Whether the same attempt may succeed soon: the server is starting, restarting, or full.
    pub fn retry(&self) -> bool {
        match self {
            ConnectError::Dial(error) => error.retry == super::Retry::Soon,
            ConnectError::Io(_) => true,
            ConnectError::Refused { code, message } => match code.as_str() {
                "57P03" | "53300" | "57P01" | "57P02" => true,
                // Neon's edge has one code for everything; the compute is being woken, or too many want that.
                "XX000" => WAKING.iter().any(|words| message.contains(words)),
                _ => false,
            },
            ConnectError::Timeout | ConnectError::Protocol(_) | ConnectError::Scram(_) => false,
        }
    }

    /// The metric label: which step failed.
    pub fn step(&self) -> &'static str {
        match self {
            ConnectError::Dial(_) => "dial",
            ConnectError::Timeout => "timeout",
            ConnectError::Io(_) => "io",
            ConnectError::Refused { .. } => "refused",
            ConnectError::Protocol(_) => "protocol",
            ConnectError::Scram(_) => "scram",
        }
    }
}

impl std::fmt::Display for ConnectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ConnectError::Dial(error) => error.fmt(f),
            ConnectError::Timeout => f.write_str("timed out"),
            ConnectError::Io(error) => error.fmt(f),
            ConnectError::Refused { code, message } => write!(f, "{code} {message}"),
            ConnectError::Protocol(what) => f.write_str(what),
            ConnectError::Scram(fault) => write!(f, "SCRAM: {fault:?}"),
        }
    }
}

impl From<std::io::Error> for ConnectError {
    fn from(error: std::io::Error) -> Self {
        ConnectError::Io(error)
    }
}

impl From<crate::wire::Error> for ConnectError {
    fn from(error: crate::wire::Error) -> Self {
        ConnectError::Protocol(error.what)
    }
}

/// Who logs in.
#[derive(Debug)]
pub struct Login<'a> {
    /// Role and physical database.
    pub place: &'a Namespace,
    /// The database as the connection carries it.
    pub database: &'a Arc<str>,
    /// The role's password.
    pub password: &'a Password,
    /// The role's SCRAM keys, kept from the last login.
    pub keys: &'a Mutex<Option<Keys>>,
}

/// Dials `target` and logs in, within `deadline` altogether.
///
/// # Cancel safety
/// Dropping it closes the socket; the server sees a client that went away.
pub async fn connect(target: &Target, login: &Login<'_>, deadline: Duration) -> Result<Connection, ConnectError> {
    tokio::time::timeout(deadline, async {
        let stream = target.dial().await.map_err(ConnectError::Dial)?;
        Conversation { stream, buffer: Vec::new(), read: 0 }.run(login).await
    })
    .await
    .unwrap_or(Err(ConnectError::Timeout))
}

struct Conversation {
    stream: Stream,
    buffer: Vec<u8>,
    read: usize,
}

impl Conversation {
    async fn run(mut self, login: &Login<'_>) -> Result<Connection, ConnectError> {
        let mut hello = vec![0; 4];
        hello.extend_from_slice(&(3u32 << 16).to_be_bytes());
        for (name, value) in [
            ("user", login.place.role.as_str()),
            ("database", &login.place.database),
            ("application_name", "dynabase"),
            ("client_encoding", "UTF8"),
        ] {
            wire::put_cstr(&mut hello, name.as_bytes());
            wire::put_cstr(&mut hello, value.as_bytes());
        }
        hello.push(0);
        let len = u32::try_from(hello.len()).unwrap_or(u32::MAX);
        hello[..4].copy_from_slice(&len.to_be_bytes());
        self.stream.write_all(&hello).await?;
        self.authenticate(login).await?;

        let mut parameters = Parameters::default();
        let mut key = None;
        loop {
            let message = self.message().await?;
            match message[0] {
                b'S' => {
                    let (name, value) = backend::parameter(&message)?;
                    parameters.set(name, value);
                }
                b'K' if message.len() >= HEAD + 8 => key = Some(message[HEAD..].to_vec()),
                b'N' => {}
                b'Z' => break,
                b'E' => return Err(refused(&message)),
                _ => return Err(ConnectError::Protocol("unexpected message after authentication")),
            }
        }
        if !self.buffer.is_empty() {
            return Err(ConnectError::Protocol("bytes behind ReadyForQuery"));
        }
        Ok(Connection::new(self.stream, key.unwrap_or_default(), Arc::clone(login.database), parameters))
    }

    async fn authenticate(&mut self, login: &Login<'_>) -> Result<(), ConnectError> {
        loop {
            let message = self.message().await?;
            let (kind, data) = authentication(&message)?;
            match kind {
                0 => return Ok(()),
                3 if self.private() => self.password(login.password.expose().as_bytes()).await?,
                3 => return Err(ConnectError::Protocol("asks for a cleartext password without TLS")),
                5 => {
                    let salt = data.first_chunk::<4>().ok_or(ConnectError::Protocol("MD5 without salt"))?;
                    let answer = postgres_protocol::authentication::md5_hash(
                        login.place.role.as_bytes(),
                        login.password.expose().as_bytes(),
                        *salt,
                    );
                    self.password(answer.as_bytes()).await?;
                }
                10 => return self.scram(login, data).await,
                _ => return Err(ConnectError::Protocol("asks for an authentication that we don't do")),
            }
        }
    }

    async fn scram(&mut self, login: &Login<'_>, offered: &[u8]) -> Result<(), ConnectError> {
        let offers = |name: &str| offered.split(|&b| b == 0).any(|offer| offer == name.as_bytes());
        let plus = offers("SCRAM-SHA-256-PLUS");
        if !plus && !offers("SCRAM-SHA-256") {
            return Err(ConnectError::Protocol("offers no SCRAM mechanism that we do"));
        }
        let binding = match self.end_point() {
            Some(data) if plus => Binding::EndPoint(data),
            Some(_) => Binding::NotOffered,
            None => Binding::None,
        };
        let mechanism = binding.mechanism();
        let (mut exchange, first) = Exchange::new(binding, "").map_err(ConnectError::Scram)?;
        let mut out = Vec::new();
        wire::put(&mut out, b'p', |out| {
            wire::put_cstr(out, mechanism.as_bytes());
            out.extend_from_slice(&u32::try_from(first.len()).unwrap_or(0).to_be_bytes());
            out.extend_from_slice(first.as_bytes());
        });
        self.stream.write_all(&out).await?;

        let message = self.message().await?;
        let (11, server_first) = authentication(&message)? else {
            return Err(ConnectError::Protocol("expected AuthenticationSASLContinue"));
        };
        let mut keys = login.keys.lock().clone();
        let last = exchange.answer(server_first, login.password, &mut keys).map_err(ConnectError::Scram)?;
        *login.keys.lock() = keys;
        let mut out = Vec::new();
        wire::put(&mut out, b'p', |out| out.extend_from_slice(last.as_bytes()));
        self.stream.write_all(&out).await?;

        let message = self.message().await?;
        let (12, server_final) = authentication(&message)? else {
            return Err(ConnectError::Protocol("expected AuthenticationSASLFinal"));
        };
        exchange.finish(server_final).map_err(ConnectError::Scram)?;
        match authentication(&self.message().await?)? {
            (0, _) => Ok(()),
            _ => Err(ConnectError::Protocol("expected AuthenticationOk")),
        }
    }

    /// Whether a cleartext password stays between us and the server.
    fn private(&self) -> bool {
        match &self.stream {
            Stream::Tls(_) | Stream::Plain(Raw::Unix(_) | Raw::Memory(_)) => true,
            Stream::Plain(Raw::Tcp(tcp)) => tcp.peer_addr().is_ok_and(|addr| addr.ip().is_loopback()),
            // Only what a client sent first is ever replayed.
            Stream::Plain(Raw::Replay(_)) | Stream::WebSocket(_) => false,
        }
    }

    fn end_point(&self) -> Option<Vec<u8>> {
        let Stream::Tls(tls) = &self.stream else { return None };
        scram::end_point(tls.get_ref().1.peer_certificates()?.first()?)
    }

    async fn password(&mut self, secret: &[u8]) -> Result<(), ConnectError> {
        let mut out = Vec::with_capacity(secret.len() + 8);
        wire::put(&mut out, b'p', |out| wire::put_cstr(out, secret));
        Ok(self.stream.write_all(&out).await?)
    }

    /// The next whole message.
    async fn message(&mut self) -> Result<Vec<u8>, ConnectError> {
        loop {
            if let Some(head) = wire::head(&self.buffer)? {
                if head.len > MESSAGE_MAX {
                    return Err(ConnectError::Protocol("message too long for a login"));
                }
                if self.buffer.len() >= head.len {
                    let rest = self.buffer.split_off(head.len);
                    return Ok(std::mem::replace(&mut self.buffer, rest));
                }
            }
            let before = self.buffer.len();
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(ConnectError::Io(std::io::ErrorKind::UnexpectedEof.into()));
            }
            self.read += self.buffer.len() - before;
            if self.read > LOGIN_MAX {
                return Err(ConnectError::Protocol("login too long"));
            }
        }
    }
}

/// The kind and data of an authentication message; a refusal becomes an error.
fn authentication(message: &[u8]) -> Result<(u32, &[u8]), ConnectError> {
    match message[0] {
        b'R' => {
            let (kind, data) = message[HEAD..]
                .split_first_chunk::<4>()
                .ok_or(ConnectError::Protocol("short authentication message"))?;
            Ok((u32::from_be_bytes(*kind), data))
        }
        b'E' => Err(refused(message)),
        _ => Err(ConnectError::Protocol("expected an authentication message")),
    }
}

fn refused(message: &[u8]) -> ConnectError {
    let text = |field| String::from_utf8_lossy(backend::field(message, field).unwrap_or_default()).into_owned();
    ConnectError::Refused { code: text(b'C'), message: text(b'M') }
}

#[cfg(test)]
mod tests {
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::net::tls::{ClientTls, TlsMode};

    /// Offers SCRAM with these mechanisms and gives the client's first answer: mechanism, then what it begins with.
    async fn first_answer(tls: bool, offered: &[&str]) -> (String, String) {
        let (ours, theirs) = tokio::io::duplex(16 * 1024);
        let mut server: Box<dyn Socket> = Box::new(theirs);
        let mut stream = Stream::Plain(Raw::Memory(ours));
        if tls {
            let made = rcgen::generate_simple_self_signed(["db.example".to_owned()]).unwrap();
            let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let config = rustls::ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![made.cert.der().clone()], key)
                .unwrap();
            let client = ClientTls::new(TlsMode::Require, None).unwrap();
            let Stream::Plain(raw) = stream else { unreachable!("made above") };
            let accept = TlsAcceptor::from(Arc::new(config));
            let (s, c) = tokio::join!(accept.accept(server), client.connect(raw, "db.example", &[]));
            (server, stream) = (Box::new(s.unwrap()), c.unwrap());
        }
        let place = Namespace { role: "role".into(), database: "database".into() };
        let password = Password::new("secret");
        let login = Login { place: &place, database: &"database".into(), password: &password, keys: &Mutex::new(None) };
        let mut offer = Vec::new();
        backend::put_sasl(&mut offer, offered);
        let answer = async {
            server.write_all(&offer).await.unwrap();
            let len = {
                let mut startup = [0; 4];
                server.read_exact(&mut startup).await.unwrap();
                u32::from_be_bytes(startup) as usize
            };
            server.read_exact(&mut vec![0; len - 4]).await.unwrap();
            let mut head = [0; HEAD];
            server.read_exact(&mut head).await.unwrap();
            let mut body = vec![0; u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize - 4];
            server.read_exact(&mut body).await.unwrap();
            drop(server);
            let (mechanism, rest) = wire::cstr(&body).unwrap();
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            let first = text(&rest[4..]);
            (text(mechanism), first[..first.find("n=").unwrap()].to_owned())
        };
        let client = Conversation { stream, buffer: Vec::new(), read: 0 }.run(&login);
        let (refused, answer) = tokio::join!(client, answer);
        assert!(refused.is_err(), "the server went away");
        answer
    }

    trait Socket: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send {}
    impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send> Socket for S {}

    #[tokio::test]
    async fn over_tls_the_login_is_bound_to_the_server_s_certificate_where_that_is_offered() {
        const PLUS: &str = "SCRAM-SHA-256-PLUS";
        const PLAIN: &str = "SCRAM-SHA-256";
        let chosen = |mechanism: &str, header: &str| (mechanism.to_owned(), header.to_owned());
        assert_eq!(first_answer(true, &[PLUS, PLAIN]).await, chosen(PLUS, "p=tls-server-end-point,,"));
        assert_eq!(first_answer(true, &[PLAIN, PLUS]).await, chosen(PLUS, "p=tls-server-end-point,,"));
        // A server that was made to hide it learns that we could have.
        assert_eq!(first_answer(true, &[PLAIN]).await, chosen(PLAIN, "y,,"));
        assert_eq!(first_answer(false, &[PLAIN]).await, chosen(PLAIN, "n,,"));
    }
}
