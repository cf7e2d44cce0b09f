//! What is known of sync sessions, by the id that a client chooses and JS keeps over reconnects: which socket serves it
//! now, and what an earlier one did. One organisation's ids say nothing about another's.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use moka::sync::Cache;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::tenant::OrgId;

/// Sessions remembered after their socket has gone, some 200 bytes each.
const REMEMBERED_MAX: u64 = 100_000;

/// How long: a client that was away for longer begins anew.
const REMEMBERED_FOR: Duration = Duration::from_secs(3600);

/// Longest wait for a session's earlier socket to end.
const GHOST_WITHIN: Duration = Duration::from_secs(2);

/// Mutations remembered of one session: as many as the largest tier has under way.
const MUTATIONS_MAX: usize = 512;

/// A session, by its organisation and its own id.
pub type Key = (OrgId, Box<str>);

/// What a session's sockets did.
#[derive(Debug)]
pub struct Seen {
    /// The deployment it was on.
    pub audience: String,
    /// The mutations that went on last, oldest first.
    mutations: Mutex<VecDeque<u32>>,
}

impl Seen {
    /// The mutations that a client who comes back may repeat: JS does so with those whose answer it has not seen.
    pub fn sent(&self) -> HashSet<u32> {
        self.mutations.lock().iter().copied().collect()
    }

    /// Notes that one goes on.
    pub fn sending(&self, request: u32) {
        let mut mutations = self.mutations.lock();
        if mutations.len() == MUTATIONS_MAX {
            mutations.pop_front();
        }
        mutations.push_back(request);
    }
}

#[derive(Debug, Default)]
struct Socket {
    /// Told to end, because the client has opened another.
    end: Notify,
    ended: Notify,
}

/// All sessions. One per process.
#[derive(Debug)]
pub struct Sessions {
    open: Mutex<HashMap<Key, Arc<Socket>>>,
    seen: Cache<Key, Arc<Seen>>,
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            open: Mutex::default(),
            seen: Cache::builder().max_capacity(REMEMBERED_MAX).time_to_idle(REMEMBERED_FOR).build(),
        }
    }
}

impl Sessions {
    /// Enters a socket; the one that served this session before is told to end, and is waited for, so that a client
    /// that reconnects is not refused for its own ghost.
    ///
    /// # Cancel safety
    /// Dropping it enters nothing; the earlier socket ends.
    pub async fn enter(self: &Arc<Self>, key: Key) -> Entered {
        let ghost = self.open.lock().get(&key).cloned();
        if let Some(ghost) = ghost {
            let mut ended = std::pin::pin!(ghost.ended.notified());
            ended.as_mut().enable();
            // Kept for a socket that is not listening yet.
            ghost.end.notify_one();
            let _ = tokio::time::timeout(GHOST_WITHIN, ended).await;
        }
        let socket = Arc::new(Socket::default());
        self.open.lock().insert(key.clone(), Arc::clone(&socket));
        Entered { sessions: Arc::clone(self), key, socket }
    }

    /// What earlier sockets of the session did on this deployment; `None` if nothing is known.
    pub fn seen(&self, key: &Key, audience: &str) -> Option<Arc<Seen>> {
        self.seen.get(key).filter(|seen| seen.audience == audience)
    }

    /// Begins to remember a session on a deployment.
    pub fn remember(&self, key: &Key, audience: &str) -> Arc<Seen> {
        let seen = Arc::new(Seen { audience: audience.to_owned(), mutations: Mutex::default() });
        self.seen.insert(key.clone(), Arc::clone(&seen));
        seen
    }
}

/// A socket's entry; dropping it says that the socket has ended.
#[derive(Debug)]
pub struct Entered {
    sessions: Arc<Sessions>,
    key: Key,
    socket: Arc<Socket>,
}

impl Entered {
    /// Waits until another socket takes the session over.
    ///
    /// # Cancel safety
    /// May be dropped at any point.
    pub async fn replaced(&self) {
        self.socket.end.notified().await;
    }

    /// Which session it is.
    pub fn key(&self) -> &Key {
        &self.key
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut open = self.sessions.open.lock();
        if open.get(&self.key).is_some_and(|present| Arc::ptr_eq(present, &self.socket)) {
            open.remove(&self.key);
        }
        drop(open);
        self.socket.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(org: &str) -> Key {
        (OrgId::parse(org).expect("an org"), "session".into())
    }

    #[tokio::test]
    async fn a_session_has_one_socket_and_anothers_id_reaches_nobody() {
        let sessions = Arc::new(Sessions::default());
        let first = sessions.enter(key("a")).await;
        let stranger = sessions.enter(key("b")).await;
        let second = tokio::spawn({
            let sessions = Arc::clone(&sessions);
            async move { sessions.enter(key("a")).await }
        });
        first.replaced().await;
        drop(first);
        let second = second.await.expect("entered");
        let told = tokio::time::timeout(Duration::from_millis(10), stranger.replaced()).await;
        assert!(told.is_err(), "the same id of another organisation is another session");
        drop(second);
        assert_eq!(sessions.open.lock().len(), 1);
    }

    #[test]
    fn a_mutation_that_went_on_is_known_on_that_deployment_only() {
        let sessions = Sessions::default();
        let seen = sessions.remember(&key("a"), "one");
        assert!(seen.sent().is_empty());
        (0..=MUTATIONS_MAX as u32).for_each(|request| seen.sending(request));
        assert!(!seen.sent().contains(&0) && seen.sent().contains(&1), "the oldest is forgotten");
        assert!(sessions.seen(&key("a"), "one").is_some());
        assert!(sessions.seen(&key("a"), "other").is_none() && sessions.seen(&key("b"), "one").is_none());
    }
}
