//! The settings of the Neon homes, `[upstream.neon]`.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Deserializer};

use super::{
    Homes, Projects, Settings,
    api::{self, Api},
};
use crate::{
    net::tls::TlsMode,
    tenant::{
        Names,
        namespace::{Password, is_domain},
        unit,
    },
    upstream::postgres::{self, Provisioner, Upstream},
};

/// `[upstream.neon]`: where tenants' Neon homes are. With neither `url` nor `api_key` there are none.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The administrator's URL of a PostgreSQL server on which each tenant gets a database: as `upstream.postgres.url`,
    /// and the same server will do, since homes share no name. This or `api_key`.
    #[serde(deserialize_with = "secret")]
    pub url: Option<Password>,
    /// A key of Neon's management API: each tenant gets a project of its own there. This or `url`.
    #[serde(deserialize_with = "secret")]
    pub api_key: Option<Password>,
    /// Where that API is.
    pub api_url: String,
    /// Longest time for one thing asked of it, pauses while it is busy included: 1 s to 10 min.
    #[serde(deserialize_with = "unit::duration")]
    pub api_timeout: Duration,
    /// The organisation at Neon that projects belong to; unset: the key's own.
    pub org_id: Option<String>,
    /// Where projects are made, such as `aws-eu-central-1`; unset: Neon's choice.
    pub region: Option<String>,
    /// The major version of PostgreSQL in new projects, 15 to 99.
    pub pg_version: u32,
    /// Hosts of tenants are `<org>.<domain>`, in connection strings and over HTTP: a token opens nothing at another's.
    pub domain: Option<String>,
    /// Dialled instead of the endpoints' own addresses: one end of a private link, as address and port.
    pub endpoint_address: Option<SocketAddr>,
    /// How strictly TLS is asked for; unset: `disable` on this machine, `verify-full` elsewhere.
    pub tls: Option<TlsMode>,
    /// Authorities to trust (PEM); unset: the system's.
    pub ca_file: Option<PathBuf>,
    /// Connections that all tenants together may hold there, 1 to 100 000.
    pub max_connections: u32,
    /// Longest time for one attempt to connect, TLS included. A compute that starts makes a connection wait.
    #[serde(deserialize_with = "unit::duration")]
    pub connect_timeout: Duration,
    /// Longest time for all attempts while a compute wakes up. At least 15 s.
    #[serde(deserialize_with = "unit::duration")]
    pub wake_timeout: Duration,
    /// An idle connection is closed after this long; well below the time after which a compute goes to sleep.
    #[serde(deserialize_with = "unit::duration")]
    pub idle_timeout: Duration,
    /// Between two looks at the size of a tenant's home; 0: every 30 s on a server, every 10 min at Neon, whose own
    /// numbers are as old as that.
    #[serde(deserialize_with = "unit::duration")]
    pub storage_interval: Duration,
}

/// Shortest useful `wake_timeout`: Neon's own edge may take some 13 s to give a compute up.
const WAKE_MIN: Duration = Duration::from_secs(15);

/// `storage_interval` unless it is given.
const STORAGE_ON_SERVER: Duration = Duration::from_secs(30);
const STORAGE_AT_NEON: Duration = Duration::from_secs(600);

/// The oldest PostgreSQL that keeps tenants apart, and a number that none has yet.
const VERSION_MIN: u32 = 15;
const VERSION_MAX: u32 = 99;

/// Bounds of `api_timeout`.
const API_MIN: Duration = Duration::from_secs(1);
const API_MAX: Duration = Duration::from_secs(600);

impl Default for Config {
    fn default() -> Self {
        Self {
            url: None,
            api_key: None,
            api_url: api::ADDRESS.into(),
            api_timeout: Duration::from_secs(30),
            org_id: None,
            region: None,
            pg_version: 17,
            domain: None,
            endpoint_address: None,
            tls: None,
            ca_file: None,
            max_connections: 90,
            connect_timeout: Duration::from_secs(15),
            wake_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(60),
            storage_interval: Duration::ZERO,
        }
    }
}

impl Config {
    /// Whether there are Neon homes at all.
    pub fn is_on(&self) -> bool {
        self.url.is_some() || self.api_key.is_some()
    }

    /// Checks what the types can't: key and fault of each.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        match (&self.url, &self.api_key) {
            (None, None) => return faults,
            (Some(_), Some(_)) => faults.push(("api_key", "and url are both set: keep one".into())),
            (Some(_), None) => faults.extend(self.server().faults()),
            (None, Some(key)) => {
                // The URL is not asked for here; everything else is checked alike.
                faults.extend(self.server().faults().into_iter().filter(|(key, _)| *key != "url"));
                if let Err(what) = Api::new(&self.api_url, key.clone(), self.api_timeout) {
                    faults.push(("api_url", what));
                }
                if !(VERSION_MIN..=VERSION_MAX).contains(&self.pg_version) {
                    faults.push(("pg_version", format!("must be {VERSION_MIN} to {VERSION_MAX}")));
                }
                if !(API_MIN..=API_MAX).contains(&self.api_timeout) {
                    faults.push(("api_timeout", "must be 1s to 10m".into()));
                }
                // Every login would carry a password in clear text over the internet.
                if self.tls == Some(TlsMode::Disable) {
                    faults.push(("tls", "can't be \"disable\" at Neon".into()));
                }
            }
        }
        if !self.domain.as_deref().is_none_or(is_domain) {
            faults.push(("domain", "must be a host name in lower case, such as \"db.example.com\"".into()));
        }
        if self.wake_timeout < WAKE_MIN {
            faults.push(("wake_timeout", format!("must be at least {}s", WAKE_MIN.as_secs())));
        }
        faults
    }

    /// The way to the homes, if there are any.
    ///
    /// # Errors
    /// What is wrong with the configuration, in words.
    pub fn upstream(&self, names: Names) -> Result<Option<Arc<Upstream>>, String> {
        Ok(match self.homes(names.clone())? {
            None => None,
            Some(Homes::Server(_)) => Some(Upstream::of_neon_homes(&self.server(), names, self.wake_timeout)?),
            Some(Homes::Projects(projects)) => {
                Some(Upstream::of_projects(&self.server(), projects, names, self.wake_timeout))
            }
        })
    }

    /// What makes homes, if there are any.
    ///
    /// # Errors
    /// As [`Self::upstream`].
    pub fn homes(&self, names: Names) -> Result<Option<Homes>, String> {
        let Some(key) = &self.api_key else {
            if self.url.is_none() {
                return Ok(None);
            }
            let admin = self.server().admin()?;
            return Ok(Some(Homes::Server(Box::new(Provisioner::of_neon_homes(admin)))));
        };
        let settings = Settings {
            org_id: self.org_id.clone(),
            region: self.region.clone(),
            pg_version: self.pg_version,
            tls: self.tls.unwrap_or(TlsMode::VerifyFull),
            ca_file: self.ca_file.clone(),
            connect_timeout: self.connect_timeout,
            through: self.endpoint_address,
        };
        let api = Api::new(&self.api_url, key.clone(), self.api_timeout)?;
        Projects::new(api, names, settings).map(|projects| Some(Homes::Projects(Arc::new(projects))))
    }

    /// The server of the homes, as one of PostgreSQL; without a URL where they are projects.
    pub fn server(&self) -> postgres::Config {
        let usual = if self.api_key.is_some() { STORAGE_AT_NEON } else { STORAGE_ON_SERVER };
        postgres::Config {
            url: self.url.clone(),
            tls: self.tls,
            ca_file: self.ca_file.clone(),
            max_connections: self.max_connections,
            connect_timeout: self.connect_timeout,
            idle_timeout: self.idle_timeout,
            storage_interval: if self.storage_interval.is_zero() { usual } else { self.storage_interval },
        }
    }
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Password>, D::Error> {
    Ok(Some(Password::new(String::deserialize(deserializer)?)))
}
