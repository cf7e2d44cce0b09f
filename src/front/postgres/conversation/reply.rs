//! What the server says: which of it the client gets to see, and in whose words.

use std::{
    num::NonZeroU64,
    sync::{Arc, atomic::Ordering},
};

use super::{Conversation, Fault, Heard, Note};
use crate::{
    front::postgres::{
        ledger::{Fate, How, Owed},
        out::Out,
        refuse,
        scan::{By, Shape, Track},
        statement::{PREFIX, Types},
    },
    upstream::postgres::connection::Remote,
    wire::postgres::{
        HEAD,
        backend::{self, Status},
        head, put, put_cstr,
    },
};

/// Longest message from a server that is looked into; longer ones are forwarded unread.
const LOOK_MAX: usize = 64 * 1024;

impl Conversation {
    /// Takes what a server says of a statement.
    pub(super) fn described(&mut self, message: &[u8]) {
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

    /// Answers what it is our turn to answer.
    pub(super) fn invent(&mut self, down: &mut Out) {
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

    pub(super) fn parameter(&mut self, message: &[u8], remote: &mut Remote) -> Result<Fate, Fault> {
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
    pub(super) fn error(
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
    pub(super) fn names_unknown(&self, text: &[u8]) -> bool {
        let Some(start) = memchr::memmem::find(text, PREFIX) else { return false };
        let digits = text[start + PREFIX.len()..].iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let name = &text[start..start + PREFIX.len() + digits];
        self.names.own_name(name).is_none()
    }

    /// The body of an error with the client's own statement names in place of ours.
    pub(super) fn rename(&self, message: &[u8]) -> Vec<u8> {
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
    pub(super) fn tag(&mut self, tag: &[u8], remote: &mut Remote) {
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
