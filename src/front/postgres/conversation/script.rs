//! Two clients, two servers and one tenant's pool between them, driven by a string of bytes: the same driver for the
//! fuzzer and for the property test.
//!
//! The servers are a model of PostgreSQL's own loop: statements, portals, transactions, COPY, skipping to Sync. As
//! long as the script only makes both sides say what the protocol knows, everything is checked: what reaches a
//! server, what reaches a client, when a connection changes hands. Once it has put raw bytes into either direction,
//! nobody's words are checked any more: then nothing may panic, nor take more than it was given.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use super::{Conversation, Fault, Heard, PREFIX, Step, Want};
use crate::{
    front::postgres::{
        ledger::{How, Ledger, Owed},
        out::Out,
        refuse,
        statement::Shared,
    },
    refusal::{Limit, Over, Refusal},
    tenant::Tier,
    upstream::postgres::connection::{Parameters, Prepared, Remote, Settings, Value},
    wire::postgres::{
        HEAD,
        backend::{self, Report, Severity, Status},
        frontend, head, put, put_cstr,
    },
};

/// Acts per script: more only make a finding harder to read.
const ACTS_MAX: usize = 512;

/// Rounds in which everything said has to be answered once nothing new comes.
const ROUNDS_MAX: usize = 64;

const COPY: &str = "COPY t FROM STDIN";
const TEXTS: [&str; 24] = [
    "SELECT 1",
    "SELECT $1::int",
    "INSERT INTO t VALUES (1)",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SET search_path = a",
    "SET search_path = b",
    "SET LOCAL search_path = c",
    "RESET ALL",
    "SELECT 1; SELECT 2",
    "BEGIN; SET search_path = d; COMMIT",
    COPY,
    "COPY t TO STDOUT",
    "DEALLOCATE a",
    "DEALLOCATE ALL",
    "DISCARD ALL",
    "CREATE TABLE u (a int)",
    "CREATE TEMP TABLE v (a int)",
    "LISTEN c",
    "SELECT nextval('s')",
    "SELECT currval('s')",
    "SELECT f(1)",
    "",
];
const NAMES: [&[u8]; 6] = [b"", b"a", b"b", b"c", b"_dynabase_1", b"?"];

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte().unwrap_or(0)) % of.len()]
    }

    fn raw(&mut self) -> Vec<u8> {
        let n = usize::from(self.byte().unwrap_or(0)).min(self.0.len());
        let (raw, rest) = self.0.split_at(n);
        self.0 = rest;
        raw.to_vec()
    }
}

/// What the model of a server holds.
#[derive(Debug)]
struct Server {
    remote: Remote,
    lessee: Option<usize>,
    input: Vec<u8>,
    output: Vec<u8>,
    statements: HashMap<Vec<u8>, Vec<u8>>,
    portals: HashMap<Vec<u8>, Vec<u8>>,
    status: Status,
    skipping: bool,
    /// Extended messages were taken since the last Sync.
    open: bool,
    /// Waits for COPY data; `true` where a Query asked for it.
    copy: Option<bool>,
    path: String,
    said: Option<&'static [u8]>,
    dead: bool,
    /// A Parse failed or was skipped: what was sent behind it may miss its statement.
    lost: bool,
}

/// A statement's end.
enum Ran {
    Done(&'static str),
    Empty,
    Copies,
    Failed(&'static [u8]),
}

impl Server {
    fn new() -> Self {
        Self {
            remote: Remote {
                parameters: Arc::default(),
                settings: Settings::none(),
                prepared: Prepared::default(),
                unnamed: None,
                owner: 0,
                soiled: false,
                sequences: false,
            },
            lessee: None,
            input: Vec::new(),
            output: Vec::new(),
            statements: HashMap::new(),
            portals: HashMap::new(),
            status: Status::Idle,
            skipping: false,
            open: false,
            copy: None,
            path: String::new(),
            said: None,
            dead: false,
            lost: false,
        }
    }

    /// What another client may be given.
    fn is_clean(&self) -> bool {
        let mut rest = &self.input[..];
        // What has no answer and no effect may still be on its way.
        while let Ok(Some(found)) = head(rest)
            && matches!(found.kind, b'H' | b'd' | b'c' | b'f')
        {
            rest = rest.get(found.len..).unwrap_or_default();
        }
        rest.is_empty()
            && self.output.is_empty()
            && self.status == Status::Idle
            && self.copy.is_none()
            && !self.skipping
            && !self.open
    }

    fn say(&mut self, kind: u8, body: &[u8]) {
        put(&mut self.output, kind, |out| out.extend_from_slice(body));
    }

    fn done(&mut self, tag: &str) {
        put(&mut self.output, b'C', |out| put_cstr(out, tag.as_bytes()));
    }

    fn ready(&mut self) {
        if self.status == Status::Idle {
            self.portals.clear();
        }
        self.open = false;
        self.output.extend_from_slice(&backend::ready_message(self.status));
    }

    fn fail(&mut self, code: &'static [u8], name: &[u8]) {
        self.said = Some(code);
        let text = [b"statement \"", name, b"\" failed"].concat();
        let fields = [(b'S', &b"ERROR"[..]), (b'V', b"ERROR"), (b'C', code), (b'M', &text)];
        put(&mut self.output, b'E', |out| {
            for (field, value) in fields {
                out.push(field);
                put_cstr(out, value);
            }
            out.push(0);
        });
        if self.status == Status::Transaction {
            self.status = Status::Failed;
        }
    }

    /// Takes one message, or as much of COPY data as there is.
    fn serve(&mut self, choice: u8) {
        self.said = None;
        if self.dead {
            self.input.clear();
        }
        let Ok(Some(found)) = head(&self.input) else { return };
        if self.input.len() < found.len {
            return;
        }
        let rest = self.input.split_off(found.len);
        let message = std::mem::replace(&mut self.input, rest);
        let body = &message[HEAD..];
        if let Some(simple) = self.copy {
            match found.kind {
                b'd' | b'H' | b'S' => {}
                b'c' | b'f' => {
                    self.copy = None;
                    if found.kind == b'c' && choice % 8 != 7 {
                        self.done("COPY 1");
                    } else {
                        self.fail(b"57014", b"");
                        self.skipping = !simple;
                    }
                    if simple {
                        self.ready();
                    }
                }
                // Out of step for good, as PostgreSQL sees it.
                _ => {
                    self.say(b'E', b"SFATAL\0VFATAL\0C08P01\0Mout of step\0\0");
                    self.dead = true;
                }
            }
            return;
        }
        if found.kind == b'S' {
            self.skipping = false;
            self.ready();
            return;
        }
        if self.skipping {
            self.lost |= found.kind == b'P';
            return;
        }
        check_name(found.kind, &message);
        self.open |= matches!(found.kind, b'P' | b'B' | b'D' | b'E' | b'C');
        match found.kind {
            b'Q' => {
                self.statements.remove(&b""[..]);
                self.query(frontend::query(&message).expect("a Query"), choice);
            }
            b'F' => {
                if choice % 8 == 7 || self.status == Status::Failed {
                    self.fail(b"22012", b"");
                } else {
                    self.say(b'V', &[255; 4]);
                }
                self.ready();
            }
            b'd' | b'c' | b'f' | b'H' => {}
            _ => {
                if let Err((code, name)) = self.extended(found.kind, &message, body, choice) {
                    self.lost |= found.kind == b'P';
                    self.fail(code, &name);
                    self.skipping = true;
                }
            }
        }
    }

    fn extended(&mut self, kind: u8, message: &[u8], body: &[u8], choice: u8) -> Result<(), (&'static [u8], Vec<u8>)> {
        const NONE: &[u8] = b"26000";
        let missing = |name: &[u8]| (NONE, name.to_vec());
        match kind {
            b'P' => {
                let parse = frontend::parse(message).expect("a Parse");
                let ends = parse.query.starts_with(b"COMMIT") || parse.query.starts_with(b"ROLLBACK");
                if choice % 8 == 7 || (self.status == Status::Failed && !ends) {
                    return Err((b"42601", parse.name.to_vec()));
                }
                if !parse.name.is_empty() && self.statements.contains_key(parse.name) {
                    return Err((b"42P05", parse.name.to_vec()));
                }
                self.statements.insert(parse.name.to_vec(), parse.query.to_vec());
                self.say(b'1', &[]);
            }
            b'B' => {
                let bind = frontend::bind(message, true).expect("a Bind").expect("whole");
                let text = self.statements.get(bind.statement).ok_or(missing(bind.statement))?.clone();
                let ends = text.starts_with(b"COMMIT") || text.starts_with(b"ROLLBACK");
                if choice % 8 == 7 || (self.status == Status::Failed && !ends) {
                    return Err((b"22P02", Vec::new()));
                }
                self.portals.insert(bind.portal.to_vec(), text);
                self.say(b'2', &[]);
            }
            b'D' => {
                match frontend::subject(message).expect("a Describe") {
                    frontend::Subject::Statement(name) => {
                        let _ = self.statements.get(name).ok_or(missing(name))?;
                        self.say(b't', &[0, 0]);
                    }
                    frontend::Subject::Portal(name) => {
                        let _ = self.portals.get(name).ok_or((&b"34000"[..], Vec::new()))?;
                    }
                }
                if choice & 1 == 0 { self.say(b'n', &[]) } else { self.say(b'T', &[0, choice % 3]) }
            }
            b'E' => {
                let (name, _) = crate::wire::postgres::cstr(body).expect("an Execute");
                let text = self.portals.get(name).ok_or((&b"34000"[..], Vec::new()))?.clone();
                match self.run(&text, choice, false) {
                    Ran::Done(_) if choice % 8 == 6 => self.say(b's', &[]),
                    Ran::Done(tag) => self.done(tag),
                    Ran::Empty => self.say(b'I', &[]),
                    Ran::Copies => self.copy = Some(false),
                    Ran::Failed(code) => return Err((code, Vec::new())),
                }
            }
            b'C' => {
                match frontend::subject(message).expect("a Close") {
                    frontend::Subject::Statement(name) => _ = self.statements.remove(name),
                    frontend::Subject::Portal(name) => _ = self.portals.remove(name),
                }
                self.say(b'3', &[]);
            }
            kind => panic!("{:?} reached a server", char::from(kind)),
        }
        Ok(())
    }

    fn query(&mut self, text: &[u8], choice: u8) {
        let parts: Vec<&[u8]> = text.split(|&b| b == b';').collect();
        // COPY is never followed by another statement in these scripts.
        for part in &parts {
            match self.run(part.trim_ascii(), choice, parts.len() == 1) {
                Ran::Done(tag) => self.done(tag),
                Ran::Empty if parts.len() == 1 => self.say(b'I', &[]),
                Ran::Empty => {}
                Ran::Copies => {
                    self.copy = Some(true);
                    return;
                }
                Ran::Failed(code) => {
                    self.fail(code, b"");
                    break;
                }
            }
        }
        self.ready();
    }

    fn run(&mut self, text: &[u8], choice: u8, rows: bool) -> Ran {
        let text = String::from_utf8_lossy(text).into_owned();
        let ends = text.starts_with("COMMIT") || text.starts_with("ROLLBACK");
        if self.status == Status::Failed && !ends && !text.is_empty() {
            return Ran::Failed(b"25P02");
        }
        if choice % 8 == 7 && !ends {
            return Ran::Failed(b"22012");
        }
        if choice % 8 == 5 {
            self.say(b'N', b"SNOTICE\0C00000\0Mhear\0\0");
        }
        let mut words = text.split_whitespace();
        match (words.next().unwrap_or_default(), words.next().unwrap_or_default()) {
            ("", _) => Ran::Empty,
            ("BEGIN", _) => {
                self.status = Status::Transaction;
                Ran::Done("BEGIN")
            }
            ("COMMIT" | "ROLLBACK", _) => {
                self.status = Status::Idle;
                self.portals.clear();
                Ran::Done("ROLLBACK")
            }
            ("SET", name) => {
                if name != "LOCAL" && self.status == Status::Idle {
                    self.path = text.rsplit(' ').next().unwrap_or_default().to_owned();
                    let path = self.path.clone();
                    if choice & 8 != 0 {
                        backend::put_parameter(&mut self.output, "search_path", &path);
                    }
                }
                Ran::Done("SET")
            }
            ("RESET", _) => Ran::Done("RESET"),
            ("DISCARD", "ALL") if self.status != Status::Idle => Ran::Failed(b"25001"),
            ("DISCARD", "ALL") => {
                self.statements.clear();
                self.portals.clear();
                Ran::Done("DISCARD ALL")
            }
            ("DISCARD", _) => Ran::Done("DISCARD SEQUENCES"),
            ("DEALLOCATE", "ALL") => {
                self.statements.clear();
                Ran::Done("DEALLOCATE ALL")
            }
            ("DEALLOCATE", name) => match self.statements.remove(name.trim_matches('"').as_bytes()) {
                Some(_) => Ran::Done("DEALLOCATE"),
                None => Ran::Failed(b"26000"),
            },
            ("COPY", _) if text.contains("FROM") => {
                self.say(b'G', &[0, 0, 0]);
                Ran::Copies
            }
            ("COPY", _) => {
                self.say(b'H', &[0, 0, 0]);
                self.say(b'd', b"1\n");
                self.say(b'c', &[]);
                Ran::Done("COPY 1")
            }
            ("CREATE", _) => Ran::Done("CREATE TABLE"),
            ("LISTEN", _) => Ran::Done("LISTEN"),
            ("DO", _) => Ran::Failed(b"53100"),
            ("INSERT", _) => Ran::Done("INSERT 0 1"),
            _ => {
                if rows {
                    self.say(b'T', &[0, 0]);
                }
                self.say(b'D', &[0, 0]);
                Ran::Done("SELECT 1")
            }
        }
    }
}

/// A name upstream is ours, or one that a client used itself and that can't be taken for ours.
fn check_name(kind: u8, message: &[u8]) {
    let name = match kind {
        b'P' => frontend::parse(message).expect("a Parse").name,
        b'B' => frontend::bind(message, true).expect("a Bind").expect("whole").statement,
        b'D' | b'C' => match frontend::subject(message).expect("a Describe or Close") {
            frontend::Subject::Statement(name) => name,
            frontend::Subject::Portal(_) => return,
        },
        _ => return,
    };
    let shown = String::from_utf8_lossy(name);
    let ours = name.strip_prefix(PREFIX).is_some_and(|id| id.iter().all(u8::is_ascii_hexdigit));
    let hidden = name.strip_prefix(b"?").is_some_and(|own| NAMES.contains(&own));
    let own = NAMES.contains(&name) && !name.starts_with(PREFIX);
    assert!(ours || hidden || own, "{shown}");
    // No pin of these scripts lets a client prepare under its own name.
    assert!(kind != b'P' || ours || name.is_empty(), "Parse of {shown}");
}

#[derive(Debug)]
struct Client {
    conversation: Conversation,
    /// Said, and not taken yet.
    tail: Vec<u8>,
    /// Received, and not a whole message yet.
    received: Vec<u8>,
    /// What it is owed, by its own account.
    owed: Ledger,
    link: Option<usize>,
    /// Names that it has used.
    names: HashSet<Vec<u8>>,
    /// It may have been told that a name is taken, or lost its statements, by its own doing.
    reused: bool,
    wiped: bool,
    /// It asked for a COPY, or may have: until it knows, it says nothing that a COPY would not take.
    copying: bool,
    /// It prepared a COPY.
    copies: bool,
    gone: bool,
}

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
            0..=79 => stage.speak(who, act & 0x7f, &mut script),
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
    /// One whole message of a client, as a driver might send it.
    fn speak(&mut self, who: usize, act: u8, script: &mut Script<'_>) {
        let client = &mut self.clients[who];
        // A driver that is asked for COPY data gives that, or ends it.
        let copies = client.owed.copies_in();
        client.copying &= !copies && !client.owed.is_settled() && !client.owed.is_skipping();
        let mut out = Vec::new();
        match act % 10 {
            // Data may come before the server asks for it; a Sync may stand behind the Execute.
            0..4 if client.copying => put(&mut out, b'd', |out| out.extend_from_slice(b"1\n")),
            4 if client.copying => {
                put(&mut out, b'c', |_| {});
                client.owed.end_copy();
                client.copying = false;
            }
            5..8 if client.copying => {}
            _ if copies && act % 10 < 7 => put(&mut out, b'd', |out| out.extend_from_slice(b"1\n")),
            _ if copies => {
                let kind = if act % 10 == 9 { b'f' } else { b'c' };
                put(&mut out, kind, |out| {
                    if kind == b'f' {
                        out.push(0);
                    }
                });
                client.owed.end_copy();
            }
            0 | 1 => {
                let text = script.pick(&TEXTS);
                client.wiped |= text.ends_with("ALL");
                client.copying = text == COPY;
                frontend::put_query(&mut out, text);
                client.owed.push(Owed::Query, How::Forward);
            }
            2 | 3 => {
                let (name, text) = (script.pick(&NAMES), script.pick(&TEXTS));
                client.wiped |= text.ends_with("ALL");
                client.copies |= text == COPY;
                client.reused |= !name.is_empty() && !client.names.insert(name.to_vec());
                frontend::put_parse(&mut out, name, &[text.as_bytes(), &[0, 0, 0]].concat());
                client.owed.push(Owed::Parse, How::Forward);
            }
            4 => {
                frontend::put_bind_head(&mut out, b"", script.pick(&NAMES), 6);
                out.extend_from_slice(&[0; 6]);
                client.owed.push(Owed::Bind, How::Forward);
            }
            5 => {
                client.copying = client.copies;
                put(&mut out, b'E', |out| out.extend_from_slice(&[0; 5]));
                client.owed.push(Owed::Execute, How::Forward);
            }
            6 => {
                let name = script.pick(&NAMES);
                if act >= 40 {
                    put(&mut out, b'D', |out| out.extend_from_slice(b"P\0"));
                    client.owed.push(Owed::Describe, How::Forward);
                } else {
                    frontend::put_statement(&mut out, b'D', name);
                    client.owed.push(Owed::DescribeStatement, How::Forward);
                }
            }
            7 => {
                let name = script.pick(&NAMES);
                if act >= 60 {
                    put(&mut out, b'H', |_| {});
                } else if act >= 50 {
                    put(&mut out, b'F', |out| out.extend_from_slice(&[0; 10]));
                    client.owed.push(Owed::Call, How::Forward);
                } else {
                    frontend::put_statement(&mut out, b'C', name);
                    client.owed.push(Owed::Close, How::Forward);
                }
            }
            _ => {
                put(&mut out, b'S', |_| {});
                client.owed.push(Owed::Sync, How::Forward);
            }
        }
        client.tail.extend(out);
        // Most drivers write a message or a pipeline at once; some scripts cut it with `hear` instead.
        if act < 70 {
            self.hear(who, usize::MAX);
        }
    }

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
                Want::More | Want::Hold => return,
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

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

        #[test]
        fn whatever_clients_and_servers_say_every_answer_reaches_who_asked(script in vec(any::<u8>(), 0..600)) {
            super::play(&script);
        }

        /// Without raw bytes, so that every check holds to the end.
        #[test]
        fn well_behaved_clients_never_notice_each_other(script in vec((0u8..2, 0u8..120, any::<u8>(), any::<u8>()), 0..150)) {
            let script: Vec<u8> = script.into_iter().flat_map(|(who, act, a, b)| [act | who << 7, a, b]).collect();
            super::play(&script);
        }
    }
}
