//! Moves at a real server: nothing of an earlier coordinator's counts once a later one was there, neither its notices nor
//! its batches.

use bson::{Document, doc};
use dynabase::{
    tenant::{Isolation, OrgId},
    upstream::mongo::{Hold, Known, Move, MoveError, Standing, Upstream},
};

use super::support::upstream;
use crate::support::mongo;

fn hold(fence: u64, until: Option<u64>) -> Hold {
    Hold { org: OrgId::parse("held").expect("an id"), fence, until }
}

async fn up(upstream: &Upstream) -> Option<(u64, Option<u64>)> {
    let all = upstream.holds().await.expect("read");
    all.iter().find(|it| it.org == hold(0, None).org).map(|it| (it.fence, it.until))
}

#[tokio::test]
async fn a_notice_of_an_earlier_coordinator_is_not_put_up_and_takes_none_down() {
    let upstream = upstream(mongo::shared().port);
    let put = async |it: &Hold| upstream.put_hold(it).await.expect("asked");
    assert!(put(&hold(5, None)).await && put(&hold(5, None)).await, "it may be repeated");
    assert!(!put(&hold(4, None)).await && !put(&hold(4, Some(9))).await);
    assert_eq!(up(&upstream).await, Some((5, None)));
    assert!(put(&hold(5, Some(3))).await);
    assert!(!put(&hold(5, None)).await, "an earlier word of its own");
    let org = hold(0, None).org;
    upstream.drop_hold(&org, 4).await.expect("asked");
    assert_eq!(up(&upstream).await, Some((5, Some(3))));
    upstream.drop_hold(&org, 5).await.expect("asked");
    assert_eq!(up(&upstream).await, None);
    // It is remembered who was there.
    assert!(!put(&hold(4, None)).await && !put(&hold(5, None)).await);
    assert_eq!(up(&upstream).await, None);
    assert!(put(&hold(6, None)).await);
    upstream.drop_hold(&org, 6).await.expect("asked");
}

#[tokio::test]
async fn a_batch_of_an_earlier_coordinator_is_not_written() {
    let (server, upstream) = (mongo::shared(), upstream(mongo::shared().port));
    let org = OrgId::parse("carried").expect("an id");
    let client = server.client().await;
    let shared = client.database("shared_app").collection::<Document>("carried");
    shared.insert_one(doc! { "_id": "c1", "n": 1, "org_id": org.as_str() }).await.expect("inserted");
    let own = upstream.place(&org, Isolation::Database).physical("app").expect("a name");
    let own = client.database(&own).collection::<Document>("carried");
    assert!(upstream.set_standing(&org, &Standing::default(), 5, 1).await.expect("asked"));
    let carry = async |fence: u64| {
        let it = Move { org: org.clone(), from: Isolation::Filter, to: Isolation::Database, fence };
        upstream.carry_over(&it, &mut Known::default(), &|_| {}).await
    };
    assert!(matches!(carry(4).await, Err(MoveError::Overtaken)));
    assert_eq!(own.count_documents(doc! {}).await.expect("counted"), 0);
    assert_eq!(carry(5).await.expect("its own").changed, 1);
    assert_eq!(own.find_one(doc! {}).await.expect("read"), Some(doc! { "_id": "c1", "n": 1 }));
    // A later one comes: it is over for this one.
    assert!(upstream.set_standing(&org, &Standing::default(), 6, 1).await.expect("asked"));
    shared.update_one(doc! { "_id": "c1" }, doc! { "$set": { "n": 2 } }).await.expect("updated");
    assert!(matches!(carry(5).await, Err(MoveError::Overtaken)));
    assert_eq!(own.find_one(doc! {}).await.expect("read"), Some(doc! { "_id": "c1", "n": 1 }));
    shared.delete_one(doc! { "_id": "c1" }).await.expect("deleted");
}
