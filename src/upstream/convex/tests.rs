use serde_json::Value;

use super::*;
use crate::tenant::{
    ConvexRoute, Tier,
    namespace::{NameStyle, RootSecret},
};

fn upstream(config: Config) -> Arc<Upstream> {
    let names = Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Opaque);
    Upstream::new(&config, names).expect("good").expect("there")
}

fn shared() -> Config {
    Config {
        public_url: Some("https://db.example.com".into()),
        url: Some("http://127.0.0.1:3210".into()),
        domain: Some("convex.example.com".into()),
        ..Config::default()
    }
}

fn tenant(org: &str) -> Tenant {
    Tenant::new(OrgId::parse(org).expect("an org"), Tier::Free)
}

#[test]
fn two_tenants_with_deployments_of_their_own_never_share_an_audience() {
    let upstream = upstream(shared());
    let of = |org: &str, isolation| {
        let mut tenant = tenant(org);
        tenant.routes.convex = Some(ConvexRoute { url: "https://happy-1.convex.cloud".into(), isolation });
        upstream.deployment(&tenant).expect("a deployment")
    };
    let (one, other, shared) = (of("a", Sharing::Own), of("b", Sharing::Own), of("c", Sharing::Shared));
    assert_ne!(one.audience, other.audience);
    assert_ne!(one.audience, shared.audience);
    assert_eq!((one.org_argument, shared.org_argument), (None, Some("orgId".into())));
    let default = upstream.deployment(&tenant("d")).expect("the shared one");
    assert_ne!(default.audience, shared.audience, "a token for one shared deployment is worth nothing at another");
}

#[test]
fn an_address_with_the_organisation_in_it_is_each_ones_own() {
    let upstream =
        upstream(Config { url: Some("http://convex-{org}:3210".into()), isolation: Sharing::Own, ..shared() });
    let deployment = upstream.deployment(&tenant("acme")).expect("there");
    assert_eq!(deployment.origin.to_string(), "http://convex-acme:3210");
    assert_eq!(deployment.org_argument, None);
}

#[test]
fn a_host_names_a_tenant_only_below_the_domain() {
    let upstream = upstream(shared());
    let org = |host| upstream.host_org(host).map(|org| org.to_string());
    assert_eq!(org("acme.convex.example.com").as_deref(), Some("acme"));
    assert_eq!(org("ACME.Convex.Example.Com:8080").as_deref(), Some("acme"));
    assert_eq!(org("acme.convex.example.com.").as_deref(), Some("acme"), "with the root's dot");
    assert_eq!(org("acme.convex.example.com.:8080").as_deref(), Some("acme"));
    for other in [
        "acme.convex.example.com..",
        "convex.example.com",
        ".convex.example.com",
        "a.b.convex.example.com",
        "acmeconvex.example.com",
        "",
    ] {
        assert_eq!(org(other), None, "{other}");
    }
}

#[test]
fn a_token_says_what_was_verified_and_nothing_that_the_caller_could_choose() {
    let upstream = upstream(shared());
    let tenant = tenant("acme");
    let deployment = upstream.deployment(&tenant).expect("there");
    let encode = data_encoding::BASE64URL_NOPAD;
    let theirs =
        r#"{"sub":"u","email":"a@b","org_id":"globex","iss":"evil","aud":"x","user_metadata":{"org_id":"globex"}}"#;
    let credential = format!("h.{}.s", encode.encode(theirs.as_bytes()));
    let claims = Claims { subject: "user-1", org: &tenant.org, credential: credential.as_bytes() };
    let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    let token = upstream.token(&deployment, &claims, ends);
    let parts: Vec<&str> = token.split('.').collect();
    let payload: Value = serde_json::from_slice(&encode.decode(parts[1].as_bytes()).expect("base64")).expect("JSON");
    for (claim, value) in [
        ("iss", "https://db.example.com"),
        ("sub", "user-1"),
        ("aud", deployment.audience.as_str()),
        ("org_id", "acme"),
        ("email", "a@b"),
    ] {
        assert_eq!(payload[claim], value, "{claim}");
    }
    assert_eq!(payload["exp"], 4_000_000_000_u64);
    assert!(payload.get("user_metadata").is_none());
    // The published key verifies it.
    let jwks: jsonwebtoken::jwk::JwkSet = serde_json::from_str(upstream.jwks()).expect("a key set");
    let key = jsonwebtoken::DecodingKey::from_jwk(&jwks.keys[0]).expect("a key");
    let mut rules = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::ES256);
    rules.set_audience(&[&deployment.audience]);
    assert!(jsonwebtoken::decode::<Value>(&token, &key, &rules).is_ok());
    rules.set_audience(&["convex-another"]);
    assert!(jsonwebtoken::decode::<Value>(&token, &key, &rules).is_err());
}

#[test]
fn requests_share_a_token_only_where_all_that_it_says_is_the_same() {
    let upstream = upstream(shared());
    let (acme, globex) = (tenant("acme"), tenant("globex"));
    let deployment = upstream.deployment(&acme).expect("there");
    let other = Deployment { audience: "convex-other".into(), ..deployment.clone() };
    let claims = Claims { subject: "u", org: &acme.org, credential: b"h.e30.s" };
    let soon = SystemTime::now() + Duration::from_secs(30);
    let of = |deployment: &Deployment, claims: Claims<'_>, ends| {
        let value = upstream.authorization(deployment, &claims, ends).expect("a header");
        value.to_str().expect("text").to_owned()
    };
    let first = of(&deployment, claims, None);
    assert_eq!(of(&deployment, claims, None), first);
    let others = [
        of(&other, claims, None),
        of(&deployment, Claims { subject: "v", ..claims }, None),
        of(&deployment, Claims { org: &globex.org, ..claims }, None),
        of(&deployment, Claims { credential: b"h.e31.s", ..claims }, None),
        of(&deployment, claims, Some(soon)),
    ];
    for (at, other) in others.iter().enumerate() {
        assert_ne!(*other, first, "{at}");
    }
    let ends = |value: &str| {
        let payload = value.split('.').nth(1).expect("a payload");
        let payload = data_encoding::BASE64URL_NOPAD.decode(payload.as_bytes()).expect("base64");
        serde_json::from_slice::<Value>(&payload).expect("JSON")["exp"].as_u64().expect("a time")
    };
    let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
    assert_eq!(ends(&others[4]), seconds(soon), "not longer than the caller's own");
    let left = ends(&first) - seconds(SystemTime::now());
    assert!(left >= REQUEST_TOKEN_TTL.as_secs(), "whoever gets it last has long enough too: {left}");
}

#[test]
fn every_process_has_the_same_key() {
    assert_eq!(upstream(shared()).jwks(), upstream(shared()).jwks());
}

#[test]
fn a_configuration_that_mixes_tenants_up_is_refused() {
    for (config, key) in [
        (Config { url: Some("http://{org}:1".into()), ..shared() }, "url"),
        (Config { isolation: Sharing::Own, ..shared() }, "url"),
        (Config { url: Some("http://user:pw@h".into()), ..shared() }, "url"),
        (Config { url: Some("http://h/path".into()), ..shared() }, "url"),
        (Config { public_url: None, ..shared() }, "public_url"),
        (Config { org_argument: "a\",\"b".into(), ..shared() }, "org_argument"),
        (Config { claims: vec!["org_id".into()], ..shared() }, "claims"),
        (Config { domain: Some("Example.com".into()), ..shared() }, "domain"),
    ] {
        assert!(config.faults().iter().any(|(at, _)| *at == key), "{config:?}");
    }
}
