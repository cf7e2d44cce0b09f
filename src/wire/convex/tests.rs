use super::{rewrite::*, write::*, *};

const VERSION: &str = r#"{"querySet":3,"identity":1,"ts":"bHVja3kgbm8="}"#;

fn version() -> Version {
    Version { query_set: 3, identity: 1, ts: Ts::parse("bHVja3kgbm8=").expect("12 characters") }
}

#[test]
fn frames_are_understood_in_the_order_of_every_client() {
    let js = r#"{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{"type":"Add","queryId":0,"udfPath":"m:l","args":[{"a":"}]"}]}]}"#;
    let rust = r#"{"modifications":[{"args":[{"a":"}]"}],"queryId":0,"type":"Add","udfPath":"m:l"}],"baseVersion":0,"newVersion":1,"type":"ModifyQuerySet"}"#;
    for text in [js, rust] {
        let Ok(Client::ModifyQuerySet { base: 0, new: 1, modifications, all }) = client(text) else { panic!("{text}") };
        let [Modification::Add { query: 0, component: false, args, all: one }] = &modifications[..] else { panic!() };
        assert_eq!(&text[args.clone()], r#"[{"a":"}]"}]"#);
        assert_eq!(text[all.clone()], format!("[{}]", &text[one.clone()]));
    }
    let text = r#" { "requestId" : 7 , "args":[{}], "type" : "Action", "udfPath":"a:b","componentPath":null } "#;
    let call = Client::Call { kind: Kind::Action, request: 7, component: false, args: 28..32 };
    assert_eq!(client(text).as_ref(), Ok(&call));
    let text = r#"{"type":"Mutation","requestId":7,"udfPath":"a:b","args":[],"componentPath":"x"}"#;
    assert!(matches!(client(text), Ok(Client::Call { component: true, .. })));
    let text = r#"{"type":"Authenticate","baseVersion":2,"tokenType":"User","value":"ey.J.x"}"#;
    let Ok(Client::Authenticate { base: 2, caller: Caller::User { token: "ey.J.x", at } }) = client(text) else {
        panic!()
    };
    assert_eq!(replace(text, &at, "new"), text.replace("ey.J.x", "new"));
}

#[test]
fn what_two_readers_could_understand_in_two_ways_is_refused() {
    for text in [
        r#"{"type":"Mutation","type":"Event","requestId":7,"args":[]}"#,
        r#"{"ty\u0070e":"Mutation","type":"Event"}"#,
        r#"{"type":"Mutation","requestId":7,"requestId":8,"args":[]}"#,
        r#"{"type":"Mutation","requestId":7.0,"args":[]}"#,
        r#"{"type":"Mutation","requestId":4294967296,"args":[]}"#,
        r#"{"type":"Mutation","requestId":-1,"args":[]}"#,
        r#"{"type":"Mutation","requestId":7,"args":[]} {"type":"Event"}"#,
        r#"{"type":"Mutation","requestId":7,"args":[}]"#,
        r#"{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{"type":"Add","queryId":0,"queryId":1,"args":[]}]}"#,
        r#"{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{"type":"Add","queryId":0,"args":[],"component\u0050ath":"x"}]}"#,
        r#"{"type":"Authenticate","baseVersion":0,"tokenType":"User","value":"a\u0062"}"#,
        r#"{"type":"Upgrade"}"#,
        r#"["type","Event"]"#,
        r#"{"type":"Event","#,
        r#"{"type":"Event" "x":1}"#,
        r#"{"type":"Event","x":"\"#,
        "",
        "null",
    ] {
        assert!(client(text).is_err(), "{text}");
    }
    let deep = format!(r#"{{"type":"Event","x":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    assert!(client(&deep).is_err());
    let many = vec![r#"{"type":"Remove","queryId":1}"#; MODIFICATIONS_MAX + 1].join(",");
    let text = format!(r#"{{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{many}]}}"#);
    assert!(client(&text).is_err());
}

#[test]
fn a_deployments_frames_are_understood_whatever_their_order() {
    let ordered = format!(
        r#"{{"type":"Transition","startVersion":{VERSION},"endVersion":{VERSION},"modifications":[ what comes here is not read"#
    );
    assert_eq!(server(&ordered), Ok(Server::Transition { end: version() }));
    let other = format!(r#"{{"modifications":[{{"a":[1,"]"]}}],"endVersion":{VERSION},"type":"Transition"}}"#);
    assert_eq!(server(&other), Ok(Server::Transition { end: version() }));
    let text = r#"{"type":"MutationResponse","requestId":9,"success":true,"result":null,"ts":"AAAAAAAAAAA="}"#;
    assert_eq!(server(text), Ok(Server::Response { kind: Kind::Mutation, request: 9, success: true }));
    assert_eq!(server(PING), Ok(Server::Ping));
    assert_eq!(server(r#"{"type":"FromTheFuture","x":1}"#), Ok(Server::Other));
    assert!(server(r#"{"type":"Transition"}"#).is_err());
}

#[test]
fn the_version_at_the_end_is_found_in_chunks_of_any_size() {
    let whole = format!(
        r#"{{"type":"Transition","startVersion":{VERSION},"endVersion":{VERSION},"modifications":[{{"value":"\n{}"}}]}}"#,
        "é".repeat(3000)
    );
    for size in [1, 7, 100, 5000] {
        let chars: Vec<char> = whole.chars().collect();
        let mut prefix = Prefix::default();
        let parts: Vec<String> = chars.chunks(size).map(|part| part.iter().collect()).collect();
        for (at, part) in parts.iter().enumerate() {
            let frame = format!(
                r#"{{"type":"TransitionChunk","chunk":{},"partNumber":{at},"totalParts":{},"transitionId":"x"}}"#,
                quoted(part),
                parts.len()
            );
            let Ok(Server::Chunk { text, part, total }) = server(&frame) else { panic!("{frame}") };
            assert_eq!((part as usize, total as usize), (at, parts.len()));
            prefix.push(text);
        }
        assert_eq!(prefix.end(), Some(version()), "chunks of {size}");
    }
}

#[test]
fn the_argument_of_the_organisation_is_ours_whatever_the_client_writes() {
    let own = |args| with_argument(args, "orgId", "acme");
    assert_eq!(own("[]").as_deref(), Ok(r#"[{"orgId":"acme"}]"#));
    assert_eq!(own("[{}]").as_deref(), Ok(r#"[{"orgId":"acme"}]"#));
    assert_eq!(own(r#"{ "a" : [1] }"#).as_deref(), Ok(r#"{"orgId":"acme","a" : [1]}"#));
    assert_eq!(own(r#"[{"orgId":"globex","b":1}]"#).as_deref(), Ok(r#"[{"orgId":"acme","b":1}]"#));
    assert_eq!(own(r#"[{"b":{"orgId":"inner"}}]"#).as_deref(), Ok(r#"[{"orgId":"acme","b":{"orgId":"inner"}}]"#));
    for bad in [r#"[{"org\u0049d":"x"}]"#, r#"[{"orgId":"x","orgId":"y"}]"#, "[1]", "[{},{}]", "7", r#"[{}"#, "{} {}"] {
        assert!(own(bad).is_err(), "{bad}");
    }
}

#[test]
fn our_own_frames_are_frames() {
    let outcomes = [(4, Outcome::Failed { message: "a \"b\"\n", data: "{}" }), (5, Outcome::Removed)];
    let text = transition(&version(), &version(), outcomes);
    assert_eq!(server(&text), Ok(Server::Transition { end: version() }));
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["modifications"][0]["errorMessage"], "a \"b\"\n");
    for kind in [Kind::Mutation, Kind::Action] {
        let text = failed(kind, 7, "no", r#"{"code":"x"}"#);
        assert_eq!(server(&text), Ok(Server::Response { kind, request: 7, success: false }));
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok());
    }
    assert_eq!(server(&auth_error("x", 1, true)), Ok(Server::AuthError));
    let connect = r#"{"sessionId":"s","maxObservedTimestamp":"AAAAAAAAAAA=","connectionCount":1,"type":"Connect"}"#;
    let without = forget_observed(connect).expect("an object");
    assert_eq!(client(&without), Ok(Client::Connect { session: "s", connections: 1, observed: false }));
}
