//! The clients of each tenant, for `CLIENT LIST`, `CLIENT KILL` and `PUBSUB NUMPAT`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering},
};

use dashmap::DashMap;
use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::{net::Peer, quota::clock, tenant::OrgId, upstream::redis::Outbox};

/// What one tenant's clients may know of each other.
#[derive(Debug)]
pub struct Card {
    /// The id that `CLIENT ID` gives.
    pub id: u64,
    /// Where it comes from.
    pub peer: Peer,
    /// When it came, in coarse milliseconds.
    pub since_ms: u64,
    /// Its name, library and last command.
    pub words: Mutex<Words>,
    /// Its logical database.
    pub database: AtomicU32,
    /// Its protocol version.
    pub version: AtomicU32,
    /// Its pattern subscriptions.
    pub patterns: AtomicU32,
    /// Its channel subscriptions.
    pub channels: AtomicU32,
    /// The server's id of the connection that brings its messages; 0 is none.
    pub subscriber: AtomicI64,
    /// When it last sent something, in coarse milliseconds.
    pub seen_ms: AtomicU64,
    /// Somebody of its tenant killed it.
    pub killed: AtomicBool,
    /// For waking it.
    pub outbox: Arc<Outbox>,
}

/// See [`Card`].
#[derive(Debug, Default)]
pub struct Words {
    /// `CLIENT SETNAME`.
    pub name: String,
    /// `CLIENT SETINFO LIB-NAME`.
    pub lib_name: String,
    /// `CLIENT SETINFO LIB-VER`.
    pub lib_ver: String,
    /// The last slow command.
    pub command: &'static str,
}

impl Card {
    /// One line of `CLIENT LIST`.
    pub fn line(&self) -> String {
        let now = clock::now_ms();
        let words = self.words.lock();
        format!(
            "id={} addr={} laddr= fd=0 name={} age={} idle={} flags=N db={} sub={} psub={} ssub=0 multi=-1 qbuf=0 \
             qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 events=r cmd={} user=app \
             redir=-1 resp={} lib-name={} lib-ver={}\n",
            self.id,
            self.peer,
            words.name,
            now.saturating_sub(self.since_ms) / 1000,
            now.saturating_sub(self.seen_ms.load(Ordering::Relaxed)) / 1000,
            self.database.load(Ordering::Relaxed),
            self.channels.load(Ordering::Relaxed),
            self.patterns.load(Ordering::Relaxed),
            if words.command.is_empty() { "NULL" } else { words.command },
            self.version.load(Ordering::Relaxed),
            words.lib_name,
            words.lib_ver,
        )
    }

    /// Ends the client.
    pub fn kill(&self) {
        self.killed.store(true, Ordering::Release);
        self.outbox.wake();
    }
}

/// All clients by tenant.
#[derive(Debug, Default)]
pub struct Registry(DashMap<OrgId, HashMap<u64, Arc<Card>>>);

impl Registry {
    /// Adds a client.
    pub fn enter(&self, org: &OrgId, card: Arc<Card>) {
        self.0.entry(org.clone()).or_default().insert(card.id, card);
    }

    /// Forgets a client.
    pub fn leave(&self, org: &OrgId, id: u64) {
        if let Some(mut cards) = self.0.get_mut(org) {
            cards.remove(&id);
        }
        self.0.remove_if(org, |_, cards| cards.is_empty());
    }

    /// The tenant's clients, by id.
    pub fn of(&self, org: &OrgId) -> Vec<Arc<Card>> {
        let mut cards: Vec<_> = self.0.get(org).map(|cards| cards.values().cloned().collect()).unwrap_or_default();
        cards.sort_by_key(|card| card.id);
        cards
    }
}
