//! A message from its sections to its sections: the fields of the command in a table, then one rule for each.

use super::{
    BODY_MAX, DEPTH_MAX, Fault, Forward, IDS_MAX, Local, Prepare, Request, Scope, Transaction, Verdict, expression,
    index, name,
    pipeline::{self, Cx, Source},
    predicate::{self, Collation},
    projection,
    statement::{self, Kind, List, Told},
    update,
};
use crate::{
    front::mongo::commands::{self, Emulate, Field, Found, GENERIC, Home, ReplyRule, Row, Rule, Treat, Value},
    tenant::Isolation,
    wire::mongo::{
        HEADER_BYTES, MESSAGE_MAX_BYTES,
        bson::{self, Document, Element, Index, kind},
    },
};

/// Most fields of a command: its own and the generic ones, each once, and its name.
const FIELDS_MAX: usize = 48;

/// Where the generic fields begin among the slots.
const GENERIC_AT: usize = 32;

/// Indexes that are listed at once: more than the 64 that the server lets a collection have.
const INDEXES_BATCH: i32 = 1000;

/// The slot of a generic field.
const fn slot_of(name: &str) -> usize {
    let mut at = 0;
    while at < GENERIC.len() {
        if commands::is_same(GENERIC[at], name) {
            return GENERIC_AT + at;
        }
        at += 1;
    }
    panic!("no generic field")
}

const DB: usize = slot_of("$db");
const LSID: usize = slot_of("lsid");
const TXN_NUMBER: usize = slot_of("txnNumber");
const AUTOCOMMIT: usize = slot_of("autocommit");
const START_TRANSACTION: usize = slot_of("startTransaction");
const MAX_TIME: usize = slot_of("maxTimeMS");

/// The slot of a generic field by what a client wrote: a `match`, which costs less than a walk over the names.
fn generic_slot(key: &[u8]) -> Option<usize> {
    Some(match key {
        b"$db" => DB,
        b"lsid" => LSID,
        b"txnNumber" => TXN_NUMBER,
        b"autocommit" => AUTOCOMMIT,
        b"startTransaction" => START_TRANSACTION,
        b"recoveryToken" => const { slot_of("recoveryToken") },
        b"readConcern" => const { slot_of("readConcern") },
        b"writeConcern" => const { slot_of("writeConcern") },
        b"maxTimeMS" => MAX_TIME,
        b"comment" => const { slot_of("comment") },
        b"$readPreference" => const { slot_of("$readPreference") },
        b"$clusterTime" => const { slot_of("$clusterTime") },
        b"apiVersion" => const { slot_of("apiVersion") },
        b"apiStrict" => const { slot_of("apiStrict") },
        b"apiDeprecationErrors" => const { slot_of("apiDeprecationErrors") },
        _ => return None,
    })
}

/// Where in the body a field stands: small, as every command begins with a table of these.
#[derive(Clone, Copy, Default)]
struct Place {
    at: u32,
    bytes: u32,
    key_bytes: u8,
    slot: u8,
}

/// A command's fields, each known, each once, and sound to their bottom.
struct Fields<'a> {
    row: &'static Row,
    body: &'a [u8],
    list: [Place; FIELDS_MAX],
    count: usize,
    seen: u64,
}

impl<'a> Fields<'a> {
    /// None of a body's yet.
    fn new(row: &'static Row, body: Document<'a>) -> Self {
        Self { row, body: body.bytes(), list: [Place::default(); FIELDS_MAX], count: 0, seen: 0 }
    }

    /// Walks the body once, in place, as the table is not a small one: `first` is its first element, already found.
    fn read(&mut self, body: Document<'a>, first: &Element<'a>) -> Result<(), Fault> {
        bson::validate_element(first, DEPTH_MAX)?;
        let row = self.row;
        let mut at = 4 + first.span.len();
        for element in body.iter().skip(1) {
            let element = element?;
            let slot = self.slot(element.key).ok_or_else(|| Fault::unknown_field(row.name, element.key))?;
            if self.seen & 1 << slot != 0 {
                return Err(Fault::duplicate(row.name, element.key));
            }
            bson::validate_element(&element, DEPTH_MAX)?;
            self.seen |= 1 << slot;
            let narrow = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            self.list[self.count] = Place {
                at: narrow(at),
                bytes: narrow(element.span.len()),
                // Known names are short, and a slot is below 64.
                key_bytes: u8::try_from(element.key.len()).unwrap_or(u8::MAX),
                slot: u8::try_from(slot).unwrap_or(u8::MAX),
            };
            self.count += 1;
            at += element.span.len();
        }
        Ok(())
    }

    fn slot(&self, key: &[u8]) -> Option<usize> {
        generic_slot(key).or_else(|| self.row.fields.iter().position(|field| field.name.as_bytes() == key))
    }

    fn element(&self, place: &Place) -> Element<'a> {
        let (at, key_bytes) = (place.at as usize, usize::from(place.key_bytes));
        let span = &self.body[at..at + place.bytes as usize];
        Element { kind: span[0], key: &span[1..=key_bytes], value: &span[key_bytes + 2..], span }
    }

    fn iter(&self) -> impl Iterator<Item = (Element<'a>, usize)> + '_ {
        self.list[..self.count].iter().map(|place| (self.element(place), usize::from(place.slot)))
    }

    /// A field of the command's own by its bit, which is 0 where the command has none of the kind.
    fn own(&self, bit: u64) -> Option<Element<'a>> {
        if self.seen & bit == 0 { None } else { self.generic(bit.trailing_zeros() as usize) }
    }

    /// A field by its slot; a generic one, mostly.
    fn generic(&self, slot: usize) -> Option<Element<'a>> {
        if self.seen & 1 << slot == 0 {
            return None;
        }
        self.list[..self.count].iter().find(|place| usize::from(place.slot) == slot).map(|place| self.element(place))
    }

    /// A field of the command's own.
    fn get(&self, name: &str) -> Option<Element<'a>> {
        self.iter().find(|(element, _)| element.key == name.as_bytes()).map(|(element, _)| element)
    }

    fn truthy(&self, bit: u64) -> bool {
        self.own(bit).is_some_and(|element| element.truthy())
    }

    /// `$db`, which every message has.
    fn database(&self) -> Result<&'a str, Fault> {
        let found = self.generic(DB).ok_or_else(no_database)?;
        found.str().ok_or_else(|| Fault::wrong_type("command", b"$db", "string"))
    }
}

fn no_database() -> Fault {
    Fault::new(40571, "Location40571", "OP_MSG requests require a $db argument")
}

pub(super) fn rewrite<'a>(scope: &Scope<'_>, request: &Request<'a>, out: &mut Vec<u8>) -> Result<Verdict<'a>, Fault> {
    let body = Document::new(request.body)?;
    let first = body.iter().next().transpose()?.ok_or_else(|| Fault::unknown_command(""))?;
    let name = first.name().unwrap_or_default();
    let row = match commands::find(first.key) {
        Found::Row(row) => row,
        Found::Refused => return Err(Fault::forbidden(format!("the command {name}"))),
        Found::Unknown => return Err(Fault::unknown_command(name)),
    };
    match treat(scope, row) {
        Treat::Refuse => Err(Fault::forbidden(format!("the command {name}"))),
        Treat::Local(emulate) => local(scope, row, emulate, body, &first).map(Verdict::Local),
        Treat::Forward => forward(scope, row, request, body, first, out),
    }
}

fn treat(scope: &Scope<'_>, row: &Row) -> Treat {
    match scope.isolation {
        Isolation::Filter => row.filter,
        Isolation::Database => row.database,
    }
}

/// `$db` of a request that is not read field by field.
fn database<'a>(body: Document<'a>) -> Result<&'a str, Fault> {
    let mut found = None;
    for element in body {
        let element = element?;
        if element.key == b"$db" {
            if found.is_some() {
                return Err(Fault::duplicate("command", b"$db"));
            }
            found = Some(element.str().ok_or_else(|| Fault::wrong_type("command", b"$db", "string"))?);
        }
    }
    found.ok_or_else(no_database)
}

/// A request that the front answers: what it names is checked here, its fields by the front.
fn local<'a>(
    scope: &Scope<'_>,
    row: &'static Row,
    emulate: Emulate,
    body: Document<'a>,
    first: &Element<'a>,
) -> Result<Local<'a>, Fault> {
    bson::validate(body, DEPTH_MAX)?;
    let database = database(body)?;
    if row.home == Home::Data {
        name::database(scope, database)?;
    }
    let collection = match row.value {
        Value::Collection => Some(name::collection_of(scope, database, row.name, first)?),
        _ => None,
    };
    Ok(Local { row, emulate, database, collection })
}

/// Everything that a body was found to need and to be.
struct Body<'a> {
    database: &'a str,
    collection: Option<&'a str>,
    reply: ReplyRule,
    prepare: Option<Prepare<'a>>,
    transaction: Option<Transaction>,
    retryable: bool,
    lsid: Option<usize>,
    ids: Vec<usize>,
    told: Told,
    statements: bool,
    ordered: bool,
    target: Option<(&'a str, &'a str)>,
}

fn forward<'a>(
    scope: &Scope<'_>,
    row: &'static Row,
    request: &Request<'a>,
    body: Document<'a>,
    first: Element<'a>,
    out: &mut Vec<u8>,
) -> Result<Verdict<'a>, Fault> {
    let mut fields = Fields::new(row, body);
    fields.read(body, &first)?;
    // A section is an argument like those of the body: known, and there once.
    for (name, _) in request.sections {
        let slot = fields
            .row
            .fields
            .iter()
            .position(|field| field.name == *name && listed(field.rule).is_some())
            .ok_or_else(|| Fault::unknown_field(row.name, name.as_bytes()))?;
        if fields.seen & 1 << slot != 0 {
            return Err(Fault::duplicate(row.name, name.as_bytes()));
        }
        fields.seen |= 1 << slot;
    }
    let db = fields.database()?;
    if row.name == "dropIndexes" && scope.isolation == Isolation::Filter {
        let whole = fields.get("index").is_none_or(|index| index.str() == Some("*") || index.kind == kind::DOCUMENT);
        if whole {
            return local(scope, row, Emulate::DropIndexes, body, &first).map(Verdict::Local);
        }
    }
    // Flags: none. What the client wants unanswered is still asked with an answer.
    out.extend_from_slice(&[0; 4]);
    out.push(0);
    let (from, open) = (out.len(), bson::open(out));
    let mut rewritten = put_body(scope, &fields, first, db, Some(request), out)?;
    bson::close(out, open);
    if out.len() - from > BODY_MAX {
        return Err(Fault::too_large(out.len() - from));
    }
    for (name, bytes) in request.sections {
        let rule = row.fields.iter().find(|field| field.name == *name).map(|field| field.rule);
        let Some(kind) = rule.and_then(listed) else { continue };
        out.push(1);
        let at = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        put_list(scope, kind, List::Section(bytes), &mut rewritten, out)?;
        let bytes = i32::try_from(out.len() - at).unwrap_or(i32::MAX);
        out[at..at + 4].copy_from_slice(&bytes.to_le_bytes());
    }
    // The server would not answer but close the connection.
    let bytes = HEADER_BYTES + out.len() - from;
    if bytes > MESSAGE_MAX_BYTES {
        return Err(Fault::message_too_large(bytes));
    }
    required(&fields)?;
    if rewritten.statements && rewritten.told.written == 0 && !rewritten.told.failed.is_empty() {
        return Err(Fault::statements(rewritten.told.failed, row.reply == ReplyRule::BulkWrite));
    }
    Ok(Verdict::Forward(Forward {
        row,
        database: rewritten.database,
        collection: rewritten.collection,
        reply: rewritten.reply,
        prepare: rewritten.prepare,
        transaction: rewritten.transaction,
        retryable: rewritten.retryable,
        lsid: rewritten.lsid,
        ids: rewritten.ids,
        creates: matches!(row.name, "create" | "createIndexes")
            || rewritten.told.creates
            || row.name == "findAndModify" && fields.truthy(row.bits.upsert),
        failed: rewritten.told.failed,
        ordered: rewritten.ordered,
        target: rewritten.target,
    }))
}

/// The statements that a rule is about.
fn listed(rule: Rule) -> Option<Kind> {
    Some(match rule {
        Rule::Documents => Kind::Documents,
        Rule::Updates => Kind::Updates,
        Rule::Deletes => Kind::Deletes,
        Rule::Operations => Kind::Operations,
        Rule::Namespaces => Kind::Namespaces,
        _ => return None,
    })
}

/// Arguments without which the server would do something else than asked, or something to everybody.
fn required(fields: &Fields<'_>) -> Result<(), Fault> {
    let missing = fields.row.required & !fields.seen;
    if missing == 0 {
        return Ok(());
    }
    let field = fields.row.fields.get(missing.trailing_zeros() as usize);
    Err(Fault::missing(fields.row.name, field.map_or("", |field| field.name)))
}

fn put_list<'a>(
    scope: &Scope<'_>,
    kind: Kind,
    list: List<'_>,
    body: &mut Body<'a>,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let told = statement::put_all(scope, kind, list, body.ordered, out)?;
    if kind != Kind::Namespaces {
        body.told = told;
        body.statements = true;
    }
    Ok(())
}

/// The elements of a command. Without a request it is one inside `explain`.
fn put_body<'a>(
    scope: &Scope<'_>,
    fields: &Fields<'a>,
    first: Element<'a>,
    db: &'a str,
    request: Option<&Request<'a>>,
    out: &mut Vec<u8>,
) -> Result<Body<'a>, Fault> {
    let row = fields.row;
    let collection_field = fields.own(row.bits.collection);
    let bulk = row.home == Home::Cursor
        && db == "admin"
        && collection_field.or(Some(first)).and_then(|name| name.str()) == Some("$cmd.bulkWrite");
    match row.home {
        Home::Admin if db != "admin" => {
            return Err(Fault::new(
                13,
                "Unauthorized",
                format!("{} may only be run against the admin database.", row.name),
            ));
        }
        Home::Admin => {}
        Home::Cursor if bulk => {}
        Home::Data | Home::Cursor => {
            name::database(scope, db)?;
        }
    }
    let mut body = Body {
        database: db,
        collection: None,
        // What a `bulkWrite` left for later speaks of names as its first results do.
        reply: if bulk && row.value == Value::Cursor { ReplyRule::BulkWrite } else { row.reply },
        prepare: None,
        transaction: None,
        retryable: false,
        lsid: None,
        ids: Vec::new(),
        told: Told::default(),
        statements: false,
        target: None,
        ordered: fields.own(row.bits.ordered).is_none_or(|ordered| ordered.truthy()),
    };
    put_first(scope, fields, first, bulk, &mut body, out)?;
    let collation = match fields.own(row.bits.collation) {
        Some(element) => index::collation(&element)?,
        None => Collation::Simple,
    };
    for (element, slot) in fields.iter() {
        match row.fields.get(slot) {
            Some(field) => put_field(scope, fields, field, &element, collation, &mut body, out)?,
            None => put_generic(scope, row, &element, request.is_some(), &mut body, out)?,
        }
    }
    put_absent(scope, fields, collation, out)?;
    if request.is_some() {
        put_time(scope, row, fields.generic(MAX_TIME), out)?;
        body.transaction = transaction(row, fields, &mut body.retryable)?;
    }
    Ok(body)
}

/// The element that names the command.
fn put_first<'a>(
    scope: &Scope<'_>,
    fields: &Fields<'a>,
    first: Element<'a>,
    bulk: bool,
    body: &mut Body<'a>,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let row = fields.row;
    let key = row.name;
    match row.value {
        Value::Collection => {
            body.collection = Some(name::collection_of(scope, body.database, row.name, &first)?);
            bson::put_as(out, key, &first);
        }
        Value::CollectionOrDatabase => {
            if first.kind == kind::STRING && !(bulk || cursor_name(row, first.str())) {
                body.collection = Some(name::collection_of(scope, body.database, row.name, &first)?);
            } else if first.kind != kind::STRING && first.whole() != Some(1) {
                return Err(Fault::failed_to_parse("a collection is named by a string, the database by 1"));
            }
            bson::put_as(out, key, &first);
        }
        Value::Anything => bson::put_i32(out, key, 1),
        Value::Namespace => {
            let (_, collection) = name::put_namespace(scope, row.name, key, &first, out)?;
            body.collection = Some(collection);
        }
        Value::Cursor => {
            let id = first.i64().ok_or_else(|| Fault::wrong_type(row.name, first.key, "long"))?;
            // None has such a number, and it would not be hidden.
            if id < 1 {
                return Err(Fault::new(43, "CursorNotFound", format!("cursor id {id} not found")));
            }
            bson::put_as(out, key, &first);
            body.ids.push(out.len() - 8);
        }
        Value::Sessions => put_sessions(row.name, &first, &mut body.ids, out)?,
        Value::Command => put_explained(scope, first, body, out)?,
    }
    Ok(())
}

/// The names that cursors of a database have instead of a collection.
fn cursor_name(row: &Row, name: Option<&str>) -> bool {
    let special = ["$cmd.aggregate", "$cmd.listCollections"];
    row.home == Home::Cursor
        && name.is_some_and(|name| special.contains(&name) || name.starts_with("$cmd.listIndexes."))
}

/// An array of `{id}`.
fn put_sessions(at: &str, first: &Element<'_>, ids: &mut Vec<usize>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let list = first.array().ok_or_else(|| Fault::wrong_type(at, first.key, "array"))?;
    // None named means all of the login's, which all tenants of the shared databases have in common.
    if at == "killSessions" && list.is_empty() {
        return Err(Fault::bad_value("name the sessions to kill: killing all is not available here"));
    }
    let open = bson::open_array(out, at);
    for (number, item) in list.iter().enumerate() {
        let item = item?;
        few(at, number)?;
        ids.push(put_session(at, Index::new(number).as_str(), &item, out)?);
    }
    bson::close(out, open);
    Ok(())
}

/// No more ids than one command may name.
fn few(at: &str, before: usize) -> Result<(), Fault> {
    if before < IDS_MAX { Ok(()) } else { Err(Fault::bad_value(format!("{at} names more than {IDS_MAX} at a time"))) }
}

/// `{id: UUID}` and nothing else: `uid` would name another login's session. Gives the place of the 16 bytes.
fn put_session(at: &str, key: &str, session: &Element<'_>, out: &mut Vec<u8>) -> Result<usize, Fault> {
    let document = session.document().ok_or_else(|| Fault::wrong_type(at, session.key, "object"))?;
    super::stage::known_fields("lsid", document, &["id"])?;
    let id = document.get("id")?.ok_or_else(|| Fault::missing("lsid", "id"))?;
    let Some((4, id)) = id.binary().filter(|(_, bytes)| bytes.len() == 16) else {
        return Err(Fault::wrong_type("lsid", b"id", "binData of subtype 4 with 16 bytes"));
    };
    let open = bson::open_document(out, key);
    bson::put_binary(out, "id", 4, id);
    let place = out.len() - 16;
    bson::close(out, open);
    Ok(place)
}

/// The command inside `explain`.
fn put_explained<'a>(
    scope: &Scope<'_>,
    first: Element<'a>,
    body: &mut Body<'a>,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let inner = first.document().ok_or_else(|| Fault::wrong_type("explain", first.key, "object"))?;
    let name = inner.iter().next().transpose()?.ok_or_else(|| Fault::unknown_command(""))?;
    let row = match commands::find(name.key) {
        Found::Row(row) if row.value == Value::Collection || row.name == "aggregate" => row,
        _ => return Err(Fault::new(59, "CommandNotFound", "Explain failed due to unknown command")),
    };
    const EXPLAINED: [&str; 7] = ["find", "aggregate", "count", "distinct", "update", "delete", "findAndModify"];
    if !EXPLAINED.contains(&row.name) {
        return Err(Fault::new(20, "IllegalOperation", format!("Explain not supported for {}", row.name)));
    }
    let mut fields = Fields::new(row, inner);
    fields.read(inner, &name)?;
    if let Some(db) = fields.generic(DB)
        && db.str() != Some(body.database)
    {
        return Err(Fault::namespace("Mismatched $db in explain command"));
    }
    let open = bson::open_document(out, "explain");
    let told = put_body(scope, &fields, name, body.database, None, out)?;
    bson::close(out, open);
    required(&fields)?;
    if let Some(failed) = told.told.failed.into_iter().next() {
        return Err(Fault::new(failed.code, "BadValue", failed.message));
    }
    body.collection = told.collection;
    Ok(())
}

/// A field of the command's own.
fn put_field<'a>(
    scope: &Scope<'_>,
    fields: &Fields<'a>,
    field: &Field,
    element: &Element<'a>,
    collation: Collation,
    body: &mut Body<'a>,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let at = fields.row.name;
    let filter = scope.isolation == Isolation::Filter;
    let document = || element.document().ok_or_else(|| Fault::wrong_type(at, element.key, "object"));
    let array = || element.array().ok_or_else(|| Fault::wrong_type(at, element.key, "array"));
    match field.rule {
        Rule::Any | Rule::Collation => {}
        Rule::Flag if element.kind != kind::BOOL && element.kind != kind::NULL && !element.is_number() => {
            return Err(Fault::wrong_type(at, element.key, "bool"));
        }
        Rule::Number if !element.is_number() && element.kind != kind::NULL => {
            return Err(Fault::wrong_type(at, element.key, "number"));
        }
        Rule::Text if element.kind != kind::STRING => return Err(Fault::wrong_type(at, element.key, "string")),
        Rule::Flag if element.kind != kind::NULL => {
            statement::put_flag(element, out);
            return Ok(());
        }
        Rule::Flag | Rule::Number | Rule::Text => {}
        Rule::Document => {
            document()?;
            if filter && fields.row.reply == ReplyRule::Indexes {
                // All at once: a `getMore` is not told from a find's, and would show those of others.
                let open = bson::open_document(out, field.name);
                bson::put_i32(out, "batchSize", INDEXES_BATCH);
                bson::close(out, open);
                return Ok(());
            }
        }
        Rule::Array => {
            array()?;
            if field.name == "arrayFilters" {
                statement::check_array_filters(scope, at, element)?;
            }
        }
        Rule::Forbidden if element.truthy() => return Err(Fault::forbidden(format!("{at}.{}", field.name))),
        Rule::Forbidden => return Ok(()),
        Rule::DatabaseOnly | Rule::View | Rule::Validator if filter => {
            // Said and switched off, as mappers do, it is not said.
            if matches!(element.kind, kind::BOOL | kind::NULL) && !element.truthy() {
                return Ok(());
            }
            return Err(Fault::forbidden(format!("{at}.{}", field.name)));
        }
        Rule::DatabaseOnly => {}
        Rule::View if field.name == "viewOn" => {
            name::collection_of(scope, body.database, at, element)?;
        }
        Rule::View => {
            let mut cx = context(scope, collation, body);
            return pipeline::put(&mut cx, field.name, array()?, Source::View, 0, out);
        }
        Rule::Validator => predicate::check(scope, document()?)?,
        Rule::Filter => {
            let filter = if element.kind == kind::NULL { None } else { Some(document()?) };
            return statement::put_filter(
                scope,
                collation,
                field.name,
                filter,
                fields.truthy(fields.row.bits.upsert),
                out,
            );
        }
        Rule::Projection => {
            let given = if element.kind == kind::NULL { None } else { Some(document()?) };
            return projection::put(scope, field.name, given, out);
        }
        Rule::Sort => statement::check_sort(scope, at, element)?,
        Rule::Hint => return index::put_hint(scope, at, element, out),
        Rule::Variables => {
            document()?;
            expression::check(element, 0)?;
        }
        Rule::Pipeline => {
            let source = if body.collection.is_some() { Source::Collection } else { Source::Database };
            let mut cx = context(scope, collation, body);
            pipeline::put(&mut cx, field.name, array()?, source, 0, out)?;
            (body.prepare, body.target) = (cx.prepare, cx.target);
            if fields.truthy(fields.row.bits.explain) {
                body.reply = ReplyRule::Explain;
                body.target = None;
            }
            return Ok(());
        }
        Rule::Documents | Rule::Updates | Rule::Deletes | Rule::Operations | Rule::Namespaces => {
            let Some(kind) = listed(field.rule) else { return Ok(()) };
            let list = array()?;
            let open = bson::open_array(out, field.name);
            put_list(scope, kind, List::Array(list), body, out)?;
            bson::close(out, open);
            return Ok(());
        }
        Rule::Update => return update::put(scope, field.name, element, out),
        Rule::Path => {
            let path = element.str_bytes().ok_or_else(|| Fault::wrong_type(at, element.key, "string"))?;
            if filter && predicate::is_org(path) {
                return Err(Fault::forbidden("distinct on org_id"));
            }
        }
        Rule::Cursors => return put_cursors(at, array()?, &mut body.ids, out),
        Rule::CursorCollection => {
            let name = element.str();
            let bulk = body.database == "admin" && name == Some("$cmd.bulkWrite");
            if !bulk && !cursor_name(fields.row, name) {
                body.collection = Some(name::collection_of(scope, body.database, at, element)?);
            }
        }
        Rule::Target => {
            name::put_namespace(scope, at, field.name, element, out)?;
            return Ok(());
        }
        Rule::Indexes => {
            if index::only_wished(array()?)? {
                body.reply = ReplyRule::IndexesWished;
            }
            body.prepare = body.collection.map(|collection| Prepare::IndexRoom { collection });
            return index::put_all(scope, field.name, array()?, out);
        }
        Rule::IndexNames if filter => return index::put_names(scope, element, out),
        Rule::IndexNames => {}
        Rule::Collection => {
            let named = name::collection_of(scope, body.database, at, element)?;
            if field.name == "toCollection" {
                body.target = Some((body.database, named));
            }
        }
        // Beyond the plan, `explain` counts documents and keys that were looked at: others' among them.
        Rule::Verbosity if filter => {
            bson::put_str(out, field.name, "queryPlanner");
            return Ok(());
        }
        Rule::Verbosity => {
            if element.kind != kind::STRING {
                return Err(Fault::wrong_type(at, element.key, "string"));
            }
        }
    }
    if field.rule == Rule::Collation {
        let other = index::collation(element)? == Collation::Other;
        if other && filter && at == "create" {
            return Err(Fault::forbidden("a collection with a collation"));
        }
    }
    // Its name is the field's, as it was found by it.
    bson::put(out, element);
    Ok(())
}

fn context<'c, 'a>(scope: &'c Scope<'c>, collation: Collation, body: &Body<'a>) -> Cx<'c, 'a> {
    Cx { scope, database: body.database, collection: body.collection, collation, prepare: None, target: None }
}

fn put_cursors(at: &str, list: Document<'_>, ids: &mut Vec<usize>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let open = bson::open_array(out, "cursors");
    for (number, item) in list.iter().enumerate() {
        let item = item?;
        let id = item.i64().ok_or_else(|| Fault::wrong_type(at, b"cursors", "long"))?;
        few(at, number)?;
        bson::put_i64(out, Index::new(number).as_str(), id);
        ids.push(out.len() - 8);
    }
    bson::close(out, open);
    Ok(())
}

/// A field that every command may have.
fn put_generic(
    scope: &Scope<'_>,
    row: &Row,
    element: &Element<'_>,
    outer: bool,
    body: &mut Body<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Fault> {
    let expect = |kind: u8, name: &str| {
        if element.kind == kind { Ok(()) } else { Err(Fault::wrong_type(row.name, element.key, name)) }
    };
    match element.key {
        // What drivers put on every command belongs to the `explain` around it.
        key if !outer && !matches!(key, b"comment" | b"readConcern") => return Ok(()),
        b"$db" => {
            return if body.database == "admin" {
                bson::put_str(out, "$db", "admin");
                Ok(())
            } else {
                name::put_database(scope, "$db", body.database, out)
            };
        }
        b"maxTimeMS" => return Ok(()),
        b"lsid" => {
            body.lsid = Some(put_session(row.name, "lsid", element, out)?);
            return Ok(());
        }
        b"txnNumber" => expect(kind::INT64, "long")?,
        b"autocommit" | b"startTransaction" | b"apiStrict" | b"apiDeprecationErrors" => expect(kind::BOOL, "bool")?,
        b"apiVersion" => expect(kind::STRING, "string")?,
        b"readConcern" | b"$readPreference" | b"$clusterTime" | b"recoveryToken" => expect(kind::DOCUMENT, "object")?,
        b"writeConcern" => {
            expect(kind::DOCUMENT, "object")?;
            return put_write_concern(scope, element, out);
        }
        _ => {}
    }
    bson::put(out, element);
    Ok(())
}

/// A write concern that waits no longer than a request may run.
fn put_write_concern(scope: &Scope<'_>, element: &Element<'_>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let Some(concern) = element.document() else { return Ok(()) };
    super::stage::known_fields("writeConcern", concern, &["w", "j", "fsync", "wtimeout", "provenance"])?;
    let open = bson::open_document(out, "writeConcern");
    for element in concern {
        let element = element?;
        let longer = element.key == b"wtimeout" && element.whole().is_none_or(|ms| ms > scope.max_time_ms.into());
        if longer {
            bson::put_i32(out, "wtimeout", scope.max_time_ms);
        } else {
            bson::put(out, &element);
        }
    }
    bson::close(out, open);
    Ok(())
}

/// What a client left out and the tenant needs.
fn put_absent(scope: &Scope<'_>, fields: &Fields<'_>, collation: Collation, out: &mut Vec<u8>) -> Result<(), Fault> {
    let filter = scope.isolation == Isolation::Filter;
    if !filter {
        return Ok(());
    }
    let mut absent = fields.row.wanted & !fields.seen;
    while absent != 0 {
        let field = fields.row.fields.get(absent.trailing_zeros() as usize);
        absent &= absent - 1;
        let Some(field) = field else { continue };
        match field.rule {
            Rule::Filter => {
                predicate::put(scope, collation, field.name, None, out)?;
            }
            Rule::Projection => projection::put(scope, field.name, None, out)?,
            Rule::Verbosity => bson::put_str(out, field.name, "queryPlanner"),
            _ => {}
        }
    }
    Ok(())
}

/// `maxTimeMS`: the smaller of the client's and the tier's. Where the server takes none, or where it would break what
/// has to be finished, it is only capped.
fn put_time(scope: &Scope<'_>, row: &Row, given: Option<Element<'_>>, out: &mut Vec<u8>) -> Result<(), Fault> {
    let tier = scope.max_time_ms;
    let wanted = match given {
        None => 0,
        Some(element) if !element.is_number() => return Err(Fault::wrong_type(row.name, b"maxTimeMS", "number")),
        Some(element) => match element.whole().map(i32::try_from) {
            Some(Ok(ms)) if ms >= 0 => ms,
            _ => return Err(Fault::bad_value("maxTimeMS has to be a whole number from 0 to 2147483647")),
        },
    };
    let ms = match wanted {
        0 if row.timed => tier,
        0 => return Ok(()),
        wanted => wanted.min(tier),
    };
    bson::put_i32(out, "maxTimeMS", ms);
    Ok(())
}

/// The transaction that a command says it belongs to; and whether the server would know it again without one.
fn transaction(row: &Row, fields: &Fields<'_>, retryable: &mut bool) -> Result<Option<Transaction>, Fault> {
    let number = fields.generic(TXN_NUMBER).and_then(|number| number.i64());
    let starts = fields.generic(START_TRANSACTION).and_then(|starts| starts.bool());
    let auto = fields.generic(AUTOCOMMIT).and_then(|auto| auto.bool());
    if (number.is_some() || auto.is_some() || starts.is_some()) && fields.generic(LSID).is_none() {
        return Err(Fault::new(72, "InvalidOptions", "Transaction number requires a session ID to also be specified"));
    }
    match (number, auto, starts) {
        (None, None, None) => Ok(None),
        (Some(_), None, None) => {
            *retryable = true;
            Ok(None)
        }
        (Some(number), Some(false), starts) if starts != Some(false) => {
            Ok(Some(Transaction { number, starts: starts == Some(true) }))
        }
        _ => Err(Fault::new(
            72,
            "InvalidOptions",
            format!(
                "{}: a transaction needs txnNumber and autocommit: false; startTransaction is true or absent",
                row.name
            ),
        )),
    }
}
