//! The operators' HTTP interface, on a thread and runtime of its own: it answers while the data path is busy, and until
//! the very end of a drain.
//!
//! Entry point: [`spawn`]. Endpoints are the rows of `route.rs`.

mod branches;
mod metrics;
mod route;
mod server;
mod tally;
mod tenants;
mod text;
mod transitions;

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use aws_lc_rs::{constant_time, digest};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Deserialize;

use crate::{
    net::{AcceptLimits, Drain},
    quota::Table,
    transition::Coordinator,
    upstream::neon::Branches,
    usage::Meters,
};

/// Default port.
pub const PORT: u16 = 9900;

/// Organisations with a label of their own in metrics, by default. Each costs some ten series.
pub const TOP_ORGS: usize = 50;

/// The section `[admin]`.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where to listen; default `127.0.0.1:9900`. It has no TLS: keep it on loopback or a private network.
    pub listen: SocketAddr,
    /// The bearer token. This or `token_file` is required.
    pub token: Option<String>,
    /// A file with the bearer token; white space around it is cut off.
    pub token_file: Option<PathBuf>,
    /// Organisations with a label of their own in metrics, those with the most traffic; default [`TOP_ORGS`].
    pub top_orgs: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)),
            token: None,
            token_file: None,
            top_orgs: TOP_ORGS,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("listen", &self.listen)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("token_file", &self.token_file)
            .field("top_orgs", &self.top_orgs)
            .finish()
    }
}

impl Config {
    fn token(&self) -> io::Result<Token> {
        let fault = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
        let text = match (&self.token, &self.token_file) {
            (Some(_), Some(_)) => return Err(fault("admin.token and admin.token_file are both set: keep one".into())),
            (Some(token), None) => token.clone(),
            (None, Some(path)) => std::fs::read_to_string(path).map_err(|error| {
                io::Error::new(error.kind(), format!("admin.token_file {}: {error}", path.display()))
            })?,
            (None, None) => return Err(fault("set admin.token or admin.token_file".into())),
        };
        match text.trim() {
            "" => Err(fault("the admin token is empty".into())),
            token => Ok(Token::of(token.as_bytes())),
        }
    }
}

/// The bearer token, as a digest: comparing digests takes the same time whatever the token's length.
struct Token(digest::Digest);

impl Token {
    fn of(token: &[u8]) -> Self {
        Self(digest::digest(&digest::SHA256, token))
    }

    fn matches(&self, offered: &[u8]) -> bool {
        constant_time::verify_slices_are_equal(self.0.as_ref(), Self::of(offered).0.as_ref()).is_ok()
    }
}

/// What readiness hangs on; whoever finishes a part says so.
#[derive(Debug, Default)]
pub struct Readiness {
    /// Every listener accepts.
    pub listeners_up: AtomicBool,
    /// The catalog was reached once.
    pub catalog_loaded: AtomicBool,
    /// A key set to verify tokens with was loaded once.
    pub keys_loaded: AtomicBool,
}

/// What the interface shows.
pub struct State {
    /// Resident tenants.
    pub table: Arc<Table>,
    /// Their counters.
    pub meters: Arc<Meters>,
    /// What `/readyz` says.
    pub readiness: Readiness,
    /// Renders rare events, counted through the `metrics` facade.
    pub recorder: PrometheusHandle,
    /// The caps that the data listeners share; absent until set.
    pub connections: OnceLock<Arc<AcceptLimits>>,
    /// How long ago the catalog was last known to be in step with its source; absent until set.
    pub catalog_age: OnceLock<Box<dyn Fn() -> Option<Duration> + Send + Sync>>,
    /// What moves tenants between tiers; absent until set.
    pub transitions: OnceLock<Coordinator>,
    /// What makes and removes branches; absent where there are no Neon homes.
    pub branches: OnceLock<Arc<Branches>>,
    started: SystemTime,
}

/// A reason not to be ready: code and words.
type Reason = (&'static str, &'static str);

impl State {
    /// A state in which nothing is ready.
    pub fn new(table: Arc<Table>, meters: Arc<Meters>, recorder: PrometheusHandle) -> Self {
        Self {
            table,
            meters,
            readiness: Readiness::default(),
            recorder,
            connections: OnceLock::new(),
            catalog_age: OnceLock::new(),
            transitions: OnceLock::new(),
            branches: OnceLock::new(),
            started: SystemTime::now(),
        }
    }

    /// Why no traffic should come. The health of upstreams is no reason: one database that is down would take every
    /// process out of the load balancer.
    fn not_ready(&self, draining: bool) -> Vec<Reason> {
        let is = |part: &AtomicBool| part.load(Ordering::Acquire);
        [
            (is(&self.readiness.listeners_up), ("listeners", "not every listener is up")),
            (is(&self.readiness.catalog_loaded), ("catalog", "the catalog has not been reached yet")),
            (is(&self.readiness.keys_loaded), ("keys", "no key set to verify tokens with has been loaded yet")),
            (!draining, ("draining", "the process is shutting down")),
        ]
        .into_iter()
        .filter_map(|(good, reason)| (!good).then_some(reason))
        .collect()
    }
}

/// The running interface. Dropping it stops it.
#[derive(Debug)]
pub struct AdminHandle {
    /// Where it listens, with the port that was taken.
    pub addr: SocketAddr,
    stop: Drain,
    thread: Option<thread::JoinHandle<()>>,
}

impl AdminHandle {
    /// Stops the interface and waits for its thread. The last thing to do in a process: until then operators want to
    /// watch the drain.
    pub fn stop(mut self) {
        self.stop.start();
        if let Some(thread) = self.thread.take() {
            // It can only have panicked, which the panic hook has told.
            let _ = thread.join();
        }
    }
}

impl Drop for AdminHandle {
    fn drop(&mut self) {
        self.stop.start();
    }
}

/// Starts the interface on its own thread, and returns when it listens. `drain` is the data path's: once it starts,
/// `/readyz` says 503 and everything else goes on.
///
/// # Errors
/// A configuration without a token, or an address that can't be bound.
pub fn spawn(config: &Config, state: Arc<State>, drain: Drain) -> io::Result<AdminHandle> {
    let token = config.token()?;
    if !config.listen.ip().is_loopback() {
        tracing::warn!(listen = %config.listen, "admin listens beyond this machine, without TLS");
    }
    let stop = Drain::new();
    let server = server::Server::new(state, drain, token, config.top_orgs, stop.clone());
    let listen = config.listen;
    let (told, bound) = std::sync::mpsc::sync_channel(1);
    let thread = thread::Builder::new().name("admin".to_owned()).spawn(move || server.run(listen, &told))?;
    let addr = bound.recv().unwrap_or_else(|_| Err(io::Error::other("the admin thread ended at once")))?;
    Ok(AdminHandle { addr, stop, thread: Some(thread) })
}

#[cfg(test)]
mod tests;
