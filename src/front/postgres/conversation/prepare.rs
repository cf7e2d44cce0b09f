//! Statements that follow their client: made sure to be on the server under a name of ours before they are used.

use std::sync::{Arc, atomic::Ordering};

use super::{Conversation, Note};
use crate::{
    front::postgres::{
        ledger::{How, Owed},
        out::Out,
        scan::{By, Scan, Shape, Track},
        statement::{self, PREFIX, Statement, Unnamed},
    },
    upstream::postgres::connection::Remote,
    wire::postgres::{frontend, put},
};

/// A statement's name upstream, borrowed from where it is: naming one must not cost an allocation.
pub(super) enum Upstream {
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

impl Conversation {
    pub(super) fn prepare_or_invent(
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
    pub(super) fn prepare(
        &mut self,
        statement: &Statement,
        how: How,
        own: Option<&[u8]>,
        remote: &mut Remote,
        up: &mut Out,
    ) {
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
    pub(super) fn close(&mut self, id: u64, up: &mut Out) {
        up.own(|out| frontend::put_statement(out, b'C', &statement::upstream_name(id)));
        self.push(Owed::Close, How::Swallow);
        self.notes.push_back(Note::Close { id });
    }

    /// The statement that goes by another name upstream.
    pub(super) fn mapped(&self, own: &[u8]) -> Option<&Arc<Statement>> {
        if own.is_empty() {
            self.names.unnamed.as_ref().filter(|unnamed| unnamed.named).map(|unnamed| &unnamed.statement)
        } else {
            self.names.find(own)
        }
    }

    /// Whether the client has to wait: its statement is from before a change of the schema, the server does not have
    /// it, and the client was told its types. They are asked for again first.
    pub(super) fn hold(&mut self, own: &[u8], remote: &mut Remote, up: &mut Out) -> bool {
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
    pub(super) fn is_wiped(&mut self) -> bool {
        let known = self.ledger.is_settled() || self.ledger.is_skipping();
        self.wiping &= !known;
        known
    }

    /// Whether the types of a statement were just found to differ from what the client was told.
    pub(super) fn has_changed(&self, own: &[u8]) -> bool {
        let Some(changed) = self.changed else { return false };
        self.mapped(own).is_some_and(|statement| statement.id == changed.get())
    }

    /// The name under which the server knows the client's statement, made sure to be there; `None` where the
    /// client's own words are right.
    pub(super) fn resolve(&mut self, own: &[u8], runs: bool, remote: &mut Remote, up: &mut Out) -> Option<Upstream> {
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
    pub(super) fn runs(&mut self, scan: &Scan, remote: &mut Remote, up: &mut Out) {
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
    pub(super) fn inject(&mut self, text: &str, how: How, remote: &mut Remote, up: &mut Out) {
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

    pub(super) fn reads_foreign_sequence(&self, remote: &Remote) -> bool {
        remote.sequences && !self.moved_sequence
    }

    /// What a statement that is bound may do.
    pub(super) fn bound_scan(&self, own: &[u8]) -> Option<&Scan> {
        if own.is_empty() {
            self.names.unnamed.as_ref().map(Unnamed::scan)
        } else {
            self.names.find(own).map(|statement| &statement.scan)
        }
    }

    /// Forgets a statement that the client closes. The server keeps it for others.
    pub(super) fn forget(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        if name.is_empty() {
            self.names.unnamed = None;
            None
        } else {
            self.names.remove(name)
        }
    }
}
