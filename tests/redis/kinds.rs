//! The same tests before a server with a single database, and before a cluster.

use dynabase::{tenant::OrgId, upstream::redis::Standing};

use super::{
    basic, differential, large, limits, scripts,
    support::{House, Kind, on},
    table,
};

#[test]
fn one_database_serves_a_client_as_its_own_would() {
    for test in [
        basic::a_client_logs_in_and_works_inside_its_prefix,
        basic::a_pipeline_keeps_its_order_whatever_is_in_it,
        basic::names_come_back_bare_in_both_protocols,
        basic::messages_stay_inside_the_tenant,
        basic::a_blocked_client_delays_nobody_and_pops_nothing_after_it_left,
        basic::transactions_watch_and_abort,
        basic::logical_databases_are_apart,
        basic::sort_follows_patterns_inside_the_tenant_only,
        basic::a_lost_upstream_is_told_and_found_again,
        basic::large_values_and_nested_replies_pass,
    ] {
        on(Kind::One, test);
    }
}

#[test]
fn one_database_keeps_the_tiers_numbers() {
    for test in [
        limits::the_key_after_the_last_is_refused_whatever_makes_it,
        limits::the_count_is_right_in_a_new_process,
        limits::no_key_outlives_its_tier_whatever_makes_it,
        limits::memory_over_the_cap_refuses_growth_and_nothing_else,
    ] {
        on(Kind::One, test);
    }
}

#[test]
fn one_database_takes_large_values_in_pieces() {
    for test in [
        large::every_form_with_its_key_in_front_passes_and_keeps_its_meaning,
        large::what_does_not_fit_the_tier_is_refused_and_the_client_goes_on,
        large::the_last_key_counts_for_large_ones_too,
        large::a_watch_survives_the_lives_that_are_set_beside_it,
    ] {
        on(Kind::One, test);
    }
}

#[test]
fn a_cluster_takes_large_values_in_pieces() {
    for test in [
        large::every_form_with_its_key_in_front_passes_and_keeps_its_meaning,
        large::the_last_key_counts_for_large_ones_too,
    ] {
        on(Kind::Cluster, test);
    }
}

#[test]
fn one_database_confines_scripts() {
    on(Kind::One, scripts::keys_that_a_script_builds_itself_are_the_tenants);
    on(Kind::One, scripts::a_script_that_reaches_for_others_is_stopped);
}

#[test]
fn one_database_replies_as_a_plain_server() {
    on(Kind::One, differential::replies_in_resp2_are_those_of_a_plain_server);
    on(Kind::One, differential::replies_in_resp3_are_those_of_a_plain_server);
}

#[test]
fn one_database_shows_nobody_anothers_data() {
    on(Kind::One, table::no_command_touches_or_shows_another_tenants_data);
}

#[test]
fn a_cluster_serves_a_client_as_one_server_would() {
    for test in [
        basic::a_client_logs_in_and_works_inside_its_prefix,
        basic::a_pipeline_keeps_its_order_whatever_is_in_it,
        basic::names_come_back_bare_in_both_protocols,
        basic::messages_stay_inside_the_tenant,
        basic::transactions_watch_and_abort,
        basic::logical_databases_are_apart,
        basic::large_values_and_nested_replies_pass,
        scripts::keys_that_a_script_builds_itself_are_the_tenants,
        limits::the_key_after_the_last_is_refused_whatever_makes_it,
        limits::no_key_outlives_its_tier_whatever_makes_it,
    ] {
        on(Kind::Cluster, test);
    }
}

/// What a change of tier asks of the server: how much a tenant has, and the caps that were decided last.
async fn standings() {
    let house = House::start().await;
    let mut client = house.client("umbrella").await;
    let mut other = house.client("hooli").await;
    for i in 0..30 {
        assert_eq!(client.run(&["SET", &format!("k{i}"), "v"]).await, "+OK");
        assert_eq!(other.run(&["SET", &format!("k{i}"), "v"]).await, "+OK");
    }
    client.line("SELECT 2").await;
    assert_eq!(client.line("SET k v").await, "+OK");
    let upstream = house.upstream();
    let org = OrgId::parse("umbrella").expect("an id");
    let usage = upstream.usage(&org).await.expect("it answers");
    assert_eq!(usage.keys, 31, "the other tenant's keys are its own");
    assert!((31 * 40..31 * 200).contains(&usage.bytes), "{usage:?}");
    assert_eq!(upstream.standing(&org).await.expect("it answers"), None);
    let standing = Standing { tier: "PRO".into(), keys: 7, memory: 8, max_ttl: 9 };
    assert!(upstream.set_standing(&org, &standing, 2, 1).await.expect("it answers"));
    assert!(!upstream.set_standing(&org, &Standing::default(), 1, 1).await.expect("it answers"), "an older one");
    assert_eq!(upstream.standing(&org).await.expect("it answers"), Some(standing));
    upstream.remove(&org, true).await.expect("it answers");
    assert_eq!(upstream.usage(&org).await.expect("it answers").keys, 0);
    assert_eq!(other.line("DBSIZE").await, ":30", "nobody else's keys went with them");
}

fn standings_test() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(standings());
}

#[test]
fn usage_and_caps_are_the_tenants_own_everywhere() {
    for kind in [Kind::Own, Kind::One, Kind::Cluster] {
        on(kind, standings_test);
    }
}
