//! The settings of the Neon homes, `[upstream.neon]`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Deserializer};

use crate::{
    net::tls::TlsMode,
    tenant::{Names, namespace::Password, unit},
    upstream::postgres::{self, Provisioner, Upstream},
};

/// `[upstream.neon]`: where tenants' Neon homes are.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The administrator's URL of a PostgreSQL server on which each tenant gets a database: as `upstream.postgres.url`,
    /// and the same server will do, since homes share no name. Unset: no Neon front.
    #[serde(deserialize_with = "secret")]
    pub url: Option<Password>,
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
    /// Between two looks at the size of a tenant's database.
    #[serde(deserialize_with = "unit::duration")]
    pub storage_interval: Duration,
}

/// Shortest useful `wake_timeout`: Neon's own edge may take some 13 s to give a compute up.
const WAKE_MIN: Duration = Duration::from_secs(15);

impl Default for Config {
    fn default() -> Self {
        Self {
            url: None,
            tls: None,
            ca_file: None,
            max_connections: 90,
            connect_timeout: Duration::from_secs(15),
            wake_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(60),
            storage_interval: Duration::from_secs(30),
        }
    }
}

impl Config {
    /// Whether there are Neon homes at all.
    pub fn is_on(&self) -> bool {
        self.url.is_some()
    }

    /// Checks what the types can't: key and fault of each.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        if !self.is_on() {
            return Vec::new();
        }
        let mut faults = self.server().faults();
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
        if !self.is_on() {
            return Ok(None);
        }
        Upstream::of_neon_homes(&self.server(), names, self.wake_timeout).map(Some)
    }

    /// What makes homes, if there are any.
    ///
    /// # Errors
    /// As [`Self::upstream`].
    pub fn provisioner(&self) -> Result<Option<Provisioner>, String> {
        if !self.is_on() {
            return Ok(None);
        }
        self.server().admin().map(|admin| Some(Provisioner::of_neon_homes(admin)))
    }

    /// The server of the homes, as one of PostgreSQL.
    pub fn server(&self) -> postgres::Config {
        postgres::Config {
            url: self.url.clone(),
            tls: self.tls,
            ca_file: self.ca_file.clone(),
            max_connections: self.max_connections,
            connect_timeout: self.connect_timeout,
            idle_timeout: self.idle_timeout,
            storage_interval: self.storage_interval,
        }
    }
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Password>, D::Error> {
    Ok(Some(Password::new(String::deserialize(deserializer)?)))
}
