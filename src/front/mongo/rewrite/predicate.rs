//! Filters: the tenant's clause around the client's, and what may stand in a client's.
//!
//! `{$and: [{org_id: X}, F]}`: beside `F`'s own keys the clause could be overruled by an `org_id` in `F`, inside
//! `$and` it can't, and an upsert still copies the equality. Three more walls:
//! - a collation makes `acme-1` equal to `acme1`: under one, a pattern that knows no collation stands beside;
//! - servers evaluate the children of `$and` in an order of their own, so that an `$expr` which raises an error would
//!   quote documents of others: it is evaluated only where `org_id` is the tenant's;
//! - JavaScript and unknown operators are refused.

use super::{
    DEPTH_MAX, Fault, ORG, Scope,
    expression::{self, Temper},
    name::put_text,
};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element, Index, kind},
};

/// How strings compare where the filter is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Collation {
    /// Byte by byte.
    Simple,
    /// By some language's rules.
    Other,
}

/// What a filter was found to hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// A clause on `org_id` is left in it: an upsert could take its value over.
    pub org: bool,
}

/// Operators on a field that hold values only.
const PLAIN: [&[u8]; 31] = [
    b"$eq",
    b"$ne",
    b"$gt",
    b"$gte",
    b"$lt",
    b"$lte",
    b"$in",
    b"$nin",
    b"$exists",
    b"$type",
    b"$mod",
    b"$regex",
    b"$options",
    b"$size",
    b"$bitsAllClear",
    b"$bitsAllSet",
    b"$bitsAnyClear",
    b"$bitsAnySet",
    b"$geoIntersects",
    b"$geoWithin",
    b"$within",
    b"$near",
    b"$nearSphere",
    b"$maxDistance",
    b"$minDistance",
    b"$uniqueDocs",
    b"$geometry",
    b"$box",
    b"$center",
    b"$centerSphere",
    b"$polygon",
];

/// Writes a filter as element `key`, bound to the tenant in `filter` isolation.
pub(super) fn put(
    scope: &Scope<'_>,
    collation: Collation,
    key: &str,
    filter: Option<Document<'_>>,
    out: &mut Vec<u8>,
) -> Result<Seen, Fault> {
    let open = bson::open_document(out, key);
    let seen = body(scope, collation, filter, out)?;
    bson::close(out, open);
    Ok(seen)
}

/// The same without the element's head: what stands between `{` and `}`.
fn body(
    scope: &Scope<'_>,
    collation: Collation,
    filter: Option<Document<'_>>,
    out: &mut Vec<u8>,
) -> Result<Seen, Fault> {
    let mut seen = Seen::default();
    let filter = filter.filter(|filter| !filter.is_empty());
    if scope.isolation == Isolation::Database {
        if let Some(filter) = filter {
            clauses(scope, collation, filter, Ground::Conjunction, 0, &mut seen, out)?;
        }
        return Ok(seen);
    }
    let org = scope.org.as_str();
    if filter.is_none() && collation == Collation::Simple {
        bson::put_str(out, ORG, org);
        return Ok(seen);
    }
    let and = bson::open_array(out, "$and");
    let mut next = 0;
    let mut child = |out: &mut Vec<u8>| {
        next += 1;
        bson::open_document(out, Index::new(next - 1).as_str())
    };
    let clause = child(out);
    bson::put_str(out, ORG, org);
    bson::close(out, clause);
    if collation == Collation::Other {
        let clause = child(out);
        put_exact(org, out);
        bson::close(out, clause);
    }
    if let Some(filter) = filter {
        let clause = child(out);
        clauses(scope, collation, filter, Ground::Conjunction, 0, &mut seen, out)?;
        bson::close(out, clause);
    }
    bson::close(out, and);
    Ok(seen)
}

/// `org_id: {$regex: "^X$"}`: patterns know no collation, and an id holds no character that means something in one.
fn put_exact(org: &str, out: &mut Vec<u8>) {
    let open = bson::open_document(out, ORG);
    put_pattern(out, "$regex", org);
    bson::close(out, open);
}

fn put_pattern(out: &mut Vec<u8>, key: &str, org: &str) {
    put_text(out, key.as_bytes(), |out| {
        out.push(b'^');
        out.extend_from_slice(org.as_bytes());
        out.push(b'$');
    });
}

/// Where a clause stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ground {
    /// It has to hold: at the top, or under `$and`.
    Conjunction,
    /// Under `$or` or `$nor`.
    Other,
}

/// Copies clauses; what has to be guarded is, what may not be there is refused.
fn clauses(
    scope: &Scope<'_>,
    collation: Collation,
    filter: Document<'_>,
    ground: Ground,
    depth: usize,
    seen: &mut Seen,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    if depth >= DEPTH_MAX {
        return Err(Fault::too_deep());
    }
    for element in filter {
        let element = element?;
        match element.key {
            b"$and" | b"$or" | b"$nor" => {
                let ground = if element.key == b"$and" { ground } else { Ground::Other };
                let name = element.name().unwrap_or_default();
                let array = element.array().ok_or_else(|| Fault::bad_value(format!("{name} must be an array")))?;
                let open = bson::open_array(out, name);
                for (at, item) in array.iter().enumerate() {
                    let item = item?;
                    let item = item
                        .document()
                        .ok_or_else(|| Fault::bad_value(format!("{name} argument's entries must be objects")))?;
                    let clause = bson::open_document(out, Index::new(at).as_str());
                    clauses(scope, collation, item, ground, depth + 1, seen, out)?;
                    bson::close(out, clause);
                }
                bson::close(out, open);
            }
            b"$expr" => {
                let temper = expression::check(&element, depth + 1)?;
                if temper == Temper::Raises && scope.isolation == Isolation::Filter {
                    put_guarded(scope.org.as_str(), collation, &element, out);
                } else {
                    bson::put(out, &element);
                }
            }
            key if key.first() == Some(&b'$') => {
                top_level(&element)?;
                bson::put(out, &element);
            }
            key => {
                if scope.isolation == Isolation::Filter && is_org(key) {
                    if ground == Ground::Conjunction && is_own(scope, &element) {
                        continue;
                    }
                    seen.org = true;
                }
                value(&element, depth + 1)?;
                bson::put(out, &element);
            }
        }
    }
    Ok(())
}

/// `$expr: {$cond: [<the document is the tenant's>, E, false]}`.
fn put_guarded(org: &str, collation: Collation, expression: &Element<'_>, out: &mut Vec<u8>) {
    let outer = bson::open_document(out, "$expr");
    let cond = bson::open_array(out, "$cond");
    put_is_own(org, collation, "0", "$org_id", out);
    bson::put_as(out, "1", expression);
    bson::put_bool(out, "2", false);
    bson::close(out, cond);
    bson::close(out, outer);
}

/// The expression that what stands at `path` is the tenant's id.
pub(super) fn put_is_own(org: &str, collation: Collation, key: &str, path: &str, out: &mut Vec<u8>) {
    let test = bson::open_document(out, key);
    match collation {
        Collation::Simple => {
            let eq = bson::open_array(out, "$eq");
            bson::put_str(out, "0", path);
            bson::put_str(out, "1", org);
            bson::close(out, eq);
        }
        Collation::Other => {
            let matches = bson::open_document(out, "$regexMatch");
            bson::put_str(out, "input", path);
            put_pattern(out, "regex", org);
            bson::close(out, matches);
        }
    }
    bson::close(out, test);
}

/// Operators without a field, beside the logical ones and `$expr`.
fn top_level(element: &Element<'_>) -> Result<(), Fault> {
    match element.key {
        b"$comment" | b"$text" | b"$jsonSchema" | b"$sampleRate" | b"$alwaysTrue" | b"$alwaysFalse" => Ok(()),
        b"$where" => Err(Fault::javascript("$where")),
        key => Err(Fault::bad_value(format!("unknown top level operator: {}", String::from_utf8_lossy(key)))),
    }
}

/// Whether a path is `org_id` or inside it.
pub(super) fn is_org(path: &[u8]) -> bool {
    path.strip_prefix(ORG.as_bytes()).is_some_and(|rest| rest.is_empty() || rest[0] == b'.')
}

/// Whether a clause on `org_id` says what the tenant's clause says already. Twice, an upsert would refuse it.
fn is_own(scope: &Scope<'_>, element: &Element<'_>) -> bool {
    let own = |element: &Element<'_>| element.str_bytes() == Some(scope.org.as_str().as_bytes());
    if element.key != ORG.as_bytes() {
        return false;
    }
    let only = element.document().map(|document| {
        let mut elements = document.iter().map_while(Result::ok);
        let first = elements.next();
        first.is_some_and(|first| first.key == b"$eq" && own(&first)) && elements.next().is_none()
    });
    own(element) || only == Some(true)
}

/// What a field is compared with.
fn value(element: &Element<'_>, depth: usize) -> Result<(), Fault> {
    let Some(document) = element.document() else { return Ok(()) };
    match document.iter().next() {
        Some(first) if is_operator(first?.key) => operators(document, depth),
        _ => Ok(()),
    }
}

/// Whether a document that begins with this name holds operators; a DBRef is a value.
fn is_operator(key: &[u8]) -> bool {
    key.first() == Some(&b'$') && !matches!(key, b"$ref" | b"$id" | b"$db")
}

fn operators(document: Document<'_>, depth: usize) -> Result<(), Fault> {
    for element in document {
        operator(&element?, depth)?;
    }
    Ok(())
}

fn operator(element: &Element<'_>, depth: usize) -> Result<(), Fault> {
    if depth >= DEPTH_MAX {
        return Err(Fault::too_deep());
    }
    match element.key {
        b"$elemMatch" => {
            let inner = element.document().ok_or_else(|| Fault::bad_value("$elemMatch needs an Object"))?;
            matched(inner, depth + 1)
        }
        b"$not" => match element.document() {
            Some(inner) => operators(inner, depth + 1),
            None if element.kind == kind::REGEX => Ok(()),
            None => Err(Fault::bad_value("$not needs a regex or a document")),
        },
        b"$all" => {
            let array = element.array().ok_or_else(|| Fault::bad_value("$all needs an array"))?;
            array.iter().try_for_each(|item| value(&item?, depth + 1))
        }
        key if PLAIN.contains(&key) => Ok(()),
        b"$where" => Err(Fault::javascript("$where")),
        key => Err(Fault::bad_value(format!("unknown operator: {}", String::from_utf8_lossy(key)))),
    }
}

/// What `$elemMatch` holds: operators on the element, or clauses on its fields.
fn matched(document: Document<'_>, depth: usize) -> Result<(), Fault> {
    if depth >= DEPTH_MAX {
        return Err(Fault::too_deep());
    }
    for element in document {
        let element = element?;
        match element.key {
            b"$and" | b"$or" | b"$nor" => {
                let array = element.array().ok_or_else(|| Fault::bad_value("$and/$or/$nor must be an array"))?;
                for item in array {
                    let item = item?;
                    let item = item.document().ok_or_else(|| Fault::bad_value("entries must be objects"))?;
                    matched(item, depth + 1)?;
                }
            }
            b"$where" => return Err(Fault::javascript("$where")),
            key if is_operator(key) => operator(&element, depth)?,
            _ => value(&element, depth + 1)?,
        }
    }
    Ok(())
}

/// A filter that is only checked: of a catalog, a validator, a partial index.
pub(super) fn check(scope: &Scope<'_>, filter: Document<'_>) -> Result<(), Fault> {
    // At once: it is written as it is, and thrown away.
    let mut scratch = Vec::with_capacity(filter.bytes().len() + 16);
    let database = Scope { isolation: Isolation::Database, ..*scope };
    put(&database, Collation::Simple, "", Some(filter), &mut scratch).map(|_| ())
}

/// Whether a filter holds an `$expr` that may raise an error, on any level.
pub(super) fn raises(filter: Document<'_>, depth: usize) -> Result<bool, Fault> {
    if depth >= DEPTH_MAX {
        return Err(Fault::too_deep());
    }
    for element in filter {
        let element = element?;
        match element.key {
            b"$expr" if expression::check(&element, depth + 1)? == Temper::Raises => return Ok(true),
            b"$and" | b"$or" | b"$nor" => {
                for item in element.array().into_iter().flatten() {
                    if let Some(item) = item?.document()
                        && raises(item, depth + 1)?
                    {
                        return Ok(true);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(false)
}
