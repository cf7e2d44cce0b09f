//! Notices of moves at a real server: none of an earlier coordinator's counts once a later one was there.

use dynabase::{
    tenant::OrgId,
    upstream::mongo::{Hold, Upstream},
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
