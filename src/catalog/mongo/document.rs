//! Documents as MongoDB holds them: the same fields as in files, dates as dates, and what is unknown to us as it is.

use bson::{Bson, DateTime, Document, RawDocument, oid::ObjectId};
use serde_json::Value;

use crate::{
    catalog::{
        date,
        document::{KeyRecord, Record, unhex},
        source::{Found, Stamp},
    },
    tenant::{OrgId, directory::KeyHash},
};

/// Written by the server with each of our writes, for people to see; not a part of the record.
pub(super) const UPDATED_AT: &str = "updated_at";

/// Fields that are dates here and text in a record.
const DATES: [&str; 2] = ["created_at", "expires_at"];

/// Fields that count: a whole number, whatever type a shell gave it.
const COUNTERS: [&str; 2] = ["epoch", "generation"];

/// Largest whole number that a double holds exactly.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// The organisation whose document this is.
pub(super) fn org_of(raw: &RawDocument) -> Option<OrgId> {
    let id = raw.get_str("_id").ok()?;
    // In another spelling it is nobody's.
    OrgId::parse(id).filter(|org| org.as_str() == id)
}

/// The key whose document this is.
pub(super) fn key_of(raw: &RawDocument) -> Option<KeyHash> {
    unhex(raw.get_str("_id").ok()?)
}

pub(super) fn org(raw: &RawDocument, org: &OrgId) -> Found<Record> {
    found(raw, |value| Record::from_value(value, org))
}

pub(super) fn key(raw: &RawDocument, hash: &KeyHash) -> Found<KeyRecord> {
    found(raw, |value| KeyRecord::from_value(value, hash))
}

fn found<T>(raw: &RawDocument, parse: impl FnOnce(Value) -> Result<T, String>) -> Found<T> {
    let stamp = stamp(raw);
    match value(raw).and_then(parse) {
        Ok(record) => Found::Good(record, stamp),
        Err(what) => Found::Damaged(what, stamp.0[0], stamp),
    }
}

pub(super) fn stamp(raw: &RawDocument) -> Stamp {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    raw.as_bytes().hash(&mut hasher);
    Stamp([hasher.finish(), raw.as_bytes().len() as u64, 0])
}

/// A document as the JSON of a file.
fn value(raw: &RawDocument) -> Result<Value, String> {
    let mut document = Document::new();
    for element in raw.iter() {
        let (name, element) = element.map_err(|_| "it is not BSON".to_owned())?;
        let name = name.to_string();
        if name == UPDATED_AT {
            continue;
        }
        let mut bson = Bson::try_from(element).map_err(|_| "it is not BSON".to_owned())?;
        if DATES.contains(&name.as_str())
            && let Bson::DateTime(at) = bson
        {
            bson = Bson::String(date::format(at.to_system_time()));
        }
        if COUNTERS.contains(&name.as_str())
            && let Bson::Double(number) = bson
            && number.fract() == 0.0
            && (0.0..=EXACT).contains(&number)
        {
            // Old shells write every number as a double.
            bson = Bson::Int64(number as i64);
        }
        if document.insert(name, bson).is_some() {
            return Err("a field is there twice".into());
        }
    }
    Ok(Bson::Document(document).into_relaxed_extjson())
}

/// A record's JSON as a document.
///
/// # Errors
/// In words: a value that only looks like one of MongoDB's own.
pub(super) fn document(json: &[u8]) -> Result<Document, String> {
    let value: Value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let Ok(Bson::Document(mut document)) = Bson::try_from(value) else {
        return Err("a field begins with $ and is no extended JSON".into());
    };
    for name in DATES {
        if let Some(Bson::String(text)) = document.get(name)
            && let Some(at) = date::parse(text)
        {
            document.insert(name, DateTime::from_system_time(at));
        }
    }
    for name in COUNTERS {
        // So that it can grow in place for ever.
        if let Some(Bson::Int32(number)) = document.get(name) {
            let number = i64::from(*number);
            document.insert(name, number);
        }
    }
    Ok(document)
}

/// The name of a damaged document's `_id`, for people.
pub(super) fn name(raw: &RawDocument) -> String {
    match raw.get("_id") {
        Ok(Some(bson::RawBsonRef::String(id))) => id.chars().take(64).collect(),
        Ok(Some(bson::RawBsonRef::ObjectId(id))) => ObjectId::to_hex(id),
        Ok(Some(other)) => format!("{:?}", other.element_type()),
        _ => "without _id".into(),
    }
}

#[cfg(test)]
mod tests {
    use bson::{RawDocumentBuf, doc};

    use super::*;

    fn read(document: &Document) -> Found<Record> {
        let raw = RawDocumentBuf::try_from(document).expect("BSON");
        org(&raw, &OrgId::parse("acme").expect("an id"))
    }

    #[test]
    fn what_a_shell_writes_is_understood() {
        let at = DateTime::from_millis(1_577_934_245_000);
        let written = doc! {
            "_id": "acme", "tier": "PRO", "status": "active", "epoch": 3.0, "generation": 2_i64, "created_at": at,
            "updated_at": at, "owner": ObjectId::from_bytes([7; 12]), "since": at,
        };
        let Found::Good(record, _) = read(&written) else { panic!("it is good") };
        assert_eq!((record.tenant.epoch, record.tenant.generation), (3, 2));
        assert_eq!(record.created_at, "2020-01-02T03:04:05Z");
        // And goes back as it was, type by type.
        let again = document(&record.to_json()).expect("a document");
        for name in ["_id", "tier", "created_at", "owner", "since"] {
            assert_eq!(again.get(name), written.get(name), "{name}");
        }
        assert_eq!(again.get("epoch"), Some(&Bson::Int64(3)));
    }

    #[test]
    fn what_is_no_record_is_damaged() {
        let good = doc! {"_id": "acme", "tier": "PRO", "status": "active", "epoch": 1};
        assert!(matches!(read(&good), Found::Good(..)));
        for (name, value) in [
            ("epoch", Bson::Double(1.5)),
            ("epoch", Bson::Double(f64::NAN)),
            ("epoch", Bson::Double(-1.0)),
            ("epoch", Bson::String("1".into())),
            ("epoch", Bson::Null),
            ("tier", Bson::String("GOLD".into())),
            ("status", Bson::Array(vec![])),
            ("_id", Bson::String("globex".into())),
            ("databases", Bson::String("app".into())),
            ("generation", Bson::Int64(i64::MAX)),
        ] {
            let mut bad = good.clone();
            bad.insert(name, value);
            assert!(matches!(read(&bad), Found::Damaged(..)), "{bad}");
        }
        let twice = bson::rawdoc! {"_id": "acme", "tier": "PRO", "status": "active", "epoch": 1};
        let mut bytes = twice.into_bytes();
        let tier = b"\x02tier\0\x05\0\0\0FREE\0";
        let end = bytes.len() - 1;
        bytes.splice(end..end, tier.iter().copied());
        let length = i32::try_from(bytes.len()).expect("small");
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        let raw = RawDocumentBuf::from_bytes(bytes).expect("BSON");
        assert!(matches!(org(&raw, &OrgId::parse("acme").expect("an id")), Found::Damaged(..)));
    }
}
