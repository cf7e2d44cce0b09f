//! convex from crates.io before the proxy, as a developer meets it: `dynabase dev`, its strings, its limits. One start
//! for all cases; the npm and PyPI clients have their own in tests/drivers.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use convex::{ConvexClient, FunctionResult, QuerySubscription, Value};
use futures_util::StreamExt;
use serde_json::{Value as Json, json};

use crate::{
    dev, neon,
    support::{self, PATIENCE},
};

fn args<const N: usize>(pairs: [(&str, Value); N]) -> BTreeMap<String, Value> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn message(channel: &str, body: &str) -> BTreeMap<String, Value> {
    args([("channel", channel.into()), ("body", body.into())])
}

/// The data of an error that carries some.
fn data(result: &FunctionResult) -> Option<Json> {
    match result {
        FunctionResult::ConvexError(error) => Some(error.data.clone().into()),
        _ => None,
    }
}

fn bodies(result: &FunctionResult) -> Option<Vec<String>> {
    let FunctionResult::Value(Value::Array(all)) = result else { return None };
    let body = |it: &Value| match it {
        Value::Object(fields) => match fields.get("body") {
            Some(Value::String(body)) => body.clone(),
            _ => String::new(),
        },
        _ => String::new(),
    };
    Some(all.iter().map(body).collect())
}

struct Place {
    url: String,
    ready: Json,
}

impl Place {
    fn token(&self, org: &str) -> String {
        let tenants = self.ready["tenants"].as_array().expect("tenants");
        let tenant = tenants.iter().find(|tenant| tenant["org_id"] == org).expect("a demo tenant");
        tenant["token"].as_str().expect("a token").to_owned()
    }

    async fn client(&self, org: &str) -> ConvexClient {
        let mut client = ConvexClient::new(&self.url).await.expect("it connects");
        client.set_auth(Some(self.token(org))).await;
        client
    }

    /// What an operator does by hand, straight on the catalog.
    fn edit(&self, org: &str, changes: Json) {
        let url = self.ready["upstreams"]["mongodb"].as_str().expect("a URL");
        let set = bson::serialize_to_document(&changes).expect("a document");
        support::block_on(async {
            let client = mongodb::Client::with_uri_str(url).await.expect("a good URL");
            let orgs = client.database("dynabase").collection::<bson::Document>("orgs");
            let change = bson::doc! {"$set": set, "$inc": {"epoch": 1_i64}};
            let done = orgs.update_one(bson::doc! {"_id": org}, change).await.expect("written");
            assert_eq!(done.matched_count, 1);
        });
    }
}

/// The next result of a subscription that `wanted` takes.
async fn until<T>(what: &str, sub: &mut QuerySubscription, wanted: impl Fn(&FunctionResult) -> Option<T>) -> T {
    let waiting = async {
        loop {
            let result = sub.next().await.expect("it goes on");
            if let Some(found) = wanted(&result) {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

fn counted(result: &FunctionResult) -> Option<f64> {
    match result {
        FunctionResult::Value(Value::Object(fields)) => match fields.get("count") {
            Some(Value::Float64(count)) => Some(*count),
            _ => None,
        },
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rust_client_meets_each_limit_call_by_call() {
    let folder = tempfile::tempdir().expect("a folder");
    let (dev, ready) = dev::start(folder.path(), dev::offset());
    let Some(url) = ready["tenants"][0]["urls"]["convex"].as_str().map(str::to_owned) else {
        panic!("no Convex: is Node installed? `make tools` does it")
    };
    let place = Place { url, ready };
    organisations_are_apart(&place).await;
    subscriptions_are_refused_one_by_one(&place).await;
    calls_over_the_rate_are_refused_one_by_one(&place).await;
    writes_under_way_are_counted(&place).await;
    a_large_payload_is_refused_alone(&place).await;
    a_cut_socket_comes_back_with_its_subscriptions(&place).await;
    sockets_over_the_cap_are_answered_and_come_in_later(&place).await;
    without_a_token_everything_fails(&place).await;
    a_suspension_is_told_and_ends(&place).await;
    drop(dev);
}

async fn organisations_are_apart(place: &Place) {
    // initech and umbrella share a deployment; acme and globex have their own.
    for (one, other) in [("initech", "umbrella"), ("acme", "globex"), ("globex", "initech")] {
        let channel = format!("{one}-{other}");
        let (mut a, mut b) = (place.client(one).await, place.client(other).await);
        let list = || args([("channel", channel.as_str().into())]);
        let mut seen_a = a.subscribe("messages:list", list()).await.expect("subscribed");
        let mut seen_b = b.subscribe("messages:list", list()).await.expect("subscribed");
        until("nothing yet", &mut seen_a, bodies).await;
        until("nothing yet", &mut seen_b, bodies).await;
        let mut sent = message(&channel, "secret");
        if one == "initech" {
            sent.insert("orgId".into(), other.into());
        }
        assert!(matches!(a.mutation("messages:send", sent).await, Ok(FunctionResult::Value(_))));
        until("its own", &mut seen_a, |it| bodies(it).filter(|all| all == &["secret"])).await;
        // A write of its own comes after whatever the other's could have caused.
        b.mutation("messages:send", message(&channel, "mine")).await.expect("sent");
        let all = until("its own", &mut seen_b, |it| bodies(it).filter(|all| !all.is_empty())).await;
        assert_eq!(all, ["mine"], "{other} sees what {one} wrote");
    }
}

async fn subscriptions_are_refused_one_by_one(place: &Place) {
    let mut client = place.client("acme").await;
    let big = |n: u32| args([("channel", "s".into()), ("bytes", f64::from(n).into())]);
    let mut all = Vec::new();
    for n in 0..50 {
        let mut sub = client.subscribe("messages:big", big(n)).await.expect("subscribed");
        until("a result", &mut sub, counted).await;
        all.push(sub);
    }
    let mut more = client.subscribe("messages:big", big(1000)).await.expect("subscribed");
    let refused = until("the refusal", &mut more, data).await;
    assert_eq!((&refused["code"], &refused["limit"]), (&json!("quota_exceeded"), &json!("subscriptions")));
    client.mutation("messages:send", message("s", "x")).await.expect("the socket lives");
    for sub in &mut all {
        until("all others are live", sub, |it| counted(it).filter(|count| *count == 1.0)).await;
    }
    // A new tier is felt on this very socket.
    place.edit("acme", json!({"tier": "PRO"}));
    let deadline = Instant::now() + PATIENCE;
    for n in 2000.. {
        let mut sub = client.subscribe("messages:big", big(n)).await.expect("subscribed");
        if until("an answer", &mut sub, |it| Some(counted(it).is_some())).await {
            break;
        }
        assert!(Instant::now() < deadline, "the new tier is not felt");
    }
    place.edit("acme", json!({"tier": "FREE"}));
    let result = until_mutation(&mut client).await;
    assert!(matches!(result, FunctionResult::Value(_)), "what is subscribed stays, calls go on: {result:?}");
}

/// A mutation that is let in, whatever was used up before.
async fn until_mutation(client: &mut ConvexClient) -> FunctionResult {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let result = client.mutation("messages:send", message("m", "x")).await.expect("answered");
        if matches!(result, FunctionResult::Value(_)) || Instant::now() > deadline {
            return result;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn calls_over_the_rate_are_refused_one_by_one(place: &Place) {
    let mut client = place.client("acme").await;
    let mut seen = client.subscribe("messages:list", args([("channel", "rate".into())])).await.expect("subscribed");
    let (mut good, mut refused) = (0, Vec::new());
    for _ in 0..400 {
        match client.mutation("messages:send", message("rate", "x")).await.expect("answered") {
            FunctionResult::Value(_) => good += 1,
            other => refused.push(data(&other).unwrap_or_else(|| panic!("{other:?}"))),
        }
        if refused.len() == 5 {
            break;
        }
    }
    assert_eq!(refused.len(), 5, "{good} were let in");
    for it in &refused {
        assert_eq!((&it["code"], &it["limit"], &it["max"]), (&json!("quota_exceeded"), &json!("rate"), &json!(300.0)));
    }
    let mut actions = Vec::new();
    for _ in 0..20 {
        actions.push(client.action("messages:slow", args([("ms", 1.0.into())])).await.expect("answered"));
    }
    assert!(actions.iter().filter_map(data).any(|it| it["limit"] == "rate"), "{actions:?}");
    assert!(matches!(until_mutation(&mut client).await, FunctionResult::Value(_)), "it goes on");
    if good > 0 {
        until("what was let in", &mut seen, |it| bodies(it).filter(|all| all.len() == good)).await;
    }
}

async fn writes_under_way_are_counted(place: &Place) {
    let mut client = place.client("globex").await;
    let asked = (0..20).map(|_| {
        let mut client = client.clone();
        tokio::spawn(async move { client.action("messages:slow", args([("ms", 4000.0.into())])).await })
    });
    let (mut done, mut refused) = (0, Vec::new());
    for task in asked.collect::<Vec<_>>() {
        let result = task.await.expect("no panic").expect("answered");
        match data(&result) {
            Some(data) => refused.push(data),
            None => done += u32::from(matches!(result, FunctionResult::Value(_))),
        }
    }
    assert_eq!((done, refused.len()), (16, 4));
    assert!(refused.iter().all(|it| it["limit"] == "in_flight" && it["max"] == json!(16.0)), "{refused:?}");
    let result = client.action("messages:slow", args([("ms", 1.0.into())])).await.expect("answered");
    assert!(matches!(result, FunctionResult::Value(_)), "{result:?}");
}

async fn a_large_payload_is_refused_alone(place: &Place) {
    let mut client = place.client("globex").await;
    let large = client.mutation("messages:send", message("x", &"y".repeat(4 << 20))).await.expect("answered");
    assert_eq!(data(&large).map(|it| it["code"].clone()), Some(json!("payload_too_large")), "{large:?}");
    let small = client.mutation("messages:send", message("x", "small")).await.expect("answered");
    assert!(matches!(small, FunctionResult::Value(_)), "{small:?}");
}

async fn a_cut_socket_comes_back_with_its_subscriptions(place: &Place) {
    let mut client = place.client("globex").await;
    let mut seen = client.subscribe("messages:list", args([("channel", "cut".into())])).await.expect("subscribed");
    until("nothing yet", &mut seen, bodies).await;
    let text = |value: &Json| value.as_str().expect("text").to_owned();
    let (url, key) = (text(&place.ready["convex"]["deployments"]["globex"]), text(&place.ready["convex"]["admin_key"]));
    let port = url.rsplit_once(':').and_then(|it| it.1.parse().ok()).expect("a port");
    for count in 1..=2 {
        let head = format!("POST /double/drop HTTP/1.1\r\nAuthorization: Convex {key}");
        let cut = tokio::task::spawn_blocking(move || neon::ask(port, &head, "")).await.expect("asked");
        assert_eq!(cut.0, 200);
        let sent = client.mutation("messages:send", message("cut", &count.to_string())).await.expect("answered");
        assert!(matches!(sent, FunctionResult::Value(_)), "{sent:?}");
        until("it is live again", &mut seen, |it| bodies(it).filter(|all| all.len() >= count)).await;
    }
}

async fn sockets_over_the_cap_are_answered_and_come_in_later(place: &Place) {
    // Nobody else's are open: each of the clients before has gone.
    let mut crowd = Vec::new();
    for _ in 0..25 {
        let mut client = place.client("acme").await;
        let mut seen = client.subscribe("messages:whoami", BTreeMap::new()).await.expect("subscribed");
        // Refused for its rate or not, it is in.
        until("an answer", &mut seen, |it| (data(it).is_none_or(|it| it["limit"] == "rate")).then_some(())).await;
        crowd.push((client, seen));
    }
    let mut late = place.client("acme").await;
    let mut seen = late.subscribe("messages:whoami", BTreeMap::new()).await.expect("subscribed");
    let refused = until("the refusal", &mut seen, data).await;
    assert_eq!((&refused["limit"], &refused["max"]), (&json!("client_sockets"), &json!(25.0)));
    let call = late.mutation("messages:send", message("late", "x")).await.expect("answered");
    assert_eq!(data(&call).map(|it| it["limit"].clone()), Some(json!("client_sockets")));
    crowd.truncate(20);
    until("it comes in by itself", &mut seen, |it| matches!(it, FunctionResult::Value(_)).then_some(())).await;
}

async fn without_a_token_everything_fails(place: &Place) {
    let mut client = ConvexClient::new(&place.url).await.expect("it connects");
    let result = client.query("messages:whoami", BTreeMap::new()).await.expect("answered");
    assert_eq!(data(&result).map(|it| it["code"].clone()), Some(json!("unauthenticated")), "{result:?}");
    let result = client.mutation("messages:send", message("x", "y")).await.expect("answered");
    assert_eq!(data(&result).map(|it| it["code"].clone()), Some(json!("unauthenticated")), "{result:?}");
    client.set_auth(Some(place.token("umbrella"))).await;
    let mut seen = client.subscribe("messages:whoami", BTreeMap::new()).await.expect("subscribed");
    until("it comes in", &mut seen, |it| matches!(it, FunctionResult::Value(_)).then_some(())).await;
}

async fn a_suspension_is_told_and_ends(place: &Place) {
    let mut client = place.client("globex").await;
    let mut seen = client.subscribe("messages:list", args([("channel", "quiet".into())])).await.expect("subscribed");
    until("nothing yet", &mut seen, bodies).await;
    place.edit("globex", json!({"status": "suspended"}));
    let told = until("the refusal", &mut seen, data).await;
    assert_eq!(told["code"], "suspended");
    place.edit("globex", json!({"status": "active"}));
    until("it lives again", &mut seen, bodies).await;
}
