//! The Rust driver before the proxy, as tenants of both isolations.

use std::{sync::Arc, time::Duration};

use bson::{Document, doc};
use dynabase::net::ServerTls;
use futures_util::TryStreamExt;
use mongodb::{Client, Collection, IndexModel, options::IndexOptions};

use super::support::House;
use crate::support::mongo;

async fn as_tenant(url: &str) {
    let client = Client::with_uri_str(url).await.expect("a URL");
    let database = client.default_database().expect("it names one");
    let things = database.collection::<Document>("rust");
    things.delete_many(doc! {}).await.expect("empty");
    let unique = IndexOptions::builder().unique(true).build();
    things.create_index(IndexModel::builder().keys(doc! { "n": 1 }).options(unique).build()).await.expect("an index");
    let many: Vec<Document> = (0..150).map(|n| doc! { "_id": n, "n": n }).collect();
    things.insert_many(many).await.expect("inserted");
    let found: Vec<Document> = things
        .find(doc! { "n": { "$gte": 20 } })
        .batch_size(30)
        .sort(doc! { "_id": 1 })
        .await
        .expect("found")
        .try_collect()
        .await
        .expect("read");
    assert_eq!((found.len(), &found[0]), (130, &doc! { "_id": 20, "n": 20 }));
    let twice = things.insert_one(doc! { "n": 20 }).await.expect_err("unique");
    assert!(!twice.to_string().contains("shared_") && !twice.to_string().contains("org_"), "{twice}");
    let mut session = client.start_session().await.expect("a session");
    session.start_transaction().await.expect("begun");
    things.update_one(doc! { "_id": 1 }, doc! { "$set": { "x": 1 } }).session(&mut session).await.expect("updated");
    assert_eq!(things.count_documents(doc! { "x": 1 }).await.expect("counted"), 0);
    session.commit_transaction().await.expect("committed");
    assert_eq!(things.find_one(doc! { "x": 1 }).await.expect("found"), Some(doc! { "_id": 1, "n": 1, "x": 1 }));
    assert_eq!(database.list_collection_names().await.expect("listed"), ["rust"]);
    assert_eq!(client.list_database_names().await.expect("listed"), ["app"]);
    database.drop().await.expect("dropped");
    assert_eq!(things.count_documents(doc! {}).await.expect("counted"), 0);
    // It waits for its sessions to go.
    drop(session);
    client.shutdown().await;
}

#[tokio::test]
async fn the_rust_driver_works_in_both_isolations() {
    let house = House::before(mongo::shared().port).await;
    as_tenant(&house.url("globex")).await;
    as_tenant(&house.url("initech")).await;
}

/// The string of a tenant with other options than `directConnection=true`.
fn string(house: &House, org: &str, options: &str) -> String {
    house.url(org).replace("&directConnection=true", options)
}

#[tokio::test]
async fn strings_with_and_without_the_sets_name_work_and_another_name_does_not() {
    let house = House::with_set(mongo::shared().port, "rs0", None).await;
    for (org, options) in [
        ("globex", "&replicaSet=rs0"),
        ("initech", "&replicaSet=rs0&directConnection=true"),
        ("globex", "&directConnection=true"),
        ("initech", ""),
        ("globex", "&loadBalanced=true"),
    ] {
        as_tenant(&string(&house, org, options)).await;
    }
    for options in ["&replicaSet=other", "&replicaSet=other&directConnection=true"] {
        let refused = refused(&string(&house, "globex", options)).await;
        assert!(refused.contains("Server selection timeout"), "{refused}");
    }
}

/// What the driver says of a string that leads nowhere.
async fn refused(url: &str) -> String {
    let mut options = mongodb::options::ClientOptions::parse(url).await.expect("a URL");
    options.server_selection_timeout = Some(Duration::from_secs(1));
    let client = Client::with_options(options).expect("options");
    let things = client.default_database().expect("it names one").collection::<Document>("rust");
    things.find_one(doc! {}).await.expect_err(url).to_string()
}

/// The driver goes on to what is advertised, and TLS is for that name, whatever address it came by.
#[tokio::test]
async fn the_advertised_name_is_what_the_certificate_has_to_be_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let own = certificate(folder.path(), "own");
    assert!(own.is_for("localhost").expect("read") && !own.is_for("127.0.0.1").expect("read"));
    let tls = Arc::new(ServerTls::load(&own, &[]).expect("good files"));
    let house = House::with_set(mongo::shared().port, "rs0", Some(tls)).await;
    let secure = format!("&tls=true&tlsCAFile={}", own.cert_file.display());
    let named = |options: &str| string(&house, "initech", options).replace("127.0.0.1", "localhost");
    for options in ["&replicaSet=rs0", ""] {
        as_tenant(&named(&format!("{options}{secure}"))).await;
    }
    // By its number it is not found to be who it is.
    refused(&string(&house, "initech", &secure)).await;
}

/// In a shared collection one tenant can't take all the indexes that the server has for it.
#[tokio::test]
async fn a_tenant_has_its_share_of_a_shared_collections_indexes() {
    const SHARE: i32 = 12;
    let house = House::before(mongo::shared().port).await;
    let things = |client: &Client| client.default_database().expect("it names one").collection::<Document>("indexed");
    let (one, other) = (house.url("globex"), house.url("acme"));
    let client = Client::with_uri_str(one).await.expect("a URL");
    let many = things(&client);
    let make = |many: &Collection<Document>, n: i32, unique: bool| {
        let options = IndexOptions::builder().unique(unique).build();
        let (many, model) =
            (many.clone(), IndexModel::builder().keys(doc! { format!("f{n}"): 1 }).options(options).build());
        async move { many.create_index(model).await }
    };
    for n in 0..SHARE {
        make(&many, n, n % 2 == 0).await.expect("room");
    }
    let refused = make(&many, SHARE, true).await.expect_err("one more").to_string();
    assert!(refused.contains("67") && refused.contains("12 of 12"), "{refused}");
    // Programs make theirs at each start: those that are there, and those that only make faster.
    make(&many, 0, true).await.expect("it is there");
    make(&many, SHARE, false).await.expect("left out");
    assert_eq!(many.list_index_names().await.expect("listed").len(), usize::try_from(SHARE).expect("small") + 1);
    // Another tenant has its own share, and a dropped one gives room.
    let neighbour = Client::with_uri_str(other).await.expect("a URL");
    make(&things(&neighbour), 100, true).await.expect("room");
    many.drop_index("f1_1").await.expect("dropped");
    make(&many, SHARE, true).await.expect("room again");
    for (client, many) in [(client, many), (neighbour.clone(), things(&neighbour))] {
        many.drop().await.expect("dropped");
        client.shutdown().await;
    }
}

/// A shared collection has an index of the platform's, which no tenant sees, names or loses; and a collection that others
/// have is not there for who has nothing in it.
#[tokio::test]
async fn what_others_have_in_a_shared_database_is_not_there() {
    let house = House::before(mongo::shared().port).await;
    let raw = mongo::shared().client().await.database("shared_app").collection::<Document>("theirs");
    let (one, other) = (house.url("globex"), house.url("acme"));
    let client = Client::with_uri_str(one).await.expect("a URL");
    let mine = client.default_database().expect("it names one").collection::<Document>("theirs");
    mine.insert_many((0..20).map(|n| doc! { "_id": format!("theirs{n}") })).await.expect("inserted");
    assert!(raw.list_index_names().await.expect("listed").contains(&"org_id_1__id_1".to_owned()));
    assert_eq!(mine.list_index_names().await.expect("listed"), ["_id_"]);
    mine.drop_index("org_id_1__id_1").await.expect_err("not the tenant's");
    mine.drop_indexes().await.expect("none of its own");
    assert!(raw.list_index_names().await.expect("listed").contains(&"org_id_1__id_1".to_owned()));
    let twice = mine.insert_one(doc! { "_id": "theirs1" }).await.expect_err("twice").to_string();
    assert!(twice.contains("11000") && !twice.contains("org_id"), "{twice}");
    let database = client.default_database().expect("it names one");
    let plan = database.run_command(doc! { "explain": { "find": "theirs", "filter": { "_id": "theirs1" } } }).await;
    let plan = plan.expect("a plan").to_string();
    assert!(!plan.contains("org_id"), "{plan}");

    let neighbour = Client::with_uri_str(other).await.expect("a URL");
    let database = neighbour.default_database().expect("it names one");
    for collection in ["theirs", "nobodys"] {
        for command in [
            doc! { "listIndexes": collection },
            doc! { "dropIndexes": collection, "index": "x_1" },
            doc! { "dropIndexes": collection, "index": "*" },
        ] {
            let error = database.run_command(command.clone()).await.expect_err("not there");
            assert!(error.to_string().contains("26"), "{command}: {error}");
        }
    }
    let things = database.collection::<Document>("theirs");
    let made = database
        .run_command(doc! { "createIndexes": "theirs", "indexes": [{ "key": { "a": 1 }, "name": "a_1" }] })
        .await
        .expect("an index");
    assert!(!made.contains_key("createdCollectionAutomatically"), "{made}");
    assert_eq!(things.list_index_names().await.expect("listed").len(), 2);
    things.drop().await.expect("dropped");
    mine.drop().await.expect("dropped");
    client.shutdown().await;
    neighbour.shutdown().await;
}

/// A certificate of its own for `localhost` in `folder`.
fn certificate(folder: &std::path::Path, name: &str) -> dynabase::net::tls::TlsConfig {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (cert_file, key_file) = (folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")));
    std::fs::write(&cert_file, made.cert.pem()).expect("written");
    std::fs::write(&key_file, made.signing_key.serialize_pem()).expect("written");
    dynabase::net::tls::TlsConfig { cert_file, key_file, client_ca_file: None, client_auth: Default::default() }
}

#[tokio::test]
async fn the_rust_driver_works_over_tls_and_trusts_no_stranger() {
    let folder = tempfile::tempdir().expect("a folder");
    let (own, stranger) = (certificate(folder.path(), "own"), certificate(folder.path(), "stranger"));
    let tls = Arc::new(ServerTls::load(&own, &[]).expect("good files"));
    let house = House::with_tls(mongo::shared().port, tls).await;
    let url = |org: &str, ca: &std::path::Path| {
        let url = house.url(org).replace("127.0.0.1", "localhost");
        format!("{url}&tls=true&tlsCAFile={}", ca.display())
    };
    as_tenant(&url("acme", &own.cert_file)).await;
    as_tenant(&url("umbrella", &own.cert_file)).await;
    for wrong in [url("acme", &stranger.cert_file), house.url("acme").replace("127.0.0.1", "localhost")] {
        let mut options = mongodb::options::ClientOptions::parse(&wrong).await.expect("a URL");
        options.server_selection_timeout = Some(Duration::from_secs(1));
        let client = Client::with_options(options).expect("options");
        let things = client.default_database().expect("it names one").collection::<Document>("rust");
        assert!(things.find_one(doc! {}).await.is_err(), "{wrong}");
    }
}
