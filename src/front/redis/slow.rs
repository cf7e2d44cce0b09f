//! Commands that need more than a look at the table: logging in, other databases, connections of one's own. All
//! earlier commands are answered when one of these runs, and no later one is taken before it is done.

use std::sync::Arc;

use super::{
    client::{Client, Held, Own, Replies, Step, Tenancy},
    commands::Policy,
    emulate, keys,
    refuse::{self, After},
    registry::Card,
    request::Burst,
};
use crate::{
    quota::clock,
    refusal::{Limit, Over, Refusal, TokenFault},
    session::Session,
    tenant::{DEFAULT_NAME, Protocol},
    upstream::redis::{DATABASES, Version},
    wire::resp::{put_array, put_bulk, put_error, put_head, put_integer},
};

/// Longest name of a client in bytes: its tenant's other clients see it.
const CLIENT_NAME_MAX_BYTES: usize = 1 << 10;

/// What is said of a name that may not be one.
pub(super) const BAD_NAME: &str = "ERR Client names cannot contain spaces, newlines or special characters.";

impl Client {
    /// Runs a held command; nothing is outstanding.
    pub(super) async fn slow(&mut self, held: Held) {
        if let Some(card) = &self.card {
            card.words.lock().command = held.row.name;
        }
        match (held.row.policy, held.row.name) {
            (_, "auth") => self.auth(&held).await,
            (_, "hello") => self.hello(&held).await,
            (_, "quit") => {
                self.say_always(b"+OK\r\n");
                self.closing = true;
            }
            (_, "reset") => self.reset(),
            (_, "select") => self.select(&held).await,
            (_, _) if emulate::is_whole(held.row) => self.emulate(&held).await,
            (_, "client|tracking") => self.track(&held).await,
            (_, "client|caching") => self.caching(&held),
            (_, "client|trackinginfo") => self.tracking_info(),
            (Policy::Block | Policy::Watch, _) => {
                if self.acquire().await {
                    self.again(held).await;
                }
            }
            (Policy::Subscribe, _) => self.subscribe(&held).await,
            (Policy::Pubsub, "pubsub|numpat") => self.numpat(),
            (Policy::Pubsub | Policy::Sort, _) => self.by_platform(&held).await,
            (Policy::Service, "copy") => self.copy(&held).await,
            (Policy::Service, "move") => self.move_key(&held).await,
            (Policy::Service, "swapdb") => self.swap(&held).await,
            (Policy::Service, "flushall") => self.flush_all(&held).await,
            (Policy::Service, name) if name.starts_with("function|") => self.functions(&held).await,
            _ => self.answer(&held).await,
        }
    }

    pub(super) fn fail(&mut self, text: &str) {
        let mut bytes = Vec::new();
        put_error(&mut bytes, text);
        self.say(&bytes);
    }

    pub(super) fn refuse(&mut self, refusal: &Refusal) {
        let (text, after) = refuse::render(refusal);
        tracing::debug!(conn = self.id, peer = %self.peer, reason = refusal.kind(), "refused");
        self.fail(&text);
        if after == After::Close {
            self.closing = true;
        }
    }

    async fn auth(&mut self, held: &Held) {
        let words: Vec<&[u8]> = held.args[1..].iter().map(|arg| arg.of(&held.bytes)).collect();
        let (user, credential) = match words[..] {
            [credential] => (None, credential),
            [user, credential] => (Some(user), credential),
            _ => return self.fail("ERR syntax error"),
        };
        match self.log_in(user, credential).await {
            Ok(()) => self.say(b"+OK\r\n"),
            Err(refusal) => self.refuse(&refusal),
        }
    }

    /// Logs in, or renews the credential of the present login.
    async fn log_in(&mut self, user: Option<&[u8]>, credential: &[u8]) -> Result<(), Refusal> {
        self.server.gate.may_carry(self.transport)?;
        if self.server.drain.is_draining() {
            return Err(Refusal::Draining);
        }
        let server = Arc::clone(&self.server);
        if let Some(tenancy) = &mut self.tenancy {
            if server.gate.renew(&mut tenancy.session, credential).await? {
                return may_use(&tenancy.session, user);
            }
            if self.own.is_some() || self.subscriber.is_some() {
                return Err(Refusal::Forbidden { what: "auth" });
            }
        }
        let session = server.gate.admit(credential, Protocol::Redis).await?;
        may_use(&session, user)?;
        let tenant = Arc::clone(&session.slot().policy().tenant);
        let place = server.upstream.place(&tenant.org, tenant.generation);
        let database = place.open(0).await.map_err(|error| {
            tracing::warn!(%error, "a tenant's place in Redis can't be opened");
            Refusal::UpstreamDown
        })?;
        self.forget();
        let card = Arc::new(Card {
            id: self.id,
            peer: self.peer,
            since_ms: clock::now_ms(),
            words: Default::default(),
            database: 0.into(),
            version: (self.version as u32).into(),
            patterns: 0.into(),
            channels: 0.into(),
            subscriber: 0.into(),
            seen_ms: clock::now_ms().into(),
            killed: false.into(),
            outbox: Arc::clone(&self.outbox),
        });
        server.registry.enter(&tenant.org, Arc::clone(&card));
        self.share.join(&place.held);
        self.outbox.join(&place.held);
        self.card = Some(card);
        self.unauthenticated = None;
        self.tenancy = Some(Tenancy { session, place, database });
        Ok(())
    }

    /// Drops everything that belongs to a login.
    fn forget(&mut self) {
        self.drop_queue();
        if let (Some(card), Some(tenancy)) = (self.card.take(), self.tenancy.take()) {
            self.server.registry.leave(&tenancy.session.identity().org, card.id);
        }
        if let Some(own) = self.own.take() {
            own.link.part();
        }
        self.tracking = None;
        self.end_subscriptions();
        self.shared = None;
        self.watching = false;
        self.watched = 0;
        self.replies = Replies::On;
    }

    /// As Redis: nothing is left of the session, not even the login.
    fn reset(&mut self) {
        self.forget();
        self.version = Version::Two;
        self.say_always(b"+RESET\r\n");
    }

    async fn hello(&mut self, held: &Held) {
        let word = |i: usize| held.args.get(i).map(|arg| arg.of(&held.bytes));
        let version = match word(1).map(keys::number) {
            None => self.version,
            Some(Some(2)) => Version::Two,
            Some(Some(3)) => Version::Three,
            Some(Some(_)) => return self.fail("NOPROTO unsupported protocol version"),
            Some(None) => return self.fail("ERR Protocol version is not an integer or out of range"),
        };
        let mut login = None;
        let mut name = None;
        let mut at = 2;
        while let Some(option) = word(at) {
            let left = held.args.len() - at - 1;
            if option.eq_ignore_ascii_case(b"AUTH") && left >= 2 {
                login = word(at + 1).zip(word(at + 2));
                at += 3;
            } else if option.eq_ignore_ascii_case(b"SETNAME") && left >= 1 {
                name = word(at + 1);
                at += 2;
            } else {
                let text = String::from_utf8_lossy(option).into_owned();
                return self.fail(&format!("ERR Syntax error in HELLO option '{text}'"));
            }
        }
        // Nothing is changed by a command that fails.
        if name.is_some_and(|name| !is_client_name(name)) {
            return self.fail(BAD_NAME);
        }
        if let Some((user, credential)) = login
            && let Err(refusal) = self.log_in(Some(user), credential).await
        {
            return self.refuse(&refusal);
        }
        if self.tenancy.is_none() {
            return self.fail(
                "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH \
                 <user> <pass> option can be used to authenticate the client and select the RESP protocol version at \
                 the same time",
            );
        }
        if let Some(name) = name {
            self.set_name(name);
        }
        if version != self.version {
            if self.subscriptions.count() > 0 {
                return self.fail("ERR the protocol can't be changed while subscribed");
            }
            if self.tracking.is_some() {
                return self.fail("ERR the protocol can't be changed while tracking is on");
            }
            self.version = version;
            self.shared = None;
            self.release();
            self.note(|card| &card.version, version as usize);
        }
        let server = self.server.upstream.version().to_owned();
        let mut reply = Vec::new();
        match version {
            Version::Two => put_array(&mut reply, 14),
            Version::Three => put_head(&mut reply, b'%', 7),
        }
        for (key, value) in [("server", "redis"), ("version", &server)] {
            put_bulk(&mut reply, key.as_bytes());
            put_bulk(&mut reply, value.as_bytes());
        }
        put_bulk(&mut reply, b"proto");
        put_integer(&mut reply, version as i64);
        put_bulk(&mut reply, b"id");
        put_integer(&mut reply, i64::try_from(self.id).unwrap_or(i64::MAX));
        for (key, value) in [("mode", "standalone"), ("role", "master")] {
            put_bulk(&mut reply, key.as_bytes());
            put_bulk(&mut reply, value.as_bytes());
        }
        put_bulk(&mut reply, b"modules");
        put_array(&mut reply, 0);
        self.say(&reply);
    }

    /// Gives the client a name; false when it may not be one.
    pub(super) fn set_name(&mut self, name: &[u8]) -> bool {
        if !is_client_name(name) {
            return false;
        }
        if let Some(card) = &self.card {
            card.words.lock().name = String::from_utf8_lossy(name).into_owned();
        }
        true
    }

    async fn select(&mut self, held: &Held) {
        let Some(number) = keys::number(held.args[1].of(&held.bytes)) else {
            return self.fail("ERR value is not an integer or out of range");
        };
        let number = match u32::try_from(number) {
            Ok(number) if number < DATABASES => number,
            _ => return self.fail("ERR DB index is out of range"),
        };
        if self.watching {
            return self.fail("ERR SELECT is not possible while keys are watched");
        }
        if self.tracking.is_some() {
            return self.fail("ERR SELECT is not possible while tracking is on");
        }
        let Some(tenancy) = &mut self.tenancy else { return };
        match tenancy.place.open(number).await {
            Ok(database) => {
                // The connection of our own stands in the other database.
                if let Some(own) = self.own.take() {
                    tenancy.database.give_back(own.version, own.link);
                }
                tenancy.database = database;
                self.shared = None;
                self.note(|card| &card.database, number as usize);
                self.say(b"+OK\r\n");
            }
            Err(error) => {
                tracing::warn!(%error, "a logical database can't be opened");
                self.refuse(&Refusal::UpstreamDown);
            }
        }
    }

    /// Takes a connection of our own if there is none; false when the refusal was said.
    pub(super) async fn acquire(&mut self) -> bool {
        if self.own.is_some() {
            return true;
        }
        let Some(tenancy) = &self.tenancy else { return false };
        let Some(permit) = tenancy.session.slot().connection(Protocol::Redis) else {
            let refusal = self.no_connection();
            self.refuse(&refusal);
            return false;
        };
        match tenancy.place.dedicated(&tenancy.database, self.version, &self.outbox).await {
            Ok(link) => {
                self.own = Some(Own { link, version: self.version, _permit: permit });
                true
            }
            Err(error) => {
                tracing::warn!(%error, "no connection to Redis");
                self.refuse(&Refusal::UpstreamDown);
                false
            }
        }
    }

    pub(super) fn no_connection(&self) -> Refusal {
        let Some(tenancy) = &self.tenancy else { return Refusal::Internal };
        let slot = tenancy.session.slot();
        let policy = slot.policy();
        let max = policy.limits.redis.connections.into();
        let in_use = slot.connections(Protocol::Redis).into();
        Refusal::OverLimit(Over { limit: Limit::Connections, tier: policy.tenant.tier, max, in_use, retry_after: None })
    }

    /// Takes a held command once more through the fast path, now that it has its connection.
    async fn again(&mut self, held: Held) {
        loop {
            match self.try_again(&held) {
                Err(Step::Measure) => self.measure().await,
                Err(Step::Count) => self.count().await,
                Err(Step::Delay(time)) => tokio::time::sleep(time).await,
                Err(Step::Close) => {
                    self.closing = true;
                    return;
                }
                Ok(()) | Err(Step::More | Step::Wait | Step::Held(_) | Step::Connect | Step::Stream | Step::Own) => {
                    return;
                }
            }
        }
    }

    fn try_again(&mut self, held: &Held) -> Result<(), Step> {
        let link = self.current();
        self.request.args.clone_from(&held.args);
        let mut burst = Burst::new(self, link.as_ref());
        let result = burst.command(&held.bytes);
        burst.end();
        self.request.reset();
        result
    }
}

fn is_client_name(name: &[u8]) -> bool {
    name.len() <= CLIENT_NAME_MAX_BYTES && name.iter().all(|b| (b'!'..=b'~').contains(b))
}

/// Whether the logical user of a login is one that the credential may use.
fn may_use(session: &Session, user: Option<&[u8]>) -> Result<(), Refusal> {
    let Some(user) = user else { return Ok(()) };
    let user = std::str::from_utf8(user).unwrap_or_default();
    let tenant = Arc::clone(&session.slot().policy().tenant);
    let known = user == "default" || user.is_empty() || tenant.has_user(user);
    let only = session.identity().user.as_deref();
    let allowed = only.is_none_or(|only| user == only || user == "default" || user.is_empty() && only == DEFAULT_NAME);
    if known && allowed { Ok(()) } else { Err(Refusal::BadToken(TokenFault::UnknownServiceKey)) }
}
