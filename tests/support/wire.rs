//! A client that speaks raw protocol 3, so that tests decide every byte and see every message.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
};

use postgres_protocol::authentication::{
    md5_hash,
    sasl::{ChannelBinding, ScramSha256},
};

/// One message from the server.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    pub kind: u8,
    pub body: Vec<u8>,
}

impl Message {
    /// A field of an ErrorResponse or NoticeResponse.
    pub fn field(&self, wanted: u8) -> String {
        let mut fields = self.body.split(|byte| *byte == 0);
        let found = fields.find(|field| field.first() == Some(&wanted));
        found.map(|field| String::from_utf8_lossy(&field[1..]).into_owned()).unwrap_or_default()
    }

    /// A RowDescription's columns: name, and all but which table they come from.
    fn described(&self) -> String {
        let mut rest = &self.body[2..];
        let mut columns = Vec::new();
        while let Some(end) = rest.iter().position(|byte| *byte == 0) {
            columns.push(format!("{} {:?}", String::from_utf8_lossy(&rest[..end]), &rest[end + 5..end + 19]));
            rest = &rest[end + 19..];
        }
        columns.join(", ")
    }

    fn columns(&self) -> Vec<Option<String>> {
        let count = u16::from_be_bytes([self.body[0], self.body[1]]);
        let mut rest = &self.body[2..];
        (0..count)
            .map(|_| {
                let (len, tail) = rest.split_first_chunk::<4>().expect("a length");
                let Ok(len) = usize::try_from(i32::from_be_bytes(*len)) else {
                    rest = tail;
                    return None;
                };
                let (value, tail) = tail.split_at(len);
                rest = tail;
                Some(String::from_utf8_lossy(value).into_owned())
            })
            .collect()
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = String::from_utf8_lossy(&self.body[..self.body.len().min(300)]).replace('\0', "|");
        write!(f, "{} {text}", char::from(self.kind))
    }
}

/// Messages that answer something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply(pub Vec<Message>);

impl Reply {
    /// The kinds as text, in order.
    pub fn kinds(&self) -> String {
        self.0.iter().map(|message| char::from(message.kind)).collect()
    }

    pub fn of(&self, kind: u8) -> Vec<&Message> {
        self.0.iter().filter(|message| message.kind == kind).collect()
    }

    /// All rows.
    pub fn rows(&self) -> Vec<Vec<Option<String>>> {
        self.of(b'D').into_iter().map(Message::columns).collect()
    }

    /// The first column of the first row, `"NULL"` for null, empty for no row.
    pub fn value(&self) -> String {
        self.rows().first().map_or(String::new(), |row| row[0].clone().unwrap_or("NULL".into()))
    }

    /// SQLSTATEs of all errors.
    pub fn codes(&self) -> Vec<String> {
        self.of(b'E').into_iter().map(|message| message.field(b'C')).collect()
    }

    /// SQLSTATE of the first error, empty if there is none.
    pub fn code(&self) -> String {
        self.codes().into_iter().next().unwrap_or_default()
    }

    /// A field of the first error.
    pub fn error(&self, field: u8) -> String {
        self.of(b'E').first().map_or(String::new(), |message| message.field(field))
    }

    /// All command tags.
    pub fn tags(&self) -> Vec<String> {
        let text = |message: &Message| String::from_utf8_lossy(&message.body).trim_end_matches('\0').to_owned();
        self.of(b'C').into_iter().map(text).collect()
    }

    /// The transaction state of the last ReadyForQuery.
    pub fn status(&self) -> char {
        self.of(b'Z').last().map_or('-', |message| char::from(message.body[0]))
    }

    /// What one server would say word for word like another: not where in its source an error was made, nor which
    /// process it is.
    pub fn comparable(&self) -> Vec<(char, String)> {
        let text = |message: &Message| match message.kind {
            b'E' | b'N' => [b'S', b'V', b'C', b'M', b'D', b'H', b'P'].map(|field| message.field(field)).join("|"),
            b'T' => message.described(),
            _ => String::from_utf8_lossy(&message.body).into_owned(),
        };
        self.0.iter().map(|message| (char::from(message.kind), text(message))).collect()
    }
}

/// Anything to read from and write to.
pub trait Socket: Read + Write + Send {}
impl<T: Read + Write + Send> Socket for T {}

/// A client's connection.
pub struct Wire {
    stream: Box<dyn Socket>,
    /// The plain socket below, for shutting down and time limits.
    pub tcp: TcpStream,
    /// Reported parameters, in the order they came.
    pub parameters: Vec<(String, String)>,
    /// Body of BackendKeyData: process id and secret.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Wire({:?})", self.tcp.peer_addr())
    }
}

impl Wire {
    /// Connects; nothing is sent.
    pub fn connect(address: SocketAddr) -> Self {
        let tcp = TcpStream::connect(address).expect("a listener");
        tcp.set_read_timeout(Some(super::PATIENCE)).expect("set");
        tcp.set_write_timeout(Some(super::PATIENCE)).expect("set");
        tcp.set_nodelay(true).expect("set");
        let stream = Box::new(tcp.try_clone().expect("a second handle"));
        Self { stream, tcp, parameters: Vec::new(), key: Vec::new() }
    }

    /// Puts something between this client and its socket, such as TLS.
    pub fn through(mut self, wrap: impl FnOnce(TcpStream) -> Box<dyn Socket>) -> Self {
        self.stream = wrap(self.tcp.try_clone().expect("a second handle"));
        self
    }

    /// Connects and logs in as `app` to `app`.
    pub fn login(address: SocketAddr, secret: &str, parameters: &[(&str, &str)]) -> Result<Self, Message> {
        Self::login_as(address, secret, "app", "app", parameters)
    }

    /// Connects and logs in.
    ///
    /// # Errors
    /// The ErrorResponse.
    pub fn login_as(
        address: SocketAddr,
        secret: &str,
        user: &str,
        database: &str,
        parameters: &[(&str, &str)],
    ) -> Result<Self, Message> {
        let mut wire = Self::connect(address);
        let mut all = vec![("user", user), ("database", database)];
        all.extend_from_slice(parameters);
        wire.send(&startup(196_608, &all));
        wire.authenticate(secret, user)?;
        Ok(wire)
    }

    /// Answers what the server asks until it is ready.
    ///
    /// # Errors
    /// The ErrorResponse.
    pub fn authenticate(&mut self, secret: &str, user: &str) -> Result<(), Message> {
        let mut scram = None;
        loop {
            let message = self.read().unwrap_or(Message { kind: b'E', body: b"CEOF\0Mclosed\0\0".to_vec() });
            match message.kind {
                b'R' => match message.body[3] {
                    0 => {}
                    3 => self.send(&password(secret)),
                    5 => {
                        let salt = message.body[4..8].try_into().expect("four bytes");
                        self.send(&password(&md5_hash(user.as_bytes(), secret.as_bytes(), salt)));
                    }
                    10 => {
                        let client = ScramSha256::new(secret.as_bytes(), ChannelBinding::unsupported());
                        self.send(&sasl_initial("SCRAM-SHA-256", client.message()));
                        scram = Some(client);
                    }
                    11 => {
                        let client = scram.as_mut().expect("begun");
                        client.update(&message.body[4..]).expect("a good challenge");
                        let response = client.message().to_vec();
                        self.send(&message_of(b'p', &response));
                    }
                    12 => scram.as_mut().expect("begun").finish(&message.body[4..]).expect("a good signature"),
                    other => panic!("authentication {other}"),
                },
                b'S' => self.note(&message),
                b'K' => self.key = message.body,
                b'E' => return Err(message),
                b'Z' => return Ok(()),
                _ => {}
            }
        }
    }

    fn note(&mut self, message: &Message) {
        let mut words = message.body.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        let pair = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        self.parameters.retain(|(name, _)| *name != pair.0);
        self.parameters.push(pair);
    }

    /// The value of a reported parameter.
    pub fn parameter(&self, name: &str) -> &str {
        self.parameters.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    /// Writes in one go.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("sent");
    }

    /// Writes; the other side may have gone.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    pub fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte).ok().map(|()| byte[0])
    }

    /// The next message; `None` once the connection has ended.
    ///
    /// # Panics
    /// Nothing comes within [`super::PATIENCE`].
    pub fn read(&mut self) -> Option<Message> {
        let mut head = [0; 5];
        if let Err(error) = self.stream.read_exact(&mut head) {
            let waited = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            assert!(!waited, "no message came");
            return None;
        }
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let mut body = vec![0; len - 4];
        self.stream.read_exact(&mut body).ok()?;
        let message = Message { kind: head[0], body };
        if message.kind == b'S' {
            self.note(&message);
        }
        Some(message)
    }

    /// Reads up to and with the first message of `kind`, or to the end.
    pub fn up_to(&mut self, kind: u8) -> Reply {
        let mut messages = Vec::new();
        while let Some(message) = self.read() {
            let last = message.kind == kind;
            messages.push(message);
            if last {
                break;
            }
        }
        Reply(messages)
    }

    /// Reads to the end of the connection.
    pub fn rest(&mut self) -> Reply {
        self.up_to(0)
    }

    /// Sends and reads up to the `times`-th ReadyForQuery, or to the end.
    pub fn run(&mut self, bytes: &[u8], times: usize) -> Reply {
        self.send(bytes);
        let mut all = Vec::new();
        for _ in 0..times {
            all.extend(self.up_to(b'Z').0);
        }
        Reply(all)
    }

    /// A simple Query and all of its answer.
    pub fn query(&mut self, text: &str) -> Reply {
        self.run(&query(text), 1)
    }

    /// A simple Query that succeeds; the first column of its first row.
    pub fn ask(&mut self, text: &str) -> String {
        let reply = self.query(text);
        assert_eq!(reply.code(), "", "{text}: {reply:?}");
        reply.value()
    }

    /// A simple Query's SQLSTATE, empty when it succeeds.
    pub fn code(&mut self, text: &str) -> String {
        self.query(text).code()
    }

    /// One statement in the extended protocol, unnamed, without parameters.
    pub fn extended(&mut self, text: &str) -> Reply {
        let bytes = [parse("", text), bind("", "", &[]), describe(b'P', ""), execute("", 0), sync()].concat();
        self.run(&bytes, 1)
    }

    /// Says goodbye.
    pub fn close(mut self) {
        let _ = self.try_send(&message_of(b'X', b""));
    }
}

/// A message of `kind`.
pub fn message_of(kind: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len() + 4).expect("below 4 GiB");
    [&[kind], &len.to_be_bytes()[..], body].concat()
}

fn cstrings(texts: &[&str]) -> Vec<u8> {
    texts.iter().flat_map(|text| text.bytes().chain([0])).collect()
}

pub fn startup(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    for (name, value) in parameters {
        body.extend(cstrings(&[name, value]));
    }
    body.push(0);
    let len = u32::try_from(body.len() + 4).expect("small");
    [&len.to_be_bytes()[..], &body].concat()
}

/// An eight-byte request of a startup code.
pub fn request(code: u32) -> Vec<u8> {
    [8u32.to_be_bytes(), code.to_be_bytes()].concat()
}

pub const SSL: u32 = 80_877_103;
pub const GSS: u32 = 80_877_104;

/// A CancelRequest for the key that a server gave.
pub fn cancel(key: &[u8]) -> Vec<u8> {
    let len = u32::try_from(key.len() + 8).expect("small");
    [&len.to_be_bytes()[..], &80_877_102u32.to_be_bytes(), key].concat()
}

pub fn password(secret: &str) -> Vec<u8> {
    message_of(b'p', &cstrings(&[secret]))
}

pub fn sasl_initial(mechanism: &str, response: &[u8]) -> Vec<u8> {
    let len = u32::try_from(response.len()).expect("small");
    message_of(b'p', &[&cstrings(&[mechanism])[..], &len.to_be_bytes(), response].concat())
}

pub fn query(text: &str) -> Vec<u8> {
    message_of(b'Q', &cstrings(&[text]))
}

pub fn parse(name: &str, text: &str) -> Vec<u8> {
    message_of(b'P', &[cstrings(&[name, text]), vec![0, 0]].concat())
}

/// A Bind with parameters as text and results as text.
pub fn bind(portal: &str, statement: &str, values: &[&str]) -> Vec<u8> {
    let mut body = cstrings(&[portal, statement]);
    body.extend([0, 0]);
    body.extend(u16::try_from(values.len()).expect("few").to_be_bytes());
    for value in values {
        body.extend(u32::try_from(value.len()).expect("short").to_be_bytes());
        body.extend(value.bytes());
    }
    body.extend([0, 0]);
    message_of(b'B', &body)
}

/// Describes a statement (`S`) or portal (`P`).
pub fn describe(kind: u8, name: &str) -> Vec<u8> {
    message_of(b'D', &[&[kind], &cstrings(&[name])[..]].concat())
}

pub fn close(kind: u8, name: &str) -> Vec<u8> {
    message_of(b'C', &[&[kind], &cstrings(&[name])[..]].concat())
}

pub fn execute(portal: &str, rows: u32) -> Vec<u8> {
    message_of(b'E', &[&cstrings(&[portal])[..], &rows.to_be_bytes()].concat())
}

pub fn sync() -> Vec<u8> {
    message_of(b'S', b"")
}

pub fn flush() -> Vec<u8> {
    message_of(b'H', b"")
}

pub fn copy_data(data: &[u8]) -> Vec<u8> {
    message_of(b'd', data)
}

pub fn copy_done() -> Vec<u8> {
    message_of(b'c', b"")
}

pub fn copy_fail(why: &str) -> Vec<u8> {
    message_of(b'f', &cstrings(&[why]))
}
