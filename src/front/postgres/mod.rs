//! Postgres as clients see it.
//!
//! # The journey of a connection
//! 1. [`handshake`]: TLS as the protocol asks for it, the startup packet, the token; [`crate::session::Gate::admit`]
//!    makes the session. Logical user and database are looked up in the tenant's own names, never in the server's.
//! 2. [`relay`]: the client's messages wait until one of them needs a server. Then the tenant's rate is asked, a
//!    connection is leased from the tenant's pool, brought to this client's settings, and bytes flow both ways.
//! 3. [`conversation`] decides message by message: forwarded as it is, under another statement name, answered here,
//!    or kept from the client. [`ledger`] knows which answers are owed.
//! 4. When nothing is owed, no transaction is open and nothing pins the client, the connection goes back.
//!
//! # Invariants
//! - A client reaches one role in one database of one tenant. That wall is the server's own; everything here only
//!   keeps apart clients of the same tenant.
//! - A statement is sent at most once. What may have been sent is never repeated.
//! - A client that sleeps owns no buffer: bytes are read into the thread's, and only an unfinished message is kept.
//! - No wait is without an end: the handshake, the queue, a statement, an idle transaction, a farewell.

mod cancel;
mod conversation;
mod handshake;
mod inside;
mod ledger;
mod options;
mod out;
mod refuse;
mod relay;
mod scan;
mod statement;

/// The fuzzer's way in: clients and servers driven by bytes, with everything checked that comes out.
#[cfg(fuzzing)]
#[doc(hidden)]
pub use conversation::script::play as fuzz_conversation;

/// The fuzzer's way in: the scan of a query text, which keeps its words to itself.
#[cfg(fuzzing)]
#[doc(hidden)]
pub fn fuzz_scan(text: &[u8]) {
    let _ = scan::scan(text);
}

pub(super) use self::{
    handshake::Denied,
    inside::Line,
    options::{Options, clean},
};

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use dashmap::DashMap;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    net::{Conn, Stream, drain::Drain, tls::ServerTls},
    refusal::Refusal,
    session::{Gate, Session, Transport},
    tenant::{OrgId, Protocol, unit},
    upstream::postgres::Upstream,
    wire::postgres::backend::Report,
};

/// The ALPN name of the protocol.
pub const ALPN: &str = "postgresql";

/// Longest wait for a refused client to read its refusal: closing a socket with unread bytes makes the kernel send a
/// reset, and the client would lose the message.
const LINGER: Duration = Duration::from_secs(1);

/// `[postgres]`: the Postgres front.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// From the first byte to the end of the login.
    #[serde(deserialize_with = "unit::duration")]
    pub handshake_timeout: Duration,
    /// Where OAUTHBEARER clients without a token are told to get one: the issuer's discovery document.
    pub openid_configuration: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(15), openid_configuration: String::new() }
    }
}

impl Config {
    /// Checks what the types can't: key and fault of each.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        if self.handshake_timeout < Duration::from_millis(100) {
            return vec![("handshake_timeout", "must be at least 100ms".into())];
        }
        Vec::new()
    }
}

/// Everything that Postgres connections share. One per process.
#[derive(Debug)]
pub struct Server {
    gate: Arc<Gate>,
    upstream: Arc<Upstream>,
    /// The tenants' Neon homes.
    neon: Option<Arc<Upstream>>,
    tls: Option<Arc<ServerTls>>,
    config: Config,
    drain: Drain,
    keys: Arc<cancel::Keys>,
    /// By physical database: what its clients share.
    shared: DashMap<Arc<str>, Arc<statement::Shared>>,
    statement_ids: Arc<AtomicU64>,
}

impl Server {
    /// A front that admits through `gate` and leads to `upstream`, or to `neon` where a tenant's home is there.
    pub fn new(
        gate: Arc<Gate>,
        upstream: Arc<Upstream>,
        neon: Option<Arc<Upstream>>,
        tls: Option<Arc<ServerTls>>,
        config: Config,
        drain: Drain,
    ) -> Arc<Self> {
        Arc::new(Self {
            gate,
            upstream,
            neon,
            tls,
            config,
            drain,
            keys: Arc::default(),
            shared: DashMap::new(),
            statement_ids: Arc::default(),
        })
    }

    /// Serves one connection, first byte to last.
    pub fn serve(self: Arc<Self>, conn: Conn) -> impl Future<Output = ()> + Send {
        self.serve_as(Protocol::Postgres, conn, None)
    }

    /// Serves one connection, first byte to last, as a session of `protocol`: [`Protocol::Neon`] leads to the Neon
    /// home whatever the tenant's record says. At a host of `host_org`'s nobody else is let in.
    pub(super) fn serve_as(
        self: Arc<Self>,
        protocol: Protocol,
        conn: Conn,
        host_org: Option<OrgId>,
    ) -> impl Future<Output = ()> + Send {
        // A login needs much more space than a session that sleeps: boxed, it is gone once the session begins. Made
        // out here, as an argument of an async block would keep its place beside it.
        let opening = Box::pin(self.begin(protocol, conn, host_org));
        async move {
            if let Some(relay) = opening.await {
                relay.run().await;
            }
        }
    }

    /// Brings a connection to a session that has been greeted; `None` when it has ended before.
    async fn begin(
        self: Arc<Self>,
        protocol: Protocol,
        conn: Conn,
        host_org: Option<OrgId>,
    ) -> Option<Box<relay::Relay>> {
        let Conn { id, peer, local, stream, unauthenticated } = conn;
        let mut stream = Some(stream);
        let admitted = handshake::admit(&self, &mut stream, local, protocol, host_org);
        let early = tokio::time::timeout(self.config.handshake_timeout, admitted)
            .await
            .unwrap_or(Err(handshake::Early::Gone("handshake_timeout")));
        drop(unauthenticated);
        let reason = match early {
            Ok(admitted) => match stream {
                Some(stream) => return relay::begin(self, (id, peer), stream, admitted, relay::Told::Line).await,
                None => "tls_failed",
            },
            Err(handshake::Early::Gone(reason)) => reason,
            Err(handshake::Early::Refused(report, reason)) => {
                metrics::counter!("dynabase_refusals_total", "protocol" => protocol.label(), "reason" => reason)
                    .increment(1);
                if let Some(stream) = &mut stream {
                    farewell(stream, &[], &report).await;
                }
                reason
            }
        };
        tracing::info!(conn = id, %peer, reason, protocol = protocol.label(), "postgres connection ended before a session");
        None
    }

    /// Where the connections that are counted as `protocol` lead.
    fn upstream(&self, protocol: Protocol) -> &Arc<Upstream> {
        match (protocol, &self.neon) {
            (Protocol::Neon, Some(neon)) => neon,
            _ => &self.upstream,
        }
    }

    /// Whether a credential may travel over `transport`.
    ///
    /// # Errors
    /// [`Refusal::PlaintextToken`].
    pub(super) fn may_carry(&self, transport: Transport) -> Result<(), Refusal> {
        self.gate.may_carry(transport)
    }

    /// Admits a caller who asks for no database.
    pub(super) async fn admit(&self, token: &[u8], protocol: Protocol) -> Result<Session, Refusal> {
        if self.drain.is_draining() {
            return Err(Refusal::Draining);
        }
        self.gate.admit(token, protocol).await
    }

    /// What the clients of a physical database share.
    fn shared(&self, database: &Arc<str>) -> Arc<statement::Shared> {
        if let Some(shared) = self.shared.get(database) {
            return Arc::clone(&shared);
        }
        // Databases without clients are forgotten when a new one comes: bounded by those in use.
        self.shared.retain(|_, shared| Arc::strong_count(shared) > 1);
        let make = || Arc::new(statement::Shared::new(Arc::clone(&self.statement_ids)));
        Arc::clone(&self.shared.entry(Arc::clone(database)).or_insert_with(make))
    }
}

/// Says `last` and why, then closes so that the client gets to read it.
async fn farewell(stream: &mut Stream, last: &[u8], report: &Report) {
    let mut out = last.to_vec();
    report.put(&mut out);
    let goodbye = async {
        stream.write_all(&out).await?;
        stream.flush().await?;
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        std::io::Result::Ok(())
    };
    // A client that does not read in time, or is gone, misses it.
    let _ = tokio::time::timeout(LINGER, goodbye).await;
}

fn count_refusal(protocol: Protocol, refusal: &Refusal) {
    metrics::counter!("dynabase_refusals_total", "protocol" => protocol.label(), "reason" => refusal.kind())
        .increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<A, F: Future>(_: impl FnOnce(A) -> F) -> usize {
        size_of::<F>()
    }

    /// A client that sleeps holds its task, its relay, the runtime's registration of its socket (256 bytes), its
    /// `Live` and some table entries: 2 KiB in all is the budget.
    #[test]
    fn a_sleeping_client_is_small() {
        let task = size_of_future(|(server, conn): (Arc<Server>, Conn)| server.serve(conn));
        assert!(task <= 64, "the task grew to {task} bytes");
        let relay = size_of::<relay::Relay>();
        assert!(relay <= 768, "the relay grew to {relay} bytes: the next size that is allocated is 896");
        assert!(size_of::<crate::quota::Live>() <= 112);
    }
}
