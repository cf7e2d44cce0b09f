use proptest::prelude::*;

use super::{
    bson::{close, open, put_i32},
    compress::Compressor,
    *,
};

fn document(key: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let body = open(&mut out);
    put_i32(&mut out, key, 1);
    close(&mut out, body);
    out
}

fn kind_one(name: &str, documents: &[&[u8]]) -> Vec<u8> {
    let mut inner = name.as_bytes().to_vec();
    inner.push(0);
    documents.iter().for_each(|document| inner.extend_from_slice(document));
    let mut out = vec![1];
    out.extend_from_slice(&i32::try_from(inner.len() + 4).expect("short").to_le_bytes());
    out.extend_from_slice(&inner);
    out
}

fn kind_zero(document: &[u8]) -> Vec<u8> {
    [&[0][..], document].concat()
}

fn message(flags: u32, parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    let at = begin(&mut out, 7, 0, OP_MSG);
    out.extend_from_slice(&flags.to_le_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
    end(&mut out, at);
    out
}

fn parse(message: &[u8]) -> Result<Message<'_>, Error> {
    let (header, payload) = message.split_first_chunk().expect("a header");
    Message::parse(header, payload)
}

#[test]
fn sections_come_in_any_order() {
    let (body, one, two) = (document("insert"), document("a"), document("b"));
    let section = kind_one("documents", &[&one, &two]);
    let before = message(0, &[&section, &kind_zero(&body)]);
    let after = message(EXHAUST_ALLOWED, &[&kind_zero(&body), &section]);
    for bytes in [&before, &after] {
        let parsed = parse(bytes).expect("good");
        assert_eq!(parsed.body.bytes(), body);
        assert_eq!(parsed.sections(), [("documents", [one.as_slice(), &two].concat().as_slice())]);
    }
}

#[test]
fn what_is_ambiguous_is_refused() {
    let (body, one) = (kind_zero(&document("insert")), document("a"));
    let section = kind_one("documents", &[&one]);
    for (parts, flags) in [
        (vec![&body[..], &body], 0),
        (vec![&body[..], &section, &section], 0),
        (vec![&section[..]], 0),
        (vec![&body[..], &[2]], 0),
        (vec![&body[..]], 1 << 2),
        (vec![&body[..]], 1 << 15),
        (vec![&body[..], &[0]], 0),
        (vec![&body[..], b"\x01\xff\xff\xff\xff"], 0),
        (vec![&body[..], b"\x01\x03\0\0\0"], 0),
        (vec![&body[..], b"\x01\x06\0\0\0ab"], 0),
        (vec![&body[..], b"\x01\x07\0\0\0a\0\x05"], 0),
        (vec![&body[..], b"\x01\xff\xff\xff\x7fa\0"], 0),
        (vec![], 0),
    ] {
        assert!(parse(&message(flags, &parts)).is_err(), "{parts:?} {flags}");
    }
    let many: Vec<Vec<u8>> = ["a", "b", "c", "d", "e"].iter().map(|name| kind_one(name, &[])).collect();
    let parts: Vec<&[u8]> = std::iter::once(&body[..]).chain(many.iter().map(Vec::as_slice)).collect();
    assert!(parse(&message(0, &parts)).is_err());
    // Unknown flags from bit 16 on are to be ignored.
    assert!(parse(&message(1 << 20, &[&body])).is_ok());
}

#[test]
fn a_checksum_is_verified() {
    let mut bytes = message(CHECKSUM_PRESENT, &[&kind_zero(&document("ping")), &[0; 4]]);
    let covered = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..covered]);
    bytes[covered..].copy_from_slice(&sum.to_le_bytes());
    assert!(parse(&bytes).is_ok());
    for at in [HEADER_BYTES + 8, covered, 5] {
        let mut broken = bytes.clone();
        broken[at] ^= 1;
        assert_eq!(parse(&broken).map_err(|error| error.what), Err("a wrong checksum"), "{at}");
    }
}

#[test]
fn a_header_is_checked_before_anything_is_waited_for() {
    let header = |length: i32| {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 12]);
        bytes
    };
    assert_eq!(Header::read(&header(100)[..15], 1000), Ok(None));
    for bad in [0, 15, -1, i32::MIN, 1001, i32::MAX] {
        assert!(Header::read(&header(bad), 1000).is_err(), "{bad}");
    }
    assert_eq!(Header::read(&header(1000), 1000).map(|header| header.map(|it| it.length)), Ok(Some(1000)));
}

#[test]
fn a_legacy_hello_may_stand_under_query() {
    let inner = document("isMaster");
    let mut wrapped = Vec::new();
    let outer = open(&mut wrapped);
    bson::put_document(&mut wrapped, "$query", Document::new(&inner).expect("good"));
    close(&mut wrapped, outer);
    for (name, query, expected) in
        [("admin.$cmd", &inner, true), ("admin.$cmd", &wrapped, true), ("app.users", &inner, false)]
    {
        let payload = [&[0; 4][..], name.as_bytes(), &[0; 9], query].concat();
        let parsed = Query::parse(&payload).expect("sound");
        assert_eq!(parsed.is_some(), expected, "{name}");
        if let Some(parsed) = parsed {
            assert_eq!((parsed.database, parsed.command.bytes()), ("admin", inner.as_slice()));
        }
    }
    assert!(Query::parse(b"\0\0\0\0admin.$cmd\0\0\0\0").is_err());
    assert!(Query::parse(b"\0\0\0\0admin").is_err());
}

#[test]
fn what_was_sealed_opens() {
    let long = vec![b'x'; 100_000];
    let plain = message(0, &[&kind_zero(&document("insert")), &kind_one("documents", &[&document("a")]), &long]);
    for compressor in [Compressor::Noop, Compressor::Snappy, Compressor::Zlib, Compressor::Zstd] {
        let mut sealed = Vec::new();
        compress::seal(&plain, compressor, &mut sealed);
        let header = Header::read(&sealed, MESSAGE_MAX_BYTES).expect("good").expect("whole");
        assert_eq!((header.length, header.request_id, header.opcode), (sealed.len(), 7, OP_COMPRESSED));
        let mut opened = Vec::new();
        let inside = compress::open(&sealed[HEADER_BYTES..], MESSAGE_MAX_BYTES, &mut opened).expect("opens");
        assert_eq!((inside.opcode, inside.compressor), (OP_MSG, compressor));
        assert_eq!(opened, plain[HEADER_BYTES..]);
        // It claims one byte less, one more, far too many, a negative number; it is cut; it is over the cap.
        let size = opened.len();
        for claim in [size as i64 - 1, size as i64 + 1, 40_000_000, -1, i64::from(i32::MAX)] {
            let mut lying = sealed[HEADER_BYTES..].to_vec();
            lying[4..8].copy_from_slice(&i32::try_from(claim).expect("fits").to_le_bytes());
            let mut out = Vec::new();
            assert!(compress::open(&lying, MESSAGE_MAX_BYTES, &mut out).is_err(), "{compressor:?} {claim}");
            assert!(out.capacity() < 1 << 20, "{compressor:?} {claim}: {}", out.capacity());
        }
        let cut = &sealed[HEADER_BYTES..sealed.len() - 1];
        assert!(compress::open(cut, MESSAGE_MAX_BYTES, &mut Vec::new()).is_err(), "{compressor:?}");
        assert!(compress::open(&sealed[HEADER_BYTES..], size, &mut Vec::new()).is_err(), "{compressor:?}");
    }
    assert!(compress::open(b"\xdd\x07\0\0\0\0\0\0\x09", MESSAGE_MAX_BYTES, &mut Vec::new()).is_err());
    assert!(compress::open(b"\xdc\x07\0\0\0\0\0\0\0", MESSAGE_MAX_BYTES, &mut Vec::new()).is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_the_codec_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), flags in 0_u32..4) {
        let _ = Query::parse(&bytes);
        let _ = compress::open(&bytes, 10_000, &mut Vec::new());
        let framed = message(flags, &[&bytes]);
        let _ = parse(&framed);
        let mut near = kind_zero(&document("find"));
        near.extend_from_slice(&bytes);
        let _ = parse(&message(0, &[&near]));
    }
}
