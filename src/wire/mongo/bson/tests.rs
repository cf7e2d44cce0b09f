use bson::{Bson, RawDocumentBuf, doc, oid::ObjectId, spec::BinarySubtype};
use proptest::prelude::*;

use super::*;

fn raw(document: &bson::Document) -> Vec<u8> {
    RawDocumentBuf::try_from(document).expect("encodes").into_bytes()
}

fn everything() -> bson::Document {
    doc! {
        "double": 1.5, "string": "text", "document": { "a": { "b": [1, 2, { "c": 3 }] } }, "array": ["x", null],
        "binary": bson::Binary { subtype: BinarySubtype::Uuid, bytes: vec![7; 16] }, "undefined": Bson::Undefined,
        "id": ObjectId::from_bytes([9; 12]), "yes": true, "date": bson::DateTime::from_millis(5), "null": null,
        "regex": Bson::RegularExpression(bson::Regex { pattern: "^a".try_into().expect("no NUL"), options: "i".try_into().expect("no NUL") }),
        "code": Bson::JavaScriptCode("f".into()), "symbol": Bson::Symbol("s".into()),
        "scope": Bson::JavaScriptCodeWithScope(bson::JavaScriptCodeWithScope { code: "f".into(), scope: doc! { "v": 1 } }),
        "int": 7, "timestamp": bson::Timestamp { time: 1, increment: 2 }, "long": 8_i64,
        "decimal": "12.30".parse::<bson::Decimal128>().expect("a decimal"), "min": Bson::MinKey, "max": Bson::MaxKey,
    }
}

#[test]
fn every_type_is_walked_and_copied_unchanged() {
    let bytes = raw(&everything());
    let document = Document::new(&bytes).expect("a document");
    validate(document, DEPTH_MAX).expect("sound");
    let mut out = Vec::new();
    let copy = open(&mut out);
    let mut names = Vec::new();
    for element in document {
        let element = element.expect("an element");
        names.push(element.name().expect("UTF-8").to_owned());
        put(&mut out, &element);
    }
    close(&mut out, copy);
    assert_eq!(out, bytes);
    assert_eq!(names, everything().keys().cloned().collect::<Vec<_>>());
}

#[test]
fn what_is_written_is_what_the_reference_encoder_writes() {
    let mut out = Vec::new();
    let body = open(&mut out);
    put_i32(&mut out, "find", 1);
    let inner = open_document(&mut out, "filter");
    put_str(&mut out, "name", "ä");
    put_i64(&mut out, "long", -1);
    put_null(&mut out, "none");
    close(&mut out, inner);
    let list = open_array(&mut out, "list");
    for at in 0..11 {
        put_bool(&mut out, Index::new(at).as_str(), at == 10);
    }
    close(&mut out, list);
    put_f64(&mut out, "ok", 1.0);
    put_date(&mut out, "at", 3);
    put_object_id(&mut out, "id", &[1; 12]);
    put_binary(&mut out, "bin", 4, &[2; 16]);
    close(&mut out, body);
    let list: Vec<Bson> = (0..11).map(|at| Bson::Boolean(at == 10)).collect();
    let expected = doc! {
        "find": 1, "filter": { "name": "ä", "long": -1_i64, "none": null }, "list": list, "ok": 1.0,
        "at": bson::DateTime::from_millis(3), "id": ObjectId::from_bytes([1; 12]),
        "bin": bson::Binary { subtype: BinarySubtype::Uuid, bytes: vec![2; 16] },
    };
    assert_eq!(out, raw(&expected));
    assert_eq!(Index::new(1_000_000).as_str(), "1000000");
}

#[test]
fn whole_numbers_of_every_numeric_type() {
    let decimal = |text: &str| text.parse::<bson::Decimal128>().expect("a decimal");
    for (value, expected) in [
        (Bson::Int32(-3), Some(-3)),
        (Bson::Int64(i64::MIN), Some(i64::MIN)),
        (Bson::Double(5.0), Some(5)),
        (Bson::Double(5.5), None),
        (Bson::Double(f64::NAN), None),
        (Bson::Double(9.3e18), None),
        (Bson::Decimal128(decimal("5")), Some(5)),
        (Bson::Decimal128(decimal("-5.000")), Some(-5)),
        (Bson::Decimal128(decimal("5E3")), Some(5000)),
        (Bson::Decimal128(decimal("5E300")), None),
        (Bson::Decimal128(decimal("0.5")), None),
        (Bson::Decimal128(decimal("NaN")), None),
        (Bson::Decimal128(decimal("-Infinity")), None),
        (Bson::String("5".into()), None),
        (Bson::Boolean(true), None),
    ] {
        let bytes = raw(&doc! { "n": value.clone() });
        let element = Document::new(&bytes).expect("a document").get("n").expect("sound").expect("there");
        assert_eq!(element.whole(), expected, "{value}");
    }
}

#[test]
fn two_elements_of_one_name_are_seen_however_many_there_are() {
    for count in [3, 11, 12, 13, 14, 100] {
        for twice in [0, count / 2, count - 2] {
            let mut out = Vec::new();
            let body = open(&mut out);
            for at in 0..count - 1 {
                put_i32(&mut out, Index::new(at).as_str(), 0);
            }
            let unique = out.len();
            put_i32(&mut out, Index::new(twice).as_str(), 0);
            close(&mut out, body);
            assert_eq!(Document::new(&out).expect("sound").has_duplicate_key(), Ok(true), "{count} {twice}");
            out.truncate(unique);
            close(&mut out, Open(0));
            assert_eq!(Document::new(&out).expect("sound").has_duplicate_key(), Ok(false), "{count}");
        }
    }
}

#[test]
fn a_depth_bomb_is_refused_without_recursion() {
    let mut out = Vec::new();
    let mut opened = vec![open(&mut out)];
    for _ in 1..100_000 {
        opened.push(open_document(&mut out, "a"));
    }
    while let Some(inner) = opened.pop() {
        close(&mut out, inner);
    }
    let document = Document::new(&out).expect("framed");
    assert_eq!(validate(document, DEPTH_MAX).map_err(|e| e.what), Err("nested too deeply"));
    let deepest = doc! { "a": { "b": [{ "c": 1 }] } };
    let bytes = raw(&deepest);
    assert!(validate(Document::new(&bytes).expect("framed"), 4).is_ok());
    assert!(validate(Document::new(&bytes).expect("framed"), 3).is_err());
}

#[test]
fn lying_lengths_are_refused() {
    for bytes in [
        &b""[..],
        b"\x05\0\0",
        b"\x04\0\0\0",
        b"\x05\0\0\0\x01",
        b"\x06\0\0\0\0",
        b"\xff\xff\xff\xff\0",
        b"\x05\0\0\0\0\0",
        b"\0\0\0\x80\0",
    ] {
        assert!(Document::new(bytes).is_err(), "{bytes:?}");
    }
    // One element whose value lies, in a sound frame.
    for element in [
        &b"\x02a\0\0\0\0\0"[..],
        b"\x02a\0\x02\0\0\0xx",
        b"\x02a\0\xff\xff\xff\xff\0",
        b"\x02a\0\xff\xff\xff\x7f\0",
        b"\x03a\0\x04\0\0\0\0",
        b"\x03a\0\x05\0\0\0\x01",
        b"\x05a\0\x09\0\0\0\0a",
        b"\x08a\0\x02",
        b"\x08a\0",
        b"\x0ba\0abc",
        b"\x0fa\0\x0e\0\0\0\xff\xff\xff\x7f\0\x05\0\0\0\0",
        b"\x14a\0",
        b"\x00a\0",
        b"\x10a",
        b"\x10a\0\x01\0\0",
    ] {
        let mut out = Vec::new();
        let body = open(&mut out);
        out.extend_from_slice(element);
        close(&mut out, body);
        let document = Document::new(&out).expect("framed");
        assert!(validate(document, DEPTH_MAX).is_err(), "{element:?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_walker_panic_or_read_beyond(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut framed = Vec::new();
        let body = open(&mut framed);
        framed.extend_from_slice(&bytes);
        close(&mut framed, body);
        let document = Document::new(&framed).expect("framed");
        let _ = validate(document, DEPTH_MAX);
        let _ = document.has_duplicate_key();
        let copied: usize = document.iter().map_while(Result::ok).map(|element| element.span.len()).sum();
        prop_assert!(copied <= bytes.len());
    }

    #[test]
    fn a_sound_document_with_one_byte_changed_never_panics(at in 0_usize..400, to in any::<u8>()) {
        let mut bytes = raw(&everything());
        let at = at % bytes.len();
        bytes[at] = to;
        if let Ok(document) = Document::new(&bytes) {
            let _ = validate(document, DEPTH_MAX);
            for element in document.iter().map_while(Result::ok) {
                let _ = (element.str(), element.whole(), element.truthy(), element.binary(), element.bool());
            }
        }
    }
}
