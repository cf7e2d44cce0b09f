//! What the server must not be asked, because its answer would be about everybody: `INFO`, `CONFIG GET`,
//! `CLIENT LIST` and the like show the tenant's own truth.

use std::{
    fmt::Write,
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{
    client::{Client, Held, Replies},
    commands::{self, Policy},
    keys, refuse, script,
};
use crate::{
    quota::clock,
    refusal::Refusal,
    tenant::Protocol,
    upstream::redis::{DATABASES, Version, link::How},
    wire::resp::{put_array, put_bulk, put_head, put_integer, put_request},
};

impl Client {
    /// Answers a command of the table's `Local` rows.
    pub(super) async fn answer(&mut self, held: &Held) {
        let words: Vec<&[u8]> = held.args.iter().map(|arg| arg.of(&held.bytes)).collect();
        let mut out = Vec::new();
        match held.row.name {
            // In RESP2 with subscriptions; everywhere else it was answered on the spot.
            "ping" => {
                put_array(&mut out, 2);
                put_bulk(&mut out, b"pong");
                put_bulk(&mut out, words.get(1).copied().unwrap_or_default());
            }
            "echo" => put_bulk(&mut out, words[1]),
            "time" => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                put_array(&mut out, 2);
                put_bulk(&mut out, now.as_secs().to_string().as_bytes());
                put_bulk(&mut out, now.subsec_micros().to_string().as_bytes());
            }
            "lolwut" => {
                let text = format!("Redis ver. {}\n", self.server.upstream.version());
                put_bulk(&mut out, text.as_bytes());
            }
            // Replicas are the platform's: nobody waits for them here.
            "wait" => put_integer(&mut out, 0),
            "info" => put_bulk(&mut out, self.info(&words[1..]).as_bytes()),
            "config|get" => self.config(&words[2..], &mut out),
            "acl|whoami" => {
                let user = self.tenancy.as_ref().and_then(|tenancy| tenancy.session.identity().user.clone());
                put_bulk(&mut out, user.as_deref().unwrap_or(crate::tenant::DEFAULT_NAME).as_bytes());
            }
            "command|count" => put_integer(&mut out, i64::try_from(allowed().count()).unwrap_or(0)),
            "command|list" if words.len() == 2 => {
                put_array(&mut out, allowed().count());
                allowed().for_each(|name| put_bulk(&mut out, name.as_bytes()));
            }
            "command|list" => return self.fail("ERR syntax error"),
            "command" => return self.command_table().await,
            "script|load" => return self.load_script(words[2]).await,
            "script|exists" => self.script_exists(&words[2..], &mut out),
            "script|flush" => {
                if let Some(tenancy) = &self.tenancy {
                    tenancy.database.scripts.lock().clear();
                }
                out.extend_from_slice(b"+OK\r\n");
            }
            name if name.starts_with("client|") => return self.client(name, &words),
            _ => return self.fail("ERR This instance has cluster support disabled"),
        }
        self.say(&out);
    }

    fn client(&mut self, name: &str, words: &[&[u8]]) {
        let Some(card) = self.card.clone() else { return };
        let mut out = Vec::new();
        match name {
            "client|id" => put_integer(&mut out, i64::try_from(self.id).unwrap_or(i64::MAX)),
            "client|getname" => {
                let name = card.words.lock().name.clone();
                match (name.as_str(), self.version) {
                    ("", Version::Two) => out.extend_from_slice(b"$-1\r\n"),
                    ("", Version::Three) => out.extend_from_slice(b"_\r\n"),
                    (name, _) => put_bulk(&mut out, name.as_bytes()),
                }
            }
            "client|setname" => {
                if !self.set_name(words[2]) {
                    return self.fail(super::slow::BAD_NAME);
                }
                out.extend_from_slice(b"+OK\r\n");
            }
            "client|setinfo" => {
                if !words[3].iter().all(|b| (b'!'..=b'~').contains(b)) || words[3].len() > 128 {
                    return self.fail("ERR lib-name cannot contain spaces, newlines or special characters.");
                }
                let text = String::from_utf8_lossy(words[3]).into_owned();
                let mut known = card.words.lock();
                if words[2].eq_ignore_ascii_case(b"LIB-NAME") {
                    known.lib_name = text;
                } else if words[2].eq_ignore_ascii_case(b"LIB-VER") {
                    known.lib_ver = text;
                } else {
                    drop(known);
                    return self.fail("ERR Unrecognized option");
                }
                out.extend_from_slice(b"+OK\r\n");
            }
            "client|no-evict" | "client|no-touch" | "client|capa" => out.extend_from_slice(b"+OK\r\n"),
            "client|getredir" => put_integer(&mut out, self.redirect()),
            "client|info" => put_bulk(&mut out, card.line().as_bytes()),
            "client|list" => {
                let wanted: Vec<i64> = match words.get(2) {
                    Some(word) if word.eq_ignore_ascii_case(b"ID") => {
                        words[3..].iter().filter_map(|id| keys::number(id)).collect()
                    }
                    _ => Vec::new(),
                };
                let lines: String = self
                    .cards()
                    .iter()
                    .filter(|card| wanted.is_empty() || wanted.iter().any(|id| u64::try_from(*id) == Ok(card.id)))
                    .map(|card| card.line())
                    .collect();
                put_bulk(&mut out, lines.as_bytes());
            }
            "client|kill" => return self.kill(words),
            "client|reply" => {
                return match words[2].to_ascii_uppercase().as_slice() {
                    b"ON" => {
                        self.replies = Replies::On;
                        self.say_always(b"+OK\r\n");
                    }
                    b"OFF" => self.replies = Replies::Off,
                    b"SKIP" if self.replies == Replies::On => self.replies = Replies::Skip,
                    b"SKIP" => {}
                    _ => self.fail("ERR syntax error"),
                };
            }
            _ => return self.fail("ERR unknown subcommand"),
        }
        self.say(&out);
    }

    fn cards(&self) -> Vec<Arc<super::registry::Card>> {
        self.tenancy.as_ref().map(|t| self.server.registry.of(&t.session.identity().org)).unwrap_or_default()
    }

    /// `CLIENT KILL addr` and `CLIENT KILL ID n | ADDR a | SKIPME yes|no …`, among the tenant's own clients.
    fn kill(&mut self, words: &[&[u8]]) {
        let old = words.len() == 3;
        let (mut id, mut addr, mut skip_me) = (None, None, true);
        if old {
            addr = Some(words[2]);
            skip_me = false;
        } else {
            for pair in words[2..].chunks(2) {
                match (pair[0].to_ascii_uppercase().as_slice(), pair.get(1)) {
                    (b"ID", Some(text)) => match keys::number(text).and_then(|n| u64::try_from(n).ok()) {
                        Some(number) => id = Some(number),
                        None => return self.fail("ERR client-id should be greater than 0"),
                    },
                    (b"ADDR", Some(text)) => addr = Some(text),
                    (b"SKIPME", Some(text)) => skip_me = !text.eq_ignore_ascii_case(b"no"),
                    _ => return self.fail("ERR syntax error"),
                }
            }
        }
        let victims: Vec<_> = self
            .cards()
            .into_iter()
            .filter(|card| id.is_none_or(|id| card.id == id))
            .filter(|card| addr.is_none_or(|addr| card.peer.to_string().as_bytes() == addr))
            .filter(|card| !(skip_me && card.id == self.id))
            .collect();
        victims.iter().filter(|card| card.id != self.id).for_each(|card| card.kill());
        let mut out = Vec::new();
        match (old, victims.len()) {
            (true, 0) => return self.fail("ERR No such client"),
            (true, _) => out.extend_from_slice(b"+OK\r\n"),
            (false, count) => put_integer(&mut out, i64::try_from(count).unwrap_or(0)),
        }
        self.say(&out);
        self.closing |= victims.iter().any(|card| card.id == self.id);
    }

    fn info(&self, sections: &[&[u8]]) -> String {
        let Some(tenancy) = &self.tenancy else { return String::new() };
        let policy = tenancy.session.slot().policy();
        let limits = &policy.limits.redis;
        let version = self.server.upstream.version();
        let slot = tenancy.session.slot();
        let memory = tenancy.place.memory();
        let meter = tenancy.session.meter();
        let all = sections.is_empty()
            || sections
                .iter()
                .any(|s| ["all", "default", "everything"].iter().any(|a| s.eq_ignore_ascii_case(a.as_bytes())));
        let wants = |name: &str| all || sections.iter().any(|section| section.eq_ignore_ascii_case(name.as_bytes()));
        let mut text = String::new();
        let mut section = |name: &str, body: String| {
            if wants(name) {
                if !text.is_empty() {
                    text.push_str("\r\n");
                }
                let mut title = name.to_owned();
                title[..1].make_ascii_uppercase();
                let _ = write!(text, "# {title}\r\n{body}");
            }
        };
        section(
            "server",
            format!(
                "redis_version:{version}\r\nredis_mode:standalone\r\nos:Linux\r\narch_bits:64\r\nprocess_id:1\r\n\
                 run_id:{:040}\r\ntcp_port:6379\r\nuptime_in_seconds:{}\r\nuptime_in_days:{}\r\nhz:10\r\n",
                0,
                clock::now_ms() / 1000,
                clock::now_ms() / 86_400_000,
            ),
        );
        section(
            "clients",
            format!(
                "connected_clients:{}\r\nmaxclients:{}\r\nblocked_clients:0\r\n",
                slot.clients(Protocol::Redis),
                limits.client_sockets
            ),
        );
        section(
            "memory",
            format!(
                "used_memory:{memory}\r\nused_memory_human:{:.2}M\r\nmaxmemory:{}\r\nmaxmemory_human:{:.2}M\r\n\
                 maxmemory_policy:noeviction\r\n",
                memory as f64 / 1_048_576.0,
                limits.memory,
                limits.memory as f64 / 1_048_576.0
            ),
        );
        section("persistence", "loading:0\r\nasync_loading:0\r\n".to_owned());
        section(
            "stats",
            format!(
                "total_connections_received:{}\r\ntotal_commands_processed:{}\r\nrejected_connections:0\r\n",
                meter.opened.load(Ordering::Relaxed),
                meter.requests.load(Ordering::Relaxed)
            ),
        );
        section("replication", "role:master\r\nconnected_slaves:0\r\n".to_owned());
        section("cluster", "cluster_enabled:0\r\n".to_owned());
        let mut databases = tenancy.place.all();
        databases.sort_by_key(|database| database.number);
        let mut keyspace = String::new();
        for database in databases.iter().filter(|database| database.ledger.keys() > 0) {
            let _ = write!(keyspace, "db{}:keys={},expires=0,avg_ttl=0\r\n", database.number, database.ledger.keys());
        }
        section("keyspace", keyspace);
        text
    }

    fn config(&self, patterns: &[&[u8]], out: &mut Vec<u8>) {
        let Some(tenancy) = &self.tenancy else { return };
        let policy = tenancy.session.slot().policy();
        let limits = &policy.limits.redis;
        let settings = [
            ("appendonly", "no".to_owned()),
            ("bind", String::new()),
            ("databases", DATABASES.to_string()),
            ("maxclients", limits.client_sockets.to_string()),
            ("maxmemory", limits.memory.to_string()),
            ("maxmemory-policy", "noeviction".to_owned()),
            ("notify-keyspace-events", self.server.upstream.notifications().to_owned()),
            ("port", "6379".to_owned()),
            ("proto-max-bulk-len", "536870912".to_owned()),
            ("save", String::new()),
            ("slave-read-only", "yes".to_owned()),
            ("replica-read-only", "yes".to_owned()),
            ("timeout", "0".to_owned()),
        ];
        let shown: Vec<_> = settings
            .iter()
            .filter(|(name, _)| patterns.iter().any(|pattern| is_match(&pattern.to_ascii_lowercase(), name.as_bytes())))
            .collect();
        match self.version {
            Version::Two => put_array(out, shown.len() * 2),
            Version::Three => put_head(out, b'%', shown.len()),
        }
        for (name, value) in shown {
            put_bulk(out, name.as_bytes());
            put_bulk(out, value.as_bytes());
        }
    }

    /// The server's own table without what tenants may not run.
    async fn command_table(&mut self) {
        let Some(tenancy) = &self.tenancy else { return };
        let mut request = Vec::new();
        put_array(&mut request, 2 + allowed().count());
        put_bulk(&mut request, b"COMMAND");
        put_bulk(&mut request, b"INFO");
        allowed().for_each(|name| put_bulk(&mut request, name.as_bytes()));
        match tenancy.place.ask(&request, 1).await {
            Ok(answers) => self.say(&answers[0]),
            Err(_) => self.fail(&refuse::render(&Refusal::UpstreamDown).0),
        }
    }

    /// The server checks the wrapped script; the client gets the SHA-1 of its own.
    async fn load_script(&mut self, body: &[u8]) {
        let Some(tenancy) = &self.tenancy else { return };
        let (sha, script) = match script::remember(&tenancy.database, body) {
            Ok(known) => known,
            Err(script::Refused(text)) => return self.fail(&text),
        };
        tenancy.place.runs_script(clock::now_ms());
        // It may be the first command of all.
        if self.current().is_none_or(|link| link.is_closed()) && self.own.is_none() {
            self.connect().await;
            self.down = None;
        }
        let Some(link) = self.current() else {
            return self.fail(&refuse::render(&Refusal::UpstreamDown).0);
        };
        let Some(mut state) = link.lock() else {
            return self.fail(&refuse::render(&Refusal::UpstreamDown).0);
        };
        put_request(&mut state.out, &[b"SCRIPT", b"LOAD", &script.text]);
        let mut reply = Vec::new();
        put_bulk(&mut reply, &script::hex(&sha));
        state.expect(&self.outbox, 1, 0, How::Instead(reply.into()));
        self.outbox.lock().unanswered += 1;
        drop(state);
        link.wake();
    }

    fn script_exists(&self, shas: &[&[u8]], out: &mut Vec<u8>) {
        put_array(out, shas.len());
        for sha in shas {
            let known = self.tenancy.as_ref().is_some_and(|tenancy| {
                script::parse_sha(sha).is_some_and(|sha| script::find(&tenancy.database, &sha).is_some())
            });
            put_integer(out, known.into());
        }
    }
}

/// Top-level commands that a tenant may run.
fn allowed() -> impl Iterator<Item = &'static str> {
    commands::ROWS.iter().filter(|row| row.policy != Policy::Refuse && !row.name.contains('|')).map(|row| row.name)
}

/// A glob of `*` and `?`, which is what clients ask CONFIG GET with.
fn is_match(pattern: &[u8], name: &[u8]) -> bool {
    // Where to go back to: the last star, and how much of the name it stood for.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, n));
            p += 1;
        } else if pattern.get(p).is_some_and(|b| *b == b'?' || *b == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((at, taken)) = star {
            star = Some((at, taken + 1));
            p = at + 1;
            n = taken + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (pattern, name, expected) in [
            ("*", "save", true),
            ("max*", "maxmemory", true),
            ("max*y", "maxmemory-policy", true),
            ("s?ve", "save", true),
        ] {
            assert_eq!(is_match(pattern.as_bytes(), name.as_bytes()), expected, "{pattern}");
        }
        assert!(!is_match(b"max", b"maxmemory") && !is_match(b"*x", b"save") && !is_match(b"", b"save"));
        assert!(!is_match(&b"*a".repeat(2000), &[b'b'; 4000]), "no pattern takes long");
    }
}
