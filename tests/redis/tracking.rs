//! What the server tells by itself: invalidations of tracked keys, and keyspace notifications. Only the tenant's own,
//! and in its own names.

use super::support::{Client, House};

#[tokio::test(flavor = "multi_thread")]
async fn a_tracking_client_hears_of_what_it_read_and_nothing_else() {
    let house = House::start().await;
    let mut cache = house.client3("umbrella").await;
    let mut writer = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    writer.line("MSET a 1 b 1").await;
    assert_eq!(cache.line("CLIENT TRACKING ON").await, "+OK");
    assert_eq!(cache.line("CLIENT TRACKING ON").await, "+OK", "twice the same is no change");
    assert!(cache.line("CLIENT TRACKING ON NOLOOP").await.starts_with("-ERR tracking is on"));
    assert_eq!(cache.line("GET a").await, "\"1\"");
    assert_eq!(other.line("SET a 9").await, "+OK");
    assert_eq!(writer.line("SET b 2").await, "+OK");
    assert_eq!(writer.line("SET a 2").await, "+OK");
    assert_eq!(cache.reply().await, ">[\"invalidate\" [\"a\"]]");
    // It is still a client like any other; its own writes come back to it.
    assert_eq!(cache.line("GET a").await, "\"2\"");
    cache.send(&["SET", "a", "3"]).await;
    let (one, two) = (cache.reply().await, cache.reply().await);
    assert!([&one, &two].iter().any(|reply| *reply == "+OK"), "{one} {two}");
    assert!([&one, &two].iter().any(|reply| *reply == ">[\"invalidate\" [\"a\"]]"), "{one} {two}");
    assert_eq!(cache.line("CLIENT TRACKINGINFO").await, "%[\"flags\" ~[\"on\"] \"redirect\" :0 \"prefixes\" []]");
    assert_eq!(cache.line("SELECT 1").await, "-ERR SELECT is not possible while tracking is on");
    assert_eq!(cache.line("CLIENT TRACKING OFF").await, "+OK");
    assert_eq!(cache.line("CLIENT GETREDIR").await, ":-1");
    cache.line("GET a").await;
    writer.line("SET a 4").await;
    assert_eq!(cache.line("PING").await, "+PONG");
}

#[tokio::test(flavor = "multi_thread")]
async fn broadcasts_stay_inside_the_tenant() {
    let house = House::start().await;
    let mut all = house.client3("umbrella").await;
    assert_eq!(all.line("CLIENT TRACKING ON BCAST").await, "+OK");
    let mut some = house.client3("umbrella").await;
    assert_eq!(some.line("CLIENT TRACKING ON BCAST PREFIX user: NOLOOP").await, "+OK");
    let mut writer = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    assert_eq!(other.line("SET user:1 x").await, "+OK");
    assert_eq!(writer.line("SET item:1 x").await, "+OK");
    assert_eq!(writer.line("SET user:1 x").await, "+OK");
    let mut heard = String::new();
    while heard.matches("\"").count() < 8 {
        heard.push_str(&all.reply().await);
    }
    assert!(heard.contains("\"item:1\"") && heard.contains("\"user:1\""), "{heard}");
    assert_eq!(heard.matches("user:1").count(), 1, "the other tenant's key was heard: {heard}");
    assert_eq!(some.reply().await, ">[\"invalidate\" [\"user:1\"]]");
    assert_eq!(some.line("SET user:2 x").await, "+OK", "NOLOOP: not its own writes");
    // The server's words, without the prefix.
    let mut wrong = house.client3("umbrella").await;
    let reply = wrong.line("CLIENT TRACKING ON BCAST PREFIX a PREFIX ab").await;
    assert!(
        reply.starts_with("-ERR Prefix 'a' overlaps with another provided prefix 'ab'") && !reply.contains("org:"),
        "{reply}"
    );
    let reply = wrong.line("CLIENT TRACKING ON PREFIX a").await;
    assert!(reply.starts_with("-ERR PREFIX option requires BCAST"), "{reply}");
    assert_eq!(wrong.line("PING").await, "+PONG");
}

#[tokio::test(flavor = "multi_thread")]
async fn opting_in_and_out() {
    let house = House::start().await;
    let mut writer = house.client("umbrella").await;
    writer.line("MSET a 1 b 1").await;
    let mut cache = house.client3("umbrella").await;
    assert!(cache.line("CLIENT CACHING YES").await.starts_with("-ERR CLIENT CACHING can be called only"));
    assert_eq!(cache.line("CLIENT TRACKING ON OPTIN").await, "+OK");
    assert_eq!(cache.line("GET a").await, "\"1\"");
    assert_eq!(cache.line("CLIENT CACHING YES").await, "+OK");
    assert_eq!(cache.line("GET b").await, "\"1\"");
    writer.line("MSET a 2 b 2").await;
    assert_eq!(cache.reply().await, ">[\"invalidate\" [\"b\"]]");
    assert_eq!(cache.line("PING").await, "+PONG");
}

/// RESP2 has no pushes: invalidations go to another client of the tenant, which listens.
#[tokio::test(flavor = "multi_thread")]
async fn invalidations_are_redirected_to_a_listener_of_the_same_tenant() {
    let house = House::start().await;
    let mut listener = house.client("umbrella").await;
    let id = listener.line("CLIENT ID").await.trim_start_matches(':').to_owned();
    let mut cache = house.client("umbrella").await;
    let redirect = format!("CLIENT TRACKING ON REDIRECT {id}");
    assert!(cache.line(&redirect).await.starts_with("-ERR The client ID you want redirect to"));
    assert_eq!(listener.line("SUBSCRIBE __redis__:invalidate").await, "[\"subscribe\" \"__redis__:invalidate\" :1]");
    assert_eq!(cache.line(&redirect).await, "+OK");
    assert_eq!(cache.line("CLIENT GETREDIR").await, format!(":{id}"));
    cache.line("SET k 1").await;
    cache.line("GET k").await;
    let mut stranger = house.client("hooli").await;
    assert!(stranger.line(&redirect).await.starts_with("-ERR The client ID you want redirect to"));
    assert_eq!(stranger.line("PUBLISH __redis__:invalidate x").await, ":0");
    house.client("umbrella").await.line("SET k 2").await;
    assert_eq!(listener.reply().await, "[\"message\" \"__redis__:invalidate\" [\"k\"]]");
}

#[tokio::test(flavor = "multi_thread")]
async fn keyspace_notifications_are_the_tenants_own() {
    let house = House::start().await;
    let mut admin = house.admin().await;
    assert_eq!(admin.line("CONFIG SET notify-keyspace-events KEA").await, "+OK");
    for three in [false, true] {
        let client =
            |org: &'static str| async { if three { house.client3(org).await } else { house.client(org).await } };
        let mark = if three { ">" } else { "" };
        let mut listener: Client = client("umbrella").await;
        let mut writer = client("umbrella").await;
        let mut other = client("hooli").await;
        writer.line("FLUSHALL").await;
        assert_eq!(
            listener.line("SUBSCRIBE __keyspace@0__:k").await,
            format!("{mark}[\"subscribe\" \"__keyspace@0__:k\" :1]")
        );
        assert_eq!(
            listener.line("PSUBSCRIBE __keyevent@3__:*").await,
            format!("{mark}[\"psubscribe\" \"__keyevent@3__:*\" :2]")
        );
        other.line("SET k 1").await;
        other.line("SELECT 3").await;
        other.line("SET k 1").await;
        writer.line("SET k 1").await;
        assert_eq!(listener.reply().await, format!("{mark}[\"message\" \"__keyspace@0__:k\" \"set\"]"));
        writer.line("SELECT 3").await;
        writer.line("LPUSH l x").await;
        assert_eq!(
            listener.reply().await,
            format!("{mark}[\"pmessage\" \"__keyevent@3__:*\" \"__keyevent@3__:lpush\" \"l\"]")
        );
        assert_eq!(
            listener.line("UNSUBSCRIBE __keyspace@0__:k").await,
            format!("{mark}[\"unsubscribe\" \"__keyspace@0__:k\" :1]")
        );
        assert_eq!(listener.line("PUNSUBSCRIBE").await, format!("{mark}[\"punsubscribe\" \"__keyevent@3__:*\" :0]"));
        // What does not say which database is a channel like any other.
        listener.line("PSUBSCRIBE *").await;
        writer.line("SET k 2").await;
        writer.line("PUBLISH c x").await;
        assert_eq!(listener.reply().await, format!("{mark}[\"pmessage\" \"*\" \"c\" \"x\"]"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_change_places() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    other.line("SET k theirs").await;
    client.line("MSET k zero only0 x").await;
    client.line("SELECT 4").await;
    client.line("SET k four").await;
    assert_eq!(client.line("SWAPDB 0 4").await, "+OK");
    assert_eq!(client.line("MGET k only0").await, "[\"zero\" \"x\"]");
    assert_eq!(client.line("DBSIZE").await, ":2");
    client.line("SELECT 0").await;
    assert_eq!(client.line("MGET k only0").await, "[\"four\" (nil)]");
    assert_eq!(client.line("SWAPDB 0 0").await, "+OK");
    assert_eq!(client.line("SWAPDB 0 16").await, "-ERR DB index is out of range");
    assert_eq!(client.line("SWAPDB x 1").await, "-ERR invalid first DB index");
    assert_eq!(other.line("GET k").await, "\"theirs\"");
    let mut admin = house.admin().await;
    let index = admin.line("HGET dynabase:databases:org:umbrella 4").await;
    admin.line(&format!("SELECT {}", index.trim_matches('"'))).await;
    let keys = admin.line("KEYS *").await;
    assert!(keys.split(' ').all(|key| key.trim_start_matches('[').starts_with("\"org:umbrella@4:")), "{keys}");
}
