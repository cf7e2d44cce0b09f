//! One burst of a client's commands on its way to the server: checked against the table and the tier, its names put
//! inside the tenant's prefix, straight into the connection's output.
//!
//! Here it is decided what becomes of a command; `limits` keeps the tier's, `transaction` queues and sends transactions,
//! `call` sends scripts and functions.

mod call;
mod limits;
mod transaction;

use std::sync::{Arc, atomic::Ordering};

use arc_swap::Guard;
use parking_lot::MutexGuard;

pub(super) use limits::{Care, GUARDED_ARGS_MAX};

use super::{
    client::{Client, Held, Queue, Replies, Step, TRANSACTION_MAX_BYTES},
    commands::{self, Policy, Row},
    emulate, keys, refuse,
    rewrite::{header_len, put_rewritten},
};
use crate::{
    quota,
    refusal::{Limit, Over, Refusal},
    tenant::OverRate,
    upstream::redis::{
        Version,
        link::{How, Link, State},
        reply::Shape,
    },
    wire::resp::{Arg, Fault, put_array, put_bulk, put_bulk_joined, put_error},
};

/// Commands of one burst after which the client's turn ends.
const BURST_MAX: usize = 1024;

/// Bytes of `WATCH` commands between two transactions: the server keeps every name.
const WATCHED_MAX_BYTES: usize = 1 << 20;

/// See the module.
pub struct Burst<'a> {
    pub client: &'a mut Client,
    link: Option<&'a Arc<Link>>,
    pub(super) state: Option<MutexGuard<'a, State>>,
    policy: Option<Guard<Arc<quota::Policy>>>,
    outstanding: bool,
    pub(super) sent: usize,
    pub(super) commands: u64,
    refused: u64,
    elsewhere: Option<u64>,
}

impl<'a> Burst<'a> {
    /// Begins a burst on `link`, which stays locked until [`Self::end`].
    pub fn new(client: &'a mut Client, link: Option<&'a Arc<Link>>) -> Self {
        let state = link.and_then(|link| link.lock());
        let outstanding = client.outbox.lock().unanswered > 0;
        let policy = client.tenancy.as_ref().map(|tenancy| tenancy.session.slot().policy());
        Self { client, link, state, policy, outstanding, sent: 0, commands: 0, refused: 0, elsewhere: None }
    }

    /// Ends it: counts, unlocks, wakes.
    pub fn end(mut self) {
        if self.sent > 0 {
            self.client.outbox.lock().unanswered += self.sent;
        }
        let woken = self.sent > 0;
        drop(self.state.take());
        if let (true, Some(link)) = (woken, self.link) {
            link.wake();
        }
        self.client.down = None;
        self.client.measured = false;
        self.client.counted = false;
        if let Some(policy) = &self.policy {
            self.client.measure_soon(policy.limits.redis.memory);
        }
        if let Some(tenancy) = &self.client.tenancy {
            let meter = tenancy.session.meter();
            if self.commands > 0 {
                meter.requests.fetch_add(self.commands, Ordering::Relaxed);
            }
            if self.refused > 0 {
                meter.refused.fetch_add(self.refused, Ordering::Relaxed);
            }
        }
    }

    /// Answers what can't be followed any more.
    pub fn fault(&mut self, fault: Fault) {
        self.error(&format!("ERR Protocol error: {}", fault.0));
    }

    /// Whether the unfinished command can't fit the tenant's memory: answered, and the connection ends.
    pub fn too_large(&mut self) -> bool {
        let Some(policy) = &self.policy else { return false };
        let max = policy.limits.redis.memory;
        if self.client.request.wanted() as u64 <= max.saturating_add(64 << 10) {
            return false;
        }
        let tier = policy.tenant.tier;
        let in_use = self.client.request.wanted() as u64;
        let over = Over { limit: Limit::Memory, tier, max, in_use, retry_after: None };
        let (text, _) = refuse::render(&Refusal::OverLimit(over));
        self.error(&text);
        true
    }

    /// A reply of ours, in its place.
    pub fn local(&mut self, bytes: &[u8]) {
        match self.client.replies {
            Replies::Off => return,
            Replies::Skip => {
                self.client.replies = Replies::On;
                return;
            }
            Replies::On => {}
        }
        match &mut self.state {
            Some(state) if self.sent > 0 || self.outstanding => {
                state.expect(&self.client.outbox, 1, 0, How::Local(bytes.into()));
                self.sent += 1;
            }
            _ => self.client.outbox.lock().bytes.extend_from_slice(bytes),
        }
    }

    fn error(&mut self, text: &str) {
        self.refused += 1;
        let mut bytes = Vec::with_capacity(text.len() + 3);
        put_error(&mut bytes, text);
        self.local(&bytes);
    }

    /// An error for a command: a transaction that was being queued fails, too.
    pub(super) fn reject(&mut self, text: &str) {
        if let Some(queue) = &mut self.client.queue {
            queue.dirty = true;
        }
        self.error(text);
    }

    fn held(&self, row: &'static Row, bytes: &[u8]) -> Step {
        Step::Held(Held { row, bytes: bytes.to_vec(), args: self.client.request.args.clone() })
    }

    /// Takes one command.
    ///
    /// # Errors
    /// The step to take first. With [`Step::Held`] and [`Step::Close`] the command is taken; with all others it is
    /// to be brought again.
    pub fn command(&mut self, bytes: &[u8]) -> Result<(), Step> {
        if self.sent >= BURST_MAX {
            return Err(Step::Wait);
        }
        // The connection ends, and what is outstanding is answered first, also before replies of our own.
        if self.state.is_none() && self.outstanding && self.link.is_some() {
            return Err(Step::Wait);
        }
        // The arguments are put back before every return; an empty list means that they are out.
        let args = std::mem::take(&mut self.client.request.args);
        self.client.request_args = args.len();
        let result = self.with_args(bytes, &args);
        self.client.request.args = args;
        match result {
            Err(Step::Held(Held { row, .. })) => Err(self.held(row, bytes)),
            other => other,
        }
    }

    fn hold(row: &'static Row) -> Result<(), Step> {
        Err(Step::Held(Held { row, bytes: Vec::new(), args: Vec::new() }))
    }

    fn with_args(&mut self, bytes: &[u8], args: &[Arg]) -> Result<(), Step> {
        let name = args[0].of(bytes);
        let Some(mut row) = commands::find(name, None) else {
            self.reject(&unknown(args, bytes));
            return Ok(());
        };
        if row.policy == Policy::Container && args.len() > 1 {
            match commands::find(name, Some(args[1].of(bytes))) {
                Some(sub) => row = sub,
                None => {
                    let sub = String::from_utf8_lossy(args[1].of(bytes)).chars().take(128).collect::<String>();
                    let upper = row.name.to_uppercase();
                    self.reject(&format!("ERR unknown subcommand '{sub}'. Try {upper} HELP."));
                    return Ok(());
                }
            }
        }
        if !row.fits(args.len()) {
            self.reject(&format!("ERR wrong number of arguments for '{}' command", row.name));
            return Ok(());
        }
        let early = matches!(row.name, "auth" | "hello" | "quit" | "reset");
        if self.client.tenancy.is_none() {
            if early {
                return Self::hold(row);
            }
            self.error(refuse::NOAUTH);
            return Ok(());
        }
        if early {
            if row.name != "quit" && row.name != "reset" && self.client.queue.is_some() {
                self.reject("ERR Command not allowed inside a transaction");
                return Ok(());
            }
            return Self::hold(row);
        }
        let forwards = !matches!(row.policy, Policy::Local | Policy::Refuse | Policy::Container);
        if forwards && self.state.is_none() && self.client.down.is_none() {
            // The connection is lost: its last replies first, then a new one.
            if self.outstanding && self.link.is_some() {
                return Err(Step::Wait);
            }
            if self.client.own.is_some() {
                return Err(Step::Close);
            }
            return Err(Step::Connect);
        }
        if let Some(state) = &mut self.state
            && state.is_full(&self.client.outbox)
        {
            return Err(Step::Wait);
        }
        self.commands += 1;
        let Some(policy) = self.policy.take() else { return Ok(()) };
        let result = self.admitted(row, bytes, args, &policy);
        self.policy = Some(policy);
        result
    }

    fn admitted(&mut self, row: &'static Row, bytes: &[u8], args: &[Arg], policy: &quota::Policy) -> Result<(), Step> {
        let Some(tenancy) = &self.client.tenancy else { return Ok(()) };
        if let Err(over) = tenancy.session.take(1) {
            let rate = &policy.limits.redis.rate;
            let wait = over.retry_after.unwrap_or_default();
            if rate.over == OverRate::Delay && wait <= rate.max_delay {
                self.commands -= 1;
                return Err(Step::Delay(wait));
            }
            let (text, _) = refuse::render(&Refusal::OverLimit(over));
            self.reject(&text);
            return Ok(());
        }
        if let Some(down) = &self.client.down
            && !matches!(row.policy, Policy::Local | Policy::Refuse | Policy::Container)
        {
            let down = down.clone();
            self.reject(&down);
            return Ok(());
        }
        if self.client.version == Version::Two && self.client.subscriptions.count() > 0 {
            if row.policy != Policy::Subscribe && row.name != "ping" {
                let text = format!(
                    "ERR Can't execute '{}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context",
                    row.name
                );
                self.reject(&text);
                return Ok(());
            }
            return Self::hold(row);
        }
        let queued = self.client.queue.is_some();
        if row.keys == commands::Keys::Nowhere && emulate::is_whole(row) && !tenancy.database.alone {
            if queued {
                self.reject("ERR Command not allowed inside a transaction");
                return Ok(());
            }
            return Self::hold(row);
        }
        match row.policy {
            Policy::Refuse => {
                self.reject(&format!("NOPERM this user has no permissions to run the '{}' command", row.name));
                Ok(())
            }
            Policy::Transaction => self.transaction(row),
            Policy::Watch if queued && row.name == "watch" => {
                self.error("ERR WATCH inside MULTI is not allowed");
                Ok(())
            }
            Policy::Watch if !queued => match (row.name, self.client.watching) {
                ("unwatch", false) => {
                    self.local(b"+OK\r\n");
                    Ok(())
                }
                ("watch", _) if self.client.own.is_none() => Self::hold(row),
                ("watch", _) if self.client.watched.saturating_add(bytes.len()) > WATCHED_MAX_BYTES => {
                    self.error("ERR too many watched keys");
                    Ok(())
                }
                _ => {
                    self.client.watching = row.name == "watch";
                    self.client.watched = if self.client.watching { self.client.watched + bytes.len() } else { 0 };
                    self.forward(row, bytes, args, policy)
                }
            },
            Policy::Local if !queued && row.name == "ping" => {
                match args.get(1) {
                    None => self.local(b"+PONG\r\n"),
                    Some(_) if args.len() > 2 => {
                        self.reject("ERR wrong number of arguments for 'ping' command");
                    }
                    Some(text) => {
                        let mut reply = Vec::with_capacity(text.len + 16);
                        put_bulk(&mut reply, text.of(bytes));
                        self.local(&reply);
                    }
                }
                Ok(())
            }
            Policy::Local if queued && matches!(row.name, "ping" | "echo" | "time") => {
                self.forward(row, bytes, args, policy)
            }
            Policy::Subscribe | Policy::Pubsub | Policy::Service | Policy::Local | Policy::Container if queued => {
                self.reject("ERR Command not allowed inside a transaction");
                Ok(())
            }
            Policy::Subscribe | Policy::Pubsub | Policy::Service | Policy::Local | Policy::Container => Self::hold(row),
            Policy::Script => self.script(row, bytes, args, policy),
            Policy::Pattern => self.pattern(row, bytes, args),
            Policy::Publish => self.publish(bytes, args),
            Policy::Forward if row.name == "restore" && !self.client.server.upstream.sanitizes() => {
                self.reject(refuse::RESTORE);
                Ok(())
            }
            Policy::Forward | Policy::Block | Policy::Sort | Policy::Watch => {
                keys::find(row, args, bytes, &mut self.client.found);
                if row.policy == Policy::Sort && self.client.found.follows {
                    if queued {
                        self.reject("ERR Command not allowed inside a transaction");
                        return Ok(());
                    }
                    return Self::hold(row);
                }
                let streams = matches!(row.keys, commands::Keys::Streams);
                let blocks = row.policy == Policy::Block && (!streams || self.client.found.blocks);
                if blocks && !queued && self.client.own.is_none() {
                    return Self::hold(row);
                }
                self.forward(row, bytes, args, policy)
            }
        }
    }

    /// Says what becomes of the command just appended, which brings `frames` replies.
    pub(super) fn expect(&mut self, frames: usize, creates: u64, how: How) {
        let Some(state) = &mut self.state else { return };
        match self.client.replies {
            Replies::On => {
                state.expect(&self.client.outbox, 1, creates, how);
                self.sent += 1;
            }
            Replies::Off | Replies::Skip => {
                state.expect(&self.client.outbox, frames, creates, How::Discard);
                self.sent += frames;
                if self.client.replies == Replies::Skip {
                    self.client.replies = Replies::On;
                }
            }
        }
    }

    /// Where commands are written now: the queue of a transaction, or the connection.
    fn out(&mut self) -> Option<&mut Vec<u8>> {
        match (&mut self.client.queue, &mut self.state) {
            (Some(queue), _) => Some(&mut queue.bytes),
            (None, Some(state)) => Some(&mut state.out),
            (None, None) => None,
        }
    }

    /// After a command was written to [`Self::out`], with `extra` commands of ours behind it.
    fn queued_or_expected(&mut self, shape: Shape, creates: u64, extra: usize) {
        match &mut self.client.queue {
            Some(queue) => {
                queue.elements.push(Some(shape));
                queue.elements.extend(std::iter::repeat_n(None, extra));
                queue.creates += creates;
                if queue.held() > TRANSACTION_MAX_BYTES {
                    let creates = std::mem::take(&mut queue.creates);
                    *queue = Queue::default();
                    queue.dirty = true;
                    self.done(creates);
                    return self.error("ERR the transaction is too large to be queued");
                }
                self.local(b"+QUEUED\r\n");
            }
            None => {
                let how = if shape == Shape::Raw { How::Raw } else { How::Strip(shape) };
                self.expect(1, creates, how);
            }
        }
    }

    fn pattern(&mut self, row: &Row, bytes: &[u8], args: &[Arg]) -> Result<(), Step> {
        let Some(tenancy) = &self.client.tenancy else { return Ok(()) };
        let prefix = Arc::clone(&tenancy.database);
        let prefix = &prefix.prefix;
        // The prefix holds no glob character, so it is literal inside a pattern.
        if row.name == "keys" {
            let Some(out) = self.out() else { return Ok(()) };
            put_rewritten(out, bytes, args, &[1], prefix);
        } else {
            let mut patterns = Vec::new();
            let mut at = 2;
            while at < args.len() {
                if keys::is_option(args[at].of(bytes), "MATCH") && at + 1 < args.len() {
                    patterns.push(at + 1);
                }
                at += 2;
            }
            let Some(out) = self.out() else { return Ok(()) };
            if patterns.is_empty() && args.len().is_multiple_of(2) {
                put_array(out, args.len() + 2);
                out.extend_from_slice(&bytes[header_len(args.len())..]);
                put_bulk(out, b"MATCH");
                put_bulk_joined(out, prefix, b"*");
            } else {
                // An odd number of options is an error to the server.
                put_rewritten(out, bytes, args, &patterns, prefix);
            }
        }
        self.queued_or_expected(row.reply, 0, 0);
        Ok(())
    }

    fn publish(&mut self, bytes: &[u8], args: &[Arg]) -> Result<(), Step> {
        let Some(tenancy) = &self.client.tenancy else { return Ok(()) };
        let database = Arc::clone(&tenancy.database);
        let Some(out) = self.out() else { return Ok(()) };
        put_rewritten(out, bytes, args, &[1], &database.channels);
        self.queued_or_expected(Shape::Raw, 0, 0);
        Ok(())
    }
}

/// Redis' own words for a command that it does not know.
fn unknown(args: &[Arg], bytes: &[u8]) -> String {
    let clip = |text: &[u8], max: usize| String::from_utf8_lossy(&text[..text.len().min(max)]).into_owned();
    let mut beginning = String::new();
    for arg in &args[1..] {
        if beginning.len() >= 128 {
            break;
        }
        let left = 128 - beginning.len();
        beginning.push_str(&format!("'{}' ", clip(arg.of(bytes), left)));
    }
    format!("ERR unknown command '{}', with args beginning with: {beginning}", clip(args[0].of(bytes), 128))
}
