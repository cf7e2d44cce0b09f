//! Redis as clients see it.
//!
//! [`Server::serve`] is one client from its first byte to its last: `client` holds the conversation, `commands` says
//! what becomes of each command, `keys` where its keys stand, `request` writes it on with the tenant's prefix and
//! limits (`rewrite` moves the bytes), `stream` sends large ones on in pieces, `script` and `library` wrap what is to run in
//! the server (`lua` reads it), `slow` does what needs more than that (logging in, blocking; `function`, `subscribe`,
//! `tracking` and `service` are parts of it), `local` answers what the server must not be asked.

mod client;
pub mod commands;
mod emulate;
mod function;
pub mod keys;
pub mod library;
mod local;
mod lua;
mod memory;
mod refuse;
mod registry;
mod request;
pub mod rewrite;
mod script;
mod service;
mod slow;
mod stream;
mod subscribe;
mod tracking;

use std::sync::Arc;

use crate::{
    net::{Conn, drain::Drain, tls, tls::ServerTls},
    session::{Gate, Transport},
    upstream::redis::Upstream,
};

/// How the Redis front behaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Longest time from accept to a successful authentication.
    pub login_timeout: std::time::Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { login_timeout: std::time::Duration::from_secs(30) }
    }
}

/// Serves Redis clients. One per process.
pub struct Server {
    gate: Arc<Gate>,
    upstream: Arc<Upstream>,
    tls: Option<Arc<ServerTls>>,
    config: Config,
    drain: Drain,
    registry: registry::Registry,
}

impl Server {
    /// A front that admits through `gate` and sends on to `upstream`.
    pub fn new(
        gate: Arc<Gate>,
        upstream: Arc<Upstream>,
        tls: Option<Arc<ServerTls>>,
        config: Config,
        drain: Drain,
    ) -> Arc<Self> {
        Arc::new(Self { gate, upstream, tls, config, drain, registry: registry::Registry::default() })
    }

    /// Serves one client until it leaves or is let go.
    ///
    /// # Cancel safety
    /// Dropping it closes the connection; commands that were sent on may have run.
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
    }
}
