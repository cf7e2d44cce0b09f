//! The statements of `insert`, `update`, `delete` and `bulkWrite`, one by one.

use super::{Failed, Fault, ORG, Scope, index, name, predicate, predicate::Collation, stage::known_fields, update};
use crate::{
    tenant::Isolation,
    wire::mongo::bson::{self, Document, Element, Index},
};

/// Where statements come from and go to: an array of the body, or a section.
#[derive(Clone, Copy, Debug)]
pub(super) enum List<'a> {
    Array(Document<'a>),
    Section(&'a [u8]),
}

/// What statements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Documents,
    Updates,
    Deletes,
    Operations,
    Namespaces,
}

/// Most statements of one command: what we advertise as `maxWriteBatchSize`, by which drivers go.
pub(in crate::front::mongo) const STATEMENTS_MAX: usize = 10_000;

/// Refused statements that are told why; those behind are told only that, as the server does with a long report.
const TOLD_MAX: usize = 1000;

/// Longest text of one refused statement: texts quote names that the client chose.
const TEXT_MAX_BYTES: usize = 512;

/// What writing them told.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Refused, by index.
    pub failed: Vec<Failed>,
    /// How many were written.
    pub written: usize,
    /// How many stand in the list: those that were written, and what stands for the refused.
    listed: usize,
    /// Whether one of them may bring a document into being, and its collection with it.
    pub creates: bool,
}

impl Told {
    fn fail(&mut self, index: usize, fault: Fault) {
        let mut message = if self.failed.len() < TOLD_MAX { fault.message } else { String::new() };
        if message.len() > TEXT_MAX_BYTES {
            message.truncate((0..=TEXT_MAX_BYTES).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0));
            message.push('…');
        }
        self.failed.push(Failed { index, code: fault.code, message });
    }
}

/// The refusal of a command with more statements than there may be.
fn too_many(count: usize) -> Fault {
    let text = format!("Write batch sizes must be between 1 and {STATEMENTS_MAX}. Got {count} operations.");
    Fault::new(16, "InvalidLength", text)
}

/// Writes all statements; one that fails is left out, and with `ordered` all behind it. In a `bulkWrite`, whose results
/// may come in several batches, something stands for it that the server refuses: so each result has its number, and
/// what is counted is counted by one.
///
/// # Errors
/// The request as a whole is wrong.
pub(super) fn put_all(
    scope: &Scope<'_>,
    kind: Kind,
    list: List<'_>,
    ordered: bool,
    out: &mut Vec<u8>,
) -> Result<Told, Fault> {
    let mut told = Told::default();
    match list {
        List::Array(array) => {
            for (at, item) in array.iter().enumerate() {
                if at == STATEMENTS_MAX {
                    return Err(too_many(array.iter().count()));
                }
                let item = item?;
                let item = item.document().ok_or_else(|| Fault::wrong_type(kind.at(), item.key, "object"))?;
                if !one(scope, kind, item, at, true, &mut told, out)? && ordered {
                    break;
                }
            }
        }
        List::Section(mut rest) => {
            let mut at = 0;
            while !rest.is_empty() {
                let (item, behind) = Document::split(rest)?;
                if at == STATEMENTS_MAX {
                    let mut count = at;
                    while let Ok((_, behind)) = Document::split(rest) {
                        (rest, count) = (behind, count + 1);
                    }
                    return Err(too_many(count));
                }
                rest = behind;
                bson::validate(item, super::DEPTH_MAX)?;
                if !one(scope, kind, item, at, false, &mut told, out)? && ordered {
                    break;
                }
                at += 1;
            }
        }
    }
    Ok(told)
}

/// One statement; whether it was written.
fn one(
    scope: &Scope<'_>,
    kind: Kind,
    item: Document<'_>,
    index: usize,
    element: bool,
    told: &mut Told,
    out: &mut Vec<u8>,
) -> Result<bool, Fault> {
    let from = out.len();
    if element {
        bson::put_head(out, bson::kind::DOCUMENT, Index::new(told.listed).as_str().as_bytes());
    }
    let head = out.len();
    match kind.put(scope, item, out) {
        Ok(creates) => {
            told.written += 1;
            told.listed += 1;
            told.creates |= creates;
            Ok(true)
        }
        // A namespace is all its operations'.
        Err(fault) if fault.concerns_statement() && kind != Kind::Namespaces => {
            if kind == Kind::Operations {
                out.truncate(head);
                put_refused(scope, item, out)?;
                told.listed += 1;
            } else {
                out.truncate(from);
            }
            told.fail(index, fault);
            Ok(false)
        }
        Err(fault) => Err(fault),
    }
}

impl Kind {
    fn at(self) -> &'static str {
        match self {
            Kind::Documents => "insert.documents",
            Kind::Updates => "update.updates",
            Kind::Deletes => "delete.deletes",
            Kind::Operations => "bulkWrite.ops",
            Kind::Namespaces => "bulkWrite.nsInfo",
        }
    }

    /// Writes a statement without an element's head. Says whether it may bring a document into being.
    fn put(self, scope: &Scope<'_>, item: Document<'_>, out: &mut Vec<u8>) -> Result<bool, Fault> {
        if self == Kind::Documents {
            return update::put_owned(scope, item, out).map(|()| true);
        }
        let open = bson::open(out);
        let creates = match self {
            Kind::Documents => true,
            Kind::Updates => put_statement(scope, self.at(), item, &UPDATE, out)?,
            Kind::Deletes => put_statement(scope, self.at(), item, &DELETE, out)?,
            Kind::Operations => put_operation(scope, item, out)?,
            Kind::Namespaces => {
                known_fields(self.at(), item, &["ns"])?;
                let ns = item.get("ns")?.ok_or_else(|| Fault::missing(self.at(), "ns"))?;
                name::put_namespace(scope, self.at(), "ns", &ns, out)?;
                false
            }
        };
        bson::close(out, open);
        Ok(creates)
    }
}

/// How a statement calls its parts.
struct Shape {
    known: &'static [&'static str],
    filter: &'static str,
    update: Option<&'static str>,
}

const UPDATE: Shape = Shape {
    known: &["q", "u", "c", "upsert", "multi", "collation", "arrayFilters", "hint", "sort"],
    filter: "q",
    update: Some("u"),
};

const DELETE: Shape = Shape { known: &["q", "limit", "collation", "hint"], filter: "q", update: None };

const BULK_UPDATE: Shape = Shape {
    known: &[
        "update",
        "filter",
        "updateMods",
        "multi",
        "upsert",
        "arrayFilters",
        "hint",
        "collation",
        "constants",
        "sort",
    ],
    filter: "filter",
    update: Some("updateMods"),
};

const BULK_DELETE: Shape =
    Shape { known: &["delete", "filter", "multi", "hint", "collation"], filter: "filter", update: None };

/// What stands for a refused operation: an insertion into the same collection whose `_id` no server takes, and by whose
/// error nothing is written. Were it written, it would be the tenant's own.
fn put_refused(scope: &Scope<'_>, item: Document<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let at = Kind::Operations.at();
    let namespace = item.iter().next().transpose()?.ok_or_else(|| Fault::missing(at, "insert"))?;
    if !namespace.is_number() {
        return Err(Fault::wrong_type(at, namespace.key, "number"));
    }
    let open = bson::open(out);
    bson::put_as(out, "insert", &namespace);
    let document = bson::open_document(out, "document");
    let id = bson::open_document(out, "_id");
    bson::put_bool(out, "$refused", true);
    bson::close(out, id);
    if scope.isolation == Isolation::Filter {
        bson::put_str(out, ORG, scope.org.as_str());
    }
    bson::close(out, document);
    bson::close(out, open);
    Ok(())
}

fn put_operation(scope: &Scope<'_>, item: Document<'_>, out: &mut Vec<u8>) -> Result<bool, Fault> {
    let at = Kind::Operations.at();
    let first = item.iter().next().transpose()?.map(|first| first.key);
    match first {
        Some(b"update") => put_statement(scope, at, item, &BULK_UPDATE, out),
        Some(b"delete") => put_statement(scope, at, item, &BULK_DELETE, out),
        Some(b"insert") => {
            known_fields(at, item, &["insert", "document"])?;
            for element in item {
                let element = element?;
                match element.document().filter(|_| element.key == b"document") {
                    Some(document) => {
                        bson::put_head(out, bson::kind::DOCUMENT, b"document");
                        update::put_owned(scope, document, out)?;
                    }
                    None if element.key == b"document" => {
                        return Err(Fault::wrong_type(at, element.key, "object"));
                    }
                    None => bson::put(out, &element),
                }
            }
            Ok(true)
        }
        other => Err(Fault::unknown_field(at, other.unwrap_or_default())),
    }
}

fn put_statement(
    scope: &Scope<'_>,
    at: &str,
    item: Document<'_>,
    shape: &Shape,
    out: &mut Vec<u8>,
) -> Result<bool, Fault> {
    known_fields(at, item, shape.known)?;
    let collation = match item.get("collation")? {
        Some(element) => index::collation(&element)?,
        None => Collation::Simple,
    };
    let upsert = item.get("upsert")?.is_some_and(|upsert| upsert.truthy());
    let mut filtered = false;
    for element in item {
        let element = element?;
        let name = element.name().unwrap_or_default();
        if name == shape.filter {
            let filter = element.document().ok_or_else(|| Fault::wrong_type(at, element.key, "object"))?;
            put_filter(scope, collation, name, Some(filter), upsert, out)?;
            filtered = true;
        } else if Some(name) == shape.update {
            update::put(scope, name, &element, out)?;
        } else {
            put_option(scope, at, &element, out)?;
        }
    }
    if filtered { Ok(upsert) } else { Err(Fault::missing(at, shape.filter)) }
}

/// A filter of a write. An upsert would take values over from it: `org_id` may not stand in it.
pub(super) fn put_filter(
    scope: &Scope<'_>,
    collation: Collation,
    key: &str,
    filter: Option<Document<'_>>,
    upsert: bool,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let seen = predicate::put(scope, collation, key, filter, out)?;
    if seen.org && upsert && scope.isolation == Isolation::Filter { Err(Fault::immutable()) } else { Ok(()) }
}

/// What else a statement says.
fn put_option(scope: &Scope<'_>, at: &str, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    match element.key {
        b"hint" => return index::put_hint(scope, at, element, out),
        b"sort" => check_sort(scope, at, element)?,
        b"c" | b"constants" => {
            super::expression::check(element, 0)?;
        }
        b"arrayFilters" => check_array_filters(scope, at, element)?,
        b"upsert" | b"multi" if element.kind != bson::kind::BOOL && !element.is_number() => {
            return Err(Fault::wrong_type(at, element.key, "bool"));
        }
        b"upsert" | b"multi" => {
            put_flag(element, out);
            return Ok(());
        }
        _ => {}
    }
    bson::put(out, element);
    Ok(())
}

/// True or false in the server's words as in ours: of some numbers (`Decimal128("0E+3")`) two parsers could think
/// differently.
pub(super) fn put_flag(element: &Element<'_>, out: &mut Vec<u8>) {
    bson::put_bool(out, element.name().unwrap_or_default(), element.truthy());
}

/// A sort: no walk over the whole collection.
pub(super) fn check_sort(scope: &Scope<'_>, at: &str, sort: &Element<'_>) -> Result<(), Fault> {
    let document = sort.document().ok_or_else(|| Fault::wrong_type(at, sort.key, "object"))?;
    if scope.isolation == Isolation::Filter && document.get("$natural")?.is_some() {
        return Err(index::natural());
    }
    super::expression::check_document(document, 0).map(|_| ())
}

/// Filters on elements of arrays: no JavaScript in them.
pub(super) fn check_array_filters(scope: &Scope<'_>, at: &str, filters: &Element<'_>) -> Result<(), Fault> {
    let filters = filters.array().ok_or_else(|| Fault::wrong_type(at, filters.key, "array"))?;
    for filter in filters {
        let filter = filter?;
        let filter = filter.document().ok_or_else(|| Fault::wrong_type(at, filter.key, "object"))?;
        predicate::check(scope, filter)?;
    }
    Ok(())
}
