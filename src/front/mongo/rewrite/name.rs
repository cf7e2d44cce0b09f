//! Names of databases and collections: which a tenant may say, and how they are written.

use super::{Fault, Scope};
use crate::wire::mongo::bson::{self, Element, kind};

/// Longest `database.collection` in bytes that the server takes.
const NAMESPACE_MAX_BYTES: usize = 255;

/// Checks a logical database name: one of the tenant's, not one of the server's own.
pub(super) fn database<'a>(scope: &Scope<'_>, name: &'a str) -> Result<&'a str, Fault> {
    // Mapped they would be harmless; said to exist they would mislead, as nothing in them is what tools look for.
    if ["admin", "config", "local"].iter().any(|own| own.eq_ignore_ascii_case(name)) {
        return Err(Fault::new(13, "Unauthorized", format!("not authorized on {name}: it holds no data of a tenant")));
    }
    if !scope.place.accepts(name) {
        let longest = scope.place.longest();
        return Err(Fault::namespace(format!(
            "Invalid database name: '{name}': use up to {longest} bytes without /\\. \"$*<>:|?"
        )));
    }
    Ok(name)
}

/// Writes a checked logical database name as a string element.
pub(super) fn put_database(scope: &Scope<'_>, key: &str, name: &str, out: &mut Vec<u8>) -> Result<(), Fault> {
    put_text(out, key.as_bytes(), |out| scope.place.put_physical(name, out).then_some(()))
        .ok_or_else(|| Fault::namespace(format!("Invalid database name: '{name}'")))
}

/// Checks a collection's name in a logical database of the scope.
pub(super) fn collection<'a>(scope: &Scope<'_>, database: &str, name: &'a [u8]) -> Result<&'a str, Fault> {
    let invalid = |why: &str| {
        Err(Fault::namespace(format!("Invalid collection name: '{}': {why}", String::from_utf8_lossy(name))))
    };
    let Ok(text) = std::str::from_utf8(name) else { return invalid("not UTF-8") };
    if text.is_empty() || text.starts_with('.') || text.ends_with('.') {
        return invalid("empty, or a dot at its begin or end");
    }
    if text.contains(['$', '\0']) {
        return invalid("'$' and NUL are not for names");
    }
    if text.starts_with("system.") || text.starts_with("enxcol_.") {
        return Err(Fault::new(13, "Unauthorized", format!("not authorized on {database}.{text}: the server's own")));
    }
    if scope.place.prefix().len() + database.len() + 1 + text.len() > NAMESPACE_MAX_BYTES {
        return invalid("database and collection are too long together");
    }
    Ok(text)
}

/// The collection that a string element names.
pub(super) fn collection_of<'a>(
    scope: &Scope<'_>,
    database: &str,
    at: &str,
    element: &Element<'a>,
) -> Result<&'a str, Fault> {
    let name = element.str_bytes().ok_or_else(|| Fault::wrong_type(at, element.key, "string"))?;
    collection(scope, database, name)
}

/// Splits `database.collection`, checks both, and writes the mapped name as a string element.
pub(super) fn put_namespace<'a>(
    scope: &Scope<'_>,
    at: &str,
    key: &str,
    element: &Element<'a>,
    out: &mut Vec<u8>,
) -> Result<(&'a str, &'a str), Fault> {
    let text = element.str().ok_or_else(|| Fault::wrong_type(at, element.key, "string"))?;
    let (db, coll) =
        text.split_once('.').ok_or_else(|| Fault::namespace(format!("Invalid namespace specified: '{text}'")))?;
    let db = database(scope, db)?;
    let coll = collection(scope, db, coll.as_bytes())?;
    put_text(out, key.as_bytes(), |out| {
        let mapped = scope.place.put_physical(db, out);
        out.push(b'.');
        out.extend_from_slice(coll.as_bytes());
        mapped.then_some(())
    })
    .ok_or_else(|| Fault::namespace(format!("Invalid namespace specified: '{text}'")))?;
    Ok((db, coll))
}

/// A string element whose text `write` appends.
pub fn put_text<T>(out: &mut Vec<u8>, key: &[u8], write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    bson::put_head(out, kind::STRING, key);
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    let told = write(out);
    out.push(0);
    let bytes = i32::try_from(out.len() - at - 4).unwrap_or(i32::MAX);
    out[at..at + 4].copy_from_slice(&bytes.to_le_bytes());
    told
}
