//! Aggregation expressions: what may stand in one, and whether it can raise an error.
//!
//! An expression reads its own document and nothing else, so that nothing in it has to be rewritten. Refused are
//! JavaScript, the server's internals, and variables that tell of the upstream login.

use super::{DEPTH_MAX, Fault};
use crate::wire::mongo::bson::{Document, Element};

/// Operators that raise no error whatever their operands are. With paths, variables and literals they are all that
/// a filter may hold unguarded.
const CALM: [&[u8]; 18] = [
    b"$eq",
    b"$ne",
    b"$gt",
    b"$gte",
    b"$lt",
    b"$lte",
    b"$cmp",
    b"$and",
    b"$or",
    b"$not",
    b"$cond",
    b"$ifNull",
    b"$type",
    b"$isArray",
    b"$isNumber",
    b"$literal",
    b"$const",
    b"$expr",
];

/// What [`check`] found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Temper {
    /// It can't raise an error.
    Calm,
    /// It may, and its text may quote the document that it stumbled over.
    Raises,
}

impl Temper {
    fn worse(self, other: Self) -> Self {
        if self == Temper::Calm { other } else { self }
    }
}

/// Refuses what no expression of a tenant may hold.
pub(super) fn check(element: &Element<'_>, depth: usize) -> Result<Temper, Fault> {
    if let Some(text) = element.str_bytes() {
        return variable(text).map(|()| Temper::Calm);
    }
    let Some(document) = element.document().or(element.array()) else { return Ok(Temper::Calm) };
    elements(document, element.array().is_some(), depth)
}

/// The same for each of a document's values.
pub(super) fn check_document(document: Document<'_>, depth: usize) -> Result<Temper, Fault> {
    elements(document, false, depth)
}

fn elements(document: Document<'_>, array: bool, depth: usize) -> Result<Temper, Fault> {
    if depth >= DEPTH_MAX {
        return Err(Fault::too_deep());
    }
    let mut temper = Temper::Calm;
    for element in document {
        let element = element?;
        if !array && element.key.first() == Some(&b'$') {
            operator(element.key)?;
            // Where a document lies among those of all tenants: it counts them.
            if element.key == b"$meta" && element.str() == Some("recordId") {
                return Err(Fault::forbidden("{$meta: \"recordId\"}"));
            }
            if matches!(element.key, b"$literal" | b"$const") {
                continue;
            }
            if !CALM.contains(&element.key) {
                temper = Temper::Raises;
            }
        }
        temper = temper.worse(check(&element, depth + 1)?);
    }
    Ok(temper)
}

fn operator(name: &[u8]) -> Result<(), Fault> {
    match name {
        b"$function" | b"$accumulator" | b"$where" => Err(Fault::javascript(&String::from_utf8_lossy(name))),
        _ if name.starts_with(b"$_") => {
            let name = String::from_utf8_lossy(name);
            Err(Fault::new(168, "InvalidPipelineOperator", format!("Unrecognized expression '{name}'")))
        }
        _ => Ok(()),
    }
}

/// System variables that tell of others: the login's roles, and counts of a search over the whole collection.
fn variable(text: &[u8]) -> Result<(), Fault> {
    for name in ["$$USER_ROLES", "$$SEARCH_META"] {
        let rest = text.strip_prefix(name.as_bytes());
        if rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'.') {
            return Err(Fault::forbidden(name));
        }
    }
    Ok(())
}
