//! Tokens that must not pass, each with the one fault that it is refused for.

use aws_lc_rs::hmac;

use super::*;

type Row = (&'static str, Vec<u8>, TokenFault);

fn es(claims: &str) -> Vec<u8> {
    ISSUED_BY.es256(ES, claims).into_bytes()
}

fn es_with(changes: Value) -> Vec<u8> {
    es(&with(changes))
}

/// A token with the good claims under this header, signed with the EC key.
fn headed(header: &str) -> Vec<u8> {
    ISSUED_BY.es256(header, &good().to_string()).into_bytes()
}

fn shape() -> Vec<Row> {
    use TokenFault::*;
    let good = ISSUED_BY.es256(ES, &good().to_string());
    let [header, claims, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!("three parts") };
    let b64 = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let legacy = |role: &str| {
        let claims = json!({"iss": "supabase", "ref": "project", "role": role, "iat": 1, "exp": 4_102_444_800u64});
        hs256(SECRET, HS, &claims.to_string()).into_bytes()
    };
    // The last character of a 64-byte signature carries 4 unused bits; setting one must not make a second spelling.
    let mut respelled = good.clone().into_bytes();
    let last = respelled.pop().expect("not empty");
    respelled.push(if last == b'Q' { b'R' } else { last + 1 });
    vec![
        ("empty", vec![], Malformed),
        ("dots only", b"..".to_vec(), Malformed),
        ("two parts", format!("{header}.{claims}").into_bytes(), Malformed),
        ("four parts", format!("{good}.{signature}").into_bytes(), Malformed),
        ("a dot behind", format!("{good}.").into_bytes(), Malformed),
        ("two dots behind", format!("{good}..").into_bytes(), Malformed),
        ("a dot before", format!(".{good}").into_bytes(), Malformed),
        ("a space behind", format!("{good} ").into_bytes(), Malformed),
        ("a line end behind", format!("{good}\n").into_bytes(), Malformed),
        ("padding", format!("{good}=").into_bytes(), Malformed),
        ("padding twice", format!("{good}==").into_bytes(), Malformed),
        ("another spelling of the signature", respelled, Malformed),
        ("standard base64", good.replace(['-', '_'], "+").replacen('e', "/", 1).into_bytes(), Malformed),
        ("a word", b"password".to_vec(), Malformed),
        ("Bearer before it", format!("Bearer {good}").into_bytes(), Malformed),
        ("20 KB", es_with(json!({"pad": "x".repeat(20_000)})), Malformed),
        ("not UTF-8", [good.as_bytes(), b"\xff\xfe"].concat(), Malformed),
        ("a NUL", [good.as_bytes(), b"\0"].concat(), Malformed),
        ("header not JSON", headed("alg"), Malformed),
        ("header a list", headed(r#"["ES256"]"#), Malformed),
        ("bytes behind the header", headed(&format!("{ES}x")), Malformed),
        ("claims not JSON", es("claims"), Malformed),
        ("claims a string", es("\"claims\""), Malformed),
        ("bytes behind the claims", es(&format!("{}{{}}", super::good())), Malformed),
        (
            "claims not UTF-8",
            format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(b"{\"a\":\"\xff\"}")).into_bytes(),
            Signature,
        ),
        ("deep nesting", es(&format!("{{\"a\":{}{}}}", "[".repeat(500), "]".repeat(500))), Malformed),
        ("a publishable key", b"sb_publishable_0123456789abcdef".to_vec(), ApiKey),
        ("a secret key", b"sb_secret_0123456789abcdef".to_vec(), ApiKey),
        ("the legacy anon key", legacy("anon"), Issuer),
        ("the legacy service_role key", legacy("service_role"), Issuer),
        (
            "claims replaced",
            format!("{header}.{}.{signature}", b64(&with(json!({"org_id": "globex"})))).into_bytes(),
            Signature,
        ),
    ]
}

fn header() -> Vec<Row> {
    use TokenFault::*;
    let claims = good().to_string();
    let none = |name: &str| {
        let header = format!(r#"{{"alg":"{name}","kid":"es-1"}}"#);
        token(&header, &claims, |_| vec![]).into_bytes()
    };
    let hmac = |algorithm, name: &str, secret: &[u8], kid: &str| {
        let key = hmac::Key::new(algorithm, secret);
        let header = format!(r#"{{"alg":"{name}"{kid}}}"#);
        token(&header, &claims, |signed| hmac::sign(&key, signed).as_ref().to_vec()).into_bytes()
    };
    let pem = ISSUED_BY.rsa_pem();
    let attacker = super::Issuer::new();
    let jwk = format!(r#"{{"alg":"ES256","kid":"mine","jwk":{}}}"#, attacker.ec_jwk("mine"));
    let jku = r#"{"alg":"ES256","kid":"mine","jku":"https://evil.example/jwks.json"}"#;
    let x5u = r#"{"alg":"ES256","kid":"es-1","x5u":"https://evil.example/c.pem","x5c":["MIIB"]}"#;
    let long = format!(r#"{{"alg":"ES256","kid":"{}"}}"#, "k".repeat(200));
    vec![
        ("alg none", none("none"), Algorithm),
        ("alg None", none("None"), Algorithm),
        ("alg nOnE", none("nOnE"), Algorithm),
        ("alg NONE", none("NONE"), Algorithm),
        ("alg empty", none(""), Algorithm),
        ("alg missing", headed(r#"{"kid":"es-1"}"#), Algorithm),
        ("alg a list", headed(r#"{"alg":["ES256"],"kid":"es-1"}"#), Algorithm),
        ("alg in lower case", headed(r#"{"alg":"es256","kid":"es-1"}"#), Algorithm),
        ("alg with a space", headed(r#"{"alg":"ES256 ","kid":"es-1"}"#), Algorithm),
        (
            "RSA public key as HMAC secret, its kid",
            hmac(hmac::HMAC_SHA256, "HS256", pem.as_bytes(), r#","kid":"rs-1""#),
            Algorithm,
        ),
        ("RSA public key as HMAC secret, no kid", hmac(hmac::HMAC_SHA256, "HS256", pem.as_bytes(), ""), Signature),
        (
            "the right secret under a public key's kid",
            hmac(hmac::HMAC_SHA256, "HS256", SECRET.as_bytes(), r#","kid":"es-1""#),
            Algorithm,
        ),
        ("an empty secret", hmac(hmac::HMAC_SHA256, "HS256", b"", ""), Signature),
        ("HS384", hmac(hmac::HMAC_SHA384, "HS384", SECRET.as_bytes(), ""), Algorithm),
        ("HS512", hmac(hmac::HMAC_SHA512, "HS512", SECRET.as_bytes(), ""), Algorithm),
        ("PS256", ISSUED_BY.ps256(r#"{"alg":"PS256","kid":"rs-1"}"#, &claims).into(), Algorithm),
        ("PS256 that says RS256", ISSUED_BY.ps256(RS, &claims).into(), Signature),
        ("RS256 with the EC key's id", ISSUED_BY.rs256(r#"{"alg":"RS256","kid":"es-1"}"#, &claims).into(), Algorithm),
        ("ES256 with the RSA key's id", headed(r#"{"alg":"ES256","kid":"rs-1"}"#), Algorithm),
        ("ES256 in DER", ISSUED_BY.es256_der(ES, &claims).into(), Signature),
        ("no signature", token(ES, &claims, |_| vec![]).into(), Signature),
        ("63 bytes of signature", token(ES, &claims, |_| vec![1; 63]).into(), Signature),
        ("65 bytes of signature", token(ES, &claims, |_| vec![1; 65]).into(), Signature),
        ("r and s zero", token(ES, &claims, |_| vec![0; 64]).into(), Signature),
        ("another issuer's key", attacker.es256(ES, &claims).into(), Signature),
        ("a key of its own in the header", attacker.es256(&jwk, &claims).into(), UnknownKey),
        ("the address of its key in the header", attacker.es256(jku, &claims).into(), UnknownKey),
        ("a certificate in the header", attacker.es256(x5u, &claims).into(), Signature),
        ("no kid", headed(r#"{"alg":"ES256"}"#), UnknownKey),
        ("an empty kid", headed(r#"{"alg":"ES256","kid":""}"#), UnknownKey),
        ("a kid that is a path", headed(r#"{"alg":"ES256","kid":"../../../dev/null"}"#), UnknownKey),
        ("a kid that is SQL", headed(r#"{"alg":"ES256","kid":"x' UNION SELECT 'es-1"}"#), UnknownKey),
        ("a kid of 200 bytes", headed(&long), Header),
        ("a kid that is a number", headed(r#"{"alg":"ES256","kid":1}"#), Header),
        ("a kid that is null", headed(r#"{"alg":"ES256","kid":null}"#), Header),
        ("crit", headed(r#"{"alg":"ES256","kid":"es-1","crit":["exp"],"exp":1}"#), Header),
        ("an empty crit", headed(r#"{"alg":"ES256","kid":"es-1","crit":[]}"#), Header),
        ("alg twice", headed(r#"{"alg":"none","alg":"ES256","kid":"es-1"}"#), Malformed),
        ("kid twice, once escaped", headed(r#"{"alg":"ES256","kid":"es-1","k\u0069d":"es-1"}"#), Malformed),
    ]
}

fn claims() -> Vec<Row> {
    use TokenFault::*;
    let twice = |more: &str| es(&good().to_string().replacen('{', &format!("{{{more},"), 1));
    let inside = good().to_string().replace(r#""provider":"email""#, r#""org_id":"a","org_id":"b""#);
    let raw = |name: &str, text: &str| es(&with(json!({name: "@"})).replace("\"@\"", text));
    let now = unix_now();
    let mut rows = vec![
        ("org_id twice", twice(r#""org_id":"globex""#), Malformed),
        ("exp twice", twice(r#""exp":9999999999"#), Malformed),
        ("org_id twice in app_metadata", es(&inside), Malformed),
        ("expired", es_with(json!({"exp": now - 31})), Expired),
        ("exp zero", es_with(json!({"exp": 0})), Expired),
        ("exp a string", es_with(json!({"exp": "9999999999"})), Claims),
        ("exp with a fraction", raw("exp", "9999999999.5"), Claims),
        ("exp negative", raw("exp", "-1"), Claims),
        ("exp 1e30", raw("exp", "1e30"), Claims),
        ("exp 2^64", raw("exp", "18446744073709551616"), Claims),
        ("exp 2^64-1", raw("exp", "18446744073709551615"), Claims),
        ("exp 2^63-1, to which no leeway can be added", raw("exp", "9223372036854775807"), Claims),
        ("exp 1e400", raw("exp", "1e400"), Malformed),
        ("exp NaN", raw("exp", "NaN"), Malformed),
        ("exp null", raw("exp", "null"), Claims),
        ("exp true", raw("exp", "true"), Claims),
        ("not yet valid", es_with(json!({"nbf": now + 90})), NotYetValid),
        ("issued in the future", es_with(json!({"iat": now + 90})), NotYetValid),
        ("nbf a string", es_with(json!({"nbf": "0"})), Claims),
        ("another issuer", es_with(json!({"iss": "https://other.supabase.co/auth/v1"})), Issuer),
        ("the issuer with a slash", es_with(json!({"iss": format!("{ISSUER}/")})), Issuer),
        ("the issuer in capitals", es_with(json!({"iss": ISSUER.to_uppercase()})), Issuer),
        ("iss a list", es_with(json!({"iss": [ISSUER]})), Claims),
        ("another audience", es_with(json!({"aud": "anon"})), Audience),
        ("a list of other audiences", es_with(json!({"aud": ["anon", "x"]})), Audience),
        ("an empty list of audiences", es_with(json!({"aud": []})), Audience),
        ("an audience list with a number", es_with(json!({"aud": ["authenticated", 1]})), Claims),
        ("aud an object", es_with(json!({"aud": {"authenticated": true}})), Claims),
        ("sub no UUID", es_with(json!({"sub": "admin"})), Claims),
        ("sub empty", es_with(json!({"sub": ""})), Claims),
        ("session_id empty", es_with(json!({"session_id": ""})), Claims),
        ("session_id a number", es_with(json!({"session_id": 1})), Claims),
        ("role anon", es_with(json!({"role": "anon"})), Role),
        ("role service_role", es_with(json!({"role": "service_role"})), Role),
        ("role with a space", es_with(json!({"role": "authenticated "})), Role),
        ("role a list", es_with(json!({"role": ["authenticated"]})), Claims),
        ("org_id in user_metadata only", es_with(json!({"org_id": null})), NoOrg),
        ("app_metadata a string", es_with(json!({"org_id": null, "app_metadata": "org_id"})), NoOrg),
        ("app_metadata a list", es_with(json!({"org_id": null, "app_metadata": [{"org_id": "acme"}]})), NoOrg),
        ("org_id null", raw("org_id", "null"), BadOrg),
        ("a bad org_id does not give way", es_with(json!({"org_id": 1, "app_metadata": {"org_id": "acme"}})), BadOrg),
    ];
    for name in ["exp", "iss", "aud", "sub", "session_id", "role"] {
        rows.push(("a required claim is missing", es_with(json!({name: null})), Claims));
    }
    rows
}

#[tokio::test]
async fn no_hostile_token_passes_and_each_is_refused_for_its_fault() {
    let (verifier, _folder) = verifier(Some(SECRET)).await;
    let rows: Vec<Row> = [shape(), header(), claims()].concat();
    assert!(rows.len() > 100, "{}", rows.len());
    for (what, credential, expected) in rows {
        // Twice: the second answer may come from memory, and must be the same.
        for _ in 0..2 {
            assert_eq!(fault(&verifier, &credential).await, Some(expected), "{what}");
        }
    }
}

#[tokio::test]
async fn organisation_ids_that_could_break_out_of_a_name_are_refused() {
    let (verifier, _folder) = verifier(None).await;
    let bad = [
        json!(""),
        json!("acme'"),
        json!("acme\""),
        json!("acme:x"),
        json!("acme/x"),
        json!("../acme"),
        json!("a\0b"),
        json!("аcme"),
        json!("acme\u{200b}"),
        json!("ａcme"),
        json!("acme "),
        json!("ACME"),
        json!("a.b"),
        json!("-a"),
        json!("a\n"),
        json!("$where"),
        json!("{acme}"),
        json!("*"),
        json!("x".repeat(65)),
        json!("x".repeat(49)),
        json!(1),
        json!(["acme"]),
        json!({"$ne": ""}),
        json!(true),
        json!("%61cme"),
        json!("acme;--"),
    ];
    for org in bad {
        for claims in [with(json!({"org_id": org})), with(json!({"org_id": null, "app_metadata": {"org_id": org}}))] {
            assert_eq!(fault(&verifier, es(&claims)).await, Some(TokenFault::BadOrg), "{claims}");
        }
    }
}

#[tokio::test]
async fn algorithms_need_what_they_are_verified_by() {
    let (without_secret, _folder) = verifier(None).await;
    let claims = good().to_string();
    assert_eq!(fault(&without_secret, hs256(SECRET, HS, &claims)).await, Some(TokenFault::Algorithm));
    assert_eq!(fault(&without_secret, hs256("", HS, &claims)).await, Some(TokenFault::Algorithm));
    let config = Config { hs256_secret: Some(Secret::new(SECRET)), ..Config::new(ISSUER) };
    let without_keys = Verifier::new(&config, Directory::new().0).expect("a good configuration");
    assert_eq!(fault(&without_keys, es(&claims)).await, Some(TokenFault::Algorithm));
    assert_eq!(fault(&without_keys, hs256(SECRET, HS, &claims)).await, None);
}
