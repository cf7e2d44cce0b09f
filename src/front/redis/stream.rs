//! Large commands, sent on in pieces.
//!
//! A command that announces more than [`STREAM_BYTES`] is not waited for. If its one key stands before the large part
//! (`SET`, `APPEND`, `HSET`, `XADD`, `RPUSH`, `RESTORE`, `PUBLISH` …), all that has to be known of it is known:
//! - [`Client::streams`] looks whether it is such a command;
//! - [`Client::stream`] takes a connection of the client's own, so that nobody shares what is half written;
//! - [`Burst::begin`] decides about rate, keys and memory by what is announced, and writes the beginning with the key
//!   inside the prefix: as it is, or after `MULTI` with `EXPIRE … LT` and `EXEC` to come, or as a call of the guard;
//! - the rest goes through as it comes, read no faster than the server takes it; each further argument is added to the
//!   tenant's memory when its header comes;
//! - [`Burst::finish`] writes what comes behind it, and only then is a reply expected.
//!
//! Invariants: the server has not got a command's last byte before all of its bytes were found to be well-formed. A
//! connection with a half-written command is never used again: if the client leaves, breaks the protocol or exceeds its
//! memory, the connection is closed, and the server runs nothing. A refused command is read to its end and dropped,
//! so that the client's connection lives on.
//!
//! Held whole, as small commands are, and then within [`held`](crate::upstream::redis::held): commands inside `MULTI`
//! (at most [`TRANSACTION_MAX_BYTES`](super::client::TRANSACTION_MAX_BYTES) each time), those of several keys (`MSET`),
//! scripts' arguments, blocking commands, a key that is itself large, and everything while half of the tenant's
//! connections are in use.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::Poll,
};

use super::{
    client::{Client, Own, Step},
    commands::{Keys, Made, Policy, Row, TTL, find},
    memory, refuse,
    request::{Burst, Care, GUARDED_ARGS_MAX},
    rewrite::{header_len, put_rewritten, put_rewritten_from},
    script,
};
use crate::{
    quota::clock,
    refusal::Refusal,
    tenant::{OverRate, Protocol},
    upstream::redis::{
        Version,
        ledger::Ledger,
        link::How,
        reply::{Shape, Transaction},
    },
    wire::resp::{Arg, put_array, put_bulk, put_bulk_joined, put_request},
};

/// Bytes from which on a command is sent on in pieces.
pub const STREAM_BYTES: usize = 1 << 20;

/// Bytes of a streamed command that wait for the server before no more of it is read.
const AHEAD_BYTES: usize = 256 << 10;

/// What a command counts in the ledger while it is under way: keys and bytes. Given back when dropped.
struct Reserved {
    ledger: Arc<Ledger>,
    keys: u64,
    bytes: u64,
}

impl Reserved {
    /// Counts more bytes.
    fn grow(&mut self, bytes: u64) {
        let bytes = memory::allocated(bytes);
        self.bytes += bytes;
        self.ledger.flowing.fetch_add(bytes, Ordering::Relaxed);
    }

    /// It is complete: the bytes are written, and the connection says when the keys are done.
    fn complete(mut self) -> u64 {
        self.ledger.written.fetch_add(self.bytes, Ordering::Relaxed);
        std::mem::take(&mut self.keys)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.ledger.flowing.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.keys > 0 {
            self.ledger.done(self.keys);
        }
    }
}

/// A command that is begun.
pub struct Begun {
    row: &'static Row,
    reserved: Reserved,
    behind: Behind,
}

/// What comes behind a command.
enum Behind {
    /// Nothing.
    Nothing,
    /// `EXPIRE key seconds LT` and `EXEC`.
    Expire(Vec<u8>),
    /// Nothing, and the reply tells how many keys were created.
    Learn,
}

/// The row of a command that may be streamed, as far as its first arguments tell.
fn row(bytes: &[u8], args: &[Arg], total: usize) -> Option<&'static Row> {
    let row = find(args.first()?.of(bytes), None)?;
    let fits = row.fits(total) && args.len() >= 2;
    let plain = match row.name {
        // What they make depends on numbers that may still be to come.
        "setbit" | "bitfield" | "bitfield_ro" => false,
        "setrange" => args.len() >= 3,
        _ => row.policy == Policy::Publish || row.policy == Policy::Forward && row.keys == Keys::At1,
    };
    (fits && plain).then_some(row)
}

impl Burst<'_> {
    /// Writes the beginning (`bytes`, up to a payload or a header) of a large command that has `total` arguments and
    /// announces `weight` bytes so far; `None` when it was refused.
    fn begin(
        &mut self,
        row: &'static Row,
        bytes: &[u8],
        args: &[Arg],
        total: usize,
        weight: u64,
    ) -> Result<Option<Begun>, Step> {
        if self.state.is_none() {
            return Err(Step::Close);
        }
        let Some(tenancy) = &self.client.tenancy else { return Err(Step::Close) };
        let database = Arc::clone(&tenancy.database);
        let policy = tenancy.session.slot().policy();
        self.commands += 1;
        if let Err(over) = tenancy.session.take(1) {
            let rate = &policy.limits.redis.rate;
            let wait = over.retry_after.unwrap_or_default();
            if rate.over == OverRate::Delay && wait <= rate.max_delay {
                self.commands -= 1;
                return Err(Step::Delay(wait));
            }
            self.reject(&refuse::render(&Refusal::OverLimit(over)).0);
            return Ok(None);
        }
        let creates = u64::from(row.made != Made::None);
        let weight = weight + memory::amplified(row, args, bytes);
        let care = if creates == 0 && row.flags & (super::commands::GROW | TTL) == 0 {
            Care::None
        } else {
            self.client.request_args = total;
            match self.care(row, usize::from(row.made != Made::None), weight, true, &policy.limits.redis)? {
                Some(care) => care,
                None => return Ok(None),
            }
        };
        let mut reserved = Reserved { ledger: Arc::clone(&database.ledger), keys: creates, bytes: 0 };
        if row.grows() {
            reserved.grow(weight);
        }
        let learns = matches!(care, Care::Guard(..));
        if !database.alone && row.writes() && !(learns && creates > 0) {
            database.ledger.shrink();
        }
        let prefix = if row.policy == Policy::Publish { &database.channels } else { &database.prefix };
        let lost = database.ledger.scripts_lost.load(Ordering::Relaxed);
        let Some(state) = &mut self.state else { return Err(Step::Close) };
        let behind = match care {
            Care::None => {
                put_rewritten(&mut state.out, bytes, args, &[1], prefix);
                Behind::Nothing
            }
            Care::Expire(ttl) => {
                state.out.extend_from_slice(b"*1\r\n$5\r\nMULTI\r\n");
                state.expect(&self.client.outbox, 1, 0, How::Discard);
                self.sent += 1;
                put_rewritten(&mut state.out, bytes, args, &[1], prefix);
                let mut end = Vec::new();
                put_array(&mut end, 4);
                put_bulk(&mut end, b"EXPIRE");
                put_bulk_joined(&mut end, prefix, args[1].of(bytes));
                put_bulk(&mut end, ttl.to_string().as_bytes());
                put_bulk(&mut end, b"LT");
                end.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
                Behind::Expire(end)
            }
            Care::Guard(cap, _) if total + 1 > GUARDED_ARGS_MAX => {
                self.count_keys();
                self.reject(&refuse::oom(&format!("nearly all of {cap} keys")));
                return Ok(None);
            }
            Care::Guard(cap, ttl) => {
                let script = if database.alone { script::guard() } else { script::learning_guard() };
                if state.must_load(&script.sha, lost) {
                    put_request(&mut state.out, &[b"SCRIPT", b"LOAD", &script.text]);
                    state.expect(&self.client.outbox, 1, 0, How::Discard);
                    self.sent += 1;
                }
                let out = &mut state.out;
                put_array(out, 7 + total);
                put_bulk(out, b"EVALSHA");
                put_bulk(out, &script.sha);
                put_bulk(out, b"1");
                put_bulk_joined(out, prefix, args[1].of(bytes));
                put_bulk(out, cap.to_string().as_bytes());
                put_bulk(out, ttl.to_string().as_bytes());
                put_bulk(out, if self.client.version == Version::Three { b"3" } else { b"2" });
                put_rewritten_from(out, header_len(total), bytes, args, &[1], prefix);
                if database.alone { Behind::Nothing } else { Behind::Learn }
            }
        };
        state.partial = true;
        Ok(Some(Begun { row, reserved, behind }))
    }

    /// Writes the last piece and what comes behind it; the reply is expected from here on.
    fn finish(&mut self, last: &[u8], begun: Begun) -> bool {
        let Some(state) = &mut self.state else { return false };
        state.out.extend_from_slice(last);
        state.partial = false;
        let creates = begun.reserved.complete();
        let shape = begun.row.reply;
        match begun.behind {
            Behind::Nothing => {
                let how = if shape == Shape::Raw { How::Raw } else { How::Strip(shape) };
                self.expect(1, creates, how);
            }
            Behind::Expire(end) => {
                state.out.extend_from_slice(&end);
                let elements = vec![Some(shape), None];
                let transaction = Transaction { acks: 2, elements, single: true, refused: None };
                self.expect(3, creates, How::Transaction(Box::new(transaction)));
            }
            Behind::Learn => self.expect(1, creates, How::Learn(creates)),
        }
        self.count_keys();
        true
    }
}

impl Client {
    /// Whether the unfinished command at the start of `bytes` is to be sent on in pieces.
    pub(super) fn streams(&self, bytes: &[u8]) -> bool {
        self.request.wanted() > STREAM_BYTES
            && !self.whole
            && self.tenancy.is_some()
            && self.queue.is_none()
            && (self.version == Version::Three || self.subscriptions.count() == 0)
            && row(bytes, &self.request.args, self.request.announced()).is_some()
    }

    /// Takes a connection of our own, if one can be had now.
    pub(super) async fn lend(&mut self) -> bool {
        if self.own.is_some() {
            return true;
        }
        let Some(tenancy) = &self.tenancy else { return false };
        let slot = tenancy.session.slot();
        // Those that block, watch or listen can't do without one: half of the tenant's are theirs.
        if slot.connections(Protocol::Redis) >= slot.policy().limits.redis.connections / 2 {
            return false;
        }
        let Some(permit) = slot.connection(Protocol::Redis) else { return false };
        match tenancy.place.dedicated(&tenancy.database, self.version, &self.outbox).await {
            Ok(link) => {
                self.own = Some(Own { link, version: self.version, _permit: permit });
                true
            }
            Err(error) => {
                tracing::debug!(%error, "no connection for large values");
                false
            }
        }
    }

    /// Sends the unfinished command in `carry` on in pieces; nothing is outstanding.
    pub(super) async fn stream(&mut self) {
        self.outbox.widen(clock::now_ms());
        if !self.lend().await {
            self.whole = true;
            return;
        }
        let mut carry = std::mem::take(&mut self.carry);
        let (head, mut rest) = self.request.rest();
        let mut charged = rest.announced;
        let mut begun = match self.begin(&carry[..head]).await {
            Ok(begun) => begun,
            Err(()) => {
                self.closing = true;
                return self.cut();
            }
        };
        carry.drain(..head);
        loop {
            let (used, done) = match rest.advance(&carry) {
                Ok(walked) => walked,
                Err(fault) => {
                    drop(begun);
                    self.cut();
                    self.fail(&format!("ERR Protocol error: {}", fault.0));
                    self.closing = true;
                    return;
                }
            };
            let more = rest.announced - charged;
            charged = rest.announced;
            if more > 0
                && let Some(under_way) = begun.as_mut().filter(|begun| begun.row.grows())
            {
                if self.has_room(more).await {
                    under_way.reserved.grow(more);
                } else {
                    begun = None;
                    self.abandon();
                }
            }
            if begun.is_some() && !self.pass(&carry[..used], done, &mut begun) {
                self.ended = true;
                return;
            }
            carry.drain(..used);
            if done {
                break;
            }
            if !self.more(&mut carry, begun.is_some()).await {
                drop(begun);
                return self.cut();
            }
        }
        self.request.reset();
        self.resume = !carry.is_empty();
        self.carry = carry;
        if self.drained().await {
            self.outbox.widen(clock::now_ms());
            self.release_if_free();
        }
    }

    /// Begins it; an error when the connection can't be kept.
    async fn begin(&mut self, head: &[u8]) -> Result<Option<Begun>, ()> {
        let args = std::mem::take(&mut self.request.args);
        let total = self.request.announced() + args.len();
        let weight = self.request.wanted() as u64;
        let Some(row) = row(head, &args, total) else { return Err(()) };
        loop {
            match self.try_begin(row, head, &args, total, weight) {
                Ok(begun) => return Ok(begun),
                Err(Step::Measure) => self.measure().await,
                Err(Step::Count) => self.count().await,
                Err(Step::Delay(time)) => tokio::time::sleep(time).await,
                Err(
                    Step::More | Step::Wait | Step::Held(_) | Step::Connect | Step::Close | Step::Stream | Step::Own,
                ) => {
                    return Err(());
                }
            }
        }
    }

    fn try_begin(
        &mut self,
        row: &'static Row,
        head: &[u8],
        args: &[Arg],
        total: usize,
        weight: u64,
    ) -> Result<Option<Begun>, Step> {
        let link = self.current();
        let mut burst = Burst::new(self, link.as_ref());
        let result = burst.begin(row, head, args, total, weight);
        burst.end();
        result
    }

    /// Passes a piece on, the last with what comes behind it; false when the connection is lost.
    fn pass(&mut self, bytes: &[u8], done: bool, begun: &mut Option<Begun>) -> bool {
        let Some(link) = self.current() else { return false };
        if done {
            let Some(begun) = begun.take() else { return false };
            let mut burst = Burst::new(self, Some(&link));
            let finished = burst.finish(bytes, begun);
            burst.end();
            return finished;
        }
        match link.lock() {
            Some(mut state) => state.out.extend_from_slice(bytes),
            None => return false,
        }
        link.wake();
        true
    }

    /// Whether what a further argument announces fits the tenant's memory.
    async fn has_room(&mut self, bytes: u64) -> bool {
        for measured in [false, true] {
            let Some(tenancy) = &self.tenancy else { return false };
            let max = tenancy.session.slot().policy().limits.redis.memory;
            if tenancy.place.memory().saturating_add(bytes) <= max {
                return true;
            }
            if !measured {
                self.measure().await;
            }
        }
        false
    }

    /// Refuses a command that turned out not to fit. Its rest is dropped, unless the connection held more than it.
    fn abandon(&mut self) {
        let held = self.watching || self.tracking.is_some();
        self.cut();
        let Some(tenancy) = &self.tenancy else { return };
        let policy = tenancy.session.slot().policy();
        let (max, in_use) = (policy.limits.redis.memory, tenancy.place.memory());
        let tier = policy.tenant.tier;
        drop(policy);
        let limit = crate::refusal::Limit::Memory;
        self.refuse(&Refusal::OverLimit(crate::refusal::Over { limit, tier, max, in_use, retry_after: None }));
        self.closing |= held;
    }

    /// Closes the connection that has half a command; the server drops that.
    fn cut(&mut self) {
        if let Some(own) = self.own.take() {
            own.link.part();
        }
    }

    /// Reads more of the command once the server took enough of it; false when the client is to be let go.
    async fn more(&mut self, carry: &mut Vec<u8>, sending: bool) -> bool {
        let link = if sending { self.current() } else { None };
        poll_fn(|cx| {
            self.outbox.register(cx);
            if self.must_stop(cx) {
                return Poll::Ready(false);
            }
            if self.flush(cx).is_err() || self.outbox.lock().lost {
                self.ended = true;
                return Poll::Ready(false);
            }
            if let Some(link) = &link {
                let Some(mut state) = link.lock() else {
                    self.ended = true;
                    return Poll::Ready(false);
                };
                if state.is_over(AHEAD_BYTES, &self.outbox) {
                    return Poll::Pending;
                }
            }
            match self.read_into(cx, carry) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Ok(())) => Poll::Ready(true),
                Poll::Ready(Err(_)) => {
                    self.ended = true;
                    Poll::Ready(false)
                }
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::resp::{ARGS_MAX, BULK_MAX, Request};

    /// Whether a command whose last argument is large and still to come would be streamed.
    fn streamed(words: &[&str]) -> bool {
        let mut bytes = Vec::new();
        put_request(&mut bytes, &words.iter().map(|word| word.as_bytes()).collect::<Vec<_>>());
        let mut head = bytes[words.len().to_string().len() + 3..].to_vec();
        let mut whole = format!("*{}\r\n", words.len() + 1).into_bytes();
        whole.append(&mut head);
        whole.extend_from_slice(b"$100000000\r\nxxx");
        let mut request = Request::default();
        request.advance(&whole, ARGS_MAX, BULK_MAX).expect("valid");
        assert!(request.wanted() > STREAM_BYTES);
        row(&whole, &request.args, request.announced()).is_some()
    }

    #[test]
    fn only_commands_whose_names_and_limits_are_known_at_once_are_streamed() {
        for line in
            ["SET k", "append k", "HSET k f", "XADD k * f", "SETEX k 10", "PUBLISH c", "SETRANGE k 5", "LPUSH k"]
        {
            assert!(streamed(&line.split(' ').collect::<Vec<_>>()), "{line}");
        }
        for line in
            ["SET", "GET k", "MSET k", "SETRANGE k", "BITFIELD k SET u8 0", "EVAL s 1 k", "NOPE k", "ECHO", "BLPOP k"]
        {
            assert!(!streamed(&line.split(' ').collect::<Vec<_>>()), "{line}");
        }
    }
}
