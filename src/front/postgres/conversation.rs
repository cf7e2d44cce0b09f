//! One client's conversation with whatever upstream connection it is linked to: a pure machine, bytes in, pieces to
//! write out. No socket, no clock.
//!
//! What it knows: which answers are owed ([`Ledger`]), the client's prepared statements and settings, what pins it
//! to its connection. What it decides: whether a message needs a connection, what is sent in its place, which of
//! the server's messages the client gets to see, and when the connection may serve somebody else.
//!
//! Invariants:
//! - While not linked, nothing of the client's is on any server: everything it relies on is here.
//! - A statement name reaches a server only as one of ours, or as the client's own while it is pinned.
//! - Every message is forwarded by its length; a body is read only where a name, a tag or a state hides in it.

#[cfg(any(test, fuzzing))]
pub mod script;

use std::{
    collections::VecDeque,
    num::NonZeroU64,
    sync::{Arc, atomic::Ordering},
};

use super::{
    ledger::{Fate, How, Ledger, Owed, Unasked},
    out::Out,
    refuse,
    scan::{self, By, Scan, Shape, Track},
    statement::{self, Names, PREFIX, Shared, Statement, Types, Unnamed},
};
use crate::{
    refusal::Over,
    tenant::Protocol,
    upstream::postgres::connection::{Parameters, Remote, Settings},
    usage,
    wire::{
        self,
        postgres::{
            HEAD, Head, backend,
            backend::{Report, Status},
            frontend::{self, Subject},
            head, put, put_cstr,
        },
    },
};

/// Longest Query or Parse that is read; longer ones are forwarded unread and their worst is assumed.
const READ_MAX: usize = 256 * 1024;

/// Most bytes of our own to a server in one go: a Bind of a few bytes may need a Parse of many before it.
const UP_MAX: usize = 256 * 1024;

/// Most settings of a client that follow it, and their bytes; beyond, it is held to its connection.
const SETTINGS_MAX: usize = 128;
const SETTINGS_MAX_BYTES: usize = 16 * 1024;

/// Longest message from a server that is looked into; longer ones are forwarded unread.
const LOOK_MAX: usize = 64 * 1024;

/// What undoes whatever a client may have left in a server session without our seeing it.
pub const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;\
    SELECT pg_catalog.pg_advisory_unlock_all();DISCARD TEMP;DISCARD SEQUENCES;\
    DO $$DECLARE it text;BEGIN FOR it IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql LOOP \
    EXECUTE pg_catalog.format('DEALLOCATE %I',it);END LOOP;END$$";

/// How far the client's bytes were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes that are done with; the rest is given again, with more behind it or after `want` is met.
    pub consumed: usize,
    /// What has to happen before the rest.
    pub want: Want,
}

/// What has to happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// More bytes.
    More,
    /// An upstream connection: [`Conversation::pace`], then link.
    Link,
    /// The tenant's rate has to be asked: [`Conversation::pace`].
    Pace,
    /// The server's answer: the rest goes on once [`Conversation::is_holding`] says no.
    Hold,
    /// What there is to write has to leave first: it is more than the client sent.
    Again,
    /// Nothing: the client has said goodbye.
    Close,
}

/// How much of a reply was taken, and what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Bytes that are done with.
    pub consumed: usize,
    /// The server said that it ends this session.
    pub fatal: bool,
}

/// Why a conversation can't go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The client does not follow the protocol.
    Client(wire::Error),
    /// The server does not follow the protocol.
    Server(wire::Error),
    /// The server answered what nobody asked.
    Unasked,
}

impl From<Unasked> for Fault {
    fn from(_: Unasked) -> Self {
        Fault::Unasked
    }
}

#[derive(Debug)]
enum Note {
    /// A Parse that was sent: its statement, and the client's name for it.
    Parse { id: u64, own: Option<Box<[u8]>> },
    /// A Close of ours that was sent.
    Close { id: u64 },
    /// A Describe of a statement that was sent, by the client.
    Describe(Option<Arc<Statement>>),
    /// A Describe of ours: what the client was told is compared with the answer.
    Compare,
    /// A Parse or Close that is answered here: the client's name, and what it stood for before.
    Own { name: Box<[u8]>, was: Option<Arc<Statement>> },
}

/// A statement's name upstream, borrowed from where it is: naming one must not cost an allocation.
enum Upstream {
    Ours(Arc<Statement>),
    Other(Box<[u8]>),
}

impl std::ops::Deref for Upstream {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Upstream::Ours(statement) => &statement.name,
            Upstream::Other(name) => name,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Forward,
    Drop,
}

/// What a client can't use while its session is refused something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusing {
    No,
    /// Everything up to the next Sync is dropped, as a server does after an error.
    UntilSync,
}

/// See the module's description.
#[derive(Debug)]
pub struct Conversation {
    id: u64,
    minor: u16,
    ledger: Ledger,
    shared: Arc<Shared>,
    names: Names,
    /// The settings of its startup packet, and those plus what it has SET since.
    base: Arc<Settings>,
    settings: Arc<Settings>,
    /// What the client was last told by ParameterStatus.
    reported: Arc<Parameters>,
    /// SET and RESET statements sent, by the number of their Query or Sync; and those that succeeded.
    staged: VecDeque<(u64, By, Track)>,
    done: Vec<Track>,
    sent: u64,
    answered: u64,
    pins: Shape,
    notes: VecDeque<Note>,
    /// The types that a server is just describing.
    types: Types,
    /// The statement whose types are being compared; and one of which they differ from what the client was told.
    holding: Option<Arc<Statement>>,
    changed: Option<NonZeroU64>,
    /// A portal was bound, then a statement sent, that may take all prepared statements away; and what the client
    /// sent behind it waits until it is known whether it did.
    wipe_bound: bool,
    wiping: bool,
    waits: bool,
    /// Bytes of a message that is passing, in each direction.
    client_rest: (usize, Rest),
    server_rest: (usize, Fate),
    paced: bool,
    refusing: Refusing,
    /// Executes sent since the last Sync.
    executes: u32,
    /// Pins that are undone once the transaction that undoes them is over.
    undoing: Shape,
    /// How the present transaction went: COMMITs, ROLLBACKs and errors seen.
    committed: bool,
    rolled_back: bool,
    failed: bool,
    /// An unnamed statement that is too large to follow the client is on the server; whether it was bound.
    large_unnamed: Option<bool>,
    large_named: bool,
    /// The connection must not serve anybody else.
    spoilt: bool,
    moved_sequence: bool,
    changed_schema: bool,
    /// Boxed, as few clients ever have them.
    over_storage: Option<Box<Over>>,
    timed_out: Option<Box<Over>>,
    errors: u64,
}

impl Conversation {
    /// A conversation of session `id` in minor protocol version `minor`, with the settings of its startup packet and
    /// what a server reports under them.
    pub fn new(id: u64, minor: u16, shared: Arc<Shared>, base: Arc<Settings>, reported: Arc<Parameters>) -> Self {
        Self {
            id,
            minor,
            ledger: Ledger::default(),
            shared,
            names: Names::default(),
            settings: Arc::clone(&base),
            base,
            reported,
            staged: VecDeque::new(),
            done: Vec::new(),
            sent: 0,
            answered: 0,
            pins: Shape::default(),
            notes: VecDeque::new(),
            types: Types::default(),
            holding: None,
            changed: None,
            wipe_bound: false,
            wiping: false,
            waits: false,
            client_rest: (0, Rest::Drop),
            server_rest: (0, Fate::Drop),
            paced: false,
            refusing: Refusing::No,
            executes: 0,
            undoing: Shape::default(),
            committed: false,
            rolled_back: false,
            failed: false,
            large_unnamed: None,
            large_named: false,
            spoilt: false,
            moved_sequence: false,
            changed_schema: false,
            over_storage: None,
            timed_out: None,
            errors: 0,
        }
    }

    /// The minor protocol version.
    pub fn minor(&self) -> u16 {
        self.minor
    }

    /// What the client was last told by ParameterStatus.
    pub fn reported(&self) -> &Parameters {
        &self.reported
    }

    /// Whether the client has been given whole messages only, so that one of ours can stand next.
    pub fn is_between_replies(&self) -> bool {
        self.server_rest.0 == 0 || self.server_rest.1 == Fate::Drop
    }

    /// Which answers are owed.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Errors that the server reported, ever.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// Whether the connection may serve somebody else.
    pub fn may_release(&self) -> bool {
        self.ledger.is_idle()
            && !self.paced
            && self.pins.is_empty()
            && self.client_rest.0 == 0
            && self.server_rest.0 == 0
    }

    /// Takes the news that the connection must not serve anybody else.
    pub fn take_spoilt(&mut self) -> bool {
        std::mem::take(&mut self.spoilt)
    }

    /// Whether the client's next message waits for the server's answer to a question of ours.
    pub fn is_holding(&self) -> bool {
        self.holding.is_some() || self.waits
    }

    /// Whether the session can end without cutting anything short.
    pub fn is_at_safe_point(&self) -> bool {
        self.ledger.is_idle() && self.client_rest.0 == 0
    }

    /// Notes that the tenant's rate has admitted the next transaction.
    pub fn pace(&mut self) {
        self.paced = true;
    }

    /// Sets whether growing statements are refused, and with which numbers.
    pub fn set_over_storage(&mut self, over: Option<Over>) {
        self.over_storage = over.map(Box::new);
    }

    /// Whether a statement that is being cancelled because it exceeded its time has not ended yet.
    pub fn is_timed_out(&self) -> bool {
        self.timed_out.is_some()
    }

    /// Notes that the running statement is being cancelled because it exceeded its time.
    pub fn set_timed_out(&mut self, over: Option<Over>) {
        self.timed_out = over.map(Box::new);
    }

    /// The queries that have to run on a server before it is this client's: what undoes another client's traces, and
    /// this client's settings. None in the usual case.
    pub fn preparation(&self, remote: &Remote) -> Vec<String> {
        let foreign = remote.soiled && remote.owner != self.id;
        if !foreign && Arc::ptr_eq(&remote.settings, &self.settings) {
            return Vec::new();
        }
        if foreign {
            let mut queries = Settings::default().script(&self.settings);
            match queries.first_mut() {
                Some(first) => {
                    first.insert(0, ';');
                    first.insert_str(0, RESET);
                }
                None => queries.push(RESET.into()),
            }
            queries
        } else {
            remote.settings.script(&self.settings)
        }
    }

    /// Takes a server that is prepared as [`Self::preparation`] says. Tells the client of parameters that differ
    /// from what it was told last.
    pub fn link(&mut self, remote: &mut Remote, down: &mut Out) {
        if remote.owner != self.id {
            // What was foreign and soiled has been reset, sequences included.
            remote.sequences &= !remote.soiled;
            remote.owner = self.id;
            remote.soiled = false;
            self.moved_sequence = false;
        }
        remote.settings = Arc::clone(&self.settings);
        if !Arc::ptr_eq(&remote.parameters, &self.reported) {
            if *remote.parameters != *self.reported {
                // Under equal settings this server reports something new, so new clients have to be told anew.
                self.shared.forget_profiles();
                for (name, value) in remote.parameters.iter() {
                    if self.reported.value(name) != Some(value) {
                        down.own(|own| backend::put_parameter(own, name, value));
                    }
                }
                self.reported = Arc::clone(&remote.parameters);
            } else {
                // From now on one comparison of pointers tells.
                remote.parameters = Arc::clone(&self.reported);
            }
        }
        self.ledger.shrink();
    }

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
    fn request(
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

    fn query(
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

    fn parse(
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
    fn deallocate(&mut self, own: &[u8], remote: &mut Remote, up: &mut Out) -> Result<(), wire::Error> {
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

    fn prepare_or_invent(
        &mut self,
        statement: &Arc<Statement>,
        own: Option<&[u8]>,
        remote: &mut Remote,
        up: &mut Out,
        down: &mut Out,
    ) {
        if remote.prepared.has(statement.id) {
            self.push(Owed::Parse, How::Invent);
            self.notes.push_back(Note::Own { name: own.unwrap_or_default().into(), was: None });
            self.invent(down);
        } else {
            self.prepare(statement, How::Forward, own, remote, up);
        }
    }

    /// Sends our Parse for a statement that the server does not have.
    fn prepare(&mut self, statement: &Statement, how: How, own: Option<&[u8]>, remote: &mut Remote, up: &mut Out) {
        if self.ledger.is_skipping() || (remote.prepared.has(statement.id) && how == How::Swallow) {
            return;
        }
        if remote.prepared.has(statement.id) {
            // In a failed transaction the server itself has to say whether it takes the statement.
            self.close(statement.id, up);
        }
        if let Some(evicted) = remote.prepared.insert(statement.id) {
            self.close(evicted, up);
        }
        up.own(|out| frontend::put_parse(out, &statement.name, &statement.definition));
        self.push(Owed::Parse, how);
        self.notes.push_back(Note::Parse { id: statement.id, own: own.map(Into::into) });
    }

    /// Sends our Close.
    fn close(&mut self, id: u64, up: &mut Out) {
        up.own(|out| frontend::put_statement(out, b'C', &statement::upstream_name(id)));
        self.push(Owed::Close, How::Swallow);
        self.notes.push_back(Note::Close { id });
    }

    /// The statement that goes by another name upstream.
    fn mapped(&self, own: &[u8]) -> Option<&Arc<Statement>> {
        if own.is_empty() {
            self.names.unnamed.as_ref().filter(|unnamed| unnamed.named).map(|unnamed| &unnamed.statement)
        } else {
            self.names.find(own)
        }
    }

    /// Whether the client has to wait: its statement is from before a change of the schema, the server does not have
    /// it, and the client was told its types. They are asked for again first.
    fn hold(&mut self, own: &[u8], remote: &mut Remote, up: &mut Out) -> bool {
        if self.ledger.is_skipping() {
            return false;
        }
        let Some(statement) = self.mapped(own).cloned() else { return false };
        let told = statement.described.load(Ordering::Relaxed) != 0;
        if !told || statement.epoch == self.shared.epoch() || remote.prepared.has(statement.id) || self.has_changed(own)
        {
            return false;
        }
        self.prepare(&statement, How::Swallow, None, remote, up);
        up.own(|out| {
            frontend::put_statement(out, b'D', &statement.name);
            put(out, b'H', |_| {});
        });
        self.push(Owed::DescribeStatement, How::Swallow);
        self.notes.push_back(Note::Compare);
        self.holding = Some(statement);
        true
    }

    /// Whether it is known what became of the prepared statements.
    fn is_wiped(&mut self) -> bool {
        let known = self.ledger.is_settled() || self.ledger.is_skipping();
        self.wiping &= !known;
        known
    }

    /// Whether the types of a statement were just found to differ from what the client was told.
    fn has_changed(&self, own: &[u8]) -> bool {
        let Some(changed) = self.changed else { return false };
        self.mapped(own).is_some_and(|statement| statement.id == changed.get())
    }

    /// Takes what a server says of a statement.
    fn described(&mut self, message: &[u8]) {
        self.types.add(message);
        if message[0] == b't' {
            return;
        }
        let types = std::mem::take(&mut self.types).finish();
        match self.notes.pop_front() {
            Some(Note::Describe(Some(statement))) => {
                // The first answer is what clients that share the statement were told.
                let _ = statement.described.compare_exchange(0, types, Ordering::Relaxed, Ordering::Relaxed);
            }
            Some(Note::Compare) => {
                let held = self.holding.take();
                let differs = held.filter(|it| it.described.load(Ordering::Relaxed) != types);
                self.changed = differs.and_then(|it| NonZeroU64::new(it.id));
            }
            _ => {}
        }
    }

    /// The name under which the server knows the client's statement, made sure to be there; `None` where the
    /// client's own words are right.
    fn resolve(&mut self, own: &[u8], runs: bool, remote: &mut Remote, up: &mut Out) -> Option<Upstream> {
        if self.ledger.is_skipping() {
            return None;
        }
        let statement = if own.is_empty() {
            match self.names.unnamed.clone() {
                Some(Unnamed { statement, named: true }) => statement,
                Some(Unnamed { statement, named: false }) => {
                    if remote.unnamed != Some(statement.id) {
                        up.own(|out| frontend::put_parse(out, b"", &statement.definition));
                        self.push(Owed::Parse, How::Swallow);
                        self.notes.push_back(Note::Parse { id: 0, own: None });
                        remote.unnamed = Some(statement.id);
                    }
                    if runs {
                        self.runs(&statement.scan, remote, up);
                    }
                    return None;
                }
                None if self.large_unnamed.is_some() => {
                    self.large_unnamed = self.large_unnamed.map(|bound| bound || runs);
                    return None;
                }
                None => {
                    // Another client's unnamed statement may be there; the error must come all the same.
                    if remote.unnamed.take().is_some() {
                        up.own(|out| frontend::put_statement(out, b'C', b""));
                        self.push(Owed::Close, How::Swallow);
                        self.notes.push_back(Note::Close { id: 0 });
                    }
                    return None;
                }
            }
        } else {
            match self.names.find(own) {
                Some(statement) => Arc::clone(statement),
                // Nobody's statement of ours can be named by a client.
                None if own.starts_with(PREFIX) => return Some(Upstream::Other([b"?", own].concat().into())),
                None => return None,
            }
        };
        self.prepare(&statement, How::Swallow, None, remote, up);
        if runs {
            self.runs(&statement.scan, remote, up);
        }
        Some(Upstream::Ours(statement))
    }

    /// Notes what a bound statement may do.
    fn runs(&mut self, scan: &Scan, remote: &mut Remote, up: &mut Out) {
        if scan.shape.has(Shape::READS_SEQUENCE) && self.reads_foreign_sequence(remote) {
            self.inject("DISCARD SEQUENCES", How::Swallow, remote, up);
            remote.sequences = false;
        }
        self.note(scan.shape, remote);
        self.wipe_bound |= scan.shape.has(Shape::WIPES);
        for (by, track) in &scan.tracks {
            // Which of several answers belongs to it could not be told: a SELECT's tag says no more.
            let alone = !self.staged.iter().any(|(segment, ..)| *segment == self.sent);
            let told = *by == By::Set || self.executes == 0;
            let track = if alone && told { track.clone() } else { Track::Unknown };
            if track == Track::Unknown {
                self.set_pins(self.pins.and(Shape::SETS));
                remote.soiled = true;
            }
            self.staged.push_back((self.sent, *by, track));
        }
    }

    /// Sends a statement of ours in the extended protocol; only its execution is answered to the client, if at all.
    fn inject(&mut self, text: &str, how: How, remote: &mut Remote, up: &mut Out) {
        up.own(|out| {
            frontend::put_parse(out, b"", &[text.as_bytes(), &[0, 0, 0]].concat());
            frontend::put_bind_head(out, b"", b"", 6);
            out.extend_from_slice(&[0; 6]);
            put(out, b'E', |out| out.extend_from_slice(&[0; 5]));
        });
        remote.unnamed = None;
        self.push(Owed::Parse, How::Swallow);
        self.notes.push_back(Note::Parse { id: 0, own: None });
        self.push(Owed::Bind, How::Swallow);
        self.push(Owed::Execute, how);
    }

    fn push(&mut self, owed: Owed, how: How) -> bool {
        self.ledger.push(owed, how)
    }

    fn reads_foreign_sequence(&self, remote: &Remote) -> bool {
        remote.sequences && !self.moved_sequence
    }

    /// What a statement that is bound may do.
    fn bound_scan(&self, own: &[u8]) -> Option<&Scan> {
        if own.is_empty() {
            self.names.unnamed.as_ref().map(Unnamed::scan)
        } else {
            self.names.find(own).map(|statement| &statement.scan)
        }
    }

    fn note(&mut self, shape: Shape, remote: &mut Remote) {
        if shape.is_empty() || shape == Shape::PLAIN {
            return;
        }
        let pins = self.pins.and(shape.only(Shape::PINS.and(Shape::LARGE)));
        for (undoes, pin) in [
            (Shape::UNLOCKS_ALL, Shape::ADVISORY),
            (Shape::CLOSES_ALL, Shape::HOLD),
            (Shape::UNLISTENS_ALL, Shape::LISTENS),
        ] {
            if shape.has(undoes) && !shape.has(pin) {
                self.undoing = self.undoing.and(pin);
            } else if shape.has(pin) {
                self.undoing = self.undoing.without(pin);
            }
        }
        self.set_pins(pins);
        remote.soiled |= shape.has(Shape::HIDDEN) || !pins.is_empty();
        if shape.has(Shape::MOVES_SEQUENCE) {
            remote.sequences = true;
            self.moved_sequence = true;
        }
    }

    fn set_pins(&mut self, pins: Shape) {
        if pins == self.pins {
            return;
        }
        for label in pins.without(self.pins).pin_labels() {
            usage::event::pinned(Protocol::Postgres, label);
        }
        self.pins = pins;
    }

    /// Forgets a statement that the client closes. The server keeps it for others.
    fn forget(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        if name.is_empty() {
            self.names.unnamed = None;
            None
        } else {
            self.names.remove(name)
        }
    }

    /// `DEALLOCATE name` of one of the client's own, while not linked: answered here.
    fn deallocates_locally(&mut self, message: &[u8], whole: bool, down: &mut Out) -> bool {
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

    /// Answers what it is our turn to answer.
    fn invent(&mut self, down: &mut Out) {
        while let Some(owed) = self.ledger.take_invented() {
            if owed != Owed::Deallocate {
                self.notes.pop_front();
            }
            let status = self.ledger.status();
            down.own(|own| match owed {
                Owed::Parse => own.extend_from_slice(&backend::PARSE_COMPLETE),
                Owed::Deallocate => {
                    put(own, b'C', |own| put_cstr(own, b"DEALLOCATE"));
                    own.extend_from_slice(&backend::ready_message(status));
                }
                _ => own.extend_from_slice(&backend::CLOSE_COMPLETE),
            });
        }
    }

    /// Takes the server's bytes.
    ///
    /// # Errors
    /// [`Fault::Server`], [`Fault::Unasked`]: the connection is of no use any more.
    pub fn hear_server(&mut self, input: &[u8], remote: &mut Remote, down: &mut Out) -> Result<Heard, Fault> {
        let mut at = 0;
        let mut fatal = false;
        loop {
            if self.server_rest.0 > 0 {
                let n = self.server_rest.0.min(input.len() - at);
                if self.server_rest.1 == Fate::Forward {
                    down.input(at..at + n);
                }
                self.server_rest.0 -= n;
                at += n;
            }
            let rest = &input[at..];
            let Some(head) = head(rest).map_err(Fault::Server)? else { break };
            let looks = head.len <= LOOK_MAX
                && match head.kind {
                    b'Z' | b'C' | b'S' | b'E' | b'1' | b'3' => true,
                    b't' | b'T' | b'n' => self.ledger.describes_statement(),
                    _ => false,
                };
            if looks && rest.len() < head.len {
                break;
            }
            let message = &rest[..head.len.min(rest.len())];
            let fate = match head.kind {
                b'Z' => {
                    let status = backend::ready(message).map_err(Fault::Server)?;
                    self.ready(status, remote)?
                }
                b'S' if looks => self.parameter(message, remote)?,
                b'E' => {
                    fatal |= matches!(backend::field(message, b'V'), Some(b"FATAL" | b"PANIC"));
                    match self.error(message, looks, remote, down)? {
                        Some(fate) => fate,
                        None => {
                            at += head.len;
                            self.invent(down);
                            continue;
                        }
                    }
                }
                kind => {
                    if matches!(kind, b't' | b'T' | b'n') && self.ledger.describes_statement() {
                        // One too long to look at tells nothing, and is not compared.
                        self.described(if looks { message } else { &message[..HEAD] });
                    }
                    let mut unanswered = 0;
                    let fate = self.ledger.answer(kind, |_, _| unanswered += 1)?;
                    self.answered += unanswered;
                    match kind {
                        b'C' if looks && fate == Fate::Forward => {
                            self.tag(backend::tag(message).map_err(Fault::Server)?, remote)
                        }
                        // Its books were kept when it was sent; now they are final. A Close of the client's has none.
                        b'1' => drop(self.notes.pop_front()),
                        b'3' if fate == Fate::Drop => drop(self.notes.pop_front()),
                        _ => {}
                    }
                    fate
                }
            };
            if matches!(head.kind, b'D' | b'd') && fate == Fate::Forward {
                // Rows come in runs, and nothing but their length matters: the end of the run is looked for first.
                let run = run_of(head.kind, rest);
                down.input(at..at + run);
                at += run;
                if run > 0 {
                    continue;
                }
            }
            self.server_rest = (head.len, fate);
            let n = head.len.min(rest.len());
            if fate == Fate::Forward {
                down.input(at..at + n);
            }
            self.server_rest.0 -= n;
            at += n;
            self.invent(down);
        }
        self.waits = self.waits && !self.is_wiped();
        Ok(Heard { consumed: at, fatal })
    }

    fn ready(&mut self, status: Status, remote: &mut Remote) -> Result<Fate, Fault> {
        let fate = self.ledger.ready(status)?;
        self.answered += 1;
        while let Some((segment, ..)) = self.staged.front()
            && *segment < self.answered
        {
            // It may have run without a tag that says so: an Execute with a row limit ends before.
            if let Some((_, _, track)) = self.staged.pop_front()
                && track != Track::Nothing
            {
                self.done.push(Track::Unknown);
            }
        }
        self.changed = None;
        self.timed_out = None;
        if status != Status::Idle {
            // What was set inside a transaction may yet be rolled back: it is settled at its end.
            return Ok(fate);
        }
        self.paced = false;
        if std::mem::take(&mut self.changed_schema) {
            self.shared.raise_epoch();
        }
        if self.large_unnamed == Some(true) {
            self.large_unnamed = None;
            self.set_pins(self.pins.without(Shape::LARGE));
        }
        let explicit = self.committed || self.rolled_back;
        let undoing = std::mem::take(&mut self.undoing);
        if !self.failed && !self.rolled_back {
            self.set_pins(self.pins.without(undoing));
        }
        if explicit && (self.failed || self.rolled_back) {
            // All of it is undone, unless a part was kept by a savepoint or a COMMIT: then nobody knows which.
            if self.committed && self.done.iter().any(|track| *track != Track::Nothing) {
                self.done = vec![Track::Unknown];
            } else {
                self.done.clear();
            }
        }
        self.settle(remote);
        (self.committed, self.rolled_back, self.failed) = (false, false, false);
        Ok(fate)
    }

    /// Takes over what the client has SET, now that its transaction is over. The server has it already.
    fn settle(&mut self, remote: &mut Remote) {
        for track in std::mem::take(&mut self.done) {
            let (wanted, applied) = match track {
                Track::Nothing => continue,
                Track::Unknown => {
                    self.set_pins(self.pins.and(Shape::SETS));
                    remote.soiled = true;
                    continue;
                }
                Track::Set(name, value)
                    if self.settings.len() >= SETTINGS_MAX
                        || self.settings.bytes() + name.len() + value.len() > SETTINGS_MAX_BYTES =>
                {
                    self.set_pins(self.pins.and(Shape::SETS));
                    remote.soiled = true;
                    continue;
                }
                Track::Set(name, value) => {
                    (self.settings.with(&name, value.clone()), remote.settings.with(&name, value))
                }
                Track::Reset(name) => {
                    let applied = remote.settings.without(&name);
                    let wanted = self.settings.without(&name);
                    // RESET goes back to the server's default; the client's startup packet said otherwise.
                    let wanted = match self.base.value(&name) {
                        Some(base) => wanted.with(&name, base.clone()),
                        None => wanted,
                    };
                    (wanted, applied)
                }
                Track::ResetAll => {
                    self.set_pins(self.pins.without(Shape::SETS));
                    (Settings::clone(&self.base), Settings::default())
                }
            };
            self.settings = self.shared.intern(wanted);
            remote.settings = if applied == *self.settings { Arc::clone(&self.settings) } else { Arc::new(applied) };
        }
    }

    fn parameter(&mut self, message: &[u8], remote: &mut Remote) -> Result<Fate, Fault> {
        let (name, value) = backend::parameter(message).map_err(Fault::Server)?;
        let known = self.reported.value(&String::from_utf8_lossy(name)).map(str::as_bytes);
        let news = known != Some(value);
        if Arc::make_mut(&mut remote.parameters).set(name, value) || news {
            if news {
                Arc::make_mut(&mut self.reported).set(name, value);
            }
            if *self.reported == *remote.parameters {
                self.reported = Arc::clone(&remote.parameters);
            }
        }
        Ok(if news { Fate::Forward } else { Fate::Drop })
    }

    /// Takes an ErrorResponse; `None` where something else was said in its place.
    fn error(
        &mut self,
        message: &[u8],
        looks: bool,
        remote: &mut Remote,
        down: &mut Out,
    ) -> Result<Option<Fate>, Fault> {
        let mut unanswered = 0;
        self.holding = None;
        self.types = Types::default();
        let (notes, names) = (&mut self.notes, &mut self.names);
        let mut undone = Vec::new();
        let fate = self.ledger.answer(b'E', |owed, how| {
            unanswered += u64::from(matches!(owed, Owed::Query | Owed::Call));
            let noted = match owed {
                Owed::Parse => true,
                Owed::Close => how != How::Forward,
                Owed::DescribeStatement => true,
                _ => false,
            };
            if !noted {
                return;
            }
            match notes.pop_front() {
                Some(Note::Parse { id, own }) => {
                    remote.prepared.remove(id);
                    match own {
                        Some(own) if own.is_empty() => {
                            names.unnamed = None;
                            remote.unnamed = None;
                        }
                        Some(own) => undone.push((own, None)),
                        None => {}
                    }
                }
                Some(Note::Own { name, was }) => undone.push((name, was)),
                // It was skipped: the server still has it.
                Some(Note::Close { id }) if id != 0 => remote.prepared.restore(id),
                Some(Note::Close { .. } | Note::Describe(_) | Note::Compare) | None => {}
            }
        })?;
        // Last first: of several messages that name one statement the first knows what it was.
        for (name, was) in undone.into_iter().rev().filter(|(name, _)| !name.is_empty()) {
            self.names.remove(&name);
            if let Some(was) = was {
                self.names.insert(&name, was);
            }
        }
        self.answered += unanswered;
        self.errors += 1;
        self.failed = true;
        if self.ledger.status() == Status::Idle && !self.committed {
            // An implicit transaction is undone as a whole.
            self.done.clear();
        } else if self.done.iter().any(|track| *track != Track::Nothing) {
            remote.soiled = true;
        }
        let answered = self.answered;
        self.staged.retain(|(segment, ..)| *segment > answered);
        if !looks || fate == Fate::Drop {
            return Ok(Some(fate));
        }
        let code = backend::field(message, b'C').unwrap_or_default();
        if code == b"57014"
            && let Some(over) = self.timed_out.take()
        {
            down.own(|own| refuse::error(&crate::refusal::Refusal::OverLimit(*over)).put(own));
            return Ok(None);
        }
        let text = backend::field(message, b'M').unwrap_or_default();
        let stale = [&b"cached plan must not change"[..], b"cache lookup failed"];
        if matches!(code, b"0A000" | b"XX000") && stale.iter().any(|stale| text.starts_with(stale)) {
            self.shared.raise_epoch();
        }
        if memchr::memmem::find(message, PREFIX).is_some() {
            // The server has other statements under our names than we think: nobody else shall meet that.
            self.spoilt |= matches!(code, b"26000" | b"42P05") && self.names_unknown(text);
            let renamed = self.rename(message);
            down.own(|own| put(own, b'E', |own| own.extend_from_slice(&renamed)));
            return Ok(None);
        }
        Ok(Some(fate))
    }

    /// Whether the statement of ours in an error's text is none of the client's own: then the error is not its doing.
    fn names_unknown(&self, text: &[u8]) -> bool {
        let Some(start) = memchr::memmem::find(text, PREFIX) else { return false };
        let digits = text[start + PREFIX.len()..].iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let name = &text[start..start + PREFIX.len() + digits];
        self.names.own_name(name).is_none()
    }

    /// The body of an error with the client's own statement names in place of ours.
    fn rename(&self, message: &[u8]) -> Vec<u8> {
        let mut rest = &message[HEAD..];
        let mut body = Vec::with_capacity(rest.len());
        while let Some(start) = memchr::memmem::find(rest, PREFIX) {
            let digits = rest[start + PREFIX.len()..].iter().take_while(|b| b.is_ascii_hexdigit()).count();
            let end = start + PREFIX.len() + digits;
            body.extend_from_slice(&rest[..start]);
            body.extend_from_slice(self.names.own_name(&rest[start..end]).unwrap_or_default());
            rest = &rest[end..];
        }
        body.extend_from_slice(rest);
        body
    }

    /// Reads a command's tag for what it did to the session.
    fn tag(&mut self, tag: &[u8], remote: &mut Remote) {
        // The tags of everyday statements first: SELECT, INSERT, UPDATE, DELETE, BEGIN, COMMIT.
        match tag.first_chunk::<3>() {
            Some(b"SEL") => {
                if self.staged.front().is_some_and(|(at, by, _)| *by == By::Select && *at == self.answered) {
                    self.done.extend(self.staged.pop_front().map(|(_, _, track)| track));
                }
                return;
            }
            Some(b"INS" | b"UPD" | b"DEL" | b"BEG" | b"FET") => return,
            Some(_) => {}
            None => return,
        }
        match tag {
            b"SET" | b"RESET" => {
                let staged = self.staged.front().is_some_and(|(at, by, _)| *by == By::Set && *at == self.answered);
                let track = if staged { self.staged.pop_front().map(|(_, _, track)| track) } else { None };
                self.done.push(track.unwrap_or(Track::Unknown));
            }
            b"COMMIT" => self.committed = true,
            b"ROLLBACK" => self.rolled_back = true,
            b"LISTEN" => {
                remote.soiled = true;
                self.set_pins(self.pins.and(Shape::LISTENS));
            }
            b"PREPARE" => {
                remote.soiled = true;
                self.set_pins(self.pins.and(Shape::PREPARES));
            }
            b"DEALLOCATE ALL" => {
                self.names.clear();
                remote.prepared.clear();
                self.set_pins(self.pins.without(Shape::PREPARES));
            }
            b"DISCARD ALL" => {
                self.names.clear();
                remote.prepared.clear();
                self.set_pins(self.pins.only(Shape::LOAD));
                self.done.push(Track::ResetAll);
                remote.soiled = false;
                remote.sequences = false;
            }
            b"DISCARD TEMP" => self.set_pins(self.pins.without(Shape::TEMP)),
            b"DISCARD SEQUENCES" => {
                remote.sequences = false;
                self.set_pins(self.pins.without(Shape::READS_SEQUENCE));
            }
            // A temporary table is nobody else's.
            b"CREATE TABLE" | b"DROP TABLE" if self.pins.has(Shape::TEMP) => {}
            _ => {
                let leads = [&b"CREATE "[..], b"ALTER ", b"DROP ", b"DO", b"CALL", b"IMPORT "];
                if leads.iter().any(|lead| tag.starts_with(lead)) {
                    self.changed_schema = true;
                    self.shared.raise_epoch();
                }
            }
        }
    }
}

/// Bytes of the whole messages of one kind that stand at the head of `bytes`.
fn run_of(kind: u8, bytes: &[u8]) -> usize {
    let mut end = 0;
    while let Some(&[found, a, b, c, d]) = bytes.get(end..).and_then(|rest| rest.first_chunk::<HEAD>()) {
        let next = end + 1 + u32::from_be_bytes([a, b, c, d]) as usize;
        if found != kind || next > bytes.len() || next < end + HEAD {
            break;
        }
        end = next;
    }
    end
}

/// Fails as PostgreSQL does when a statement's types have changed since it was prepared.
const CHANGED_PLAN: &str = "DO $dynabase$BEGIN RAISE EXCEPTION USING ERRCODE='0A000',\
    MESSAGE='cached plan must not change result type';END$dynabase$";

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
