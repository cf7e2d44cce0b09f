//! What becomes of replies: walked once, and each handed to whose it is as its [`How`] says.

use std::{
    io,
    sync::{Arc, Weak, atomic::Ordering},
};

use super::{KEPT_BYTES, Task};
use crate::{
    upstream::redis::{
        again::{self, Elsewhere},
        dial::DialError,
        link::{How, LOST, Pending, Role},
        message,
        outbox::Outbox,
        reply::{Shape, strip},
    },
    wire::resp::{self, put_error},
};

/// Bytes of scripts that a link can load elsewhere.
const LOADS_MAX_BYTES: usize = 4 << 20;

/// What a command gets that a server refused because it serves no more; it has not run.
const UNAVAILABLE: &[u8] = b"-ERR upstream unavailable\r\n";

impl Task<'_> {
    /// Walks replies; gives how many bytes are done with. The rest belongs to an unfinished reply.
    pub(super) fn walk(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fault = |fault: resp::Fault| io::Error::other(fault.0);
        let mut at = 0;
        loop {
            self.locals();
            if at >= bytes.len() || self.again.is_some() {
                return Ok(at);
            }
            let mid_reply = self.reply.is_begun() && self.scanned == 0;
            let subscriber = match (&*self.link.role.lock(), bytes[at]) {
                (Role::Subscriber(client), _) => Some((Arc::clone(client), true)),
                (Role::Dedicated(client), b'>') if !mid_reply => Some((Arc::clone(client), false)),
                (Role::Shared, b'>') if !mid_reply => {
                    return Err(io::Error::other("a push on a shared connection"));
                }
                _ => None,
            };
            if let Some((client, confirms)) = subscriber {
                let Some(frame) = self.frame(&bytes[at..]).map_err(fault)? else { return Ok(at) };
                let frame = &bytes[at..at + frame];
                at += frame.len();
                self.message(&client, confirms, frame);
                continue;
            }
            let Some(head) = self.queue.front_mut() else {
                return Err(io::Error::other("a reply that nobody asked for"));
            };
            if let How::Raw = head.how {
                // Spans of whole and partial replies go out in one piece, up to an error, whose text is looked at.
                let start = at;
                let mut answered = 0;
                let mut stuck = false;
                while answered < head.count && at < bytes.len() {
                    if !self.reply.is_begun() && matches!(bytes[at], b'-' | b'!' | b'>') {
                        break;
                    }
                    let (used, done) = self.reply.advance(&bytes[at..]).map_err(fault)?;
                    at += used;
                    if !done {
                        stuck = true;
                        break;
                    }
                    self.reply = resp::Reply::default();
                    answered += 1;
                }
                if at > start {
                    let span = &bytes[start..at];
                    head.to.deliver(answered, |out| out.extend_from_slice(span));
                }
                head.count -= answered;
                if head.count == 0 {
                    self.retire();
                    continue;
                }
                if stuck || at >= bytes.len() {
                    return Ok(at);
                }
                if bytes[at] == b'>' {
                    continue;
                }
                let Some(len) = self.frame(&bytes[at..]).map_err(fault)? else { return Ok(at) };
                let frame = &bytes[at..at + len];
                at += len;
                if self.may_move {
                    self.whole_moving(frame)?;
                    continue;
                }
                let Some(head) = self.queue.front_mut() else { return Ok(at) };
                head.to.deliver(1, |out| strip(Shape::Raw, frame, &self.link.prefix, out));
                if frame.starts_with(b"-NOSCRIPT") || frame.starts_with(b"-ERR Error compiling script") {
                    self.link.ledger.scripts_lost.fetch_add(1, Ordering::Relaxed);
                }
                head.count -= 1;
                if head.count == 0 {
                    self.retire();
                }
                continue;
            }
            let Some(len) = self.frame(&bytes[at..]).map_err(fault)? else { return Ok(at) };
            let frame = &bytes[at..at + len];
            at += len;
            if self.may_move {
                self.whole_moving(frame)?;
            } else {
                self.whole(frame);
            }
        }
    }

    /// The same as [`Self::whole`] where another server may have taken over: what this one refuses for that reason was
    /// not run, and is run there, or told to the client in words that mean nothing else.
    fn whole_moving(&mut self, frame: &[u8]) -> io::Result<()> {
        let shared = self.queue_is_shared();
        let mut frame = frame;
        if frame.starts_with(b"-READONLY") || frame.starts_with(b"-CLUSTERDOWN") || frame.starts_with(b"-MASTERDOWN") {
            if let Some(place) = self.home.place.upgrade() {
                place.failed(&self.home.address);
            }
            self.link.retire();
            if !shared {
                return Err(io::Error::other("the server serves no more"));
            }
            frame = UNAVAILABLE;
        } else if let Some(elsewhere) = Elsewhere::parse(frame, &self.home.address, self.home.slot) {
            // What a connection of one client holds can't be taken elsewhere: the client connects again.
            if !shared {
                if let (false, Some(place)) = (elsewhere.once, self.home.place.upgrade()) {
                    place.doubt(&self.home.address);
                }
                return Err(io::Error::other("the slot is elsewhere"));
            }
            self.elsewhere.get_or_insert(elsewhere);
        }
        self.whole(frame);
        Ok(())
    }

    /// Takes what came of a group that was run elsewhere, and goes on with what had come meanwhile.
    pub(super) fn resume(&mut self, result: Result<Vec<Vec<u8>>, DialError>) -> io::Result<()> {
        self.again = None;
        match result {
            Ok(answers) => {
                if let Some(head) = self.queue.front_mut() {
                    match &mut head.how {
                        How::Transaction(transaction) => {
                            transaction.acks = answers.len() - 1;
                            transaction.refused = None;
                        }
                        _ => head.count = answers.len(),
                    }
                }
                answers.iter().for_each(|answer| self.whole(answer));
            }
            Err(error) => {
                tracing::debug!(%error, "a command could not be run elsewhere");
                if let Some(head) = self.queue.front() {
                    match head.how {
                        How::Discard => head.to.deliver(head.count, |_| {}),
                        _ => head.to.deliver(head.count, |out| put_error(out, LOST)),
                    }
                }
                self.retire();
            }
        }
        let mut carry = std::mem::take(&mut self.carry);
        let used = self.walk(&carry)?;
        carry.drain(..used);
        self.carry = carry;
        Ok(())
    }

    /// After the last frame of the head: it is done, or runs elsewhere.
    fn finish(&mut self) {
        let group = self.queue.front_mut().and_then(|head| head.group.take());
        match (self.elsewhere.take(), group) {
            (Some(to), Some(group)) => {
                let (place, version) = (Weak::clone(&self.home.place), self.home.version);
                self.again = Some(again::run(place, version, to, self.loads.clone(), group));
            }
            (_, group) => {
                if let Some(group) = group
                    && group.bytes.starts_with(b"*3\r\n$6\r\nSCRIPT")
                    && self.loads.0.len() + group.bytes.len() <= LOADS_MAX_BYTES
                {
                    self.loads.0.extend_from_slice(&group.bytes);
                    self.loads.1 += 1;
                }
                self.retire();
            }
        }
    }

    /// The length of the whole reply at the start of `bytes`, or `None` until more came.
    fn frame(&mut self, bytes: &[u8]) -> Result<Option<usize>, resp::Fault> {
        let (used, done) = self.reply.advance(&bytes[self.scanned..])?;
        self.scanned += used;
        if !done {
            return Ok(None);
        }
        let len = self.scanned;
        self.scanned = 0;
        self.reply = resp::Reply::default();
        Ok(Some(len))
    }

    /// Passes on one whole reply that is not simply passed.
    fn whole(&mut self, frame: &[u8]) {
        let Some(head) = self.queue.front_mut() else { return };
        let prefix = &self.link.prefix;
        let silent = self.elsewhere.is_some() && head.group.is_some();
        if frame.starts_with(b"-NOSCRIPT") {
            self.link.ledger.scripts_lost.fetch_add(1, Ordering::Relaxed);
        }
        match &mut head.how {
            How::Transaction(transaction) => {
                self.scratch.clear();
                if !transaction.frame(frame, prefix, &mut self.scratch) {
                    return;
                }
                if !silent {
                    let scratch = &self.scratch;
                    head.to.deliver(head.count, |out| out.extend_from_slice(scratch));
                    head.count = 1;
                }
                if self.scratch.capacity() > KEPT_BYTES {
                    self.scratch = Vec::new();
                }
            }
            _ if silent => {}
            // Nothing is known to be answered before all of it is known to have been run.
            How::Discard if head.group.is_some() => {
                if head.count == 1 {
                    let frames = head.group.as_ref().map_or(1, |group| group.frames);
                    head.to.deliver(frames, |_| {});
                }
            }
            How::Raw => head.to.deliver(1, |out| strip(Shape::Raw, frame, prefix, out)),
            How::Learn(reserved) => {
                let (made, reply) = learned(frame);
                match made {
                    Some(made) => {
                        let reserved = i64::try_from(*reserved).unwrap_or(i64::MAX);
                        // Nobody gives keys back by creating fewer than none.
                        self.link.ledger.learned(reserved.saturating_sub(made.max(0)));
                    }
                    None => self.link.ledger.shrink(),
                }
                head.to.deliver(1, |out| strip(Shape::Raw, reply, prefix, out));
            }
            How::Strip(shape) => {
                let shape = *shape;
                head.to.deliver(1, |out| strip(shape, frame, prefix, out));
            }
            How::Instead(bytes) => head.to.deliver(1, |out| match frame.first() {
                Some(b'-') => strip(Shape::Raw, frame, prefix, out),
                _ => out.extend_from_slice(bytes),
            }),
            How::Count(done) => {
                let text = frame.strip_prefix(b":").and_then(|rest| rest.strip_suffix(b"\r\n"));
                if let Some(keys) = text.and_then(|t| std::str::from_utf8(t).ok()).and_then(|t| t.parse().ok()) {
                    self.link.ledger.counted(keys, *done);
                } else {
                    self.link.ledger.not_counted();
                }
            }
            // `Local` and `Confirm` never come here; a reply is swallowed rather than given to the wrong one.
            How::Discard | How::Local(_) | How::Confirm => head.to.deliver(1, |_| {}),
        }
        if silent && matches!(head.how, How::Transaction(_)) {
            return self.finish();
        }
        head.count -= 1;
        if head.count == 0 {
            // A group that runs elsewhere is as unanswered as before.
            if silent {
                head.count = head.group.as_ref().map_or(1, |group| group.frames);
            }
            self.finish();
        }
    }

    /// Passes on one frame of a subscriber's connection.
    fn message(&mut self, client: &Arc<Outbox>, confirms: bool, frame: &[u8]) {
        let mut cursor = resp::Cursor { rest: frame };
        let kind = match (cursor.item(), cursor.item()) {
            (Some(resp::Item::Many(..)), Some(resp::Item::Bulk(kind))) => kind,
            _ => &[],
        };
        let pushed = !confirms
            || matches!(kind, b"message" | b"pmessage" | b"smessage" | b"invalidate" | b"tracking-redir-broken");
        let prefix = &self.link.prefix;
        let listened = self.link.listened.lock().clone();
        if pushed {
            return client.deliver(0, |out| message::strip(frame, prefix, &listened, out));
        }
        let is_error = frame.first() == Some(&b'-');
        let mut answered = 1;
        if let Some(head) = self.queue.front_mut() {
            // One error stands for all confirmations of its command.
            answered = if is_error { head.count } else { 1 };
            head.count -= answered;
            if head.count == 0 {
                self.retire();
            }
        }
        client.deliver(answered, |out| message::strip(frame, prefix, &listened, out));
    }

    pub(super) fn retire(&mut self) {
        if let Some(done) = self.queue.pop_front()
            && done.creates > 0
        {
            self.link.ledger.done(done.creates);
        }
    }

    /// Tells everybody who waits that the connection is lost.
    pub(super) fn fail(&mut self) {
        let stalled = {
            let mut state = self.link.state.lock();
            state.closed = true;
            state.out = Vec::new();
            self.queue.extend(state.fresh.drain(..));
            std::mem::take(&mut state.stalled)
        };
        let shared = matches!(*self.link.role.lock(), Role::Shared);
        let mut torn = self.reply.is_begun();
        let mut creates = 0;
        for Pending { to, count, how, creates: created, group: _ } in self.queue.drain(..) {
            creates += created;
            match how {
                How::Local(bytes) => to.deliver(count, |out| out.extend_from_slice(&bytes)),
                How::Discard => to.deliver(count, |_| {}),
                How::Count(_) => self.link.ledger.not_counted(),
                // Half a reply has gone out: nothing that follows could be understood.
                How::Raw if torn => to.lose(),
                _ if !shared => to.lose(),
                How::Transaction(_) => to.deliver(count, |out| put_error(out, LOST)),
                _ => to.deliver(count, |out| (0..count).for_each(|_| put_error(out, LOST))),
            }
            torn = false;
        }
        if creates > 0 {
            self.link.ledger.done(creates);
        }
        match &*self.link.role.lock() {
            Role::Shared => {}
            Role::Dedicated(client) | Role::Subscriber(client) => client.lose(),
        }
        stalled.iter().for_each(|client| client.wake());
    }
}

/// Takes a pair of a number and a reply apart; anything else is a reply.
fn learned(frame: &[u8]) -> (Option<i64>, &[u8]) {
    let mut cursor = resp::Cursor { rest: frame };
    match (cursor.item(), cursor.item()) {
        (Some(resp::Item::Many(b'*', 2)), Some(resp::Item::Other(text))) => {
            let number = text.strip_prefix(b":").and_then(|n| std::str::from_utf8(n).ok()?.trim_end().parse().ok());
            (number, if number.is_some() { cursor.rest } else { frame })
        }
        _ => (None, frame),
    }
}
