//! A socket to a PostgreSQL server, with TLS if asked for. What follows (startup packet, login) is the caller's.

use std::{
    fmt, io,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout_at,
};

use crate::net::{
    Stream,
    stream::Raw,
    tls::{ClientTls, TlsError, TlsMode},
};

/// Length 8, then the code 80877103: "will you speak TLS?" (protocol 3, SSLRequest).
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// The ALPN name that PostgreSQL 17 registered; older servers ignore it.
const ALPN: &str = "postgresql";

/// A silent peer is asked for a sign of life after this long: shorter than the idle cut-off of common NATs (350 s).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// Between two unanswered keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Unanswered probes after which the peer counts as gone: dead peers are found within a minute.
const KEEPALIVE_RETRIES: u32 = 3;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host name or address, and a port.
    Tcp {
        /// Name or address; a certificate is checked against it.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket in a folder: `<folder>/.s.PGSQL.<port>`.
    Unix {
        /// The folder.
        folder: PathBuf,
        /// The port in the socket's name.
        port: u16,
    },
}

impl Address {
    /// Whether nobody outside this machine can read what goes there.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Unix { .. } => true,
            Address::Tcp { host, .. } => {
                host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix { folder, port } => write!(f, "{}/.s.PGSQL.{port}", folder.display()),
        }
    }
}

/// A server to dial, and how. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Target {
    address: Address,
    /// Dialled instead of the address, where there is a private way to it.
    through: Option<SocketAddr>,
    tls: Option<ClientTls>,
    timeout: Duration,
}

/// What was being done when dialling failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Looking the host name up.
    Resolve,
    /// Connecting the socket.
    Connect,
    /// Asking the server for TLS.
    AskTls,
    /// The TLS handshake, with the server's certificate.
    Handshake,
}

/// Whether dialling again can succeed. It is always safe: nothing of a client has been sent yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The server may be starting, full or briefly unreachable.
    Soon,
    /// Somebody has to change a setting first.
    Useless,
}

/// Why a server could not be dialled.
#[derive(Debug)]
pub struct DialError {
    /// What was being done.
    pub step: Step,
    /// Whether dialling again can help.
    pub retry: Retry,
    address: Address,
    cause: io::Error,
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = match self.step {
            Step::Resolve => "looking up the host",
            Step::Connect => "connecting",
            Step::AskTls => "asking for TLS",
            Step::Handshake => "in the TLS handshake",
        };
        write!(f, "{}: {step}: {}", self.address, self.cause)
    }
}

impl std::error::Error for DialError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

impl Target {
    /// A server at `address`; each dial, TLS included, may take `timeout`. Over a Unix socket `tls` is not used.
    ///
    /// # Errors
    /// An authority file that can't be used.
    pub fn new(address: Address, tls: TlsMode, ca_file: Option<PathBuf>, timeout: Duration) -> Result<Self, TlsError> {
        let tls = match (&address, tls) {
            (Address::Unix { .. }, _) | (_, TlsMode::Disable) => None,
            (Address::Tcp { .. }, mode) => Some(ClientTls::new(mode, ca_file)?),
        };
        Ok(Self { address, through: None, tls, timeout })
    }

    /// Dials `through` instead of the address; the name in TLS stays the address's.
    #[must_use]
    pub fn through(self, through: Option<SocketAddr>) -> Self {
        Self { through, ..self }
    }

    /// Another host, dialled in the same way.
    #[must_use]
    pub fn at(&self, host: &str, port: u16) -> Self {
        Self { address: Address::Tcp { host: host.to_owned(), port }, ..self.clone() }
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connects, and makes TLS if it is asked for. The server has not yet been told who we are.
    ///
    /// # Errors
    /// The step that failed and whether trying again can help; after the timeout the step that took too long.
    ///
    /// # Cancel safety
    /// May be dropped at any point; the socket is closed.
    pub async fn dial(&self) -> Result<Stream, DialError> {
        let deadline = tokio::time::Instant::from_std(Instant::now() + self.timeout);
        let mut step = Step::Resolve;
        let dialled = timeout_at(deadline, self.run(&mut step)).await;
        let cause = match dialled {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(cause)) => cause,
            Err(_) => io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {:?}", self.timeout)),
        };
        Err(DialError { step, retry: retry(step, cause.kind()), address: self.address.clone(), cause })
    }

    async fn run(&self, step: &mut Step) -> io::Result<Stream> {
        let (host, port) = match &self.address {
            Address::Unix { folder, port } => {
                *step = Step::Connect;
                let socket = UnixStream::connect(folder.join(format!(".s.PGSQL.{port}"))).await?;
                return Ok(Stream::Plain(Raw::Unix(socket)));
            }
            Address::Tcp { host, port } => (host, *port),
        };
        let addresses: Vec<_> = match self.through {
            Some(address) => vec![address],
            None => tokio::net::lookup_host((host.as_str(), port)).await?.collect(),
        };
        *step = Step::Connect;
        let mut socket = Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
        for address in addresses {
            socket = TcpStream::connect(address).await;
            if socket.is_ok() {
                break;
            }
        }
        let mut socket = socket?;
        tune(&socket)?;
        let Some(tls) = &self.tls else { return Ok(Stream::Plain(Raw::Tcp(socket))) };
        *step = Step::AskTls;
        socket.write_all(&SSL_REQUEST).await?;
        // One byte and no more: what an attacker put in clear behind it must meet the TLS parser, not ours.
        match socket.read_u8().await? {
            b'S' => {}
            b'N' => return Err(io::Error::new(io::ErrorKind::Unsupported, "the server does not speak TLS")),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "that is not a PostgreSQL server")),
        }
        *step = Step::Handshake;
        tls.connect(Raw::Tcp(socket), host, &[ALPN]).await
    }
}

/// Small messages leave at once; a dead peer is noticed.
fn tune(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket2::SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

fn retry(step: Step, kind: io::ErrorKind) -> Retry {
    match (step, kind) {
        (Step::AskTls, io::ErrorKind::Unsupported | io::ErrorKind::InvalidData) => Retry::Useless,
        // rustls reports a certificate it does not trust as invalid data.
        (Step::Handshake, io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => Retry::Useless,
        (Step::Connect, io::ErrorKind::PermissionDenied) => Retry::Useless,
        _ => Retry::Soon,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn target(port: u16, tls: TlsMode, timeout: Duration) -> Target {
        let address = Address::Tcp { host: "127.0.0.1".into(), port };
        Target::new(address, tls, None, timeout).expect("no file to read")
    }

    async fn answering(answer: &'static [u8]) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.expect("a client");
            let mut asked = [0; 8];
            socket.read_exact(&mut asked).await.expect("a request");
            assert_eq!(asked, SSL_REQUEST);
            socket.write_all(answer).await.expect("written");
            // Held open until the other side closes.
            let _ = socket.read_u8().await;
        });
        port
    }

    #[tokio::test]
    async fn a_server_without_tls_is_never_spoken_to_in_clear() {
        let port = answering(b"N").await;
        let error = target(port, TlsMode::Require, Duration::from_secs(5)).dial().await.expect_err("no TLS there");
        assert_eq!((error.step, error.retry), (Step::AskTls, Retry::Useless));
    }

    #[tokio::test]
    async fn bytes_smuggled_in_behind_the_answer_break_the_handshake() {
        let port = answering(b"SR\0\0\0\x08\0\0\0\0").await;
        let error = target(port, TlsMode::Require, Duration::from_secs(5)).dial().await.expect_err("not TLS");
        assert_eq!((error.step, error.retry), (Step::Handshake, Retry::Useless));
    }

    #[tokio::test]
    async fn a_silent_server_costs_the_timeout_and_no_more() {
        let port = answering(b"").await;
        let error = target(port, TlsMode::Require, Duration::from_millis(50)).dial().await.expect_err("silence");
        assert_eq!((error.step, error.retry), (Step::AskTls, Retry::Soon));
    }

    #[tokio::test]
    async fn a_closed_port_may_be_tried_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let error = target(port, TlsMode::Disable, Duration::from_secs(5)).dial().await.expect_err("nobody there");
        assert_eq!((error.step, error.retry), (Step::Connect, Retry::Soon));
        assert!(error.to_string().contains(&format!("127.0.0.1:{port}")), "{error}");
    }
}
