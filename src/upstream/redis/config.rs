//! `[upstream.redis]`.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer};

use super::{Target, Via};
use crate::{
    net::{ClientTls, TlsMode},
    tenant::namespace::Password,
};

/// Where Redis is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The administrator's URL: `redis://user:password@host:6379`, `rediss://…` with TLS, `unix:/path`;
    /// `redis+sentinel://user:password@host:26379,host:26379/master` where Sentinel names the master (the Sentinels' own
    /// login, if they have one, as `?sentinel_user=…&sentinel_password=…`); `redis+cluster://user:password@host:6379,…`
    /// for a cluster; `rediss+…` with TLS. Its user makes the tenants' ACL users and databases. Without it there is no
    /// Redis front.
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
        let unknown = "must begin with redis://, redis+sentinel://, redis+cluster://, the same with rediss, or unix:/";
        let (scheme, rest) = match url.split_once("://") {
            Some(parts) => parts,
            None => match url.strip_prefix("unix:") {
                Some(path) if path.starts_with('/') => ("unix", path),
                _ => return Err(unknown.into()),
            },
        };
        let (scheme, kind) = scheme.split_once('+').unwrap_or((scheme, ""));
        let mode = match (scheme, kind) {
            ("redis", "" | "sentinel" | "cluster") | ("unix", "") => TlsMode::Disable,
            ("rediss", "" | "sentinel" | "cluster") => TlsMode::VerifyFull,
            _ => return Err(unknown.into()),
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
        if place.starts_with('/') {
            let address = place.to_owned();
            return Ok(Some(Target { address, others: Vec::new(), via: Via::Itself, tls, user, password }));
        }
        let (place, query) = place.split_once('?').unwrap_or((place, ""));
        let (hosts, path) = place.split_once('/').unwrap_or((place, ""));
        let via = match kind {
            "sentinel" => sentinel(path, query)?,
            "cluster" => Via::Cluster,
            _ => Via::Itself,
        };
        let port = if kind == "sentinel" { 26_379 } else { 6379 };
        let mut addresses = hosts.split(',').map(|host| {
            let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            if has_port { host.to_owned() } else { format!("{host}:{port}") }
        });
        if hosts.split(',').any(str::is_empty) {
            return Err("names no host".into());
        }
        let address = addresses.next().ok_or("names no host")?;
        let others: Vec<String> = addresses.collect();
        if kind.is_empty() && !others.is_empty() {
            return Err("names several hosts: redis+sentinel:// or redis+cluster:// is for that".into());
        }
        Ok(Some(Target { address, others, via, tls, user, password }))
    }
}

/// `/master[/0]?sentinel_user=…&sentinel_password=…`.
fn sentinel(path: &str, query: &str) -> Result<Via, String> {
    let master = path.split('/').next().unwrap_or_default();
    if master.is_empty() {
        return Err("names no master: redis+sentinel://host:26379/master".into());
    }
    let (mut user, mut password) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = unescaped(value).ok_or("its query is not well escaped")?;
        match key {
            "sentinel_user" => user = Some(value),
            "sentinel_password" => password = Some(Password::new(value)),
            _ => return Err("its query may hold sentinel_user and sentinel_password".into()),
        }
    }
    Ok(Via::Sentinel { master: master.to_owned(), user, password })
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
        let many =
            target("redis+sentinel://:pw@a,b:7000/main/0?sentinel_password=s%20s").expect("good").expect("a server");
        assert_eq!((many.address.as_str(), &many.others[..]), ("a:26379", &["b:7000".to_owned()][..]));
        let Via::Sentinel { master, user: None, password: Some(password) } = many.via else { panic!("Sentinel") };
        assert_eq!((master.as_str(), password.expose()), ("main", "s s"));
        let many = target("rediss+cluster://u:p@a:1,b:2,c").expect("good").expect("a server");
        assert!(matches!(many.via, Via::Cluster));
        assert_eq!((many.address.as_str(), many.others.len()), ("a:1", 2));
        for bad in
            ["redis+sentinel://h", "redis+sentinel://h/m?x=1", "redis://a,b", "redis+x://h", "redis+cluster://a,"]
        {
            target(bad).expect_err(bad);
        }
        for bad in ["http://h", "redis://", "redis://u:%zz@h", "unix:rel"] {
            let error = target(bad).expect_err(bad);
            assert!(!error.contains("zz"), "no secret is quoted");
        }
        assert!(Config::default().target().expect("good").is_none());
    }
}
