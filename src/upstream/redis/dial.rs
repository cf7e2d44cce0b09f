//! Connecting and logging in: everything in one round trip.

use std::{fmt, io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::nodes::Via;
use crate::{
    net::{Stream, stream::Raw, tls::ClientTls},
    tenant::namespace::Password,
    wire::resp,
};

/// Longest time for connecting and logging in together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer to a question of ours (`COMMAND LIST`, the result of a tenant's SORT).
const ANSWER_MAX_BYTES: usize = 512 << 20;

/// Why there is no connection.
#[derive(Debug)]
pub enum DialError {
    /// It can't be reached, or the connection broke. Nothing was executed; trying again is safe.
    Unreachable(io::Error),
    /// It did not answer in [`CONNECT_TIMEOUT`].
    Slow,
    /// It answered with an error: its first word, or a sentence of ours.
    Refused(String),
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DialError::Unreachable(error) => write!(f, "unreachable: {error}"),
            DialError::Slow => write!(f, "no answer in {CONNECT_TIMEOUT:?}"),
            DialError::Refused(text) => write!(f, "refused: {text}"),
        }
    }
}

impl std::error::Error for DialError {}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        DialError::Unreachable(error)
    }
}

/// Where the server is, and the platform's own login.
#[derive(Clone, Debug)]
pub struct Target {
    /// `host:port`, or the path of a Unix socket.
    pub address: String,
    /// Further addresses of the same kind: Sentinels, or nodes of a cluster.
    pub others: Vec<String>,
    /// How the server is found from these.
    pub via: Via,
    /// TLS towards it, or none.
    pub tls: ClientTls,
    /// The platform's user; `None` is `default`.
    pub user: Option<String>,
    /// The platform's password; `None` where the server asks for none.
    pub password: Option<Password>,
}

impl Target {
    /// Connects to an address, without logging in.
    pub async fn connect(&self, address: &str) -> Result<Stream, DialError> {
        let raw = if address.starts_with('/') {
            Raw::Unix(UnixStream::connect(address).await?)
        } else {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            Raw::Tcp(tcp)
        };
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        Ok(self.tls.connect(raw, host.trim_matches(['[', ']']), &[]).await?)
    }

    /// Connects to a server that is to be a master: where Sentinel named it, it says so itself.
    pub async fn reach(&self, address: &str) -> Result<Stream, DialError> {
        let mut stream = self.connect(address).await?;
        if let Via::Sentinel { .. } = self.via {
            let mut ask = Vec::new();
            let logins = self.put_login(&mut ask);
            resp::put_request(&mut ask, &[b"ROLE"]);
            let answers = exchange(&mut stream, &ask, logins + 1).await?;
            answers.iter().try_for_each(|answer| refused(answer))?;
            if strings(&answers[logins]).first().is_none_or(|role| role != "master") {
                return Err(DialError::Refused("READONLY it is no master".to_owned()));
            }
        }
        Ok(stream)
    }

    /// Appends the platform's login; gives how many replies it brings.
    pub fn put_login(&self, out: &mut Vec<u8>) -> usize {
        put_login(out, self.user.as_deref(), self.password.as_ref())
    }

    /// Connects to an address as the platform.
    pub async fn platform(&self, address: &str) -> Result<Stream, DialError> {
        let attempt = async {
            let mut stream = self.reach(address).await?;
            let mut login = Vec::new();
            let replies = self.put_login(&mut login);
            for reply in exchange(&mut stream, &login, replies).await? {
                refused(&reply)?;
            }
            Ok(stream)
        };
        tokio::time::timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or(Err(DialError::Slow))
    }
}

/// Appends a login; gives how many replies it brings.
pub fn put_login(out: &mut Vec<u8>, user: Option<&str>, password: Option<&Password>) -> usize {
    match (user, password) {
        (Some(user), Some(password)) => {
            resp::put_request(out, &[b"AUTH", user.as_bytes(), password.expose().as_bytes()]);
            1
        }
        (None, Some(password)) => {
            resp::put_request(out, &[b"AUTH", password.expose().as_bytes()]);
            1
        }
        _ => 0,
    }
}

/// Gives an error reply as [`DialError::Refused`]. Only its text, which never holds what we sent.
pub fn refused(reply: &[u8]) -> Result<(), DialError> {
    match reply.strip_prefix(b"-") {
        None => Ok(()),
        Some(text) => Err(DialError::Refused(String::from_utf8_lossy(text).trim_end().to_owned())),
    }
}

/// Sends `requests` and reads that many replies.
///
/// # Cancel safety
/// Not cancel safe: a connection on which it was dropped must be closed.
pub async fn exchange(stream: &mut Stream, requests: &[u8], replies: usize) -> Result<Vec<Vec<u8>>, DialError> {
    stream.write_all(requests).await?;
    stream.flush().await?;
    let mut buffer = Vec::with_capacity(4096);
    let mut answers = Vec::with_capacity(replies);
    let mut reply = resp::Reply::default();
    let mut walked = 0;
    while answers.len() < replies {
        let (used, done) = reply.advance(&buffer[walked..]).map_err(|fault| DialError::Refused(fault.0.to_owned()))?;
        walked += used;
        if done {
            answers.push(buffer.drain(..walked).collect());
            reply = resp::Reply::default();
            walked = 0;
            continue;
        }
        if buffer.len() > ANSWER_MAX_BYTES {
            return Err(DialError::Refused("an answer over the cap".to_owned()));
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(answers)
}

/// The number in an integer reply.
pub fn integer(reply: &[u8]) -> Option<i64> {
    std::str::from_utf8(reply.strip_prefix(b":")?.strip_suffix(b"\r\n")?).ok()?.parse().ok()
}

/// The bulk strings of a flat array.
pub fn strings(reply: &[u8]) -> Vec<String> {
    let mut cursor = resp::Cursor { rest: reply };
    let mut strings = Vec::new();
    while let Some(item) = cursor.item() {
        if let resp::Item::Bulk(bytes) = item {
            strings.push(String::from_utf8_lossy(bytes).into_owned());
        }
    }
    strings
}
