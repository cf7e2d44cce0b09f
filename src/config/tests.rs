use super::*;

const SHIPPED: &str = include_str!("../../config/dynabase.toml");

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/dynabase.toml")
}

/// What the shipped file leaves to be filled in.
fn required() -> Vec<(String, String)> {
    [
        ("DYNABASE__IDENTITY__ISSUER", "https://issuer.example"),
        ("DYNABASE__IDENTITY__HS256_SECRET", "abcdefghijklmnopqrstuvwxyz0123456789"),
        ("DYNABASE__CATALOG__PATH", "/nonexistent/catalog"),
        ("DYNABASE__ADMIN__TOKEN", "0123456789abcdef"),
        ("DYNABASE__NAMES__ROOT_SECRET", "0123456789abcdef0123456789abcdef"),
        ("DYNABASE__UPSTREAM__POSTGRES__URL", "postgres://root:hunter2@127.0.0.1/postgres"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(&repository(), text, &required())
}

fn faults(text: &str) -> Vec<(Option<usize>, String)> {
    let error = parse(text).expect_err("faults");
    error.faults().iter().map(|fault| (fault.line, fault.key.clone())).collect()
}

#[test]
fn the_shipped_file_says_what_the_defaults_are() {
    let shipped = parse(SHIPPED).expect("it parses");
    let mut empty = parse("").expect("no key but the required ones is required");
    empty.tiers = shipped.tiers.clone();
    assert_eq!(format!("{shipped:?}"), format!("{empty:?}"));
}

#[test]
fn every_commented_key_is_a_key() {
    // A value of the wrong type tells "expected text" for a key and "unknown" for what is none.
    let text: String = SHIPPED
        .lines()
        .map(|line| match line.strip_prefix('#').and_then(|rest| rest.split_once(" = ")) {
            Some((key, _)) if !key.contains(' ') => format!("{key} = 1979-05-27\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let error = Config::parse(&repository(), &text, &[]).expect_err("dates everywhere");
    for fault in error.faults() {
        assert!(!fault.what.contains("unknown"), "{fault:?}");
    }
    assert!(error.faults().len() >= 9, "{error}");
}

#[test]
fn every_key_of_the_structs_is_in_the_shipped_file() {
    let sources = [
        include_str!("../config.rs"),
        include_str!("../upstream/postgres/config.rs"),
        include_str!("../identity/config.rs"),
        include_str!("../net/tls.rs"),
        include_str!("../front/mongo/member.rs"),
    ];
    let mut keys = 0;
    for source in sources {
        for body in source.split("deny_unknown_fields)]").skip(1) {
            let body = &body[..body.find("\n}").expect("a struct ends")];
            for field in body.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(": ")) {
                let key = field.0;
                let stands = |prefix: &str| SHIPPED.lines().any(|line| line.starts_with(&format!("{prefix}{key}")));
                assert!(["", "#", "[", "[upstream."].into_iter().any(stands) || key == "upstream", "{key} is missing");
                keys += 1;
            }
        }
    }
    assert!(keys > 35, "{keys} keys found: this test reads the source");
}

#[test]
fn one_run_names_every_fault_with_its_line() {
    let text = "alow_plaintext = true\n\
                [listen]\n\
                postgres = \"127.0.0.1\"\n\
                max_connections = 0\n\
                handshake_timeout = 15\n\
                [upstram.postgres]\n\
                url = \"postgres://x\"\n\
                [log]\n\
                format = \"xml\"\n";
    let mut tiers = faults(text);
    tiers.retain(|(_, key)| key != "tiers");
    let expected = [
        (1, "alow_plaintext"),
        (3, "listen.postgres"),
        (4, "listen.max_connections"),
        (5, "listen.handshake_timeout"),
        (6, "upstram"),
        (9, "log.format"),
    ];
    assert_eq!(tiers, expected.map(|(line, key)| (Some(line), key.to_owned())));
}

#[test]
fn broken_toml_is_told_with_its_line() {
    let error = parse("[listen]\npostgres = \n").expect_err("not TOML");
    assert_eq!(error.faults()[0].line, Some(2));
}

#[test]
fn the_environment_overrides_the_file() {
    let mut environment = required();
    for (name, value) in [
        ("DYNABASE__LISTEN__MAX_CONNECTIONS", "7"),
        ("DYNABASE__LISTEN__POSTGRES", "[\"127.0.0.1:1\", \"unix:/tmp/s\"]"),
        ("DYNABASE__ADMIN__TOKEN", "12345678901234567890"),
        ("DYNABASE__ALLOW_PLAINTEXT", "true"),
        ("DYNABASE__LOG__FILTER", "debug"),
    ] {
        environment.push((name.into(), value.into()));
    }
    let config = Config::parse(&repository(), "[listen]\nmax_connections = 9\n", &environment).expect("good");
    assert_eq!(config.listen.max_connections, 7);
    assert_eq!(config.listen.postgres.len(), 2);
    assert_eq!(config.admin.token.as_deref(), Some("12345678901234567890"));
    assert!(config.allow_plaintext);
    assert_eq!(config.log.filter, "debug");
}

#[test]
fn a_wrong_variable_is_told_by_its_name() {
    let mut environment = required();
    environment.push(("DYNABASE__LISTEN__MAX_CONECTIONS".into(), "7".into()));
    environment.push(("DYNABASE__LISTEN__DRAIN_TIMEOUT".into(), "soon".into()));
    let error = Config::parse(&repository(), "", &environment).expect_err("no such key").to_string();
    assert!(error.contains("DYNABASE__LISTEN__MAX_CONECTIONS"), "{error}");
    assert!(error.contains("DYNABASE__LISTEN__DRAIN_TIMEOUT"), "{error}");
}

#[test]
fn a_secret_may_stand_in_a_file() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("root"), "fedcba9876543210fedcba9876543210\n").expect("written");
    std::fs::write(folder.path().join("tiers.toml"), include_str!("../../config/tiers.toml")).expect("written");
    let path = folder.path().join("dynabase.toml");
    let url: Vec<_> = required().into_iter().filter(|(name, _)| !name.contains("ROOT_SECRET")).collect();
    let config = Config::parse(&path, "[names]\nroot_secret_file = \"root\"\n", &url).expect("good");
    assert_eq!(config.names.root_secret.expect("read").expose(), "fedcba9876543210fedcba9876543210");

    let error = Config::parse(&path, "[names]\nroot_secret_file = \"gone\"\n", &url).expect_err("no such file");
    assert_eq!(error.faults()[0].line, Some(2));
    let both = "[names]\nroot_secret_file = \"root\"\nroot_secret = \"x\"\n";
    let error = Config::parse(&path, both, &url).expect_err("both");
    assert!(error.to_string().contains("keep one"), "{error}");
}

#[test]
fn no_secret_is_ever_quoted() {
    let text = "[names]\nroot_secret = 31415926\n[admin]\ntoken = \"hunter2\"\n[identity]\nissuer = \"x\"\nhs256_secret = [\"hunter2\"]\n\
                [upstream.postgres]\nurl = \"mysql://u:hunter2@h/x\"\n";
    let error = Config::parse(&repository(), text, &[]).expect_err("faults").to_string();
    assert!(!error.contains("hunter2") && !error.contains("31415926"), "{error}");
    let config = format!("{:?}", parse("[admin]\ntoken = \"hunter2hunter2hunter2\"\n").expect("good"));
    assert!(!config.contains("hunter2") && !config.contains("0123456789abcdef"), "{config}");
}

#[test]
fn a_missing_secret_is_told_with_the_way_to_make_one() {
    let error = Config::parse(&repository(), SHIPPED, &[]).expect_err("required").to_string();
    assert!(error.contains("names.root_secret") && error.contains("openssl rand"), "{error}");
    assert!(error.contains("upstream.postgres.url") && error.contains("identity.issuer"), "{error}");
}

#[test]
fn a_replica_set_is_named_with_the_address_that_leads_to_us_and_not_past_us() {
    let upstream = "[upstream.mongodb]\nurl = \"mongodb://root:secret@Behind.example:27017,other.example/\"\n";
    let fault = |keys: &str| {
        let error = parse(&format!("[mongodb]\n{keys}\n{upstream}")).expect_err("a fault");
        let [fault] = error.faults() else { panic!("{error}") };
        (fault.line, fault.key.clone(), fault.what.clone())
    };
    assert_eq!(fault("replica_set = \"rs0\"").1, "mongodb.advertise");
    assert_eq!(fault("advertise = \"front.example:27018\"").1, "mongodb.replica_set");
    let (line, key, _) = fault("replica_set = \"rs0\"\nadvertise = \"front.example\"");
    assert_eq!((line, key.as_str()), (Some(3), "mongodb.advertise"));
    for past in ["behind.example:27017", "other.example:27017"] {
        let (_, key, what) = fault(&format!("replica_set = \"rs0\"\nadvertise = \"{past}\""));
        assert!(key == "mongodb.advertise" && what.contains("past this proxy"), "{key}: {what}");
    }
    let good = "[mongodb]\nreplica_set = \"rs0\"\nadvertise = \"front.example:27018\"\n";
    assert_eq!(
        parse(&format!("{good}{upstream}")).expect("good").mongodb_member().expect("one").host(),
        "front.example"
    );
}

#[test]
fn an_advertised_host_that_the_certificate_is_not_for_is_seen() {
    let folder = tempfile::tempdir().expect("a folder");
    let made = rcgen::generate_simple_self_signed(["front.example".to_owned()]).expect("a certificate");
    let (cert, key) = (folder.path().join("own.crt"), folder.path().join("own.key"));
    std::fs::write(&cert, made.cert.pem()).expect("written");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("written");
    let tls = format!("[tls]\ncert_file = {cert:?}\nkey_file = {key:?}\n");
    for (host, tls, stranger) in [
        ("front.example", tls.as_str(), None),
        ("other.example", tls.as_str(), Some("other.example")),
        ("127.0.0.1", tls.as_str(), Some("127.0.0.1")),
        // Who ends TLS, if anybody, is not known here.
        ("other.example", "", None),
    ] {
        let text = format!("[mongodb]\nreplica_set = \"rs0\"\nadvertise = \"{host}:27018\"\n{tls}");
        let config = parse(&text).expect("good");
        let member = config.mongodb_member().expect("one");
        assert_eq!(config.mongodb_stranger(&member), stranger, "{host}");
    }
}
