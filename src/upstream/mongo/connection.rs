//! One connection to a server: connecting, logging in, one request and its one reply at a time.
//!
//! A connection on which a reply is outstanding is never used again: who drops [`Connection::exchange`] half-way has
//! to drop the connection, at which the server ends the operation.

use std::{fmt, io, time::Duration};

use bytes::BufMut;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

use super::{Login, Target};
use crate::{
    net::{Stream, stream::Raw},
    upstream::scram::{self, Binding, Exchange, Keys},
    wire::{
        self,
        mongo::{
            self, HEADER_BYTES, Header, MESSAGE_MAX_BYTES, MORE_TO_COME, Message, OP_MSG,
            bson::{self, Document},
        },
    },
};

/// Longest time for connecting and logging in together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Room that is made at once for a reply; a long one grows by as much as has come.
const ROOM_BYTES: usize = 16 << 10;

/// Servers may exceed the cap on messages by what surrounds a largest document.
const REPLY_MAX_BYTES: usize = MESSAGE_MAX_BYTES + (1 << 20);

/// `AuthenticationFailed`.
pub const AUTHENTICATION_FAILED: i32 = 18;

/// Why there is no reply.
#[derive(Debug)]
pub enum Error {
    /// The server can't be reached, or the connection broke: what was asked may have run.
    Lost(io::Error),
    /// It did not connect in [`CONNECT_TIMEOUT`].
    Slow,
    /// It said what is not the protocol.
    Protocol(&'static str),
    /// It answered with an error.
    Refused {
        /// Its number.
        code: i32,
        /// Its words; they never hold what we sent for a password.
        message: String,
    },
    /// None of the servers is the primary.
    NoPrimary,
    /// The login needs what we don't do.
    Login(&'static str),
    /// SCRAM went wrong.
    Scram(scram::Fault),
}

impl Error {
    /// The server's number of an error that it answered with.
    pub fn code(&self) -> Option<i32> {
        match self {
            Error::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Lost(error) => write!(f, "unreachable: {error}"),
            Error::Slow => write!(f, "no answer in {CONNECT_TIMEOUT:?}"),
            Error::Protocol(what) => write!(f, "not MongoDB's protocol: {what}"),
            Error::Refused { code, message } => write!(f, "refused: {message} ({code})"),
            Error::NoPrimary => f.write_str("none of the servers is the primary"),
            Error::Login(what) => write!(f, "login: {what}"),
            Error::Scram(fault) => write!(f, "login: SCRAM failed: {fault:?}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Error::Lost(error)
    }
}

impl From<wire::Error> for Error {
    fn from(error: wire::Error) -> Self {
        Error::Protocol(error.what)
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    last_id: i32,
    /// The longest protocol version that the server said it speaks.
    pub wire_version: i32,
}

impl Connection {
    /// Connects to the primary among the servers and logs in. `keys` are those of the login, kept from the last time.
    ///
    /// # Errors
    /// The last server's.
    pub async fn open(target: &Target, login: Option<&Login>, keys: &Mutex<Option<Keys>>) -> Result<Self, Error> {
        let attempt = async {
            let mut last = Error::NoPrimary;
            for address in &target.addresses {
                match Self::connect(target, address).await {
                    Ok(Some(mut connection)) => {
                        if let Some(login) = login {
                            connection.log_in(login, keys).await?;
                        }
                        return Ok(connection);
                    }
                    Ok(None) => {}
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        tokio::time::timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or(Err(Error::Slow))
    }

    /// Connects; `None` for a server that takes no writes.
    async fn connect(target: &Target, address: &str) -> Result<Option<Self>, Error> {
        let raw = if address.starts_with('/') {
            Raw::Unix(UnixStream::connect(address).await?)
        } else {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            Raw::Tcp(tcp)
        };
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let stream = target.tls.connect(raw, host.trim_matches(['[', ']']), &[]).await?;
        let mut connection = Self { stream, last_id: 0, wire_version: 0 };
        let mut hello = Vec::new();
        let body = bson::open(&mut hello);
        bson::put_i32(&mut hello, "hello", 1);
        let client = bson::open_document(&mut hello, "client");
        let driver = bson::open_document(&mut hello, "driver");
        bson::put_str(&mut hello, "name", "dynabase");
        bson::put_str(&mut hello, "version", env!("CARGO_PKG_VERSION"));
        bson::close(&mut hello, driver);
        let os = bson::open_document(&mut hello, "os");
        bson::put_str(&mut hello, "type", std::env::consts::OS);
        bson::close(&mut hello, os);
        bson::close(&mut hello, client);
        bson::put_str(&mut hello, "$db", "admin");
        bson::close(&mut hello, body);
        let reply = connection.command(&hello).await?;
        let said = reply.document()?;
        let primary = said.get("isWritablePrimary")?.or(said.get("ismaster")?).is_some_and(|it| it.truthy());
        let version = said.get("maxWireVersion")?.and_then(|it| it.whole()).unwrap_or_default();
        connection.wire_version = i32::try_from(version).unwrap_or_default();
        Ok(primary.then_some(connection))
    }

    async fn log_in(&mut self, login: &Login, keys: &Mutex<Option<Keys>>) -> Result<(), Error> {
        if login.sha1 {
            return Err(Error::Login("the platform's user needs SCRAM-SHA-256, the URL asks for SCRAM-SHA-1"));
        }
        let (mut exchange, first) = Exchange::new(Binding::None, &login.user).map_err(Error::Scram)?;
        let mut request = Vec::new();
        let body = bson::open(&mut request);
        bson::put_i32(&mut request, "saslStart", 1);
        bson::put_str(&mut request, "mechanism", Binding::None.mechanism());
        bson::put_binary(&mut request, "payload", 0, first.as_bytes());
        let options = bson::open_document(&mut request, "options");
        bson::put_bool(&mut request, "skipEmptyExchange", true);
        bson::close(&mut request, options);
        bson::put_str(&mut request, "$db", &login.source);
        bson::close(&mut request, body);
        let (conversation, server_first, _) = sasl(&self.command(&request).await?)?;
        let mut kept = keys.lock().clone();
        let last = exchange.answer(&server_first, &login.password, &mut kept).map_err(Error::Scram)?;
        let (_, server_last, mut done) = sasl(&self.go_on(login, conversation, last.as_bytes()).await?)?;
        exchange.finish(&server_last).map_err(Error::Scram)?;
        *keys.lock() = kept;
        // Older servers end with an empty exchange.
        for _ in 0..2 {
            if done {
                return Ok(());
            }
            done = sasl(&self.go_on(login, conversation, b"").await?)?.2;
        }
        Err(Error::Protocol("a login that does not end"))
    }

    async fn go_on(&mut self, login: &Login, conversation: i32, payload: &[u8]) -> Result<Reply, Error> {
        let mut request = Vec::new();
        let body = bson::open(&mut request);
        bson::put_i32(&mut request, "saslContinue", 1);
        bson::put_i32(&mut request, "conversationId", conversation);
        bson::put_binary(&mut request, "payload", 0, payload);
        bson::put_str(&mut request, "$db", &login.source);
        bson::close(&mut request, body);
        self.command(&request).await
    }

    /// Sends a whole command, `$db` included, and gives the reply.
    ///
    /// # Errors
    /// Also [`Error::Refused`] for a reply that is not `ok`.
    pub async fn command(&mut self, body: &[u8]) -> Result<Reply, Error> {
        let mut message = Vec::with_capacity(HEADER_BYTES + 5 + body.len());
        mongo::begin_message(&mut message, 0, 0);
        message.extend_from_slice(body);
        mongo::end(&mut message, 0);
        let mut reply = Vec::new();
        self.exchange(&mut message, &mut reply).await?;
        let reply = Reply(reply);
        let document = reply.document()?;
        if document.get("ok")?.is_some_and(|ok| ok.truthy()) {
            return Ok(reply);
        }
        let code = document.get("code")?.and_then(|it| it.whole()).and_then(|it| i32::try_from(it).ok());
        let message = document.get("errmsg")?.and_then(|it| it.str()).unwrap_or("no reason given").to_owned();
        Err(Error::Refused { code: code.unwrap_or_default(), message })
    }

    /// Sends an OP_MSG, whose request id is written into it, and reads the one reply into `reply`, which is cleared.
    /// The reply is an OP_MSG of one body, framed well.
    ///
    /// # Errors
    /// The connection is of no further use.
    ///
    /// # Cancel safety
    /// None: drop the connection.
    pub async fn exchange(&mut self, message: &mut [u8], reply: &mut Vec<u8>) -> Result<(), Error> {
        let length = self.ask(message, reply).await?;
        self.rest(length, reply).await
    }

    /// The first half of [`Self::exchange`]: sends, waits for the reply's head, and gives the reply's length. What has
    /// come of it is in `reply`; [`Self::rest`] reads what is missing.
    ///
    /// # Errors
    /// The connection is of no further use.
    ///
    /// # Cancel safety
    /// None: drop the connection.
    pub async fn ask(&mut self, message: &mut [u8], reply: &mut Vec<u8>) -> Result<usize, Error> {
        self.last_id = self.last_id.wrapping_add(1);
        message[4..8].copy_from_slice(&self.last_id.to_le_bytes());
        self.stream.write_all(message).await?;
        self.stream.flush().await?;
        reply.clear();
        let header = loop {
            if let Some(header) = Header::read(reply, REPLY_MAX_BYTES)? {
                break header;
            }
            self.read(reply, ROOM_BYTES).await?;
        };
        if header.opcode != OP_MSG || header.response_to != self.last_id {
            return Err(Error::Protocol("an answer to another question"));
        }
        Ok(header.length)
    }

    /// The second half of [`Self::exchange`].
    ///
    /// # Errors
    /// The connection is of no further use.
    ///
    /// # Cancel safety
    /// None: drop the connection.
    pub async fn rest(&mut self, length: usize, reply: &mut Vec<u8>) -> Result<(), Error> {
        while reply.len() < length {
            // As much again as has come, so that a length that lies costs nothing.
            let room = (length - reply.len()).min(reply.len().max(ROOM_BYTES));
            self.read(reply, room).await?;
        }
        if reply.len() > length {
            return Err(Error::Protocol("two answers to one question"));
        }
        let (head, payload) = reply.split_first_chunk().ok_or(Error::Protocol("no header"))?;
        let parsed = Message::parse(head, payload)?;
        if parsed.flags & MORE_TO_COME != 0 || !parsed.sections().is_empty() {
            return Err(Error::Protocol("a stream of answers that nobody asked for"));
        }
        Ok(())
    }

    async fn read(&mut self, into: &mut Vec<u8>, room: usize) -> Result<(), Error> {
        into.reserve(room);
        let read = self.stream.read_buf(&mut into.limit(room)).await?;
        if read == 0 { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) } else { Ok(()) }
    }

    /// Whether an idle connection is still open: nothing to read, and no end either.
    pub fn is_alive(&mut self) -> bool {
        use std::{
            pin::Pin,
            task::{Context, Waker},
        };

        use tokio::io::{AsyncRead, ReadBuf};
        let mut byte = [0];
        let mut buffer = ReadBuf::new(&mut byte);
        Pin::new(&mut self.stream).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer).is_pending()
    }
}

/// A whole reply message.
#[derive(Debug)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// Its body.
    ///
    /// # Errors
    /// None for a reply that a connection gave.
    pub fn document(&self) -> Result<Document<'_>, wire::Error> {
        body(&self.0)
    }
}

/// The body of a reply message.
///
/// # Errors
/// None for a reply that [`Connection::exchange`] gave.
pub fn body(message: &[u8]) -> Result<Document<'_>, wire::Error> {
    let (head, payload) = message.split_first_chunk().ok_or(wire::Error { at: "reply", what: "no header" })?;
    Message::parse(head, payload).map(|message| message.body)
}

/// Conversation, payload and whether it is done.
fn sasl(reply: &Reply) -> Result<(i32, Vec<u8>, bool), Error> {
    let said = reply.document()?;
    let conversation = said.get("conversationId")?.and_then(|it| it.whole()).unwrap_or(1);
    let payload = said.get("payload")?.and_then(|it| it.binary()).map(|(_, bytes)| bytes.to_vec());
    let done = said.get("done")?.is_some_and(|it| it.truthy());
    Ok((i32::try_from(conversation).unwrap_or(1), payload.ok_or(Error::Protocol("a login without a payload"))?, done))
}
