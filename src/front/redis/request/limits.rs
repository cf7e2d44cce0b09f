//! How the tier's limits are kept by what is sent:
//! - *Keys.* While the [`ledger`](crate::upstream::redis::ledger) proves that there is room, commands pass unchecked.
//!   Near the cap each one that may create a key goes through a small script that compares `DBSIZE` with the cap in
//!   the server, atomically. Reads, deletions and overwrites always pass.
//! - *Life of keys.* `SET` and its kin get the tier's `EX`; any other command that may create a key is sent as one
//!   transaction with `EXPIRE key longest LT` behind it, which shortens what is longer or missing and nothing else.
//!   So there is no moment at which the server holds such a key without its end, whatever becomes of us.
//! - *Memory.* What is written counts at once; a measurement corrects it (`memory`).

use std::sync::{Arc, atomic::Ordering};

use super::Burst;
use crate::front::redis::{
    client::Step,
    commands::{self, Made, Policy, Row, TTL},
    keys,
    memory::{self, FRESH_MS},
    refuse,
    rewrite::{header_len, put_rewritten, put_rewritten_from, put_shortened},
    script,
};
use crate::{
    quota,
    refusal::{Limit, Over, Refusal},
    tenant::tier::RedisLimits,
    upstream::redis::{
        Version,
        link::How,
        reply::{Shape, Transaction},
    },
    wire::resp::{Arg, put_array, put_bulk, put_bulk_joined, put_request},
};

/// Pause between two counts of a tenant's keys, in milliseconds.
const COUNT_PAUSE_MS: u64 = 20;

/// Most arguments of a command that goes through the guard: Lua can't unpack more.
pub const GUARDED_ARGS_MAX: usize = 7000;

/// Bytes that a created key costs beyond its name and value, for the estimate between two measurements.
const KEY_OVERHEAD_BYTES: u64 = 64;

/// How a command that may create keys is sent.
pub enum Care {
    /// As it is.
    None,
    /// Followed by `EXPIRE … LT` for these seconds.
    Expire(u64),
    /// Through the guard, with the cap and the seconds (0: none).
    Guard(u64, u64),
}

impl Burst<'_> {
    /// Asks the server for the number of keys, on the same connection, if it is time to.
    pub fn count_keys(&mut self) {
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
    pub fn care(
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
                let taken = memory::allocated(bytes).saturating_add(KEY_OVERHEAD_BYTES);
                ledger.written.fetch_add(taken, Ordering::Relaxed);
            }
            if memory::is_derived(row) {
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
    pub(super) fn forward(
        &mut self,
        row: &Row,
        bytes: &[u8],
        args: &[Arg],
        policy: &quota::Policy,
    ) -> Result<(), Step> {
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
            let weight = bytes.len() as u64 + memory::amplified(row, args, bytes);
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
            (Some(queue), _) => queue.load(script),
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
    pub(super) fn learn(&mut self, creates: u64) {
        match self.client.queue {
            Some(_) => self.queued_or_expected(Shape::Second, creates, 0),
            None => self.expect(1, creates, How::Learn(creates)),
        }
    }
}
