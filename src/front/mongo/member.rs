//! The one-node replica set as whose primary this front may be seen: `[mongodb]`.
//!
//! A hello does not carry the set's name that a driver was given (`replicaSet=NAME` in its connection string), and a
//! driver that was given one leaves every server that does not say that name; one `mongos`, which is what hello says
//! otherwise, it leaves as well. So the name is configured. A driver that finds a set goes on to the addresses that
//! its members advertise and forgets the one it came by (unless `directConnection=true` holds it there): the address
//! is configured too, the one by which clients reach this front from where they are, whatever listener, balancer or
//! translation of addresses is in between, and for which the certificate is made out.
//!
//! ```text
//! on TCP                          setName, hosts = [advertised], primary = me = advertised
//! on a Unix socket                mongos: nobody is led from there to an address
//! with loadBalanced in the hello  mongos with a serviceId: such drivers take no set
//! ```
//!
//! Of the server behind nothing is told: neither its set's name nor its members.

use serde::Deserialize;

use crate::{net::Peer, wire::mongo::bson};

/// Longest name of a set in bytes.
const NAME_MAX_BYTES: usize = 64;

/// Longest host name in bytes, as DNS has it.
const HOST_MAX_BYTES: usize = 253;

/// The version of the set's configuration: it never changes. Drivers believe the primary with the larger one; without
/// an `electionId` all processes of one advertised address are equal to them.
const SET_VERSION: i32 = 1;

/// `[mongodb]`: both, or neither.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The set's name, for connection strings with `replicaSet=NAME`. Unset: drivers see a mongos, and strings must not
    /// name a set.
    pub replica_set: Option<String>,
    /// `host:port` by which clients reach this front; drivers go on to it.
    pub advertise: Option<String>,
}

/// The primary of a set of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The set's name.
    set: String,
    /// `host:port`, in lower case, as drivers compare it.
    address: String,
}

impl Settings {
    /// The member, if one is configured.
    ///
    /// # Errors
    /// Every key with what is wrong with it.
    pub fn member(&self) -> Result<Option<Member>, Vec<(&'static str, String)>> {
        let (set, advertise) = match (&self.replica_set, &self.advertise) {
            (None, None) => return Ok(None),
            (Some(_), None) => {
                let what = "is required with mongodb.replica_set: the host:port by which clients reach this listener";
                return Err(vec![("advertise", what.into())]);
            }
            (None, Some(_)) => {
                let what = "is required with mongodb.advertise: the NAME of replicaSet=NAME in connection strings";
                return Err(vec![("replica_set", what.into())]);
            }
            (Some(set), Some(advertise)) => (set, advertise),
        };
        let mut faults = Vec::new();
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
        if set.is_empty() || set.len() > NAME_MAX_BYTES || !set.bytes().all(is_plain) {
            faults.push(("replica_set", format!("must be 1 to {NAME_MAX_BYTES} letters, digits, _, - and .")));
        }
        match address(advertise) {
            Ok(address) if faults.is_empty() => return Ok(Some(Member { set: set.clone(), address })),
            Ok(_) => {}
            Err(what) => faults.push(("advertise", what)),
        }
        Err(faults)
    }
}

/// An address in the form in which drivers compare it.
fn address(text: &str) -> Result<String, String> {
    const FORM: &str = "must be host:port, such as \"db.example.com:27018\" or \"[2001:db8::1]:27018\"";
    let (host, port) = text.rsplit_once(':').ok_or(FORM)?;
    let port: u16 = match port.parse() {
        Ok(port) if port > 0 => port,
        _ => return Err(format!("{FORM}; the port is 1 to 65535")),
    };
    let host = host.to_ascii_lowercase();
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let inner: std::net::Ipv6Addr = inner.parse().map_err(|_| FORM)?;
        if inner.is_unspecified() {
            return Err("is the address of no machine: clients could not connect to it".into());
        }
        return Ok(format!("[{inner}]:{port}"));
    }
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if host.is_empty() || host.len() > HOST_MAX_BYTES || !host.bytes().all(is_name) {
        return Err(FORM.into());
    }
    if host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_unspecified()) {
        return Err("is the address of no machine: clients could not connect to it".into());
    }
    Ok(format!("{host}:{port}"))
}

/// The member as whom a client sees us, if not as a mongos.
pub(super) fn seen<'m>(member: Option<&'m Member>, peer: &Peer, balanced: bool) -> Option<&'m Member> {
    match peer {
        Peer::Ip(_) => member.filter(|_| !balanced),
        Peer::Unix => None,
    }
}

impl Member {
    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The host without its port, and without the brackets of IPv6.
    pub fn host(&self) -> &str {
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(host, _)| host);
        host.trim_start_matches('[').trim_end_matches(']')
    }

    /// What a hello says of it.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        bson::put_str(out, "setName", &self.set);
        bson::put_i32(out, "setVersion", SET_VERSION);
        bson::put_bool(out, "secondary", false);
        let hosts = bson::open_array(out, "hosts");
        bson::put_str(out, "0", &self.address);
        bson::close(out, hosts);
        bson::put_str(out, "primary", &self.address);
        bson::put_str(out, "me", &self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(set: Option<&str>, advertise: Option<&str>) -> Settings {
        Settings { replica_set: set.map(str::to_owned), advertise: advertise.map(str::to_owned) }
    }

    fn keys(set: Option<&str>, advertise: Option<&str>) -> Vec<&'static str> {
        settings(set, advertise).member().expect_err("faults").iter().map(|fault| fault.0).collect()
    }

    #[test]
    fn a_name_and_an_address_or_neither() {
        assert_eq!(settings(None, None).member(), Ok(None));
        assert_eq!(keys(Some("rs0"), None), ["advertise"]);
        assert_eq!(keys(None, Some("db.example.com:27018")), ["replica_set"]);
        for (given, wanted, host) in [
            ("DB.Example.com:27018", "db.example.com:27018", "db.example.com"),
            ("127.0.0.1:1", "127.0.0.1:1", "127.0.0.1"),
            ("[2001:DB8:0::1]:27018", "[2001:db8::1]:27018", "2001:db8::1"),
        ] {
            let member = settings(Some("rs0"), Some(given)).member().expect("good").expect("there");
            assert_eq!((member.address(), member.host()), (wanted, host));
        }
    }

    #[test]
    fn nobody_is_led_away_from_a_unix_socket_or_a_balancer() {
        let member = settings(Some("rs0"), Some("a:1")).member().expect("good");
        let ip = Peer::Ip(([127, 0, 0, 1], 1).into());
        assert_eq!(seen(member.as_ref(), &ip, false), member.as_ref());
        for (peer, balanced) in [(&Peer::Unix, false), (&Peer::Unix, true), (&ip, true)] {
            assert_eq!(seen(member.as_ref(), peer, balanced), None);
        }
    }

    #[test]
    fn what_no_driver_could_use_is_refused() {
        for bad in [
            "db.example.com",
            "db.example.com:0",
            "db.example.com:65536",
            "db.example.com:port",
            ":27018",
            "a:1,b:2",
            "mongodb://a:1",
            "2001:db8::1:27018",
            "[2001:db8::1]",
            "[::]:27018",
            "0.0.0.0:27018",
            "/run/mongodb.sock",
            "a b:1",
        ] {
            assert_eq!(keys(Some("rs0"), Some(bad)), ["advertise"], "{bad}");
        }
        for bad in ["", "a b", "rs/0", "rs0&x=1", &"x".repeat(65)] {
            assert_eq!(keys(Some(bad), Some("a:1")), ["replica_set"], "{bad}");
        }
        assert_eq!(keys(Some(""), Some("")), ["replica_set", "advertise"]);
    }
}
