//! What the server answered, as the tenant is to see it: logical names, the tenant's own numbers of cursors, no code
//! that speaks of the upstream's topology. One pass over the top level; batches are copied whole.

mod text;

use text::PLAN_DEPTH_MAX;

use super::{
    commands::ReplyRule,
    mask::Mask,
    refuse::{put_bulk_error, put_not_there, put_write_error},
    rewrite::{Failed, ORG, Scope, index},
};
use crate::{
    tenant::{Isolation, OrgId, namespace::MongoNamespace},
    wire::{
        Error,
        mongo::bson::{self, Document, Element},
    },
};

/// Codes by which a server says that it is no longer the primary, or going: a driver would take them for ours.
const TOPOLOGY: [i64; 7] = [10107, 13435, 13436, 10058, 11600, 11602, 189];

/// What a client is told instead.
const UNREACHABLE: (i32, &str) = (6, "HostUnreachable");

/// `NamespaceExists`.
const NAMESPACE_EXISTS: i64 = 48;

/// `CannotCreateIndex`: a collection has at most 64.
const NO_ROOM_FOR_AN_INDEX: i64 = 67;

/// How a reply is to be mapped.
#[derive(Debug)]
pub struct Mapping<'a> {
    /// What the command's row says.
    pub rule: ReplyRule,
    /// How the tenant is kept apart.
    pub isolation: Isolation,
    /// The tenant.
    pub org: &'a OrgId,
    /// The tenant's names.
    pub place: &'a MongoNamespace,
    /// The tenant's permutations.
    pub mask: &'a Mask,
    /// Statements that were refused before, by their index: left out, or in a `bulkWrite` to be found among the
    /// server's results.
    pub failed: &'a [Failed],
    /// Whether the first failure ends the command.
    pub ordered: bool,
    /// The server's number of the cursor that was asked for more.
    pub cursor: Option<i64>,
    /// The server's numbers of cursors that it was not asked to close, as they are not the tenant's.
    pub not_there: &'a [i64],
}

/// What a reply said.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Whether it worked.
    pub ok: bool,
    /// The number of the error.
    pub code: Option<i64>,
    /// The server says that it is not the primary.
    pub topology: bool,
    /// The transaction is over, by the server.
    pub transient: bool,
    /// The cursor: the server's id, and its physical namespace. An id of 0 is a cursor that is read to its end, and has
    /// none.
    pub cursor: Option<(i64, String)>,
}

impl Mapping<'_> {
    /// Appends the reply's document as the client is to see it.
    ///
    /// # Errors
    /// The reply is no BSON, or an id can't be permuted: nothing of it may be sent.
    pub fn put(&self, reply: Document<'_>, out: &mut Vec<u8>) -> Result<Seen, Error> {
        let mut seen = Seen::default();
        for element in reply {
            let element = element?;
            match element.key {
                b"ok" => seen.ok = element.truthy(),
                b"code" => seen.code = element.whole(),
                b"errorLabels" => seen.transient = has_text(element.array(), "TransientTransactionError")?,
                _ => {}
            }
        }
        seen.topology = seen.code.is_some_and(|code| TOPOLOGY.contains(&code));
        let filter = self.isolation == Isolation::Filter;
        let done = match self.rule {
            ReplyRule::Created => Some(NAMESPACE_EXISTS),
            ReplyRule::IndexesWished => Some(NO_ROOM_FOR_AN_INDEX),
            _ => None,
        };
        if filter && done.is_some() && seen.code == done {
            seen.ok = true;
            let body = bson::open(out);
            bson::put_f64(out, "ok", 1.0);
            bson::close(out, body);
            return Ok(seen);
        }
        let body = bson::open(out);
        // Where the whole command failed, its statements say nothing.
        let mut merged = self.failed.is_empty() || !seen.ok || self.rule == ReplyRule::BulkWrite;
        for element in reply {
            let element = element?;
            match (element.key, self.rule) {
                (b"code", _) if seen.topology => bson::put_i32(out, "code", UNREACHABLE.0),
                (b"codeName", _) if seen.topology => bson::put_str(out, "codeName", UNREACHABLE.1),
                (b"errmsg", _) if self.cursor.is_some() => self.put_cursor_text(seen.code, &element, out)?,
                (b"errmsg" | b"note", _) => self.put_message(&element, out),
                (b"upserted", ReplyRule::Writes) => self.put_upserted(&element, out)?,
                (b"writeErrors", _) => {
                    self.put_write_errors(element.array(), out)?;
                    merged = true;
                }
                (b"writeConcernError", _) => self.put_concern(&element, out)?,
                (b"cursor", rule) if element.document().is_some() => self.put_cursor(rule, &element, &mut seen, out)?,
                (b"ns" | b"db" | b"dropped", _) => self.put_text(&element, out),
                (b"cursorsKilled" | b"cursorsNotFound" | b"cursorsAlive" | b"cursorsUnknown", _) => {
                    self.put_cursors(&element, out)?;
                }
                // They count the indexes of every tenant, and tell whether one of them has the collection.
                (
                    b"numIndexesBefore" | b"numIndexesAfter" | b"nIndexesWas" | b"createdCollectionAutomatically",
                    ReplyRule::IndexesMade | ReplyRule::IndexesWished,
                ) if filter => {}
                (b"id", ReplyRule::Session) => self.put_session(&element, out)?,
                (b"serverInfo" | b"command", ReplyRule::Explain) => {}
                (_, ReplyRule::Explain) => self.put_plan(&element, PLAN_DEPTH_MAX, out)?,
                // Addresses and names of the upstream.
                (
                    b"topologyVersion"
                    | b"$gleStats"
                    | b"lastCommittedOpTime"
                    | b"$configTime"
                    | b"$topologyTime"
                    | b"electionId"
                    | b"opTime",
                    _,
                ) => {}
                _ => bson::put(out, &element),
            }
        }
        if !merged {
            self.put_write_errors(None, out)?;
        }
        bson::close(out, body);
        Ok(seen)
    }

    /// The client's index of a statement that the server knows by another: those left out count.
    fn index(&self, theirs: i64) -> i64 {
        self.failed.iter().fold(theirs, |at, one| at + i64::from(i64::try_from(one.index).is_ok_and(|it| it <= at)))
    }

    /// The server's errors and ours, by their index.
    fn put_write_errors(&self, theirs: Option<Document<'_>>, out: &mut Vec<u8>) -> Result<(), Error> {
        let list = bson::open_array(out, "writeErrors");
        let mut at = 0;
        let mut ours = self.failed.iter().peekable();
        for entry in theirs.into_iter().flatten() {
            let Some(entry) = entry?.document() else { continue };
            let index = self.index(entry.get("index")?.and_then(|it| it.whole()).unwrap_or_default());
            while let Some(one) = ours.next_if(|one| i64::try_from(one.index).is_ok_and(|it| it < index)) {
                put_write_error(out, at, one);
                at += 1;
            }
            let copy = bson::open_document(out, bson::Index::new(at).as_str());
            for element in entry {
                let element = element?;
                match element.key {
                    b"index" => bson::put_i32(out, "index", i32::try_from(index).unwrap_or(i32::MAX)),
                    b"errmsg" => self.put_message(&element, out),
                    b"keyPattern" | b"keyValue" => self.put_key(&element, out)?,
                    _ => bson::put(out, &element),
                }
            }
            bson::close(out, copy);
            at += 1;
        }
        // In order, the server's failure came before ours was reached.
        if at == 0 || !self.ordered {
            for one in ours {
                put_write_error(out, at, one);
                at += 1;
            }
        }
        bson::close(out, list);
        Ok(())
    }

    fn put_upserted(&self, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
        let list = bson::open_array(out, "upserted");
        for (at, entry) in element.array().into_iter().flatten().enumerate() {
            let Some(entry) = entry?.document() else { continue };
            let copy = bson::open_document(out, bson::Index::new(at).as_str());
            for element in entry {
                let element = element?;
                match element.whole() {
                    Some(index) if element.key == b"index" => {
                        bson::put_i32(out, "index", i32::try_from(self.index(index)).unwrap_or(i32::MAX));
                    }
                    _ => bson::put(out, &element),
                }
            }
            bson::close(out, copy);
        }
        bson::close(out, list);
        Ok(())
    }

    fn put_concern(&self, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
        let Some(concern) = element.document() else {
            bson::put(out, element);
            return Ok(());
        };
        let code = concern.get("code")?.and_then(|it| it.whole());
        let topology = code.is_some_and(|code| TOPOLOGY.contains(&code));
        let copy = bson::open_document(out, "writeConcernError");
        for element in concern {
            let element = element?;
            match element.key {
                b"code" if topology => bson::put_i32(out, "code", UNREACHABLE.0),
                b"codeName" if topology => bson::put_str(out, "codeName", UNREACHABLE.1),
                b"errmsg" => self.put_message(&element, out),
                _ => bson::put(out, &element),
            }
        }
        bson::close(out, copy);
        Ok(())
    }

    fn put_cursor(
        &self,
        rule: ReplyRule,
        element: &Element<'_>,
        seen: &mut Seen,
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let Some(cursor) = element.document() else { return Ok(()) };
        let id = cursor.get("id")?.and_then(|it| it.i64()).unwrap_or_default();
        let namespace = cursor.get("ns")?.and_then(|it| it.str()).unwrap_or_default();
        // Of one that is read to its end nobody asks where it was.
        let namespace = if id == 0 { String::new() } else { namespace.to_owned() };
        seen.cursor = Some((id, namespace));
        let copy = bson::open_document(out, "cursor");
        for element in cursor {
            let element = element?;
            match (element.key, rule) {
                // They are all here: see the rewriting of `listIndexes`.
                (b"id", ReplyRule::Indexes) if self.isolation == Isolation::Filter => bson::put_i64(out, "id", 0),
                (b"id", _) if element.i64().is_some() => {
                    let id =
                        self.mask.cursor(id).map_err(|_| Error { at: "reply", what: "an id that can't be hidden" })?;
                    bson::put_i64(out, "id", id);
                }
                (b"ns", _) => self.put_text(&element, out),
                (b"firstBatch" | b"nextBatch", ReplyRule::Collections | ReplyRule::Indexes | ReplyRule::BulkWrite) => {
                    self.put_batch(rule, &element, out)?;
                }
                _ => bson::put(out, &element),
            }
        }
        bson::close(out, copy);
        Ok(())
    }

    /// A batch whose documents speak of names.
    fn put_batch(&self, rule: ReplyRule, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
        let (Some(name), Some(batch)) = (element.name(), element.array()) else { return Ok(()) };
        let list = bson::open_array(out, name);
        let mut at = 0;
        for entry in batch {
            let Some(entry) = entry?.document() else { continue };
            let called = entry.get("name")?.and_then(|it| it.str()).unwrap_or_default();
            if rule == ReplyRule::Collections && called.starts_with("system.") {
                continue;
            }
            if rule == ReplyRule::Indexes && index::logical(&self.scope(), called).is_none() {
                continue;
            }
            if rule == ReplyRule::BulkWrite
                && let Some(one) = self.refused(entry.get("idx")?.and_then(|it| it.whole()))
            {
                if entry.get("ok")?.is_some_and(|ok| ok.truthy()) {
                    return Err(Error { at: "reply", what: "an operation that no server takes was taken" });
                }
                put_bulk_error(out, at, one);
                at += 1;
                continue;
            }
            let copy = bson::open_document(out, bson::Index::new(at).as_str());
            for element in entry {
                let element = element?;
                match (element.key, rule) {
                    (b"errmsg", _) => self.put_message(&element, out),
                    (b"ns", _) => self.put_text(&element, out),
                    (b"keyPattern" | b"keyValue", ReplyRule::BulkWrite) => self.put_key(&element, out)?,
                    (b"name", ReplyRule::Indexes) => {
                        bson::put_str(out, "name", index::logical(&self.scope(), called).unwrap_or(called));
                    }
                    // What makes it the tenant's own; the client said nothing of it.
                    (b"partialFilterExpression", ReplyRule::Indexes) => self.put_partial(&element, out)?,
                    _ => bson::put(out, &element),
                }
            }
            bson::close(out, copy);
            at += 1;
        }
        bson::close(out, list);
        Ok(())
    }

    /// The operation of that number, where it was refused before.
    fn refused(&self, number: Option<i64>) -> Option<&Failed> {
        let index = usize::try_from(number?).ok()?;
        self.failed.binary_search_by_key(&index, |one| one.index).ok().and_then(|at| self.failed.get(at))
    }

    fn scope(&self) -> Scope<'_> {
        Scope { isolation: self.isolation, org: self.org, place: self.place, max_time_ms: 0, shows_org: false }
    }

    /// The filter of a partial index without the tenant's clause; nothing where that was all.
    fn put_partial(&self, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
        let filter = element.document().filter(|_| self.isolation == Isolation::Filter);
        let Some(filter) = filter else {
            bson::put(out, element);
            return Ok(());
        };
        let at = out.len();
        let copy = bson::open_document(out, "partialFilterExpression");
        let mut left = 0;
        for clause in filter {
            let clause = clause?;
            match (clause.key, clause.array()) {
                (key, _) if key == ORG.as_bytes() => {}
                (b"$and", Some(list)) => {
                    // Ours first, the client's behind.
                    for inner in list {
                        let Some(inner) = inner?.document() else { continue };
                        for inner in inner {
                            let inner = inner?;
                            if inner.key != ORG.as_bytes() {
                                bson::put(out, &inner);
                                left += 1;
                            }
                        }
                    }
                }
                _ => {
                    bson::put(out, &clause);
                    left += 1;
                }
            }
        }
        bson::close(out, copy);
        if left == 0 {
            out.truncate(at);
        }
        Ok(())
    }

    fn put_cursors(&self, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
        let (Some(name), Some(ids)) = (element.name(), element.array()) else {
            bson::put(out, element);
            return Ok(());
        };
        let list = bson::open_array(out, name);
        for (at, id) in ids.iter().enumerate() {
            let id = id?.i64().unwrap_or_default();
            let id = self.mask.cursor(id).map_err(|_| Error { at: "reply", what: "an id that can't be hidden" })?;
            bson::put_i64(out, bson::Index::new(at).as_str(), id);
        }
        if element.key == b"cursorsNotFound" {
            put_not_there(self.mask, self.not_there, ids.iter().count(), out)?;
        }
        bson::close(out, list);
        Ok(())
    }

    fn put_session(&self, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
        let fault = Error { at: "reply", what: "a session without an id" };
        let id = element.document().ok_or(fault)?.get("id")?.ok_or(fault)?;
        let (_, id) = id.binary().ok_or(fault)?;
        let mut id: [u8; 16] = id.try_into().map_err(|_| fault)?;
        self.mask.session_back(&mut id).map_err(|_| fault)?;
        let copy = bson::open_document(out, "id");
        bson::put_binary(out, "id", 4, &id);
        bson::close(out, copy);
        Ok(())
    }
}

fn has_text(list: Option<Document<'_>>, wanted: &str) -> Result<bool, Error> {
    for element in list.into_iter().flatten() {
        if element?.str() == Some(wanted) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests;
