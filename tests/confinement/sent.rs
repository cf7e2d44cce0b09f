//! A request through the rewriting, and what came out of it.

use bson::{Bson, Document};
use dynabase::{
    front::mongo::rewrite::{Request, Scope, Verdict, rewrite},
    tenant::{
        Isolation, Names, OrgId,
        namespace::{MongoNamespace, NameStyle, RootSecret},
    },
};

use super::{generate::OWN, oracle::Confined};

/// The tier's time.
pub const TIER_MS: i32 = 5000;

/// The tenant that asks, kept apart in one way.
pub struct Asker {
    pub isolation: Isolation,
    pub org: OrgId,
    pub place: MongoNamespace,
}

impl Asker {
    pub fn new(isolation: Isolation) -> Self {
        let org = OrgId::parse(OWN).expect("an id");
        let names = Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Plain);
        let place = names.mongodb(&org, isolation);
        Self { isolation, org, place }
    }

    /// What a request becomes on the wire, without a message's header; `None` where it is not sent on.
    pub fn bytes(&self, request: &Document) -> Option<Vec<u8>> {
        let (body, sections) = split(request);
        let sections: Vec<(&str, &[u8])> = sections.iter().map(|(name, all)| (name.as_str(), all.as_slice())).collect();
        self.raw(&body, &sections)
    }

    /// The same of bytes.
    pub fn raw(&self, body: &[u8], sections: &[(&str, &[u8])]) -> Option<Vec<u8>> {
        let scope = Scope {
            isolation: self.isolation,
            org: &self.org,
            place: &self.place,
            max_time_ms: TIER_MS,
            shows_org: false,
        };
        let mut out = Vec::new();
        let verdict = rewrite(&scope, &Request { body, sections }, &mut out);
        assert_eq!(matches!(verdict, Verdict::Forward(_)), !out.is_empty());
        (!out.is_empty()).then_some(out)
    }

    /// What the oracle has to prove.
    pub fn confined(&self) -> Confined<'_> {
        let org = (self.isolation == Isolation::Filter).then_some(self.org.as_str());
        Confined { org, prefix: self.place.prefix(), max_time_ms: TIER_MS }
    }
}

fn split(request: &Document) -> (Vec<u8>, Vec<(String, Vec<u8>)>) {
    let mut body = Document::new();
    let mut sections = Vec::new();
    for (key, value) in request {
        match (key.strip_prefix('@'), value) {
            (Some(name), Bson::Array(list)) => {
                let mut all = Vec::new();
                for document in list.iter().filter_map(Bson::as_document) {
                    document.to_writer(&mut all).expect("into memory");
                }
                sections.push((name.to_owned(), all));
            }
            _ => {
                body.insert(key, value);
            }
        }
    }
    let mut bytes = Vec::new();
    body.to_writer(&mut bytes).expect("into memory");
    (bytes, sections)
}

/// The document that sections are, sections under `@name`; `None` where a text in it is no UTF-8, as a server may hold.
pub fn read(out: &[u8]) -> Option<Document> {
    assert_eq!(out[..5], [0; 5], "no flags, then the body");
    let mut rest = &out[5..];
    let mut sent = Document::from_reader(take(&mut rest)).ok()?;
    while !rest.is_empty() {
        assert_eq!(rest[0], 1, "a section of kind 1");
        let size = length(&rest[1..]);
        let section = &rest[5..1 + size];
        let end = section.iter().position(|&b| b == 0).expect("a name ends");
        let name = format!("@{}", std::str::from_utf8(&section[..end]).expect("a name of ours"));
        let mut documents = &section[end + 1..];
        let mut list = Vec::new();
        while !documents.is_empty() {
            list.push(Bson::Document(Document::from_reader(take(&mut documents)).ok()?));
        }
        assert!(sent.insert(name, list).is_none(), "a section once");
        rest = &rest[1 + size..];
    }
    Some(sent)
}

fn length(bytes: &[u8]) -> usize {
    usize::try_from(i32::from_le_bytes(bytes[..4].try_into().expect("4 bytes"))).expect("not negative")
}

/// The document that bytes begin with.
fn take<'b>(bytes: &mut &'b [u8]) -> &'b [u8] {
    let (document, rest) = bytes.split_at(length(bytes));
    *bytes = rest;
    document
}
