//! Calls of scripts and functions: as they run in the server, told what the tier leaves them.

use std::sync::{Arc, atomic::Ordering};

use super::Burst;
use crate::front::redis::{client::Step, commands::Row, keys, memory::FRESH_MS, script};
use crate::{
    quota,
    tenant::tier::RedisLimits,
    upstream::redis::{Database, ledger::UNKNOWN, link::How, reply::Shape},
    wire::resp::{Arg, put_array, put_bulk, put_bulk_joined, put_request},
};

/// Keys that a script is expected to create in a database that others use too.
const SCRIPT_KEYS: u64 = 64;

/// What a script is told of its limits, and the keys that are reserved for it.
struct Allowance {
    text: String,
    creates: u64,
}

impl Burst<'_> {
    pub(super) fn script(&mut self, row: &Row, bytes: &[u8], args: &[Arg], policy: &quota::Policy) -> Result<(), Step> {
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
            (Some(queue), _) if !by_text => queue.load(&script),
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
        put_array(out, args.len() + 2);
        put_bulk(out, if row.name.ends_with("_ro") { b"FCALL_RO" } else { b"FCALL" });
        put_bulk_joined(out, place.space.function_mark().as_bytes(), args[1].of(bytes));
        put_script_args(out, bytes, args, count, &database.prefix);
        put_bulk(out, allowance.text.as_bytes());
        // A library is one for all of the tenant's databases.
        put_bulk(out, &database.prefix);
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

/// Appends the number of keys, the keys inside the prefix, and the further arguments of a script.
fn put_script_args(out: &mut Vec<u8>, bytes: &[u8], args: &[Arg], count: usize, prefix: &[u8]) {
    put_bulk(out, args[2].of(bytes));
    for (i, arg) in args[3..].iter().enumerate() {
        put_bulk_joined(out, if i < count { prefix } else { b"" }, arg.of(bytes));
    }
}
