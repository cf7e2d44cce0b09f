//! The packets before the first message: no kind byte, a length and a code.

use super::{super::Error, cstr};

/// Longest startup packet: PostgreSQL's MAX_STARTUP_PACKET_LENGTH.
pub const STARTUP_MAX: usize = 10_000;

/// Longest cancel secret of protocol 3.2.
pub const SECRET_MAX: usize = 256;

const PROTOCOL_3: u16 = 3;
const SSL: u32 = 80_877_103;
const GSS: u32 = 80_877_104;
const CANCEL: u32 = 80_877_102;

/// What a client opens with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// SSLRequest.
    Ssl,
    /// GSSENCRequest.
    Gss,
    /// CancelRequest: which process, with what secret.
    Cancel {
        /// The process id we handed out.
        pid: u32,
        /// 4 bytes in protocol 3.0, 4 to 256 in 3.2.
        secret: Vec<u8>,
    },
    /// StartupMessage.
    Login(Login),
}

/// A StartupMessage of protocol 3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// The minor version asked for.
    pub minor: u16,
    /// Parameters in order, without protocol extensions.
    pub parameters: Vec<(String, String)>,
    /// Names of protocol extensions (`_pq_.…`) asked for; we have none.
    pub extensions: Vec<String>,
}

impl Login {
    /// The value of a parameter; the last one counts, as in PostgreSQL.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// Reads one startup packet and says how many bytes it took.
///
/// # Errors
/// A length outside 8..=[`STARTUP_MAX`], an unknown protocol, parameters that don't end where the packet ends or
/// are not UTF-8.
pub fn decode(bytes: &[u8]) -> Result<Option<(usize, Startup)>, Error> {
    const AT: &str = "startup packet";
    let Some(&[a, b, c, d]) = bytes.first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_be_bytes([a, b, c, d]) as usize;
    if !(8..=STARTUP_MAX).contains(&len) {
        return Err(Error::new(AT, "invalid length of startup packet"));
    }
    let Some(packet) = bytes.get(..len) else { return Ok(None) };
    let code = u32::from_be_bytes([packet[4], packet[5], packet[6], packet[7]]);
    let body = &packet[8..];
    let startup = match code {
        SSL | GSS if !body.is_empty() => return Err(Error::new(AT, "invalid length of startup packet")),
        SSL => Startup::Ssl,
        GSS => Startup::Gss,
        CANCEL => {
            let Some((pid, secret)) = body.split_first_chunk::<4>() else {
                return Err(Error::new(AT, "invalid length of cancel request"));
            };
            if !(4..=SECRET_MAX).contains(&secret.len()) {
                return Err(Error::new(AT, "invalid length of cancel request"));
            }
            Startup::Cancel { pid: u32::from_be_bytes(*pid), secret: secret.to_vec() }
        }
        _ if (code >> 16) as u16 == PROTOCOL_3 => Startup::Login(login((code & 0xffff) as u16, body)?),
        _ => return Err(Error::new(AT, "unsupported frontend protocol")),
    };
    Ok(Some((len, startup)))
}

fn login(minor: u16, mut body: &[u8]) -> Result<Login, Error> {
    const AT: &str = "startup message";
    let mut login = Login { minor, parameters: Vec::new(), extensions: Vec::new() };
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| Error::new(AT, "a parameter is not UTF-8"));
    loop {
        let Some((name, rest)) = cstr(body) else { return Err(Error::new(AT, "no terminator as last byte")) };
        if name.is_empty() {
            return if rest.is_empty() { Ok(login) } else { Err(Error::new(AT, "bytes behind the terminator")) };
        }
        let Some((value, rest)) = cstr(rest) else { return Err(Error::new(AT, "a parameter has no value")) };
        let name = text(name)?;
        if name.starts_with("_pq_.") {
            login.extensions.push(name);
        } else {
            login.parameters.push((name, text(value)?));
        }
        body = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(code: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = (8 + body.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn a_login_is_read_once_whole() {
        let bytes = packet(196_608, b"user\0app\0_pq_.x\0\0database\0d\0\0");
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), Ok(None));
        }
        let Ok(Some((len, Startup::Login(login)))) = decode(&bytes) else { panic!("a login") };
        assert_eq!((len, login.minor), (bytes.len(), 0));
        assert_eq!(login.parameter("database"), Some("d"));
        assert_eq!(login.extensions, ["_pq_.x"]);
    }

    #[test]
    fn lies_are_refused() {
        for bad in [
            &b"\0\0\0\x07"[..],
            b"\0\x01\0\0",
            b"\xff\xff\xff\xff",
            b"GET / HTTP/1.1\r\n",
            &packet(196_608, b"user\0app\0"),
            &packet(196_608, b"user\0app\0\0x"),
            &packet(196_608, b"user\0\xff\0\0"),
            &packet(0x0002_0000, b"\0"),
            &packet(0x0004_0000, b"\0"),
            &packet(CANCEL, b"\0\0\0\x01abc"),
            &packet(CANCEL, &[1; 4 + 257]),
            &packet(SSL, b"x"),
        ] {
            assert!(decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn cancel_keys_may_be_short_or_long() {
        for n in [4, 32, 256] {
            let bytes = packet(CANCEL, &[vec![0, 0, 0, 9], vec![7; n]].concat());
            assert_eq!(decode(&bytes), Ok(Some((bytes.len(), Startup::Cancel { pid: 9, secret: vec![7; n] }))));
        }
    }
}
