//! A conversation without a socket: another front asks, the same relay answers, so that whatever holds for a client of
//! the Postgres port (limits, settings, refusals, who gets a connection next) holds here.

use std::{pin::Pin, sync::Arc};

use tokio::io::{DuplexStream, duplex};

use super::{
    Server,
    handshake::{self, Admitted, Denied},
    options::Options,
    relay,
};
use crate::{
    front::http::Client,
    net::{Raw, Stream},
    session::Session,
    tenant::{Limits, OrgId, Protocol},
    upstream::postgres::Upstream,
};

/// Bytes under way in each direction before the side that writes has to wait.
const PIPE: usize = 64 * 1024;

/// An admitted session whose client is the caller. It begins with what a server says after a login.
pub struct Line {
    pipe: DuplexStream,
    session: Running,
    /// Whose it is.
    pub org: OrgId,
    /// The tenant's limits when it began.
    pub limits: Arc<Limits>,
}

/// The other end. Dropped before its time, it goes on by itself: it sees that its client has gone, cancels what runs
/// and gives its connection back. Its connection counts as open until then.
struct Running {
    relay: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    kept: Option<Client>,
}

impl Running {
    async fn ended(&mut self) {
        if let Some(relay) = &mut self.relay {
            relay.as_mut().await;
        }
        self.relay = None;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let (Some(relay), Ok(runtime)) = (self.relay.take(), tokio::runtime::Handle::try_current()) else { return };
        let kept = self.kept.take();
        runtime.spawn(async move {
            let _kept = kept;
            relay.await;
        });
    }
}

impl Line {
    /// Runs `talk` with the session's other end moving beside it, in this task; then ends the session and waits until
    /// it has given back what it held.
    ///
    /// # Cancel safety
    /// Dropped, it ends as a client that vanishes does: what runs is cancelled.
    pub async fn talk<T>(self, talk: impl AsyncFnOnce(&mut DuplexStream) -> T) -> T {
        let Self { mut pipe, mut session, .. } = self;
        let said = {
            let mut talking = std::pin::pin!(talk(&mut pipe));
            loop {
                tokio::select! {
                    biased;
                    said = talking.as_mut() => break said,
                    () = session.ended(), if session.relay.is_some() => {}
                }
            }
        };
        drop(pipe);
        session.ended().await;
        said
    }
}

/// A caller that was let in and has its places, before it has said what it wants.
pub struct Guest {
    session: Session,
    upstream: Arc<Upstream>,
    options: Options,
}

impl Guest {
    /// Begins its session.
    pub fn begin(self, server: &Arc<Server>, client: &Client) -> Line {
        let Self { session, upstream, options } = self;
        let org = session.slot().org().clone();
        let limits = Arc::clone(&session.slot().policy().limits);
        let (near, far) = duplex(PIPE);
        let admitted = Admitted { session, upstream, options, minor: 0, early: Vec::new() };
        let stream = Stream::Plain(Raw::Memory(near));
        let begun = relay::begin(Arc::clone(server), (client.id, client.peer), stream, admitted, relay::Told::Nothing);
        let relay = async move {
            if let Some(relay) = begun.await {
                relay.run().await;
            }
        };
        let session = Running { relay: Some(Box::pin(relay)), kept: Some(client.clone()) };
        Line { pipe: far, session, org, limits }
    }
}

impl Server {
    /// Admits a caller to its tenant's Neon home, as [`Protocol::Neon`].
    pub(in crate::front) async fn enter(&self, token: &[u8], options: Options) -> Result<Guest, Denied> {
        let (session, upstream) = handshake::enter(self, token, Protocol::Neon, &options).await?;
        Ok(Guest { session, upstream, options })
    }
}
