//! Input that nobody's driver sends: a native error, no panic, the connection usable where the protocol allows, and
//! nobody else notices.

use bson::{Bson, Document, doc};
use dynabase::{
    front::mongo::commands,
    wire::mongo::{
        self, CHECKSUM_PRESENT, EXHAUST_ALLOWED, HEADER_BYTES, MORE_TO_COME, OP_COMPRESSED, OP_MSG, OP_QUERY, compress,
    },
};

use super::support::{Act, Client, House, body, bytes, message, payload, server, token};

const DEAD: u16 = 1;

fn ping() -> Document {
    doc! { "ping": 1, "$db": "admin" }
}

async fn lives(client: &mut Client) {
    assert_eq!(client.run(ping()).await, doc! { "ok": 1.0 });
}

#[tokio::test]
async fn a_length_that_lies_ends_its_connection_and_nothing_else() {
    let house = House::before(DEAD).await;
    for length in [0, 15, -1, i32::MIN, i32::MAX, 48_000_001] {
        for known in [false, true] {
            let mut client = if known { house.client("acme").await } else { house.stranger().await };
            let mut bytes = message(1, 0, &bytes(&ping()));
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            client.send(&bytes).await;
            client.closed().await;
        }
    }
    // Who has not logged in may send no more than a login.
    let mut stranger = house.stranger().await;
    stranger.send(&payload(1, OP_MSG, &vec![0; 100_000])).await;
    stranger.closed().await;
    // What is announced and never comes holds up nobody.
    let mut slow = house.client("acme").await;
    slow.send(&message(1, 0, &bytes(&ping()))[..20]).await;
    house.is_well().await;
}

#[tokio::test]
async fn a_malformed_message_gets_an_error_and_its_connection_goes_on() {
    let house = House::before(DEAD).await;
    let good = bytes(&ping());
    let body_of = |document: &[u8]| [&[0_u8; 5][..], document].concat();
    let mut lying = good.clone();
    lying[0] += 1;
    let mut open = good.clone();
    *open.last_mut().expect("a byte") = 1;
    let bad: Vec<Vec<u8>> = vec![
        body_of(b""),
        body_of(&lying),
        body_of(&open),
        body_of(b"\x05\0\0\0\0"),
        body_of(&[&good[..], &[0], &good].concat()),
        [&body_of(&good)[..], &[7]].concat(),
        [&body_of(&good)[..], b"\x01\xff\xff\xff\x7fdocuments\0"].concat(),
        [&body_of(&good)[..], b"\x01\x04\0\0\0"].concat(),
        [&[4, 0, 0, 0, 0], &good[..]].concat(),
        vec![0; 4],
    ];
    for payload_of in bad {
        for known in [false, true] {
            let mut client = if known { house.client("acme").await } else { house.stranger().await };
            client.send(&payload(9, OP_MSG, &payload_of)).await;
            let (to, told) = client.reply().await.expect("an answer");
            assert_eq!((to, told.get_f64("ok").ok(), told.get_i32("code").ok()), (9, Some(0.0), Some(22)), "{told}");
            lives(&mut client).await;
        }
    }
}

#[tokio::test]
async fn what_two_parsers_could_read_in_two_ways_is_refused() {
    let house = House::before(DEAD).await;
    for org in ["acme", "initech"] {
        let mut client = house.client(org).await;
        // A document that holds a key twice can't be built by the library.
        let twice = |pairs: &[(&str, Bson)]| {
            let mut out = vec![0; 4];
            for (key, value) in pairs {
                let one = bytes(&doc! { *key: value.clone() });
                out.extend_from_slice(&one[4..one.len() - 1]);
            }
            out.push(0);
            let length = i32::try_from(out.len()).expect("short");
            out[..4].copy_from_slice(&length.to_le_bytes());
            out
        };
        let (app, other): (Bson, Bson) = ("app".into(), "org_other~app".into());
        let filter = || Bson::Document(doc! {});
        for pairs in [
            vec![("find", "c".into()), ("$db", app.clone()), ("$db", other.clone())],
            vec![("find", "c".into()), ("filter", filter()), ("filter", filter()), ("$db", app.clone())],
            vec![("find", "c".into()), ("find", "d".into()), ("$db", app.clone())],
            vec![("find", "c".into()), ("maxTimeMS", 1.into()), ("maxTimeMS", 0.into()), ("$db", app.clone())],
        ] {
            let told = client.run_raw(&twice(&pairs)).await;
            assert_eq!(told.get_f64("ok").ok(), Some(0.0), "{pairs:?}: {told}");
            lives(&mut client).await;
        }
        let told = client.run(doc! { "find": "c" }).await;
        assert_eq!(told.get_f64("ok").ok(), Some(0.0), "no $db: {told}");
        lives(&mut client).await;
    }
}

#[tokio::test]
async fn bombs_are_refused_before_they_are_sent_on() {
    let house = House::before(DEAD).await;
    for org in ["acme", "initech"] {
        let mut client = house.client(org).await;
        let stages: Vec<Document> = (0..1001).map(|_| doc! { "$limit": 1 }).collect();
        let told = client.run(doc! { "aggregate": "c", "pipeline": stages, "cursor": {}, "$db": "app" }).await;
        assert!(told.contains_key("errmsg") && told.get_i32("code").ok() != Some(6), "{told}");
        let mut deep = doc! { "a": 1 };
        for _ in 0..150 {
            deep = doc! { "$and": [deep] };
        }
        let told = client.run(doc! { "find": "c", "filter": deep, "$db": "app" }).await;
        assert!(told.contains_key("errmsg") && told.get_i32("code").ok() != Some(6), "{told}");
        // Far deeper than any stack.
        let depth = 200_000;
        let mut bomb = Vec::new();
        let frame = |inner: usize| i32::try_from(inner).expect("fits").to_le_bytes();
        for level in 0..depth {
            let bytes = (depth - level) * 8 + 5 - 1;
            bomb.extend_from_slice(&frame(bytes));
            bomb.extend_from_slice(b"\x03a\0");
        }
        bomb.extend_from_slice(b"\x05\0\0\0\0");
        bomb.extend(std::iter::repeat_n(0, depth));
        let _ = client
            .run_raw(&{
                let mut command = bytes(&doc! { "find": "c", "$db": "app" });
                command.pop();
                command.extend_from_slice(b"\x03filter\0");
                command.extend_from_slice(&bomb);
                command.push(0);
                let length = frame(command.len());
                command[..4].copy_from_slice(&length);
                command
            })
            .await;
        lives(&mut client).await;
    }
}

/// An insert whose documents, each the same, stand in a section.
fn many(count: usize, document: &Document) -> Vec<u8> {
    section(bytes(document).repeat(count))
}

fn section(documents: Vec<u8>) -> Vec<u8> {
    let body = bytes(&doc! { "insert": "c", "ordered": false, "$db": "app" });
    let size = i32::try_from(4 + b"documents\0".len() + documents.len()).expect("below 48 MB");
    let all = [&[0; 5][..], &body, &[1], &size.to_le_bytes(), b"documents\0", &documents].concat();
    payload(7, OP_MSG, &all)
}

#[tokio::test]
async fn statements_are_no_lever() {
    let house = House::before(DEAD).await;
    let mut client = house.client("acme").await;
    client.send(&many(600_000, &doc! { "org_id": 1 })).await;
    let (_, told) = client.reply().await.expect("an answer");
    assert_eq!((told.get_i32("code").ok(), told.get_str("codeName").ok()), (Some(16), Some("InvalidLength")), "{told}");
    assert!(told.get_str("errmsg").is_ok_and(|text| text.contains("10000") && text.contains("600000")), "{told}");
    // As many as are advertised, and all refused: each is told, but not a text for each, nor a text of any length.
    let hello = client.run(doc! { "hello": 1, "$db": "admin" }).await;
    assert_eq!(hello.get_i32("maxWriteBatchSize").ok(), Some(10_000));
    client.send(&many(10_000, &doc! { "org_id": 1 })).await;
    let (_, reply) = client.receive().await.expect("an answer");
    assert!(reply.len() < 1 << 20, "{} bytes", reply.len());
    let told = body(&reply);
    let errors = told.get_array("writeErrors").expect("there");
    let text = |at: usize| errors[at].as_document().and_then(|error| error.get_str("errmsg").ok()).expect("a text");
    assert!(errors.len() == 10_000 && text(0).contains("org_id") && text(9_999).is_empty());
    assert_eq!(errors[9_999].as_document().and_then(|error| error.get_i32("index").ok()), Some(9_999));
    let long = doc! { "q": { "a": { format!("${}", "é".repeat(10_000)): 1 } }, "u": { "$set": { "a": 1 } } };
    let told = client.run(doc! { "update": "c", "updates": [long], "ordered": false, "$db": "app" }).await;
    let error = told.get_array("writeErrors").expect("there")[0].as_document().expect("one");
    assert!(error.get_str("errmsg").is_ok_and(|text| text.len() < 600 && text.contains("unknown operator")), "{error}");
    lives(&mut client).await;
}

/// The server would close the connection, which drivers take for an outage.
#[tokio::test]
async fn what_grows_too_long_by_its_rewriting_is_refused_by_name() {
    let house = House::before(DEAD).await;
    let mut client = house.client("acme").await;
    let pad = bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: vec![0; 15_999_950] };
    client.send(&section(bytes(&doc! { "a": pad }).repeat(3))).await;
    let (_, told) = client.reply().await.expect("an answer");
    assert_eq!(told.get_i32("code").ok(), Some(10334), "{told}");
    lives(&mut client).await;
}

#[tokio::test]
async fn garbage_in_every_state_leaves_the_others_alone() {
    let house = House::before(DEAD).await;
    let mut seed = 0x9e37_79b9_u32;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed.to_le_bytes()
    };
    for round in 0..60 {
        let mut client = house.stranger().await;
        match round % 4 {
            0 => {}
            1 => drop(client.run(doc! { "hello": 1, "$db": "admin" }).await),
            2 => {
                let payload =
                    bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: bytes(&doc! { "n": "x" }) };
                let start =
                    doc! { "saslStart": 1, "mechanism": "MONGODB-OIDC", "payload": payload, "$db": "$external" };
                assert_eq!(client.run(start).await.get_bool("done").ok(), Some(false));
            }
            _ => drop(client.log_in(&token("acme")).await),
        }
        let garbage: Vec<u8> = (0..64).flat_map(|_| next()).collect();
        if round % 8 < 4 {
            client.send(&garbage).await;
        } else {
            // Well framed, so that it reaches the parsers behind.
            client.send(&payload(1, [OP_MSG, OP_QUERY, OP_COMPRESSED, 2006][round % 4], &garbage)).await;
        }
        drop(client);
    }
    house.is_well().await;
}

#[tokio::test]
async fn who_wants_no_answer_never_gets_one() {
    let (port, _events) = server(|_| Act::Answer(doc! { "n": 1, "ok": 1.0 })).await;
    let house = House::before(port).await;
    let mut client = house.client("initech").await;
    for command in [
        doc! { "insert": "c", "documents": [{ "_id": 1 }], "writeConcern": { "w": 0 }, "$db": "app" },
        doc! { "noSuchThing": 1, "$db": "app" },
        doc! { "shutdown": 1, "$db": "admin" },
        doc! { "ping": 1, "$db": "admin" },
    ] {
        client.send(&message(5, MORE_TO_COME, &bytes(&command))).await;
    }
    client.send(&payload(6, OP_MSG, &[&MORE_TO_COME.to_le_bytes()[..], &[9]].concat())).await;
    // Had any been answered, this would be another one's.
    lives(&mut client).await;
    let mut stranger = house.stranger().await;
    stranger.send(&message(5, MORE_TO_COME, &bytes(&doc! { "find": "c", "$db": "app" }))).await;
    lives(&mut stranger).await;
}

/// Who would take several answers to one question gets one, and asks again as others do.
#[tokio::test]
async fn a_stream_of_answers_is_never_begun() {
    let (port, _events) = server(|_| Act::Answer(doc! { "n": 1, "ok": 1.0 })).await;
    let house = House::before(port).await;
    let mut client = house.client("initech").await;
    for command in [doc! { "count": "c", "$db": "app" }, doc! { "hello": 1, "maxAwaitTimeMS": 100_i64, "$db": "admin" }]
    {
        client.send(&message(5, EXHAUST_ALLOWED, &bytes(&command))).await;
        let (header, reply) = client.receive().await.expect("an answer");
        assert_eq!((header.response_to, &reply[HEADER_BYTES..HEADER_BYTES + 4]), (5, &[0; 4][..]), "no more to come");
        lives(&mut client).await;
    }
}

#[tokio::test]
async fn the_legacy_form_is_for_hello_alone() {
    let house = House::before(DEAD).await;
    let mut client = house.stranger().await;
    let query = |name: &str, command: Document| {
        let mut out = vec![0; 4];
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&[0; 9]);
        out.extend_from_slice(&bytes(&command));
        payload(3, OP_QUERY, &out)
    };
    client.send(&query("admin.$cmd", doc! { "isMaster": 1, "helloOk": true })).await;
    let (header, reply) = client.receive().await.expect("an answer");
    assert_eq!((header.opcode, header.response_to, reply[HEADER_BYTES]), (mongo::OP_REPLY, 3, 8));
    let told = Document::from_reader(&reply[HEADER_BYTES + 20..]).expect("a document");
    assert_eq!((told.get_bool("helloOk").ok(), told.get_str("msg").ok()), (Some(true), Some("isdbgrid")));
    for refused in [query("app.users", doc! {}), query("admin.$cmd", doc! { "find": "c" })] {
        client.send(&refused).await;
        let (_, reply) = client.receive().await.expect("an answer");
        assert_eq!(reply[HEADER_BYTES], 2);
        let told = Document::from_reader(&reply[HEADER_BYTES + 20..]).expect("a document");
        assert_eq!(told.get_i32("code").ok(), Some(352));
    }
    for dead in [1, 2001, 2002, 2005, 2006, 2007, 2010, 2011, 0, -1, 9999] {
        let mut client = house.client("acme").await;
        client.send(&payload(1, dead, &[0; 20])).await;
        client.closed().await;
    }
}

#[tokio::test]
async fn checksums_are_checked_and_compression_is_agreed_on_first() {
    let house = House::before(DEAD).await;
    let mut client = house.client("acme").await;
    let mut summed =
        payload(4, OP_MSG, &[&CHECKSUM_PRESENT.to_le_bytes()[..], &[0], &bytes(&ping()), &[0; 4]].concat());
    let covered = summed.len() - 4;
    let sum = crc32c::crc32c(&summed[..covered]).to_le_bytes();
    summed[covered..].copy_from_slice(&sum);
    client.send(&summed).await;
    assert_eq!(client.reply().await, Some((4, doc! { "ok": 1.0 })));
    summed[covered] ^= 1;
    client.send(&summed).await;
    client.closed().await;

    let plain = message(5, 0, &bytes(&ping()));
    let mut sealed = Vec::new();
    compress::seal(&plain, compress::Compressor::Zlib, &mut sealed);
    let mut hasty = house.client("acme").await;
    hasty.send(&sealed).await;
    hasty.closed().await;
    for name in ["zlib", "zstd", "snappy"] {
        let mut client = house.stranger().await;
        let told = client.run(doc! { "hello": 1, "compression": ["none", name, "x"], "$db": "admin" }).await;
        assert_eq!(told.get_array("compression").ok(), Some(&vec![Bson::from(name)]));
        let mut sealed = Vec::new();
        compress::seal(&plain, compress::Compressor::by_name(name).expect("known"), &mut sealed);
        client.send(&sealed).await;
        let (_, reply) = client.receive().await.expect("an answer");
        assert_eq!(body(&reply), doc! { "ok": 1.0 });
        let mut lying = sealed.clone();
        lying[20..24].copy_from_slice(&i32::MAX.to_le_bytes());
        client.send(&lying).await;
        client.closed().await;
    }
    house.is_well().await;
}

#[tokio::test]
async fn before_a_login_there_is_only_what_leads_to_one() {
    let house = House::before(DEAD).await;
    let mut client = house.stranger().await;
    let open = ["hello", "isMaster", "saslStart", "saslContinue", "logout", "ping", "buildInfo", "connectionStatus"];
    for row in commands::ROWS.iter().filter(|row| !open.contains(&row.name)) {
        let told = client.run(doc! { row.name: 1, "$db": "admin" }).await;
        assert_eq!(told.get_i32("code").ok(), Some(13), "{}", row.name);
        assert_eq!(told.get_str("errmsg").ok(), Some(&*format!("Command {} requires authentication", row.name)));
    }
    let told = client.run(doc! { "nothing": 1, "$db": "admin" }).await;
    assert_eq!(told.get_i32("code").ok(), Some(13));
    for open in ["ping", "buildInfo", "connectionStatus", "hello", "ismaster"] {
        assert_eq!(client.run(doc! { open: 1, "$db": "admin" }).await.get_f64("ok").ok(), Some(1.0), "{open}");
    }
}
