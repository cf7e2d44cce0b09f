//! Tables of requests: what becomes of each, in both isolations.

mod escapes;
mod filter;
mod table;

use bson::{Bson, Document};

use super::{Fault, Forward, Request, Scope, Verdict, rewrite};
use crate::{
    front::mongo::commands::Emulate,
    tenant::{
        Isolation, Names, OrgId,
        namespace::{MongoNamespace, NameStyle, RootSecret},
    },
};

/// The tier's time in the tables.
const TIER_MS: i32 = 5000;

/// What a request became, readable.
#[derive(Debug, PartialEq)]
pub(super) enum Became {
    /// Body, with its sections under `@name`.
    Sent(Document),
    /// The front answers.
    Here(Emulate),
    /// Refused with that code.
    No(i32),
    /// Refused statements by index and code.
    Failed(Vec<(usize, i32)>),
}

pub(super) fn place(isolation: Isolation) -> (OrgId, MongoNamespace) {
    let org = OrgId::parse("acme").expect("an id");
    let root = RootSecret::new(&[7; 32]).expect("32 bytes");
    let place = Names::new(root, NameStyle::Plain).mongodb(&org, isolation);
    (org, place)
}

/// An ordered document out of text; `$db: "app"` is added where there is none.
pub(super) fn parse(text: &str) -> Document {
    let mut document: Document = serde_json::from_str(text).unwrap_or_else(|why| panic!("{why}: {text}"));
    if !document.contains_key("$db") {
        document.insert("$db", "app");
    }
    document
}

fn bytes(document: &Document) -> Vec<u8> {
    let mut bytes = Vec::new();
    document.to_writer(&mut bytes).expect("into memory");
    bytes
}

/// Runs a request; keys that begin with `@` are sections.
pub(super) fn run_document(isolation: Isolation, request: &Document) -> Became {
    let mut body = Document::new();
    let mut sections: Vec<(String, Vec<u8>)> = Vec::new();
    for (key, value) in request {
        match (key.strip_prefix('@'), value) {
            (Some(name), Bson::Array(list)) => {
                let all = list.iter().map(|item| bytes(item.as_document().expect("a document"))).collect::<Vec<_>>();
                sections.push((name.to_owned(), all.concat()));
            }
            _ => {
                body.insert(key, value);
            }
        }
    }
    let sections: Vec<(&str, &[u8])> = sections.iter().map(|(name, all)| (name.as_str(), all.as_slice())).collect();
    run_bytes(isolation, &bytes(&body), &sections)
}

pub(super) fn run_bytes(isolation: Isolation, body: &[u8], sections: &[(&str, &[u8])]) -> Became {
    let (org, place) = place(isolation);
    let scope = Scope { isolation, org: &org, place: &place, max_time_ms: TIER_MS, shows_org: false };
    let mut out = b"before".to_vec();
    match rewrite(&scope, &Request { body, sections }, &mut out) {
        Verdict::Forward(_) => Became::Sent(sent(&out[6..])),
        Verdict::Local(local) => {
            assert_eq!(out, b"before");
            Became::Here(local.emulate)
        }
        Verdict::Refuse(Fault { failed, code, .. }) => {
            assert_eq!(out, b"before");
            if failed.is_empty() {
                Became::No(code)
            } else {
                Became::Failed(failed.iter().map(|failed| (failed.index, failed.code)).collect())
            }
        }
    }
}

/// What stands in a buffer, checked to be nothing but sections.
pub(super) fn sent(mut out: &[u8]) -> Document {
    assert_eq!(out[..5], [0; 5], "no flags, then the body");
    out = &out[5..];
    let body = crate::wire::mongo::bson::Document::split(out).expect("a body");
    let mut document = Document::from_reader(body.0.bytes()).expect("BSON");
    out = body.1;
    while !out.is_empty() {
        assert_eq!(out[0], 1);
        let size = i32::from_le_bytes(out[1..5].try_into().expect("4 bytes")) as usize;
        let end = out[5..].iter().position(|&b| b == 0).expect("a name") + 5;
        let name = format!("@{}", std::str::from_utf8(&out[5..end]).expect("text"));
        let mut rest = &out[end + 1..1 + size];
        let mut list = Vec::new();
        while !rest.is_empty() {
            let (one, behind) = crate::wire::mongo::bson::Document::split(rest).expect("a document");
            list.push(Bson::Document(Document::from_reader(one.bytes()).expect("BSON")));
            rest = behind;
        }
        document.insert(name, list);
        out = &out[1 + size..];
    }
    document
}

/// Keeps the scope's parts alive for a test that looks at the verdict itself.
pub(super) fn forwarded<T>(isolation: Isolation, text: &str, look: impl FnOnce(Forward<'_>, &[u8]) -> T) -> T {
    let (org, place) = place(isolation);
    let scope = Scope { isolation, org: &org, place: &place, max_time_ms: TIER_MS, shows_org: false };
    let body = bytes(&parse(text));
    let mut out = Vec::new();
    match rewrite(&scope, &Request { body: &body, sections: &[] }, &mut out) {
        Verdict::Forward(forward) => look(forward, &out),
        other => panic!("{text}: {other:?}"),
    }
}

/// A document as text, in which only what is in it counts.
pub(super) fn shown(document: &Document) -> String {
    document.to_string().replace(' ', "")
}

/// One line of a table: the request, and what it becomes without `$db` and `maxTimeMS` where these are as always; or
/// a code, or the name of an answer.
pub(super) fn check(isolation: Isolation, request: &str, expected: &str) {
    let asked = parse(request);
    let admin = asked.get("$db").and_then(Bson::as_str) == Some("admin");
    let became = match run_document(isolation, &asked) {
        Became::Sent(mut sent) => {
            if !admin {
                let (_, place) = place(isolation);
                let db = place.physical(asked.get_str("$db").expect("text")).expect("a name");
                assert_eq!(sent.remove("$db"), Some(Bson::String(db)), "{request}");
            }
            if !asked.contains_key("maxTimeMS") && sent.get("maxTimeMS") == Some(&Bson::Int32(TIER_MS)) {
                sent.remove("maxTimeMS");
            }
            shown(&sent)
        }
        Became::Here(emulate) => format!("{emulate:?}"),
        Became::No(code) => code.to_string(),
        Became::Failed(failed) => {
            failed.iter().map(|(index, code)| format!("{index}:{code}")).collect::<Vec<_>>().join(" ")
        }
    };
    let wanted = match serde_json::from_str::<Document>(expected) {
        Ok(document) => shown(&document),
        Err(_) => expected.to_owned(),
    };
    assert_eq!(became, wanted, "\n  request {request}\n  became  {became}\n  wanted  {wanted}");
}

/// A table in one isolation.
pub(super) fn check_all(isolation: Isolation, table: &[(&str, &str)]) {
    for (request, expected) in table {
        check(isolation, request, expected);
    }
}
