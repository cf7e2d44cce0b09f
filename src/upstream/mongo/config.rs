//! `[upstream.mongodb]`.

use std::path::PathBuf;

use mongodb::options::{AuthMechanism, ConnectionString, HostInfo, ServerAddress, Tls};
use serde::{Deserialize, Deserializer};

use crate::{
    net::{ClientTls, TlsMode},
    tenant::namespace::Password,
};

/// The port of an address that names none.
const PORT: u16 = 27017;

/// Where a login is looked up that names no place.
const LOGIN_SOURCE: &str = "admin";

/// Where MongoDB is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The administrator's URL: `mongodb://user:password@host:27017/?tls=true`. Its user makes the tenants' users and
    /// reads and writes their databases. Without it there is no MongoDB front.
    #[serde(deserialize_with = "secret")]
    pub url: Option<Password>,
    /// Authorities to trust with `tls=true`, PEM. Default the URL's `tlsCAFile`, else the system's.
    pub ca_file: Option<PathBuf>,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Password>, D::Error> {
    Ok(Some(Password::new(String::deserialize(deserializer)?)))
}

/// The servers of one deployment, and the platform's own login.
#[derive(Clone, Debug)]
pub struct Target {
    /// `host:port` of each, or the path of a Unix socket; at least one.
    pub addresses: Vec<String>,
    /// TLS towards them, or none.
    pub tls: ClientTls,
    /// The platform's login; `None` where the servers ask for none.
    pub login: Option<Login>,
    /// The name of the replica set, where the URL gives it.
    pub replica_set: Option<String>,
    /// Whether the one address is meant and no other member of its replica set.
    pub direct: bool,
}

/// A SCRAM login.
#[derive(Clone, Debug)]
pub struct Login {
    /// The user.
    pub user: String,
    /// Its password.
    pub password: Password,
    /// The database that knows the user.
    pub source: String,
    /// SCRAM-SHA-1 was asked for; SHA-256 otherwise.
    pub sha1: bool,
}

impl Config {
    /// The deployment, if there is one.
    ///
    /// # Errors
    /// What is wrong with the URL or the authorities, without quoting a secret.
    pub fn target(&self) -> Result<Option<Target>, String> {
        let Some(url) = &self.url else { return Ok(None) };
        let url = url.expose();
        if url.starts_with("mongodb+srv://") {
            return Err("is a mongodb+srv:// URL: give the servers themselves, \
                        mongodb://user:password@host1,host2,host3/?tls=true&replicaSet=NAME"
                .into());
        }
        // The parser's own words may quote a piece of the password.
        let parsed = ConnectionString::parse(url)
            .map_err(|_| "is not a URL such as mongodb://user:password@host:27017/?tls=true (escape @ : / % in it)")?;
        let HostInfo::HostIdentifiers(hosts) = &parsed.host_info else { return Err("names no host".into()) };
        let addresses: Vec<String> = hosts.iter().map(address).collect::<Result<_, _>>()?;
        if addresses.is_empty() {
            return Err("names no host".into());
        }
        let (mode, url_ca) = match &parsed.tls {
            Some(Tls::Enabled(options)) if options.allow_invalid_certificates == Some(true) => {
                (TlsMode::Require, options.ca_file_path.clone())
            }
            Some(Tls::Enabled(options)) if options.cert_key_file_path.is_some() => {
                return Err("has tlsCertificateKeyFile: client certificates are not used towards MongoDB".into());
            }
            Some(Tls::Enabled(options)) => (TlsMode::VerifyFull, options.ca_file_path.clone()),
            Some(Tls::Disabled) | None => (TlsMode::Disable, None),
        };
        let tls = ClientTls::new(mode, self.ca_file.clone().or(url_ca)).map_err(|error| error.to_string())?;
        let login = match &parsed.credential {
            None => None,
            Some(credential) => {
                let sha1 = match &credential.mechanism {
                    None | Some(AuthMechanism::ScramSha256) => false,
                    Some(AuthMechanism::ScramSha1) => true,
                    Some(_) => return Err("asks for another authMechanism than SCRAM-SHA-256 or SCRAM-SHA-1".into()),
                };
                let (Some(user), Some(password)) = (&credential.username, &credential.password) else {
                    return Err("has a user without a password".into());
                };
                let source = credential.source.as_deref().or(parsed.default_database.as_deref());
                Some(Login {
                    user: user.clone(),
                    password: Password::new(password.as_str()),
                    source: source.unwrap_or(LOGIN_SOURCE).to_owned(),
                    sha1,
                })
            }
        };
        let direct = parsed.direct_connection == Some(true);
        Ok(Some(Target { addresses, tls, login, replica_set: parsed.replica_set, direct }))
    }
}

fn address(address: &ServerAddress) -> Result<String, String> {
    match address {
        ServerAddress::Tcp { host, port } if host.contains(':') => Ok(format!("[{host}]:{}", port.unwrap_or(PORT))),
        ServerAddress::Tcp { host, port } => Ok(format!("{host}:{}", port.unwrap_or(PORT))),
        ServerAddress::Unix { path } => Ok(path.to_string_lossy().into_owned()),
        _ => Err("names a host of an unknown kind".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Result<Option<Target>, String> {
        Config { url: Some(Password::new(url)), ca_file: None }.target()
    }

    #[test]
    fn urls() {
        let full = target("mongodb://root:p%40ss@a.example,b.example:7000/?replicaSet=rs0&authSource=users&tls=true")
            .expect("good")
            .expect("a server");
        assert_eq!(full.addresses, ["a.example:27017", "b.example:7000"]);
        assert_eq!((full.replica_set.as_deref(), full.direct, full.tls.is_on()), (Some("rs0"), false, true));
        let login = full.login.expect("a login");
        assert_eq!((login.user.as_str(), login.password.expose(), login.source.as_str()), ("root", "p@ss", "users"));
        let plain = target("mongodb://u:p@127.0.0.1:27017/app?directConnection=true").expect("good").expect("a server");
        assert_eq!((plain.direct, plain.tls.is_on()), (true, false));
        assert_eq!(plain.login.map(|login| login.source).as_deref(), Some("app"));
        let open = target("mongodb://[::1]").expect("good").expect("a server");
        assert_eq!((open.addresses[0].as_str(), open.login.is_none()), ("[::1]:27017", true));
        assert!(Config::default().target().expect("good").is_none());
    }

    #[test]
    fn what_is_no_url_is_told_without_a_word_of_it() {
        for bad in [
            "http://s3cret@h",
            "mongodb://",
            "mongodb://root:s3cret",
            "mongodb://root:s3cret:s3cret@h",
            "mongodb://root:%zzs3cret@h",
            "mongodb://root:s3cret@h:s3cret",
            "mongodb://root@h",
            "mongodb://root:s3cret@h/?authMechanism=PLAIN",
            "mongodb://root:s3cret@h/?tls=true&tlsCertificateKeyFile=s3cret.pem",
            "mongodb+srv://root:s3cret@h",
        ] {
            let error = target(bad).expect_err(bad);
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
