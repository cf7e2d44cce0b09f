//! `[upstream.redis]`.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer};

use super::Target;
use crate::{
    net::{ClientTls, TlsMode},
    tenant::namespace::Password,
};

/// Where Redis is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The administrator's URL: `redis://user:password@host:6379`, `rediss://…` with TLS, `unix:/path`. Its user makes
    /// the tenants' ACL users and databases. Without it there is no Redis front.
    #[serde(deserialize_with = "secret")]
    pub url: Option<Password>,
    /// Authorities to trust with `rediss://`, PEM. Default the system's.
    pub ca_file: Option<PathBuf>,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Password>, D::Error> {
    Ok(Some(Password::new(String::deserialize(deserializer)?)))
}

impl Config {
    /// The server, if there is one.
    ///
    /// # Errors
    /// What is wrong with the URL or the authorities, without quoting a secret.
    pub fn target(&self) -> Result<Option<Target>, String> {
        let Some(url) = &self.url else { return Ok(None) };
        let url = url.expose();
        let (mode, rest) = match (url.strip_prefix("redis://"), url.strip_prefix("rediss://")) {
            (Some(rest), _) => (TlsMode::Disable, rest),
            (_, Some(rest)) => (TlsMode::VerifyFull, rest),
            _ => match url.strip_prefix("unix:") {
                Some(path) if path.starts_with('/') => (TlsMode::Disable, path),
                _ => return Err("must begin with redis://, rediss:// or unix:/".into()),
            },
        };
        let tls = ClientTls::new(mode, self.ca_file.clone()).map_err(|error| error.to_string())?;
        let (login, place) = rest.rsplit_once('@').map_or((None, rest), |(login, place)| (Some(login), place));
        let (user, password) = match login.map(|login| login.split_once(':').unwrap_or((login, ""))) {
            None => (None, None),
            Some((user, password)) => {
                let user = unescaped(user).ok_or("its user is not well escaped")?;
                let password = unescaped(password).ok_or("its password is not well escaped")?;
                ((!user.is_empty()).then_some(user), (!password.is_empty()).then(|| Password::new(password)))
            }
        };
        let address = if place.starts_with('/') {
            place.to_owned()
        } else {
            let place = place.split('/').next().unwrap_or_default();
            let has_port = place.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            if place.is_empty() {
                return Err("names no host".into());
            }
            if has_port { place.to_owned() } else { format!("{place}:6379") }
        };
        Ok(Some(Target { address, tls, user, password }))
    }
}

/// Takes the percent escapes out; `None` where they are broken.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16));
        let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Result<Option<Target>, String> {
        Config { url: Some(Password::new(url)), ca_file: None }.target()
    }

    #[test]
    fn urls() {
        let full = target("redis://root:p%40ss@db.example:7000/0").expect("good").expect("a server");
        assert_eq!((full.address.as_str(), full.user.as_deref()), ("db.example:7000", Some("root")));
        assert_eq!(full.password.map(|p| p.expose().to_owned()).as_deref(), Some("p@ss"));
        assert_eq!(target("redis://:pw@h").expect("good").expect("a server").address, "h:6379");
        assert_eq!(target("unix:/run/redis.sock").expect("good").expect("a server").address, "/run/redis.sock");
        for bad in ["http://h", "redis://", "redis://u:%zz@h", "unix:rel"] {
            let error = target(bad).expect_err(bad);
            assert!(!error.contains("zz"), "no secret is quoted");
        }
        assert!(Config::default().target().expect("good").is_none());
    }
}
