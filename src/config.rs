//! The one configuration file: every module's own settings side by side, `config/dynabase.toml` in the repository.
//!
//! Unknown keys are errors, and every fault is named with its line. A key can be given by the environment
//! (`DYNABASE__SECTION__KEY`), a secret also by a file (`<key>_file`). Nothing else in this program reads the
//! environment.
//!
//! Entry point: [`Config::load`].

mod databases;
mod document;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};

use crate::{
    admin, catalog, front, identity, net,
    tenant::{
        Names, Tiers,
        namespace::{NameStyle, Password, RootSecret},
        unit,
    },
    transition, upstream,
};

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The file with the tiers' limits, beside this file unless absolute.
    pub tiers: TiersPath,
    /// Whether a credential may be asked for in plaintext over a network.
    pub allow_plaintext: bool,
    /// Where clients connect.
    pub listen: Listen,
    /// Certificates of the listeners; without them only plaintext is spoken.
    pub tls: Option<net::TlsConfig>,
    /// Who is trusted to say who a caller is. Required.
    pub identity: Option<identity::Config>,
    /// Where tenants are recorded. Required.
    pub catalog: Option<catalog::Config>,
    /// How deleted tenants are purged.
    pub tenants: transition::Purging,
    /// How MongoDB drivers see this process.
    pub mongodb: front::mongo::member::Settings,
    /// How tenants' names and passwords on upstreams are derived.
    pub names: NamesConfig,
    /// The databases behind.
    pub upstream: Upstream,
    /// The operators' port.
    pub admin: admin::Config,
    /// The process itself.
    pub runtime: Runtime,
    /// What is logged.
    pub log: Log,
}

/// `[runtime]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// Threads that serve clients; 0 is one per core. At most 1 024.
    pub workers: u16,
}

/// Most threads: far more than any machine has cores.
const WORKERS_MAX: u16 = 1024;

/// The path of the tiers' file.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct TiersPath(pub PathBuf);

impl Default for TiersPath {
    fn default() -> Self {
        Self("tiers.toml".into())
    }
}

/// `[listen]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// Addresses for PostgreSQL clients: `"127.0.0.1:6432"`, `"unix:/run/dynabase/.s.PGSQL.6432"`, or a list.
    #[serde(deserialize_with = "one_or_many")]
    pub postgres: Vec<net::Address>,
    /// Addresses for Redis clients; used when there is an `upstream.redis.url`.
    #[serde(deserialize_with = "one_or_many")]
    pub redis: Vec<net::Address>,
    /// Addresses for MongoDB clients; used when there is an `upstream.mongodb.url`.
    #[serde(deserialize_with = "one_or_many")]
    pub mongodb: Vec<net::Address>,
    /// Addresses for Convex and Neon clients over HTTP, where TLS is spoken if there are certificates.
    #[serde(deserialize_with = "one_or_many")]
    pub http: Vec<net::Address>,
    /// Networks of load balancers that send a PROXY protocol v2 header; from these it is required.
    #[serde(deserialize_with = "one_or_many")]
    pub proxy_from: Vec<IpNet>,
    /// Client sockets over all listeners; more wait in the kernel's queue. 1 to 1 000 000.
    pub max_connections: u32,
    /// Client sockets from one /24 or /64 network that are not yet admitted; 0 is no cap, for use behind a balancer
    /// that does not say who its clients are.
    pub unadmitted_per_network: u32,
    /// Longest time from accepting a socket to an admitted session.
    #[serde(deserialize_with = "unit::duration")]
    pub handshake_timeout: Duration,
    /// Longest time for sessions to come to an end on shutdown.
    #[serde(deserialize_with = "unit::duration")]
    pub drain_timeout: Duration,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            postgres: vec![net::Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 6432)))],
            redis: vec![net::Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 6380)))],
            mongodb: vec![net::Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 27018)))],
            http: vec![net::Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)))],
            proxy_from: Vec::new(),
            max_connections: 10_000,
            unadmitted_per_network: 256,
            handshake_timeout: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// One text or a list of them, each parsed.
fn one_or_many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a text or a list of texts")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    let texts = match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(text) => vec![text],
        OneOrMany::Many(texts) => texts,
    };
    texts.iter().map(|text| text.parse().map_err(|error| de::Error::custom(format!("{text:?}: {error}")))).collect()
}

/// `[names]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NamesConfig {
    /// The secret that names and upstream passwords are derived from, at least 32 bytes. Required. Losing it loses
    /// the way to every tenant's database; changing it renames them all.
    #[serde(deserialize_with = "secret")]
    pub root_secret: Option<Password>,
    /// `opaque`: names tell other tenants nothing; `plain`: `org_<id>`.
    pub style: NameStyle,
}

impl Default for NamesConfig {
    fn default() -> Self {
        Self { root_secret: None, style: NameStyle::Opaque }
    }
}

/// `[upstream]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Upstream {
    /// `[upstream.postgres]`.
    pub postgres: upstream::postgres::Config,
    /// `[upstream.redis]`.
    pub redis: upstream::redis::Config,
    /// `[upstream.neon]`.
    pub neon: upstream::neon::Config,
    /// `[upstream.mongodb]`.
    pub mongodb: upstream::mongo::Config,
    /// `[upstream.convex]`.
    pub convex: upstream::convex::Config,
}

/// `[log]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Which lines: `"info"`, `"dynabase=debug,warn"`.
    pub filter: String,
    /// How they look.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::Text }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line, for machines.
    Json,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Password>, D::Error> {
    Ok(Some(Password::new(String::deserialize(deserializer)?)))
}

/// Everything that is wrong with a configuration, in the file's order; never empty.
#[derive(Debug)]
pub struct ConfigError {
    path: PathBuf,
    faults: Vec<Fault>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The line in the file, from 1; `None` for what the file does not hold.
    pub line: Option<usize>,
    /// The key with its sections, `listen.postgres`; empty for the file as a whole.
    pub key: String,
    /// What is wrong. Quotes no secret.
    pub what: String,
}

impl ConfigError {
    /// The faults, at least one.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, fault) in self.faults.iter().enumerate() {
            let end = if at + 1 == self.faults.len() { "" } else { "\n" };
            let line = fault.line.map_or_else(String::new, |line| format!(":{line}"));
            let key = if fault.key.is_empty() { String::new() } else { format!(" {}:", fault.key) };
            write!(f, "{}{line}:{key} {}{end}", self.path.display(), fault.what)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Keys whose value may stand in a file of its own, `<key>_file`.
const SECRETS: [&str; 7] = [
    "names.root_secret",
    "catalog.url",
    "upstream.postgres.url",
    "upstream.redis.url",
    "upstream.mongodb.url",
    "upstream.neon.url",
    "upstream.neon.api_key",
];

/// Secrets whose own module reads the file.
const FURTHER_SECRETS: [&str; 2] = ["identity.hs256_secret", "admin.token"];

/// Keys that name a file or folder: relative ones are meant from the configuration's folder.
const PATHS: [&str; 14] = [
    "tiers",
    "tls.cert_file",
    "tls.key_file",
    "tls.client_ca_file",
    "identity.jwks_file",
    "identity.hs256_secret_file",
    "catalog.path",
    "catalog.ca_file",
    "upstream.postgres.ca_file",
    "upstream.redis.ca_file",
    "upstream.mongodb.ca_file",
    "upstream.neon.ca_file",
    "upstream.convex.ca_file",
    "admin.token_file",
];

/// Shortest bearer token of operators in bytes: as long as 96 random bits in base64.
const ADMIN_TOKEN_MIN_BYTES: usize = 16;

/// Most client sockets: beyond a million file descriptors the kernel's own limits end the attempt.
const CONNECTIONS_MAX: u32 = 1_000_000;

impl Config {
    /// Reads the file at `path`, what the environment overrides, and the files it names.
    ///
    /// # Errors
    /// Every fault there is.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let environment: Vec<_> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with(document::ENVIRONMENT_PREFIX))
            .collect();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            path: path.into(),
            faults: vec![Fault { line: None, key: String::new(), what: format!("can't be read: {error}") }],
        })?;
        Self::parse(path, &text, &environment)
    }

    /// The same with a text and an environment in hand.
    ///
    /// # Errors
    /// Every fault there is.
    pub fn parse(path: &Path, text: &str, environment: &[(String, String)]) -> Result<Config, ConfigError> {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
        let folder = absolute.parent().unwrap_or(Path::new("/"));
        let (config, lines, mut faults) = document::read(text, folder, environment);
        let config = config.map(|config| Config { tiers: TiersPath(folder.join(&config.tiers.0)), ..config });
        if let Some(config) = &config {
            for (key, what) in config.faults() {
                // What could not be read is told already; that it is missing would be a second tale of one fault.
                if !faults.iter().any(|fault| fault.key == key) {
                    faults.push(Fault { line: lines.line(&key), key, what });
                }
            }
        }
        faults.sort_by_key(|fault| fault.line.unwrap_or(usize::MAX));
        match config {
            Some(config) if faults.is_empty() => Ok(config),
            _ => Err(ConfigError { path: path.into(), faults }),
        }
    }

    /// What the types can't say: bounds, and keys that need each other.
    fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut need = |good: bool, key: &str, what: String| {
            if !good {
                faults.push((key.to_owned(), what));
            }
        };
        let listen = &self.listen;
        need(!listen.postgres.is_empty(), "listen.postgres", "needs at least one address".into());
        need(
            (1..=CONNECTIONS_MAX).contains(&listen.max_connections),
            "listen.max_connections",
            format!("must be 1 to {CONNECTIONS_MAX}"),
        );
        need(self.runtime.workers <= WORKERS_MAX, "runtime.workers", format!("must be 0 to {WORKERS_MAX}"));
        let second = Duration::from_secs(1);
        need(listen.handshake_timeout >= second, "listen.handshake_timeout", "must be at least 1s".into());
        if let Some(Err(error)) = self.tls.as_ref().map(|tls| net::ServerTls::load(tls, &[])) {
            need(false, "tls", error.to_string());
        }
        match &self.identity {
            None => need(false, "identity.issuer", "is required: whose tokens are trusted".into()),
            Some(identity) => tell(&mut need, identity.check()),
        }
        need(self.tenants.interval >= second, "tenants.interval", "must be at least 1s".into());
        let root = self.names.root_secret.as_ref();
        let bytes = root.map_or(0, |secret| secret.expose().len());
        need(
            bytes >= RootSecret::MIN_BYTES,
            "names.root_secret",
            format!("is required, at least {} bytes: make one with `openssl rand -base64 48`", RootSecret::MIN_BYTES),
        );
        need(
            self.admin.token.is_some() != self.admin.token_file.is_some(),
            "admin.token",
            "or token_file is required, and only one of them: make one with `openssl rand -base64 24`".into(),
        );
        need(
            self.admin.token.as_ref().is_none_or(|token| token.len() >= ADMIN_TOKEN_MIN_BYTES),
            "admin.token",
            format!("must have at least {ADMIN_TOKEN_MIN_BYTES} bytes"),
        );
        match &self.catalog {
            None => need(false, "catalog.path", "is required: the folder of the file catalog; or kind and url".into()),
            Some(catalog) => tell(&mut need, catalog.check()),
        }
        need(
            tracing_subscriber::EnvFilter::builder().parse(&self.log.filter).is_ok(),
            "log.filter",
            "is not a filter such as \"info\" or \"dynabase=debug,warn\"".into(),
        );
        if let Err(what) = self.load_tiers() {
            need(false, "tiers", what);
        }
        for (key, what) in self.upstream.postgres.faults() {
            need(false, &format!("upstream.postgres.{key}"), what);
        }
        for (key, what) in self.upstream.neon.faults() {
            need(false, &format!("upstream.neon.{key}"), what);
        }
        if let Err(what) = self.upstream.redis.target() {
            need(false, "upstream.redis.url", what);
        }
        let behind = match self.upstream.mongodb.target() {
            Ok(target) => target.map(|target| target.addresses).unwrap_or_default(),
            Err(what) => {
                need(false, "upstream.mongodb.url", what);
                Vec::new()
            }
        };
        match self.mongodb.member() {
            Ok(member) => need(
                member
                    .is_none_or(|member| !behind.iter().any(|address| address.eq_ignore_ascii_case(member.address()))),
                "mongodb.advertise",
                "is an address of upstream.mongodb.url: clients would go past this proxy".into(),
            ),
            Err(faults) => faults.into_iter().for_each(|(key, what)| need(false, &format!("mongodb.{key}"), what)),
        }
        for (key, what) in self.upstream.convex.faults() {
            need(false, &format!("upstream.convex.{key}"), what);
        }
        faults
    }

    /// Reads the tiers' file.
    ///
    /// # Errors
    /// All that is wrong with it, in words.
    pub fn load_tiers(&self) -> Result<Tiers, String> {
        let path = &self.tiers.0;
        let text = self.tiers_text()?;
        Tiers::parse(&text).map_err(|faults| {
            faults
                .iter()
                .map(|fault| format!("{}: {}", path.display(), fault.trim_end()))
                .collect::<Vec<_>>()
                .join("; ")
        })
    }

    /// The text of the tiers' file.
    ///
    /// # Errors
    /// It can't be read.
    pub fn tiers_text(&self) -> Result<String, String> {
        let path = &self.tiers.0;
        std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// What derives names and upstream passwords.
    ///
    /// # Errors
    /// No root secret, or one that is too short: not after [`Self::load`].
    pub fn names(&self) -> Result<Names, String> {
        let secret = self.names.root_secret.as_ref().and_then(|secret| RootSecret::new(secret.expose().as_bytes()));
        secret.map(|root| Names::new(root, self.names.style)).ok_or_else(|| "names.root_secret is too short".into())
    }
}

/// In tests: kills this process at the n-th step of a tier transition.
fn arm_failpoint() {
    if cfg!(debug_assertions)
        && let Ok(nth) = std::env::var("DYNABASE_TEST_FAILPOINT")
    {
        catalog::ledger::failpoint::arm(nth.parse().unwrap_or(0));
    }
    if cfg!(debug_assertions)
        && let Ok(name) = std::env::var("DYNABASE_TEST_FREEZE")
    {
        catalog::ledger::failpoint::arm_freeze(name);
    }
}

/// Passes on the faults of a module, each of which begins with its key.
fn tell(need: &mut impl FnMut(bool, &str, String), faults: Vec<String>) {
    for fault in faults {
        let end = fault.find([':', ' ']).unwrap_or(fault.len());
        need(false, &fault[..end], fault[end..].trim_start_matches([':', ' ']).to_owned());
    }
}

/// The folders in which the system looks for programs, in order.
pub fn program_folders() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
