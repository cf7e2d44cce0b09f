//! `suite.rs` holds what every kind of catalog has to do, as functions over [`Catalog`]; `file.rs` and `mongo.rs` run it
//! over theirs and add what only they can suffer.

mod file;
mod ledger;
mod mongo;
mod suite;

use super::*;
use crate::{
    quota::{Live, Slot, Stop},
    tenant::{
        Protocol, Status, Tenant, Tier, Tiers,
        directory::{Absent, Directory, ServiceKey},
    },
};

fn org(id: &str) -> OrgId {
    OrgId::parse(id).expect("an id")
}

fn tenant(id: &str) -> Tenant {
    Tenant {
        org: org(id),
        tier: Tier::Free,
        status: Status::Active,
        epoch: 1,
        generation: 1,
        databases: vec!["reports".into()],
        users: vec![],
        routes: Default::default(),
        still: false,
    }
}

fn key(n: u8, id: &str) -> ServiceKey {
    ServiceKey { hash: [n; 32], org: org(id), user: "app".into(), expires_at: None }
}

/// A catalog that is being fed into a table, as in a running process.
struct Fed {
    catalog: Catalog,
    table: Arc<Table>,
    directory: Directory,
    /// Keys that the feeder said to forget.
    forgotten: mpsc::UnboundedReceiver<KeyHash>,
    feeder: tokio::task::JoinHandle<()>,
}

impl Fed {
    fn start(catalog: Catalog) -> Self {
        let (directory, asks) = Directory::new();
        let tiers = Tiers::parse(include_str!("../../config/tiers.toml")).expect("the shipped file parses");
        let table = Arc::new(Table::new(directory.clone(), tiers, 100));
        let (sender, forgotten) = mpsc::unbounded_channel();
        let (fed, place) = (catalog.clone(), Arc::clone(&table));
        let feeder = tokio::spawn(async move {
            let forget = |hash: &KeyHash| {
                let _ = sender.send(*hash);
            };
            fed.feed(place, forget, asks).await;
        });
        Self { catalog, table, directory, forgotten, feeder }
    }

    /// The same, once it follows: what is written from now on has to be seen.
    async fn follow(catalog: Catalog) -> Self {
        let fed = Self::start(catalog);
        tokio::time::timeout(Duration::from_secs(10), fed.catalog.reached()).await.expect("it is reached");
        fed
    }

    async fn slot(&self, id: &str) -> Arc<Slot> {
        self.table.slot(&org(id)).await.expect("a known organisation")
    }

    /// Waits until the feeder has said that this key is to be forgotten.
    async fn forgets(&mut self, hash: KeyHash) {
        let said = async { while self.forgotten.recv().await.expect("the feeder runs") != hash {} };
        tokio::time::timeout(Duration::from_secs(10), said).await.expect("the key is forgotten");
    }
}

impl Drop for Fed {
    fn drop(&mut self) {
        self.feeder.abort();
    }
}

/// Waits until `done`, and gives how long it took. Ten seconds mean that it never comes.
async fn until(what: &str, mut done: impl FnMut() -> bool) -> Duration {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    start.elapsed()
}

fn session(slot: &Slot, id: u64, key: Option<KeyHash>) -> Arc<Live> {
    let live = Arc::new(Live::new(id, 0, u64::MAX, key, None));
    slot.enter(Arc::clone(&live));
    live
}
