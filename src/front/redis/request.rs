//! One burst of a client's commands on its way to the server: checked against the table and the tier, its names put
//! inside the tenant's prefix, straight into the connection's output.
//!
//! How the tier's limits are kept:
//! - *Keys.* While the [`ledger`](crate::upstream::redis::ledger) proves that there is room, commands pass unchecked.
//!   Near the cap each one that may create a key goes through a small script that compares `DBSIZE` with the cap in
//!   the server, atomically. Reads, deletions and overwrites always pass.
//! - *Life of keys.* `SET` and its kin get the tier's `EX`; any other command that may create a key is sent as one
//!   transaction with `EXPIRE key longest LT` behind it, which shortens what is longer or missing and nothing else.
//!   So there is no moment at which the server holds such a key without its end, whatever becomes of us.
//! - *Memory.* What is written counts at once; a measurement corrects it (`memory`).

use std::sync::{Arc, atomic::Ordering};

use arc_swap::Guard;
use parking_lot::MutexGuard;

use super::{
    client::{Client, Held, Queue, Replies, Step, TRANSACTION_MAX_BYTES},
    commands::{self, Made, Policy, Row, TTL},
    emulate, keys,
    memory::FRESH_MS,
    refuse,
    rewrite::{header_len, put_rewritten, put_rewritten_from, put_shortened},
    script,
};
use crate::{
    quota,
    refusal::{Limit, Over, Refusal},
    tenant::{OverRate, tier::RedisLimits},
    upstream::redis::{
        Database, Version,
        ledger::UNKNOWN,
        link::{How, Link, State},
        reply::{Shape, Transaction},
    },
    wire::resp::{Arg, Fault, put_array, put_bulk, put_bulk_joined, put_error, put_request},
};

/// Commands of one burst after which the client's turn ends.
const BURST_MAX: usize = 1024;

/// Pause between two counts of a tenant's keys, in milliseconds.
const COUNT_PAUSE_MS: u64 = 20;

/// Keys that a script is expected to create in a database that others use too.
const SCRIPT_KEYS: u64 = 64;

/// Most arguments of a command that goes through the guard: Lua can't unpack more.
pub(super) const GUARDED_ARGS_MAX: usize = 7000;

/// Bytes of `WATCH` commands between two transactions: the server keeps every name.
const WATCHED_MAX_BYTES: usize = 1 << 20;

/// Bytes that a created key costs beyond its name and value, for the estimate between two measurements.
const KEY_OVERHEAD_BYTES: u64 = 64;

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

/// How a command that may create keys is sent.
pub(super) enum Care {
    /// As it is.
    None,
    /// Followed by `EXPIRE … LT` for these seconds.
    Expire(u64),
    /// Through the guard, with the cap and the seconds (0: none).
    Guard(u64, u64),
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

    fn transaction(&mut self, row: &Row) -> Result<(), Step> {
        match (row.name, self.client.queue.take()) {
            ("multi", None) => {
                self.client.queue = Some(Queue::default());
                self.local(b"+OK\r\n");
            }
            ("multi", open) => {
                self.client.queue = open;
                self.error("ERR MULTI calls can not be nested");
            }
            (name, None) => self.error(&format!("ERR {} without MULTI", name.to_uppercase())),
            ("discard", Some(queue)) => {
                self.unwatch();
                self.done(queue.creates);
                self.local(b"+OK\r\n");
            }
            (_, Some(queue)) if queue.dirty => {
                self.unwatch();
                self.done(queue.creates);
                self.error("EXECABORT Transaction discarded because of previous errors.");
            }
            (_, Some(queue)) => self.exec(queue),
        }
        Ok(())
    }

    fn done(&self, creates: u64) {
        if let Some(tenancy) = &self.client.tenancy {
            tenancy.database.ledger.done(creates);
        }
    }

    fn unwatch(&mut self) {
        self.client.watched = 0;
        if std::mem::take(&mut self.client.watching)
            && let Some(state) = &mut self.state
        {
            state.out.extend_from_slice(b"*1\r\n$7\r\nUNWATCH\r\n");
            state.expect(&self.client.outbox, 1, 0, How::Discard);
            self.sent += 1;
        }
    }

    fn exec(&mut self, queue: Queue) {
        let Some(lost) = self.scripts_lost() else { return };
        self.client.watching = false;
        self.client.watched = 0;
        let Some(state) = &mut self.state else { return };
        for (sha, text) in &queue.scripts {
            if state.must_load(sha, lost) {
                put_request(&mut state.out, &[b"SCRIPT", b"LOAD", text]);
                state.expect(&self.client.outbox, 1, 0, How::Discard);
                self.sent += 1;
            }
        }
        state.out.extend_from_slice(b"*1\r\n$5\r\nMULTI\r\n");
        state.out.extend_from_slice(&queue.bytes);
        state.out.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
        let acks = queue.elements.len() + 1;
        let transaction = Transaction { acks, elements: queue.elements, single: false, refused: None };
        self.expect(acks + 1, queue.creates, How::Transaction(Box::new(transaction)));
        self.count_keys();
    }

    fn scripts_lost(&self) -> Option<u64> {
        let tenancy = self.client.tenancy.as_ref()?;
        Some(tenancy.database.ledger.scripts_lost.load(Ordering::Relaxed))
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

    /// Asks the server for the number of keys, on the same connection, if it is time to.
    pub(super) fn count_keys(&mut self) {
        let Some(tenancy) = &self.client.tenancy else { return };
        if !tenancy.database.alone {
            return;
        }
        if let Some(mark) = tenancy.database.ledger.begin_count(quota::clock::now_ms(), COUNT_PAUSE_MS) {
            match &mut self.state {
                Some(state) => {
                    state.out.extend_from_slice(b"*1\r\n$6\r\nDBSIZE\r\n");
                    state.expect(&self.client.outbox, 1, 0, How::Count(mark));
                }
                None => tenancy.database.ledger.not_counted(),
            }
        }
    }

    /// Decides how a command that may create `made` keys, or prolong one, is sent; `None` when it was refused. The
    /// caller of one that `flows` counts its bytes itself.
    pub(super) fn care(
        &mut self,
        row: &Row,
        made: usize,
        bytes: u64,
        flows: bool,
        limits: &RedisLimits,
    ) -> Result<Option<Care>, Step> {
        let Some(tenancy) = &self.client.tenancy else { return Ok(None) };
        let ledger = &tenancy.database.ledger;
        if row.grows() {
            let memory = tenancy.place.memory();
            if memory.saturating_add(bytes) > limits.memory {
                if !self.client.measured {
                    return Err(Step::Measure);
                }
                self.refuse_memory(memory.saturating_add(bytes), limits.memory);
                return Ok(None);
            }
            if !flows {
                let taken = super::memory::allocated(bytes).saturating_add(KEY_OVERHEAD_BYTES);
                ledger.written.fetch_add(taken, Ordering::Relaxed);
            }
            if super::memory::is_derived(row) {
                ledger.grown.store(true, Ordering::Relaxed);
            }
        }
        let ttl = limits.max_ttl.map_or(0, |ttl| ttl.as_secs());
        if made > 0 {
            let number = tenancy.database.number;
            let elsewhere = *self.elsewhere.get_or_insert_with(|| tenancy.place.elsewhere(number));
            if !tenancy.database.alone {
                let bound = ledger.reserve(made as u64).saturating_add(elsewhere);
                let blocking = row.policy == Policy::Block && self.client.queue.is_none();
                let guardable = !blocking && self.client.request_args + made <= GUARDED_ARGS_MAX;
                if bound > limits.keys && !self.client.counted && !ledger.is_fresh(quota::clock::now_ms(), FRESH_MS) {
                    ledger.done(made as u64);
                    self.elsewhere = None;
                    return Err(Step::Count);
                }
                // The guard says how many keys there really were to create, so that overwriting adds nothing.
                if bound > limits.keys || guardable && bound > limits.keys / 2 {
                    return Ok(Some(Care::Guard(limits.keys.saturating_sub(bound - made as u64), ttl)));
                }
            } else if ledger.reserve(made as u64).saturating_add(elsewhere) > limits.keys {
                // What can't go through the guard, or counts in several databases, needs the true number now.
                let blocking = row.policy == Policy::Block && self.client.queue.is_none();
                if (elsewhere > 0 || blocking) && !self.client.counted {
                    ledger.done(made as u64);
                    return Err(Step::Count);
                }
                return Ok(Some(Care::Guard(limits.keys.saturating_sub(elsewhere), ttl)));
            }
        }
        let lives = ttl > 0 && (made > 0 || row.flags & TTL != 0);
        // A transaction of ours would end the client's WATCH; the guard is as atomic and does not.
        if lives && self.client.watching && self.client.queue.is_none() && row.policy != Policy::Block {
            return Ok(Some(Care::Guard(u64::MAX >> 12, ttl)));
        }
        Ok(Some(if lives { Care::Expire(ttl) } else { Care::None }))
    }

    fn refuse_memory(&mut self, in_use: u64, max: u64) {
        let Some(tenancy) = &self.client.tenancy else { return };
        let tier = tenancy.session.slot().policy().tenant.tier;
        let over = Over { limit: Limit::Memory, tier, max, in_use, retry_after: None };
        self.reject(&refuse::render(&Refusal::OverLimit(over)).0);
    }

    /// Sends a command whose keys are in `found`, or queues it.
    fn forward(&mut self, row: &Row, bytes: &[u8], args: &[Arg], policy: &quota::Policy) -> Result<(), Step> {
        if row.policy == Policy::Watch || row.policy == Policy::Local {
            keys::find(row, args, bytes, &mut self.client.found);
        }
        let found = std::mem::take(&mut self.client.found);
        let result = self.send(row, bytes, args, &found, &policy.limits.redis);
        self.client.found = found;
        result
    }

    fn send(
        &mut self,
        row: &Row,
        bytes: &[u8],
        args: &[Arg],
        found: &keys::Found,
        limits: &RedisLimits,
    ) -> Result<(), Step> {
        let made = found.made(row.made);
        let care = if made.is_empty() && row.flags & (commands::GROW | TTL) == 0 {
            Care::None
        } else {
            let weight = bytes.len() as u64 + super::memory::amplified(row, args, bytes);
            match self.care(row, made.len(), weight, false, limits)? {
                Some(care) => care,
                None => return Ok(()),
            }
        };
        let creates = made.len() as u64;
        let Some(tenancy) = &self.client.tenancy else { return Ok(()) };
        let database = Arc::clone(&tenancy.database);
        // Whatever is not told apart afterwards makes the count stale: what may delete, what may only overwrite.
        let learns = matches!(care, Care::Guard(..)) && self.client.queue.is_none();
        if !database.alone && row.writes() && !(learns && matches!(row.made, Made::First | Made::All)) {
            database.ledger.shrink();
        }
        let prefix = &database.prefix;
        match care {
            Care::None => {
                let Some(out) = self.out() else { return Ok(()) };
                put_rewritten(out, bytes, args, &found.keys, prefix);
                self.queued_or_expected(row.reply, creates, 0);
            }
            Care::Expire(ttl) => {
                // What is shortened in place needs nothing behind it.
                if let Some(out) = self.out()
                    && put_shortened(out, row, bytes, args, prefix, ttl)
                {
                    self.queued_or_expected(row.reply, creates, 0);
                    return Ok(());
                }
                let lives: &[usize] = if made.is_empty() { &found.keys[..1] } else { made };
                let blocking = row.policy == Policy::Block && self.client.queue.is_none();
                let single = self.client.queue.is_none() && !blocking;
                let Some(out) = self.out() else { return Ok(()) };
                if single {
                    out.extend_from_slice(b"*1\r\n$5\r\nMULTI\r\n");
                }
                put_rewritten(out, bytes, args, &found.keys, prefix);
                for key in lives {
                    put_array(out, 4);
                    put_bulk(out, b"EXPIRE");
                    put_bulk_joined(out, prefix, args[*key].of(bytes));
                    put_bulk(out, ttl.to_string().as_bytes());
                    put_bulk(out, b"LT");
                }
                if single {
                    out.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
                    let mut elements = vec![None; lives.len() + 1];
                    elements[0] = Some(row.reply);
                    let acks = lives.len() + 2;
                    let transaction = Transaction { acks, elements, single: true, refused: None };
                    self.expect(acks + 1, creates, How::Transaction(Box::new(transaction)));
                } else if blocking {
                    // A transaction can't block. The server has both commands before it runs the first.
                    self.queued_or_expected(row.reply, creates, 0);
                    if let Some(state) = &mut self.state {
                        state.expect(&self.client.outbox, lives.len(), 0, How::Discard);
                        self.sent += lives.len();
                    }
                } else {
                    self.queued_or_expected(row.reply, creates, lives.len());
                }
            }
            Care::Guard(cap, ttl) => self.guarded(row, bytes, args, found, cap, ttl, prefix),
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one call")]
    fn guarded(
        &mut self,
        row: &Row,
        bytes: &[u8],
        args: &[Arg],
        found: &keys::Found,
        cap: u64,
        ttl: u64,
        prefix: &[u8],
    ) {
        let made = found.made(row.made);
        let creates = made.len() as u64;
        // What creates nothing may still prolong a life.
        let made = if made.is_empty() { &found.keys[..1] } else { made };
        let blocking = row.policy == Policy::Block && self.client.queue.is_none();
        if blocking || args.len() + made.len() > GUARDED_ARGS_MAX {
            // Neither can go through a script; near the cap they have to wait for room.
            self.done(creates);
            self.count_keys();
            self.reject(&refuse::oom(&format!("nearly all of {cap} keys")));
            return;
        }
        let version = self.client.version;
        let alone = self.client.tenancy.as_ref().is_none_or(|tenancy| tenancy.database.alone);
        let script = if alone { script::guard() } else { script::learning_guard() };
        let Some(lost) = self.scripts_lost() else { return };
        match (&mut self.client.queue, &mut self.state) {
            (Some(queue), _) => queue.scripts.push((script.sha, script.text.to_vec())),
            (None, Some(state)) => {
                if state.must_load(&script.sha, lost) {
                    put_request(&mut state.out, &[b"SCRIPT", b"LOAD", &script.text]);
                    state.expect(&self.client.outbox, 1, 0, How::Discard);
                    self.sent += 1;
                }
            }
            (None, None) => return,
        }
        let Some(out) = self.out() else { return };
        // A script can't run what blocks; inside a transaction it would not have blocked anyway.
        let calm: Option<(&[u8], usize)> = match row.name {
            "blmove" => Some((b"LMOVE", args.len() - 1)),
            "brpoplpush" => Some((b"RPOPLPUSH", args.len() - 1)),
            _ => None,
        };
        put_array(out, 3 + made.len() + 3 + calm.map_or(args.len(), |(_, len)| len));
        put_bulk(out, b"EVALSHA");
        put_bulk(out, &script.sha);
        put_bulk(out, made.len().to_string().as_bytes());
        for key in made {
            put_bulk_joined(out, prefix, args[*key].of(bytes));
        }
        put_bulk(out, cap.to_string().as_bytes());
        put_bulk(out, ttl.to_string().as_bytes());
        put_bulk(out, if version == Version::Three { b"3" } else { b"2" });
        // The command itself, without its own array header.
        match calm {
            None => put_rewritten_from(out, header_len(args.len()), bytes, args, &found.keys, prefix),
            Some((name, len)) => {
                put_bulk(out, name);
                for (i, arg) in args[..len].iter().enumerate().skip(1) {
                    let before: &[u8] = if found.keys.contains(&i) { prefix } else { b"" };
                    put_bulk_joined(out, before, arg.of(bytes));
                }
            }
        }
        if alone {
            self.queued_or_expected(row.reply, creates, 0);
        } else {
            self.learn(creates);
        }
        if self.client.queue.is_none() {
            self.count_keys();
        }
    }

    /// After a script of ours was written that gives the number of created keys and the reply.
    fn learn(&mut self, creates: u64) {
        match self.client.queue {
            Some(_) => self.queued_or_expected(Shape::Second, creates, 0),
            None => self.expect(1, creates, How::Learn(creates)),
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
                if queue.bytes.len() > TRANSACTION_MAX_BYTES {
                    let creates = std::mem::take(&mut queue.creates);
                    *queue = Queue { dirty: true, ..Queue::default() };
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

    fn script(&mut self, row: &Row, bytes: &[u8], args: &[Arg], policy: &quota::Policy) -> Result<(), Step> {
        let Some(tenancy) = &self.client.tenancy else { return Ok(()) };
        let database = Arc::clone(&tenancy.database);
        let function = row.name.starts_with("fcall");
        // The call gets one more argument, so its number of keys is checked here.
        let count = match keys::number(args[2].of(bytes)) {
            None if function => return self.wrong("ERR Bad number of keys provided"),
            None => return self.wrong("ERR value is not an integer or out of range"),
            Some(count) if count < 0 => return self.wrong("ERR Number of keys can't be negative"),
            Some(count) => usize::try_from(count).unwrap_or(usize::MAX),
        };
        if count > args.len() - 3 {
            return self.wrong("ERR Number of keys can't be greater than number of args");
        }
        if function {
            return self.function(row, bytes, args, count, policy);
        }
        let text = args[1].of(bytes);
        let script = if row.name.starts_with("evalsha") {
            match script::parse_sha(text).and_then(|sha| script::find(&database, &sha)) {
                Some(script) => script,
                None => return self.wrong_script(),
            }
        } else {
            match script::remember(&database, text) {
                Ok((_, script)) => script,
                Err(script::Refused(text)) => return self.wrong(&text),
            }
        };
        let Some(allowance) = self.allow(bytes.len(), &policy.limits.redis)? else { return Ok(()) };
        let lost = database.ledger.scripts_lost.load(Ordering::Relaxed);
        let by_text = row.name.starts_with("eval") && !row.name.starts_with("evalsha");
        // The server gets the text of an EVAL once on each connection; an error in it comes as the reply.
        let unknown = match (&self.client.queue, &mut self.state) {
            (Some(_), _) => true,
            (None, Some(state)) => state.must_load(&script.sha, lost) || by_text && state.keeps_groups(),
            (None, None) => return Ok(()),
        };
        let with_text = unknown && by_text;
        match (&mut self.client.queue, &mut self.state) {
            (Some(queue), _) if !by_text => queue.scripts.push((script.sha, script.text.to_vec())),
            (None, Some(state)) if !by_text && unknown => {
                put_request(&mut state.out, &[b"SCRIPT", b"LOAD", &script.text]);
                state.expect(&self.client.outbox, 1, 0, How::Discard);
                self.sent += 1;
            }
            _ => {}
        }
        let Some(out) = self.out() else { return Ok(()) };
        put_array(out, args.len() + 1);
        let suffix: &[u8] = if row.name.ends_with("_ro") { b"_RO" } else { b"" };
        put_bulk_joined(out, if with_text { b"EVAL" } else { b"EVALSHA" }, suffix);
        put_bulk(out, if with_text { &script.text } else { &script.sha });
        put_script_args(out, bytes, args, count, &database.prefix);
        put_bulk(out, allowance.text.as_bytes());
        self.script_sent(&database, allowance.creates);
        Ok(())
    }

    /// A function of one of the tenant's libraries, by its name there.
    fn function(
        &mut self,
        row: &Row,
        bytes: &[u8],
        args: &[Arg],
        count: usize,
        policy: &quota::Policy,
    ) -> Result<(), Step> {
        let Some(tenancy) = &self.client.tenancy else { return Ok(()) };
        let (place, database) = (Arc::clone(&tenancy.place), Arc::clone(&tenancy.database));
        let Some(allowance) = self.allow(bytes.len(), &policy.limits.redis)? else { return Ok(()) };
        let Some(out) = self.out() else { return Ok(()) };
        put_array(out, args.len() + 1);
        put_bulk(out, if row.name.ends_with("_ro") { b"FCALL_RO" } else { b"FCALL" });
        put_bulk_joined(out, place.space.function_mark().as_bytes(), args[1].of(bytes));
        put_script_args(out, bytes, args, count, &database.prefix);
        // A library is one for all of the tenant's databases.
        put_bulk_joined(out, format!("{} ", allowance.text).as_bytes(), &database.prefix);
        self.script_sent(&database, allowance.creates);
        Ok(())
    }

    /// What a script may do, and what it is expected to: counted from now on.
    fn allow(&mut self, bytes: usize, limits: &RedisLimits) -> Result<Option<Allowance>, Step> {
        let Some(tenancy) = &self.client.tenancy else { return Ok(None) };
        let database = &tenancy.database;
        if self.client.queue.is_none() && self.state.is_none() {
            return Ok(None);
        }
        if tenancy.place.memory() > limits.memory && !self.client.measured {
            return Err(Step::Measure);
        }
        let elsewhere = tenancy.place.elsewhere(database.number);
        let bound = database.ledger.bound().saturating_add(elsewhere);
        if !database.alone {
            let fresh = database.ledger.is_fresh(quota::clock::now_ms(), FRESH_MS);
            if bound >= limits.keys && !self.client.counted && !fresh {
                return Err(Step::Count);
            }
            database.ledger.shrink();
        }
        let room = limits.memory.saturating_sub(tenancy.place.memory());
        let memory_left = tenancy.place.memory() <= limits.memory;
        // Over the memory cap a script may still read and delete: no key is left for it to create.
        let cap = match (memory_left, database.alone) {
            (false, _) => 1,
            (true, true) => limits.keys.saturating_sub(elsewhere).max(1),
            // One more than the keys that are left, since 0 is no cap.
            (true, false) => limits.keys.saturating_sub(bound) + 1,
        };
        let creates = if database.alone { UNKNOWN } else { SCRIPT_KEYS };
        let ttl = limits.max_ttl.map_or(0, |ttl| ttl.as_secs());
        tenancy.place.runs_script(quota::clock::now_ms());
        database.ledger.reserve(creates);
        database.ledger.written.fetch_add(bytes as u64, Ordering::Relaxed);
        database.ledger.grown.store(true, Ordering::Relaxed);
        Ok(Some(Allowance { text: format!("{cap} {ttl} {room}"), creates }))
    }

    /// After a call of a script or function was written.
    fn script_sent(&mut self, database: &Database, creates: u64) {
        if database.alone {
            self.queued_or_expected(Shape::Raw, creates, 0);
        } else {
            self.learn(creates);
        }
        if self.client.queue.is_none() {
            self.count_keys();
        }
    }

    fn wrong(&mut self, text: &str) -> Result<(), Step> {
        // The server finds these when it runs the command: a queued one makes no transaction fail.
        match self.client.queue {
            None => self.error(text),
            Some(_) => self.reject(text),
        }
        Ok(())
    }

    fn wrong_script(&mut self) -> Result<(), Step> {
        self.wrong("NOSCRIPT No matching script. Please use EVAL.")
    }
}

/// What a script is told of its limits, and the keys that are reserved for it.
struct Allowance {
    text: String,
    creates: u64,
}

/// Appends the number of keys, the keys inside the prefix, and the further arguments of a script.
fn put_script_args(out: &mut Vec<u8>, bytes: &[u8], args: &[Arg], count: usize, prefix: &[u8]) {
    put_bulk(out, args[2].of(bytes));
    for (i, arg) in args[3..].iter().enumerate() {
        put_bulk_joined(out, if i < count { prefix } else { b"" }, arg.of(bytes));
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
