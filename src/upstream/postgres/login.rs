//! Logging in upstream: StartupMessage to ReadyForQuery, with whatever authentication the server asks for.
//!
//! What goes wrong here is ours, never the tenant's: a client is not told that its derived password is wrong.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    connection::{Connection, Parameters},
    dial::{DialError, Target},
    scram::{self, Binding, Exchange, Keys},
};
use crate::{
    net::{Stream, stream::Raw},
    tenant::{Namespace, namespace::Password},
    wire::postgres::{self as wire, HEAD, backend},
};

/// Longest message during a login; a server that sends more is not PostgreSQL.
const MESSAGE_MAX: usize = 64 * 1024;

/// Most bytes of a whole login.
const LOGIN_MAX: usize = 1024 * 1024;

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
    /// Whether the same attempt may succeed soon: the server is starting, restarting, or full.
    pub fn retry(&self) -> bool {
        match self {
            ConnectError::Dial(error) => error.retry == super::Retry::Soon,
            ConnectError::Io(_) => true,
            ConnectError::Refused { code, .. } => matches!(code.as_str(), "57P03" | "53300" | "57P01" | "57P02"),
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
        Ok(Connection::new(self.stream, key.unwrap_or_default(), login.place.database.as_str().into(), parameters))
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
        let (mut exchange, first) = Exchange::new(binding).map_err(ConnectError::Scram)?;
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
