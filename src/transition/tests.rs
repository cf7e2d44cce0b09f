//! The coordinator over databases that fail in every way, at every step. Each row says how it has to end.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::json;

use super::{
    participant::{Look, Order, PREPARES, Participant, ReadBack, Reply, SETTLES, Trouble},
    *,
};
use crate::{
    catalog::{Catalog, Config, Entry, Expect, LedgerFault, Phase, Record},
    tenant::{Home, Limits, OrgId, Protocol, Tenant, Tier, Tiers},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Look,
    Prepare,
    Finish,
    Restore,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// It says no.
    No,
    /// It can't be reached.
    Gone,
    /// It never answers, and does nothing.
    Slow,
    /// It does it, and the answer is lost.
    Lost,
}

/// A database that fails as told, so many times.
struct Double {
    database: Protocol,
    faults: Mutex<HashMap<At, (How, u32)>>,
    /// The tier whose limits are in force, and who wrote last.
    held: Mutex<(Tier, (u64, u8))>,
    calls: Mutex<Vec<At>>,
}

impl Double {
    fn new(database: Protocol) -> Arc<Self> {
        Arc::new(Self {
            database,
            faults: Mutex::default(),
            held: Mutex::new((Tier::Free, (0, 0))),
            calls: Mutex::default(),
        })
    }

    async fn call(&self, at: At, order: Option<(&Order, u8)>) -> Result<(), Trouble> {
        self.calls.lock().push(at);
        let fault = {
            let mut faults = self.faults.lock();
            match faults.get_mut(&at) {
                Some((how, left)) if *left > 0 => {
                    *left -= 1;
                    Some(*how)
                }
                _ => None,
            }
        };
        match fault {
            Some(How::No) => return Err(Trouble::No("not today".into())),
            Some(How::Gone) => return Err(Trouble::Failed("connection refused".into())),
            Some(How::Slow) => std::future::pending().await,
            Some(How::Lost) | None => {}
        }
        if let Some((order, stage)) = order {
            let mut held = self.held.lock();
            if held.1 > (order.fence, stage) {
                return Err(Trouble::Overtaken);
            }
            held.1 = (order.fence, stage);
            held.0 = match at {
                At::Restore => order.tenant.tier,
                _ => order.to_tier,
            };
        }
        if fault == Some(How::Lost) { Err(Trouble::Unknown("the connection broke".into())) } else { Ok(()) }
    }
}

impl Participant for Double {
    fn database(&self) -> Protocol {
        self.database
    }

    fn look<'a>(&'a self, _: &'a Tenant, _: &'a Limits) -> Reply<'a, Look> {
        Box::pin(async {
            self.call(At::Look, None).await?;
            Ok(Look { prior: json!(self.held.lock().0), over: Vec::new() })
        })
    }

    fn prepare<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(self.call(At::Prepare, Some((order, PREPARES))))
    }

    fn finish<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(self.call(At::Finish, Some((order, SETTLES))))
    }

    fn restore<'a>(&'a self, order: &'a Order) -> Reply<'a, ()> {
        Box::pin(self.call(At::Restore, Some((order, SETTLES))))
    }

    fn read_back<'a>(&'a self, tenant: &'a Tenant, _: &'a Limits) -> Reply<'a, ReadBack> {
        Box::pin(async {
            let found = self.held.lock().0;
            Ok(ReadBack { agrees: found == tenant.tier, expected: json!(tenant.tier), found: json!(found) })
        })
    }
}

struct World {
    coordinator: Coordinator,
    doubles: Vec<Arc<Double>>,
    catalog: Catalog,
    org: OrgId,
    _folder: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let catalog = Catalog::open(&config(folder.path())).await.expect("a catalog");
        let org = OrgId::parse("acme").expect("an id");
        catalog.put(Record::new(Tenant::new(org.clone(), Tier::Free)), Expect::Absent).await.expect("kept");
        let doubles: Vec<_> = Protocol::ALL.map(Double::new).into();
        let coordinator = coordinator(&catalog, &doubles);
        Self { coordinator, doubles, catalog, org, _folder: folder }
    }

    fn fail(&self, seat: usize, at: At, how: How, times: u32) {
        self.doubles[seat].faults.lock().insert(at, (how, times));
    }

    fn request(&self) -> Request {
        Request { org: self.org.clone(), to: Tier::Pro, force: false, by: "test" }
    }

    /// Runs a transition to its end.
    async fn run(&self) -> Result<Phase, Refused> {
        let entry = self.coordinator.begin(&self.request()).await?;
        Ok(self.coordinator.drive(entry).await.expect("it ends").phase)
    }

    /// The record and every database say the same.
    async fn all_at(&self, tier: Tier, epoch: u64) {
        let record = self.catalog.get(&self.org).await.expect("there");
        assert_eq!((record.tenant.tier, record.tenant.epoch), (tier, epoch));
        let (_, answers) = self.coordinator.verify(&self.org).await.expect("readable");
        assert!(answers.iter().all(Verified::agrees), "{answers:?}");
        assert!(self.catalog.open_transition(&self.org).await.is_err(), "it is still open");
    }
}

fn config(folder: &std::path::Path) -> Config {
    toml::from_str(&format!("path = {:?}", folder.display().to_string())).expect("a configuration")
}

fn coordinator(catalog: &Catalog, doubles: &[Arc<Double>]) -> Coordinator {
    let tiers = Tiers::parse(include_str!("../../config/tiers.toml")).expect("the shipped tiers");
    let participants = doubles.iter().fold(Participants::none(), |all, double| all.with(Arc::clone(double) as _));
    Coordinator::new(catalog.clone(), tiers, participants)
}

#[tokio::test]
async fn a_look_that_fails_begins_nothing() {
    for seat in 0..5 {
        for how in [How::No, How::Gone, How::Slow] {
            let world = World::new().await;
            world.fail(seat, At::Look, how, u32::MAX);
            let refused = world.run().await.expect_err("it can't begin");
            let Refused::Participant { database, .. } = refused else { panic!("{refused:?}") };
            assert_eq!(database, Protocol::ALL[seat]);
            world.all_at(Tier::Free, 1).await;
            assert!(world.doubles.iter().all(|double| *double.calls.lock() == [At::Look]));
        }
    }
}

#[tokio::test]
async fn every_failure_of_every_database_at_every_step_ends_as_documented() {
    // All at once: each waits for its own deadlines.
    let mut rows = Vec::new();
    for seat in 0..5 {
        for (at, how, times, ends) in [
            (At::Prepare, How::No, 1, Phase::Aborted),
            (At::Prepare, How::Gone, 2, Phase::Done),
            (At::Prepare, How::Gone, u32::MAX, Phase::Aborted),
            (At::Prepare, How::Slow, u32::MAX, Phase::Aborted),
            (At::Prepare, How::Lost, 2, Phase::Done),
            (At::Prepare, How::Lost, u32::MAX, Phase::Aborted),
            (At::Finish, How::No, 2, Phase::Done),
            (At::Finish, How::Gone, 8, Phase::Done),
            (At::Finish, How::Slow, 2, Phase::Done),
            (At::Finish, How::Lost, 2, Phase::Done),
        ] {
            rows.push(async move {
                let world = World::new().await;
                world.fail(seat, at, how, times);
                let phase = world.run().await.expect("it begins");
                assert_eq!(phase, ends, "{seat} {at:?} {how:?} × {times}");
                match ends {
                    Phase::Done => world.all_at(Tier::Pro, 2).await,
                    _ => world.all_at(Tier::Free, 1).await,
                }
            });
        }
    }
    assert_eq!(futures_util::future::join_all(rows).await.len(), 50);
}

#[tokio::test]
async fn a_way_back_that_fails_is_tried_until_it_works() {
    for seat in 1..5 {
        for how in [How::No, How::Gone, How::Slow, How::Lost] {
            let world = World::new().await;
            world.fail(0, At::Prepare, How::No, 1);
            // It was asked, and may have done it.
            world.fail(seat, At::Prepare, How::Lost, 1);
            world.fail(seat, At::Restore, how, 2);
            assert_eq!(world.run().await, Ok(Phase::Aborted), "{seat} {how:?}");
            world.all_at(Tier::Free, 1).await;
        }
    }
}

#[tokio::test]
async fn a_database_that_was_never_reached_does_not_hold_up_the_end() {
    let world = World::new().await;
    world.fail(4, At::Prepare, How::Gone, u32::MAX);
    world.fail(4, At::Restore, How::Gone, u32::MAX);
    assert_eq!(world.run().await, Ok(Phase::Aborted));
    assert!(!world.doubles[4].calls.lock().contains(&At::Restore));
    world.all_at(Tier::Free, 1).await;
}

#[tokio::test]
async fn one_that_dies_after_the_commit_is_finished_when_it_comes_back() {
    let world = World::new().await;
    world.fail(4, At::Finish, How::Gone, u32::MAX);
    let entry = world.coordinator.begin(&world.request()).await.expect("it begins");
    let done = tokio::time::timeout(Duration::from_secs(1), world.coordinator.drive(entry)).await;
    assert!(done.is_err(), "it can't be over");
    let open = world.catalog.open_transition(&world.org).await.expect("open");
    assert_eq!(open.phase, Phase::Committed);
    assert_eq!(world.catalog.get(&world.org).await.expect("there").tenant.tier, Tier::Pro);
    // No other transition begins meanwhile.
    let again = Request { to: Tier::Free, ..world.request() };
    assert_eq!(world.coordinator.begin(&again).await, Err(Refused::Busy { id: open.id }));
    world.doubles[4].faults.lock().clear();
    assert_eq!(world.coordinator.take_up(&world.org).await.expect("it ends").phase, Phase::Done);
    world.all_at(Tier::Pro, 2).await;
}

#[tokio::test]
async fn one_that_is_called_off_before_the_commit_changes_nothing() {
    let world = World::new().await;
    world.fail(2, At::Prepare, How::Gone, u32::MAX);
    let entry = world.coordinator.begin(&world.request()).await.expect("it begins");
    world.catalog.cancel(&world.org).await.expect("called off");
    let done = world.coordinator.drive(entry).await.expect("it ends");
    assert_eq!(done.phase, Phase::Aborted);
    assert!(done.reason.expect("a reason").starts_with("called off"));
    world.all_at(Tier::Free, 1).await;
}

#[tokio::test]
async fn a_record_changed_by_an_operator_meanwhile_is_not_overwritten() {
    let world = World::new().await;
    let entry = world.coordinator.begin(&world.request()).await.expect("it begins");
    let mut record = world.catalog.get(&world.org).await.expect("there");
    record.tenant.epoch = 2;
    record.tenant.users = vec!["boss".into()];
    world.catalog.put(record, Expect::Epoch(1)).await.expect("written");
    assert_eq!(world.coordinator.drive(entry).await.expect("it ends").phase, Phase::Aborted);
    world.all_at(Tier::Free, 2).await;
}

#[tokio::test]
async fn the_older_of_two_coordinators_changes_nothing_any_more() {
    let world = World::new().await;
    world.fail(1, At::Prepare, How::Gone, 3);
    let entry = world.coordinator.begin(&world.request()).await.expect("it begins");
    // Another process that believes the first one dead: the same owner stands for a lease that is over.
    let newer = coordinator(&world.catalog, &world.doubles);
    let old = entry.clone();
    assert_eq!(newer.take_up(&world.org).await.expect("it ends").phase, Phase::Done);
    assert_eq!(world.coordinator.drive(old).await, Err(LedgerFault::Overtaken));
    world.all_at(Tier::Pro, 2).await;
}

#[tokio::test]
async fn databases_stay_where_they_are() {
    let world = World::new().await;
    assert_eq!(world.run().await, Ok(Phase::Done));
    // Documents move with the tier, so that the record need not say where they are.
    let routes = world.catalog.get(&world.org).await.expect("there").tenant.routes;
    assert_eq!(routes.mongodb, None);
}

/// Begins to make a tenant.
async fn draft(coordinator: &Coordinator, name: &str, tier: Tier) -> Entry {
    let org = OrgId::parse(name).expect("an id");
    coordinator.begin_errand(&Errand { org, act: Act::Create(tier), by: "test" }).await.expect("it begins")
}

#[tokio::test]
async fn a_new_tenant_s_home_is_written_down_and_its_tier_decides_it_only_then() {
    let world = World::new().await;
    let record = async |org: &OrgId| world.catalog.get(org).await.expect("there").tenant;
    // Made before homes were written down: where it was, whatever its tier says of new ones.
    assert_eq!(record(&world.org).await.home(), Home::Main);
    for (name, tier, home) in
        [("cold", Tier::Free, Home::Neon), ("hot", Tier::Starter, Home::Main), ("large", Tier::Enterprise, Home::Main)]
    {
        let done = world.coordinator.drive(draft(&world.coordinator, name, tier).await).await.expect("it ends");
        assert_eq!((done.phase, record(&done.org).await.routes.postgres), (Phase::Done, Some(home)), "{name}");
        // An operator's own hand.
        let mut edited = world.catalog.get(&done.org).await.expect("there");
        edited.tenant.tier = if tier == Tier::Free { Tier::Pro } else { Tier::Free };
        edited.tenant.epoch += 1;
        world.catalog.put(edited, Expect::Epoch(1)).await.expect("written");
        assert_eq!(record(&done.org).await.home(), home, "{name}");
    }
    // What was begun goes on as it was begun.
    let begun = draft(&world.coordinator, "begun", Tier::Free).await;
    let elsewhere = include_str!("../../config/tiers.toml").replace("home = \"neon\"", "home = \"main\"");
    world.coordinator.set_tiers(Tiers::parse(&elsewhere).expect("good"));
    world.coordinator.drive(begun.clone()).await.expect("it ends");
    assert_eq!(record(&begun.org).await.home(), Home::Neon);
}

#[tokio::test]
async fn without_neon_homes_a_new_tenant_gets_the_main_one_and_a_missing_home_is_told() {
    let world = World::new().await;
    let cold = draft(&world.coordinator, "cold", Tier::Free).await;
    world.coordinator.drive(cold.clone()).await.expect("it ends");
    let without = coordinator(&world.catalog, &world.doubles[..4]);
    let poor = draft(&without, "poor", Tier::Free).await;
    without.drive(poor.clone()).await.expect("it ends");
    let told = async |org: &OrgId| {
        let (tenant, answers) = without.verify(org).await.expect("readable");
        (tenant.home(), answers[Protocol::Neon as usize].agrees())
    };
    assert_eq!(world.catalog.get(&poor.org).await.expect("there").tenant.routes.postgres, Some(Home::Main));
    assert_eq!(told(&poor.org).await, (Home::Main, true));
    assert_eq!(told(&cold.org).await, (Home::Neon, false));
}

#[tokio::test]
async fn the_same_tier_or_an_unknown_tenant_begins_nothing() {
    let world = World::new().await;
    let same = Request { to: Tier::Free, ..world.request() };
    assert_eq!(world.coordinator.begin(&same).await, Err(Refused::Same));
    let unknown = Request { org: OrgId::parse("nobody").expect("an id"), ..world.request() };
    assert_eq!(world.coordinator.begin(&unknown).await, Err(Refused::Unknown));
}

#[tokio::test]
async fn a_running_coordinator_begins_what_it_is_asked_and_finishes_what_a_crash_left() {
    let world = World::new().await;
    // A crash right after the intent: nobody drives it.
    let left = world.coordinator.begin(&world.request()).await.expect("it begins");
    let other = coordinator(&world.catalog, &world.doubles);
    let running = other.clone();
    let run = tokio::spawn(async move {
        running.recover().await;
        running.run().await;
    });
    let ended = async {
        while !world.catalog.transition(&left.id).await.is_ok_and(|entry| entry.phase.is_closed()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("recovered");
    world.all_at(Tier::Pro, 2).await;
    let mut news = other.news();
    let back = Request { to: Tier::Starter, ..world.request() };
    let begun = other.submit(back).await.expect("it begins");
    while news.recv().await.is_ok_and(|entry| entry.id != begun.id || !entry.phase.is_closed()) {}
    world.all_at(Tier::Starter, 3).await;
    run.abort();
}
