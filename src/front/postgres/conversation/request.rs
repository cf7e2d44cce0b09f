//! What the client sends: which of it needs a server, and what the server is sent in its place.

use std::sync::Arc;

use super::{Conversation, Fault, Note, Refusing, Rest, Step, Want};
use crate::{
    front::postgres::{
        ledger::{How, Owed},
        out::Out,
        refuse,
        scan::{self, Scan, Shape},
        statement::{PREFIX, Unnamed},
    },
    refusal::Over,
    upstream::postgres::connection::Remote,
    wire::{
        self,
        postgres::{
            HEAD, Head,
            backend::{self, Report, Status},
            frontend::{self, Subject},
            head, put,
        },
    },
};

/// Longest Query or Parse that is read; longer ones are forwarded unread and their worst is assumed.
const READ_MAX: usize = 256 * 1024;

/// Most bytes of our own to a server in one go: a Bind of a few bytes may need a Parse of many before it.
const UP_MAX: usize = 256 * 1024;

/// Fails as PostgreSQL does when a statement's types have changed since it was prepared.
const CHANGED_PLAN: &str = "DO $dynabase$BEGIN RAISE EXCEPTION USING ERRCODE='0A000',\
    MESSAGE='cached plan must not change result type';END$dynabase$";

impl Conversation {
    /// Refuses what the client is about to ask, as a server would: one error, then everything up to the next point
    /// where the protocol is in step again is dropped. Only while nothing is owed and no transaction is open.
    pub fn refuse(&mut self, next: u8, report: &Report, down: &mut Out) {
        down.own(|own| report.put(own));
        if matches!(next, b'Q' | b'F') {
            // The message itself is dropped by `skip_refused`.
            down.own(|own| own.extend_from_slice(&backend::ready_message(Status::Idle)));
        } else {
            self.refusing = Refusing::UntilSync;
        }
    }

    /// Drops the message at the head of `input` that [`Self::refuse`] refused; gives the bytes that are done with.
    pub fn skip_refused(&mut self, input: &[u8]) -> usize {
        if self.refusing == Refusing::UntilSync {
            return 0;
        }
        let Ok(Some(Head { len, .. })) = head(input) else { return 0 };
        let arrived = len.min(input.len());
        self.client_rest = (len - arrived, Rest::Drop);
        arrived
    }

    /// Takes the client's bytes.
    ///
    /// # Errors
    /// [`Fault::Client`].
    pub fn hear_client(
        &mut self,
        input: &[u8],
        mut remote: Option<&mut Remote>,
        up: &mut Out,
        down: &mut Out,
    ) -> Result<Step, Fault> {
        let mut at = 0;
        loop {
            if self.client_rest.0 > 0 {
                let n = self.client_rest.0.min(input.len() - at);
                if self.client_rest.1 == Rest::Forward {
                    up.input(at..at + n);
                }
                self.client_rest.0 -= n;
                at += n;
            }
            let rest = &input[at..];
            let Some(head) = frontend::frontend_head(rest).map_err(Fault::Client)? else {
                return Ok(Step { consumed: at, want: Want::More });
            };
            let message = &rest[..head.len.min(rest.len())];
            let whole = message.len() == head.len;
            if self.refusing == Refusing::UntilSync {
                if head.kind == b'X' {
                    return Ok(Step { consumed: at, want: Want::Close });
                }
                if head.kind == b'S' {
                    self.refusing = Refusing::No;
                    down.own(|own| own.extend_from_slice(&backend::ready_message(Status::Idle)));
                }
                self.client_rest = (head.len, Rest::Drop);
                continue;
            }
            let want = match (&mut remote, head.kind) {
                (_, b'X') => Want::Close,
                (None, b'S') => {
                    down.own(|own| own.extend_from_slice(&backend::ready_message(Status::Idle)));
                    self.client_rest = (head.len, Rest::Drop);
                    continue;
                }
                // Late data of a COPY that the server has ended, or a Flush of nothing.
                (None, b'H' | b'd' | b'c' | b'f') => {
                    self.client_rest = (head.len, Rest::Drop);
                    continue;
                }
                (None, b'C') if whole => {
                    if let Subject::Statement(name) = frontend::subject(message).map_err(Fault::Client)? {
                        self.forget(name);
                    }
                    down.own(|own| own.extend_from_slice(&backend::CLOSE_COMPLETE));
                    self.client_rest = (head.len, Rest::Drop);
                    continue;
                }
                (None, b'C') => Want::More,
                (None, b'Q') if self.deallocates_locally(message, whole, down) => {
                    self.client_rest = (head.len, Rest::Drop);
                    continue;
                }
                // A connection is not held for a message that has yet to arrive.
                (None, b'Q' | b'P' | b'D' | b'E') if !whole && head.len <= READ_MAX => Want::More,
                (None, b'B') if frontend::bind(message, whole).map_err(Fault::Client)?.is_none() => Want::More,
                (None, _) => Want::Link,
                // What asks for nothing, or ends what was, is not counted.
                (Some(_), kind)
                    if !self.paced
                        && self.ledger.is_idle()
                        && !matches!(kind, b'd' | b'c' | b'f' | b'H' | b'S' | b'C') =>
                {
                    Want::Pace
                }
                (Some(_), _) if up.len() > UP_MAX => Want::Again,
                (Some(_), b'Q' | b'F' | b'P' | b'B' | b'D' | b'C' | b'E') if self.wiping && !self.is_wiped() => {
                    if !std::mem::replace(&mut self.waits, true) {
                        up.own(|own| put(own, b'H', |_| {}));
                    }
                    Want::Hold
                }
                (Some(remote), _) => match self.request(head, message, remote, up, down)? {
                    Some(taken) => {
                        at += taken;
                        continue;
                    }
                    None if self.is_holding() => Want::Hold,
                    None => Want::More,
                },
            };
            return Ok(Step { consumed: at, want });
        }
    }

    /// Takes one message while linked; gives the bytes of it that are done with (what is left of it passes through
    /// `client_rest`), or `None` when more of it has to arrive first.
    pub(super) fn request(
        &mut self,
        head: Head,
        message: &[u8],
        remote: &mut Remote,
        up: &mut Out,
        down: &mut Out,
    ) -> Result<Option<usize>, Fault> {
        let whole = message.len() == head.len;
        if self.ledger.copies_in() && !matches!(head.kind, b'd' | b'c' | b'f' | b'H' | b'S') {
            return Err(Fault::Client(wire::Error {
                at: "COPY",
                what: "unexpected message type during COPY from stdin",
            }));
        }
        // The kinds of which names, text or all must be seen before anything is sent.
        let must_be_whole = match head.kind {
            b'Q' | b'P' => head.len <= READ_MAX,
            b'C' | b'D' | b'E' | b'H' | b'S' | b'c' | b'f' => true,
            _ => false,
        };
        if must_be_whole && !whole {
            return Ok(None);
        }
        let pass = |this: &mut Self| this.client_rest = (head.len, Rest::Forward);
        let fault = Fault::Client;
        match head.kind {
            b'Q' => self.query(head, message, remote, up, down).map_err(fault)?,
            b'P' => self.parse(head, message, remote, up, down).map_err(fault)?,
            b'B' => {
                let Some(bind) = frontend::bind(message, whole).map_err(fault)? else { return Ok(None) };
                let (portal, head_len) = (bind.portal, bind.head_len);
                if self.hold(bind.statement, remote, up) {
                    return Ok(None);
                }
                if let Some(over) = &self.over_storage
                    && !self.ledger.is_skipping()
                    && self.bound_scan(bind.statement).is_some_and(|scan| is_refused(scan, over))
                {
                    let text = storage_error(over);
                    self.inject(&text, How::Forward, remote, up);
                    self.client_rest = (head.len, Rest::Drop);
                    return Ok(Some(0));
                }
                if let Some(id) = self.changed
                    && !self.ledger.is_skipping()
                    && self.has_changed(bind.statement)
                {
                    // It is there under types that nobody was told: the next one who needs it asks again.
                    remote.prepared.remove(id.get());
                    self.close(id.get(), up);
                    self.inject(CHANGED_PLAN, How::Forward, remote, up);
                    self.client_rest = (head.len, Rest::Drop);
                    return Ok(Some(0));
                }
                let name = self.resolve(bind.statement, true, remote, up);
                self.push(Owed::Bind, How::Forward);
                match name {
                    None => pass(self),
                    Some(name) => {
                        up.own(|own| frontend::put_bind_head(own, portal, &name, head.len - head_len));
                        self.client_rest = (head.len - head_len, Rest::Forward);
                        return Ok(Some(head_len));
                    }
                }
            }
            b'D' => {
                let Subject::Statement(own) = frontend::subject(message).map_err(fault)? else {
                    self.push(Owed::Describe, How::Forward);
                    pass(self);
                    return Ok(Some(0));
                };
                let name = self.resolve(own, false, remote, up);
                if self.push(Owed::DescribeStatement, How::Forward) {
                    let mapped = name.as_ref().and_then(|_| self.mapped(own).cloned());
                    self.notes.push_back(Note::Describe(mapped));
                }
                match name {
                    None => pass(self),
                    Some(name) => {
                        up.own(|own| frontend::put_statement(own, b'D', &name));
                        return Ok(Some(head.len));
                    }
                }
            }
            b'E' => {
                self.executes += 1;
                self.push(Owed::Execute, How::Forward);
                self.wiping |= std::mem::take(&mut self.wipe_bound);
                pass(self);
            }
            b'C' => match frontend::subject(message).map_err(fault)? {
                Subject::Statement(name) => {
                    if !self.ledger.is_skipping() {
                        let was = self.forget(name);
                        self.push(Owed::Close, How::Invent);
                        self.notes.push_back(Note::Own { name: name.into(), was });
                        self.invent(down);
                    }
                    return Ok(Some(head.len));
                }
                Subject::Portal(_) => {
                    self.push(Owed::Close, How::Forward);
                    pass(self);
                }
            },
            b'S' => {
                if self.push(Owed::Sync, How::Forward) {
                    self.sent += 1;
                    self.executes = 0;
                }
                pass(self);
            }
            b'F' => {
                self.note(Shape::HIDDEN, remote);
                self.sent += u64::from(self.push(Owed::Call, How::Forward));
                pass(self);
            }
            b'd' | b'c' | b'f' => {
                // Late data of a COPY that the server has ended is dropped; early data is for the server to judge.
                let copies = !self.ledger.is_settled();
                if head.kind != b'd' {
                    self.ledger.end_copy();
                }
                self.client_rest = (head.len, if copies { Rest::Forward } else { Rest::Drop });
            }
            _ => pass(self),
        }
        Ok(Some(0))
    }

    pub(super) fn query(
        &mut self,
        head: Head,
        message: &[u8],
        remote: &mut Remote,
        up: &mut Out,
        down: &mut Out,
    ) -> Result<(), wire::Error> {
        self.client_rest = (head.len, Rest::Forward);
        if self.ledger.is_skipping() {
            return Ok(());
        }
        let whole = message.len() == head.len && head.len <= READ_MAX;
        let scan = if whole { scan::scan(frontend::query(message)?) } else { unread() };
        if let Some(name) = &scan.deallocates
            && self.ledger.status() != Status::Failed
            && self.names.remove(name).is_some()
        {
            self.push(Owed::Deallocate, How::Invent);
            self.client_rest.1 = Rest::Drop;
            self.invent(down);
            return Ok(());
        }
        if scan.shape.has(Shape::READS_SEQUENCE) && self.reads_foreign_sequence(remote) {
            up.own(|own| frontend::put_query(own, "DISCARD SEQUENCES"));
            self.sent += u64::from(self.push(Owed::Query, How::Swallow));
            remote.sequences = false;
        }
        self.note(scan.shape, remote);
        self.wiping |= scan.shape.has(Shape::WIPES);
        // A simple Query destroys the unnamed statement.
        self.names.unnamed = None;
        remote.unnamed = None;
        if let Some(over) = &self.over_storage
            && is_refused(&scan, over)
        {
            up.own(|own| frontend::put_query(own, &storage_error(over)));
            self.client_rest.1 = Rest::Drop;
        } else {
            self.staged.extend(scan.tracks.into_iter().map(|(by, track)| (self.sent, by, track)));
        }
        self.sent += u64::from(self.push(Owed::Query, How::Forward));
        Ok(())
    }

    pub(super) fn parse(
        &mut self,
        head: Head,
        message: &[u8],
        remote: &mut Remote,
        up: &mut Out,
        down: &mut Out,
    ) -> Result<(), wire::Error> {
        self.client_rest = (head.len, Rest::Forward);
        if self.ledger.is_skipping() {
            return Ok(());
        }
        if message.len() < head.len || head.len > READ_MAX {
            // Too large to be kept for another connection: it stays on this one, under the client's own name.
            self.note(Shape::UNREAD.and(Shape::LARGE), remote);
            // A named one stays for good; an unnamed one until it has been used.
            let unnamed = message.get(HEAD) == Some(&0);
            self.large_unnamed = (unnamed && (self.large_unnamed.is_some() || !self.large_named)).then_some(false);
            self.large_named |= !unnamed;
            self.names.unnamed = None;
            remote.unnamed = None;
            self.push(Owed::Parse, How::Forward);
            self.notes.push_back(Note::Parse { id: 0, own: None });
            return Ok(());
        }
        let parse = frontend::parse(message)?;
        let settings = Arc::clone(&self.settings);
        let path = settings.value("search_path");
        let failed = self.ledger.status() == Status::Failed;
        if parse.name.is_empty() {
            let (statement, recurring) = self.shared.recurring(parse.definition, parse.query, path);
            // A temporary table may stand before the one that the shared statement means.
            let recurring = recurring && !self.pins.has(Shape::TEMP);
            let shape = statement.scan.shape;
            if let Some(own) = statement.scan.deallocates.clone()
                && self.names.find(&own).is_some()
            {
                return self.deallocate(&own, remote, up);
            }
            let named = recurring
                && !failed
                && shape.has(Shape::PLAIN.and(Shape::TRANSACTION))
                && statement.scan.statements == 1;
            self.names.unnamed = Some(Unnamed { statement: Arc::clone(&statement), named });
            if !named {
                remote.unnamed = Some(statement.id);
                self.push(Owed::Parse, How::Forward);
                self.notes.push_back(Note::Parse { id: 0, own: Some(Box::default()) });
                return Ok(());
            }
            self.client_rest.1 = Rest::Drop;
            self.prepare_or_invent(&statement, None, remote, up, down);
            return Ok(());
        }
        if let Some(taken) = self.names.find(parse.name).cloned() {
            // The server itself says that the name is taken.
            self.prepare(&taken, How::Swallow, None, remote, up);
            up.own(|own| frontend::put_parse(own, &taken.name, parse.definition));
            self.push(Owed::Parse, How::Forward);
            self.notes.push_back(Note::Parse { id: 0, own: None });
            self.client_rest.1 = Rest::Drop;
            return Ok(());
        }
        if self.large_named || !self.names.has_room(parse.definition) {
            self.large_named = true;
            self.note(Shape::LARGE.and(scan::scan(parse.query).shape), remote);
            if parse.name.starts_with(PREFIX) {
                return Err(wire::Error { at: "Parse", what: "a statement name that is reserved" });
            }
            self.push(Owed::Parse, How::Forward);
            self.notes.push_back(Note::Parse { id: 0, own: None });
            return Ok(());
        }
        let statement = if self.pins.has(Shape::TEMP) {
            self.shared.private(parse.definition, parse.query, path)
        } else {
            self.shared.statement(parse.definition, parse.query, path)
        };
        self.names.insert(parse.name, Arc::clone(&statement));
        self.client_rest.1 = Rest::Drop;
        if failed {
            self.prepare(&statement, How::Forward, Some(parse.name), remote, up);
        } else {
            self.prepare_or_invent(&statement, Some(parse.name), remote, up, down);
        }
        Ok(())
    }

    /// `DEALLOCATE name` in the extended protocol. What the server gets to deallocate, if this is ever executed, is a
    /// statement made for it: the client's own is others' too.
    pub(super) fn deallocate(&mut self, own: &[u8], remote: &mut Remote, up: &mut Out) -> Result<(), wire::Error> {
        let doomed = self.shared.private(b"SELECT\0\0\0", b"SELECT", None);
        self.prepare(&doomed, How::Swallow, None, remote, up);
        let text = format!("DEALLOCATE \"{}\"", String::from_utf8_lossy(&doomed.name));
        let definition = [text.as_bytes(), &[0, 0, 0]].concat();
        up.own(|out| frontend::put_parse(out, b"", &definition));
        self.push(Owed::Parse, How::Forward);
        self.notes.push_back(Note::Parse { id: 0, own: None });
        let (statement, _) = self.shared.recurring(&definition, text.as_bytes(), None);
        remote.unnamed = Some(statement.id);
        self.names.unnamed = Some(Unnamed { statement, named: false });
        self.names.remove(own);
        self.client_rest.1 = Rest::Drop;
        Ok(())
    }

    /// `DEALLOCATE name` of one of the client's own, while not linked: answered here.
    pub(super) fn deallocates_locally(&mut self, message: &[u8], whole: bool, down: &mut Out) -> bool {
        let word = message.get(HEAD..HEAD + 2).unwrap_or_default();
        if !whole || !word.eq_ignore_ascii_case(b"de") {
            return false;
        }
        let Ok(text) = frontend::query(message) else { return false };
        match scan::scan(text).deallocates {
            Some(name) if self.names.remove(&name).is_some() => {
                self.push(Owed::Deallocate, How::Invent);
                self.names.unnamed = None;
                self.invent(down);
                true
            }
            _ => false,
        }
    }
}

/// Whether a statement is refused because the tenant is over its storage. A tenth over, what may grow without saying
/// so is refused too.
fn is_refused(scan: &Scan, over: &Over) -> bool {
    let far_over = over.in_use > over.max.saturating_add(over.max / 10);
    scan.shape.has(Shape::GROWS) || (far_over && (scan.shape.has(Shape::HIDDEN) || !scan.shape.has(Shape::FREES)))
}

fn unread() -> Scan {
    Scan { shape: Shape::UNREAD, statements: 1, ..Scan::default() }
}

/// A statement that fails with the storage refusal, so that the server's transaction fails as it would by itself.
fn storage_error(over: &Over) -> String {
    let (message, detail) = refuse::storage_text(over);
    format!(
        "DO $dynabase$BEGIN RAISE EXCEPTION USING ERRCODE='53100',MESSAGE='{message}',DETAIL='{detail}',HINT='{}';END$dynabase$",
        refuse::STORAGE_HINT
    )
}
