//! The suite over MongoDB, and what only it can suffer: servers that go away and lose their memory, connections that
//! are cut, hands that write what they like.

use std::sync::{
    OnceLock,
    atomic::{AtomicU32, Ordering},
};

use bson::{Document, doc};
use mongodb::Client;
use tempfile::TempDir;

use super::*;
use crate::cli::dev::mongo::{self, Server};

/// The server that the tests of this process share; its thread keeps it.
fn shared() -> &'static str {
    static SHARED: OnceLock<String> = OnceLock::new();
    SHARED.get_or_init(|| {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let folder = tempfile::tempdir().expect("a folder");
            let server = runtime().block_on(start(&folder));
            sender.send(server.url()).expect("somebody waits");
            loop {
                std::thread::park();
            }
        });
        receiver.recv().expect("it starts")
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

async fn start(folder: &TempDir) -> Server {
    let program = mongo::find().expect("a MongoDB-wire server is installed: sh .ci/tools");
    Server::start(&program, folder.path(), None).await.expect("it starts")
}

fn config(url: &str) -> Config {
    static DATABASES: AtomicU32 = AtomicU32::new(0);
    let database = format!("catalog_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    Config { kind: Kind::Mongodb, url: Some(Password::new(url)), database, ..Config::default() }
}

/// A catalog of its own on the shared server, and its database as an operator's shell sees it.
async fn fresh() -> (Catalog, mongodb::Database) {
    let config = config(shared());
    let catalog = Catalog::open(&config).await.expect("opens");
    catalog.init().await.expect("collections");
    let client = Client::with_uri_str(shared()).await.expect("a client");
    (catalog, client.database(&config.database))
}

macro_rules! suite {
    ($($test:ident),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            let (catalog, _database) = fresh().await;
            suite::$test(catalog).await;
        }
    )*};
}

suite!(
    documents_come_back_as_they_went,
    an_update_needs_the_epoch_that_is_there,
    one_of_many_writers_wins,
    unknown_fields_and_the_first_date_survive_an_update,
    the_list_streams_every_document,
    service_keys_are_kept_listed_and_revoked,
    the_feeder_answers,
    a_thousand_questions_at_once_are_answered,
    a_change_of_tier_is_enforced_on_live_slots,
    suspension_and_deletion_stop_live_sessions,
    a_revoked_key_is_forgotten_and_its_sessions_stop,
    what_could_not_be_read_again_is_not_written,
);

mod the_ledger {
    use super::{super::ledger, *};

    macro_rules! suite {
        ($($test:ident),* $(,)?) => {$(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let (catalog, _database) = fresh().await;
                ledger::$test(catalog).await;
            }
        )*};
    }

    suite!(
        a_commit_changes_tier_and_epoch_in_one_write,
        one_transition_at_a_time,
        a_later_coordinator_fences_the_earlier_off,
        a_record_that_somebody_else_changed_is_not_committed,
        no_other_writer_touches_the_stamp,
        it_can_be_called_off,
        a_tenant_stands_still_until_the_decision_which_moves_its_home,
    );
}

/// On one thread, where the order of the two tasks is known.
#[tokio::test]
async fn a_change_that_overtakes_a_look_up_is_enforced() {
    let (catalog, _database) = fresh().await;
    suite::a_change_that_overtakes_a_look_up_is_enforced(catalog).await;
}

fn orgs(database: &mongodb::Database) -> mongodb::Collection<Document> {
    database.collection("orgs")
}

/// As a shell does it: no `updated_at`, a number of its own type.
async fn by_hand(database: &mongodb::Database, tier: &str) {
    let update = doc! {"$set": {"tier": tier}, "$inc": {"epoch": 1.0}};
    let done = orgs(database).update_one(doc! {"_id": "acme"}, update).await.expect("written");
    assert_eq!(done.matched_count, 1);
}

#[tokio::test]
async fn an_edit_by_hand_is_enforced() {
    let (catalog, database) = fresh().await;
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    let fed = Fed::follow(catalog).await;
    let slot = fed.slot("acme").await;
    for (tier, wanted) in [("PRO", Tier::Pro), ("STARTER", Tier::Starter), ("ENTERPRISE", Tier::Enterprise)] {
        by_hand(&database, tier).await;
        let took = until(tier, || slot.policy().tenant.tier == wanted).await;
        assert!(took < suite::ENFORCED_WITHIN, "{took:?}");
    }
    orgs(&database)
        .update_one(doc! {"_id": "acme"}, doc! {"$set": {"note": bson::oid::ObjectId::new()}})
        .await
        .expect("ok");
    // Our own update keeps what the hand wrote, as it wrote it.
    let next = Record::new(Tenant { epoch: 5, ..tenant("acme") });
    fed.catalog.put(next, Expect::Epoch(4)).await.expect("kept");
    let there = orgs(&database).find_one(doc! {"_id": "acme"}).await.expect("read").expect("there");
    assert!(there.get_object_id("note").is_ok() && there.get_datetime("created_at").is_ok(), "{there}");
    assert!(there.get_datetime("updated_at").is_ok(), "{there}");
}

#[tokio::test]
async fn the_rules_keep_an_operators_typing_error_out() {
    let (catalog, database) = fresh().await;
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    for bad in [
        doc! {"tier": "GOLD"},
        doc! {"status": "Active"},
        doc! {"epoch": "2"},
        doc! {"routes": {"postgres": "moon"}},
        doc! {"routes": {"mongodb": "shared"}},
        doc! {"routes": "neon"},
    ] {
        assert!(orgs(&database).update_one(doc! {"_id": "acme"}, doc! {"$set": &bad}).await.is_err(), "{bad}");
    }
    for id in ["ACME", "a b", ""] {
        let bad = doc! {"_id": id, "tier": "FREE", "status": "active", "epoch": 1};
        assert!(orgs(&database).insert_one(bad).await.is_err(), "{id}");
    }
    assert!(database.collection("tiers").insert_one(doc! {"_id": "GOLD"}).await.is_err());
    assert!(
        database
            .collection("service_keys")
            .insert_one(doc! {"_id": "short", "org": "acme", "user": "app"})
            .await
            .is_err()
    );
    let again = catalog.init().await.expect("it may be repeated");
    assert!(again.iter().all(|one| !one.new && one.without_rules.is_none()), "{again:?}");
}

#[tokio::test]
async fn a_damaged_document_is_counted_once_and_changes_nothing() {
    // Without rules, as a collection that nobody initialised.
    let config = config(shared());
    let catalog = Catalog::open(&config).await.expect("opens");
    let database = Client::with_uri_str(shared()).await.expect("a client").database(&config.database);
    catalog
        .put(Record::new(Tenant { epoch: 5, tier: Tier::Pro, ..tenant("acme") }), Expect::Absent)
        .await
        .expect("kept");
    catalog.put(Record::new(tenant("globex")), Expect::Absent).await.expect("kept");
    let mut fed = Fed::follow(catalog).await;
    let (slot, other) = (fed.slot("acme").await, fed.slot("globex").await);
    let live = session(&slot, 1, None);
    let good = doc! {"_id": "acme", "tier": "FREE", "status": "active", "epoch": 6};
    let mut damages = vec![doc! {"_id": "acme"}];
    for (name, value) in [("tier", "GOLD"), ("status", "Active"), ("epoch", "6"), ("databases", "x")] {
        let mut bad = good.clone();
        bad.insert(name, value);
        damages.push(bad);
    }
    damages.push(doc! {"_id": "acme", "tier": "FREE", "status": "active", "epoch": 4});
    damages.push(doc! {"_id": "acme", "tier": "FREE", "status": "active", "epoch": 6.5});
    for (n, bad) in damages.iter().enumerate() {
        let before = fed.catalog.damaged();
        for round in 0..2 {
            orgs(&database).replace_one(doc! {"_id": "acme"}, bad).await.expect("written");
            // News comes in order: once the key was seen, so was the damage.
            let mark = key(u8::try_from(2 * n + round).expect("few damages"), "acme");
            fed.catalog.create_key(KeyRecord::new(mark.clone())).await.expect("kept");
            fed.forgets(mark.hash).await;
        }
        assert_eq!(fed.catalog.damaged(), before + 1, "damage {n} counts once");
        assert_eq!((slot.policy().tenant.tier, slot.policy().tenant.epoch), (Tier::Pro, 5), "damage {n}");
    }
    assert_eq!(live.stopped(), None);
    // Others are followed all the while, and a list names the damaged one.
    let next = Record::new(Tenant { tier: Tier::Pro, epoch: 2, ..tenant("globex") });
    fed.catalog.put(next, Expect::Epoch(1)).await.expect("kept");
    until("the other", || other.policy().tenant.tier == Tier::Pro).await;
    let mut list = fed.catalog.list();
    let mut faults = Vec::new();
    while let Some(item) = list.recv().await {
        faults.extend(item.err());
    }
    assert!(matches!(&faults[..], [Fault::Damaged(what)] if what.starts_with("acme: ")), "{faults:?}");
    orgs(&database).replace_one(doc! {"_id": "acme"}, good).await.expect("written");
    until("mended", || slot.policy().tenant.tier == Tier::Free).await;
}

#[tokio::test]
async fn a_dropped_collection_ends_nobodys_sessions() {
    let (catalog, database) = fresh().await;
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    let fed = Fed::follow(catalog).await;
    let slot = fed.slot("acme").await;
    let live = session(&slot, 1, None);
    orgs(&database).drop().await.expect("dropped");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((live.stopped(), slot.policy().tenant.status), (None, Status::Active));
    // Restored, as by a tool that knows nothing of rules.
    let back = doc! {"_id": "acme", "tier": "PRO", "status": "active", "epoch": 2};
    orgs(&database).insert_one(back).await.expect("written");
    until("PRO", || slot.policy().tenant.tier == Tier::Pro).await;
}

#[tokio::test]
async fn the_collection_tiers_counts_over_the_file_and_is_followed() {
    let (catalog, database) = fresh().await;
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    let tiers = database.collection::<Document>("tiers");
    tiers.insert_one(doc! {"_id": "FREE", "postgres": {"connections": 7}}).await.expect("written");
    assert!(catalog.tiers(include_str!("../../../config/tiers.toml")).is_ok());
    let fed = Fed::follow(catalog).await;
    let slot = fed.slot("acme").await;
    let connections = || slot.policy().limits.connections(Protocol::Postgres);
    assert_eq!(connections(), 7, "known before anybody is answered");
    tiers.update_one(doc! {"_id": "FREE"}, doc! {"$set": {"postgres.connections": 9}}).await.expect("written");
    until("nine", || connections() == 9).await;
    tiers.update_one(doc! {"_id": "FREE"}, doc! {"$set": {"postgres.nonsense": 9}}).await.expect("written");
    until("the damage is counted", || fed.catalog.damaged() == 1).await;
    assert_eq!(connections(), 9, "the last good limits serve");
    tiers.delete_one(doc! {"_id": "FREE"}).await.expect("deleted");
    until("the file's", || connections() == 5).await;
}

/// A server of a test's own behind a door: connections can be cut and refused, and the server may move behind it.
struct Behind {
    door: Door,
    folder: TempDir,
    server: Option<Server>,
}

impl Behind {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let server = start(&folder).await;
        let door = Door::open(server.port()).await;
        Self { door, folder, server: Some(server) }
    }

    fn url(&self) -> String {
        format!("mongodb://127.0.0.1:{}/?directConnection=true", self.door.port)
    }

    /// Past the door.
    async fn database(&self, name: &str) -> mongodb::Database {
        let url = self.server.as_ref().expect("it runs").url();
        Client::with_uri_str(url).await.expect("a client").database(name)
    }

    fn stop(&mut self) {
        self.door.shut(true);
        self.server.take().expect("it runs").stop().expect("it stops");
    }

    async fn start_again(&mut self) {
        let server = start(&self.folder).await;
        self.door.lead_to(server.port());
        self.server = Some(server);
        self.door.shut(false);
    }
}

/// Bytes from one port to another, while it is open.
struct Door {
    port: u16,
    to: tokio::sync::watch::Sender<(u16, bool)>,
    task: tokio::task::JoinHandle<()>,
}

impl Door {
    async fn open(to: u16) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let to = tokio::sync::watch::Sender::new((to, false));
        let state = to.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut client, _)) = listener.accept().await else { return };
                let mut watching = state.subscribe();
                tokio::spawn(async move {
                    let (port, shut) = *watching.borrow_and_update();
                    if shut {
                        return;
                    }
                    let Ok(mut server) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = watching.changed() => {}
                    }
                });
            }
        });
        Self { port, to, task }
    }

    /// Cuts every connection; while shut, none is let in.
    fn shut(&self, shut: bool) {
        self.to.send_modify(|state| state.1 = shut);
    }

    fn lead_to(&self, port: u16) {
        self.to.send_modify(|state| state.0 = port);
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn behind(server: &Behind) -> (Fed, String) {
    let config = config(&server.url());
    let catalog = Catalog::open(&config).await.expect("opens");
    catalog.init().await.expect("collections");
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    catalog.create_key(KeyRecord::new(key(1, "acme"))).await.expect("kept");
    (Fed::follow(catalog).await, config.database)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_connection_misses_nothing() {
    let server = Behind::start().await;
    let (fed, name) = behind(&server).await;
    let slot = fed.slot("acme").await;
    let database = server.database(&name).await;
    let live = session(&slot, 1, Some([1; 32]));
    fed.directory.key([1; 32]).await.expect("known");
    for (tier, wanted) in [("PRO", Tier::Pro), ("FREE", Tier::Free), ("STARTER", Tier::Starter)] {
        server.door.shut(true);
        by_hand(&database, tier).await;
        until("it is seen to be away", || fed.catalog.age() > Duration::from_millis(1_500)).await;
        assert_ne!(slot.policy().tenant.tier, wanted, "nobody could have told");
        server.door.shut(false);
        until(tier, || slot.policy().tenant.tier == wanted).await;
    }
    // A key revoked while nobody was looking.
    server.door.shut(true);
    database.collection::<Document>("service_keys").delete_one(doc! {}).await.expect("deleted");
    assert_eq!(live.stopped(), None);
    server.door.shut(false);
    until("the session to stop", || live.stopped() == Some(Stop::Revoked)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_server_is_gone_the_known_are_served_and_nothing_is_missed_after() {
    let mut server = Behind::start().await;
    let (fed, name) = behind(&server).await;
    let slot = fed.slot("acme").await;
    let live = session(&slot, 1, None);
    server.stop();
    until("it is seen to be away", || fed.catalog.age() > Duration::from_millis(1_500)).await;
    // Who is known is served; who is not is told to come again, and at once.
    assert!(fed.table.slot(&org("acme")).await.is_ok());
    until("strangers are told quickly", || fed.catalog.age() > Duration::from_secs(3)).await;
    let asked = std::time::Instant::now();
    assert_eq!(fed.table.slot(&org("globex")).await.err().map(|refusal| refusal.kind()), Some("catalog_down"));
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert_eq!((live.stopped(), slot.policy().tenant.tier), (None, Tier::Free));
    server.start_again().await;
    by_hand(&server.database(&name).await, "PRO").await;
    until("PRO", || slot.policy().tenant.tier == Tier::Pro).await;
    until("it is in step", || fed.catalog.age() < Duration::from_millis(1_500)).await;
    assert_eq!(fed.table.slot(&org("globex")).await.err().map(|refusal| refusal.kind()), Some("unknown_org"));
}

/// Another server in its place, with other contents: the token means nothing to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_token_means_that_everything_in_use_is_read_again() {
    let mut server = Behind::start().await;
    let (fed, name) = behind(&server).await;
    let slot = fed.slot("acme").await;
    let live = session(&slot, 1, Some([1; 32]));
    fed.directory.key([1; 32]).await.expect("known");
    server.stop();
    server.folder = tempfile::tempdir().expect("another folder");
    let other = start(&server.folder).await;
    let database = Client::with_uri_str(other.url()).await.expect("a client").database(&name);
    let there = doc! {"_id": "acme", "tier": "ENTERPRISE", "status": "active", "epoch": 9};
    orgs(&database).insert_one(there).await.expect("written");
    // Its collection of keys is there, and this key is not.
    database
        .collection("service_keys")
        .insert_one(doc! {"_id": "02".repeat(32), "org": "acme", "user": "app"})
        .await
        .expect("ok");
    server.door.lead_to(other.port());
    server.server = Some(other);
    server.door.shut(false);
    until("ENTERPRISE", || slot.policy().tenant.tier == Tier::Enterprise).await;
    until("the session to stop", || live.stopped() == Some(Stop::Revoked)).await;
    by_hand(&database, "PRO").await;
    until("followed again", || slot.policy().tenant.tier == Tier::Pro).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_starts_without_a_server_and_finds_it_later() {
    let mut server = Behind { door: Door::open(1).await, folder: tempfile::tempdir().expect("a folder"), server: None };
    server.door.shut(true);
    let config = config(&server.url());
    let catalog = Catalog::open(&config).await.expect("opening connects to nothing");
    let fed = Fed::start(catalog);
    assert_eq!(fed.table.slot(&org("acme")).await.err().map(|refusal| refusal.kind()), Some("catalog_down"));
    assert!(futures_util::FutureExt::now_or_never(fed.catalog.reached()).is_none());
    server.start_again().await;
    fed.catalog.reached().await;
    fed.catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    until("acme is served", || fed.catalog.age() < Duration::from_secs(1)).await;
    assert!(fed.table.slot(&org("acme")).await.is_ok());
}

/// A server that fails as it is told to.
struct Failing {
    _folder: TempDir,
    _child: tokio::process::Child,
    url: String,
    admin: mongodb::Database,
}

impl Failing {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        drop(socket);
        let mut command = tokio::process::Command::new(mongo::find().expect("installed"));
        command.args(["--port", &port.to_string(), "--enable-test-commands", "--storage-path"]);
        command.arg(folder.path().join("data")).kill_on_drop(true).current_dir(folder.path());
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let child = command.spawn().expect("it starts");
        until("it listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()).await;
        let url = format!("mongodb://127.0.0.1:{port}/?directConnection=true");
        let admin = Client::with_uri_str(&url).await.expect("a client").database("admin");
        Self { _folder: folder, _child: child, url, admin }
    }

    /// `command` fails with `data` in this `mode`.
    async fn fail(&self, command: &str, mode: impl Into<bson::Bson>, mut data: Document) {
        data.insert("failCommands", vec![command]);
        let order = doc! {"configureFailPoint": "failCommand", "mode": mode.into(), "data": data};
        self.admin.run_command(order).await.expect("it takes orders");
    }
}

/// As the changes of a server come that kept its history too short, was rolled back, or is a standalone no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_can_not_be_resumed_begins_anew() {
    let server = Failing::start().await;
    let config = config(&server.url);
    let catalog = Catalog::open(&config).await.expect("opens");
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    let fed = Fed::follow(catalog).await;
    let database = Client::with_uri_str(&server.url).await.expect("a client").database(&config.database);
    let slot = fed.slot("acme").await;
    let mut epoch = 1;
    for (code, label) in [(286, Some("NonResumableChangeStreamError")), (280, None), (260, None), (9, None), (1, None)]
    {
        let labels: Vec<&str> = label.into_iter().collect();
        server.fail("getMore", doc! {"times": 1}, doc! {"errorCode": code, "errorLabels": labels}).await;
        for _ in 0..3 {
            by_hand(&database, if epoch % 2 == 0 { "FREE" } else { "PRO" }).await;
            epoch += 1;
        }
        until("the last change", || slot.policy().tenant.epoch == epoch).await;
    }
}

/// A deployment without change streams, as a standalone server is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_change_streams_it_is_read_every_second() {
    let server = Failing::start().await;
    // All else is read by other commands.
    server.fail("aggregate", "alwaysOn", doc! {"errorCode": 40573}).await;
    let config = config(&server.url);
    let catalog = Catalog::open(&config).await.expect("opens");
    catalog.init().await.expect("collections");
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    catalog.create_key(KeyRecord::new(key(1, "acme"))).await.expect("kept");
    catalog.tiers(include_str!("../../../config/tiers.toml")).expect("the shipped file");
    let fed = Fed::follow(catalog).await;
    let database = Client::with_uri_str(&server.url).await.expect("a client").database(&config.database);
    let slot = fed.slot("acme").await;
    let live = session(&slot, 1, Some([1; 32]));
    fed.directory.key([1; 32]).await.expect("known");
    for (tier, wanted) in [("PRO", Tier::Pro), ("STARTER", Tier::Starter)] {
        by_hand(&database, tier).await;
        let took = until(tier, || slot.policy().tenant.tier == wanted).await;
        assert!(took < Duration::from_secs(4), "{took:?}");
    }
    let tiers = database.collection::<Document>("tiers");
    tiers.insert_one(doc! {"_id": "STARTER", "postgres": {"connections": 11}}).await.expect("written");
    until("eleven", || slot.policy().limits.connections(Protocol::Postgres) == 11).await;
    database.collection::<Document>("service_keys").delete_one(doc! {}).await.expect("deleted");
    until("the session to stop", || live.stopped() == Some(Stop::Revoked)).await;
    orgs(&database).delete_one(doc! {"_id": "acme"}).await.expect("deleted");
    let gone = |slot: Arc<Slot>| slot.policy().tenant.status != Status::Active;
    until("the organisation to be gone", || fed.table.resident(&org("acme")).is_none_or(gone)).await;
}
