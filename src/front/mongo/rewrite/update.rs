//! What an update may do to a document: in `filter` everything but touch `org_id`.

use super::{DOCUMENT_MAX, Fault, ORG, PIPELINE_STAGES_MAX, Scope, expression, predicate::is_org};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element, Index, kind},
};

/// Update operators. Each of their fields is a path that they write to.
const OPERATORS: [&[u8]; 15] = [
    b"$set",
    b"$unset",
    b"$inc",
    b"$mul",
    b"$min",
    b"$max",
    b"$rename",
    b"$setOnInsert",
    b"$currentDate",
    b"$push",
    b"$pull",
    b"$pullAll",
    b"$addToSet",
    b"$pop",
    b"$bit",
];

/// Stages that an update may have.
const STAGES: [&[u8]; 6] = [b"$set", b"$addFields", b"$unset", b"$project", b"$replaceRoot", b"$replaceWith"];

/// Writes an update as element `key`: a pipeline, operators, or a document that replaces.
pub(super) fn put(scope: &Scope<'_>, key: &str, update: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    if update.kind == kind::ARRAY {
        return put_pipeline(scope, key, update, out);
    }
    let document = update
        .document()
        .ok_or_else(|| Fault::failed_to_parse("Update argument must be either an object or an array"))?;
    let operators = match document.iter().next() {
        None => false,
        Some(first) => first?.key.first() == Some(&b'$'),
    };
    if operators { put_operators(scope, key, document, out) } else { put_replacement(scope, key, document, out) }
}

/// A pipeline whose last word is the tenant's `org_id`.
pub(super) fn put_pipeline(
    scope: &Scope<'_>,
    key: &str,
    pipeline: &Element<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let stages = pipeline.array().ok_or_else(|| Fault::failed_to_parse("a pipeline is an array"))?;
    let open = bson::open_array(out, key);
    let mut next = 0;
    for stage in stages {
        let stage = stage?;
        if next >= PIPELINE_STAGES_MAX {
            return Err(Fault::failed_to_parse(format!("more than {PIPELINE_STAGES_MAX} stages")));
        }
        let document = stage.document().ok_or_else(|| Fault::failed_to_parse("a stage is an object"))?;
        let mut fields = document.iter();
        let (Some(field), None) = (fields.next().transpose()?, fields.next()) else {
            return Err(Fault::failed_to_parse("a stage must have exactly one field"));
        };
        if !STAGES.contains(&field.key) {
            let name = String::from_utf8_lossy(field.key);
            return Err(Fault::new(72, "InvalidOptions", format!("{name} is not allowed to be used within an update")));
        }
        expression::check(&field, 0)?;
        bson::put_as(out, Index::new(next).as_str(), &stage);
        next += 1;
    }
    if scope.isolation == Isolation::Filter {
        let stage = bson::open_document(out, Index::new(next).as_str());
        put_set_org(scope, out);
        bson::close(out, stage);
    }
    bson::close(out, open);
    Ok(())
}

/// `$set: {org_id: {$literal: X}}`.
pub(super) fn put_set_org(scope: &Scope<'_>, out: &mut Vec<u8>) {
    let set = bson::open_document(out, "$set");
    let literal = bson::open_document(out, ORG);
    bson::put_str(out, "$literal", scope.org.as_str());
    bson::close(out, literal);
    bson::close(out, set);
}

fn put_operators(scope: &Scope<'_>, key: &str, update: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let open = bson::open_document(out, key);
    let mut seen = 0u32;
    for element in update {
        let element = element?;
        let Some(operator) = OPERATORS.iter().position(|operator| *operator == element.key) else {
            let name = String::from_utf8_lossy(element.key);
            return Err(Fault::failed_to_parse(format!("Unknown modifier: {name}")));
        };
        if seen & 1 << operator != 0 {
            return Err(Fault::failed_to_parse("a modifier appears twice"));
        }
        seen |= 1 << operator;
        if scope.isolation == Isolation::Database {
            bson::put(out, &element);
        } else {
            put_modifier(scope, &element, out)?;
        }
    }
    bson::close(out, open);
    Ok(())
}

/// One operator without what would touch `org_id`. Setting it to what it is is dropped: mappers do that.
fn put_modifier(scope: &Scope<'_>, modifier: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let name = modifier.name().unwrap_or_default();
    let fields = modifier
        .document()
        .ok_or_else(|| Fault::failed_to_parse(format!("Modifiers operate on fields: {name} needs an object")))?;
    let open = bson::open_document(out, name);
    for field in fields {
        let field = field?;
        if is_org(field.key) {
            let own = field.str_bytes() == Some(scope.org.as_str().as_bytes()) && field.key == ORG.as_bytes();
            if own && matches!(name, "$set" | "$setOnInsert") {
                continue;
            }
            return Err(Fault::immutable());
        }
        if name == "$rename" {
            let target =
                field.str_bytes().ok_or_else(|| Fault::bad_value("The 'to' field for $rename must be a string"))?;
            if is_org(target) {
                return Err(Fault::immutable());
            }
        }
        bson::put(out, &field);
    }
    bson::close(out, open);
    Ok(())
}

fn put_replacement(scope: &Scope<'_>, key: &str, document: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    for element in document {
        let element = element?;
        if element.key.first() == Some(&b'$') {
            let name = String::from_utf8_lossy(element.key);
            return Err(Fault::new(
                52,
                "DollarPrefixedFieldName",
                format!("The dollar ($) prefixed field '{name}' is not allowed in a replacement document"),
            ));
        }
    }
    bson::put_head(out, kind::DOCUMENT, key.as_bytes());
    put_owned(scope, document, out)
}

/// Writes a document (without an element's head) that is the tenant's own: in `filter` with its `org_id`, once.
pub(super) fn put_owned(scope: &Scope<'_>, document: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    if scope.isolation == Isolation::Database {
        out.extend_from_slice(document.bytes());
        return Ok(());
    }
    let org = scope.org.as_str();
    let mut found = false;
    for element in document {
        let element = element?;
        if element.key == ORG.as_bytes() {
            // An array that holds the id would match the tenant's clause and another's; a second key would be shown
            // by one server and matched by the next.
            if found || element.str_bytes() != Some(org.as_bytes()) {
                return Err(Fault::immutable());
            }
            found = true;
        }
    }
    if found {
        out.extend_from_slice(document.bytes());
        return Ok(());
    }
    let from = out.len();
    let open = bson::open(out);
    out.extend_from_slice(document.elements());
    bson::put_str(out, ORG, org);
    bson::close(out, open);
    let bytes = out.len() - from;
    if bytes > DOCUMENT_MAX { Err(Fault::too_large(bytes)) } else { Ok(()) }
}
