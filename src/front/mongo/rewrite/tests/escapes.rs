//! The ways out of a shared collection that were found in real servers, one test each: named after what it would do.

use super::{Became, check, check_all, parse, run_bytes, run_document, shown, table::raw};
use crate::{
    tenant::Isolation::{self, Database, Filter},
    wire::mongo::bson,
};

#[test]
fn an_org_id_in_the_filter_overrules_the_tenants() {
    // Beside the client's keys a last-wins server would obey the second `org_id`.
    check(
        Filter,
        r#"{"find": "c", "filter": {"org_id": {"$ne": null}}, "projection": {"a": 1}}"#,
        r#"{"find": "c", "filter": {"$and": [{"org_id": "acme"}, {"org_id": {"$ne": null}}]}, "projection": {"a": 1}}"#,
    );
    // The client's own `$and` or `$or` stays inside.
    check(
        Filter,
        r#"{"delete": "c", "deletes": [{"q": {"$or": [{"org_id": "globex"}, {}]}, "limit": 0}]}"#,
        r#"{"delete": "c", "deletes": [{"q": {"$and": [{"org_id": "acme"}, {"$or": [{"org_id": "globex"}, {}]}]}, "limit": 0}]}"#,
    );
}

#[test]
fn two_filters_or_two_keys_in_a_filter() {
    let body = raw(|out| {
        bson::put_str(out, "find", "c");
        let filter = bson::open_document(out, "filter");
        bson::put_str(out, "org_id", "acme");
        bson::put_str(out, "org_id", "globex");
        bson::close(out, filter);
        bson::put_str(out, "$db", "app");
    });
    let Became::Sent(sent) = run_bytes(Filter, &body, &[]) else { panic!("refused") };
    let and = sent.get_document("filter").and_then(|filter| filter.get_array("$and")).expect("bound");
    assert_eq!(and[0].to_string(), r#"{ "org_id": "acme" }"#);
}

#[test]
fn a_collation_that_makes_two_ids_equal() {
    let collation = r#""collation": {"locale": "en", "strength": 1}"#;
    let exact = r#"{"org_id": "acme"}, {"org_id": {"$regex": "^acme$"}}"#;
    check_all(
        Filter,
        &[
            (
                &format!(r#"{{"find": "c", "projection": {{"a": 1}}, {collation}}}"#),
                &format!(r#"{{"find": "c", "projection": {{"a": 1}}, {collation}, "filter": {{"$and": [{exact}]}}}}"#),
            ),
            (
                &format!(r#"{{"find": "c", "filter": {{"a": 1}}, "projection": {{"a": 1}}, {collation}}}"#),
                &format!(
                    r#"{{"find": "c", "filter": {{"$and": [{exact}, {{"a": 1}}]}}, "projection": {{"a": 1}}, {collation}}}"#
                ),
            ),
            (
                &format!(r#"{{"count": "c", {collation}}}"#),
                &format!(r#"{{"count": "c", {collation}, "query": {{"$and": [{exact}]}}}}"#),
            ),
            (
                &format!(r#"{{"distinct": "c", "key": "a", {collation}}}"#),
                &format!(r#"{{"distinct": "c", "key": "a", {collation}, "query": {{"$and": [{exact}]}}}}"#),
            ),
            (
                &format!(r#"{{"aggregate": "c", "pipeline": [{{"$unionWith": "d"}}], "cursor": {{}}, {collation}}}"#),
                &format!(
                    r#"{{"aggregate": "c", "pipeline": [{{"$match": {{"$and": [{exact}]}}}}, {{"$unset": "org_id"}}, {{"$unionWith": {{"coll": "d", "pipeline": [{{"$match": {{"$and": [{exact}]}}}}, {{"$unset": "org_id"}}]}}}}], "cursor": {{}}, {collation}}}"#
                ),
            ),
            (
                &format!(r#"{{"findAndModify": "c", "remove": true, "fields": {{"a": 1}}, {collation}}}"#),
                &format!(
                    r#"{{"findAndModify": "c", "remove": true, "fields": {{"a": 1}}, {collation}, "query": {{"$and": [{exact}]}}}}"#
                ),
            ),
            (
                &format!(
                    r#"{{"delete": "c", "deletes": [{{"q": {{}}, "limit": 0, {collation}}}, {{"q": {{}}, "limit": 0}}]}}"#
                ),
                &format!(
                    r#"{{"delete": "c", "deletes": [{{"q": {{"$and": [{exact}]}}, "limit": 0, {collation}}}, {{"q": {{"org_id": "acme"}}, "limit": 0}}]}}"#
                ),
            ),
            (
                &format!(r#"{{"update": "c", "updates": [{{"q": {{}}, "u": {{"$set": {{"a": 1}}}}, {collation}}}]}}"#),
                &format!(
                    r#"{{"update": "c", "updates": [{{"q": {{"$and": [{exact}]}}, "u": {{"$set": {{"a": 1}}}}, {collation}}}]}}"#
                ),
            ),
            (
                &format!(
                    r#"{{"bulkWrite": 1, "ops": [{{"delete": 0, "filter": {{}}, {collation}}}], "nsInfo": [{{"ns": "app.c"}}], "$db": "admin"}}"#
                ),
                &format!(
                    r#"{{"bulkWrite": 1, "ops": [{{"delete": 0, "filter": {{"$and": [{exact}]}}, {collation}}}], "nsInfo": [{{"ns": "shared_app.c"}}], "$db": "admin"}}"#
                ),
            ),
            // Said to be simple it is simple; an unknown one is not.
            (
                r#"{"count": "c", "collation": {"locale": "simple"}}"#,
                r#"{"count": "c", "collation": {"locale": "simple"}, "query": {"org_id": "acme"}}"#,
            ),
            (
                r#"{"count": "c", "collation": {"locale": 1}}"#,
                r#"{"count": "c", "collation": {"locale": 1}, "query": {"$and": [{"org_id": "acme"}, {"org_id": {"$regex": "^acme$"}}]}}"#,
            ),
        ],
    );
    let twice = raw(|out| {
        bson::put_str(out, "count", "c");
        let collation = bson::open_document(out, "collation");
        bson::put_str(out, "locale", "simple");
        bson::put_str(out, "locale", "en");
        bson::close(out, collation);
        bson::put_str(out, "$db", "app");
    });
    assert_eq!(run_bytes(Filter, &twice, &[]), Became::No(40413));
}

#[test]
fn an_expression_that_fails_on_anothers_document() {
    let raises = r#"{"$toInt": "$ssn"}"#;
    let guarded = r#"{"$expr": {"$cond": [{"$eq": ["$org_id", "acme"]}, {"$toInt": "$ssn"}, false]}}"#;
    check_all(
        Filter,
        &[
            (
                &format!(r#"{{"find": "c", "filter": {{"$or": [{{"$expr": {raises}}}]}}, "projection": {{"a": 1}}}}"#),
                &format!(
                    r#"{{"find": "c", "filter": {{"$and": [{{"org_id": "acme"}}, {{"$or": [{guarded}]}}]}}, "projection": {{"a": 1}}}}"#
                ),
            ),
            (
                &format!(r#"{{"delete": "c", "deletes": [{{"q": {{"$expr": {raises}}}, "limit": 0}}]}}"#),
                &format!(
                    r#"{{"delete": "c", "deletes": [{{"q": {{"$and": [{{"org_id": "acme"}}, {guarded}]}}, "limit": 0}}]}}"#
                ),
            ),
            (
                &format!(r#"{{"aggregate": "c", "pipeline": [{{"$match": {{"$expr": {raises}}}}}], "cursor": {{}}}}"#),
                &format!(
                    r#"{{"aggregate": "c", "pipeline": [{{"$match": {{"$and": [{{"org_id": "acme"}}, {guarded}]}}}}, {{"$unset": "org_id"}}], "cursor": {{}}}}"#
                ),
            ),
            // A later one is kept from being moved to the beginning.
            (
                &format!(
                    r#"{{"aggregate": "c", "pipeline": [{{"$sort": {{"a": 1}}}}, {{"$match": {{"$expr": {raises}}}}}], "cursor": {{}}}}"#
                ),
                &format!(
                    r#"{{"aggregate": "c", "pipeline": [{{"$match": {{"org_id": "acme"}}}}, {{"$unset": "org_id"}}, {{"$sort": {{"a": 1}}}}, {{"$limit": 9223372036854775807}}, {{"$match": {{"$expr": {raises}}}}}], "cursor": {{}}}}"#
                ),
            ),
            // Under a collation `$eq` would let others in.
            (
                &format!(r#"{{"count": "c", "query": {{"$expr": {raises}}}, "collation": {{"locale": "en"}}}}"#),
                r#"{"count": "c", "query": {"$and": [{"org_id": "acme"}, {"org_id": {"$regex": "^acme$"}}, {"$expr": {"$cond": [{"$regexMatch": {"input": "$org_id", "regex": "^acme$"}}, {"$toInt": "$ssn"}, false]}}]}, "collation": {"locale": "en"}}"#,
            ),
            (
                &format!(
                    r#"{{"aggregate": "c", "pipeline": [{{"$graphLookup": {{"from": "d", "startWith": "$a", "connectFromField": "b", "connectToField": "c", "as": "x", "restrictSearchWithMatch": {{"$expr": {raises}}}}}}}], "cursor": {{}}}}"#
                ),
                &format!(
                    r#"{{"aggregate": "c", "pipeline": [{{"$match": {{"org_id": "acme"}}}}, {{"$unset": "org_id"}}, {{"$graphLookup": {{"from": "d", "startWith": "$a", "connectFromField": "b", "connectToField": "c", "as": "x", "restrictSearchWithMatch": {{"$and": [{{"org_id": "acme"}}, {guarded}]}}}}}}, {{"$set": {{"x": {{"$filter": {{"input": "$x", "cond": {{"$eq": ["$$this.org_id", "acme"]}}}}}}}}}}, {{"$unset": "x.org_id"}}], "cursor": {{}}}}"#
                ),
            ),
            // What can't fail keeps its index.
            (
                r#"{"count": "c", "query": {"$expr": {"$and": [{"$gt": ["$a", {"$ifNull": ["$b", 0]}]}, {"$not": ["$c"]}]}}}"#,
                r#"{"count": "c", "query": {"$and": [{"org_id": "acme"}, {"$expr": {"$and": [{"$gt": ["$a", {"$ifNull": ["$b", 0]}]}, {"$not": ["$c"]}]}}]}}"#,
            ),
            (
                r#"{"count": "c", "query": {"$expr": {"$eq": ["$a", {"$literal": {"$toInt": 1}}]}}}"#,
                r#"{"count": "c", "query": {"$and": [{"org_id": "acme"}, {"$expr": {"$eq": ["$a", {"$literal": {"$toInt": 1}}]}}]}}"#,
            ),
        ],
    );
}

#[test]
fn javascript() {
    for isolation in [Filter, Database] {
        check_all(
            isolation,
            &[
                (r#"{"find": "c", "filter": {"$where": "1"}}"#, "13"),
                (r#"{"find": "c", "filter": {"$or": [{"$where": "1"}]}}"#, "13"),
                (r#"{"find": "c", "filter": {"a": {"$elemMatch": {"$where": "1"}}}}"#, "13"),
                (r#"{"find": "c", "filter": {"a": {"$not": {"$where": "1"}}}}"#, "13"),
                (r#"{"find": "c", "filter": {"$expr": {"$function": {"body": "f", "args": [], "lang": "js"}}}}"#, "13"),
                (r#"{"find": "c", "projection": {"x": {"$function": {"body": "f", "args": [], "lang": "js"}}}}"#, "13"),
                (
                    r#"{"aggregate": "c", "pipeline": [{"$group": {"_id": null, "x": {"$accumulator": {}}}}], "cursor": {}}"#,
                    "13",
                ),
                (
                    r#"{"aggregate": "c", "pipeline": [{"$match": {}}, {"$match": {"$where": "1"}}], "cursor": {}}"#,
                    "13",
                ),
                (
                    r#"{"aggregate": "c", "pipeline": [{"$facet": {"a": [{"$set": {"x": {"$function": {}}}}]}}], "cursor": {}}"#,
                    "13",
                ),
                (r#"{"find": "c", "let": {"x": {"$function": {}}}}"#, "13"),
                (r#"{"update": "c", "updates": [{"q": {"$where": "1"}, "u": {"$set": {"a": 1}}}]}"#, "0:13"),
                (
                    r#"{"update": "c", "updates": [{"q": {}, "u": {"$set": {"a": 1}}, "arrayFilters": [{"$where": "1"}]}]}"#,
                    "0:13",
                ),
            ],
        );
    }
}

#[test]
fn variables_that_tell_of_the_login() {
    for isolation in [Filter, Database] {
        check_all(
            isolation,
            &[
                (r#"{"aggregate": "c", "pipeline": [{"$set": {"x": "$$USER_ROLES"}}], "cursor": {}}"#, "13"),
                (r#"{"aggregate": "c", "pipeline": [{"$set": {"x": "$$USER_ROLES.role"}}], "cursor": {}}"#, "13"),
                (r#"{"find": "c", "filter": {"$expr": {"$in": ["x", "$$USER_ROLES.role"]}}}"#, "13"),
                (r#"{"aggregate": "c", "pipeline": [{"$set": {"x": "$$SEARCH_META"}}], "cursor": {}}"#, "13"),
                (r#"{"find": "c", "filter": {"$expr": {"$_internalJsEmit": {}}}}"#, "168"),
            ],
        );
    }
}

#[test]
fn an_array_or_two_keys_as_org_id() {
    check(Filter, r#"{"insert": "c", "documents": [{"org_id": ["acme", "globex"]}]}"#, "0:66");
    let document = raw(|out| {
        bson::put_str(out, "org_id", "acme");
        bson::put_str(out, "org_id", "globex");
    });
    let body = raw(|out| {
        bson::put_str(out, "insert", "c");
        bson::put_str(out, "$db", "app");
    });
    assert_eq!(run_bytes(Filter, &body, &[("documents", &document)]), Became::Failed(vec![(0, 66)]));
    let same = raw(|out| {
        bson::put_str(out, "org_id", "acme");
        bson::put_str(out, "org_id", "acme");
    });
    assert_eq!(run_bytes(Filter, &body, &[("documents", &same)]), Became::Failed(vec![(0, 66)]));
}

#[test]
fn an_update_that_moves_a_document_away() {
    for operator in [
        "$set",
        "$unset",
        "$inc",
        "$mul",
        "$min",
        "$max",
        "$currentDate",
        "$push",
        "$pull",
        "$pullAll",
        "$addToSet",
        "$pop",
        "$bit",
        "$setOnInsert",
        "$rename",
    ] {
        for path in ["org_id", "org_id.x", "org_id.0"] {
            let text = format!(
                r#"{{"update": "c", "updates": [{{"q": {{}}, "u": {{"{operator}": {{"{path}": "globex"}}}}, "upsert": true}}]}}"#
            );
            check(Filter, &text, "0:66");
        }
    }
    check_all(
        Filter,
        &[
            // A value moved into `org_id`.
            (r#"{"update": "c", "updates": [{"q": {}, "u": {"$rename": {"a": "org_id"}}}]}"#, "0:66"),
            (r#"{"update": "c", "updates": [{"q": {}, "u": {"$rename": {"a": "org_id.b"}}}]}"#, "0:66"),
            (r#"{"update": "c", "updates": [{"q": {}, "u": {"$rename": {"a": 1}}}]}"#, "0:2"),
            // Beats the equality that an upsert copies.
            (
                r#"{"update": "c", "updates": [{"q": {}, "u": {"$setOnInsert": {"org_id": "globex"}}, "upsert": true}]}"#,
                "0:66",
            ),
            // A replacement that says another's.
            (r#"{"update": "c", "updates": [{"q": {}, "u": {"org_id": "globex"}}]}"#, "0:66"),
            (r#"{"update": "c", "updates": [{"q": {}, "u": {"org_id": ["acme"]}}]}"#, "0:66"),
            // A value that an upsert would copy out of the filter.
            (
                r#"{"update": "c", "updates": [{"q": {"org_id": "globex"}, "u": {"$set": {"a": 1}}, "upsert": true}]}"#,
                "0:66",
            ),
            (
                r#"{"update": "c", "updates": [{"q": {"$and": [{"org_id": {"$in": ["globex"]}}]}, "u": {"$set": {"a": 1}}, "upsert": true}]}"#,
                "0:66",
            ),
            (
                r#"{"update": "c", "updates": [{"q": {"$or": [{"org_id": "globex"}]}, "u": {"$set": {"a": 1}}, "upsert": true}]}"#,
                "0:66",
            ),
            (
                r#"{"update": "c", "updates": [{"q": {"org_id.x": 1}, "u": {"$set": {"a": 1}}, "upsert": true}]}"#,
                "0:66",
            ),
            // Operators said twice, or mixed with fields.
            (r#"{"update": "c", "updates": [{"q": {}, "u": {"$set": {"a": 1}, "org_id": "globex"}}]}"#, "0:9"),
        ],
    );
    let twice = raw(|out| {
        let q = bson::open_document(out, "q");
        bson::close(out, q);
        let u = bson::open_document(out, "u");
        for org in ["acme", "globex"] {
            let set = bson::open_document(out, "$set");
            bson::put_str(out, "x", org);
            bson::close(out, set);
        }
        bson::close(out, u);
    });
    let body = raw(|out| {
        bson::put_str(out, "update", "c");
        bson::put_str(out, "$db", "app");
    });
    assert_eq!(run_bytes(Filter, &body, &[("updates", &twice)]), Became::Failed(vec![(0, 9)]));
}

#[test]
fn a_replacement_that_loses_org_id() {
    check(
        Filter,
        r#"{"update": "c", "updates": [{"q": {"a": 1}, "u": {"a": 2}}]}"#,
        r#"{"update": "c", "updates": [{"q": {"$and": [{"org_id": "acme"}, {"a": 1}]}, "u": {"a": 2, "org_id": "acme"}}]}"#,
    );
}

#[test]
fn a_merge_by_id_alone_overwrites_others() {
    let asked =
        parse(r#"{"aggregate": "c", "pipeline": [{"$merge": {"into": "d", "whenMatched": "replace"}}], "cursor": {}}"#);
    let Became::Sent(sent) = run_document(Filter, &asked) else { panic!("refused") };
    let text = sent.to_string();
    assert!(text.contains(r#""on": ["org_id", "_id"]"#), "{text}");
}

#[test]
fn a_view_over_everybody() {
    check(Filter, r#"{"create": "v", "viewOn": "c", "pipeline": [{"$set": {"org_id": "acme"}}]}"#, "13");
    check(Filter, r#"{"collMod": "v", "viewOn": "c", "pipeline": []}"#, "13");
}

#[test]
fn the_same_section_and_array() {
    for isolation in [Filter, Database] {
        for (command, list, statement) in [
            ("insert", "documents", r#"{"a": 1}"#),
            ("update", "updates", r#"{"q": {}, "u": {"a": 1}}"#),
            ("delete", "deletes", r#"{"q": {}, "limit": 0}"#),
        ] {
            let text = format!(r#"{{"{command}": "c", "{list}": [{statement}], "@{list}": [{statement}]}}"#);
            check(isolation, &text, "40413");
        }
    }
}

#[test]
fn a_document_that_grows_beyond_the_limit() {
    let body = raw(|out| {
        bson::put_str(out, "insert", "c");
        bson::put_str(out, "$db", "app");
    });
    let document = raw(|out| bson::put_binary(out, "a", 0, &vec![0; 16 * 1024 * 1024 - 20]));
    let both: [(&str, &[u8]); 1] = [("documents", &document)];
    assert_eq!(run_bytes(Filter, &body, &both), Became::Failed(vec![(0, 10334)]));
    assert!(matches!(run_bytes(Database, &body, &both), Became::Sent(_)));
}

#[test]
fn sessions_of_another_login() {
    for isolation in [Filter, Database] {
        for more in
            [r#""uid": {"$binary": {"base64": "AAAA", "subType": "00"}}"#, r#""txnUUID": 1"#, r#""txnNumber": 1"#]
        {
            let text = format!(
                r#"{{"find": "c", "lsid": {{"id": {{"$uuid": "00112233-4455-6677-8899-aabbccddeeff"}}, {more}}}}}"#
            );
            check(isolation, &text, "40415");
        }
        check(isolation, r#"{"killSessions": [{"id": 1}], "$db": "admin"}"#, "14");
        check(isolation, r#"{"killSessions": [], "$db": "admin"}"#, "2");
        for refused in ["killAllSessions", "killAllSessionsByPattern", "killOp", "currentOp"] {
            check(isolation, &format!(r#"{{"{refused}": [], "$db": "admin"}}"#), "13");
        }
    }
}

#[test]
fn watching_everybody() {
    for isolation in [Filter, Database] {
        let text = r#"{"aggregate": 1, "pipeline": [{"$changeStream": {"allChangesForCluster": true}}], "cursor": {}, "$db": "admin"}"#;
        check(isolation, text, "13");
    }
    let asked = parse(r#"{"aggregate": "c", "pipeline": [{"$changeStream": {}}], "cursor": {}}"#);
    let Became::Sent(sent) = run_document(Isolation::Database, &asked) else { panic!("refused") };
    assert!(shown(&sent).contains(r#"{"db":{"$literal":"app"}}"#), "{sent}");
}

#[test]
fn a_number_that_two_parsers_take_for_true_and_false() {
    // Zero with an exponent, as an upsert's and as others' flags.
    for zero in [r#"{"$numberDecimal": "0E+3"}"#, r#"{"$numberDouble": "-0.0"}"#, "0", "false"] {
        let update =
            format!(r#"{{"update": "c", "updates": [{{"q": {{"a": 1}}, "u": {{"b": 1}}, "upsert": {zero}}}]}}"#);
        let asked = r#"{"$and": [{"org_id": "acme"}, {"a": 1}]}"#;
        let became = format!(
            r#"{{"update": "c", "updates": [{{"q": {asked}, "u": {{"b": 1, "org_id": "acme"}}, "upsert": false}}]}}"#
        );
        check(Filter, &update, &became);
        let modify = format!(r#"{{"findAndModify": "c", "query": {{"a": 1}}, "remove": true, "upsert": {zero}}}"#);
        let Became::Sent(sent) = run_document(Filter, &parse(&modify)) else { panic!("refused") };
        assert_eq!((sent.get_bool("upsert").ok(), sent.get_bool("remove").ok()), (Some(false), Some(true)));
    }
    let text =
        r#"{"update": "c", "updates": [{"q": {"org_id": "x"}, "u": {"b": 1}, "upsert": {"$numberDecimal": "1E+3"}}]}"#;
    check(Filter, text, "0:66");
}

#[test]
fn a_cursor_that_nobody_can_have() {
    for isolation in [Filter, Database] {
        for id in [0, -1, i64::MIN] {
            check(isolation, &format!(r#"{{"getMore": {{"$numberLong": "{id}"}}, "collection": "c"}}"#), "43");
        }
    }
}

#[test]
fn where_a_document_lies_among_everybodys() {
    check(Filter, r#"{"find": "c", "showRecordId": true}"#, "13");
    check(Filter, r#"{"find": "c", "projection": {"a": {"$meta": "recordId"}}}"#, "13");
    check(Filter, r#"{"find": "c", "sort": {"a": {"$meta": "recordId"}}}"#, "13");
    for stage in
        [r#"{"$addFields": {"a": {"$meta": "recordId"}}}"#, r#"{"$project": {"a": {"b": {"$meta": "recordId"}}}}"#]
    {
        check(Filter, &format!(r#"{{"aggregate": "c", "pipeline": [{stage}], "cursor": {{}}}}"#), "13");
    }
    // Said and switched off, as mappers do, it is not said.
    check(
        Filter,
        r#"{"find": "c", "showRecordId": false}"#,
        r#"{"find": "c", "filter": {"org_id": "acme"}, "projection": {"org_id": 0}}"#,
    );
}

#[test]
fn more_ids_than_one_command_may_name() {
    let session = r#"{"id": {"$uuid": "00112233-4455-6677-8899-aabbccddeeff"}}"#;
    for (count, refused) in [(10_000, false), (10_001, true)] {
        let (ids, sessions) = (vec![r#"{"$numberLong": "5"}"#; count].join(","), vec![session; count].join(","));
        for text in [
            format!(r#"{{"killCursors": "c", "cursors": [{ids}]}}"#),
            format!(r#"{{"endSessions": [{sessions}], "$db": "admin"}}"#),
            format!(r#"{{"killSessions": [{sessions}], "$db": "admin"}}"#),
        ] {
            assert_eq!(run_document(Filter, &parse(&text)) == Became::No(2), refused, "{count}");
        }
    }
}
