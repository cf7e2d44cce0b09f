//! The books of one relayed socket: what its client was told, what of it holds a place, and which answers of ours are
//! due. No I/O.
//!
//! # Invariants
//! - Versions are the deployment's. We add only transitions from a version to itself, which change nothing.
//! - Nothing of ours goes out between two chunks: [`Books::due`] gives nothing then.
//! - A query that was refused is told so only after the version in which the client asked for it was confirmed.

use std::collections::{HashMap, HashSet, VecDeque, hash_map::Entry};

use crate::{
    quota::{Permit, Slot},
    wire::convex::{
        Kind, Prefix, Server, Version,
        write::{self, Outcome},
    },
};

use super::refuse::Words;

/// Refused queries that a socket may have, and answers of ours that may wait: a client that asks for more goes on
/// asking in spite of every answer.
const WAITING_MAX: usize = 10_000;

/// What of a query set's change did not go on.
#[derive(Debug)]
pub enum Told {
    /// A subscription was refused.
    Refused(u32, Words),
    /// The end of one that was refused before.
    Ended(u32),
}

/// What has to be told once a version was confirmed.
#[derive(Debug)]
struct Waiting {
    query_set: u32,
    told: Vec<Told>,
}

/// A client that can't be served further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault(pub &'static str);

/// The books.
#[derive(Debug, Default)]
pub struct Books {
    relayed: Version,
    chunks: Option<Prefix>,
    /// Where the client is could not be read from the last transition.
    lost: bool,
    live: HashMap<u32, Permit<Slot>>,
    refused: HashSet<u32>,
    calls: HashMap<(u8, u32), Option<Permit<Slot>>>,
    waiting: VecDeque<Waiting>,
    held: Vec<String>,
}

fn key(kind: Kind, request: u32) -> (u8, u32) {
    (u8::from(kind == Kind::Action), request)
}

impl Books {
    /// Where the client is.
    pub fn relayed(&self) -> &Version {
        &self.relayed
    }

    /// Subscriptions of this socket that went on.
    pub fn subscriptions(&self) -> usize {
        self.live.len()
    }

    /// Whether a frame of ours may go out now.
    pub fn between_frames(&self) -> bool {
        self.chunks.is_none()
    }

    /// Whether no call is under way.
    pub fn is_quiet(&self) -> bool {
        self.calls.is_empty()
    }

    /// A subscription went on.
    pub fn subscribed(&mut self, query: u32, place: Permit<Slot>) {
        self.refused.remove(&query);
        self.live.insert(query, place);
    }

    /// A subscription ends. False if it was refused and the deployment does not know of it.
    pub fn unsubscribe(&mut self, query: u32) -> bool {
        if self.refused.remove(&query) {
            return false;
        }
        self.live.remove(&query);
        true
    }

    /// A subscription was refused.
    pub fn refused(&mut self, query: u32) {
        self.refused.insert(query);
    }

    /// Notes what is to be told once `query_set` was confirmed.
    ///
    /// # Errors
    /// Too much is waiting.
    pub fn tell(&mut self, query_set: u32, told: Vec<Told>) -> Result<(), Fault> {
        if !told.is_empty() {
            self.waiting.push_back(Waiting { query_set, told });
        }
        let waiting: usize = self.waiting.iter().map(|it| it.told.len()).sum();
        if self.refused.len() > WAITING_MAX || waiting > WAITING_MAX {
            return Err(Fault("too many refused queries"));
        }
        Ok(())
    }

    /// Whether a call of that number is under way.
    pub fn is_called(&self, kind: Kind, request: u32) -> bool {
        self.calls.contains_key(&key(kind, request))
    }

    /// A call went on.
    pub fn called(&mut self, kind: Kind, request: u32, place: Option<Permit<Slot>>) {
        if let Entry::Vacant(vacant) = self.calls.entry(key(kind, request)) {
            vacant.insert(place);
        }
    }

    /// A call was refused.
    ///
    /// # Errors
    /// Too much is waiting.
    pub fn refuse_call(&mut self, kind: Kind, request: u32, words: &Words) -> Result<(), Fault> {
        self.held.push(write::failed(kind, request, &words.message, &words.data()));
        if self.held.len() > WAITING_MAX { Err(Fault("too many refused calls")) } else { Ok(()) }
    }

    /// The deployment's frame is about to be relayed. Give the place of an answered call back after it was.
    pub fn relaying(&mut self, frame: &Server<'_>) -> Option<Permit<Slot>> {
        match frame {
            Server::Transition { end } => {
                (self.relayed, self.lost) = (*end, false);
                self.chunks = None;
            }
            Server::Chunk { text, part, total } => {
                let prefix = self.chunks.get_or_insert_default();
                prefix.push(text);
                if part.saturating_add(1) >= *total {
                    match prefix.end() {
                        Some(end) => self.relayed = end,
                        None => self.lost = true,
                    }
                    self.chunks = None;
                }
            }
            Server::Response { kind, request, .. } => return self.calls.remove(&key(*kind, *request)).flatten(),
            Server::AuthError | Server::Ping | Server::Other => {}
        }
        None
    }

    /// The frames of ours that may go out now, in order.
    ///
    /// # Errors
    /// It is not known where the client is, so that nothing can be told.
    pub fn due(&mut self) -> Result<Vec<String>, Fault> {
        if self.chunks.is_some() || (self.held.is_empty() && self.waiting.is_empty()) {
            return Ok(Vec::new());
        }
        if self.lost {
            return Err(Fault("a transition without versions"));
        }
        let mut frames = std::mem::take(&mut self.held);
        let mut ripe = Vec::new();
        while self.waiting.front().is_some_and(|first| self.relayed.query_set >= first.query_set) {
            ripe.extend(self.waiting.pop_front().into_iter().flat_map(|first| first.told));
        }
        if frames.is_empty() && ripe.is_empty() {
            return Ok(frames);
        }
        let data: Vec<String> = ripe
            .iter()
            .map(|told| match told {
                Told::Refused(_, words) => words.data(),
                Told::Ended(_) => String::new(),
            })
            .collect();
        let outcomes = ripe.iter().zip(&data).map(|(told, data)| match told {
            Told::Refused(query, words) => (*query, Outcome::Failed { message: &words.message, data }),
            Told::Ended(query) => (*query, Outcome::Removed),
        });
        // Rust and Python settle a failed call only with the transition after it.
        frames.push(write::transition(&self.relayed, &self.relayed, outcomes));
        Ok(frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{front::convex::refuse::words, refusal::Refusal, wire::convex::server};

    fn transition(query_set: u32) -> Server<'static> {
        Server::Transition { end: Version { query_set, ..Version::default() } }
    }

    fn no() -> Words {
        words(&Refusal::Suspended)
    }

    #[test]
    fn a_refused_query_is_told_after_its_version_and_never_between_chunks() {
        let mut books = Books::default();
        books.refused(7);
        books.tell(2, vec![Told::Refused(7, no())]).expect("room");
        assert!(books.due().expect("known").is_empty());
        books.relaying(&transition(1));
        assert!(books.due().expect("known").is_empty(), "version 2 was not confirmed");
        let chunk = |part| Server::Chunk {
            text: r#"{\"type\":\"Transition\",\"endVersion\":{\"querySet\":2,\"identity\":0,\"ts\":\"AAAAAAAAAAA=\"},"#,
            part,
            total: 2,
        };
        books.relaying(&chunk(0));
        books.refuse_call(Kind::Mutation, 1, &no()).expect("room");
        assert!(books.due().expect("known").is_empty(), "a chunk sequence is open");
        assert!(!books.between_frames());
        books.relaying(&chunk(1));
        let due = books.due().expect("known");
        assert_eq!(due.len(), 2);
        assert!(matches!(server(&due[0]), Ok(Server::Response { request: 1, success: false, .. })));
        assert!(
            due[1].contains(r#""type":"QueryFailed","queryId":7"#) && due[1].contains(r#""querySet":2"#),
            "{due:?}"
        );
        assert!(books.due().expect("known").is_empty());
    }

    #[test]
    fn the_end_of_a_refused_query_is_ours_to_answer() {
        let mut books = Books::default();
        books.refused(7);
        books.tell(1, vec![Told::Refused(7, no())]).expect("room");
        assert!(!books.unsubscribe(7), "the deployment does not know it");
        assert!(books.unsubscribe(8), "it does know this one");
        books.tell(2, vec![Told::Ended(7)]).expect("room");
        books.relaying(&transition(2));
        let due = books.due().expect("known");
        assert!(due[0].contains(r#"{"type":"QueryRemoved","queryId":7}"#), "{due:?}");
        assert!(books.unsubscribe(7), "its number is free again");
    }

    #[test]
    fn who_asks_in_spite_of_every_answer_is_let_go() {
        let mut books = Books::default();
        let result = (0..=WAITING_MAX as u32).try_for_each(|query| books.tell(1, vec![Told::Refused(query, no())]));
        assert!(result.is_err());
        let mut books = Books::default();
        let result = (0..=WAITING_MAX as u32).try_for_each(|request| books.refuse_call(Kind::Action, request, &no()));
        assert!(result.is_err());
    }
}
