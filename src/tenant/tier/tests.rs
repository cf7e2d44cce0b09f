use super::*;

#[test]
fn the_shipped_file_carries_the_decided_numbers() {
    let tiers = Tiers::parse(include_str!("../../../config/tiers.toml")).expect("the shipped file parses");
    let row = |tier| {
        let pg = &tiers.limits(tier).postgres;
        let rate = (pg.rate.per_second, pg.rate.burst);
        (pg.connections, pg.client_sockets, pg.storage >> 20, pg.statement_timeout.as_secs(), rate)
    };
    assert_eq!(row(Tier::Free), (5, 50, 512, 10, (50, 100)));
    assert_eq!(row(Tier::Starter), (10, 100, 1024, 30, (200, 400)));
    assert_eq!(row(Tier::Pro), (50, 500, 4096, 60, (2_000, 4_000)));
    assert_eq!(row(Tier::Enterprise), (100, 1000, 8192, 120, (20_000, 40_000)));
}

#[test]
fn the_shipped_file_carries_the_decided_redis_numbers() {
    let tiers = Tiers::parse(include_str!("../../../config/tiers.toml")).expect("the shipped file parses");
    let row = |tier| {
        let redis = &tiers.limits(tier).redis;
        let rate = (redis.rate.per_second, redis.rate.burst);
        (redis.memory >> 20, redis.keys, redis.max_ttl.map(|ttl| ttl.as_secs()), redis.client_sockets, rate)
    };
    assert_eq!(row(Tier::Free), (50, 1_000, Some(3_600), 50, (500, 1_000)));
    assert_eq!(row(Tier::Starter), (128, 10_000, Some(86_400), 200, (2_000, 4_000)));
    assert_eq!(row(Tier::Pro), (512, 100_000, Some(604_800), 2_000, (20_000, 40_000)));
    assert_eq!(row(Tier::Enterprise), (2048, 1_000_000, None, 10_000, (200_000, 400_000)));
}

#[test]
fn the_shipped_file_carries_the_decided_mongodb_convex_and_neon_numbers() {
    let tiers = Tiers::parse(include_str!("../../../config/tiers.toml")).expect("the shipped file parses");
    let row = |tier| {
        let Limits { mongodb, convex, neon, .. } = &**tiers.limits(tier);
        let (rate, calls) = (mongodb.rate, convex.rate);
        assert_eq!((neon.rate.per_second, neon.rate.burst), (rate.per_second, rate.burst));
        (
            (mongodb.connections, mongodb.timeout.as_secs(), mongodb.client_sockets, rate.per_second, rate.burst),
            (convex.client_sockets, convex.subscriptions, convex.subscriptions_per_socket),
            (calls.per_minute, calls.burst, convex.in_flight_writes, convex.payload >> 20, convex.upload >> 20),
            (neon.connections, neon.storage >> 20, neon.min_cu_hundredths, neon.max_cu_hundredths),
            (neon.suspend_after.map(|after| after.as_secs()), neon.branches),
        )
    };
    assert_eq!(
        row(Tier::Free),
        ((2, 5, 50, 50, 100), (25, 100, 50), (300, 100, 8, 1, 10), (5, 512, 25, 25), (Some(300), 1))
    );
    assert_eq!(
        row(Tier::Starter),
        ((5, 15, 100, 200, 400), (200, 1_000, 100), (1_500, 500, 16, 4, 100), (10, 1024, 25, 100), (Some(300), 3))
    );
    assert_eq!(
        row(Tier::Pro),
        (
            (20, 30, 500, 2_000, 4_000),
            (2_000, 20_000, 500),
            (10_000, 3_000, 128, 16, 1024),
            (50, 4096, 50, 200),
            (Some(1_800), 10)
        )
    );
    assert_eq!(
        row(Tier::Enterprise),
        (
            (50, 60, 1_000, 20_000, 40_000),
            (20_000, 250_000, 1_000),
            (60_000, 20_000, 512, 16, 5120),
            (100, 8192, 100, 800),
            (None, 25)
        )
    );
}

#[test]
fn collections_and_indexes_have_numbers_where_a_file_of_before_has_none() {
    let shipped = include_str!("../../../config/tiers.toml");
    let row = |text: &str| {
        let tiers = Tiers::parse(text).expect("it parses");
        Tier::ALL.map(|tier| {
            let mongodb = &tiers.limits(tier).mongodb;
            (mongodb.collections, mongodb.indexes(mongodb.isolation))
        })
    };
    assert_eq!(row(shipped), [(100, 12), (250, 12), (1_000, 63), (5_000, 63)]);
    let before: String = shipped
        .lines()
        .filter(|line| !line.starts_with("collections = ") && !line.starts_with("indexes = "))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_eq!(row(&before), [(500, 12), (500, 12), (500, 63), (500, 63)]);
    for (from, to) in [("collections = 100\n", "collections = 0\n"), ("indexes = 12\n", "indexes = 64\n")] {
        let text = shipped.replacen(from, to, 1);
        let key = from.split(' ').next().expect("a key");
        assert!(Tiers::parse(&text).is_err_and(|faults| faults[0].contains(&format!("FREE: mongodb.{key}"))));
    }
}

#[test]
fn a_rate_has_one_unit() {
    let text = include_str!("../../../config/tiers.toml");
    for bad in ["{ burst = 100, ", "{ per_second = 1, per_minute = 1, burst = 100, "] {
        let text = text.replacen("{ per_second = 50, burst = 100, ", bad, 1);
        assert!(Tiers::parse(&text).is_err_and(|faults| faults[0].contains("postgres.rate")));
    }
}

#[test]
fn an_unknown_key_is_an_error() {
    let text = include_str!("../../../config/tiers.toml")
        .replace("client_sockets = 50\n", "client_sockets = 50\nconections = 5\n");
    assert!(Tiers::parse(&text).is_err_and(|faults| faults[0].contains("conections")));
}
