//! The PROXY protocol, version 2: a load balancer's word on who its client is. Binary header of 16 bytes (signature,
//! version and command, family, length), then addresses and extras of that length; see the specification in HAProxy's
//! `doc/proxy-protocol.txt`, section 2.2. Version 1 is text without a length, cannot be read exactly, and is refused.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest body in bytes: addresses are at most 216, and balancers add some hundred bytes of extras.
const BODY_MAX_BYTES: usize = 4096;

/// A balancer sends its header in the first packet; more time than this only serves who wants to hold a place.
const DEADLINE: Duration = Duration::from_secs(5);

const HEADER_BYTES: usize = 16;
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Why a header was not believed.
#[derive(Debug)]
pub enum ProxyError {
    /// The first bytes are not the signature.
    Signature,
    /// The first bytes are version 1 of the protocol.
    Version1,
    /// An unknown version, command or address family.
    Unknown(&'static str, u8),
    /// The length is over its cap, or shorter than the addresses it has to hold.
    Length(usize),
    /// It did not come in time.
    Slow,
    /// The peer closed or the socket failed.
    Io(io::Error),
}

impl ProxyError {
    /// The metric label.
    pub fn label(&self) -> &'static str {
        match self {
            ProxyError::Signature => "signature",
            ProxyError::Version1 => "version1",
            ProxyError::Unknown(..) => "unknown",
            ProxyError::Length(_) => "length",
            ProxyError::Slow => "slow",
            ProxyError::Io(_) => "io",
        }
    }
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProxyError::Signature => f.write_str("no PROXY v2 header, which is required from this network"),
            ProxyError::Version1 => {
                f.write_str("a PROXY v1 header; set the balancer to version 2 (haproxy: send-proxy-v2)")
            }
            ProxyError::Unknown(what, byte) => write!(f, "PROXY header with unknown {what} {byte:#04x}"),
            ProxyError::Length(bytes) => write!(f, "PROXY header with a body of {bytes} bytes"),
            ProxyError::Slow => write!(f, "no PROXY header within {} s", DEADLINE.as_secs()),
            ProxyError::Io(error) => write!(f, "reading the PROXY header: {error}"),
        }
    }
}

impl std::error::Error for ProxyError {}

/// Reads exactly the header. Gives the client's address, or `None` where the balancer speaks for itself (a health
/// check) or for a client without an IP address.
///
/// # Errors
/// Anything but a well-formed header within the deadline: the caller closes the connection.
///
/// # Cancel safety
/// Not: bytes may have been read. Close the connection.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, ProxyError> {
    read_within(DEADLINE, stream).await
}

async fn read_within(
    deadline: Duration,
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<Option<SocketAddr>, ProxyError> {
    tokio::time::timeout(deadline, read_exactly(stream)).await.unwrap_or(Err(ProxyError::Slow))
}

async fn read_exactly(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, ProxyError> {
    let mut header = [0; HEADER_BYTES];
    // The signature alone first: who speaks another protocol may send fewer than 16 bytes and wait for an answer.
    let (signature, rest) = header.split_at_mut(SIGNATURE.len());
    stream.read_exact(signature).await.map_err(ProxyError::Io)?;
    if signature.starts_with(b"PROXY ") {
        return Err(ProxyError::Version1);
    }
    if signature != SIGNATURE {
        return Err(ProxyError::Signature);
    }
    stream.read_exact(rest).await.map_err(ProxyError::Io)?;
    let (command, family) = (header[12], header[13]);
    let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
    if length > BODY_MAX_BYTES {
        return Err(ProxyError::Length(length));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.map_err(ProxyError::Io)?;
    address(command, family, &body)
}

fn address(command: u8, family: u8, body: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
    match command {
        // What follows LOCAL is to be skipped, whatever it is.
        0x20 => return Ok(None),
        0x21 => {}
        other => return Err(ProxyError::Unknown("version or command", other)),
    }
    let short = || ProxyError::Length(body.len());
    match family {
        // Unspecified, and a Unix socket: no address that means anything here.
        0x00 | 0x31 => Ok(None),
        // Source address, destination address, source port, destination port.
        0x11 => {
            let body: &[u8; 12] = body.first_chunk().ok_or_else(short)?;
            let ip = Ipv4Addr::new(body[0], body[1], body[2], body[3]);
            Ok(Some(SocketAddr::new(IpAddr::V4(ip), u16::from_be_bytes([body[8], body[9]]))))
        }
        0x21 => {
            let body: &[u8; 36] = body.first_chunk().ok_or_else(short)?;
            let ip: &[u8; 16] = body.first_chunk().ok_or_else(short)?;
            let ip = IpAddr::V6(Ipv6Addr::from(*ip)).to_canonical();
            Ok(Some(SocketAddr::new(ip, u16::from_be_bytes([body[32], body[33]]))))
        }
        other => Err(ProxyError::Unknown("address family", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u8, family: u8, claimed: u16, body: &[u8]) -> Vec<u8> {
        [&SIGNATURE[..], &[command, family], &claimed.to_be_bytes(), body].concat()
    }

    const FOUR: [u8; 12] = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0x19, 0x20];

    async fn read_all(bytes: &[u8]) -> (Result<Option<SocketAddr>, ProxyError>, usize) {
        let mut left = bytes;
        let result = read(&mut left).await;
        (result, left.len())
    }

    #[tokio::test]
    async fn the_client_is_who_the_balancer_says_and_no_byte_of_it_is_swallowed() {
        let mut six = [0u8; 36];
        six[..16].copy_from_slice(&"2001:db8::7".parse::<Ipv6Addr>().unwrap().octets());
        six[32..34].copy_from_slice(&12345u16.to_be_bytes());
        let with_extras = [&FOUR[..], &[4, 0, 2, 0xaa, 0xbb]].concat();
        for (bytes, want) in [
            (header(0x21, 0x11, 12, &FOUR), Some("192.0.2.7:12345")),
            (header(0x21, 0x11, 17, &with_extras), Some("192.0.2.7:12345")),
            (header(0x21, 0x21, 36, &six), Some("[2001:db8::7]:12345")),
            (header(0x20, 0x00, 0, &[]), None),
            (header(0x20, 0x11, 12, &FOUR), None),
            (header(0x21, 0x00, 0, &[]), None),
            (header(0x21, 0x31, 216, &[0; 216]), None),
        ] {
            let (got, left) = read_all(&[bytes, b"next".to_vec()].concat()).await;
            assert_eq!(got.unwrap(), want.map(|text| text.parse().unwrap()));
            assert_eq!(left, 4, "exactly the header is read");
        }
    }

    #[tokio::test]
    async fn hostile_headers_are_refused() {
        let v1 = b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 6432\r\n".to_vec();
        let mut wrong = header(0x21, 0x11, 12, &FOUR);
        wrong[11] = b'\r';
        for (bytes, want) in [
            (v1, "version1"),
            (wrong, "signature"),
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "signature"),
            (header(0x11, 0x11, 12, &FOUR), "unknown"),
            (header(0x22, 0x11, 12, &FOUR), "unknown"),
            (header(0x21, 0x12, 12, &FOUR), "unknown"),
            (header(0x21, 0x11, 11, &FOUR), "length"),
            (header(0x21, 0x21, 12, &FOUR), "length"),
            (header(0x21, 0x11, 4097, &[0; 5000]), "length"),
            (header(0x21, 0x11, 13, &FOUR), "io"),
            (header(0x21, 0x11, 12, &FOUR)[..20].to_vec(), "io"),
            (SIGNATURE[..5].to_vec(), "io"),
            (Vec::new(), "io"),
        ] {
            let (got, _) = read_all(&bytes).await;
            assert_eq!(got.unwrap_err().label(), want, "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn a_silent_balancer_is_not_waited_for() {
        let (_silent, mut stream) = tokio::io::duplex(64);
        assert!(matches!(read_within(Duration::from_millis(1), &mut stream).await, Err(ProxyError::Slow)));
    }
}
