//! Change streams: in `filter` only the tenant's events, in both isolations its own names.
//!
//! An event of a shared collection is the tenant's if the document before or after it is, and neither is another's:
//! an `_id` may pass from one tenant to another. Deletes carry no document; they are attributed by the image before
//! them, which the front switches on for a watched collection. An update without that image loses its description,
//! since the document looked up for it may be a later one of another tenant.

use super::{
    Fault, Prepare, expression,
    pipeline::{Cx, Stages, not_an_object, put_names},
    predicate::{self, Collation},
    stage,
};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element},
};

/// What a client may say of a stream. `allChangesForCluster` watches everybody, the rest is the server's.
const KNOWN: [&str; 6] = [
    "fullDocument",
    "fullDocumentBeforeChange",
    "resumeAfter",
    "startAfter",
    "startAtOperationTime",
    "showExpandedEvents",
];

const AFTER: &str = "fullDocument";
const BEFORE: &str = "fullDocumentBeforeChange";

/// `$changeStream` and the stages that confine it.
pub(super) fn put_first<'a>(
    cx: &mut Cx<'_, 'a>,
    stage: &Element<'a>,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    if let Some(document) = stage.document()
        && document.get("allChangesForCluster")?.is_some_and(|all| all.truthy())
    {
        return Err(Fault::forbidden("a change stream of the whole deployment"));
    }
    let mut known = KNOWN.to_vec();
    known.push("allChangesForCluster");
    let given = stage::fields("$changeStream", stage, &known)?;
    if cx.scope.isolation == Isolation::Database {
        put.copy(stage, out);
        put.put(out, |out| put_set(out, |out| put_places(cx, out)));
        return Ok(());
    }
    if cx.collation == Collation::Other {
        return Err(Fault::forbidden("a change stream with a collation"));
    }
    cx.prepare = cx.collection.map(|collection| Prepare::Images { collection });
    put.put(out, |out| put_stream(given, out))?;
    put.put(out, |out| put_match(cx, out));
    let after = wants(given, AFTER, "default")?;
    let before = wants(given, BEFORE, "off")?;
    put.put(out, |out| {
        put_set(out, |out| {
            put_described(cx, out);
            if !after {
                put_unless_update(out);
            }
            put_places(cx, out);
        });
    });
    let mut hidden = vec!["fullDocument.org_id", "documentKey.org_id", "updateDescription.updatedFields.org_id"];
    hidden.push(if before { "fullDocumentBeforeChange.org_id" } else { BEFORE });
    put.put(out, |out| put_names(out, "$unset", &hidden));
    Ok(())
}

/// Whether the client asked for an image.
fn wants(given: Document<'_>, key: &str, none: &str) -> Result<bool, Fault> {
    let Some(element) = given.get(key)? else { return Ok(false) };
    let text = element.str().ok_or_else(|| Fault::wrong_type("$changeStream", element.key, "string"))?;
    Ok(text != none)
}

/// The stage with both images asked for. `required` would let a missing image of another tenant end the stream.
fn put_stream(given: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let open = bson::open_document(out, "$changeStream");
    for element in given {
        let element = element?;
        if ![AFTER, BEFORE].iter().any(|key| key.as_bytes() == element.key) {
            bson::put(out, &element);
        }
    }
    let after = match given.get(AFTER)?.and_then(|element| element.str()) {
        None | Some("default" | "updateLookup") => "updateLookup",
        Some("whenAvailable" | "required") => "whenAvailable",
        Some(other) => return Err(Fault::bad_value(format!("Enumeration value '{other}' for '{AFTER}' is not valid"))),
    };
    match given.get(BEFORE)?.and_then(|element| element.str()) {
        None | Some("off" | "whenAvailable" | "required") => {}
        Some(other) => {
            return Err(Fault::bad_value(format!("Enumeration value '{other}' for '{BEFORE}' is not valid")));
        }
    }
    bson::put_str(out, AFTER, after);
    bson::put_str(out, BEFORE, "whenAvailable");
    bson::close(out, open);
    Ok(())
}

/// Ours by one image, and by neither another's; or the end of the stream.
fn put_match(cx: &Cx<'_, '_>, out: &mut Vec<u8>) {
    let org = cx.scope.org.as_str();
    let stage = bson::open_document(out, "$match");
    let and = bson::open_array(out, "$and");
    let either = bson::open_document(out, "0");
    let or = bson::open_array(out, "$or");
    for (at, path) in [("0", "fullDocument.org_id"), ("1", "fullDocumentBeforeChange.org_id")] {
        let clause = bson::open_document(out, at);
        bson::put_str(out, path, org);
        bson::close(out, clause);
    }
    let clause = bson::open_document(out, "2");
    bson::put_str(out, "operationType", "invalidate");
    bson::close(out, clause);
    bson::close(out, or);
    bson::close(out, either);
    for (at, path) in [("1", "fullDocument.org_id"), ("2", "fullDocumentBeforeChange.org_id")] {
        let clause = bson::open_document(out, at);
        let field = bson::open_document(out, path);
        let list = bson::open_array(out, "$in");
        bson::put_str(out, "0", org);
        bson::put_null(out, "1");
        bson::close(out, list);
        bson::close(out, field);
        bson::close(out, clause);
    }
    bson::close(out, and);
    bson::close(out, stage);
}

fn put_set(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let set = bson::open_document(out, "$set");
    write(out);
    bson::close(out, set);
}

/// `key: {$cond: [test, then, otherwise]}`.
fn put_cond(
    out: &mut Vec<u8>,
    key: &str,
    test: impl FnOnce(&mut Vec<u8>, &str),
    then: impl FnOnce(&mut Vec<u8>, &str),
    otherwise: impl FnOnce(&mut Vec<u8>, &str),
) {
    let field = bson::open_document(out, key);
    let cond = bson::open_array(out, "$cond");
    test(out, "0");
    then(out, "1");
    otherwise(out, "2");
    bson::close(out, cond);
    bson::close(out, field);
}

fn put_eq(out: &mut Vec<u8>, key: &str, operator: &str, left: &str, right: &str) {
    let test = bson::open_document(out, key);
    let eq = bson::open_array(out, operator);
    bson::put_str(out, "0", left);
    bson::put_str(out, "1", right);
    bson::close(out, eq);
    bson::close(out, test);
}

/// What an update changed is told only where the document before it is known to be the tenant's.
fn put_described(cx: &Cx<'_, '_>, out: &mut Vec<u8>) {
    put_cond(
        out,
        "updateDescription",
        |out, key| {
            let test = bson::open_document(out, key);
            let or = bson::open_array(out, "$or");
            put_eq(out, "0", "$ne", "$operationType", "update");
            put_eq(out, "1", "$eq", "$fullDocumentBeforeChange.org_id", cx.scope.org.as_str());
            bson::close(out, or);
            bson::close(out, test);
        },
        |out, key| bson::put_str(out, key, "$updateDescription"),
        |out, key| {
            let literal = bson::open_document(out, key);
            let nothing = bson::open_document(out, "$literal");
            let fields = bson::open_document(out, "updatedFields");
            bson::close(out, fields);
            for list in ["removedFields", "truncatedArrays"] {
                let list = bson::open_array(out, list);
                bson::close(out, list);
            }
            bson::close(out, nothing);
            bson::close(out, literal);
        },
    );
}

/// The document that was looked up for us only.
fn put_unless_update(out: &mut Vec<u8>) {
    put_cond(
        out,
        AFTER,
        |out, key| put_eq(out, key, "$eq", "$operationType", "update"),
        |out, key| bson::put_str(out, key, "$$REMOVE"),
        |out, key| bson::put_str(out, key, "$fullDocument"),
    );
}

/// The logical database wherever an event names one.
fn put_places(cx: &Cx<'_, '_>, out: &mut Vec<u8>) {
    for (key, path) in [("ns", "$ns"), ("to", "$to")] {
        put_cond(
            out,
            key,
            |out, key| {
                let test = bson::open_document(out, key);
                let eq = bson::open_array(out, "$eq");
                let kind = bson::open_document(out, "0");
                bson::put_str(out, "$type", path);
                bson::close(out, kind);
                bson::put_str(out, "1", "object");
                bson::close(out, eq);
                bson::close(out, test);
            },
            |out, key| {
                let merged = bson::open_document(out, key);
                let parts = bson::open_array(out, "$mergeObjects");
                bson::put_str(out, "0", path);
                let own = bson::open_document(out, "1");
                let db = bson::open_document(out, "db");
                bson::put_str(out, "$literal", cx.database);
                bson::close(out, db);
                bson::close(out, own);
                bson::close(out, parts);
                bson::close(out, merged);
            },
            |out, key| bson::put_str(out, key, "$$REMOVE"),
        );
    }
}

/// A client's stage on a stream: those that the server allows there.
pub(super) fn put_later(
    cx: &Cx<'_, '_>,
    stage: &Element<'_>,
    put: &mut Stages,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    match stage.key {
        b"$match" => {
            let clauses = stage.document().ok_or_else(not_an_object)?;
            // It is merged with ours, and no stage that would keep them apart is allowed on a stream.
            if cx.scope.isolation == Isolation::Filter && predicate::raises(clauses, 0)? {
                return Err(Fault::forbidden("on a change stream, an $expr that may raise an error"));
            }
            predicate::check(cx.scope, clauses)?;
        }
        b"$addFields"
        | b"$project"
        | b"$replaceRoot"
        | b"$replaceWith"
        | b"$redact"
        | b"$set"
        | b"$unset"
        | b"$changeStreamSplitLargeEvent" => {
            expression::check(stage, 0)?;
        }
        key => {
            let name = String::from_utf8_lossy(key);
            return Err(Fault::new(
                20,
                "IllegalOperation",
                format!("{name} is not permitted in a $changeStream pipeline"),
            ));
        }
    }
    put.copy(stage, out);
    Ok(())
}
