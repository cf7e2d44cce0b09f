//! The settings of the PostgreSQL upstream, `[upstream.postgres]`.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer};
use tokio_postgres::config::Host;

use super::{Address, Admin, Target};
use crate::{
    net::tls::TlsMode,
    tenant::{namespace::Password, unit},
};

/// `[upstream.postgres]`: the server that holds the tenants' databases.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The administrator's URL: `postgres://user:password@host:port/database`, or with `?host=/folder` for a Unix
    /// socket. Required. The role needs CREATEDB and CREATEROLE, or is a superuser.
    #[serde(deserialize_with = "secret")]
    pub url: Option<Password>,
    /// How strictly TLS is asked for; unset: `disable` on this machine, `verify-full` elsewhere.
    pub tls: Option<TlsMode>,
    /// Authorities to trust (PEM); unset: the system's.
    pub ca_file: Option<PathBuf>,
    /// Connections that all tenants together may hold on the server, 1 to 100 000.
    pub max_connections: u32,
    /// Longest time to connect, TLS included.
    #[serde(deserialize_with = "unit::duration")]
    pub connect_timeout: Duration,
    /// An idle upstream connection is closed after this long.
    #[serde(deserialize_with = "unit::duration")]
    pub idle_timeout: Duration,
    /// Between two looks at the size of a tenant's database.
    #[serde(deserialize_with = "unit::duration")]
    pub storage_interval: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: None,
            tls: None,
            ca_file: None,
            max_connections: 90,
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(60),
            storage_interval: Duration::from_secs(30),
        }
    }
}

/// Most connections a PostgreSQL server can be configured for in practice; far more is a typing mistake.
const CONNECTIONS_MAX: u32 = 100_000;

impl Config {
    /// Checks what the types can't: key and fault of each.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        if let Err(fault) = self.login() {
            faults.push(("url", fault));
        }
        if !(1..=CONNECTIONS_MAX).contains(&self.max_connections) {
            faults.push(("max_connections", format!("must be 1 to {CONNECTIONS_MAX}")));
        }
        for (key, value) in [
            ("connect_timeout", self.connect_timeout),
            ("idle_timeout", self.idle_timeout),
            ("storage_interval", self.storage_interval),
        ] {
            if value < Duration::from_millis(100) {
                faults.push((key, "must be at least 100ms".into()));
            }
        }
        faults
    }

    /// The server, to be dialled by anybody's login.
    ///
    /// # Errors
    /// What is wrong with the URL or the authority file, in words.
    pub fn target(&self) -> Result<Target, String> {
        let (address, _) = self.login()?;
        let tls = self.tls.unwrap_or(if address.is_local() { TlsMode::Disable } else { TlsMode::VerifyFull });
        Target::new(address, tls, self.ca_file.clone(), self.connect_timeout).map_err(|error| error.to_string())
    }

    /// The administrator's login.
    ///
    /// # Errors
    /// As [`Self::target`].
    pub fn admin(&self) -> Result<Admin, String> {
        let (_, login) = self.login()?;
        Ok(Admin::new(self.target()?, login))
    }

    fn login(&self) -> Result<(Address, tokio_postgres::Config), String> {
        let url = self.url.as_ref().ok_or("is required: postgres://user:password@host:port/database")?.expose();
        if url.contains("sslmode=") || url.contains("sslrootcert=") {
            return Err("says how TLS is used: put that into the keys tls and ca_file".into());
        }
        // The parser's own message may quote the password.
        let login: tokio_postgres::Config =
            url.parse().map_err(|_| "is not a URL of the form postgres://user:password@host:port/database")?;
        if login.get_user().is_none_or(str::is_empty) {
            return Err("names no user".into());
        }
        let port = login.get_ports().first().copied().unwrap_or(5432);
        let address = match login.get_hosts() {
            [Host::Tcp(host)] => Address::Tcp { host: host.clone(), port },
            [Host::Unix(folder)] => Address::Unix { folder: folder.clone(), port },
            [] => return Err("names no host".into()),
            _ => return Err("names more than one host".into()),
        };
        Ok((address, login))
    }
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Password>, D::Error> {
    Ok(Some(Password::new(String::deserialize(deserializer)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_url(url: &str) -> Config {
        Config { url: Some(Password::new(url)), ..Config::default() }
    }

    #[test]
    fn a_url_says_where_and_who() {
        let target = with_url("postgres://root:p%40ss@db.example:5433/postgres").login().expect("good").0;
        assert_eq!(target, Address::Tcp { host: "db.example".into(), port: 5433 });
        let target = with_url("postgres://root@/postgres?host=/run/pg").login().expect("good").0;
        assert_eq!(target, Address::Unix { folder: "/run/pg".into(), port: 5432 });
    }

    #[test]
    fn a_bad_url_is_refused_without_its_password() {
        for bad in [
            "",
            "postgres://u:hunter2@a,b/x",
            "mysql://u:hunter2@a/x",
            "postgres://:hunter2@a/x",
            "postgres://u:hunter2@a:port/x",
            "postgres://u:hunter2@a/x?sslmode=disable",
        ] {
            let config = with_url(bad);
            let fault = config.login().expect_err(bad);
            assert!(!fault.contains("hunter2") && !format!("{config:?}").contains("hunter2"), "{fault}");
        }
    }
}
