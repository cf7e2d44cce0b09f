//! What every kind of catalog has to do. Each function gets an empty catalog.

use std::time::SystemTime;

use serde_json::json;

use super::*;

/// Enforcement has to be well below a second; in practice it takes some 15 ms.
pub const ENFORCED_WITHIN: Duration = Duration::from_millis(500);

pub async fn documents_come_back_as_they_went(catalog: Catalog) {
    let mut record = Record::new(tenant("acme"));
    record.tenant.routes.postgres = Some(crate::tenant::Home::Neon);
    record.more.insert("extra".into(), json!({"postgres": ["a", {"b": 1.5}]}));
    assert_eq!(catalog.get(&org("acme")).await, Err(Fault::Unknown));
    catalog.put(record.clone(), Expect::Absent).await.expect("kept");
    assert_eq!(catalog.get(&org("acme")).await, Ok(record));
    assert_eq!(catalog.get(&org("acm")).await, Err(Fault::Unknown));
}

pub async fn an_update_needs_the_epoch_that_is_there(catalog: Catalog) {
    let at = |epoch: u64, tier| Record::new(Tenant { epoch, tier, ..tenant("acme") });
    assert_eq!(catalog.put(at(2, Tier::Pro), Expect::Epoch(1)).await, Err(Fault::Unknown));
    catalog.put(at(1, Tier::Free), Expect::Absent).await.expect("kept");
    assert_eq!(catalog.put(at(1, Tier::Pro), Expect::Absent).await, Err(Fault::Exists));
    catalog.put(at(2, Tier::Pro), Expect::Epoch(1)).await.expect("kept");
    assert_eq!(catalog.put(at(2, Tier::Starter), Expect::Epoch(1)).await, Err(Fault::Stale { present: 2 }));
    assert_eq!(catalog.put(at(1, Tier::Free), Expect::Epoch(2)).await, Err(Fault::Stale { present: 2 }));
    assert_eq!(catalog.get(&org("acme")).await.map(|record| record.tenant.tier), Ok(Tier::Pro));
}

/// Of writers that saw the same document exactly one wins.
pub async fn one_of_many_writers_wins(catalog: Catalog) {
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    let writers: Vec<_> = (0..20)
        .map(|_| {
            let (catalog, next) = (catalog.clone(), Tenant { epoch: 2, ..tenant("acme") });
            tokio::spawn(async move { catalog.put(Record::new(next), Expect::Epoch(1)).await })
        })
        .collect();
    let mut won = 0;
    for writer in writers {
        match writer.await.expect("no panic") {
            Ok(()) => won += 1,
            other => assert_eq!(other, Err(Fault::Stale { present: 2 })),
        }
    }
    assert_eq!(won, 1);
}

pub async fn unknown_fields_and_the_first_date_survive_an_update(catalog: Catalog) {
    let mut first = Record::new(tenant("acme"));
    first.created_at = "2020-01-02T03:04:05Z".into();
    first.more.insert("extra".into(), json!({"redis": "r1"}));
    first.more.insert("note".into(), json!("old"));
    catalog.put(first, Expect::Absent).await.expect("kept");
    let mut second = Record::new(Tenant { epoch: 2, ..tenant("acme") });
    second.more.insert("note".into(), json!("new"));
    catalog.put(second, Expect::Epoch(1)).await.expect("kept");
    let found = catalog.get(&org("acme")).await.expect("there");
    assert_eq!((found.created_at.as_str(), found.tenant.epoch), ("2020-01-02T03:04:05Z", 2));
    assert_eq!(json!(found.more), json!({"extra": {"redis": "r1"}, "note": "new"}));
}

pub async fn the_list_streams_every_document(catalog: Catalog) {
    for n in 0..200 {
        catalog.put(Record::new(tenant(&format!("org-{n}"))), Expect::Absent).await.expect("kept");
    }
    catalog.delete(&org("org-7")).await.expect("deleted");
    assert_eq!(catalog.delete(&org("org-7")).await, Err(Fault::Unknown));
    let mut list = catalog.list();
    let mut found = std::collections::BTreeSet::new();
    while let Some(record) = list.recv().await {
        found.insert(record.expect("undamaged").tenant.org);
    }
    assert_eq!(found.len(), 199);
    assert!(!found.contains(&org("org-7")));
    // Leaving early ends the stream; nothing waits for us.
    let mut list = catalog.list();
    assert!(list.recv().await.is_some());
}

pub async fn service_keys_are_kept_listed_and_revoked(catalog: Catalog) {
    let soon = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
    let ends = KeyRecord::new(ServiceKey { expires_at: Some(soon), ..key(1, "acme") });
    catalog.create_key(ends.clone()).await.expect("kept");
    catalog.create_key(KeyRecord::new(key(2, "acme"))).await.expect("kept");
    catalog.create_key(KeyRecord::new(key(3, "globex"))).await.expect("kept");
    assert_eq!(catalog.create_key(KeyRecord::new(key(3, "acme"))).await, Err(Fault::Exists));
    let all = |mut list: mpsc::Receiver<Result<KeyRecord, Fault>>| async move {
        let mut found = Vec::new();
        while let Some(record) = list.recv().await {
            found.push(record.expect("undamaged"));
        }
        found.sort_by_key(|record| record.key.hash);
        found
    };
    let acme = all(catalog.list_keys(Some(&org("acme")))).await;
    assert_eq!(acme.iter().map(|record| record.key.hash[0]).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(acme[0], ends);
    assert_eq!(all(catalog.list_keys(None)).await.len(), 3);
    catalog.revoke_key(&[1; 32]).await.expect("revoked");
    assert_eq!(catalog.revoke_key(&[1; 32]).await, Err(Fault::Unknown));
    assert_eq!(all(catalog.list_keys(Some(&org("acme")))).await.len(), 1);
}

pub async fn the_feeder_answers(catalog: Catalog) {
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    catalog.create_key(KeyRecord::new(key(1, "acme"))).await.expect("kept");
    let fed = Fed::follow(catalog).await;
    assert_eq!(fed.directory.tenant(&org("acme")).await.as_deref(), Ok(&tenant("acme")));
    assert_eq!(fed.directory.tenant(&org("globex")).await, Err(Absent::Unknown));
    assert_eq!(fed.directory.key([1; 32]).await.as_deref(), Ok(&key(1, "acme")));
    assert_eq!(fed.directory.key([2; 32]).await, Err(Absent::Unknown));
    until("the source is known good", || fed.catalog.age() < Duration::from_secs(1)).await;
}

pub async fn a_thousand_questions_at_once_are_answered(catalog: Catalog) {
    for n in 0..50 {
        catalog.put(Record::new(tenant(&format!("org-{n}"))), Expect::Absent).await.expect("kept");
    }
    let fed = Fed::follow(catalog).await;
    let asking: Vec<_> = (0..1000)
        .map(|n| {
            let directory = fed.directory.clone();
            tokio::spawn(async move { directory.tenant(&org(&format!("org-{}", n % 60))).await })
        })
        .collect();
    for (n, answer) in asking.into_iter().enumerate() {
        let answer = answer.await.expect("no panic");
        assert_eq!(answer.is_ok(), n % 60 < 50, "{n}: {answer:?}");
    }
}

pub async fn a_change_of_tier_is_enforced_on_live_slots(catalog: Catalog) {
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    let fed = Fed::follow(catalog).await;
    let slot = fed.slot("acme").await;
    assert_eq!(slot.policy().limits.connections(Protocol::Postgres), 5);
    for epoch in 1..10 {
        let tier = if epoch % 2 == 0 { Tier::Free } else { Tier::Pro };
        let next = Record::new(Tenant { tier, epoch: epoch + 1, ..tenant("acme") });
        fed.catalog.put(next, Expect::Epoch(epoch)).await.expect("kept");
        let took = until("the new tier", || slot.policy().tenant.epoch == epoch + 1).await;
        assert_eq!(slot.policy().tenant.tier, tier);
        assert!(took < ENFORCED_WITHIN, "{took:?}");
    }
}

pub async fn suspension_and_deletion_stop_live_sessions(catalog: Catalog) {
    for id in ["acme", "globex", "initech"] {
        catalog.put(Record::new(tenant(id)), Expect::Absent).await.expect("kept");
    }
    let fed = Fed::follow(catalog).await;
    let (acme, globex, initech) = (fed.slot("acme").await, fed.slot("globex").await, fed.slot("initech").await);
    let sessions = [session(&acme, 1, None), session(&globex, 2, None), session(&initech, 3, None)];
    let suspended = Record::new(Tenant { status: Status::Suspended, ..tenant("acme") });
    fed.catalog.put(suspended, Expect::Epoch(1)).await.expect("kept");
    fed.catalog.delete(&org("globex")).await.expect("deleted");
    let stopped = || sessions.each_ref().map(|live| live.stopped());
    let took = until("both to stop", || stopped()[0].is_some() && stopped()[1].is_some()).await;
    assert!(took < ENFORCED_WITHIN, "{took:?}");
    assert_eq!(stopped(), [Some(Stop::Suspended), Some(Stop::Suspended), None]);
    drop((globex, sessions));
    assert_eq!(fed.directory.tenant(&org("globex")).await, Err(Absent::Unknown));
    // The same name can come back.
    fed.catalog.put(Record::new(tenant("globex")), Expect::Absent).await.expect("kept");
    let active = |slot: Arc<Slot>| slot.policy().tenant.status == Status::Active;
    until("globex to be served", || fed.table.resident(&org("globex")).is_none_or(active)).await;
    assert!(active(fed.slot("globex").await));
}

pub async fn a_revoked_key_is_forgotten_and_its_sessions_stop(catalog: Catalog) {
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    catalog.create_key(KeyRecord::new(key(1, "acme"))).await.expect("kept");
    catalog.create_key(KeyRecord::new(key(2, "acme"))).await.expect("kept");
    let mut fed = Fed::follow(catalog).await;
    let slot = fed.slot("acme").await;
    let (one, two) = (session(&slot, 1, Some([1; 32])), session(&slot, 2, Some([2; 32])));
    fed.directory.key([1; 32]).await.expect("known");
    fed.catalog.revoke_key(&[1; 32]).await.expect("revoked");
    let took = until("the session to stop", || one.stopped().is_some()).await;
    assert!(took < ENFORCED_WITHIN, "{took:?}");
    assert_eq!((one.stopped(), two.stopped()), (Some(Stop::Revoked), None));
    fed.forgets([1; 32]).await;
    assert_eq!(fed.directory.key([1; 32]).await, Err(Absent::Unknown));
    // A new key is forgotten, too: somebody may have tried it too early.
    fed.catalog.create_key(KeyRecord::new(key(3, "acme"))).await.expect("kept");
    fed.forgets([3; 32]).await;
}

pub async fn what_could_not_be_read_again_is_not_written(catalog: Catalog) {
    let bad_name = Record::new(Tenant { databases: vec!["x".repeat(64)], ..tenant("acme") });
    let mut twice = Record::new(tenant("acme"));
    twice.more.insert("tier".into(), json!("ENTERPRISE"));
    for record in [bad_name, twice] {
        assert!(matches!(catalog.put(record, Expect::Absent).await, Err(Fault::Damaged(_))));
    }
    let nobody = KeyRecord::new(ServiceKey { user: String::new(), ..key(1, "acme") });
    assert!(matches!(catalog.create_key(nobody).await, Err(Fault::Damaged(_))));
    assert_eq!(catalog.get(&org("acme")).await, Err(Fault::Unknown));
    assert!(catalog.list_keys(None).recv().await.is_none());
}

/// A look-up is answered, and before the answer reaches the table the document changes. To be run on one thread.
pub async fn a_change_that_overtakes_a_look_up_is_enforced(catalog: Catalog) {
    catalog.put(Record::new(tenant("acme")), Expect::Absent).await.expect("kept");
    let mut fed = Fed::follow(catalog).await;
    let (acme, table) = (org("acme"), Arc::clone(&fed.table));
    let mut look_up = std::pin::pin!(table.slot(&acme));
    assert!(futures_util::poll!(&mut look_up).is_pending());
    // Questions are answered in order: after this one, the first has its answer, which nobody has taken yet.
    assert_eq!(fed.directory.tenant(&org("nobody")).await, Err(Absent::Unknown));
    let next = Record::new(Tenant { status: Status::Suspended, ..tenant("acme") });
    fed.catalog.put(next, Expect::Epoch(1)).await.expect("kept");
    // So are changes: after this one, the suspension was seen.
    fed.catalog.create_key(KeyRecord::new(key(3, "acme"))).await.expect("kept");
    fed.forgets([3; 32]).await;
    let slot = look_up.await.expect("known");
    let took = until("the suspension", || slot.policy().tenant.status == Status::Suspended).await;
    assert!(took < ENFORCED_WITHIN, "{took:?}");
}
