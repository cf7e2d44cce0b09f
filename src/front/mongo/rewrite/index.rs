//! Indexes in a shared collection: each tenant has its own, which hold its documents only.
//!
//! `{email: 1}, unique` becomes a partial index over `{org_id: X}` named `email_1~X`. Uniqueness, expiry, geometry and
//! the refusal of parallel arrays then concern this tenant's documents alone; the tenant's clause, which every query
//! carries, lets the server choose it. A key of the form `{org_id: 1, email: 1}` without the filter would let one
//! tenant's index fail another's insert.

use std::fmt::Write;

use super::{Fault, ORG, Scope, predicate, predicate::Collation, stage};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element, Index},
};

/// Stands between an index's name and its tenant's; in no organisation's id.
pub const MARK: char = '~';

/// The index that every collection has.
pub const ID: &str = "_id_";

/// What an index may say. `storageEngine` is the operator's, `prepareUnique` a step of the server's own.
const KNOWN: [&str; 23] = [
    "key",
    "name",
    "unique",
    "sparse",
    "background",
    "hidden",
    "expireAfterSeconds",
    "partialFilterExpression",
    "collation",
    "wildcardProjection",
    "weights",
    "default_language",
    "language_override",
    "textIndexVersion",
    "2dsphereIndexVersion",
    "bits",
    "min",
    "max",
    "bucketSize",
    "v",
    "ns",
    "dropDups",
    "clustered",
];

/// An index's name as the server keeps it.
pub fn physical(scope: &Scope<'_>, name: &str) -> String {
    if scope.isolation == Isolation::Database || name == ID {
        return name.to_owned();
    }
    format!("{name}{MARK}{}", scope.org)
}

/// The tenant's name of an index, or `None` for another's.
pub fn logical<'n>(scope: &Scope<'_>, physical: &'n str) -> Option<&'n str> {
    if scope.isolation == Isolation::Database || physical == ID {
        return Some(physical);
    }
    physical.strip_suffix(scope.org.as_str())?.strip_suffix(MARK).filter(|name| !name.is_empty())
}

/// Writes `indexes` of `createIndexes`.
pub(super) fn put_all(scope: &Scope<'_>, key: &str, indexes: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let open = bson::open_array(out, key);
    for (at, index) in indexes.iter().enumerate() {
        let index = index?;
        let index = index.document().ok_or_else(|| Fault::wrong_type("createIndexes.indexes", index.key, "object"))?;
        stage::known_fields("createIndexes.indexes", index, &KNOWN)?;
        let document = bson::open_document(out, Index::new(at).as_str());
        put(scope, index, out)?;
        bson::close(out, document);
    }
    bson::close(out, open);
    Ok(())
}

/// Whether indexes only make queries faster: none is unique or lets documents expire.
pub(super) fn only_wished(indexes: Document<'_>) -> Result<bool, Fault> {
    for index in indexes {
        let Some(index) = index?.document() else { continue };
        let unique = index.get("unique")?.is_some_and(|unique| unique.truthy());
        if unique || index.get("expireAfterSeconds")?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn cannot(message: impl Into<String>) -> Fault {
    Fault::new(67, "CannotCreateIndex", message)
}

fn put(scope: &Scope<'_>, index: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let key = index.get("key")?.ok_or_else(|| Fault::missing("createIndexes.indexes", "key"))?;
    let key = key.document().ok_or_else(|| Fault::wrong_type("createIndexes.indexes", b"key", "object"))?;
    let name = index.get("name")?.ok_or_else(|| Fault::missing("createIndexes.indexes", "name"))?;
    let name = name.str().ok_or_else(|| Fault::wrong_type("createIndexes.indexes", b"name", "string"))?;
    if key.has_duplicate_key()? {
        return Err(cannot("a key names a field twice"));
    }
    let given = index.get("partialFilterExpression")?;
    let given = given
        .map(|given| given.document().ok_or_else(|| Fault::wrong_type("createIndexes.indexes", given.key, "object")))
        .transpose()?;
    if let Some(given) = given {
        predicate::check(scope, given)?;
    }
    if scope.isolation == Isolation::Filter && is_about_id(key)? {
        return put_id(index, key, out);
    }
    let whole = scope.isolation == Isolation::Database;
    for element in index {
        let element = element?;
        match element.key {
            // Long without a meaning; the server would read a foreign namespace out of `ns`.
            b"ns" | b"dropDups" | b"clustered" => {}
            _ if whole => bson::put(out, &element),
            b"name" => bson::put_str(out, "name", &physical(scope, name)),
            b"key" => {
                shared(key)?;
                bson::put(out, &element);
            }
            b"collation" if collation(&element)? == Collation::Other => {
                return Err(cannot("an index with a collation is not available here: org_id would be compared by it"));
            }
            b"partialFilterExpression" => {}
            // Together with a filter the server refuses it; the filter below says the same.
            b"sparse" => {}
            _ => bson::put(out, &element),
        }
    }
    if !whole {
        let sparse = index.get("sparse")?.is_some_and(|sparse| sparse.truthy());
        put_filter(scope, key, given, sparse, out)?;
    }
    Ok(())
}

/// The index that every collection has. Nothing but its own words goes to the server: it is of all tenants, and any
/// option (a filter, a collation, an expiry, a name) or another direction would be an index over all of their documents.
fn put_id(index: Document<'_>, key: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    if !is_id(key)? {
        return Err(Fault::bad_value("the field 'key' for an _id index must be {_id: 1}"));
    }
    for element in index {
        let element = element?;
        match element.key {
            b"key" | b"v" => bson::put(out, &element),
            b"name" => bson::put_str(out, "name", ID),
            b"ns" | b"dropDups" | b"clustered" | b"background" | b"unique" => {}
            b"collation" if collation(&element)? == Collation::Simple => {}
            other => return Err(cannot(format!("{} is not for the _id index", String::from_utf8_lossy(other)))),
        }
    }
    Ok(())
}

/// What of a key can't be in a shared collection.
fn shared(key: Document<'_>) -> Result<(), Fault> {
    for element in key {
        let element = element?;
        if predicate::is_org(element.key) {
            return Err(cannot("org_id is not a field to index"));
        }
        if element.str() == Some("text") {
            return Err(cannot("a text index is not available here: a collection has one for all its tenants"));
        }
    }
    Ok(())
}

/// `partialFilterExpression`: the tenant, what the client said, and what `sparse` means.
fn put_filter(
    scope: &Scope<'_>,
    key: Document<'_>,
    given: Option<Document<'_>>,
    sparse: bool,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let open = bson::open_document(out, "partialFilterExpression");
    bson::put_str(out, ORG, scope.org.as_str());
    if sparse {
        let mut paths = Vec::new();
        for element in key {
            paths.push(element?.name().ok_or_else(|| cannot("a path is not UTF-8"))?);
        }
        if let [path] = paths[..] {
            put_exists(path, out);
        } else {
            let or = bson::open_array(out, "$or");
            for (at, path) in paths.iter().enumerate() {
                let clause = bson::open_document(out, Index::new(at).as_str());
                put_exists(path, out);
                bson::close(out, clause);
            }
            bson::close(out, or);
        }
    }
    if let Some(given) = given.filter(|given| !given.is_empty()) {
        if sparse {
            return Err(cannot("cannot mix \"partialFilterExpression\" and \"sparse\" options"));
        }
        let and = bson::open_array(out, "$and");
        bson::put_document(out, "0", given);
        bson::close(out, and);
    }
    bson::close(out, open);
    Ok(())
}

fn put_exists(path: &str, out: &mut Vec<u8>) {
    let open = bson::open_document(out, path);
    bson::put_bool(out, "$exists", true);
    bson::close(out, open);
}

/// `{_id: 1}` and nothing else.
fn is_id(key: Document<'_>) -> Result<bool, Fault> {
    let mut elements = key.iter();
    let first = elements.next().transpose()?;
    Ok(first.is_some_and(|first| first.key == b"_id" && first.whole() == Some(1)) && elements.next().is_none())
}

/// `_id` alone, in any direction: a server takes some of them for the index that it has already.
fn is_about_id(key: Document<'_>) -> Result<bool, Fault> {
    let mut elements = key.iter();
    let first = elements.next().transpose()?;
    Ok(first.is_some_and(|first| first.key == b"_id" && first.is_number()) && elements.next().is_none())
}

/// How a `collation` field makes strings compare.
pub(super) fn collation(element: &Element<'_>) -> Result<Collation, Fault> {
    let document = element.document().ok_or_else(|| Fault::wrong_type("collation", element.key, "object"))?;
    if document.is_empty() {
        return Ok(Collation::Simple);
    }
    if document.has_duplicate_key()? {
        return Err(Fault::duplicate("collation", b"?"));
    }
    let locale = document.get("locale")?.and_then(|locale| locale.str());
    Ok(if locale == Some("simple") { Collation::Simple } else { Collation::Other })
}

/// Writes a hint. In `filter` a name becomes the tenant's; a key pattern, which would fit the indexes of all tenants,
/// becomes the name that drivers give it.
pub(super) fn put_hint(scope: &Scope<'_>, at: &str, hint: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    if scope.isolation == Isolation::Database {
        return match hint.kind {
            bson::kind::STRING | bson::kind::DOCUMENT => {
                bson::put(out, hint);
                Ok(())
            }
            _ => Err(Fault::failed_to_parse("Hint must be a string or an object")),
        };
    }
    let key = hint.name().unwrap_or_default();
    if let Some(name) = hint.str() {
        if name == "$natural" {
            return Err(natural());
        }
        bson::put_str(out, key, &physical(scope, name));
        return Ok(());
    }
    let pattern =
        hint.document().ok_or_else(|| Fault::failed_to_parse(format!("{at}: Hint must be a string or an object")))?;
    if pattern.is_empty() || is_id(pattern)? {
        bson::put(out, hint);
        return Ok(());
    }
    bson::put_str(out, key, &physical(scope, &default_name(pattern)?));
    Ok(())
}

/// Walking a shared collection from end to end is not for one tenant.
pub(super) fn natural() -> Fault {
    Fault::bad_value("$natural is not available here")
}

/// The name that drivers give an index: `field_direction`, joined by `_`.
fn default_name(key: Document<'_>) -> Result<String, Fault> {
    let mut name = String::new();
    for element in key {
        let element = element?;
        let path = element.name().ok_or_else(|| Fault::bad_value("a path is not UTF-8"))?;
        if path == "$natural" {
            return Err(natural());
        }
        let gap = if name.is_empty() { "" } else { "_" };
        let told = match (element.whole(), element.str()) {
            (Some(direction), _) => write!(name, "{gap}{path}_{direction}"),
            (None, Some(special)) => write!(name, "{gap}{path}_{special}"),
            (None, None) => return Err(Fault::bad_value("a hint's key holds numbers and names of index types")),
        };
        told.map_err(|_| Fault::bad_value("a hint that can't be written"))?;
    }
    Ok(name)
}

/// What `dropIndexes` names, where it can be told without asking the server.
pub(super) fn put_names(scope: &Scope<'_>, names: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let key = names.name().unwrap_or_default();
    let one = |element: &Element<'_>, key: &str, out: &mut Vec<u8>| {
        let name = element.str().ok_or_else(|| Fault::wrong_type("dropIndexes", element.key, "string"))?;
        bson::put_str(out, key, &physical(scope, name));
        Ok::<(), Fault>(())
    };
    match names.array() {
        None => one(names, key, out),
        Some(list) => {
            let open = bson::open_array(out, key);
            for (at, item) in list.iter().enumerate() {
                one(&item?, Index::new(at).as_str(), out)?;
            }
            bson::close(out, open);
            Ok(())
        }
    }
}
