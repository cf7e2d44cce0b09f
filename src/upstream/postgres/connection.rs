//! One upstream connection and what its server is known to hold: reported parameters, applied settings, prepared
//! statements. All of it belongs to one tenant's role in one database; none of it may be seen by the next client.

use std::{collections::VecDeque, sync::Arc};

use hashbrown::HashSet;

use crate::net::Stream;

/// Prepared statements kept in one server; the oldest is closed to make room. PostgreSQL keeps each one's parse
/// tree and plan in that backend's memory, a few tens of KiB.
pub const PREPARED_MAX: usize = 256;

/// An open, logged-in connection.
#[derive(Debug)]
pub struct Connection {
    /// The bytes.
    pub stream: Stream,
    /// Body of BackendKeyData: process id and secret, as a CancelRequest repeats them. Empty if the server sent none.
    pub key: Vec<u8>,
    /// The physical database.
    pub database: Arc<str>,
    /// What its server is known to hold.
    pub remote: Remote,
}

impl Connection {
    /// A fresh connection.
    pub fn new(stream: Stream, key: Vec<u8>, database: Arc<str>, parameters: Parameters) -> Self {
        Self { stream, key, database, remote: Remote::new(parameters) }
    }

    /// The server's process id, if it told one.
    pub fn pid(&self) -> Option<u32> {
        self.key.first_chunk::<4>().map(|pid| u32::from_be_bytes(*pid))
    }
}

/// What a server session holds, as far as we made or saw it.
#[derive(Debug)]
pub struct Remote {
    /// The values it last reported by ParameterStatus.
    pub parameters: Arc<Parameters>,
    /// The settings applied on top of its defaults.
    pub settings: Arc<Settings>,
    /// Statements prepared under our names.
    pub prepared: Prepared,
    /// Which text the unnamed statement has; `None` when there is none or nobody knows.
    pub unnamed: Option<u64>,
    /// The session that used it last.
    pub owner: u64,
    /// A statement ran that may have left session state that we can't see.
    pub soiled: bool,
    /// A statement ran that may have set `currval`/`lastval`.
    pub sequences: bool,
}

impl Remote {
    /// A fresh session's, which reported these parameters.
    pub fn new(parameters: Parameters) -> Self {
        Self {
            parameters: Arc::new(parameters),
            settings: Settings::none(),
            prepared: Prepared::default(),
            unnamed: None,
            owner: 0,
            soiled: false,
            sequences: false,
        }
    }
}

/// Names and values reported by ParameterStatus, sorted by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters(Vec<(Box<str>, Box<str>)>);

impl Parameters {
    /// Sets one; tells whether that changed anything. Bytes that are not UTF-8 are replaced: such a value is only
    /// possible in `application_name`, which PostgreSQL itself keeps ASCII.
    pub fn set(&mut self, name: &[u8], value: &[u8]) -> bool {
        let (name, value) = (String::from_utf8_lossy(name), String::from_utf8_lossy(value));
        match self.0.binary_search_by(|(known, _)| known.as_ref().cmp(&name)) {
            Ok(at) if *self.0[at].1 == *value => false,
            Ok(at) => {
                self.0[at].1 = value.into();
                true
            }
            Err(at) => {
                self.0.insert(at, (name.into(), value.into()));
                true
            }
        }
    }

    /// One value.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| **known == *name).map(|(_, value)| &**value)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }
}

/// How a setting's value was written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// The raw string of a startup packet; applied by `set_config`, which reads it the same way.
    Raw(Box<str>),
    /// What followed `SET name TO` in a statement that the server accepted.
    Verbatim(Box<str>),
}

impl Value {
    /// Bytes of it.
    pub fn len(&self) -> usize {
        let (Value::Raw(text) | Value::Verbatim(text)) = self;
        text.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A client's settings on top of the server's defaults, sorted by name. Immutable and shared, so that equal ones
/// are usually the same pointer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Settings(Vec<(Box<str>, Value)>);

impl Settings {
    /// No settings.
    pub fn none() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// A copy with one more, or a changed one. Names are compared as PostgreSQL does: without case.
    pub fn with(&self, name: &str, value: Value) -> Self {
        let name = name.to_ascii_lowercase();
        let mut next = self.clone();
        match next.0.binary_search_by(|(known, _)| (**known).cmp(&name)) {
            Ok(at) => next.0[at].1 = value,
            Err(at) => next.0.insert(at, (name.into(), value)),
        }
        next
    }

    /// A copy with one less.
    pub fn without(&self, name: &str) -> Self {
        Self(self.0.iter().filter(|(known, _)| !known.eq_ignore_ascii_case(name)).cloned().collect())
    }

    /// One setting.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| **known == *name).map(|(_, value)| value)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|(name, Value::Raw(value) | Value::Verbatim(value))| name.len() + value.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The queries that take a server from `self` to `wanted`, each to be sent as a message of its own. None where
    /// nothing has to change.
    ///
    /// A server reads a query under the `client_encoding` that is in force when it comes. Letters beyond ASCII mean
    /// what the client meant only under the encoding that it wrote them in: its own for what it has SET, none at all
    /// for its startup packet, which a server takes as it is. So they come after the encoding, not beside it.
    pub fn script(&self, wanted: &Settings) -> Vec<String> {
        let mut resets = String::new();
        for (name, _) in self.0.iter().filter(|(name, _)| wanted.value(name).is_none()) {
            resets.push_str("RESET ");
            quote_name(&mut resets, name);
            resets.push(';');
        }
        let changed = || wanted.0.iter().filter(|(name, value)| self.value(name) != Some(value));
        let mut script = resets.clone();
        changed().for_each(|(name, value)| put_setting(&mut script, name, value));
        if script.is_ascii() {
            return if script.is_empty() { Vec::new() } else { vec![script] };
        }
        let (mut raw, mut verbatim) = (String::new(), String::new());
        for (name, value) in changed().filter(|(name, _)| **name != *ENCODING) {
            put_setting(if matches!(value, Value::Raw(_)) { &mut raw } else { &mut verbatim }, name, value);
        }
        match wanted.value(ENCODING) {
            Some(value) => put_setting(&mut raw, ENCODING, value),
            None => raw.push_str("RESET client_encoding;"),
        }
        resets.push_str("SET client_encoding TO 'SQL_ASCII';");
        let mut queries = vec![resets, raw, verbatim];
        queries.retain(|query| !query.is_empty());
        queries
    }
}

/// The setting under which a server reads what a client writes.
const ENCODING: &str = "client_encoding";

fn put_setting(script: &mut String, name: &str, value: &Value) {
    match value {
        Value::Raw(raw) => {
            script.push_str("SELECT pg_catalog.set_config(");
            quote_text(script, name);
            script.push(',');
            quote_text(script, raw);
            script.push_str(",false);");
        }
        Value::Verbatim(text) => {
            script.push_str("SET ");
            quote_name(script, name);
            script.push_str(" TO ");
            script.push_str(text);
            script.push(';');
        }
    }
}

/// A setting's name, each dotted part quoted.
fn quote_name(out: &mut String, name: &str) {
    for (n, part) in name.split('.').enumerate() {
        if n > 0 {
            out.push('.');
        }
        out.push('"');
        out.push_str(&part.replace('"', "\"\""));
        out.push('"');
    }
}

/// A string constant that means the same whatever `standard_conforming_strings` says.
fn quote_text(out: &mut String, text: &str) {
    out.push_str("E'");
    for c in text.chars() {
        if c == '\'' || c == '\\' {
            out.push(c);
        }
        out.push(c);
    }
    out.push('\'');
}

/// Which of our statements a server has prepared, oldest first out.
#[derive(Debug, Default)]
pub struct Prepared {
    known: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Prepared {
    /// Whether `id` is prepared.
    pub fn has(&self, id: u64) -> bool {
        self.known.contains(&id)
    }

    /// Notes `id` as prepared; gives the one that has to be closed to make room.
    pub fn insert(&mut self, id: u64) -> Option<u64> {
        self.restore(id);
        if self.known.len() > PREPARED_MAX {
            while let Some(oldest) = self.order.pop_front() {
                if self.known.remove(&oldest) {
                    return Some(oldest);
                }
            }
        }
        None
    }

    /// Notes again what was thought to be gone and is not.
    pub fn restore(&mut self, id: u64) {
        if self.known.insert(id) {
            self.order.push_back(id);
        }
    }

    /// Notes `id` as gone.
    pub fn remove(&mut self, id: u64) {
        if self.known.remove(&id) {
            self.order.retain(|&kept| kept != id);
        }
    }

    /// Notes all as gone.
    pub fn clear(&mut self) {
        self.known.clear();
        self.order.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_takes_one_client_s_settings_to_another_s() {
        let a = Settings::default().with("TimeZone", Value::Raw("Europe/Paris".into()));
        let b = Settings::default().with("search_path", Value::Verbatim("a, b".into()));
        assert_eq!(a.script(&b), ["RESET \"timezone\";SET \"search_path\" TO a, b;"]);
        assert_eq!(
            b.script(&a),
            ["RESET \"search_path\";SELECT pg_catalog.set_config(E'timezone',E'Europe/Paris',false);"]
        );
        assert!(a.script(&a).is_empty());
    }

    #[test]
    fn letters_are_sent_under_the_encoding_that_they_were_written_in() {
        let wanted = Settings::default()
            .with("app.a", Value::Raw("é".into()))
            .with("app.b", Value::Verbatim("'é'".into()))
            .with("client_encoding", Value::Verbatim("latin1".into()));
        let before = Settings::default().with("client_encoding", Value::Verbatim("sjis".into()));
        assert_eq!(
            before.script(&wanted),
            [
                "SET client_encoding TO 'SQL_ASCII';",
                "SELECT pg_catalog.set_config(E'app.a',E'é',false);SET \"client_encoding\" TO latin1;",
                "SET \"app\".\"b\" TO 'é';",
            ]
        );
        let plain = Settings::default().with("app.a", Value::Raw("é".into()));
        assert_eq!(
            before.script(&plain),
            [
                "RESET \"client_encoding\";SET client_encoding TO 'SQL_ASCII';",
                "SELECT pg_catalog.set_config(E'app.a',E'é',false);RESET client_encoding;",
            ]
        );
    }

    #[test]
    fn values_cannot_break_out_of_their_quotes() {
        let hostile = Settings::default().with("app.x\";drop table t;--", Value::Raw("\\'; drop table t;--".into()));
        let script = Settings::default().script(&hostile);
        assert_eq!(
            script,
            ["SELECT pg_catalog.set_config(E'app.x\";drop table t;--',E'\\\\''; drop table t;--',false);"]
        );
        assert_eq!(hostile.script(&Settings::default()), ["RESET \"app\".\"x\"\";drop table t;--\";"]);
    }

    #[test]
    fn prepared_statements_are_bounded_oldest_out() {
        let mut prepared = Prepared::default();
        for id in 0..PREPARED_MAX as u64 {
            assert_eq!(prepared.insert(id), None);
        }
        prepared.remove(0);
        assert_eq!(prepared.insert(1000), None);
        assert_eq!(prepared.insert(1001), Some(1));
        assert!(!prepared.has(1) && prepared.has(1001));
    }

    #[test]
    fn reported_values_are_kept_by_name() {
        let mut parameters = Parameters::default();
        assert!(parameters.set(b"b", b"1"));
        assert!(!parameters.set(b"b", b"1"));
        assert!(parameters.set(b"a", b"2"));
        assert_eq!(parameters.iter().collect::<Vec<_>>(), [("a", "2"), ("b", "1")]);
    }
}
