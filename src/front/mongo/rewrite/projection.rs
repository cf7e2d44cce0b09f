//! Projections of `find` and `findAndModify`: `org_id` stays hidden, unless the tier shows it.
//!
//! An inclusion without `org_id` hides it already; to anything else `org_id: 0` is added. The wrong one is an error
//! of the server (31254), so that the kind is decided as the server decides it.

use super::{DEPTH_MAX, Fault, ORG, Scope, expression};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element, kind},
};

/// A path that no document has: below `org_id`, which is a string everywhere.
const NOWHERE: &str = "org_id.nowhere";

/// What a projection does with fields that it does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Inclusion,
    Exclusion,
}

/// Writes a projection as element `key`.
pub(super) fn put(
    scope: &Scope<'_>,
    key: &str,
    projection: Option<Document<'_>>,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    if let Some(projection) = projection {
        expression::check_document(projection, 0)?;
        if projection.has_duplicate_key()? {
            return Err(Fault::bad_value("a projection names a path twice"));
        }
    }
    // What is shown is the tenant's own: every reader is bound to it by the filter.
    if scope.isolation == Isolation::Database || scope.shows_org {
        if let Some(projection) = projection {
            bson::put_document(out, key, projection);
        }
        return Ok(());
    }
    let open = bson::open_document(out, key);
    match projection {
        None => bson::put_i32(out, ORG, 0),
        Some(projection) => body(projection, out)?,
    }
    bson::close(out, open);
    Ok(())
}

fn body(projection: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let whole = sort(projection, 0, Named::All)?;
    for element in projection {
        let element = element?;
        // Whatever the client says about it: it is not shown, and said once.
        if element.key != ORG.as_bytes() {
            bson::put(out, &element);
        }
    }
    match whole {
        // Without the client's word on `org_id` the rest may not include by itself any more.
        Some(Sort::Inclusion) if sort(projection, 0, Named::Rest)? != whole => bson::put_i32(out, NOWHERE, 1),
        Some(Sort::Inclusion) => {}
        Some(Sort::Exclusion) | None => bson::put_i32(out, ORG, 0),
    }
    Ok(())
}

/// Which fields of a projection are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Named {
    All,
    /// All but `org_id`.
    Rest,
}

/// The kind, or `None` where nothing decides and the server excludes.
fn sort(projection: Document<'_>, depth: usize, named: Named) -> Result<Option<Sort>, Fault> {
    if depth >= DEPTH_MAX {
        return Err(Fault::too_deep());
    }
    let mut found = None;
    let mut id = None;
    for element in projection {
        let element = element?;
        if named == Named::Rest && element.key == ORG.as_bytes() {
            continue;
        }
        let told = one(&element, depth)?;
        if depth == 0 && element.key == b"_id" {
            id = told;
            continue;
        }
        match told {
            // One explicit exclusion decides; `$elemMatch` and computed fields may stand beside it.
            Some(Sort::Exclusion) => return Ok(Some(Sort::Exclusion)),
            Some(Sort::Inclusion) => found = Some(Sort::Inclusion),
            None => {}
        }
    }
    Ok(found.or(id))
}

fn one(element: &Element<'_>, depth: usize) -> Result<Option<Sort>, Fault> {
    if element.is_number() || element.kind == kind::BOOL {
        return Ok(Some(if element.truthy() { Sort::Inclusion } else { Sort::Exclusion }));
    }
    let Some(document) = element.document() else { return Ok(Some(Sort::Inclusion)) };
    match document.iter().next().transpose()?.map(|first| first.key) {
        Some(b"$slice" | b"$meta") => Ok(None),
        Some(key) if key.first() == Some(&b'$') => Ok(Some(Sort::Inclusion)),
        _ => sort(document, depth + 1, Named::All),
    }
}
