//! `filter` isolation: what each request becomes.

use super::{Became, check_all, forwarded, parse, run_document, shown};
use crate::{front::mongo::commands::ReplyRule, tenant::Isolation::Filter};

#[test]
fn find() {
    check_all(
        Filter,
        &[
            (r#"{"find": "c"}"#, r#"{"find": "c", "filter": {"org_id": "acme"}, "projection": {"org_id": 0}}"#),
            (
                r#"{"find": "c", "filter": {}}"#,
                r#"{"find": "c", "filter": {"org_id": "acme"}, "projection": {"org_id": 0}}"#,
            ),
            (
                r#"{"find": "c", "filter": null}"#,
                r#"{"find": "c", "filter": {"org_id": "acme"}, "projection": {"org_id": 0}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"a": 1}, "limit": 1}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "limit": 1, "projection": {"org_id": 0}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"org_id": "acme"}, "projection": {"a": 0}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {}]}, "projection": {"a": 0, "org_id": 0}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"org_id": {"$eq": "acme"}, "a": 1}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "projection": {"a": 1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"b": 2}]}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"$and": [{}, {"b": 2}]}]}, "projection": {"a": 1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"org_id": "globex"}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"org_id": "globex"}]}, "projection": {"a": 1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"$or": [{"org_id": "acme"}, {"a": 1}]}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"$or": [{"org_id": "acme"}, {"a": 1}]}]}, "projection": {"a": 1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"$text": {"$search": "x"}}, "projection": {"s": {"$meta": "textScore"}}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"$text": {"$search": "x"}}]}, "projection": {"s": {"$meta": "textScore"}, "org_id": 0}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"p": {"$near": {"$geometry": {"type": "Point", "coordinates": [1, 2]}}}}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"p": {"$near": {"$geometry": {"type": "Point", "coordinates": [1, 2]}}}}]}, "projection": {"a": 1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"a": {"$ref": "x", "$id": 1, "$db": "y"}}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"a": {"$ref": "x", "$id": 1, "$db": "y"}}]}, "projection": {"a": 1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"a": {"$elemMatch": {"b": {"$gt": 1}, "$or": [{"c": 1}]}}, "d": {"$not": {"$in": [1]}}}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"a": {"$elemMatch": {"b": {"$gt": 1}, "$or": [{"c": 1}]}}, "d": {"$not": {"$in": [1]}}}]}, "projection": {"a": 1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"$nor": [{"a": 1}]}, "projection": {"a": 1}, "readConcern": {"level": "majority"}, "comment": "x"}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"$nor": [{"a": 1}]}]}, "projection": {"a": 1}, "readConcern": {"level": "majority"}, "comment": "x"}"#,
            ),
            (
                r#"{"find": "c", "filter": {"$jsonSchema": {"required": ["a"]}, "$comment": "x"}, "projection": {"a": 1}}"#,
                r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"$jsonSchema": {"required": ["a"]}, "$comment": "x"}]}, "projection": {"a": 1}}"#,
            ),
        ],
    );
}

#[test]
fn projections_hide_without_mixing() {
    let hidden = |given: &str, wanted: &str| {
        let asked = parse(&format!(r#"{{"find": "c", "projection": {given}}}"#));
        let Became::Sent(sent) = run_document(Filter, &asked) else { panic!("{given}") };
        let wanted: bson::Document = serde_json::from_str(wanted).expect("JSON");
        assert_eq!(sent.get_document("projection").expect("one"), &wanted, "{given}");
    };
    hidden("{}", r#"{"org_id": 0}"#);
    hidden("null", r#"{"org_id": 0}"#);
    hidden(r#"{"_id": 0}"#, r#"{"_id": 0, "org_id": 0}"#);
    hidden(r#"{"_id": 1}"#, r#"{"_id": 1}"#);
    hidden(r#"{"_id": 0, "a": 1}"#, r#"{"_id": 0, "a": 1}"#);
    hidden(r#"{"_id": 1, "a": 0}"#, r#"{"_id": 1, "a": 0, "org_id": 0}"#);
    hidden(r#"{"a": true}"#, r#"{"a": true}"#);
    hidden(r#"{"a": false}"#, r#"{"a": false, "org_id": 0}"#);
    hidden(r#"{"a": 0.0}"#, r#"{"a": 0.0, "org_id": 0}"#);
    hidden(r#"{"a": {"$numberLong": "5"}}"#, r#"{"a": {"$numberLong": "5"}}"#);
    hidden(r#"{"a": {"$slice": 1}}"#, r#"{"a": {"$slice": 1}, "org_id": 0}"#);
    hidden(r#"{"a": {"$slice": 1}, "b": 1}"#, r#"{"a": {"$slice": 1}, "b": 1}"#);
    hidden(r#"{"a": {"$meta": "textScore"}}"#, r#"{"a": {"$meta": "textScore"}, "org_id": 0}"#);
    hidden(r#"{"a": {"$elemMatch": {"b": 1}}}"#, r#"{"a": {"$elemMatch": {"b": 1}}}"#);
    hidden(r#"{"a.$": 1}"#, r#"{"a.$": 1}"#);
    hidden(r#"{"x": "$y"}"#, r#"{"x": "$y"}"#);
    hidden(r#"{"x": {"$add": ["$a", 1]}}"#, r#"{"x": {"$add": ["$a", 1]}}"#);
    hidden(r#"{"a": {"b": 1}}"#, r#"{"a": {"b": 1}}"#);
    hidden(r#"{"a": {"b": 0}}"#, r#"{"a": {"b": 0}, "org_id": 0}"#);
    hidden(r#"{"a.b": 1}"#, r#"{"a.b": 1}"#);
    hidden(r#"{"org_id": 0}"#, r#"{"org_id": 0}"#);
    hidden(r#"{"org_id": 0, "a": 0}"#, r#"{"a": 0, "org_id": 0}"#);
    hidden(r#"{"org_id": 1, "a": 1}"#, r#"{"a": 1}"#);
    hidden(r#"{"org_id": 1}"#, r#"{"org_id.nowhere": 1}"#);
    hidden(r#"{"org_id": 1, "_id": 0}"#, r#"{"_id": 0, "org_id.nowhere": 1}"#);
    hidden(r#"{"org_id": "$a", "b": {"$slice": 1}}"#, r#"{"b": {"$slice": 1}, "org_id.nowhere": 1}"#);
    hidden(r#"{"org_id": "$org_id", "a": 1}"#, r#"{"a": 1}"#);
}

#[test]
fn count_distinct_and_find_and_modify() {
    check_all(
        Filter,
        &[
            (r#"{"count": "c"}"#, r#"{"count": "c", "query": {"org_id": "acme"}}"#),
            (
                r#"{"count": "c", "query": {"a": 1}}"#,
                r#"{"count": "c", "query": {"$and": [{"org_id": "acme"}, {"a": 1}]}}"#,
            ),
            (r#"{"distinct": "c", "key": "a"}"#, r#"{"distinct": "c", "key": "a", "query": {"org_id": "acme"}}"#),
            (
                r#"{"distinct": "c", "key": "a", "query": {"b": 1}}"#,
                r#"{"distinct": "c", "key": "a", "query": {"$and": [{"org_id": "acme"}, {"b": 1}]}}"#,
            ),
            (r#"{"distinct": "c", "key": "org_id"}"#, "13"),
            (r#"{"distinct": "c", "key": "org_id.x"}"#, "13"),
            (
                r#"{"distinct": "c", "key": "org_idx"}"#,
                r#"{"distinct": "c", "key": "org_idx", "query": {"org_id": "acme"}}"#,
            ),
            (
                r#"{"findAndModify": "c", "query": {"a": 1}, "update": {"$set": {"b": 1}}}"#,
                r#"{"findAndModify": "c", "query": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "update": {"$set": {"b": 1}}, "fields": {"org_id": 0}}"#,
            ),
            (
                r#"{"findAndModify": "c", "remove": true}"#,
                r#"{"findAndModify": "c", "remove": true, "query": {"org_id": "acme"}, "fields": {"org_id": 0}}"#,
            ),
            (
                r#"{"findAndModify": "c", "query": {}, "update": {"b": 1}, "upsert": true, "new": true, "fields": {"b": 1}}"#,
                r#"{"findAndModify": "c", "query": {"org_id": "acme"}, "update": {"b": 1, "org_id": "acme"}, "upsert": true, "new": true, "fields": {"b": 1}}"#,
            ),
            (
                r#"{"findAndModify": "c", "query": {}, "update": [{"$set": {"org_id": "globex"}}]}"#,
                r#"{"findAndModify": "c", "query": {"org_id": "acme"}, "update": [{"$set": {"org_id": "globex"}}, {"$set": {"org_id": {"$literal": "acme"}}}], "fields": {"org_id": 0}}"#,
            ),
            (r#"{"findAndModify": "c", "query": {}, "update": {"$set": {"org_id": "globex"}}}"#, "66"),
            (r#"{"findAndModify": "c", "query": {"org_id": "globex"}, "update": {"a": 1}, "upsert": true}"#, "66"),
        ],
    );
}

#[test]
fn inserts_carry_the_tenant() {
    check_all(
        Filter,
        &[
            (
                r#"{"insert": "c", "documents": [{"a": 1}, {}]}"#,
                r#"{"insert": "c", "documents": [{"a": 1, "org_id": "acme"}, {"org_id": "acme"}]}"#,
            ),
            (
                r#"{"insert": "c", "@documents": [{"a": 1}, {"b": {"org_id": 1}}]}"#,
                r#"{"insert": "c", "@documents": [{"a": 1, "org_id": "acme"}, {"b": {"org_id": 1}, "org_id": "acme"}]}"#,
            ),
            (
                r#"{"insert": "c", "documents": [{"org_id": "acme", "a": 1}]}"#,
                r#"{"insert": "c", "documents": [{"org_id": "acme", "a": 1}]}"#,
            ),
            (r#"{"insert": "c", "documents": [{"org_id": "globex"}]}"#, "0:66"),
            (r#"{"insert": "c", "documents": [{"org_id": ["acme", "globex"]}]}"#, "0:66"),
            (r#"{"insert": "c", "documents": [{"org_id": null}]}"#, "0:66"),
            (r#"{"insert": "c", "documents": [{"org_id": {"a": 1}}]}"#, "0:66"),
        ],
    );
}

#[test]
fn failures_keep_index_and_order() {
    let failed = |text: &str| {
        forwarded(Filter, text, |forward, _| {
            (forward.ordered, forward.failed.iter().map(|failed| (failed.index, failed.code)).collect::<Vec<_>>())
        })
    };
    let three = r#"{"insert": "c", "documents": [{"a": 1}, {"org_id": "x"}, {"a": 2}, {"org_id": "y"}]"#;
    assert_eq!(failed(&format!("{three}}}")), (true, vec![(1, 66)]));
    assert_eq!(failed(&format!(r#"{three}, "ordered": false}}"#)), (false, vec![(1, 66), (3, 66)]));
    check_all(
        Filter,
        &[
            (&format!("{three}}}"), r#"{"insert": "c", "documents": [{"a": 1, "org_id": "acme"}]}"#),
            (
                &format!(r#"{three}, "ordered": false}}"#),
                r#"{"insert": "c", "documents": [{"a": 1, "org_id": "acme"}, {"a": 2, "org_id": "acme"}], "ordered": false}"#,
            ),
            (r#"{"insert": "c", "documents": [{"org_id": "x"}, {"a": 1}]}"#, "0:66"),
            (r#"{"insert": "c", "documents": [{"org_id": "x"}, {"org_id": "y"}], "ordered": false}"#, "0:66 1:66"),
            (
                r#"{"update": "c", "updates": [{"q": {}, "u": {"$set": {"a": 1}}}, {"q": {}, "u": {"$set": {"org_id": "x"}}}]}"#,
                r#"{"update": "c", "updates": [{"q": {"org_id": "acme"}, "u": {"$set": {"a": 1}}}]}"#,
            ),
            // `ordered` behind the statements counts as well.
            (
                r#"{"insert": "c", "documents": [{"org_id": "x"}, {"a": 1}], "ordered": false}"#,
                r#"{"insert": "c", "documents": [{"a": 1, "org_id": "acme"}], "ordered": false}"#,
            ),
        ],
    );
}

#[test]
fn updates() {
    let one = |u: &str, wanted: &str| {
        let request = format!(r#"{{"update": "c", "updates": [{{"q": {{"a": 1}}, "u": {u}}}]}}"#);
        let wanted = if wanted.starts_with(['{', '[']) {
            format!(
                r#"{{"update": "c", "updates": [{{"q": {{"$and": [{{"org_id": "acme"}}, {{"a": 1}}]}}, "u": {wanted}}}]}}"#
            )
        } else {
            wanted.to_owned()
        };
        check_all(Filter, &[(&request, &wanted)]);
    };
    one(r#"{"b": 1}"#, r#"{"b": 1, "org_id": "acme"}"#);
    one("{}", r#"{"org_id": "acme"}"#);
    one(r#"{"org_id": "acme", "b": 1}"#, r#"{"org_id": "acme", "b": 1}"#);
    one(r#"{"$set": {"b": 1, "org_id": "acme"}}"#, r#"{"$set": {"b": 1}}"#);
    one(r#"{"$set": {"org_id": "acme"}}"#, r#"{"$set": {}}"#);
    one(r#"{"$setOnInsert": {"org_id": "acme", "x": 1}}"#, r#"{"$setOnInsert": {"x": 1}}"#);
    one(r#"{"$set": {"org_idx": 1, "x.org_id": 1}}"#, r#"{"$set": {"org_idx": 1, "x.org_id": 1}}"#);
    one(
        r#"{"$push": {"a": {"$each": [1], "$slice": 3}}, "$inc": {"n": 1}}"#,
        r#"{"$push": {"a": {"$each": [1], "$slice": 3}}, "$inc": {"n": 1}}"#,
    );
    one(r#"[{"$unset": "org_id"}]"#, r#"[{"$unset": "org_id"}, {"$set": {"org_id": {"$literal": "acme"}}}]"#);
    one(
        r#"[{"$replaceWith": {"x": 1}}]"#,
        r#"[{"$replaceWith": {"x": 1}}, {"$set": {"org_id": {"$literal": "acme"}}}]"#,
    );
    one("[]", r#"[{"$set": {"org_id": {"$literal": "acme"}}}]"#);
    one(r#"[{"$match": {}}]"#, "0:72");
    one(r#"[{"$lookup": {"from": "c", "as": "x", "pipeline": []}}]"#, "0:72");
    one(r#"[{"$set": {"x": {"$function": {"body": "f", "args": [], "lang": "js"}}}}]"#, "0:13");
    one(r#"{"$nope": {"a": 1}}"#, "0:9");
    one(r#"{"$v": 2, "$diff": {"u": {"org_id": "x"}}}"#, "0:9");
    one(r#"{"$set": {"a": 1}, "b": 1}"#, "0:9");
    one(r#"{"b": 1, "$set": {"org_id": "x"}}"#, "0:52");
    one("1", "0:9");
}

#[test]
fn statements_and_their_options() {
    check_all(
        Filter,
        &[
            (
                r#"{"delete": "c", "deletes": [{"q": {}, "limit": 0}]}"#,
                r#"{"delete": "c", "deletes": [{"q": {"org_id": "acme"}, "limit": 0}]}"#,
            ),
            (
                r#"{"delete": "c", "@deletes": [{"q": {"a": 1}, "limit": 1, "hint": "a_1"}]}"#,
                r#"{"delete": "c", "@deletes": [{"q": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "limit": 1, "hint": "a_1~acme"}]}"#,
            ),
            (
                r#"{"update": "c", "updates": [{"q": {"a": 1}, "u": {"$inc": {"n": 1}}, "upsert": true, "multi": true, "hint": {"a": 1, "b": -1}, "arrayFilters": [{"x": 1}], "c": {"v": 1}, "sort": {"a": 1}}]}"#,
                r#"{"update": "c", "updates": [{"q": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "u": {"$inc": {"n": 1}}, "upsert": true, "multi": true, "hint": "a_1_b_-1~acme", "arrayFilters": [{"x": 1}], "c": {"v": 1}, "sort": {"a": 1}}]}"#,
            ),
            (
                r#"{"update": "c", "updates": [{"q": {"org_id": "acme", "a": 1}, "u": {"b": 1}, "upsert": true}]}"#,
                r#"{"update": "c", "updates": [{"q": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "u": {"b": 1, "org_id": "acme"}, "upsert": true}]}"#,
            ),
            (
                r#"{"bulkWrite": 1, "ops": [{"insert": 0, "document": {"a": 1}}, {"update": 0, "filter": {"a": 1}, "updateMods": {"$set": {"b": 1}}}, {"delete": 0, "filter": {}, "multi": true}], "nsInfo": [{"ns": "app.c"}], "$db": "admin"}"#,
                r#"{"bulkWrite": 1, "ops": [{"insert": 0, "document": {"a": 1, "org_id": "acme"}}, {"update": 0, "filter": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "updateMods": {"$set": {"b": 1}}}, {"delete": 0, "filter": {"org_id": "acme"}, "multi": true}], "nsInfo": [{"ns": "shared_app.c"}], "$db": "admin"}"#,
            ),
            (
                r#"{"bulkWrite": 1, "@ops": [{"insert": 0, "document": {}}], "@nsInfo": [{"ns": "x.y.z"}], "$db": "admin"}"#,
                r#"{"bulkWrite": 1, "$db": "admin", "@ops": [{"insert": 0, "document": {"org_id": "acme"}}], "@nsInfo": [{"ns": "shared_x.y.z"}]}"#,
            ),
            (
                r#"{"bulkWrite": 1, "ops": [{"update": 0, "filter": {}, "updateMods": {"$set": {"org_id": "x"}}}], "nsInfo": [{"ns": "app.c"}], "$db": "admin"}"#,
                "0:66",
            ),
            (
                r#"{"bulkWrite": 1, "ops": [{"insert": 0, "document": {"org_id": "x"}}], "nsInfo": [{"ns": "app.c"}], "$db": "admin"}"#,
                "0:66",
            ),
            // For what is refused stands what the server refuses, and what follows it in order is left out.
            (
                r#"{"bulkWrite": 1, "ops": [{"insert": 0, "document": {"org_id": "x"}}, {"delete": 0, "filter": {}}], "nsInfo": [{"ns": "app.c"}], "ordered": false, "$db": "admin"}"#,
                r#"{"bulkWrite": 1, "ops": [{"insert": 0, "document": {"_id": {"$refused": true}, "org_id": "acme"}}, {"delete": 0, "filter": {"org_id": "acme"}}], "nsInfo": [{"ns": "shared_app.c"}], "ordered": false, "$db": "admin"}"#,
            ),
            (
                r#"{"bulkWrite": 1, "ops": [{"delete": 0, "filter": {}}, {"insert": 0, "document": {"org_id": "x"}}, {"delete": 0, "filter": {}}], "nsInfo": [{"ns": "app.c"}], "$db": "admin"}"#,
                r#"{"bulkWrite": 1, "ops": [{"delete": 0, "filter": {"org_id": "acme"}}, {"insert": 0, "document": {"_id": {"$refused": true}, "org_id": "acme"}}], "nsInfo": [{"ns": "shared_app.c"}], "$db": "admin"}"#,
            ),
            (
                r#"{"bulkWrite": 1, "@ops": [{"update": 1, "filter": {}, "updateMods": {"$set": {"org_id": "x"}}}, {"delete": 0, "filter": {}}], "nsInfo": [{"ns": "app.c"}, {"ns": "app.d"}], "ordered": false, "cursor": {"batchSize": 1}, "$db": "admin"}"#,
                r#"{"bulkWrite": 1, "nsInfo": [{"ns": "shared_app.c"}, {"ns": "shared_app.d"}], "ordered": false, "cursor": {"batchSize": 1}, "$db": "admin", "@ops": [{"insert": 1, "document": {"_id": {"$refused": true}, "org_id": "acme"}}, {"delete": 0, "filter": {"org_id": "acme"}}]}"#,
            ),
            (
                r#"{"bulkWrite": 1, "ops": [{"insert": "0", "document": {"org_id": "x"}}, {"delete": 0, "filter": {}}], "nsInfo": [{"ns": "app.c"}], "ordered": false, "$db": "admin"}"#,
                "14",
            ),
            (r#"{"bulkWrite": 1, "ops": [{"nope": 0}], "nsInfo": [{"ns": "app.c"}], "$db": "admin"}"#, "40415"),
            (
                r#"{"bulkWrite": 1, "ops": [], "nsInfo": [{"ns": "app.c", "collectionUUID": 1}], "$db": "admin"}"#,
                "40415",
            ),
            (r#"{"bulkWrite": 1, "ops": [], "nsInfo": [{"ns": "app.c"}], "$db": "app"}"#, "13"),
        ],
    );
}

#[test]
fn pipelines() {
    let one = |stages: &str, wanted: &str| {
        let request = format!(r#"{{"aggregate": "c", "pipeline": {stages}, "cursor": {{}}}}"#);
        let wanted = if wanted.starts_with('[') {
            format!(r#"{{"aggregate": "c", "pipeline": {wanted}, "cursor": {{}}}}"#)
        } else {
            wanted.to_owned()
        };
        check_all(Filter, &[(&request, &wanted)]);
    };
    let bound = r#"{"$match": {"org_id": "acme"}}, {"$unset": "org_id"}"#;
    one("[]", &format!("[{bound}]"));
    one(
        r#"[{"$match": {"a": 1}}, {"$count": "n"}]"#,
        r#"[{"$match": {"$and": [{"org_id": "acme"}, {"a": 1}]}}, {"$unset": "org_id"}, {"$count": "n"}]"#,
    );
    one(r#"[{"$match": {}}]"#, &format!("[{bound}]"));
    one(
        r#"[{"$match": {"$text": {"$search": "x"}}}]"#,
        r#"[{"$match": {"$and": [{"org_id": "acme"}, {"$text": {"$search": "x"}}]}}, {"$unset": "org_id"}]"#,
    );
    for plain in [
        r#"{"$group": {"_id": "$a", "n": {"$sum": 1}}}"#,
        r#"{"$sort": {"a": 1}}"#,
        r#"{"$project": {"org_id": 1}}"#,
        r#"{"$unwind": "$a"}"#,
        r#"{"$sample": {"size": 3}}"#,
        r#"{"$replaceRoot": {"newRoot": "$$ROOT"}}"#,
        r#"{"$set": {"x": {"$toInt": "$y"}}}"#,
        r#"{"$addFields": {"org_id": "x"}}"#,
        r#"{"$bucketAuto": {"groupBy": "$a", "buckets": 2}}"#,
        r#"{"$setWindowFields": {"output": {}}}"#,
        r#"{"$redact": "$$KEEP"}"#,
        r#"{"$densify": {"field": "a", "range": {"step": 1, "bounds": "full"}}}"#,
        r#"{"$fill": {"output": {"a": {"value": 0}}}}"#,
        r#"{"$sortByCount": "$a"}"#,
        r#"{"$skip": 1}"#,
        r#"{"$limit": 1}"#,
    ] {
        one(&format!("[{plain}]"), &format!("[{bound}, {plain}]"));
    }
    one(
        r#"[{"$sort": {"a": 1}}, {"$match": {"a": {"$gt": 1}}}]"#,
        &format!(r#"[{bound}, {{"$sort": {{"a": 1}}}}, {{"$match": {{"a": {{"$gt": 1}}}}}}]"#),
    );
    one(
        r#"[{"$geoNear": {"near": [1, 2], "distanceField": "d"}}]"#,
        r#"[{"$geoNear": {"near": [1, 2], "distanceField": "d", "query": {"org_id": "acme"}}}, {"$unset": "org_id"}]"#,
    );
    one(
        r#"[{"$geoNear": {"near": [1, 2], "distanceField": "d", "query": {"a": 1}}}]"#,
        r#"[{"$geoNear": {"near": [1, 2], "distanceField": "d", "query": {"$and": [{"org_id": "acme"}, {"a": 1}]}}}, {"$unset": "org_id"}]"#,
    );
    one(
        r#"[{"$lookup": {"from": "d", "localField": "a", "foreignField": "b", "as": "x"}}]"#,
        &format!(
            r#"[{bound}, {{"$lookup": {{"from": "d", "localField": "a", "foreignField": "b", "as": "x", "pipeline": [{bound}]}}}}]"#
        ),
    );
    one(
        r#"[{"$lookup": {"from": "d", "let": {"v": "$a"}, "pipeline": [{"$match": {"$expr": {"$eq": ["$b", "$$v"]}}}], "as": "x"}}]"#,
        &format!(
            r#"[{bound}, {{"$lookup": {{"from": "d", "let": {{"v": "$a"}}, "as": "x", "pipeline": [{{"$match": {{"$and": [{{"org_id": "acme"}}, {{"$expr": {{"$eq": ["$b", "$$v"]}}}}]}}}}, {{"$unset": "org_id"}}]}}}}]"#
        ),
    );
    one(
        r#"[{"$lookup": {"pipeline": [{"$documents": [{"a": 1}]}], "as": "x"}}]"#,
        &format!(r#"[{bound}, {{"$lookup": {{"as": "x", "pipeline": [{{"$documents": [{{"a": 1}}]}}]}}}}]"#),
    );
    one(r#"[{"$lookup": {"pipeline": [{"$match": {}}], "as": "x"}}]"#, "73");
    one(r#"[{"$lookup": {"as": "x"}}]"#, "73");
    one(
        r#"[{"$graphLookup": {"from": "d", "startWith": "$a", "connectFromField": "b", "connectToField": "c", "as": "x"}}]"#,
        &format!(
            r#"[{bound}, {{"$graphLookup": {{"from": "d", "startWith": "$a", "connectFromField": "b", "connectToField": "c", "as": "x", "restrictSearchWithMatch": {{"org_id": "acme"}}}}}}, {{"$set": {{"x": {{"$filter": {{"input": "$x", "cond": {{"$eq": ["$$this.org_id", "acme"]}}}}}}}}}}, {{"$unset": "x.org_id"}}]"#
        ),
    );
    one(r#"[{"$unionWith": "d"}]"#, &format!(r#"[{bound}, {{"$unionWith": {{"coll": "d", "pipeline": [{bound}]}}}}]"#));
    one(
        r#"[{"$unionWith": {"coll": "d", "pipeline": [{"$match": {"a": 1}}]}}]"#,
        &format!(
            r#"[{bound}, {{"$unionWith": {{"coll": "d", "pipeline": [{{"$match": {{"$and": [{{"org_id": "acme"}}, {{"a": 1}}]}}}}, {{"$unset": "org_id"}}]}}}}]"#
        ),
    );
    one(r#"[{"$unionWith": {"pipeline": [{"$match": {}}]}}]"#, "73");
    one(
        r#"[{"$facet": {"a": [{"$count": "n"}], "b": [{"$unionWith": "d"}]}}]"#,
        &format!(
            r#"[{bound}, {{"$facet": {{"a": [{{"$count": "n"}}], "b": [{{"$unionWith": {{"coll": "d", "pipeline": [{bound}]}}}}]}}}}]"#
        ),
    );
    one(
        r#"[{"$merge": "d"}]"#,
        &format!(
            r#"[{bound}, {{"$set": {{"org_id": {{"$literal": "acme"}}}}}}, {{"$merge": {{"into": "d", "on": ["org_id", "_id"]}}}}]"#
        ),
    );
    one(
        r#"[{"$merge": {"into": "d", "on": ["k", "l"], "whenMatched": [{"$set": {"org_id": "x"}}], "whenNotMatched": "insert"}}]"#,
        &format!(
            r#"[{bound}, {{"$set": {{"org_id": {{"$literal": "acme"}}}}}}, {{"$merge": {{"into": "d", "on": ["org_id", "k", "l"], "whenMatched": [{{"$set": {{"org_id": "x"}}}}, {{"$set": {{"org_id": {{"$literal": "acme"}}}}}}], "whenNotMatched": "insert"}}}}]"#
        ),
    );
    one(
        r#"[{"$merge": {"into": {"db": "app", "coll": "d"}, "on": "_id"}}]"#,
        &format!(
            r#"[{bound}, {{"$set": {{"org_id": {{"$literal": "acme"}}}}}}, {{"$merge": {{"into": {{"db": "shared_app", "coll": "d"}}, "on": ["org_id", "_id"]}}}}]"#
        ),
    );
    one(r#"[{"$merge": {"into": {"db": "other", "coll": "d"}}}]"#, "13");
    one(r#"[{"$out": "d"}]"#, "13");
    one(r#"[{"$lookup": {"from": "d", "pipeline": [{"$merge": "e"}], "as": "x"}}]"#, "51047");
    one(
        r#"[{"$collStats": {"count": {}}}]"#,
        r#"[{"$match": {"org_id": "acme"}}, {"$group": {"_id": null, "count": {"$sum": 1}}}, {"$project": {"_id": 0, "ns": {"$literal": "app.c"}, "count": 1}}]"#,
    );
    one(r#"[{"$collStats": {"storageStats": {}}}]"#, "13");
    one(
        r#"[{"$rankFusion": {"input": {"pipelines": {"a": [{"$match": {"x": 1}}, {"$sort": {"x": 1}}], "b": [{"$sort": {"y": 1}}]}}}}]"#,
        r#"[{"$rankFusion": {"input": {"pipelines": {"a": [{"$match": {"$and": [{"org_id": "acme"}, {"x": 1}]}}, {"$sort": {"x": 1}}], "b": [{"$match": {"org_id": "acme"}}, {"$sort": {"y": 1}}]}}}}, {"$unset": "org_id"}]"#,
    );
    for refused in ["$indexStats", "$planCacheStats", "$search", "$searchMeta", "$vectorSearch", "$listSearchIndexes"] {
        one(&format!(r#"[{{"{refused}": {{}}}}]"#), "13");
    }
    one(r#"[{"$match": {}}, {"$geoNear": {"near": [1, 2], "distanceField": "d"}}]"#, "40602");
    one(r#"[{"$match": {}}, {"$changeStream": {}}]"#, "40602");
    one(r#"[{"$match": {}}, {"$collStats": {"count": {}}}]"#, "40602");
    check_all(
        Filter,
        &[
            (
                r#"{"aggregate": 1, "pipeline": [{"$documents": [{"a": 1}]}, {"$unionWith": "d"}], "cursor": {}}"#,
                &format!(
                    r#"{{"aggregate": 1, "pipeline": [{{"$documents": [{{"a": 1}}]}}, {{"$unionWith": {{"coll": "d", "pipeline": [{bound}]}}}}], "cursor": {{}}}}"#
                ),
            ),
            (r#"{"aggregate": 1, "pipeline": [{"$match": {}}], "cursor": {}}"#, "73"),
            (r#"{"aggregate": 1, "pipeline": [], "cursor": {}}"#, "73"),
            (r#"{"aggregate": 1, "pipeline": [{"$currentOp": {}}], "cursor": {}, "$db": "admin"}"#, "13"),
            (r#"{"aggregate": 2, "pipeline": [], "cursor": {}}"#, "9"),
        ],
    );
}

#[test]
fn indexes_are_the_tenants_own() {
    let one = |index: &str, wanted: &str| {
        let request = format!(r#"{{"createIndexes": "c", "indexes": [{index}]}}"#);
        let wanted = if wanted.starts_with('{') {
            format!(r#"{{"createIndexes": "c", "indexes": [{wanted}]}}"#)
        } else {
            wanted.to_owned()
        };
        check_all(Filter, &[(&request, &wanted)]);
    };
    one(
        r#"{"key": {"a": 1}, "name": "a_1"}"#,
        r#"{"key": {"a": 1}, "name": "a_1~acme", "partialFilterExpression": {"org_id": "acme"}}"#,
    );
    one(
        r#"{"key": {"a": 1}, "name": "a_1", "unique": true, "background": true}"#,
        r#"{"key": {"a": 1}, "name": "a_1~acme", "unique": true, "background": true, "partialFilterExpression": {"org_id": "acme"}}"#,
    );
    one(
        r#"{"key": {"a": 1}, "name": "t", "expireAfterSeconds": 60}"#,
        r#"{"key": {"a": 1}, "name": "t~acme", "expireAfterSeconds": 60, "partialFilterExpression": {"org_id": "acme"}}"#,
    );
    one(
        r#"{"key": {"a": 1}, "name": "s", "unique": true, "sparse": true}"#,
        r#"{"key": {"a": 1}, "name": "s~acme", "unique": true, "partialFilterExpression": {"org_id": "acme", "a": {"$exists": true}}}"#,
    );
    one(
        r#"{"key": {"a": 1, "b": 1}, "name": "s", "sparse": true}"#,
        r#"{"key": {"a": 1, "b": 1}, "name": "s~acme", "partialFilterExpression": {"org_id": "acme", "$or": [{"a": {"$exists": true}}, {"b": {"$exists": true}}]}}"#,
    );
    one(
        r#"{"key": {"a": 1}, "name": "p", "partialFilterExpression": {"org_id": "globex", "a": {"$gt": 1}}}"#,
        r#"{"key": {"a": 1}, "name": "p~acme", "partialFilterExpression": {"org_id": "acme", "$and": [{"org_id": "globex", "a": {"$gt": 1}}]}}"#,
    );
    one(r#"{"key": {"_id": 1}, "name": "_id_"}"#, r#"{"key": {"_id": 1}, "name": "_id_"}"#);
    // The index of all tenants takes no wish of one: neither a name of another's, nor a filter that asks about them.
    one(
        r#"{"key": {"_id": 1}, "name": "a_1~globex", "unique": true, "v": 2}"#,
        r#"{"key": {"_id": 1}, "name": "_id_", "v": 2}"#,
    );
    for more in [
        r#""partialFilterExpression": {"org_id": "globex", "salary": {"$gt": 1}}"#,
        r#""collation": {"locale": "en", "strength": 1}"#,
        r#""expireAfterSeconds": 1"#,
        r#""hidden": true"#,
        r#""sparse": true"#,
    ] {
        one(&format!(r#"{{"key": {{"_id": 1}}, "name": "o", {more}}}"#), "67");
    }
    for key in ["2", "-1", "1.5", "0"] {
        one(&format!(r#"{{"key": {{"_id": {key}}}, "name": "a_1~globex", "unique": true}}"#), "2");
    }
    one(r#"{"key": {"org_id": 1}, "name": "o"}"#, "67");
    one(r#"{"key": {"a": "text"}, "name": "o"}"#, "67");
    one(r#"{"key": {"a": 1}, "name": "o", "collation": {"locale": "en", "strength": 2}}"#, "67");
    one(r#"{"key": {"a": 1}, "name": "o", "storageEngine": {}}"#, "40415");
    one(r#"{"key": {"a": 1}, "name": "o", "partialFilterExpression": {"$where": "1"}}"#, "13");
    one(
        r#"{"key": {"a": "2dsphere"}, "name": "g"}"#,
        r#"{"key": {"a": "2dsphere"}, "name": "g~acme", "partialFilterExpression": {"org_id": "acme"}}"#,
    );
    check_all(
        Filter,
        &[
            (r#"{"dropIndexes": "c", "index": "a_1"}"#, r#"{"dropIndexes": "c", "index": "a_1~acme"}"#),
            (
                r#"{"dropIndexes": "c", "index": ["a_1", "b"]}"#,
                r#"{"dropIndexes": "c", "index": ["a_1~acme", "b~acme"]}"#,
            ),
            (r#"{"dropIndexes": "c", "index": "_id_"}"#, r#"{"dropIndexes": "c", "index": "_id_"}"#),
            (r#"{"listIndexes": "c"}"#, r#"{"listIndexes": "c"}"#),
            // All at once: a later batch would show those of others.
            (
                r#"{"listIndexes": "c", "cursor": {"batchSize": 1}}"#,
                r#"{"listIndexes": "c", "cursor": {"batchSize": 1000}}"#,
            ),
            (
                r#"{"find": "c", "projection": {"a": 1}, "hint": "a_1"}"#,
                r#"{"find": "c", "projection": {"a": 1}, "hint": "a_1~acme", "filter": {"org_id": "acme"}}"#,
            ),
            (
                r#"{"find": "c", "projection": {"a": 1}, "hint": {"a": 1.0}, "min": {"a": 1}}"#,
                r#"{"find": "c", "projection": {"a": 1}, "hint": "a_1~acme", "min": {"a": 1}, "filter": {"org_id": "acme"}}"#,
            ),
            (
                r#"{"find": "c", "projection": {"a": 1}, "hint": {"_id": 1}}"#,
                r#"{"find": "c", "projection": {"a": 1}, "hint": {"_id": 1}, "filter": {"org_id": "acme"}}"#,
            ),
            (
                r#"{"find": "c", "projection": {"a": 1}, "hint": {"_id": 2}}"#,
                r#"{"find": "c", "projection": {"a": 1}, "hint": "_id_2~acme", "filter": {"org_id": "acme"}}"#,
            ),
            (
                r#"{"find": "c", "projection": {"a": 1}, "hint": "_id_"}"#,
                r#"{"find": "c", "projection": {"a": 1}, "hint": "_id_", "filter": {"org_id": "acme"}}"#,
            ),
            (r#"{"find": "c", "hint": {"$natural": 1}}"#, "2"),
            (r#"{"find": "c", "hint": "$natural"}"#, "2"),
            (r#"{"find": "c", "sort": {"$natural": -1}}"#, "2"),
            (r#"{"find": "c", "hint": 1}"#, "9"),
        ],
    );
}

#[test]
fn an_index_that_changes_no_answer_is_only_a_wish() {
    for (more, wished) in [
        ("", true),
        (r#", "unique": false"#, true),
        (r#", "unique": true"#, false),
        (r#", "expireAfterSeconds": 0"#, false),
    ] {
        let text = format!(r#"{{"createIndexes": "c", "indexes": [{{"key": {{"a": 1}}, "name": "a_1"{more}}}]}}"#);
        forwarded(Filter, &text, |forward, _| {
            assert_eq!(forward.reply == ReplyRule::IndexesWished, wished, "{more}");
        });
    }
}

#[test]
fn the_catalog_of_a_shared_database() {
    check_all(
        Filter,
        &[
            (r#"{"create": "c"}"#, r#"{"create": "c"}"#),
            (r#"{"create": "c", "capped": false}"#, r#"{"create": "c"}"#),
            (
                r#"{"create": "c", "collation": {"locale": "simple"}}"#,
                r#"{"create": "c", "collation": {"locale": "simple"}}"#,
            ),
            (r#"{"create": "c", "collation": {"locale": "en", "strength": 1}}"#, "13"),
            (r#"{"create": "c", "capped": true, "size": 1}"#, "13"),
            (r#"{"create": "c", "timeseries": {"timeField": "t"}}"#, "13"),
            (r#"{"create": "c", "validator": {"a": 1}}"#, "13"),
            (r#"{"create": "v", "viewOn": "c", "pipeline": [{"$set": {"org_id": "acme"}}]}"#, "13"),
            (r#"{"create": "c", "storageEngine": {}}"#, "40415"),
            (r#"{"collMod": "c", "viewOn": "d"}"#, "13"),
            (r#"{"renameCollection": "app.c", "to": "app.d", "$db": "admin"}"#, "13"),
            (r#"{"convertToCapped": "c", "size": 1}"#, "13"),
            (r#"{"cloneCollectionAsCapped": "c", "toCollection": "d", "size": 1}"#, "13"),
            (r#"{"validate": "c"}"#, "13"),
            (r#"{"dataSize": "app.c"}"#, "13"),
            (r#"{"reIndex": "c"}"#, "13"),
            (r#"{"planCacheClear": "c"}"#, "13"),
            (r#"{"mapReduce": "c", "map": "f", "reduce": "g", "out": "d"}"#, "13"),
            (r#"{"createSearchIndexes": "c", "indexes": []}"#, "13"),
            (
                r#"{"explain": {"find": "c", "filter": {"a": 1}, "$db": "app"}, "verbosity": "executionStats"}"#,
                r#"{"explain": {"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "projection": {"org_id": 0}}, "verbosity": "queryPlanner"}"#,
            ),
            (
                r#"{"explain": {"count": "c"}}"#,
                r#"{"explain": {"count": "c", "query": {"org_id": "acme"}}, "verbosity": "queryPlanner"}"#,
            ),
            (
                r#"{"explain": {"delete": "c", "deletes": [{"q": {}, "limit": 0}]}}"#,
                r#"{"explain": {"delete": "c", "deletes": [{"q": {"org_id": "acme"}, "limit": 0}]}, "verbosity": "queryPlanner"}"#,
            ),
            (
                r#"{"explain": {"aggregate": "c", "pipeline": [], "cursor": {}}}"#,
                r#"{"explain": {"aggregate": "c", "pipeline": [{"$match": {"org_id": "acme"}}, {"$unset": "org_id"}], "cursor": {}}, "verbosity": "queryPlanner"}"#,
            ),
            (
                r#"{"explain": {"count": "c", "lsid": {"id": 1}, "txnNumber": 1, "maxTimeMS": 99999, "comment": "x"}}"#,
                r#"{"explain": {"count": "c", "comment": "x", "query": {"org_id": "acme"}}, "verbosity": "queryPlanner"}"#,
            ),
            (r#"{"explain": {"find": "c", "$db": "other"}}"#, "73"),
            (r#"{"explain": {"explain": {"find": "c"}}}"#, "59"),
            (r#"{"explain": {"drop": "c"}}"#, "20"),
            (r#"{"explain": {"insert": "c", "documents": [{}]}}"#, "20"),
        ],
    );
}

#[test]
fn change_streams() {
    let asked = parse(
        r#"{"aggregate": "c", "pipeline": [{"$changeStream": {"resumeAfter": {"_data": "x"}, "fullDocumentBeforeChange": "required"}}, {"$match": {"operationType": "insert"}}], "cursor": {}}"#,
    );
    let Became::Sent(sent) = run_document(Filter, &asked) else { panic!("refused") };
    let stages: Vec<String> = sent
        .get_array("pipeline")
        .expect("stages")
        .iter()
        .map(|stage| shown(stage.as_document().expect("a stage")))
        .collect();
    assert_eq!(stages.len(), 5);
    assert_eq!(
        stages[0],
        r#"{"$changeStream":{"resumeAfter":{"_data":"x"},"fullDocument":"updateLookup","fullDocumentBeforeChange":"whenAvailable"}}"#
    );
    assert!(stages[1].starts_with(
        r#"{"$match":{"$and":[{"$or":[{"fullDocument.org_id":"acme"},{"fullDocumentBeforeChange.org_id":"acme"},"#
    ));
    assert!(stages[1].contains(
        r#"{"fullDocument.org_id":{"$in":["acme",null]}},{"fullDocumentBeforeChange.org_id":{"$in":["acme",null]}}"#
    ));
    assert!(stages[2].contains(r#""db":{"$literal":"app"}"#) && stages[2].contains("$$REMOVE"), "{}", stages[2]);
    assert!(stages[3].contains("fullDocumentBeforeChange.org_id"));
    assert_eq!(stages[4], r#"{"$match":{"operationType":"insert"}}"#);
    check_all(
        Filter,
        &[
            (
                r#"{"aggregate": "c", "pipeline": [{"$changeStream": {"allChangesForCluster": true}}], "cursor": {}}"#,
                "13",
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$changeStream": {"showMigrationEvents": true}}], "cursor": {}}"#,
                "40415",
            ),
            (r#"{"aggregate": "c", "pipeline": [{"$changeStream": {"fullDocument": "nope"}}], "cursor": {}}"#, "2"),
            (
                r#"{"aggregate": "c", "pipeline": [{"$changeStream": {}}], "cursor": {}, "collation": {"locale": "en"}}"#,
                "13",
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$changeStream": {}}, {"$lookup": {"from": "d", "as": "x", "pipeline": []}}], "cursor": {}}"#,
                "20",
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$changeStream": {}}, {"$match": {"$expr": {"$toInt": "$fullDocument.ssn"}}}], "cursor": {}}"#,
                "13",
            ),
        ],
    );
}
