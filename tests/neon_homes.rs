//! Which home a tenant has: decided by its tier when it is created, written into its record, and nobody's data left behind
//! when the tier changes.

use dynabase::tenant::{Home, Tier};
use serde_json::Value;

use crate::{
    neon::{door, setup, sql, sql_in, tenant},
    support::{
        eventually, postgres,
        proxy::{Org, Proxy, Setup},
        wire::Wire,
    },
};

/// With the tiers that are shipped.
fn shipped(setup: Setup) -> Setup {
    Setup { files: vec![("tiers.toml", include_str!("../config/tiers.toml").to_owned())], ..setup }
}

/// What a command that has to succeed says.
fn done(proxy: &Proxy, words: &[&str]) -> (String, String) {
    let (code, out, err) = proxy.command(words, &[]);
    assert_eq!(code, Some(0), "{words:?}: {out}{err}");
    (out, err)
}

/// Changes a tier as an operator does by hand, and waits until it is in force.
fn set_tier_by_hand(org: &Org<'_>, tier: Tier) {
    org.edit(|tenant| tenant.tier = tier);
    eventually("the new tier is in force", || {
        let view: Value = serde_json::from_str(&org.proxy.admin(&format!("/v1/tenants/{}", org.org))).expect("JSON");
        (view["tier"] == tier.name()).then_some(())
    });
}

/// Where every command and the admin port say that a tenant's home is.
fn homes(org: &Org<'_>) -> [String; 4] {
    let name = org.org.as_str();
    let json = |words: &[&str]| -> Value { serde_json::from_str(&done(org.proxy, words).0).expect("JSON") };
    let text = |value: &Value| value["home"].as_str().expect("a home").to_owned();
    let list = json(&["tenant", "list", "--json"]);
    let listed = list.as_array().expect("a list").iter().find(|it| it["org_id"] == name).expect("listed");
    let view: Value = serde_json::from_str(&org.proxy.admin(&format!("/v1/tenants/{name}"))).expect("JSON");
    let verified = json(&["tier", "verify", name, "--json"]);
    [text(&json(&["tenant", "show", name, "--json"])), text(listed), text(&view), text(&verified)]
}

#[test]
fn a_free_tenant_lives_in_its_neon_home_from_creation_on_and_no_tier_moves_it() {
    let proxy = Proxy::start(&shipped(setup(&postgres::shared().url)));
    let port = door(&proxy);
    let made = done(&proxy, &["tenant", "create", "neon_free", "--tier", "FREE"]).1;
    assert!(made.contains("home is neon"), "{made}");
    let made = done(&proxy, &["tenant", "create", "neon_paid", "--tier", "STARTER"]).1;
    assert!(made.contains("home is main"), "{made}");
    let (free, paid) = (proxy.org("neon_free"), proxy.org("neon_paid"));
    // Made before records said where homes are.
    let old = tenant(&proxy, "neon_old", Tier::Free);
    sql(port, &free, "create table seen (i int)");
    sql(port, &free, "insert into seen values (7)");
    assert_eq!(free.wire().ask("select i from seen"), "7", "one database by every way in");
    for org in [&paid, &old] {
        assert_eq!(org.wire().query("create table seen (i int); insert into seen values (8)").codes(), [""; 0]);
        assert_eq!(
            sql_in(port, org, "app", "select i from seen").1["code"],
            "42P01",
            "the Neon home is another database"
        );
    }
    assert_eq!((homes(&free), homes(&paid)), (["neon"; 4].map(str::to_owned), ["main"; 4].map(str::to_owned)));
    assert_eq!(homes(&old), ["main"; 4].map(str::to_owned));
    // Where an operator finds it on the server.
    let (shown, _) = done(&proxy, &["tenant", "show", "neon_free", "--json"]);
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["neon"]["databases"]["app"], free.wire().ask("select current_database()"));
    let (table, _) = done(&proxy, &["tenant", "list"]);
    assert!(table.lines().any(|line| line.starts_with("neon_free") && line.contains(" neon ")), "{table}");

    // FREE says neon and STARTER main: who changes the tier by hand changes limits, and nobody's data is elsewhere.
    set_tier_by_hand(&free, Tier::Starter);
    set_tier_by_hand(&paid, Tier::Free);
    set_tier_by_hand(&old, Tier::Pro);
    assert_eq!(free.wire().ask("select i from seen"), "7");
    assert_eq!((paid.wire().ask("select i from seen"), old.wire().ask("select i from seen")), ("8".into(), "8".into()));
    set_tier_by_hand(&old, Tier::Free);
    assert_eq!(old.wire().ask("select i from seen"), "8");
}

#[test]
fn without_neon_homes_a_free_tenant_lives_at_the_main_one() {
    let proxy = Proxy::start(&shipped(Setup::default()));
    assert!(done(&proxy, &["check"]).0.contains("new tenants on FREE get the main home"));
    assert!(done(&proxy, &["doctor"]).0.contains("new tenants on FREE get the main home"));
    let made = done(&proxy, &["tenant", "create", "neon_none", "--tier", "FREE"]).1;
    assert!(made.contains("home is main") && made.contains("no Neon homes here"), "{made}");
    let org = proxy.org("neon_none");
    assert_eq!(org.wire().query("create table seen (i int)").codes(), [""; 0]);
    assert_eq!(homes(&org), ["main"; 4].map(str::to_owned));
    // The Neon homes are gone from the configuration: nobody is led to an empty database.
    org.edit(|tenant| tenant.routes.postgres = Some(Home::Neon));
    eventually("it is refused", || Wire::login(proxy.address(), &org.token(), &[]).err());
    let (code, out, _) = proxy.command(&["tier", "verify", "neon_none"], &[]);
    assert!(code == Some(1) && out.contains("the tenant's home is there"), "{out}");
    let (code, out, _) = proxy.command(&["doctor"], &[]);
    assert!(code == Some(1) && out.contains("1 organisation(s) have a Neon home"), "{out}");
}
