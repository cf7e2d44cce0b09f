//! Two clients, two servers and one tenant's pool between them, driven by a string of bytes: the same driver for the
//! fuzzer and for the property test.
//!
//! The servers are a model of PostgreSQL's own loop: statements, portals, transactions, COPY, skipping to Sync. As
//! long as the script only makes both sides say what the protocol knows, everything is checked: what reaches a
//! server, what reaches a client, when a connection changes hands. Once it has put raw bytes into either direction,
//! nobody's words are checked any more: then nothing may panic, nor take more than it was given.

mod client;
mod server;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, sync::Arc, time::Duration};

use self::{
    client::{Client, NAMES, Script},
    server::Server,
};
use super::{Conversation, Fault, Heard, Step, Want};
use crate::{
    front::postgres::{
        ledger::{How, Ledger, Owed},
        out::Out,
        refuse,
        statement::{PREFIX, Shared},
    },
    refusal::{Limit, Over, Refusal},
    tenant::Tier,
    upstream::postgres::connection::{Parameters, Settings, Value},
    wire::postgres::{
        backend::{self, Report, Severity},
        head, put,
    },
};

/// Acts per script: more only make a finding harder to read.
const ACTS_MAX: usize = 512;

/// Rounds in which everything said has to be answered once nothing new comes.
const ROUNDS_MAX: usize = 64;

/// The clients, the servers, and how much of what they say is checked.
struct Stage {
    clients: [Client; 2],
    servers: [Server; 2],
    /// Server bytes that wait for the rest of their message.
    waiting: [Vec<u8>; 2],
    strict: bool,
}

/// Plays a script to its end.
///
/// # Panics
/// When something comes out that must not.
pub fn play(script: &[u8]) {
    let mut script = Script(script);
    let shared = Arc::new(Shared::new(Arc::default()));
    let clients = [1, 2].map(|id| {
        let base = match script.byte().unwrap_or(0) % 3 {
            0 => Settings::none(),
            1 => shared.intern(Settings::default().with("search_path", Value::Raw("x".into()))),
            _ => shared.intern(Settings::default().with("search_path", Value::Raw("y".into()))),
        };
        Client {
            conversation: Conversation::new(id, 0, Arc::clone(&shared), base, Arc::new(Parameters::default())),
            tail: Vec::new(),
            received: Vec::new(),
            owed: Ledger::default(),
            link: None,
            names: HashSet::new(),
            reused: false,
            wiped: false,
            copying: false,
            copies: false,
            gone: false,
        }
    });
    let mut stage =
        Stage { clients, servers: [Server::new(), Server::new()], waiting: Default::default(), strict: true };
    for _ in 0..ACTS_MAX {
        let Some(act) = script.byte() else { break };
        let who = usize::from(act >> 7);
        match act & 0x7f {
            0..=79 => {
                stage.clients[who].say(act & 0x7f, &mut script);
                // Most drivers write a message at once; some scripts cut it with `hear` instead.
                if act & 0x7f < 70 {
                    stage.hear(who, usize::MAX);
                }
            }
            80..=99 => stage.hear(who, usize::from(script.byte().unwrap_or(255))),
            100..=117 => {
                let choice = script.byte().unwrap_or(0);
                stage.serve(who, choice);
            }
            118 => stage.clients[who].conversation.set_over_storage(over(&mut script)),
            119 => stage.refuse(who),
            120 => {
                stage.strict = false;
                let raw = script.raw();
                stage.clients[who].tail.extend(raw);
                stage.hear(who, usize::MAX);
            }
            121 => {
                stage.strict = false;
                let raw = script.raw();
                stage.servers[who].output.extend(raw);
                stage.deliver(who);
            }
            122 => stage.clients[who].conversation.set_timed_out(Some(timeout())),
            // The rest of what it said.
            _ => stage.hear(who, usize::MAX),
        }
    }
    stage.finish();
}

fn over(script: &mut Script<'_>) -> Option<Over> {
    let in_use = [0, 100, 120][usize::from(script.byte().unwrap_or(0) % 3)];
    (in_use > 0).then_some(Over { limit: Limit::Storage, tier: Tier::Free, max: 100, in_use, retry_after: None })
}

fn timeout() -> Over {
    Over { limit: Limit::StatementTimeout, tier: Tier::Free, max: 10, in_use: 10, retry_after: Some(Duration::ZERO) }
}

impl Stage {
    /// Gives a conversation up to `n` bytes of what its client said.
    fn hear(&mut self, who: usize, n: usize) {
        if self.clients[who].gone {
            return;
        }
        let mut given = n.min(self.clients[who].tail.len());
        loop {
            let client = &mut self.clients[who];
            let input = client.tail[..given].to_vec();
            let (mut up, mut down) = (Out::default(), Out::default());
            let remote = client.link.map(|at| &mut self.servers[at].remote);
            let step = match client.conversation.hear_client(&input, remote, &mut up, &mut down) {
                Ok(step) => step,
                Err(fault) => {
                    assert!(!self.strict || matches!(fault, Fault::Client(_)), "{fault:?}");
                    // Nothing else is refused of what these scripts say.
                    assert!(!self.strict || self.clients[who].owed.copies_in(), "{fault:?}");
                    return self.leave(who);
                }
            };
            let Step { consumed, want } = step;
            assert!(consumed <= input.len());
            let mut bytes = Vec::new();
            up.copy_to(&input, &mut bytes);
            if let Some(at) = client.link {
                self.servers[at].input.extend(bytes);
            } else {
                assert!(bytes.is_empty(), "bytes for no server");
            }
            self.tell(who, &down, &input);
            let client = &mut self.clients[who];
            client.tail.drain(..consumed);
            given -= consumed;
            match want {
                Want::More | Want::Hold | Want::Again => return,
                Want::Close => return self.leave(who),
                Want::Pace => client.conversation.pace(),
                Want::Link => {
                    assert!(client.link.is_none());
                    if !self.link(who) {
                        return;
                    }
                }
            }
        }
    }

    fn link(&mut self, who: usize) -> bool {
        let Some(at) = self.servers.iter().position(|server| server.lessee.is_none()) else { return false };
        let (client, server) = (&mut self.clients[who], &mut self.servers[at]);
        assert!(!self.strict || server.is_clean());
        client.conversation.pace();
        let script = client.conversation.preparation(&server.remote);
        if !script.is_empty() {
            // A Query: the server's unnamed statement is gone.
            server.statements.remove(&b""[..]);
            server.remote.unnamed = None;
        }
        let mut down = Out::default();
        client.conversation.link(&mut server.remote, &mut down);
        client.link = Some(at);
        server.lessee = Some(who);
        self.tell(who, &down, &[]);
        true
    }

    /// One step of a server, and its words on their way.
    fn serve(&mut self, at: usize, choice: u8) {
        if !self.strict {
            // Its input may be anything.
            self.servers[at].input.clear();
            return;
        }
        let server = &mut self.servers[at];
        server.serve(choice);
        if let Some(who) = server.lessee {
            let client = &mut self.clients[who];
            client.wiped |= std::mem::take(&mut server.lost);
            match server.said {
                Some(b"42P05") => assert!(client.reused, "a statement of ours is there already"),
                Some(b"26000") => {
                    let text = String::from_utf8_lossy(&server.output).into_owned();
                    let ours = text.contains("\"_dynabase_");
                    assert!(!ours || client.wiped, "a statement of ours is missing");
                }
                _ => {}
            }
        }
        // Bit 4: what it says is kept for later, so that clients run ahead.
        if choice & 16 == 0 {
            self.deliver(at);
        }
    }

    fn deliver(&mut self, at: usize) {
        let said = std::mem::take(&mut self.servers[at].output);
        let Some(who) = self.servers[at].lessee else { return };
        self.waiting[at].extend(said);
        let input = std::mem::take(&mut self.waiting[at]);
        let mut down = Out::default();
        let heard = self.clients[who].conversation.hear_server(&input, &mut self.servers[at].remote, &mut down);
        let Heard { consumed, fatal } = match heard {
            Ok(heard) => heard,
            Err(fault) => {
                assert!(!self.strict, "{fault:?}");
                return self.leave(who);
            }
        };
        assert!(consumed <= input.len());
        self.tell(who, &down, &input);
        self.waiting[at] = input[consumed..].to_vec();
        if fatal {
            return self.leave(who);
        }
        let client = &mut self.clients[who];
        if client.conversation.may_release() && self.waiting[at].is_empty() {
            assert!(client.conversation.ledger().is_settled());
            assert!(!self.strict || self.servers[at].is_clean(), "given back unclean: {:?}", self.servers[at]);
            client.link = None;
            self.servers[at].lessee = None;
        }
        self.hear(who, usize::MAX);
    }

    /// What a client receives is what it asked for.
    fn tell(&mut self, who: usize, down: &Out, input: &[u8]) {
        let client = &mut self.clients[who];
        down.copy_to(input, &mut client.received);
        if !self.strict {
            client.received.clear();
            return;
        }
        let received = std::mem::take(&mut client.received);
        let mut rest = &received[..];
        while let Some(found) = head(rest).expect("a message from a server") {
            let Some(message) = rest.get(..found.len) else { break };
            if !client.wiped {
                let leak = memchr::memmem::find(message, b"\"_dynabase_").is_some();
                assert!(!leak || NAMES.iter().any(|name| name.starts_with(PREFIX)), "a name of ours");
            }
            let fate = match found.kind {
                b'Z' => client.owed.ready(backend::ready(message).expect("a ReadyForQuery")).map(drop),
                b'E' if client.owed.is_settled() => panic!("an error that answers nothing"),
                kind => client.owed.answer(kind, |_, _| {}).map(drop),
            };
            assert!(fate.is_ok(), "client {who}: {:?} answers nothing: {:?}", char::from(found.kind), client.owed);
            rest = &rest[found.len..];
        }
        client.received = rest.to_vec();
    }

    /// The next thing that a client asks for is refused: as over its rate.
    fn refuse(&mut self, who: usize) {
        let client = &mut self.clients[who];
        let tail = client.tail.clone();
        let (mut up, mut down) = (Out::default(), Out::default());
        if client.gone || client.link.is_some() || tail.is_empty() {
            return;
        }
        // As the relay does: only where a connection is asked for.
        let Ok(step) = client.conversation.hear_client(&tail, None, &mut up, &mut down) else {
            return self.leave(who);
        };
        self.tell(who, &down, &tail);
        let client = &mut self.clients[who];
        client.tail.drain(..step.consumed);
        if step.want == Want::Link {
            let kind = client.tail.first().copied().unwrap_or(0);
            let report: Report = refuse::error(&Refusal::OverLimit(timeout()));
            assert_eq!(report.severity, Severity::Error);
            let mut down = Out::default();
            client.conversation.refuse(kind, &report, &mut down);
            let done = client.conversation.skip_refused(&client.tail);
            assert!(done <= client.tail.len());
            client.tail.drain(..done);
            self.tell(who, &down, &[]);
        }
        self.hear(who, usize::MAX);
    }

    /// A client goes; its server with it, unless it is clean.
    fn leave(&mut self, who: usize) {
        let client = &mut self.clients[who];
        client.gone = true;
        if let Some(at) = client.link.take() {
            self.servers[at] = Server::new();
            self.waiting[at].clear();
        }
    }

    /// Everybody ends what they began; then nobody owes anything.
    fn finish(&mut self) {
        if !self.strict {
            return;
        }
        for _ in 0..ROUNDS_MAX {
            for who in 0..2 {
                let mut out = Vec::new();
                let client = &mut self.clients[who];
                if client.owed.copies_in() {
                    put(&mut out, b'c', |_| {});
                    client.owed.end_copy();
                }
                put(&mut out, b'S', |_| {});
                client.owed.push(Owed::Sync, How::Forward);
                client.tail.extend(out);
                self.hear(who, usize::MAX);
            }
            let most = self.servers.iter().map(|server| server.input.len()).max().unwrap_or(0);
            for _ in 0..=most {
                for at in 0..2 {
                    self.serve(at, 0);
                }
                if self.servers.iter().all(|server| server.input.is_empty()) {
                    break;
                }
            }
            let settled = |client: &Client| client.gone || (client.tail.is_empty() && client.owed.is_settled());
            if self.clients.iter().all(settled) {
                for client in self.clients.iter().filter(|client| !client.gone) {
                    assert!(client.conversation.ledger().is_settled());
                    assert!(client.received.is_empty());
                }
                return;
            }
        }
        panic!("somebody still waits: {:?} {:?}", self.clients, self.servers);
    }
}
