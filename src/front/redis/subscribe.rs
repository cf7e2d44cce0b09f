//! Subscriptions: a connection of the client's own that brings nothing but messages.

use std::sync::atomic::Ordering;

use super::client::{Client, Held, Own, Subscriptions};
use crate::{
    refusal::Refusal,
    tenant::Protocol,
    upstream::redis::{
        DATABASES, Version,
        link::How,
        message::{INVALIDATE, Notice},
    },
    wire::resp::{put_array, put_bulk, put_head, put_integer},
};

/// Most names that one client listens to.
const SUBSCRIPTIONS_MAX: usize = 10_000;

/// Bytes of them: the server keeps every name, as we do.
const NAMES_MAX_BYTES: usize = 1 << 20;

/// A channel or pattern as the client names it, and as the server does.
struct Name {
    own: Box<[u8]>,
    upstream: Vec<u8>,
}

impl Client {
    /// Changes the client's subscriptions.
    pub(super) async fn subscribe(&mut self, held: &Held) {
        let Some(tenancy) = &self.tenancy else { return };
        let names: Vec<Box<[u8]>> = held.args[1..].iter().map(|arg| arg.of(&held.bytes).into()).collect();
        let subscribes = matches!(held.row.name, "subscribe" | "psubscribe" | "ssubscribe");
        let bytes = self.subscriptions.bytes() + names.iter().map(|name| name.len()).sum::<usize>();
        if subscribes && (self.subscriptions.count() + names.len() > SUBSCRIPTIONS_MAX || bytes > NAMES_MAX_BYTES) {
            return self.fail("ERR too many subscriptions");
        }
        if self.subscriber.is_none() {
            if !subscribes {
                return self.unsubscribed(held.row.name, &names);
            }
            let Some(permit) = tenancy.session.slot().connection(Protocol::Redis) else {
                let refusal = self.no_connection();
                return self.refuse(&refusal);
            };
            match tenancy.place.subscriber(self.version, &self.outbox).await {
                Ok(link) => {
                    if let Some(card) = &self.card {
                        card.subscriber.store(link.id(), Ordering::Relaxed);
                    }
                    self.subscriber = Some(Own { link, version: self.version, _permit: permit });
                }
                Err(error) => {
                    tracing::warn!(%error, "no connection to Redis");
                    return self.refuse(&Refusal::UpstreamDown);
                }
            }
        }
        let names = match self.named(held.row.name, names).await {
            Ok(names) => names,
            Err(refusal) => return self.refuse(&refusal),
        };
        self.change_subscriptions(held, &names);
        if self.drained().await && self.subscriptions.count() == 0 {
            self.close_subscriber();
        }
    }

    /// Names as the server shall know them: inside the tenant's prefix, or, for keyspace notifications, inside its
    /// databases.
    async fn named(&mut self, kind: &str, names: Vec<Box<[u8]>>) -> Result<Vec<Name>, Refusal> {
        let Some(tenancy) = &self.tenancy else { return Err(Refusal::Internal) };
        let prefix = tenancy.place.space.channel_prefix();
        let mut named = Vec::with_capacity(names.len());
        for own in names {
            let notice = Notice::parse(&own)
                .filter(|notice| notice.database < DATABASES && !matches!(kind, "ssubscribe" | "sunsubscribe"));
            let upstream = match notice {
                _ if &*own == INVALIDATE && matches!(kind, "subscribe" | "unsubscribe") => own.to_vec(),
                None => [&prefix, &*own].concat(),
                Some(notice) => {
                    let database = tenancy.place.open(notice.database).await.map_err(|error| {
                        tracing::warn!(%error, "a logical database can't be opened");
                        Refusal::UpstreamDown
                    })?;
                    if let Some(own) = &self.subscriber {
                        own.link.listen(database.index, database.number);
                    }
                    notice.upstream(database.index, &database.prefix)
                }
            };
            named.push(Name { own, upstream });
        }
        Ok(named)
    }

    /// Sends a change on and remembers it.
    fn change_subscriptions(&mut self, held: &Held, names: &[Name]) {
        let subscribes = matches!(held.row.name, "subscribe" | "psubscribe" | "ssubscribe");
        let set = match held.row.name {
            "subscribe" | "unsubscribe" => &mut self.subscriptions.channels,
            "psubscribe" | "punsubscribe" => &mut self.subscriptions.patterns,
            _ => &mut self.subscriptions.shards,
        };
        let confirmations = if names.is_empty() { set.len().max(1) } else { names.len() };
        if subscribes {
            set.extend(names.iter().map(|name| name.own.clone()));
        } else if names.is_empty() {
            set.clear();
        } else {
            names.iter().for_each(|name| {
                set.remove(&name.own);
            });
        }
        let (patterns, all) = (self.subscriptions.patterns.len(), self.subscriptions.count());
        self.note(|card| &card.patterns, patterns);
        self.note(|card| &card.channels, all - patterns);
        let Some(own) = &self.subscriber else { return };
        let Some(mut state) = own.link.lock() else { return self.outbox.lose() };
        put_array(&mut state.out, held.args.len());
        put_bulk(&mut state.out, held.row.name.as_bytes());
        names.iter().for_each(|name| put_bulk(&mut state.out, &name.upstream));
        state.expect(&self.outbox, confirmations, 0, How::Confirm);
        self.outbox.lock().unanswered += confirmations;
        drop(state);
        own.link.wake();
    }

    /// Forgets all subscriptions.
    pub(super) fn end_subscriptions(&mut self) {
        self.subscriptions = Subscriptions::default();
        self.close_subscriber();
    }

    /// Ends the subscriber's connection without losing the client.
    fn close_subscriber(&mut self) {
        if let Some(card) = &self.card {
            card.subscriber.store(0, Ordering::Relaxed);
        }
        if let Some(own) = self.subscriber.take() {
            own.link.part();
        }
    }

    /// The confirmations of an unsubscription from nothing.
    fn unsubscribed(&mut self, kind: &str, names: &[Box<[u8]>]) {
        let mut reply = Vec::new();
        let mut one = |name: Option<&[u8]>| {
            match self.version {
                Version::Two => put_array(&mut reply, 3),
                Version::Three => put_head(&mut reply, b'>', 3),
            }
            put_bulk(&mut reply, kind.as_bytes());
            match (name, self.version) {
                (Some(name), _) => put_bulk(&mut reply, name),
                (None, Version::Two) => reply.extend_from_slice(b"$-1\r\n"),
                (None, Version::Three) => reply.extend_from_slice(b"_\r\n"),
            }
            put_integer(&mut reply, 0);
        };
        match names {
            [] => one(None),
            names => names.iter().for_each(|name| one(Some(name))),
        }
        self.say(&reply);
    }

    /// `PUBSUB NUMPAT`, counted among the tenant's own clients.
    pub(super) fn numpat(&mut self) {
        let Some(tenancy) = &self.tenancy else { return };
        let cards = self.server.registry.of(&tenancy.session.identity().org);
        let patterns: u32 = cards.iter().map(|card| card.patterns.load(Ordering::Relaxed)).sum();
        let mut reply = Vec::new();
        put_integer(&mut reply, patterns.into());
        self.say(&reply);
    }
}
