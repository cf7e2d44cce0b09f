//! One logical database of a tenant: its prefix, its ledger, its connections.

use std::sync::{Arc, atomic::AtomicU64};

use hashbrown::HashMap;
use parking_lot::Mutex;

use super::{Version, ledger::Ledger, link::Link};

/// Idle dedicated connections of one database.
const DEDICATED_IDLE_MAX: usize = 8;

/// One logical database of a tenant.
#[derive(Debug)]
pub struct Database {
    /// As the tenant knows it.
    pub number: u32,
    /// As the server knows it.
    pub index: u32,
    /// Nobody else's keys are in it.
    pub alone: bool,
    /// What stands before its keys.
    pub prefix: Box<[u8]>,
    /// How many keys it can hold at most now.
    pub ledger: Arc<Ledger>,
    /// What stands before its channels.
    pub channels: Box<[u8]>,
    /// The tenant's ACL user.
    pub user: String,
    /// Scripts of the tenant by the SHA-1 that its clients know them by.
    pub scripts: Mutex<HashMap<[u8; 20], Arc<Script>>>,
    /// Bytes of different scripts of all tenants so far, for the one who looks after the server's cache.
    pub script_bytes: Arc<AtomicU64>,
    pub(super) shared: [Slot; 2],
    pub(super) idle: Mutex<Vec<(Version, Arc<Link>)>>,
}

impl Database {
    /// The shared connection if it is open.
    pub fn shared_open(&self, version: Version) -> Option<Arc<Link>> {
        self.shared[version as usize - 2].open()
    }

    /// Takes a dedicated connection back that holds no state and no outstanding reply.
    pub fn give_back(&self, version: Version, link: Arc<Link>) {
        let mut idle = self.idle.lock();
        if idle.len() < DEDICATED_IDLE_MAX && !link.is_closed() {
            link.hand_to(Arc::default());
            idle.push((version, link));
        } else {
            link.part();
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.shared.iter().filter_map(Slot::open).for_each(|link| link.close());
        self.idle.lock().drain(..).for_each(|(_, link)| link.close());
    }
}

/// A tenant's script as the server knows it.
#[derive(Debug)]
pub struct Script {
    /// Its text.
    pub text: Box<[u8]>,
    /// Its SHA-1 in hexadecimal.
    pub sha: [u8; 40],
}

/// The place of a shared connection.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) link: Mutex<Option<Arc<Link>>>,
    /// Held while dialing; the pause after a failure, and until when.
    pub(super) dialing: tokio::sync::Mutex<Option<(tokio::time::Instant, u64)>>,
}

impl Slot {
    pub(super) fn open(&self) -> Option<Arc<Link>> {
        self.link.lock().as_ref().filter(|link| !link.is_closed()).cloned()
    }
}
