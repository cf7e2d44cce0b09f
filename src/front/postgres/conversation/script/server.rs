//! A model of a PostgreSQL server: statements, portals, transactions, COPY, skipping to Sync.

use std::collections::HashMap;

use super::client::NAMES;
use crate::{
    front::postgres::statement::PREFIX,
    upstream::postgres::connection::{Parameters, Remote},
    wire::postgres::{
        HEAD,
        backend::{self, Status},
        frontend, head, put, put_cstr,
    },
};

/// What the model of a server holds.
#[derive(Debug)]
pub struct Server {
    pub remote: Remote,
    pub lessee: Option<usize>,
    pub input: Vec<u8>,
    pub output: Vec<u8>,
    pub statements: HashMap<Vec<u8>, Vec<u8>>,
    pub portals: HashMap<Vec<u8>, Vec<u8>>,
    pub status: Status,
    pub skipping: bool,
    /// Extended messages were taken since the last Sync.
    pub open: bool,
    /// Waits for COPY data; `true` where a Query asked for it.
    pub copy: Option<bool>,
    pub path: String,
    pub said: Option<&'static [u8]>,
    pub dead: bool,
    /// A Parse failed or was skipped: what was sent behind it may miss its statement.
    pub lost: bool,
}

/// A statement's end.
enum Ran {
    Done(&'static str),
    Empty,
    Copies,
    Failed(&'static [u8]),
}

impl Server {
    pub fn new() -> Self {
        Self {
            remote: Remote::new(Parameters::default()),
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
    pub fn is_clean(&self) -> bool {
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
    pub fn serve(&mut self, choice: u8) {
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
