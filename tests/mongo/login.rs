//! The handshake and what a login is worth over time.

use bson::{Binary, Document, doc, spec::BinarySubtype};
use dynabase::{
    quota::Stop,
    tenant::{Status, Tier},
};

use super::support::{Act, House, bytes, plain, server, tenant, token};

const DEAD: u16 = 1;

fn oidc(payload: &Document) -> Document {
    let payload = Binary { subtype: BinarySubtype::Generic, bytes: bytes(payload) };
    doc! { "saslStart": 1, "mechanism": "MONGODB-OIDC", "payload": payload, "$db": "$external" }
}

#[tokio::test]
async fn hello_makes_drivers_see_one_mongos_that_names_nobody() {
    let house = House::before(DEAD).await;
    let mut client = house.stranger().await;
    let hello =
        doc! { "hello": 1, "helloOk": true, "loadBalanced": true, "saslSupportedMechs": "admin.app", "$db": "admin" };
    let told = client.run(hello).await;
    assert_eq!(told.get_str("msg").ok(), Some("isdbgrid"));
    assert_eq!(told.get_i32("maxMessageSizeBytes").ok(), Some(46_000_000));
    assert_eq!(told.get_i32("maxBsonObjectSize").ok(), Some(16_777_088));
    assert_eq!(told.get_i32("maxWriteBatchSize").ok(), Some(10_000));
    assert_eq!(told.get_i32("logicalSessionTimeoutMinutes").ok(), Some(30));
    assert!(told.get_object_id("serviceId").is_ok() && told.get_array("saslSupportedMechs").is_ok());
    for hidden in ["setName", "hosts", "me", "primary", "topologyVersion", "electionId", "lastWrite", "compression"] {
        assert!(!told.contains_key(hidden), "{hidden}");
    }
    let told = client.run(doc! { "hello": 1, "$db": "admin" }).await;
    for unasked in ["helloOk", "serviceId", "saslSupportedMechs", "speculativeAuthenticate"] {
        assert!(!told.contains_key(unasked), "{unasked}");
    }
}

#[tokio::test]
async fn hello_names_the_one_node_of_the_set_that_is_configured_and_no_other() {
    let house = House::with_set(DEAD, "rs0", None).await;
    let mut client = house.stranger().await;
    let address = format!("127.0.0.1:{}", house.port);
    for name in ["hello", "isMaster", "ismaster"] {
        let told = client.run(doc! { name: 1, "$db": "admin" }).await;
        for key in ["me", "primary"] {
            assert_eq!(told.get_str(key).ok(), Some(address.as_str()), "{told}");
        }
        assert_eq!(told.get_array("hosts").ok(), Some(&vec![address.as_str().into()]));
        assert_eq!((told.get_str("setName").ok(), told.get_i32("setVersion").ok()), (Some("rs0"), Some(1)));
        assert_eq!(
            (told.get_bool("isWritablePrimary").ok(), told.get_bool("secondary").ok()),
            (Some(true), Some(false))
        );
        // A mongos of a set is nothing that a driver knows; the rest would be of who is behind.
        for hidden in ["msg", "topologyVersion", "electionId", "lastWrite", "passives", "arbiters", "serviceId"] {
            assert!(!told.contains_key(hidden), "{hidden}");
        }
    }
    let told = client.run(doc! { "hello": 1, "loadBalanced": true, "$db": "admin" }).await;
    assert!(told.get_object_id("serviceId").is_ok() && told.get_str("msg").ok() == Some("isdbgrid"), "{told}");
    assert!(!told.contains_key("setName") && !told.contains_key("hosts"), "{told}");
}

#[tokio::test]
async fn a_token_is_the_password() {
    let house = House::before(DEAD).await;
    for good in [plain(&token("acme")), oidc(&doc! { "jwt": token("acme") })] {
        let mut client = house.stranger().await;
        assert_eq!(client.run(good).await.get_bool("done").ok(), Some(true));
        let told = client.run(doc! { "connectionStatus": 1, "$db": "admin" }).await;
        let info = told.get_document("authInfo").expect("there");
        assert_eq!(info.get_array("authenticatedUsers").map(Vec::len).ok(), Some(1));
    }
    let scram = doc! { "saslStart": 1, "mechanism": "SCRAM-SHA-256", "payload": Binary { subtype: BinarySubtype::Generic, bytes: b"n,,n=app,r=x".into() }, "$db": "admin" };
    for (bad, word) in [
        (plain("nonsense"), "Authentication failed."),
        (plain(&token("nobody")), "Authentication failed."),
        (plain(&format!("{}\0x", token("acme"))), "Authentication failed."),
        (plain(&"x".repeat(20_000)), "Authentication failed."),
        (oidc(&doc! { "jwt": 5 }), "Authentication failed."),
        (scram, "add authMechanism=PLAIN to the connection string"),
    ] {
        let mut client = house.stranger().await;
        let told = client.run(bad).await;
        assert_eq!(told.get_i32("code").ok(), Some(18), "{told}");
        assert!(told.get_str("errmsg").is_ok_and(|text| text.contains(word)), "{told}");
        client.closed().await;
    }
}

#[tokio::test]
async fn a_login_may_come_in_two_steps_or_inside_hello() {
    let house = House::before(DEAD).await;
    let mut client = house.stranger().await;
    let told = client.run(oidc(&doc! { "n": "app" })).await;
    let payload = told.get_binary_generic("payload").expect("there");
    let issuer = Document::from_reader(payload.as_slice()).expect("a document");
    assert_eq!(issuer.get_str("issuer").ok(), Some("https://test.supabase.co/auth/v1"));
    let payload = Binary { subtype: BinarySubtype::Generic, bytes: bytes(&doc! { "jwt": token("acme") }) };
    let go_on = doc! { "saslContinue": 1, "conversationId": 1, "payload": payload, "$db": "$external" };
    assert_eq!(client.run(go_on.clone()).await.get_bool("done").ok(), Some(true));
    // There is no conversation to go on with.
    assert_eq!(house.stranger().await.run(go_on).await.get_i32("code").ok(), Some(17));

    for (start, works) in [(oidc(&doc! { "jwt": token("acme") }), true), (oidc(&doc! { "jwt": "x" }), false)] {
        let mut client = house.stranger().await;
        let told = client.run(doc! { "hello": 1, "speculativeAuthenticate": start, "$db": "admin" }).await;
        assert_eq!(told.get_f64("ok").ok(), Some(1.0), "hello never fails");
        assert_eq!(told.contains_key("speculativeAuthenticate"), works);
        let told = client.run(doc! { "usersInfo": 1, "$db": "admin" }).await;
        assert_eq!(told.get_f64("ok").ok(), Some(if works { 1.0 } else { 0.0 }));
    }
}

#[tokio::test]
async fn an_expired_token_is_renewed_in_place_by_the_same_tenant_only() {
    let (port, _events) = server(|_| Act::Answer(doc! { "n": 1, "ok": 1.0 })).await;
    let house = House::before(port).await;
    let count = || doc! { "count": "c", "$db": "app" };
    let (mut mine, mut foreign) = (house.client("initech").await, house.client("initech").await);
    assert_eq!(mine.run(count()).await.get_f64("ok").ok(), Some(1.0));
    house.table.stop_where(Stop::Expired, |_| true);
    for client in [&mut mine, &mut foreign] {
        assert_eq!(client.run(count()).await.get_i32("code").ok(), Some(391));
    }
    assert_eq!(mine.log_in(&token("initech")).await.get_bool("done").ok(), Some(true));
    assert_eq!(mine.run(count()).await.get_f64("ok").ok(), Some(1.0));
    assert_eq!(foreign.log_in(&token("umbrella")).await.get_i32("code").ok(), Some(18));
    foreign.closed().await;
}

#[tokio::test]
async fn a_suspension_ends_sessions_and_says_so() {
    let house = House::before(DEAD).await;
    let mut idle = house.client("acme").await;
    let suspended = dynabase::tenant::Tenant { status: Status::Suspended, ..tenant("acme", Tier::Free, 2) };
    house.table.apply(std::sync::Arc::new(suspended)).expect("a newer epoch");
    idle.closed().await;
    let told = house.stranger().await.log_in(&token("acme")).await;
    assert_eq!(
        (told.get_i32("code").ok(), told.get_str("errmsg").ok()),
        (Some(13), Some("this organization is suspended"))
    );
    house.is_well().await;
}

#[tokio::test]
async fn a_drain_lets_idle_clients_go() {
    let house = House::before(DEAD).await;
    let mut clients = [house.client("acme").await, house.stranger().await];
    house.drain.start();
    for client in &mut clients {
        client.closed().await;
    }
}
