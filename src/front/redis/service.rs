//! Commands that an ACL can't confine to a tenant, run by the platform's user with every name inside the prefix:
//! PUBSUB, SORT that follows patterns, COPY, MOVE, SWAPDB, FLUSHALL.

use std::sync::{Arc, atomic::Ordering};

use super::{
    client::{Client, Held},
    keys,
    memory::FRESH_MS,
    refuse,
    rewrite::put_rewritten,
};
use crate::{
    quota::clock,
    refusal::{Limit, Over, Refusal},
    upstream::redis::{
        DATABASES, Version,
        reply::{Shape, strip},
    },
    wire::resp::{Arg, put_array, put_bulk, put_bulk_joined, put_head, put_request, put_status},
};

/// Keys of both databases that SWAPDB renames: some ten milliseconds of the server's time.
const SWAP_MAX_KEYS: u64 = 10_000;

impl Client {
    /// PUBSUB, and SORT that follows patterns: every name inside the prefix, run by the platform's user, whom no key
    /// pattern confines.
    pub(super) async fn by_platform(&mut self, held: &Held) {
        let Some(tenancy) = &self.tenancy else { return };
        let database = Arc::clone(&tenancy.database);
        let mut request = Vec::new();
        let mut prefix: &[u8] = &database.channels;
        match held.row.name {
            "pubsub|channels" | "pubsub|shardchannels" if held.args.len() == 2 => {
                let sub = held.args[1].of(&held.bytes);
                put_array(&mut request, 3);
                put_bulk(&mut request, b"PUBSUB");
                put_bulk(&mut request, sub);
                put_bulk_joined(&mut request, prefix, b"*");
            }
            "sort" | "sort_ro" => {
                prefix = &database.prefix;
                keys::find(held.row, &held.args, &held.bytes, &mut self.found);
                if self.found.store.is_some() {
                    return self.fail("NOPERM SORT can't both follow patterns and store");
                }
                put_rewritten(&mut request, &held.bytes, &held.args, &self.found.keys, prefix);
            }
            _ => {
                let names: Vec<usize> = (2..held.args.len()).collect();
                put_rewritten(&mut request, &held.bytes, &held.args, &names, prefix);
            }
        }
        self.relay(database.index, &request, held.row.reply, prefix).await;
    }

    async fn relay(&mut self, index: u32, request: &[u8], shape: Shape, prefix: &[u8]) {
        let Some(tenancy) = &self.tenancy else { return };
        match tenancy.place.as_platform(index, request).await {
            Ok(reply) => {
                let mut out = Vec::new();
                strip(shape, &reply, prefix, &mut out);
                if self.version == Version::Three {
                    out = to_three(&out);
                }
                self.say(&out);
            }
            Err(error) => {
                tracing::warn!(%error, "a command by the platform's user failed");
                self.fail(crate::upstream::redis::link::LOST);
            }
        }
    }

    /// COPY, inside one logical database or between two of the tenant's.
    pub(super) async fn copy(&mut self, held: &Held) {
        let word = |i: usize| held.args.get(i).map(|arg: &Arg| arg.of(&held.bytes));
        let mut target = None;
        let mut replace = false;
        let mut at = 3;
        while let Some(option) = word(at) {
            if option.eq_ignore_ascii_case(b"REPLACE") {
                replace = true;
                at += 1;
            } else if option.eq_ignore_ascii_case(b"DB") && at + 1 < held.args.len() {
                target = match word(at + 1).and_then(keys::number) {
                    None => return self.fail("ERR value is not an integer or out of range"),
                    Some(number) => Some(number),
                };
                at += 2;
            } else {
                return self.fail("ERR syntax error");
            }
        }
        let (from, to) = (held.args[1].of(&held.bytes), held.args[2].of(&held.bytes));
        self.transfer(from, to, target, replace, false).await;
    }

    pub(super) async fn move_key(&mut self, held: &Held) {
        let Some(number) = keys::number(held.args[2].of(&held.bytes)) else {
            return self.fail("ERR value is not an integer or out of range");
        };
        let key = held.args[1].of(&held.bytes);
        if let Some(tenancy) = &self.tenancy
            && i64::from(tenancy.database.number) == number
        {
            return self.fail("ERR source and destination objects are the same");
        }
        self.transfer(key, key, Some(number), false, true).await;
    }

    /// Copies or moves a key, atomically, within the cap on keys.
    async fn transfer(&mut self, from: &[u8], to: &[u8], target: Option<i64>, replace: bool, moves: bool) {
        let Some(tenancy) = &self.tenancy else { return };
        let source = Arc::clone(&tenancy.database);
        let target = match target.map(u32::try_from) {
            None => Arc::clone(&source),
            Some(Ok(number)) if number < DATABASES => match tenancy.place.open(number).await {
                Ok(database) => database,
                Err(_) => return self.refuse(&Refusal::UpstreamDown),
            },
            Some(_) => return self.fail("ERR DB index is out of range"),
        };
        if source.number == target.number && from == to {
            return self.fail("ERR source and destination objects are the same");
        }
        let policy = tenancy.session.slot().policy();
        let (tier, limits) = (policy.tenant.tier, policy.limits.redis.clone());
        drop(policy);
        if tenancy.place.memory() > limits.memory && !moves {
            let in_use = tenancy.place.memory();
            let over = Over { limit: Limit::Memory, tier, max: limits.memory, in_use, retry_after: None };
            return self.refuse(&Refusal::OverLimit(over));
        }
        let number = target.number;
        let place = Arc::clone(&tenancy.place);
        let full = target.ledger.bound().saturating_add(place.elsewhere(number)) >= limits.keys;
        if !target.alone && !moves && full && !target.ledger.is_fresh(clock::now_ms(), FRESH_MS) {
            self.count().await;
            self.counted = false;
        }
        source.ledger.grown.store(true, Ordering::Relaxed);
        source.ledger.shrink();
        let left = limits.keys.saturating_sub(place.elsewhere(number)).saturating_sub(target.ledger.bound());
        target.ledger.reserve(1);
        // A copy carries its life with it; one that has none predates the tier.
        let cap = match (moves, target.alone) {
            (true, _) => u64::MAX >> 12,
            (false, true) => limits.keys.saturating_sub(place.elsewhere(number)),
            (false, false) => left,
        };
        let script = if target.alone {
            "redis.call('SELECT',ARGV[2]) \
             local new=redis.call('EXISTS',KEYS[2])==0 \
             if new and redis.call('DBSIZE')>=tonumber(ARGV[3]) then return redis.error_reply(ARGV[6]) end \
             redis.call('SELECT',ARGV[1]) \
             local r \
             if ARGV[4]=='1' then r=redis.call('COPY',KEYS[1],KEYS[2],'DB',ARGV[2],'REPLACE') \
             else r=redis.call('COPY',KEYS[1],KEYS[2],'DB',ARGV[2]) end \
             if r==1 and ARGV[5]=='1' then redis.call('UNLINK',KEYS[1]) end \
             return r"
        } else {
            "if redis.call('EXISTS',KEYS[2])==0 and tonumber(ARGV[3])<1 then return redis.error_reply(ARGV[6]) end \
             local r \
             if ARGV[4]=='1' then r=redis.call('COPY',KEYS[1],KEYS[2],'REPLACE') \
             else r=redis.call('COPY',KEYS[1],KEYS[2]) end \
             if r==1 and ARGV[5]=='1' then redis.call('UNLINK',KEYS[1]) end \
             return r"
        };
        let words: Vec<Vec<u8>> = vec![
            b"EVAL".to_vec(),
            script.into(),
            b"2".to_vec(),
            [&source.prefix, from].concat(),
            [&target.prefix, to].concat(),
            source.index.to_string().into(),
            target.index.to_string().into(),
            cap.to_string().into(),
            if replace { b"1".to_vec() } else { b"0".to_vec() },
            if moves { b"1".to_vec() } else { b"0".to_vec() },
            refuse::oom(&format!("{} of {} keys of tier {tier}", limits.keys, limits.keys)).into(),
        ];
        let mut request = Vec::new();
        put_request(&mut request, &words.iter().map(Vec::as_slice).collect::<Vec<_>>());
        self.relay(source.index, &request, Shape::Raw, &source.prefix.clone()).await;
        target.ledger.done(1);
    }

    /// SWAPDB between two of the tenant's databases: every key is renamed into the other's prefix and the databases
    /// change places, in one script, so that nobody sees it half done.
    pub(super) async fn swap(&mut self, held: &Held) {
        let mut databases = Vec::new();
        for (arg, which) in held.args[1..].iter().zip(["first", "second"]) {
            let Some(number) = keys::number(arg.of(&held.bytes)) else {
                return self.fail(&format!("ERR invalid {which} DB index"));
            };
            let Some(tenancy) = &self.tenancy else { return };
            match u32::try_from(number) {
                Ok(number) if number < DATABASES => match tenancy.place.open(number).await {
                    Ok(database) => databases.push(database),
                    Err(_) => return self.refuse(&Refusal::UpstreamDown),
                },
                _ => return self.fail("ERR DB index is out of range"),
            }
        }
        let [one, two] = &databases[..] else { return };
        if !one.alone {
            return self.fail("ERR SWAPDB is not possible on a server with a single database");
        }
        if one.number == two.number {
            return self.say(b"+OK\r\n");
        }
        let script = "local n=0 for i=1,2 do redis.call('SELECT',ARGV[i]) n=n+redis.call('DBSIZE') end \
             if n>tonumber(ARGV[5]) then return redis.error_reply(ARGV[6]) end \
             for i=1,2 do redis.call('SELECT',ARGV[i]) \
             for _,k in ipairs(redis.call('KEYS','*')) do \
             redis.call('RENAME',k,ARGV[5-i]..string.sub(k,#ARGV[i+2]+1)) end end \
             redis.call('SWAPDB',ARGV[1],ARGV[2]) return redis.status_reply('OK')";
        let words: Vec<Vec<u8>> = vec![
            b"EVAL".to_vec(),
            script.into(),
            b"0".to_vec(),
            one.index.to_string().into(),
            two.index.to_string().into(),
            one.prefix.to_vec(),
            two.prefix.to_vec(),
            SWAP_MAX_KEYS.to_string().into(),
            format!("ERR SWAPDB is for databases of at most {SWAP_MAX_KEYS} keys together").into(),
        ];
        let mut request = Vec::new();
        put_request(&mut request, &words.iter().map(Vec::as_slice).collect::<Vec<_>>());
        self.relay(0, &request, Shape::Raw, &one.prefix).await;
        self.count().await;
        self.counted = false;
    }

    /// Empties all of the tenant's logical databases, and nothing else.
    pub(super) async fn flush_all(&mut self, held: &Held) {
        let mode = match held.args.get(1).map(|arg| arg.of(&held.bytes).to_ascii_uppercase()) {
            None => "SYNC",
            Some(word) if word == b"ASYNC" && held.args.len() == 2 => "ASYNC",
            Some(word) if word == b"SYNC" && held.args.len() == 2 => "SYNC",
            Some(_) => return self.fail("ERR syntax error"),
        };
        let Some(tenancy) = &self.tenancy else { return };
        let place = Arc::clone(&tenancy.place);
        for database in place.all() {
            if !database.alone {
                database.ledger.shrink();
                if let Err(error) = place.empty(&database).await {
                    tracing::warn!(%error, "FLUSHALL failed");
                    return self.fail(crate::upstream::redis::link::LOST);
                }
                continue;
            }
            let mut request = Vec::new();
            put_request(&mut request, &[b"FLUSHDB", mode.as_bytes()]);
            if let Err(error) = place.as_platform(database.index, &request).await {
                tracing::warn!(%error, "FLUSHALL failed");
                return self.fail(crate::upstream::redis::link::LOST);
            }
        }
        let mut reply = Vec::new();
        put_status(&mut reply, "OK");
        self.say(&reply);
    }
}

/// Nulls of the platform's RESP2 connection as RESP3 writes them. None of the commands that run there has a reply
/// with any other difference.
fn to_three(reply: &[u8]) -> Vec<u8> {
    use crate::wire::resp::{Cursor, Item};
    let mut out = Vec::with_capacity(reply.len());
    let mut cursor = Cursor { rest: reply };
    while let Some(item) = cursor.item() {
        match item {
            Item::Bulk(bytes) => put_bulk(&mut out, bytes),
            Item::Many(mark, count) => put_head(&mut out, mark, count),
            Item::Other(b"$-1\r\n" | b"*-1\r\n") => out.extend_from_slice(b"_\r\n"),
            Item::Other(bytes) => out.extend_from_slice(bytes),
        }
    }
    out
}
