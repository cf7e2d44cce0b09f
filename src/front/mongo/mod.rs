//! MongoDB as clients see it.
//!
//! [`Server::serve`] is one client from its first byte to its last: `client` holds the conversation, `send` its answers, `login` the
//! handshake, `commands` says what becomes of each command, `rewrite` makes a request of a tenant one that can't leave
//! the tenant, `prepare` does what it needs before, if there is `room`, `forward` sends it on within the tenant's limits, `large` bounds what is in
//! memory, `spare` keeps buffers, `reply` maps what comes back, `local` answers what the server must not be asked, and `cursors` what is asked
//! about cursors of nobody's. `member` is how drivers may see a replica set. `tenancy` is what all clients of a tenant share; `mask` hides the server's names of
//! sessions and cursors.

mod client;
pub mod commands;
mod cursors;
mod forward;
mod inbox;
mod large;
mod local;
mod login;
pub mod mask;
pub mod member;
mod prepare;
mod refuse;
pub mod reply;
pub mod rewrite;
mod room;
mod send;
mod spare;
mod tenancy;
mod threshold;
mod turn;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    net::{Conn, drain::Drain, tls, tls::ServerTls},
    quota::clock,
    session::{Gate, Transport},
    upstream::mongo::Upstream,
};

/// How often what tenants left unused is looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// How the MongoDB front behaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Longest time from accept to the first message.
    pub login_timeout: Duration,
    /// Who issues tokens: told to clients that ask how to get one.
    pub issuer: String,
    /// The set as whose primary it is seen; `None`: a mongos.
    pub member: Option<member::Member>,
}

/// Serves MongoDB clients. One per process.
pub struct Server {
    gate: Arc<Gate>,
    upstream: Arc<Upstream>,
    tls: Option<Arc<ServerTls>>,
    config: Config,
    drain: Drain,
    registry: tenancy::Registry,
    rooms: large::Rooms,
    /// This process to drivers behind a load balancer.
    service_id: [u8; 12],
    /// When it began, in coarse milliseconds.
    since_ms: u64,
}

impl Server {
    /// A front that admits through `gate` and sends on to `upstream`.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn new(
        gate: Arc<Gate>,
        upstream: Arc<Upstream>,
        tls: Option<Arc<ServerTls>>,
        config: Config,
        drain: Drain,
    ) -> Result<Arc<Self>, String> {
        let mut service_id = [0; 12];
        aws_lc_rs::rand::fill(&mut service_id).map_err(|_| "no randomness")?;
        let registry = tenancy::Registry::default();
        let (rooms, since_ms) = (large::Rooms::of_process(), clock::now_ms());
        Ok(Arc::new(Self { gate, upstream, tls, config, drain, registry, rooms, service_id, since_ms }))
    }

    /// Serves one client until it leaves or is let go.
    ///
    /// # Cancel safety
    /// Dropping it closes the connection; requests that were sent on may have run, and what the client left open at
    /// the server is found by [`Self::run_maintenance`].
    pub async fn serve(self: Arc<Self>, conn: Conn) {
        let Conn { id, peer, local, mut stream, unauthenticated } = conn;
        let mut transport = if local { Transport::Private } else { Transport::Open };
        if let Some(tls) = &self.tls {
            match tokio::time::timeout(self.config.login_timeout, tls::accept_tls(stream, tls.acceptor())).await {
                Ok(Ok(accepted)) => stream = accepted,
                Ok(Err(error)) => return tracing::debug!(conn = id, %error, "TLS failed"),
                Err(_) => return tracing::debug!(conn = id, "TLS took too long"),
            }
            transport = Transport::Private;
        }
        let mut client = client::Client::new(self, id, peer, transport, stream, unauthenticated);
        client.run().await;
        client.leave().await;
    }

    /// Does something at the server that no client waits for. A drain waits for it.
    fn later(&self, work: impl Future<Output = ()> + Send + 'static) {
        let live = self.drain.enter();
        tokio::spawn(async move {
            work.await;
            drop(live);
        });
    }

    /// From now on requests go on only while the notices of moves are read, which [`Self::run_maintenance`] does.
    pub fn follow_moves(&self) {
        self.registry.thresholds.follow();
    }

    /// Ends transactions and cursors that nobody uses, and follows the notices of moves. Runs until it is dropped.
    pub async fn run_maintenance(&self) {
        let sweep = async {
            loop {
                tokio::time::sleep(SWEEP_EVERY).await;
                self.registry.sweep(&self.upstream).await;
            }
        };
        tokio::join!(sweep, self.registry.thresholds.run(&self.upstream, &self.gate));
    }
}

/// Milliseconds since 1970.
fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
