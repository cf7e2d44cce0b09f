use ::bson::{Bson, RawDocumentBuf, doc, rawdoc};

use super::*;
use crate::tenant::{
    Names, OrgId,
    namespace::{NameStyle, RootSecret},
};

fn map(rule: ReplyRule, failed: &[Failed], reply: ::bson::Document) -> (::bson::Document, Seen) {
    map_in(Isolation::Database, rule, failed, reply)
}

fn map_in(
    isolation: Isolation,
    rule: ReplyRule,
    failed: &[Failed],
    reply: ::bson::Document,
) -> (::bson::Document, Seen) {
    map_as(isolation, rule, failed, false, reply)
}

fn map_as(
    isolation: Isolation,
    rule: ReplyRule,
    failed: &[Failed],
    ordered: bool,
    reply: ::bson::Document,
) -> (::bson::Document, Seen) {
    let names = Names::new(RootSecret::new(&[7; 32]).expect("long enough"), NameStyle::Plain);
    let org = OrgId::parse("acme").expect("an org");
    let place = names.mongodb(&org, isolation);
    let mask = mask();
    let mapping = Mapping {
        rule,
        isolation,
        org: &org,
        place: &place,
        mask: &mask,
        failed,
        ordered,
        cursor: None,
        not_there: &[],
    };
    let raw = RawDocumentBuf::try_from(&reply).expect("encodes").into_bytes();
    let mut out = Vec::new();
    let seen = mapping.put(Document::new(&raw).expect("sound"), &mut out).expect("maps");
    (::bson::Document::from_reader(out.as_slice()).expect("sound"), seen)
}

fn mask() -> Mask {
    Mask::new(&[1; 32], &[2; 32]).expect("a cipher")
}

#[test]
fn names_and_cursors_of_the_server_stay_there() {
    let batch = vec![Bson::Document(doc! { "text": "org_acme~app is what the document says" })];
    let (mapped, seen) = map(
        ReplyRule::Cursor,
        &[],
        doc! { "cursor": { "firstBatch": batch.clone(), "id": 77_i64, "ns": "org_acme~app.users" }, "ok": 1.0 },
    );
    let cursor = mapped.get_document("cursor").expect("there");
    assert_eq!(cursor.get_str("ns").ok(), Some("app.users"));
    assert_eq!(cursor.get_i64("id").ok(), mask().cursor(77).ok());
    assert_eq!(cursor.get_array("firstBatch").ok(), Some(&batch), "documents are never touched");
    assert_eq!(seen.cursor, Some((77, "org_acme~app.users".into())));
    assert!(seen.ok);
    let (killed, _) = map(ReplyRule::Killed, &[], doc! { "cursorsKilled": [77_i64], "cursorsNotFound": [], "ok": 1 });
    assert_eq!(killed.get_array("cursorsKilled").expect("there")[0], Bson::Int64(mask().cursor(77).expect("works")));
    let (dropped, _) =
        map(ReplyRule::Namespace, &[], doc! { "ns": "org_acme~app.users", "dropped": "org_acme~app", "ok": 1 });
    assert_eq!((dropped.get_str("ns").ok(), dropped.get_str("dropped").ok()), (Some("app.users"), Some("app")));
}

#[test]
fn texts_of_errors_name_what_the_client_knows() {
    let text = "E11000 duplicate key error collection: org_acme~app.users index: _id_";
    let entry = doc! { "index": 1, "code": 11000, "errmsg": text, "keyValue": { "_id": "org_acme~app" } };
    let (mapped, _) = map(ReplyRule::Writes, &[], doc! { "n": 1, "writeErrors": [entry], "ok": 1.0 });
    let error = mapped.get_array("writeErrors").expect("there")[0].as_document().expect("a document");
    assert_eq!(error.get_str("errmsg").ok(), Some("E11000 duplicate key error collection: app.users index: _id_"));
    assert_eq!(error.get_document("keyValue").ok(), Some(&doc! { "_id": "org_acme~app" }));
    let (mapped, seen) = map(ReplyRule::Plain, &[], doc! { "ok": 0.0, "errmsg": "no org_acme~app.users", "code": 26 });
    assert_eq!(mapped.get_str("errmsg").ok(), Some("no app.users"));
    assert_eq!((seen.ok, seen.code), (false, Some(26)));
}

#[test]
fn refused_statements_stand_among_the_servers_errors_in_order() {
    let failed = [0, 3].map(|index| Failed { index, code: 66, message: "org_id".into() });
    let theirs = doc! { "index": 2, "code": 11000, "errmsg": "duplicate" };
    let (mapped, _) = map(ReplyRule::Writes, &failed, doc! { "n": 1, "writeErrors": [theirs], "ok": 1.0 });
    let index = |list: &::bson::Array| -> Vec<i32> {
        list.iter().map(|it| it.as_document().expect("a document").get_i32("index").expect("there")).collect()
    };
    // The server got the statements 1, 2, 4 …: its third is the client's fifth.
    assert_eq!(index(mapped.get_array("writeErrors").expect("there")), [0, 3, 4]);
    let (mapped, _) = map(ReplyRule::Writes, &failed, doc! { "n": 1, "ok": 1.0 });
    assert_eq!(index(mapped.get_array("writeErrors").expect("there")), [0, 3]);
}

/// Where one was refused the server has refused what stood for it: its number, its place and the count are the server's.
#[test]
fn refused_operations_of_a_bulk_write_have_their_results_among_the_servers() {
    let failed = [0, 3].map(|index| Failed { index, code: 66, message: "org_id".into() });
    let stood_in = |idx: i32| doc! { "ok": 0.0, "idx": idx, "code": 52, "errmsg": "$refused is not valid", "n": 0 };
    let text = "E11000 duplicate key error collection: shared_app.c index: _id_ dup key: { _id: 1 }";
    let key = doc! { "org_id": "acme", "_id": 1 };
    let twice = doc! { "ok": 0.0, "idx": 2, "code": 11000, "errmsg": text, "keyValue": key, "n": 0 };
    let batch = |name: &str, id: i64, entries: Vec<::bson::Document>| {
        let reply =
            doc! { "cursor": { "id": id, name: entries, "ns": "admin.$cmd.bulkWrite" }, "nErrors": 3, "ok": 1.0 };
        let (mapped, _) = map_as(Isolation::Filter, ReplyRule::BulkWrite, &failed, false, reply);
        assert_eq!(mapped.get_i32("nErrors").ok(), Some(3));
        let list = mapped.get_document("cursor").and_then(|cursor| cursor.get_array(name)).expect("there").clone();
        list.into_iter().map(|it| it.as_document().expect("a document").clone()).collect::<Vec<_>>()
    };
    let refused = |idx: i32| doc! { "ok": 0.0, "idx": idx, "code": 66, "errmsg": "org_id", "n": 0 };
    let done = doc! { "ok": 1.0, "idx": 1, "n": 1 };
    assert_eq!(batch("firstBatch", 77, vec![stood_in(0), done.clone()]), [refused(0), done]);
    // Later batches too, with the names that the tenant knows.
    let later = batch("nextBatch", 0, vec![twice, stood_in(3)]);
    assert_eq!(later[1], refused(3));
    let text = "E11000 duplicate key error collection: app.c index: _id_ dup key: { _id: 1 }";
    assert_eq!((later[0].get_str("errmsg").ok(), later[0].get_i32("idx").ok()), (Some(text), Some(2)));
    assert_eq!(later[0].get_document("keyValue").ok(), Some(&doc! { "_id": 1 }));
}

/// Nothing may be told to have failed that was done.
#[test]
fn a_server_that_takes_what_none_takes_is_not_believed() {
    let failed = [Failed { index: 0, code: 66, message: "org_id".into() }];
    let reply =
        doc! { "cursor": { "id": 0_i64, "firstBatch": [{ "ok": 1.0, "idx": 0, "n": 1 }], "ns": "x" }, "ok": 1.0 };
    let names = Names::new(RootSecret::new(&[7; 32]).expect("long enough"), NameStyle::Plain);
    let org = OrgId::parse("acme").expect("an org");
    let (place, mask) = (names.mongodb(&org, Isolation::Filter), mask());
    let mapping = Mapping {
        rule: ReplyRule::BulkWrite,
        isolation: Isolation::Filter,
        org: &org,
        place: &place,
        mask: &mask,
        failed: &failed,
        ordered: false,
        cursor: None,
        not_there: &[],
    };
    let raw = RawDocumentBuf::try_from(&reply).expect("encodes").into_bytes();
    assert!(mapping.put(Document::new(&raw).expect("sound"), &mut Vec::new()).is_err());
}

#[test]
fn a_server_that_steps_down_does_not_make_drivers_leave_us() {
    for code in [10107, 13435, 13436, 10058, 11600, 11602, 189] {
        let labels = vec!["RetryableWriteError"];
        let reply = doc! { "ok": 0.0, "errmsg": "x", "code": code, "codeName": "Y", "errorLabels": labels, "topologyVersion": 1 };
        let (mapped, seen) = map(ReplyRule::Plain, &[], reply);
        assert_eq!((mapped.get_i32("code").ok(), mapped.get_str("codeName").ok()), (Some(6), Some("HostUnreachable")));
        assert!(mapped.contains_key("errorLabels") && seen.topology && !mapped.contains_key("topologyVersion"));
        let concern = doc! { "code": code, "codeName": "Y", "errmsg": "x" };
        let (mapped, _) = map(ReplyRule::Writes, &[], doc! { "n": 1, "writeConcernError": concern, "ok": 1 });
        assert_eq!(mapped.get_document("writeConcernError").expect("there").get_i32("code").ok(), Some(6));
    }
}

#[test]
fn a_transaction_that_the_server_ended_is_seen() {
    let (_, seen) =
        map(ReplyRule::Plain, &[], doc! { "ok": 0.0, "code": 112, "errorLabels": ["TransientTransactionError"] });
    assert!(seen.transient);
}

#[test]
fn a_new_session_comes_under_the_clients_own_name() {
    let mut server_side = [5; 16];
    mask().session(&mut server_side).expect("works");
    let id = ::bson::Binary { subtype: ::bson::spec::BinarySubtype::Uuid, bytes: server_side.to_vec() };
    let (mapped, _) = map(ReplyRule::Session, &[], doc! { "id": { "id": id }, "timeoutMinutes": 30, "ok": 1.0 });
    let id = mapped.get_document("id").expect("there").get("id").cloned();
    let own = ::bson::Binary { subtype: ::bson::spec::BinarySubtype::Uuid, bytes: vec![5; 16] };
    assert_eq!(id, Some(Bson::Binary(own)));
}

#[test]
fn a_reply_that_is_no_bson_is_not_sent() {
    let mask = mask();
    let names = Names::new(RootSecret::new(&[7; 32]).expect("long enough"), NameStyle::Plain);
    let org = OrgId::parse("acme").expect("an org");
    let place = names.mongodb(&org, Isolation::Database);
    let (rule, isolation) = (ReplyRule::Plain, Isolation::Database);
    let mapping = Mapping {
        rule,
        isolation,
        org: &org,
        place: &place,
        mask: &mask,
        failed: &[],
        ordered: true,
        cursor: None,
        not_there: &[],
    };
    let mut raw = rawdoc! { "ok": 1.0, "x": "text" }.into_bytes();
    let at = raw.len() - 10;
    raw[at] = 0xff;
    assert!(mapping.put(Document::new(&raw).expect("framed"), &mut Vec::new()).is_err());
}

#[test]
fn in_shared_collections_nobody_learns_how_many_indexes_others_have() {
    let made = || doc! { "numIndexesBefore": 7, "numIndexesAfter": 8, "note": "n", "ok": 1.0 };
    for rule in [ReplyRule::IndexesMade, ReplyRule::IndexesWished] {
        assert_eq!(map_in(Isolation::Filter, rule, &[], made()).0, doc! { "note": "n", "ok": 1.0 });
        assert_eq!(map(rule, &[], made()).0, made());
    }
    let (dropped, _) = map_in(Isolation::Filter, ReplyRule::IndexesMade, &[], doc! { "nIndexesWas": 8, "ok": 1.0 });
    assert_eq!(dropped, doc! { "ok": 1.0 });
}

#[test]
fn an_index_that_only_makes_faster_may_find_no_room_among_others() {
    let full = || doc! { "ok": 0.0, "errmsg": "add index fails, too many indexes", "code": 67 };
    assert_eq!(map_in(Isolation::Filter, ReplyRule::IndexesWished, &[], full()).0, doc! { "ok": 1.0 });
    for (isolation, rule) in
        [(Isolation::Filter, ReplyRule::IndexesMade), (Isolation::Database, ReplyRule::IndexesWished)]
    {
        assert_eq!(map_in(isolation, rule, &[], full()).0, full(), "the tenant has to know");
    }
}

/// What the server says of a cursor speaks of its own numbers of cursors and sessions.
#[test]
fn a_cursor_that_is_not_there_is_called_as_the_client_calls_it() {
    let names = Names::new(RootSecret::new(&[7; 32]).expect("long enough"), NameStyle::Plain);
    let org = OrgId::parse("acme").expect("an org");
    let place = names.mongodb(&org, Isolation::Filter);
    let mask = mask();
    let (isolation, rule) = (Isolation::Filter, ReplyRule::Cursor);
    let base = Mapping {
        rule,
        isolation,
        org: &org,
        place: &place,
        mask: &mask,
        failed: &[],
        ordered: false,
        cursor: None,
        not_there: &[],
    };
    let mapping = Mapping { cursor: Some(77_000_077), ..base };
    let client = mask.cursor(77_000_077).expect("works").to_string();
    let theirs = "session 8a1f9c52-77aa-4a39-9d0a-0123456789ab";
    for (code, text) in [(43, "cursor id 77000077 not found".to_owned()), (50738, format!("cursor 77000077, {theirs}"))]
    {
        let raw = RawDocumentBuf::try_from(&doc! { "ok": 0.0, "errmsg": text, "code": code }).expect("encodes");
        let mut out = Vec::new();
        let seen = mapping.put(Document::new(raw.as_bytes()).expect("sound"), &mut out).expect("maps");
        let told = ::bson::Document::from_reader(out.as_slice()).expect("sound");
        let text = told.get_str("errmsg").expect("a text");
        assert!(text.contains(&client) && !text.contains("77000077") && !text.contains("8a1f9c52"), "{text}");
        assert_eq!(seen.code, Some(code.into()));
    }
}

/// Names and numbers of what tenants share are nobody's business, in errors and in plans.
#[test]
fn the_platforms_index_and_the_servers_numbers_are_not_shown() {
    let filter = |rule, reply| map_in(Isolation::Filter, rule, &[], reply).0;
    let text = "E11000 duplicate key error collection: shared_app.c index: org_id_1__id_1 dup key: { org_id: \"acme\", _id: 1 }";
    let entry = doc! {
        "index": 0, "code": 11000, "errmsg": text, "keyPattern": { "org_id": 1, "_id": 1 },
        "keyValue": { "org_id": "acme", "_id": 1 },
    };
    let told = filter(ReplyRule::Writes, doc! { "n": 0, "writeErrors": [entry], "ok": 1.0 });
    let error = told.get_array("writeErrors").expect("there")[0].as_document().expect("one");
    assert_eq!(
        error.get_str("errmsg").ok(),
        Some("E11000 duplicate key error collection: app.c index: _id_ dup key: { _id: 1 }")
    );
    assert_eq!(error.get_document("keyPattern").ok(), Some(&doc! { "_id": 1 }));
    assert_eq!(error.get_document("keyValue").ok(), Some(&doc! { "_id": 1 }));

    let scan = doc! { "stage": "IXSCAN", "indexName": "org_id_1__id_1", "keyPattern": { "org_id": 1, "_id": 1 } };
    let plan = filter(ReplyRule::Explain, doc! { "queryPlanner": { "winningPlan": scan }, "ok": 1.0 });
    assert!(!plan.to_string().contains("org_id"), "{plan}");

    let number = "8a1f9c52-77aa-4a39-9d0a-0123456789ab";
    let text = format!(
        "Index build failed: {number}: Collection shared_app.c ( {number} ) :: caused by :: E11000 dup key: {{ a: UUID(\"{number}\") }}"
    );
    let reply = doc! { "ok": 0.0, "code": 11000, "errmsg": text, "createdCollectionAutomatically": true };
    let told = filter(ReplyRule::IndexesMade, reply);
    let wanted =
        format!("Index build failed: Collection app.c :: caused by :: E11000 dup key: {{ a: UUID(\"{number}\") }}");
    assert_eq!(told.get_str("errmsg").ok(), Some(wanted.as_str()));
    assert!(!told.contains_key("createdCollectionAutomatically"));

    let key = doc! { "org_id": 1, "_id": 1 };
    let indexes =
        doc! { "firstBatch": [{ "v": 2, "name": "org_id_1__id_1", "key": key }], "id": 0_i64, "ns": "shared_app.c" };
    let listed = filter(ReplyRule::Indexes, doc! { "cursor": indexes, "ok": 1.0 });
    assert!(
        listed.get_document("cursor").and_then(|it| it.get_array("firstBatch")).is_ok_and(Vec::is_empty),
        "{listed}"
    );
    // What is left of others' is not to be asked for.
    let indexes =
        doc! { "firstBatch": [{ "v": 2, "name": "a_1~acme", "key": { "a": 1 } }], "id": 77_i64, "ns": "shared_app.c" };
    let (listed, seen) = map_in(Isolation::Filter, ReplyRule::Indexes, &[], doc! { "cursor": indexes, "ok": 1.0 });
    assert_eq!(listed.get_document("cursor").and_then(|it| it.get_i64("id")).ok(), Some(0));
    assert_eq!(seen.cursor.map(|(id, _)| id), Some(77), "to be closed");
}
