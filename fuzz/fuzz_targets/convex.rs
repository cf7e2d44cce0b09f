//! Convex' frames: whatever is understood of one is what a whole JSON parser understands, and no rewritten arguments
//! name another organisation.
#![no_main]

use dynabase::wire::convex::{Client, Modification, Prefix, Server, client, rewrite, server};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let whole: Option<Value> = serde_json::from_str(text).ok();
    if let (Ok(frame), Some(whole)) = (client(text), &whole) {
        let number = |value: &Value| value.as_u64().expect("a number");
        match frame {
            Client::Connect { session, connections, .. } => {
                assert_eq!((&whole["type"], &whole["sessionId"]), (&"Connect".into(), &session.into()));
                assert_eq!(number(&whole["connectionCount"]), u64::from(connections));
                let without: Value = serde_json::from_str(&rewrite::forget_observed(text).expect("read")).expect("JSON");
                assert!(without.get("maxObservedTimestamp").is_none());
            }
            Client::Authenticate { base, .. } => assert_eq!(number(&whole["baseVersion"]), u64::from(base)),
            Client::ModifyQuerySet { new, modifications, .. } => {
                assert_eq!(number(&whole["newVersion"]), u64::from(new));
                let theirs = whole["modifications"].as_array().expect("an array");
                assert_eq!(theirs.len(), modifications.len());
                for (one, whole) in modifications.iter().zip(theirs) {
                    let (query, all) = match one {
                        Modification::Add { query, all, component, .. } => {
                            assert_eq!(*component, whole.get("componentPath").is_some_and(|it| !it.is_null()));
                            (query, all)
                        }
                        Modification::Remove { query, all } => (query, all),
                    };
                    assert_eq!(number(&whole["queryId"]), u64::from(*query));
                    assert_eq!(&serde_json::from_str::<Value>(&text[all.clone()]).expect("JSON"), whole);
                }
            }
            Client::Call { request, component, args, .. } => {
                assert_eq!(number(&whole["requestId"]), u64::from(request));
                assert_eq!(component, whole.get("componentPath").is_some_and(|it| !it.is_null()));
                assert_eq!(serde_json::from_str::<Value>(&text[args]).expect("JSON"), whole["args"]);
            }
            Client::Event => assert_eq!(whole["type"], "Event"),
        }
    }
    if let Ok(own) = rewrite::with_argument(text, "orgId", "acme")
        && let Ok(own) = serde_json::from_str::<Value>(&own)
    {
        let first = own.get(0).unwrap_or(&own);
        assert_eq!(first["orgId"], "acme");
    }
    if let Ok(Server::Chunk { text, .. }) = server(text) {
        let mut prefix = Prefix::default();
        prefix.push(text);
        prefix.push(text);
    }
});
