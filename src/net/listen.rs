//! The only accept loop. It ends when the drain starts and for no other reason: not for an accept that fails, not for
//! a connection that panics.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use ipnet::IpNet;
use tokio::sync::OwnedSemaphorePermit;

pub use super::bind::{Address, BACKLOG, ListenConfig, Listener};
use super::{
    drain::{Drain, Live},
    limit::AcceptLimits,
    proxy,
    stream::{Conn, Peer, Raw, Stream},
};

/// Pause after an accept that failed for want of descriptors or memory, doubled up to the second while it lasts.
/// Trying again at once would burn a core, since the waiting connection keeps the listener ready.
const BACK_OFF: Duration = Duration::from_millis(10);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// What a connection's task holds: its count in the drain, its place under the cap.
struct Held {
    _live: Live,
    _place: OwnedSemaphorePermit,
}

impl Drop for Held {
    fn drop(&mut self) {
        if std::thread::panicking() {
            metrics::counter!("dynabase_connection_panics_total").increment(1);
        }
    }
}

/// Accepts connections and runs `serve` on each, in a task of its own that `drain` counts, until the drain starts.
/// Over the cap of `limits` it holds one accepted connection and leaves the others to the kernel's queue.
///
/// What the kernel has queued when the drain starts is still served, or its clients would see a reset instead of the
/// front's word that we are shutting down: `serve` has to ask [`Drain::is_draining`] before it admits anyone.
///
/// # Cancel safety
/// Dropping it stops accepting; connections that run go on.
pub async fn run<F, Fut>(listener: Listener, limits: Arc<AcceptLimits>, drain: Drain, serve: F)
where
    F: Fn(Conn) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let serve = Arc::new(serve);
    let proxy_from = listener.proxy_from.clone();
    let begin = |raw, peer, held: Held| {
        if wants_proxy_header(&proxy_from, peer) {
            tokio::spawn(behind_balancer(raw, peer, held, Arc::clone(&limits), Arc::clone(&serve)));
        } else if let Some(conn) = admit(raw, peer, peer, &limits) {
            // The future is made here and not in the task: as an argument of an async block it would stay in memory
            // beside itself for as long as the connection lives.
            let serving = serve(conn);
            tokio::spawn(async move {
                let _held = held;
                serving.await;
            });
        }
    };
    let mut back_off = BACK_OFF;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain.started() => break,
        };
        let (raw, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                let pause = failed(listener.local_addr(), &error, back_off);
                back_off = if pause.is_zero() { BACK_OFF } else { (back_off * 2).min(BACK_OFF_MAX) };
                tokio::select! {
                    () = tokio::time::sleep(pause) => continue,
                    () = drain.started() => break,
                }
            }
        };
        back_off = BACK_OFF;
        let place = tokio::select! {
            biased;
            place = limits.place() => place,
            () = drain.started() => return,
        };
        begin(raw, peer, Held { _live: drain.enter(), _place: place });
    }
    for (raw, peer) in listener.queued().take(BACKLOG as usize) {
        let Some(place) = limits.place().now_or_never() else { return };
        begin(raw, peer, Held { _live: drain.enter(), _place: place });
    }
}

fn wants_proxy_header(proxy_from: &[IpNet], peer: Peer) -> bool {
    matches!(peer, Peer::Ip(addr) if proxy_from.iter().any(|net| net.contains(&addr.ip())))
}

/// A connection from a balancer's network: its header first.
async fn behind_balancer<F, Fut>(mut raw: Raw, socket_peer: Peer, held: Held, limits: Arc<AcceptLimits>, serve: Arc<F>)
where
    F: Fn(Conn) -> Fut,
    Fut: Future<Output = ()>,
{
    let _held = held;
    match proxy::read(&mut raw).await {
        Ok(said) => {
            let peer = said.map_or(socket_peer, Peer::Ip);
            if let Some(conn) = admit(raw, peer, socket_peer, &limits) {
                // On the heap, so that the header's buffers don't stay beside it.
                Box::pin(serve(conn)).await;
            }
        }
        Err(error) => {
            metrics::counter!("dynabase_proxy_header_errors_total", "reason" => error.label()).increment(1);
            tracing::info!(peer = %socket_peer, %error, "connection closed");
        }
    }
}

/// Makes the connection, unless its source has too many that nobody vouches for.
fn admit(raw: Raw, peer: Peer, socket_peer: Peer, limits: &Arc<AcceptLimits>) -> Option<Conn> {
    static IDS: AtomicU64 = AtomicU64::new(1);
    let unauthenticated = match peer {
        Peer::Unix => None,
        Peer::Ip(addr) => match limits.unauthenticated(addr.ip()) {
            Ok(guard) => guard,
            Err(_full) => {
                metrics::counter!("dynabase_connections_shed_total", "reason" => "source").increment(1);
                tracing::debug!(%peer, "connection closed: too many unauthenticated ones from its network");
                return None;
            }
        },
    };
    let here = |peer: Peer| match peer {
        Peer::Unix => true,
        Peer::Ip(addr) => addr.ip().is_loopback(),
    };
    Some(Conn {
        id: IDS.fetch_add(1, Ordering::Relaxed),
        peer,
        // Both: a header that claims loopback proves nothing, and a balancer on this machine has clients elsewhere.
        local: here(socket_peer) && here(peer),
        stream: Stream::Plain(raw),
        unauthenticated,
    })
}

/// Counts and logs a failed accept; gives the pause before the next.
fn failed(address: &Address, error: &io::Error, back_off: Duration) -> Duration {
    use io::ErrorKind as Kind;
    // The connection's fault (accept(2) passes on its pending errors), so the next one may be good.
    let of_connection = matches!(
        error.kind(),
        Kind::ConnectionAborted
            | Kind::ConnectionReset
            | Kind::ConnectionRefused
            | Kind::Interrupted
            | Kind::NetworkDown
            | Kind::NetworkUnreachable
            | Kind::HostUnreachable
            | Kind::NotConnected
            | Kind::TimedOut
            | Kind::PermissionDenied
    );
    let reason = if of_connection { "connection" } else { "resources" };
    metrics::counter!("dynabase_accept_errors_total", "reason" => reason).increment(1);
    if of_connection {
        tracing::debug!(%address, %error, "accept failed");
        return Duration::ZERO;
    }
    tracing::warn!(%address, %error, pause_ms = back_off.as_millis(), "accept failed; raise the limit on open files?");
    back_off
}

#[cfg(test)]
mod tests;
