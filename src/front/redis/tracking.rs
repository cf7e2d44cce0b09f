//! Client-side caching: `CLIENT TRACKING` and its kin.
//!
//! The server tracks what a connection reads, so a tracking client has a connection of its own for as long as tracking
//! is on. It is switched on by the platform's user before the connection becomes the tenant's: an ACL can't confine
//! `BCAST`, so tenants' users may not switch it on themselves, and every prefix is put inside the tenant's.

use std::sync::atomic::Ordering;

use super::client::{Client, Held, Own};
use crate::{
    refusal::Refusal,
    tenant::Protocol,
    upstream::redis::{
        Version,
        link::How,
        reply::{Shape, strip},
    },
    wire::resp::{put_array, put_bulk, put_bulk_joined, put_head, put_integer, put_request},
};

/// What the client asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tracking {
    bcast: bool,
    optin: bool,
    optout: bool,
    noloop: bool,
    /// The client that gets the invalidations; 0 is the one that asks.
    redirect: u64,
    prefixes: Vec<Vec<u8>>,
}

impl Tracking {
    /// Reads the options behind `ON`.
    fn parse(words: &[&[u8]]) -> Result<Self, &'static str> {
        let mut tracking = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match (word.to_ascii_uppercase().as_slice(), words.as_slice().first()) {
                (b"BCAST", _) => tracking.bcast = true,
                (b"OPTIN", _) => tracking.optin = true,
                (b"OPTOUT", _) => tracking.optout = true,
                (b"NOLOOP", _) => tracking.noloop = true,
                (b"PREFIX", Some(prefix)) => {
                    tracking.prefixes.push(prefix.to_vec());
                    words.next();
                }
                (b"REDIRECT", Some(id)) => {
                    let id = super::keys::number(id).and_then(|id| u64::try_from(id).ok());
                    tracking.redirect = id.ok_or("ERR Invalid client ID")?;
                    words.next();
                }
                _ => return Err("ERR syntax error"),
            }
        }
        if tracking.bcast && tracking.prefixes.is_empty() {
            tracking.prefixes.push(Vec::new());
        }
        Ok(tracking)
    }

    /// The command for the server; it says itself which options do not go together.
    fn request(&self, prefix: &[u8], redirect: i64) -> Vec<u8> {
        let flags = [(self.bcast, "BCAST"), (self.optin, "OPTIN"), (self.optout, "OPTOUT"), (self.noloop, "NOLOOP")];
        let flags: Vec<&str> = flags.into_iter().filter(|(on, _)| *on).map(|(_, word)| word).collect();
        let mut out = Vec::new();
        put_array(&mut out, 3 + flags.len() + 2 * self.prefixes.len() + if redirect > 0 { 2 } else { 0 });
        [&b"CLIENT"[..], b"TRACKING", b"ON"].iter().for_each(|word| put_bulk(&mut out, word));
        flags.iter().for_each(|word| put_bulk(&mut out, word.as_bytes()));
        for own in &self.prefixes {
            put_bulk(&mut out, b"PREFIX");
            put_bulk_joined(&mut out, prefix, own);
        }
        if redirect > 0 {
            put_bulk(&mut out, b"REDIRECT");
            put_bulk(&mut out, redirect.to_string().as_bytes());
        }
        out
    }
}

impl Client {
    /// `CLIENT TRACKING ON|OFF …`.
    pub(super) async fn track(&mut self, held: &Held) {
        let words: Vec<&[u8]> = held.args[2..].iter().map(|arg| arg.of(&held.bytes)).collect();
        let on = match words[0].to_ascii_uppercase().as_slice() {
            b"ON" => true,
            b"OFF" => false,
            _ => return self.fail("ERR syntax error"),
        };
        let wanted = match Tracking::parse(&words[1..]) {
            Ok(wanted) => wanted,
            Err(text) => return self.fail(text),
        };
        if self.watching {
            return self.fail("ERR CLIENT TRACKING is not possible while keys are watched");
        }
        match (on, &self.tracking) {
            (false, None) => return self.say(b"+OK\r\n"),
            (false, Some(_)) => {
                self.tracking = None;
                // The connection still tracks what it read: it is of no use for anything else.
                if let Some(own) = self.own.take() {
                    own.link.part();
                }
                return self.say(b"+OK\r\n");
            }
            (true, Some(present)) if *present == wanted => return self.say(b"+OK\r\n"),
            (true, Some(_)) => return self.fail("ERR tracking is on with other options: turn it off first"),
            (true, None) => {}
        }
        self.release();
        let Some(tenancy) = &self.tenancy else { return };
        let mut redirect = 0;
        if wanted.redirect > 0 {
            let cards = self.server.registry.of(&tenancy.session.identity().org);
            let listener = cards.iter().find(|card| card.id == wanted.redirect);
            redirect = listener.map_or(0, |card| card.subscriber.load(Ordering::Relaxed));
            if redirect == 0 {
                return self.fail("ERR The client ID you want redirect to does not exist or is not subscribed");
            }
        }
        let Some(permit) = tenancy.session.slot().connection(Protocol::Redis) else {
            let refusal = self.no_connection();
            return self.refuse(&refusal);
        };
        let request = wanted.request(&tenancy.database.prefix, redirect);
        match tenancy.place.tracking(&tenancy.database, self.version, &self.outbox, &request).await {
            Ok((Some(link), _)) => {
                self.own = Some(Own { link, version: self.version, _permit: permit });
                self.tracking = Some(wanted);
                self.say(b"+OK\r\n");
            }
            Ok((None, refused)) => {
                let mut out = Vec::new();
                strip(Shape::Raw, &refused, &tenancy.database.prefix, &mut out);
                self.say(&out);
            }
            Err(error) => {
                tracing::warn!(%error, "no connection to Redis");
                self.refuse(&Refusal::UpstreamDown);
            }
        }
    }

    /// `CLIENT CACHING YES|NO`, for the next command on the tracking connection.
    pub(super) fn caching(&mut self, held: &Held) {
        let link = self.own.as_ref().filter(|_| self.tracking.is_some()).map(|own| std::sync::Arc::clone(&own.link));
        let Some(link) = link else {
            return self.fail(
                "ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode \
                 enabled",
            );
        };
        let Some(mut state) = link.lock() else { return self.outbox.lose() };
        put_request(&mut state.out, &[b"CLIENT", b"CACHING", held.args[2].of(&held.bytes)]);
        state.expect(&self.outbox, 1, 0, How::Raw);
        self.outbox.lock().unanswered += 1;
        drop(state);
        link.wake();
    }

    /// `CLIENT TRACKINGINFO`.
    pub(super) fn tracking_info(&mut self) {
        let three = self.version == Version::Three;
        let mut out = Vec::new();
        if three {
            put_head(&mut out, b'%', 3)
        } else {
            put_array(&mut out, 6)
        }
        put_bulk(&mut out, b"flags");
        let none = Tracking::default();
        let (on, tracking) = self.tracking.as_ref().map_or((false, &none), |tracking| (true, tracking));
        let flags = [
            (!on, "off"),
            (on, "on"),
            (tracking.bcast, "bcast"),
            (tracking.optin, "optin"),
            (tracking.optout, "optout"),
            (tracking.noloop, "noloop"),
        ];
        let flags: Vec<&str> = flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag).collect();
        put_head(&mut out, if three { b'~' } else { b'*' }, flags.len());
        flags.iter().for_each(|flag| put_bulk(&mut out, flag.as_bytes()));
        put_bulk(&mut out, b"redirect");
        put_integer(&mut out, self.redirect());
        put_bulk(&mut out, b"prefixes");
        put_array(&mut out, tracking.prefixes.len());
        tracking.prefixes.iter().for_each(|prefix| put_bulk(&mut out, prefix));
        self.say(&out);
    }

    /// What `CLIENT GETREDIR` gives: -1 without tracking, 0 without redirection.
    pub(super) fn redirect(&self) -> i64 {
        self.tracking.as_ref().map_or(-1, |tracking| i64::try_from(tracking.redirect).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_is_inside_the_tenants() {
        let request = |line: &str| {
            let words: Vec<&[u8]> = line.split(' ').filter(|w| !w.is_empty()).map(str::as_bytes).collect();
            let tracking = Tracking::parse(&words)?;
            Ok(crate::upstream::redis::dial::strings(
                &tracking.request(b"org:a:", 7 * i64::from(tracking.redirect > 0)),
            )
            .join(" "))
        };
        assert_eq!(request(""), Ok("CLIENT TRACKING ON".to_owned()));
        assert_eq!(request("bcast"), Ok("CLIENT TRACKING ON BCAST PREFIX org:a:".to_owned()));
        assert_eq!(
            request("BCAST PREFIX x NOLOOP PREFIX y"),
            Ok("CLIENT TRACKING ON BCAST NOLOOP PREFIX org:a:x PREFIX org:a:y".to_owned())
        );
        assert_eq!(request("PREFIX x"), Ok("CLIENT TRACKING ON PREFIX org:a:x".to_owned()), "the server refuses it");
        assert_eq!(request("REDIRECT 3"), Ok("CLIENT TRACKING ON REDIRECT 7".to_owned()));
        assert_eq!(request("PREFIX"), Err("ERR syntax error"));
        assert_eq!(request("REDIRECT x"), Err("ERR Invalid client ID"));
    }
}
