//! Where to listen, and taking the place: TCP, or a Unix socket's file.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::stream::{Peer, Raw};

/// Connections that the kernel may hold ready for us by default. A restarted fleet of clients comes all at once, and a
/// full queue costs each of them a second. The kernel cuts it to `net.core.somaxconn`, 4096 as well.
pub const BACKLOG: u32 = 4096;

/// A client that vanished without a word (power, network) is found after 60 s + 6 × 10 s of silence.
pub(super) const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
pub(super) const KEEPALIVE_PROBES: u32 = 6;

/// Who may use a Unix socket: owner and group.
pub(super) const UNIX_MODE: u32 = 0o660;

/// Where to listen: `127.0.0.1:6432`, `[::]:6432` (both families), `unix:/run/dynabase/postgres.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IP address and port; port 0 takes a free one.
    Tcp(SocketAddr),
    /// A path.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("\"unix:\" needs a path, as in \"unix:/run/dynabase/postgres.sock\"".to_owned()),
            Some(path) => Ok(Address::Unix(path.into())),
            None => text.parse().map(Address::Tcp).map_err(|_| {
                format!(
                    "{text:?} is not an address to listen on: use \"127.0.0.1:6432\", \"[::]:6432\" or \"unix:/path\""
                )
            }),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(addr) => addr.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One listener.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// Where.
    pub address: Address,
    /// Connections that the kernel may hold ready; default [`BACKLOG`].
    #[serde(default = "backlog")]
    pub backlog: u32,
    /// Networks of load balancers. From these a PROXY v2 header is required; from others it is not looked for.
    #[serde(default, deserialize_with = "networks")]
    pub proxy_from: Vec<IpNet>,
}

fn backlog() -> u32 {
    BACKLOG
}

fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let network = |text: &String| {
        text.parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| serde::de::Error::custom(format!("{text:?} is not a network such as \"10.0.0.0/8\"")))
    };
    Vec::<String>::deserialize(deserializer)?.iter().map(network).collect()
}

impl ListenConfig {
    /// The defaults at `address`.
    pub fn new(address: Address) -> Self {
        Self { address, backlog: BACKLOG, proxy_from: Vec::new() }
    }
}

/// A bound socket. Dropping it closes it, and removes its file if it is a Unix socket that nobody replaced.
#[derive(Debug)]
pub struct Listener {
    socket: Bound,
    address: Address,
    pub(super) proxy_from: Vec<IpNet>,
}

#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Binds and listens. Call within a tokio runtime.
    ///
    /// # Errors
    /// The system's, with the address in the text. A Unix socket's file is replaced only if it is a socket on which
    /// nobody listens.
    pub fn bind(config: &ListenConfig) -> io::Result<Self> {
        let bound = match &config.address {
            Address::Tcp(addr) => bind_tcp(*addr, config.backlog).map(Bound::Tcp),
            Address::Unix(path) => bind_unix(path, config.backlog).map(|(socket, file)| Bound::Unix(socket, file)),
        };
        let socket = bound
            .map_err(|error| io::Error::new(error.kind(), format!("can't listen on {}: {error}", config.address)))?;
        let address = match &socket {
            Bound::Tcp(socket) => Address::Tcp(socket.local_addr()?),
            Bound::Unix(_, file) => Address::Unix(file.path.clone()),
        };
        Ok(Self { socket, address, proxy_from: config.proxy_from.clone() })
    }

    /// Where it listens, with the port that was taken.
    pub fn local_addr(&self) -> &Address {
        &self.address
    }

    /// The port that was taken; `None` for a Unix socket.
    pub fn port(&self) -> Option<u16> {
        match &self.address {
            Address::Tcp(addr) => Some(addr.port()),
            Address::Unix(_) => None,
        }
    }

    pub(super) async fn accept(&self) -> io::Result<(Raw, Peer)> {
        match &self.socket {
            Bound::Tcp(socket) => {
                let (stream, addr) = socket.accept().await?;
                Ok((Raw::Tcp(stream), Peer::tcp(addr)))
            }
            Bound::Unix(socket, _) => Ok((Raw::Unix(socket.accept().await?.0), Peer::Unix)),
        }
    }

    /// The connections that the kernel holds ready; asks it and not the runtime, which may not have heard of them.
    pub(super) fn queued(self) -> impl Iterator<Item = (Raw, Peer)> {
        enum Plain {
            Tcp(std::net::TcpListener),
            Unix(std::os::unix::net::UnixListener),
        }
        let (plain, file) = match self.socket {
            Bound::Tcp(socket) => (socket.into_std().map(Plain::Tcp), None),
            Bound::Unix(socket, file) => (socket.into_std().map(Plain::Unix), Some(file)),
        };
        let accept = |plain: &Plain| match plain {
            Plain::Tcp(socket) => {
                let (stream, addr) = socket.accept()?;
                stream.set_nonblocking(true)?;
                io::Result::Ok((Raw::Tcp(TcpStream::from_std(stream)?), Peer::tcp(addr)))
            }
            Plain::Unix(socket) => {
                let (stream, _) = socket.accept()?;
                stream.set_nonblocking(true)?;
                Ok((Raw::Unix(UnixStream::from_std(stream)?), Peer::Unix))
            }
        };
        std::iter::from_fn(move || {
            let _removed_with_the_socket = &file;
            plain.as_ref().ok().and_then(|plain| accept(plain).ok())
        })
    }
}

fn bind_tcp(addr: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    // A restart must not wait for the old connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit these, which saves four system calls per connection.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES),
    )?;
    socket.bind(&addr.into())?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
    TcpListener::from_std(socket.into())
}

fn bind_unix(path: &Path, backlog: u32) -> io::Result<(UnixListener, SocketFile)> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the path exists and is not a socket"));
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Under another name until it has its mode and listens: at no instant may others connect, or find nobody.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{:x}", std::process::id()));
    let young = path.with_file_name(name);
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    socket.bind(&socket2::SockAddr::unix(&young)?)?;
    let placed = std::fs::set_permissions(&young, std::fs::Permissions::from_mode(UNIX_MODE))
        .and_then(|()| socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX)))
        .and_then(|()| std::fs::rename(&young, path))
        .and_then(|()| SocketFile::at(path));
    if placed.is_err() {
        let _ = std::fs::remove_file(&young);
    }
    let file = placed?;
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// The file of a bound Unix socket, removed on drop unless another process has put its own there.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}
