use std::sync::atomic::AtomicUsize;

use tokio::sync::mpsc;

use super::*;
use crate::{
    quota::Permit,
    refusal::Limit,
    tenant::{Protocol, Status, Tier, directory::Ask},
};

const PG: Protocol = Protocol::Postgres;
const SHIPPED: &str = include_str!("../../../config/tiers.toml");

fn org(name: &str) -> OrgId {
    OrgId::parse(name).unwrap()
}

fn tenant(name: &str, tier: Tier, epoch: u64) -> Tenant {
    Tenant {
        org: org(name),
        tier,
        status: Status::Active,
        epoch,
        generation: 1,
        databases: Vec::new(),
        users: Vec::new(),
        routes: Default::default(),
        still: false,
    }
}

fn table(resident_max: u64) -> (Arc<Table>, mpsc::Receiver<Ask>) {
    let (directory, asks) = Directory::new();
    (Arc::new(Table::new(directory, Tiers::parse(SHIPPED).unwrap(), resident_max)), asks)
}

/// A table whose catalog answers every question with `answer`; the counter says how many there were.
fn answering(
    resident_max: u64,
    answer: impl Fn(&OrgId) -> Result<Arc<Tenant>, Absent> + Send + 'static,
) -> (Arc<Table>, Arc<AtomicUsize>) {
    let (table, mut asks) = table(resident_max);
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Some(ask) = asks.recv().await {
            counter.fetch_add(1, Ordering::Relaxed);
            if let Ask::Tenant(org, reply) = ask {
                let _ = reply.send(answer(&org));
            }
        }
    });
    (table, asked)
}

fn free(org: &OrgId) -> Result<Arc<Tenant>, Absent> {
    Ok(Arc::new(tenant(org.as_str(), Tier::Free, 1)))
}

/// A session as the gate makes one, less the token.
fn enter(table: &Table, slot: &Arc<Slot>, opened_ms: u64) -> (Permit<Slot>, Arc<Live>) {
    let place = slot.client(PG).unwrap();
    let live = Arc::new(Live::new(table.next_id(), opened_ms, u64::MAX, None, None));
    slot.enter(Arc::clone(&live));
    (place, live)
}

/// The next question, for catalogs that answer by hand.
async fn question(asks: &mut mpsc::Receiver<Ask>) -> tokio::sync::oneshot::Sender<Result<Arc<Tenant>, Absent>> {
    match asks.recv().await {
        Some(Ask::Tenant(_, reply)) => reply,
        _ => panic!("a question about a tenant"),
    }
}

#[tokio::test]
async fn a_tenant_with_a_session_keeps_its_one_slot_when_evicted() {
    let (table, _) = answering(1, free);
    let slot = table.slot(&org("acme")).await.unwrap();
    let (_place, _live) = enter(&table, &slot, 1);
    table.resident.invalidate_all();
    table.resident.run_pending_tasks();
    assert!(table.resident.get(&org("acme")).is_none(), "evicted");
    let again = table.slot(&org("acme")).await.unwrap();
    assert!(Arc::ptr_eq(&slot, &again), "two slots would be twice the limits");
}

#[tokio::test]
async fn residents_without_sessions_are_bounded() {
    let (table, _) = answering(10, free);
    for i in 0..200 {
        table.slot(&org(&format!("org{i}"))).await.unwrap();
    }
    table.resident.run_pending_tasks();
    assert!(table.resident.entry_count() <= 10);
    // The cache frees what it evicted some operations later.
    for _ in 0..10_000 {
        if table.slots().len() <= 10 {
            return;
        }
        table.slot(&org("org0")).await.unwrap();
        table.resident.run_pending_tasks();
    }
    panic!("{} slots held", table.slots().len());
}

#[tokio::test]
async fn a_thousand_clients_arriving_at_once_ask_one_question() {
    let (table, asked) = answering(10, free);
    let arrivals: Vec<_> = (0..2000)
        .map(|_| {
            let table = Arc::clone(&table);
            tokio::spawn(async move { table.slot(&org("acme")).await })
        })
        .collect();
    let first = table.slot(&org("acme")).await.unwrap();
    for arrival in arrivals {
        assert!(Arc::ptr_eq(&first, &arrival.await.unwrap().unwrap()));
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_unknown_organisation_is_remembered_until_it_appears() {
    let (table, asked) = answering(10, |_| Err(Absent::Unknown));
    for _ in 0..5 {
        assert_eq!(table.slot(&org("nobody")).await.unwrap_err(), Refusal::UnknownOrg);
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    table.apply(Arc::new(tenant("nobody", Tier::Free, 1))).unwrap();
    let _ = table.slot(&org("nobody")).await;
    assert_eq!(asked.load(Ordering::Relaxed), 2, "asked again once the catalog spoke of it");
}

#[tokio::test]
async fn a_silent_catalog_is_not_waited_for_for_ever() {
    let (directory, _asks) = Directory::new();
    let mut table = Table::new(directory, Tiers::parse(SHIPPED).unwrap(), 10);
    table.load_within = Duration::from_millis(1);
    assert_eq!(table.slot(&org("acme")).await.unwrap_err(), Refusal::CatalogDown);
}

#[tokio::test]
async fn an_answer_overtaken_by_a_suspension_is_not_used() {
    let (table, mut asks) = table(10);
    let load = {
        let table = Arc::clone(&table);
        tokio::spawn(async move { table.slot(&org("acme")).await })
    };
    let reply = question(&mut asks).await;
    // The same epoch: only a change of tier raises it.
    let suspended = Arc::new(Tenant { status: Status::Suspended, ..tenant("acme", Tier::Free, 1) });
    table.apply(Arc::clone(&suspended)).unwrap();
    let _ = reply.send(free(&org("acme")));
    let _ = question(&mut asks).await.send(Ok(suspended));
    let slot = load.await.unwrap().unwrap();
    assert_eq!(slot.policy().tenant.status, Status::Suspended);
}

#[tokio::test]
async fn an_unknown_overtaken_by_a_creation_is_asked_again() {
    let (table, mut asks) = table(10);
    let load = {
        let table = Arc::clone(&table);
        tokio::spawn(async move { table.slot(&org("acme")).await })
    };
    let reply = question(&mut asks).await;
    table.apply(Arc::new(tenant("acme", Tier::Free, 1))).unwrap();
    let _ = reply.send(Err(Absent::Unknown));
    let _ = question(&mut asks).await.send(free(&org("acme")));
    assert!(load.await.unwrap().is_ok());
}

#[tokio::test]
async fn a_load_that_is_dropped_lets_the_next_one_ask() {
    let (table, mut asks) = table(10);
    let load = |table: &Arc<Table>| {
        let table = Arc::clone(table);
        tokio::spawn(async move { table.slot(&org("acme")).await })
    };
    let first = load(&table);
    let _unanswered = question(&mut asks).await;
    let second = load(&table);
    first.abort();
    let _ = question(&mut asks).await.send(free(&org("acme")));
    assert!(second.await.unwrap().is_ok());
}

#[tokio::test]
async fn a_record_of_another_organisation_is_not_taken_for_the_one_asked_for() {
    let (table, _) = answering(10, |_| free(&org("globex")));
    assert_eq!(table.slot(&org("acme")).await.unwrap_err(), Refusal::Internal);
    assert!(table.resident(&org("globex")).is_none());
}

#[tokio::test]
async fn suspension_reaches_every_session_and_those_on_their_way_in() {
    let (table, _) = answering(10, free);
    let slot = table.slot(&org("acme")).await.unwrap();
    let sessions: Vec<_> = (0..3).map(|i| enter(&table, &slot, i)).collect();
    let place = slot.client(PG).unwrap();
    table.apply(Arc::new(Tenant { status: Status::Suspended, ..tenant("acme", Tier::Free, 1) })).unwrap();
    for (_, live) in &sessions {
        assert_eq!(live.stopped(), Some(Stop::Suspended));
    }
    let late = Arc::new(Live::new(table.next_id(), 9, u64::MAX, None, None));
    slot.enter(Arc::clone(&late));
    assert_eq!(late.stopped(), Some(Stop::Suspended), "passed the gate's first check before the suspension");
    drop(place);
}

/// The gate's own order: check, take a place, enter, check again. Whoever is welcome at the end was told to stop.
#[test]
fn no_session_slips_into_a_tenant_that_is_being_suspended() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (table, slot) = runtime.block_on(async {
        let (table, _) = answering(10, free);
        let slot = table.slot(&org("acme")).await.unwrap();
        (table, slot)
    });
    for epoch in 1..500 {
        let record = |status| Arc::new(Tenant { status, ..tenant("acme", Tier::Free, epoch) });
        table.apply(record(Status::Active)).unwrap();
        let start = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            let admissions = [(); 2].map(|()| {
                scope.spawn(|| {
                    start.wait();
                    let mut welcome = Vec::new();
                    for i in 0..8 {
                        if slot.policy().tenant.status != Status::Active {
                            break;
                        }
                        let (place, live) = enter(&table, &slot, i);
                        let admitted = slot.policy().tenant.status == Status::Active;
                        if admitted {
                            welcome.push((place, live));
                        } else {
                            slot.leave(live.id);
                        }
                    }
                    welcome
                })
            });
            start.wait();
            table.apply(record(Status::Suspended)).unwrap();
            for (_, live) in admissions.into_iter().flat_map(|admission| admission.join().unwrap()) {
                assert_eq!(live.stopped(), Some(Stop::Suspended));
                slot.leave(live.id);
            }
        });
        assert_eq!((slot.clients(PG), slot.sessions().len()), (0, 0));
    }
}

#[tokio::test]
async fn a_smaller_cap_sheds_idle_sessions_first_then_the_oldest() {
    let (table, _) = answering(10, |org| Ok(Arc::new(tenant(org.as_str(), Tier::Starter, 1))));
    let slot = table.slot(&org("acme")).await.unwrap();
    let sessions: Vec<_> = (0..54).map(|i| enter(&table, &slot, i)).collect();
    sessions.iter().for_each(|(_, live)| live.set_idle(live.opened_ms >= 52));
    let leaving = |sessions: &[(Permit<Slot>, Arc<Live>)]| -> Vec<u64> {
        sessions.iter().filter(|(_, live)| live.stopped().is_some()).map(|(_, live)| live.opened_ms).collect()
    };
    table.apply(Arc::new(tenant("acme", Tier::Free, 2))).unwrap();
    assert_eq!(leaving(&sessions), [0, 1, 52, 53], "50 may stay: the two idle ones go, then the two oldest");
    // Others are idle by now, but four are leaving already.
    sessions.iter().for_each(|(_, live)| live.set_idle(live.opened_ms < 20));
    table.apply(Arc::new(tenant("acme", Tier::Free, 3))).unwrap();
    assert_eq!(leaving(&sessions), [0, 1, 52, 53], "a repeated change must not shed more");
    assert_eq!(slot.client(PG).unwrap_err().limit, Limit::ClientSockets);
}

#[tokio::test]
async fn a_session_that_took_its_place_under_a_larger_cap_is_shed_on_entering() {
    let (table, _) = answering(10, |org| Ok(Arc::new(tenant(org.as_str(), Tier::Starter, 1))));
    let slot = table.slot(&org("acme")).await.unwrap();
    let places: Vec<_> = (0..51).map(|_| slot.client(PG).unwrap()).collect();
    table.apply(Arc::new(tenant("acme", Tier::Free, 2))).unwrap();
    let late: Vec<_> = (0..51).map(|i| Arc::new(Live::new(table.next_id(), i, u64::MAX, None, None))).collect();
    late.iter().for_each(|live| slot.enter(Arc::clone(live)));
    assert_eq!(late.iter().filter(|live| live.stopped() == Some(Stop::Shed)).count(), 1);
    drop(places);
}

#[tokio::test]
async fn a_record_of_an_older_epoch_is_refused() {
    let (table, _) = answering(10, |org| Ok(Arc::new(tenant(org.as_str(), Tier::Pro, 5))));
    let slot = table.slot(&org("acme")).await.unwrap();
    let stale = table.apply(Arc::new(tenant("acme", Tier::Free, 4)));
    assert_eq!(stale, Err(StaleEpoch { present: 5, offered: 4 }));
    assert_eq!(slot.policy().tenant.tier, Tier::Pro);
}

#[tokio::test]
async fn a_removed_tenant_ends_and_its_successor_starts_at_its_own_epoch() {
    let (table, _) = answering(10, |org| Ok(Arc::new(tenant(org.as_str(), Tier::Pro, 5))));
    let slot = table.slot(&org("acme")).await.unwrap();
    let (_place, live) = enter(&table, &slot, 1);
    table.remove(&org("acme"));
    assert_eq!(live.stopped(), Some(Stop::Suspended));
    assert_eq!(table.slot(&org("acme")).await.unwrap().policy().tenant.status, Status::Deleting);
    table.set_tiers(Tiers::parse(SHIPPED).unwrap());
    table.apply(Arc::new(tenant("acme", Tier::Free, 1))).unwrap();
    assert_eq!(table.slot(&org("acme")).await.unwrap().policy().tenant.status, Status::Active);
}

#[tokio::test]
async fn reloaded_tiers_reach_live_sessions_and_later_tenants() {
    let (table, _) = answering(10, free);
    let slot = table.slot(&org("acme")).await.unwrap();
    let sessions: Vec<_> = (0..50).map(|i| enter(&table, &slot, i)).collect();
    let text = SHIPPED.replace("client_sockets = 50\n", "client_sockets = 48\n").replace("burst = 100,", "burst = 1,");
    table.set_tiers(Tiers::parse(&text).unwrap());
    assert_eq!(sessions.iter().filter(|(_, live)| live.stopped() == Some(Stop::Shed)).count(), 2);
    let later = table.slot(&org("globex")).await.unwrap();
    for slot in [&slot, &later] {
        let now_ns = clock::now_ns();
        slot.admit(PG, now_ns, 1).unwrap();
        let over = slot.admit(PG, now_ns, 1).unwrap_err();
        assert_eq!((over.limit, over.max), (Limit::Rate, 50));
        assert_eq!(over.retry_after, Some(Duration::from_millis(20)));
    }
}

#[tokio::test]
async fn an_upgrade_is_not_outlasted_by_old_debt() {
    let text = SHIPPED.replace("per_second = 50, burst = 100", "per_second = 1, burst = 100");
    let (table, _) = answering(10, free);
    table.set_tiers(Tiers::parse(&text).unwrap());
    let slot = table.slot(&org("acme")).await.unwrap();
    let now_ns = clock::now_ns();
    slot.admit(PG, now_ns, 100).unwrap();
    assert_eq!(slot.admit(PG, now_ns, 1).unwrap_err().retry_after, Some(Duration::from_secs(1)));
    table.apply(Arc::new(tenant("acme", Tier::Enterprise, 2))).unwrap();
    slot.admit(PG, now_ns + 3_000_000_000, 1).unwrap();
}

#[tokio::test]
async fn a_revoked_key_ends_its_own_sessions_only() {
    let (table, _) = answering(10, free);
    let slot = table.slot(&org("acme")).await.unwrap();
    let keyed = |byte: u8| {
        let live = Arc::new(Live::new(table.next_id(), 1, u64::MAX, Some([byte; 32]), None));
        slot.enter(Arc::clone(&live));
        live
    };
    let (revoked, other) = (keyed(1), keyed(2));
    table.revoke_key(&[1; 32]);
    assert_eq!((revoked.stopped(), other.stopped()), (Some(Stop::Revoked), None));
}

#[tokio::test]
async fn the_ticker_passes_on_expiries_and_deadlines() {
    let (table, _) = answering(10, free);
    let slot = table.slot(&org("acme")).await.unwrap();
    let expiring = Arc::new(Live::new(1, 1, clock::now_ms(), None, None));
    let waiting = Arc::new(Live::new(2, 1, u64::MAX, None, None));
    waiting.set_deadline(clock::now_ms());
    for live in [&expiring, &waiting] {
        slot.enter(Arc::clone(live));
    }
    let heard = std::future::poll_fn(|cx| {
        waiting.register(cx);
        if waiting.signalled() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    });
    tokio::select! {
        () = table.run_ticker() => unreachable!("it runs until dropped"),
        () = heard => {}
    }
    assert!(waiting.take_due() && !waiting.signalled());
    table.slots().iter().for_each(|slot| slot.tick(clock::now_ms()));
    assert_eq!(expiring.stopped(), Some(Stop::Expired));
}

#[tokio::test]
async fn who_shows_no_credential_gets_a_part_of_the_client_sockets() {
    const CONVEX: Protocol = Protocol::Convex;
    let (table, _) = answering(10, free);
    let slot = table.slot(&org("acme")).await.unwrap();
    let guests: Vec<_> = (0..12).map(|_| slot.guest(CONVEX).unwrap()).collect();
    let over = slot.guest(CONVEX).unwrap_err();
    assert_eq!((over.limit, over.max, over.in_use), (Limit::ClientSockets, 12, 12), "half of 25");
    // They count among all, and the tenant's own have all that is left.
    let own: Vec<_> = (12..25).map(|_| slot.client(CONVEX).unwrap()).collect();
    let over = slot.client(CONVEX).unwrap_err();
    assert_eq!((over.limit, over.max, over.in_use), (Limit::ClientSockets, 25, 25));
    drop(guests);
    assert_eq!(slot.clients(CONVEX), 13, "both places of each are given back");
    // Where the tenant's own have them all, a guest finds none and holds none.
    let more: Vec<_> = (13..25).map(|_| slot.client(CONVEX).unwrap()).collect();
    for _ in 0..20 {
        assert_eq!(slot.guest(CONVEX).unwrap_err().max, 25);
    }
    drop((own, more));
    assert_eq!((0..12).map(|_| slot.guest(CONVEX)).filter(Result::is_ok).count(), 12);
}
