//! What the ledger of every kind of catalog has to do.

use super::*;
use crate::tenant::{Home, Tenant};

fn entry(id: &str, from: Tier, to: Tier, epoch: u64) -> Entry {
    Entry {
        id: format!("acme.{}.{id}", epoch + 1),
        deed: Deed::Tier,
        org: org("acme"),
        from,
        to,
        from_epoch: epoch,
        deletion: None,
        from_generation: 1,
        force: false,
        phase: Phase::Preparing,
        participants: Protocol::ALL
            .map(|it| Part {
                database: it.label().into(),
                step: Step::Untouched,
                prior: serde_json::json!({"a": 1}),
                note: String::new(),
                calls: 0,
            })
            .into(),
        reason: None,
        over: Vec::new(),
        kept: None,
        pins: crate::tenant::Routes { mongodb: Some(crate::tenant::Isolation::Filter), ..Default::default() },
        by: "test".into(),
        owner: "one".into(),
        fence: 0,
        lease_until_ms: now_ms() + 60_000,
        deadline_ms: now_ms() + 60_000,
        cancel: false,
        began_ms: now_ms(),
        closed_ms: None,
    }
}

async fn with_acme(catalog: &Catalog) {
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
}

async fn entries(mut stream: mpsc::Receiver<Result<Entry, Fault>>) -> Vec<Entry> {
    let mut all = Vec::new();
    while let Some(entry) = stream.recv().await {
        all.push(entry.expect("readable"));
    }
    all
}

pub async fn a_commit_changes_tier_and_epoch_in_one_write(catalog: Catalog) {
    with_acme(&catalog).await;
    let open = catalog.begin(entry("a", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    assert_eq!(open.fence, 1);
    assert_eq!(catalog.get(&org("acme")).await.expect("there").tenant.tier, Tier::Free);
    assert_eq!(catalog.decide(&open, Decision::Commit).await, Ok(Decision::Commit));
    let record = catalog.get(&org("acme")).await.expect("there");
    assert_eq!((record.tenant.tier, record.tenant.epoch), (Tier::Pro, 2));
    assert_eq!(record.tenant.routes, open.pins, "data stays where it is");
    // It can't be taken back, and asking again changes nothing.
    assert_eq!(catalog.decide(&open, Decision::Abort).await, Ok(Decision::Commit));
    assert_eq!(catalog.decide(&open, Decision::Commit).await, Ok(Decision::Commit));
    assert_eq!(catalog.get(&org("acme")).await.expect("there").tenant.epoch, 2);
    assert_eq!(catalog.transition(&open.id).await.expect("there").phase, Phase::Committed);
    catalog.close(open.clone()).await.expect("closed");
    let closed = catalog.transition(&open.id).await.expect("there");
    assert_eq!((closed.phase, closed.participants), (Phase::Done, open.participants));
    assert_eq!(catalog.open_transition(&org("acme")).await, Err(Fault::Unknown));
    assert_eq!(entries(catalog.open_transitions()).await, []);
    assert_eq!(entries(catalog.transitions(&org("acme"))).await.len(), 1);
}

pub async fn one_transition_at_a_time(catalog: Catalog) {
    with_acme(&catalog).await;
    let many: Vec<_> = (0..10)
        .map(|n| {
            let catalog = catalog.clone();
            tokio::spawn(async move { catalog.begin(entry(&format!("n{n}"), Tier::Free, Tier::Pro, 1)).await })
        })
        .collect();
    let mut begun = Vec::new();
    for one in many {
        match one.await.expect("no panic") {
            Ok(entry) => begun.push(entry),
            Err(LedgerFault::Busy { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(begun.len(), 1);
    assert_eq!(entries(catalog.open_transitions()).await, begun);
    assert_eq!(catalog.decide(&begun[0], Decision::Abort).await, Ok(Decision::Abort));
    catalog.close(begun[0].clone()).await.expect("closed");
    // The next one has a higher fence though the epoch is the same.
    let next = catalog.begin(entry("z", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    assert_eq!(next.fence, 2);
    let old = begun.remove(0);
    assert_eq!(catalog.decide(&old, Decision::Commit).await, Err(LedgerFault::Overtaken));
    assert_eq!(catalog.save(old.clone()).await, Err(LedgerFault::Overtaken));
    assert_eq!(catalog.close(old).await, Err(LedgerFault::Overtaken));
}

pub async fn a_later_coordinator_fences_the_earlier_off(catalog: Catalog) {
    with_acme(&catalog).await;
    let first = catalog.begin(entry("a", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    let claim = |owner: &'static str| {
        let catalog = catalog.clone();
        async move { catalog.claim(&org("acme"), owner, Duration::from_secs(60)).await }
    };
    assert_eq!(claim("two").await, Err(LedgerFault::Overtaken), "its lease holds");
    catalog.save(Entry { lease_until_ms: now_ms() - 1, ..first.clone() }).await.expect("saved");
    let second = claim("two").await.expect("claimed");
    assert_eq!((second.fence, second.owner.as_str(), second.phase), (2, "two", Phase::Preparing));
    assert_eq!(catalog.decide(&first, Decision::Commit).await, Err(LedgerFault::Overtaken));
    assert_eq!(catalog.save(first).await, Err(LedgerFault::Overtaken));
    assert_eq!(catalog.get(&org("acme")).await.expect("there").tenant.tier, Tier::Free);
    assert_eq!(catalog.decide(&second, Decision::Abort).await, Ok(Decision::Abort));
    let third = claim("two").await.expect("its own");
    assert_eq!((third.fence, third.phase), (3, Phase::Aborting));
}

pub async fn a_record_that_somebody_else_changed_is_not_committed(catalog: Catalog) {
    with_acme(&catalog).await;
    let open = catalog.begin(entry("a", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    let mut record = catalog.get(&org("acme")).await.expect("there");
    record.tenant.epoch = 2;
    catalog.put(record, Expect::Epoch(1)).await.expect("written");
    assert_eq!(catalog.decide(&open, Decision::Commit).await, Err(LedgerFault::Outdated));
    assert_eq!(catalog.decide(&open, Decision::Abort).await, Ok(Decision::Abort));
    catalog.close(open).await.expect("closed");
    let stale = entry("b", Tier::Free, Tier::Pro, 1);
    assert_eq!(catalog.begin(stale).await, Err(LedgerFault::Outdated));
    let gone = Entry { org: org("nobody"), id: "nobody.2.a".into(), ..entry("c", Tier::Free, Tier::Pro, 1) };
    assert_eq!(catalog.begin(gone).await, Err(LedgerFault::Catalog(Fault::Unknown)));
}

/// An operator's tool read the record before the transition began and writes it back after: the ledger's word stays.
pub async fn no_other_writer_touches_the_stamp(catalog: Catalog) {
    with_acme(&catalog).await;
    let first = catalog.begin(entry("a", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    catalog.decide(&first, Decision::Abort).await.expect("decided");
    catalog.close(first).await.expect("closed");
    let before = catalog.get(&org("acme")).await.expect("there");
    let open = catalog.begin(entry("b", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    catalog.put(before, Expect::Epoch(1)).await.expect("written");
    assert_eq!(catalog.decide(&open, Decision::Commit).await, Ok(Decision::Commit));
    let next = entry("c", Tier::Pro, Tier::Free, 2);
    assert_eq!(catalog.begin(next).await, Err(LedgerFault::Busy { id: open.id }));
}

pub async fn it_can_be_called_off(catalog: Catalog) {
    with_acme(&catalog).await;
    assert_eq!(catalog.cancel(&org("acme")).await, Err(LedgerFault::Catalog(Fault::Unknown)));
    let open = catalog.begin(entry("a", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    assert_eq!(catalog.save(open.clone()).await, Ok(false));
    catalog.cancel(&org("acme")).await.expect("called off");
    assert_eq!(catalog.save(open).await, Ok(true), "a writer that has not heard of it does not lose it");
}

pub async fn a_tenant_stands_still_until_the_decision_which_moves_its_home(catalog: Catalog) {
    with_acme(&catalog).await;
    let record = async || catalog.get(&org("acme")).await.expect("there");
    let kept = Kept { home: Home::Neon, purge_after: "2030-01-01T00:00:00Z".into() };
    let moving = |id, from, to, epoch| {
        let pins = crate::tenant::Routes { postgres: Some(Home::Main), sql: Some(Home::Main), ..Default::default() };
        Entry { pins, kept: Some(kept.clone()), ..entry(id, from, to, epoch) }
    };
    let open = catalog.begin(moving("a", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    assert!(!record().await.tenant.still);
    catalog.still(&open).await.expect("it is this coordinator's");
    assert!(record().await.tenant.still);
    // Whoever takes it up lets it go on first.
    catalog.save(Entry { lease_until_ms: now_ms() - 1, ..open.clone() }).await.expect("saved");
    let later = catalog.claim(&org("acme"), "two", Duration::from_secs(60)).await.expect("claimed");
    assert!(!record().await.tenant.still);
    assert_eq!(catalog.still(&open).await, Err(LedgerFault::Overtaken));
    catalog.still(&later).await.expect("still");
    assert_eq!(catalog.decide(&later, Decision::Abort).await, Ok(Decision::Abort));
    let after = record().await;
    assert_eq!((after.tenant.still, after.tenant.home(), after.kept()), (false, Home::Main, None));
    assert_eq!(after.tenant.routes.sql, None);
    assert_eq!(catalog.still(&later).await, Err(LedgerFault::Overtaken), "it is decided");
    catalog.close(later).await.expect("closed");

    let open = catalog.begin(moving("b", Tier::Free, Tier::Pro, 1)).await.expect("begun");
    catalog.still(&open).await.expect("still");
    assert_eq!(catalog.decide(&open, Decision::Commit).await, Ok(Decision::Commit));
    let after = record().await;
    assert_eq!((after.tenant.still, after.tenant.tier, after.kept()), (false, Tier::Pro, Some(kept.clone())));
    assert_eq!((after.tenant.routes.postgres, after.tenant.routes.sql), (Some(Home::Main), Some(Home::Main)));
    catalog.close(open).await.expect("closed");
    // An operator's tool that has read the record before does not take that back.
    let old = Record::new(Tenant { epoch: 3, ..after.tenant.clone() });
    catalog.put(old, Expect::Epoch(2)).await.expect("written");
    assert_eq!(record().await.kept(), Some(kept.clone()));
    // It is found by those who look for what is to go, and is none of that any more once it is gone.
    let leaving = async || {
        let mut found = Vec::new();
        let mut stream = catalog.leaving();
        while let Some(record) = stream.recv().await {
            found.extend(record.expect("readable").kept());
        }
        found
    };
    assert_eq!(leaving().await, std::slice::from_ref(&kept));
    let forget =
        Entry { deed: Deed::Forget, kept: Some(kept), pins: Default::default(), ..entry("c", Tier::Pro, Tier::Pro, 3) };
    let open = catalog.begin(forget).await.expect("begun");
    assert_eq!(catalog.decide(&open, Decision::Commit).await, Ok(Decision::Commit));
    assert_eq!((record().await.kept(), leaving().await), (None, vec![]));
    assert_eq!(record().await.tenant.routes.postgres, Some(Home::Main));
}
