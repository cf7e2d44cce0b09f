//! The table of commands, and `database` isolation.

use super::{Became, check, check_all, forwarded, parse, place, run_bytes, run_document};
use crate::{
    front::mongo::{
        commands::{self, Found, GENERIC, REFUSED, ROWS, ReplyRule, Treat},
        rewrite::{Prepare, Request, Scope, Verdict, rewrite},
    },
    tenant::Isolation::{self, Database, Filter},
    wire::mongo::bson::{self, Index},
};

#[test]
fn names_are_unique_and_found() {
    let mut seen = std::collections::HashSet::new();
    for row in ROWS {
        assert!(seen.insert(row.name), "{}", row.name);
        assert!(row.alias.is_none_or(|alias| seen.insert(alias)), "{:?}", row.alias);
        assert!(matches!(commands::find(row.name.as_bytes()), Found::Row(found) if found.name == row.name));
        assert!(row.fields.len() <= 32, "{}: the table of fields has 32 places of a command's own", row.name);
        for field in row.fields {
            assert!(!GENERIC.contains(&field.name), "{}.{}", row.name, field.name);
        }
    }
    for name in REFUSED.iter().chain(commands::TEST_ONLY) {
        assert!(seen.insert(name), "{name} twice");
    }
}

#[test]
fn what_is_not_for_tenants_is_refused_in_both() {
    for isolation in [Filter, Database] {
        for name in REFUSED {
            check(isolation, &format!(r#"{{"{name}": 1, "$db": "admin"}}"#), "13");
        }
        for name in commands::TEST_ONLY.iter().chain(&["nope", "Find", "FIND", "find ", ""]) {
            check(isolation, &format!(r#"{{"{name}": 1, "$db": "admin"}}"#), "59");
        }
        check(isolation, r#"{"_configsvrMoveRange": 1, "$db": "admin"}"#, "13");
        check(isolation, r#"{"_isSelf": 1, "$db": "admin"}"#, "13");
    }
}

#[test]
fn every_row_refuses_a_field_it_does_not_know() {
    for isolation in [Filter, Database] {
        for row in ROWS {
            let treat = if isolation == Filter { row.filter } else { row.database };
            if treat != Treat::Forward {
                continue;
            }
            for field in [
                "rawData",
                "collectionUUID",
                "shardVersion",
                "databaseVersion",
                "encryptionInformation",
                "querySettings",
                "$audit",
                "$client",
                "$configServerState",
                "stmtIds",
                "stmtId",
                "fromRouter",
                "fromMongos",
                "needsMerge",
                "exchange",
                "runtimeConstants",
                "isMapReduceCommand",
                "$_passthroughToShard",
                "maxTimeMSOpOnly",
                "mayBypassWriteBlocking",
                "nope",
            ] {
                let name = row.name;
                check(isolation, &format!(r#"{{"{name}": "c", "{field}": 1}}"#), "40415");
            }
        }
    }
}

#[test]
fn commands_of_the_front() {
    for isolation in [Filter, Database] {
        check_all(
            isolation,
            &[
                (r#"{"hello": 1, "$db": "admin"}"#, "Hello"),
                (r#"{"isMaster": 1, "client": {"driver": {}}, "$db": "admin"}"#, "Hello"),
                (r#"{"ismaster": 1, "$db": "app"}"#, "Hello"),
                (r#"{"ping": 1, "$db": "app"}"#, "Ping"),
                (r#"{"buildInfo": 1}"#, "BuildInfo"),
                (r#"{"buildinfo": 1}"#, "BuildInfo"),
                (r#"{"saslStart": 1, "$db": "$external"}"#, "Sasl"),
                (r#"{"listDatabases": 1, "$db": "admin"}"#, "ListDatabases"),
                (r#"{"listCommands": 1}"#, "ListCommands"),
                (r#"{"serverStatus": 1, "$db": "admin"}"#, "ServerStatus"),
                (r#"{"getParameter": "*", "$db": "admin"}"#, "Parameter"),
                (r#"{"connectionStatus": 1}"#, "ConnectionStatus"),
                (r#"{"usersInfo": 1}"#, "UsersInfo"),
            ],
        );
    }
    check_all(
        Filter,
        &[
            (r#"{"drop": "c"}"#, "Drop"),
            (r#"{"drop": "system.js"}"#, "13"),
            (r#"{"drop": "c", "$db": "admin"}"#, "13"),
            (r#"{"dropDatabase": 1}"#, "DropDatabase"),
            (r#"{"dropDatabase": 1, "$db": "local"}"#, "13"),
            (r#"{"listCollections": 1, "nameOnly": true}"#, "ListCollections"),
            (r#"{"collStats": "c"}"#, "CollStats"),
            (r#"{"collstats": "c"}"#, "CollStats"),
            (r#"{"dbStats": 1}"#, "DbStats"),
            (r#"{"dropIndexes": "c", "index": "*"}"#, "DropIndexes"),
            (r#"{"dropIndexes": "c", "index": {"a": 1}}"#, "DropIndexes"),
        ],
    );
}

#[test]
fn database_maps_names_and_changes_nothing_else() {
    check_all(
        Database,
        &[
            (
                r#"{"find": "c", "filter": {"a": 1, "org_id": "x"}}"#,
                r#"{"find": "c", "filter": {"a": 1, "org_id": "x"}}"#,
            ),
            (r#"{"find": "c"}"#, r#"{"find": "c"}"#),
            (
                r#"{"find": "a.b", "sort": {"$natural": 1}, "hint": {"$natural": -1}}"#,
                r#"{"find": "a.b", "sort": {"$natural": 1}, "hint": {"$natural": -1}}"#,
            ),
            (
                r#"{"find": "c", "filter": {"$expr": {"$toInt": "$a"}}, "collation": {"locale": "de"}}"#,
                r#"{"find": "c", "filter": {"$expr": {"$toInt": "$a"}}, "collation": {"locale": "de"}}"#,
            ),
            (r#"{"count": "c"}"#, r#"{"count": "c"}"#),
            (r#"{"distinct": "c", "key": "org_id"}"#, r#"{"distinct": "c", "key": "org_id"}"#),
            (
                r#"{"insert": "c", "documents": [{"org_id": ["a", "b"]}]}"#,
                r#"{"insert": "c", "documents": [{"org_id": ["a", "b"]}]}"#,
            ),
            (
                r#"{"insert": "c", "@documents": [{"a": 1}, {"b": 2}]}"#,
                r#"{"insert": "c", "@documents": [{"a": 1}, {"b": 2}]}"#,
            ),
            (
                r#"{"update": "c", "updates": [{"q": {}, "u": {"$set": {"org_id": 1}}, "upsert": true}]}"#,
                r#"{"update": "c", "updates": [{"q": {}, "u": {"$set": {"org_id": 1}}, "upsert": true}]}"#,
            ),
            (
                r#"{"update": "c", "@updates": [{"q": {}, "u": [{"$set": {"a": 1}}]}]}"#,
                r#"{"update": "c", "@updates": [{"q": {}, "u": [{"$set": {"a": 1}}]}]}"#,
            ),
            (
                r#"{"delete": "c", "deletes": [{"q": {}, "limit": 0}]}"#,
                r#"{"delete": "c", "deletes": [{"q": {}, "limit": 0}]}"#,
            ),
            (
                r#"{"findandmodify": "c", "query": {"a": 1}, "update": {"a": 2}}"#,
                r#"{"findAndModify": "c", "query": {"a": 1}, "update": {"a": 2}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": 1, "pipeline": [{"$documents": [{"a": 1}]}], "cursor": {}}"#,
                r#"{"aggregate": 1, "pipeline": [{"$documents": [{"a": 1}]}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$lookup": {"from": "d", "localField": "a", "foreignField": "b", "as": "x"}}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$lookup": {"from": "d", "localField": "a", "foreignField": "b", "as": "x"}}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$unionWith": "d"}, {"$unionWith": {"coll": "e", "pipeline": []}}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$unionWith": "d"}, {"$unionWith": {"coll": "e", "pipeline": []}}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$out": "d"}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$out": "d"}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$out": {"db": "other", "coll": "d"}}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$out": {"db": "org_acme~other", "coll": "d"}}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$merge": "d"}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$merge": {"into": "d"}}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$merge": {"into": {"db": "x", "coll": "d"}, "on": "k"}}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$merge": {"into": {"db": "org_acme~x", "coll": "d"}, "on": "k"}}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$merge": {"into": {"db": "admin", "coll": "d"}}}], "cursor": {}}"#,
                "13",
            ),
            (r#"{"aggregate": "c", "pipeline": [{"$out": {"db": "local", "coll": "d"}}], "cursor": {}}"#, "13"),
            (
                r#"{"aggregate": "c", "pipeline": [{"$lookup": {"from": {"db": "org_globex~app", "coll": "d"}, "as": "x"}}], "cursor": {}}"#,
                "13",
            ),
            (r#"{"aggregate": "c", "pipeline": [{"$unionWith": {"db": "x", "coll": "d"}}], "cursor": {}}"#, "40415"),
            (r#"{"aggregate": "c", "pipeline": [{"$facet": {"a": [{"$out": "d"}]}}], "cursor": {}}"#, "51047"),
            (
                r#"{"aggregate": "c", "pipeline": [{"$collStats": {"storageStats": {}}}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$collStats": {"storageStats": {}}}, {"$unset": ["host", "shard"]}, {"$set": {"ns": {"$literal": "app.c"}}}], "cursor": {}}"#,
            ),
            (
                r#"{"aggregate": "c", "pipeline": [{"$indexStats": {}}], "cursor": {}}"#,
                r#"{"aggregate": "c", "pipeline": [{"$indexStats": {}}, {"$unset": ["host", "shard"]}], "cursor": {}}"#,
            ),
            (r#"{"drop": "c"}"#, r#"{"drop": "c"}"#),
            (r#"{"dropDatabase": 1}"#, r#"{"dropDatabase": 1}"#),
            (r#"{"collStats": "c"}"#, r#"{"collStats": "c"}"#),
            (r#"{"dbstats": 1, "scale": 1024}"#, r#"{"dbStats": 1, "scale": 1024}"#),
            (
                r#"{"listCollections": 1, "filter": {"name": "c"}}"#,
                r#"{"listCollections": 1, "filter": {"name": "c"}}"#,
            ),
            (r#"{"listIndexes": "c"}"#, r#"{"listIndexes": "c"}"#),
            (
                r#"{"createIndexes": "c", "indexes": [{"key": {"a": 1}, "name": "a_1", "unique": true}]}"#,
                r#"{"createIndexes": "c", "indexes": [{"key": {"a": 1}, "name": "a_1", "unique": true}]}"#,
            ),
            (r#"{"dropIndexes": "c", "index": "*"}"#, r#"{"dropIndexes": "c", "index": "*"}"#),
            (r#"{"create": "c", "capped": true, "size": 1000}"#, r#"{"create": "c", "capped": true, "size": 1000}"#),
            (
                r#"{"create": "v", "viewOn": "c", "pipeline": [{"$match": {"a": 1}}]}"#,
                r#"{"create": "v", "viewOn": "c", "pipeline": [{"$match": {"a": 1}}]}"#,
            ),
            (r#"{"create": "v", "viewOn": "system.users", "pipeline": []}"#, "13"),
            (
                r#"{"create": "v", "viewOn": "c", "pipeline": [{"$lookup": {"from": {"db": "x", "coll": "y"}, "as": "z"}}]}"#,
                "13",
            ),
            (r#"{"create": "v", "viewOn": "c", "pipeline": [{"$out": "x"}]}"#, "51047"),
            (r#"{"create": "c", "validator": {"$where": "1"}}"#, "13"),
            (
                r#"{"collMod": "c", "validator": {"a": {"$type": "int"}}}"#,
                r#"{"collMod": "c", "validator": {"a": {"$type": "int"}}}"#,
            ),
            (r#"{"collMod": "v", "viewOn": "c", "pipeline": [{"$currentOp": {}}]}"#, "13"),
            (r#"{"validate": "c"}"#, r#"{"validate": "c"}"#),
            (r#"{"dataSize": "app.c"}"#, r#"{"dataSize": "org_acme~app.c"}"#),
            (r#"{"dataSize": "admin.c"}"#, "13"),
            (
                r#"{"renameCollection": "app.c", "to": "other.d", "$db": "admin"}"#,
                r#"{"renameCollection": "org_acme~app.c", "to": "org_acme~other.d", "$db": "admin"}"#,
            ),
            (r#"{"renameCollection": "app.c", "to": "local.d", "$db": "admin"}"#, "13"),
            (r#"{"renameCollection": "app.c", "to": "app.system.users", "$db": "admin"}"#, "13"),
            (r#"{"renameCollection": "app.c", "to": "app.d", "$db": "app"}"#, "13"),
            (r#"{"renameCollection": "c", "to": "app.d", "$db": "admin"}"#, "73"),
            (
                r#"{"bulkWrite": 1, "ops": [{"insert": 0, "document": {"a": 1}}], "nsInfo": [{"ns": "app.c"}], "$db": "admin"}"#,
                r#"{"bulkWrite": 1, "ops": [{"insert": 0, "document": {"a": 1}}], "nsInfo": [{"ns": "org_acme~app.c"}], "$db": "admin"}"#,
            ),
            (r#"{"bulkWrite": 1, "ops": [], "nsInfo": [{"ns": "local.oplog.rs"}], "$db": "admin"}"#, "13"),
            (r#"{"mapReduce": "c", "map": "f", "reduce": "g", "out": {"inline": 1}}"#, "13"),
        ],
    );
}

#[test]
fn both_refuse_names_that_are_the_servers() {
    for isolation in [Filter, Database] {
        check_all(
            isolation,
            &[
                (r#"{"find": "c", "$db": "admin"}"#, "13"),
                (r#"{"find": "c", "$db": "local"}"#, "13"),
                (r#"{"find": "oplog.rs", "$db": "LOCAL"}"#, "13"),
                (r#"{"find": "c", "$db": "config"}"#, "13"),
                (r#"{"find": "c", "$db": "a.b"}"#, "73"),
                (r#"{"find": "c", "$db": "a b"}"#, "73"),
                (r#"{"find": "c", "$db": ""}"#, "73"),
                (r#"{"find": "c", "$db": "$external"}"#, "73"),
                (r#"{"find": "system.users"}"#, "13"),
                (r#"{"find": "system.buckets.x"}"#, "13"),
                (r#"{"find": "enxcol_.x.esc"}"#, "13"),
                (r#"{"find": "a$b"}"#, "73"),
                (r#"{"find": "$cmd"}"#, "73"),
                (r#"{"find": ""}"#, "73"),
                (r#"{"find": ".c"}"#, "73"),
                (r#"{"find": 1}"#, "14"),
                (r#"{"find": {"$uuid": "00112233-4455-6677-8899-aabbccddeeff"}}"#, "14"),
                (r#"{"aggregate": "c", "pipeline": [{"$unionWith": "system.users"}], "cursor": {}}"#, "13"),
                (
                    r#"{"aggregate": "c", "pipeline": [{"$lookup": {"from": "system.js", "as": "x", "pipeline": []}}], "cursor": {}}"#,
                    "13",
                ),
                (
                    r#"{"aggregate": "c", "pipeline": [{"$graphLookup": {"from": "system.js", "as": "x", "startWith": 1, "connectFromField": "a", "connectToField": "b"}}], "cursor": {}}"#,
                    "13",
                ),
                (r#"{"insert": "system.js", "documents": [{"_id": "f"}]}"#, "13"),
            ],
        );
        let long = "x".repeat(64);
        check(isolation, &format!(r#"{{"find": "c", "$db": "{long}"}}"#), "73");
        let long = "x".repeat(250);
        check(isolation, &format!(r#"{{"find": "{long}"}}"#), "73");
    }
}

#[test]
fn a_message_without_a_database_or_with_two_is_none() {
    for isolation in [Filter, Database] {
        let mut body = parse(r#"{"find": "c"}"#);
        body.remove("$db");
        assert_eq!(run_document(isolation, &body), Became::No(40571));
        let twice = raw(|out| {
            bson::put_str(out, "find", "c");
            bson::put_str(out, "$db", "app");
            bson::put_str(out, "$db", "local");
        });
        assert_eq!(run_bytes(isolation, &twice, &[]), Became::No(40413));
    }
}

/// A document written by hand, with what a map can't hold.
pub(super) fn raw(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    let open = bson::open(&mut out);
    write(&mut out);
    bson::close(&mut out, open);
    out
}

#[test]
fn time_is_the_smaller_one_and_said_once() {
    for isolation in [Filter, Database] {
        let time = |text: &str| match run_document(isolation, &parse(text)) {
            Became::Sent(sent) => sent.get("maxTimeMS").and_then(|ms| ms.as_i32()),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(time(r#"{"find": "c"}"#), Some(5000));
        assert_eq!(time(r#"{"find": "c", "maxTimeMS": 0}"#), Some(5000));
        assert_eq!(time(r#"{"find": "c", "maxTimeMS": 100}"#), Some(100));
        assert_eq!(time(r#"{"find": "c", "maxTimeMS": 100.0}"#), Some(100));
        assert_eq!(time(r#"{"find": "c", "maxTimeMS": {"$numberLong": "9000"}}"#), Some(5000));
        assert_eq!(time(r#"{"find": "c", "maxTimeMS": {"$numberDecimal": "70"}}"#), Some(70));
        assert_eq!(time(r#"{"getMore": {"$numberLong": "7"}, "collection": "c"}"#), None);
        assert_eq!(time(r#"{"getMore": {"$numberLong": "7"}, "collection": "c", "maxTimeMS": 90000}"#), Some(5000));
        assert_eq!(time(r#"{"killCursors": "c", "cursors": [{"$numberLong": "7"}]}"#), None);
        assert_eq!(time(r#"{"endSessions": [], "$db": "admin"}"#), None);
        check_all(
            isolation,
            &[
                (r#"{"find": "c", "maxTimeMS": -1}"#, "2"),
                (r#"{"find": "c", "maxTimeMS": 1.5}"#, "2"),
                (r#"{"find": "c", "maxTimeMS": "5"}"#, "14"),
                (r#"{"find": "c", "maxTimeMS": {"$numberLong": "9999999999"}}"#, "2"),
            ],
        );
        let twice = raw(|out| {
            bson::put_str(out, "find", "c");
            bson::put_i32(out, "maxTimeMS", 1);
            bson::put_i32(out, "maxTimeMS", 0);
            bson::put_str(out, "$db", "app");
        });
        assert_eq!(run_bytes(isolation, &twice, &[]), Became::No(40413));
    }
}

#[test]
fn types_are_the_servers() {
    for isolation in [Filter, Database] {
        check_all(
            isolation,
            &[
                (r#"{"find": "c", "limit": "1"}"#, "14"),
                (r#"{"find": "c", "singleBatch": "yes"}"#, "14"),
                (r#"{"find": "c", "filter": []}"#, "14"),
                (r#"{"find": "c", "filter": "x"}"#, "14"),
                (r#"{"find": "c", "projection": [1]}"#, "14"),
                (r#"{"find": "c", "sort": 1}"#, "14"),
                (r#"{"find": "c", "let": []}"#, "14"),
                (r#"{"aggregate": "c", "pipeline": {}, "cursor": {}}"#, "14"),
                (r#"{"aggregate": "c", "cursor": {}}"#, "40414"),
                (r#"{"aggregate": "c", "pipeline": [{"$match": {}, "$limit": 1}], "cursor": {}}"#, "40323"),
                (r#"{"aggregate": "c", "pipeline": [{}], "cursor": {}}"#, "40323"),
                (r#"{"aggregate": "c", "pipeline": [1], "cursor": {}}"#, "14"),
                (r#"{"aggregate": "c", "pipeline": [{"$nope": 1}], "cursor": {}}"#, "40324"),
                (r#"{"aggregate": "c", "pipeline": [{"$_internalInhibitOptimization": {}}], "cursor": {}}"#, "40324"),
                (r#"{"insert": "c"}"#, "40414"),
                (r#"{"insert": "c", "documents": [1]}"#, "14"),
                (r#"{"update": "c", "updates": [{"q": {}, "u": {}, "stmtId": 1}]}"#, "40415"),
                (r#"{"update": "c", "updates": [{"u": {"$set": {"a": 1}}}]}"#, "40414"),
                (
                    r#"{"update": "c", "updates": [{"q": {}, "u": {"$set": {"a": 1}}, "upsertSupplied": true}]}"#,
                    "40415",
                ),
                (r#"{"delete": "c", "deletes": [{"limit": 0}]}"#, "40414"),
                (r#"{"getMore": 7, "collection": "c"}"#, "14"),
                (r#"{"getMore": {"$numberLong": "7"}}"#, "40414"),
                (r#"{"find": "c", "lsid": {"id": "x"}}"#, "14"),
                (
                    r#"{"find": "c", "lsid": {"id": {"$uuid": "00112233-4455-6677-8899-aabbccddeeff"}, "uid": "x"}}"#,
                    "40415",
                ),
                (r#"{"find": "c", "txnNumber": {"$numberLong": "1"}}"#, "72"),
                (r#"{"find": "c", "readConcern": "majority"}"#, "14"),
            ],
        );
        for stage in [
            "$currentOp",
            "$listSessions",
            "$listLocalSessions",
            "$queryStats",
            "$mergeCursors",
            "$backupCursor",
            "$listCatalog",
            "$listClusterCatalog",
            "$shardedDataDistribution",
            "$querySettings",
            "$operationMetrics",
        ] {
            check(
                isolation,
                &format!(r#"{{"aggregate": "c", "pipeline": [{{"{stage}": {{}}}}], "cursor": {{}}}}"#),
                "13",
            );
        }
    }
}

#[test]
fn an_argument_may_come_once() {
    for isolation in [Filter, Database] {
        check(isolation, r#"{"insert": "c", "documents": [{"a": 1}], "@documents": [{"b": 1}]}"#, "40413");
        check(isolation, r#"{"find": "c", "@filter": [{"a": 1}]}"#, "40415");
        let body = raw(|out| {
            bson::put_str(out, "insert", "c");
            bson::put_str(out, "$db", "app");
        });
        let document = raw(|out| bson::put_i32(out, "a", 1));
        let twice: [(&str, &[u8]); 2] = [("documents", &document), ("documents", &document)];
        assert_eq!(run_bytes(isolation, &body, &twice), Became::No(40413));
    }
}

#[test]
fn duplicate_keys_are_refused_where_they_decide() {
    let empty = |out: &mut Vec<u8>, key: &str| {
        let open = bson::open_document(out, key);
        bson::close(out, open);
    };
    for isolation in [Filter, Database] {
        let filters = raw(|out| {
            bson::put_str(out, "find", "c");
            empty(out, "filter");
            empty(out, "filter");
            bson::put_str(out, "$db", "app");
        });
        assert_eq!(run_bytes(isolation, &filters, &[]), Became::No(40413));
        let statement = raw(|out| {
            empty(out, "q");
            empty(out, "q");
            bson::put_i32(out, "limit", 0);
        });
        let body = raw(|out| {
            bson::put_str(out, "delete", "c");
            bson::put_str(out, "$db", "app");
        });
        assert_eq!(run_bytes(isolation, &body, &[("deletes", &statement)]), Became::No(40413));
        let stage = raw(|out| {
            bson::put_str(out, "aggregate", "c");
            let stages = bson::open_array(out, "pipeline");
            let stage = bson::open_document(out, "0");
            let lookup = bson::open_document(out, "$lookup");
            bson::put_str(out, "from", "d");
            bson::put_str(out, "from", "e");
            bson::put_str(out, "as", "x");
            bson::close(out, lookup);
            bson::close(out, stage);
            bson::close(out, stages);
            empty(out, "cursor");
            bson::put_str(out, "$db", "app");
        });
        assert_eq!(run_bytes(isolation, &stage, &[]), Became::No(40413));
        let session = raw(|out| {
            bson::put_str(out, "find", "c");
            let lsid = bson::open_document(out, "lsid");
            bson::put_binary(out, "id", 4, &[1; 16]);
            bson::put_binary(out, "id", 4, &[2; 16]);
            bson::close(out, lsid);
            bson::put_str(out, "$db", "app");
        });
        assert_eq!(run_bytes(isolation, &session, &[]), Became::No(40413));
    }
}

fn nested(levels: usize, write: &mut dyn FnMut(&mut Vec<u8>), out: &mut Vec<u8>) {
    if levels == 0 {
        return write(out);
    }
    let and = bson::open_array(out, "$and");
    let clause = bson::open_document(out, "0");
    nested(levels - 1, write, out);
    bson::close(out, clause);
    bson::close(out, and);
}

#[test]
fn depth_and_length_have_ends() {
    for isolation in [Filter, Database] {
        for (levels, fits) in [(10, true), (60, false), (5000, false)] {
            let body = raw(|out| {
                bson::put_str(out, "find", "c");
                let filter = bson::open_document(out, "filter");
                nested(levels, &mut |out| bson::put_i32(out, "a", 1), out);
                bson::close(out, filter);
                bson::put_str(out, "$db", "app");
            });
            let became = run_bytes(isolation, &body, &[]);
            assert_eq!(matches!(became, Became::Sent(_)), fits, "{levels}: {became:?}");
        }
        let stages = |count: usize| {
            raw(|out| {
                bson::put_str(out, "aggregate", "c");
                let pipeline = bson::open_array(out, "pipeline");
                for at in 0..count {
                    let stage = bson::open_document(out, Index::new(at).as_str());
                    bson::put_i32(out, "$skip", 1);
                    bson::close(out, stage);
                }
                bson::close(out, pipeline);
                let cursor = bson::open_document(out, "cursor");
                bson::close(out, cursor);
                bson::put_str(out, "$db", "app");
            })
        };
        assert!(matches!(run_bytes(isolation, &stages(1000), &[]), Became::Sent(_)));
        assert_eq!(run_bytes(isolation, &stages(1001), &[]), Became::No(9));
        let mut inner = String::from(r#"{"coll": "c", "pipeline": []}"#);
        for _ in 0..21 {
            inner = format!(r#"{{"coll": "c", "pipeline": [{{"$unionWith": {inner}}}]}}"#);
        }
        check(
            isolation,
            &format!(r#"{{"aggregate": "c", "pipeline": [{{"$unionWith": {inner}}}], "cursor": {{}}}}"#),
            "2",
        );
    }
}

#[test]
fn bytes_that_are_no_bson_are_refused() {
    let good = raw(|out| {
        bson::put_str(out, "find", "c");
        let filter = bson::open_document(out, "filter");
        bson::put_str(out, "a", "text");
        bson::close(out, filter);
        bson::put_str(out, "$db", "app");
    });
    for isolation in [Filter, Database] {
        for cut in 0..good.len() {
            assert!(!matches!(run_bytes(isolation, &good[..cut], &[]), Became::Sent(_)), "{cut}");
        }
        for at in 0..good.len() {
            for byte in [0, 1, 3, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                survives(isolation, &bad);
            }
        }
        let insert = raw(|out| {
            bson::put_str(out, "insert", "c");
            bson::put_str(out, "$db", "app");
        });
        assert_eq!(run_bytes(isolation, &insert, &[("documents", b"\x05\0\0\0\0\x06\0\0\0")]), Became::No(22));
        assert_eq!(run_bytes(isolation, &insert, &[("documents", b"\x0c\0\0\0\x10a\0\x01\0\0\0")]), Became::No(22));
    }
}

/// No panic, and what is sent is BSON down to its leaves.
fn survives(isolation: Isolation, body: &[u8]) {
    let (org, place) = place(isolation);
    let scope = Scope { isolation, org: &org, place: &place, max_time_ms: 5000, shows_org: false };
    let mut out = Vec::new();
    if let Verdict::Forward(_) = rewrite(&scope, &Request { body, sections: &[] }, &mut out) {
        let sent = bson::Document::new(&out[5..]).expect("a body");
        bson::validate(sent, bson::DEPTH_MAX).expect("BSON");
    }
}

#[test]
fn places_of_ids_are_told() {
    for isolation in [Filter, Database] {
        let id = r#"{"id": {"$uuid": "00112233-4455-6677-8899-aabbccddeeff"}}"#;
        let uuid = [0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
        let text = format!(
            r#"{{"find": "c", "lsid": {id}, "txnNumber": {{"$numberLong": "3"}}, "autocommit": false, "startTransaction": true}}"#
        );
        forwarded(isolation, &text, |forward, out| {
            let at = forward.lsid.expect("a session");
            assert_eq!(out[at..at + 16], uuid);
            let transaction = forward.transaction.expect("one");
            assert!(transaction.number == 3 && transaction.starts && !forward.retryable);
            assert_eq!((forward.database, forward.collection), ("app", Some("c")));
        });
        let text = format!(
            r#"{{"insert": "c", "documents": [{{"a": 1}}], "lsid": {id}, "txnNumber": {{"$numberLong": "3"}}}}"#
        );
        forwarded(isolation, &text, |forward, _| assert!(forward.retryable && forward.transaction.is_none()));
        forwarded(isolation, r#"{"getMore": {"$numberLong": "77"}, "collection": "c"}"#, |forward, out| {
            assert_eq!(out[forward.ids[0]..forward.ids[0] + 8], 77i64.to_le_bytes());
        });
        let text = r#"{"killCursors": "c", "cursors": [{"$numberLong": "5"}, {"$numberLong": "6"}]}"#;
        forwarded(isolation, text, |forward, out| {
            assert_eq!(forward.ids.len(), 2);
            assert_eq!(out[forward.ids[1]..forward.ids[1] + 8], 6i64.to_le_bytes());
        });
        let text = format!(r#"{{"endSessions": [{id}, {id}], "$db": "admin"}}"#);
        forwarded(isolation, &text, |forward, out| {
            assert_eq!(forward.ids.len(), 2);
            assert_eq!(out[forward.ids[1]..forward.ids[1] + 16], uuid);
        });
        for name in ["$cmd.aggregate", "$cmd.listCollections"] {
            let text = format!(r#"{{"getMore": {{"$numberLong": "77"}}, "collection": "{name}"}}"#);
            forwarded(isolation, &text, |forward, _| assert_eq!(forward.collection, None));
        }
        let text = r#"{"getMore": {"$numberLong": "77"}, "collection": "$cmd.bulkWrite", "$db": "admin"}"#;
        forwarded(isolation, text, |forward, _| {
            assert_eq!((forward.database, forward.reply), ("admin", ReplyRule::BulkWrite));
        });
        check(isolation, r#"{"getMore": {"$numberLong": "77"}, "collection": "c", "$db": "admin"}"#, "13");
        check(isolation, r#"{"getMore": {"$numberLong": "77"}, "collection": "system.users"}"#, "13");
    }
}

#[test]
fn a_watched_or_merged_collection_has_to_be_prepared() {
    let watch = r#"{"aggregate": "c", "pipeline": [{"$changeStream": {}}], "cursor": {}}"#;
    let merge = r#"{"aggregate": "c", "pipeline": [{"$merge": "d"}], "cursor": {}}"#;
    forwarded(Filter, watch, |forward, _| assert_eq!(forward.prepare, Some(Prepare::Images { collection: "c" })));
    forwarded(Filter, merge, |forward, _| assert_eq!(forward.prepare, Some(Prepare::MergeIndex { collection: "d" })));
    for text in [watch, merge] {
        forwarded(Isolation::Database, text, |forward, _| assert_eq!(forward.prepare, None));
    }
}
