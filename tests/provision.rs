//! A tenant's place on a real server: what is made, what others may not, what happens when it is done twice at once.

use std::{path::Path, time::Duration};

use dynabase::{
    cli::dev::postgres::{Programs, Server},
    tenant::{
        Names, OrgId, Status, Tenant, Tier, Tiers,
        namespace::{NameStyle, Password, RootSecret},
        tier::PostgresLimits,
    },
    upstream::postgres::{Admin, Config, Maintenance, ProvisionError, Provisioner},
};
use tokio_postgres::{Client, NoTls, error::SqlState};

fn limits(tier: Tier) -> PostgresLimits {
    let tiers = Tiers::parse(include_str!("../config/tiers.toml")).expect("the shipped tiers");
    tiers.limits(tier).postgres.clone()
}

fn tenant(org: &str) -> Tenant {
    Tenant {
        org: OrgId::parse(org).expect("an id"),
        tier: Tier::Free,
        status: Status::Active,
        epoch: 1,
        generation: 1,
        databases: vec!["reports".into()],
        users: Vec::new(),
        routes: Default::default(),
        still: false,
    }
}

fn names(style: NameStyle) -> Names {
    Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), style)
}

fn admin(server: &Server) -> Admin {
    let config = Config { url: Some(Password::new(server.local_url())), ..Config::default() };
    config.admin().expect("a good URL")
}

async fn start(folder: &Path) -> Server {
    // Another release than the installed one: the folder of its initdb and postgres.
    let programs = match std::env::var_os("DYNABASE_TEST_POSTGRES_BIN") {
        Some(folder) => Programs::in_folder(folder),
        None => Programs::find(),
    };
    let programs = programs.expect("a PostgreSQL server is installed");
    Server::start(&programs, folder, Password::new("root-password")).await.expect("it starts")
}

async fn login(server: &Server, user: &str, password: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(server.port()).user(user).password(password).dbname(database);
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn tenant_login(
    server: &Server,
    names: &Names,
    of: &Tenant,
    database: &str,
) -> Result<Client, tokio_postgres::Error> {
    let place = names.postgres(&of.org, database);
    let password = names.password("postgres", &of.org, of.generation);
    login(server, &place.role, password.expose(), &place.database).await
}

async fn root(server: &Server) -> Client {
    login(server, "postgres", "root-password", "postgres").await.expect("the superuser")
}

async fn code(client: &Client, statement: &str) -> Option<SqlState> {
    client.batch_execute(statement).await.err().and_then(|error| error.code().cloned())
}

#[tokio::test]
async fn a_tenant_owns_what_is_in_its_databases_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = start(folder.path()).await;
    let (names, provisioner) = (names(NameStyle::Opaque), Provisioner::new(admin(&server)));
    let (a, b) = (tenant("acme"), tenant("globex"));
    for one in [&a, &b] {
        let report = provisioner.ensure(one, &names, &limits(Tier::Free)).await.expect("provisioned");
        assert!(report.created_role && report.created_databases.len() == 2 && report.warnings.is_empty(), "{report:?}");
        let again = provisioner.ensure(one, &names, &limits(Tier::Free)).await.expect("again");
        assert_eq!(again, Default::default());
    }

    for database in ["app", "reports"] {
        let own = tenant_login(&server, &names, &a, database).await.expect("its own database");
        own.batch_execute(
            "create table t (x int); insert into t values (1); create schema s; create extension pg_trgm",
        )
        .await
        .expect("it may work");
    }
    let place = names.postgres(&a.org, "app");
    let password = names.password("postgres", &a.org, 1);
    let theirs = names.postgres(&b.org, "app").database;
    for database in [theirs.as_str(), "postgres", "template1"] {
        let refused = login(&server, &place.role, password.expose(), database).await.expect_err(database);
        assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{database}");
    }
    let own = tenant_login(&server, &names, &a, "app").await.expect("its own database");
    let their_role = names.postgres(&b.org, "app").role;
    for statement in [
        format!("set role {their_role}"),
        "set role postgres".into(),
        format!("grant connect on database {} to public", place.database),
        format!("alter database {} connection limit 1000", place.database),
        format!("alter database {} set work_mem = '1GB'", place.database),
        format!("alter role {} connection limit 1000", place.role),
        format!("alter role {} superuser", place.role),
        format!("grant {} to {their_role}", place.role),
        format!("drop database {}", place.database),
        "create database mine".into(),
        "create role mine".into(),
        "set temp_file_limit = -1".into(),
        "copy t to program 'cat'".into(),
        "select pg_read_file('PG_VERSION')".into(),
        "select * from pg_authid".into(),
        "create extension dblink".into(),
    ] {
        let code = code(&own, &statement).await;
        // A grant without the right to it is a warning in PostgreSQL, looked at below.
        assert!(
            code == Some(SqlState::INSUFFICIENT_PRIVILEGE) || statement.starts_with("grant connect"),
            "{statement}: {code:?}"
        );
    }
    assert!(tenant_login(&server, &names, &b, "app").await.expect("b works").batch_execute("select 1").await.is_ok());
    let b_password = names.password("postgres", &b.org, 1);
    let refused = login(&server, &their_role, b_password.expose(), &place.database).await.expect_err("still closed");
    assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));

    let row = root(&server)
        .await
        .query_one(
            "select rolconnlimit, array_to_string(rolconfig, ' '), (select rolpassword from pg_authid a where a.oid = r.oid)
             from pg_roles r where rolname = $1",
            &[&place.role],
        )
        .await
        .expect("the role");
    assert_eq!(row.get::<_, i32>(0), 5);
    let ceilings: String = row.get(1);
    for ceiling in
        ["statement_timeout=15000ms", "idle_in_transaction_session_timeout=65000ms", "temp_file_limit=524288"]
    {
        assert!(ceilings.contains(ceiling), "{ceilings}");
    }
    let stored: String = row.get(2);
    assert!(stored.starts_with("SCRAM-SHA-256$") && !stored.contains(password.expose()));
    let log = std::fs::read_to_string(folder.path().join("postgres.log")).expect("a log");
    assert!(!log.contains(password.expose()));
}

#[tokio::test]
async fn two_provisioners_at_once_and_a_crash_at_any_step_end_in_the_same_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = start(folder.path()).await;
    let names = names(NameStyle::Plain);
    let of = tenant("acme");
    let free = limits(Tier::Free);
    let provisioner = Provisioner::new(admin(&server));

    // Killed after 0, 5, 10, … ms: wherever that falls, nobody may be inside before all is right.
    let place = names.postgres(&of.org, "app");
    let other = tenant("other");
    provisioner.ensure(&other, &names, &free).await.expect("another tenant");
    let other_password = names.password("postgres", &other.org, 1);
    for milliseconds in (0..200).step_by(20) {
        let step = provisioner.ensure(&of, &names, &free);
        let _ = tokio::time::timeout(Duration::from_millis(milliseconds), step).await;
        let intruder = login(&server, &names.base(&other.org), other_password.expose(), &place.database).await;
        assert!(intruder.is_err(), "after {milliseconds} ms another tenant was inside");
    }
    let (one, two) = tokio::join!(provisioner.ensure(&of, &names, &free), provisioner.ensure(&of, &names, &free));
    assert!(one.is_ok() && two.is_ok(), "{one:?} {two:?}");
    tenant_login(&server, &names, &of, "reports").await.expect("it works in the end");

    // Somebody's hand: too many privileges, and a setting of the tenant's own.
    let hand = root(&server).await;
    hand.batch_execute("create role staff; grant staff to org_acme; alter role org_acme createdb; alter role org_acme set work_mem = '8MB'")
        .await
        .expect("the superuser may");
    let pro = limits(Tier::Pro);
    provisioner.ensure(&of, &names, &pro).await.expect("taken back");
    let row = hand
        .query_one(
            "select rolcreatedb, rolconnlimit, array_to_string(rolconfig, ' '),
             (select count(*) from pg_auth_members where member = r.oid) from pg_roles r where rolname = 'org_acme'",
            &[],
        )
        .await
        .expect("the role");
    assert_eq!((row.get(0), row.get(1), row.get(3)), (false, 50, 0i64));
    assert!(row.get::<_, String>(2).contains("work_mem=8MB"));
}

#[tokio::test]
async fn dropping_takes_all_of_one_tenant_and_nothing_of_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = start(folder.path()).await;
    let names = names(NameStyle::Plain);
    let provisioner = Provisioner::new(admin(&server));
    // The longer id begins with the shorter one, and its names are cut at 40 bytes: exactly the shorter one's role.
    let short = tenant(&"x".repeat(36));
    let long = tenant(&"x".repeat(48));
    for one in [&short, &long] {
        provisioner.ensure(one, &names, &limits(Tier::Free)).await.expect("provisioned");
    }
    let mut forgotten = short.clone();
    forgotten.databases = vec!["old".into()];
    provisioner.ensure(&forgotten, &names, &limits(Tier::Free)).await.expect("one more database");
    let session = tenant_login(&server, &names, &short, "app").await.expect("a live session");

    provisioner.drop(&short, &names).await.expect("dropped");
    provisioner.drop(&short, &names).await.expect("dropping nothing");
    assert!(session.batch_execute("select 1").await.is_err(), "its sessions are ended");
    let left: Vec<String> = root(&server)
        .await
        .query(
            "select datname::text from pg_database where datname like 'org%' union all
                select rolname::text from pg_roles where rolname like 'org%'",
            &[],
        )
        .await
        .expect("a list")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(left.len(), 3, "the other tenant's two databases and its role: {left:?}");
    tenant_login(&server, &names, &long, "reports").await.expect("the other tenant works");
}

#[tokio::test]
async fn maintenance_measures_ends_the_right_backend_and_comes_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = start(folder.path()).await;
    let names = names(NameStyle::Opaque);
    let of = tenant("acme");
    Provisioner::new(admin(&server)).ensure(&of, &names, &limits(Tier::Free)).await.expect("provisioned");
    let maintenance = Maintenance::new(admin(&server));
    let place = names.postgres(&of.org, "app");
    assert!(maintenance.database_bytes(&place.database).await.expect("a size") > 1 << 20);
    assert!(maintenance.database_bytes("no such database").await.is_err());

    let client = tenant_login(&server, &names, &of, "app").await.expect("a session");
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await.expect("a pid").get(0);
    assert!(!maintenance.terminate(pid, "somebody_else").await.expect("asked"), "the pid is not that role's");
    client.batch_execute("select 1").await.expect("still there");
    assert!(maintenance.terminate(pid, &place.role).await.expect("asked"));
    assert!(client.batch_execute("select 1").await.is_err(), "ended");

    // Its own connections die: the next question makes new ones.
    root(&server)
        .await
        .batch_execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'dynabase'")
        .await
        .expect("the superuser may");
    assert!(maintenance.database_bytes(&place.database).await.is_ok());
    assert!(!maintenance.terminate(1, &place.role).await.expect("asked"));
    let sendable = |_: &(dyn Send + Sync)| ();
    sendable(&maintenance);
    tokio::spawn(async move { maintenance.database_bytes("postgres").await }).await.expect("no panic").expect("a size");
}

#[tokio::test]
async fn an_administrator_who_is_no_superuser_does_what_it_may_and_says_the_rest() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = start(folder.path()).await;
    let hand = root(&server).await;
    hand.batch_execute("create role platform login createdb createrole password 'platform-password'")
        .await
        .expect("made");
    let url = format!("postgres://platform:platform-password@127.0.0.1:{}/postgres", server.port());
    let config = Config { url: Some(Password::new(url)), ..Config::default() };
    let provisioner = Provisioner::new(config.admin().expect("a URL"));
    let names = names(NameStyle::Opaque);
    let of = tenant("acme");
    let report = provisioner.ensure(&of, &names, &limits(Tier::Free)).await.expect("provisioned");
    assert!(report.warnings.iter().any(|warning| warning.contains("temp_file_limit")), "{report:?}");
    assert!(report.warnings.iter().any(|warning| warning.contains("template1")), "{report:?}");
    let own = tenant_login(&server, &names, &of, "app").await.expect("it works");
    own.batch_execute("create table t (x int)").await.expect("in its schema");
    let role = names.base(&of.org);
    hand.batch_execute(&format!("alter role {role} superuser")).await.expect("somebody's hand");
    let tainted = provisioner.ensure(&of, &names, &limits(Tier::Free)).await.expect_err("can't take that back");
    assert!(matches!(tainted, ProvisionError::Tainted { .. } | ProvisionError::Admin(_)), "{tainted}");
}
