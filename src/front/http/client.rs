//! Who is at the other end of an HTTP connection, as its requests and WebSockets know it.

use std::{convert::Infallible, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{
    net::{Drain, Peer, Unauthenticated},
    session::Transport,
};

/// The connection that a request came on. A task that outlives its request (a WebSocket) keeps a clone: the connection
/// counts as open until the last one is dropped.
#[derive(Clone, Debug)]
pub struct Client {
    /// Unique in this process; for logs.
    pub id: u64,
    /// Where it comes from.
    pub peer: Peer,
    /// What a credential travels over.
    pub transport: Transport,
    /// The process' shutdown: a WebSocket's task ends with it.
    pub drain: Drain,
    unauthenticated: Arc<Mutex<Option<Unauthenticated>>>,
    _held: Held,
}

impl Client {
    pub(super) fn new(
        id: u64,
        peer: Peer,
        transport: Transport,
        drain: Drain,
        unauthenticated: Option<Unauthenticated>,
        held: Held,
    ) -> Self {
        Self { id, peer, transport, drain, unauthenticated: Arc::new(Mutex::new(unauthenticated)), _held: held }
    }

    /// One without a connection.
    #[cfg(test)]
    pub fn alone(drain: Drain) -> Self {
        Self::new(1, Peer::Unix, Transport::Private, drain, None, Held::new().0)
    }

    /// Its place among its network's strangers, for a WebSocket that will find out who it is by itself.
    pub fn take_stranger(&self) -> Option<Unauthenticated> {
        self.unauthenticated.lock().take()
    }

    /// Notes that a request on this connection was admitted: it no longer counts among its network's strangers.
    pub fn admitted(&self) {
        self.unauthenticated.lock().take();
    }
}

/// Keeps a connection open in the books.
#[derive(Clone, Debug)]
pub(super) struct Held {
    _sender: mpsc::Sender<Infallible>,
}

/// Hears when the last [`Held`] is gone.
#[derive(Debug)]
pub(super) struct Sockets(mpsc::Receiver<Infallible>);

impl Held {
    pub(super) fn new() -> (Self, Sockets) {
        let (sender, receiver) = mpsc::channel(1);
        (Self { _sender: sender }, Sockets(receiver))
    }
}

impl Sockets {
    /// Waits for the last one.
    pub(super) async fn ended(mut self) {
        while self.0.recv().await.is_some() {}
    }
}
