//! Scripts inside a tenant's namespace.
//!
//! A script builds key names itself, so putting the prefix before `KEYS` is not enough. Each script is wrapped in a
//! prelude (`prelude.lua`) that takes the prefix off `KEYS`, gives the script a `redis` whose `call` and `pcall` put
//! it on every key, and applies the tier's limits to every key that is created. That is a convenience and a limit;
//! the wall is the tenant's ACL user, as which every script runs.
//!
//! All tenants' scripts share one server, which runs one at a time, so the prelude also stands between a script and the
//! server itself:
//!
//! ```text
//!   text ── lua::confine ──▶ body of a function of ours, a tick in every loop and function
//!   ticks, calls ──▶ more than a number ──▶ error          (no script runs for ever)
//!   error(anything) ──▶ caught ──▶ a plain text ──▶ raised again   (the server follows no table of a script's)
//!   return anything ──▶ metatables taken off, counted, weighed     (nor does it while it replies)
//! ```

use std::sync::{Arc, OnceLock, atomic::Ordering};

use aws_lc_rs::digest;

use super::{
    commands::{self, Keys, Made, Policy, TTL},
    lua, refuse,
};
use crate::upstream::redis::{Database, Script};

/// Scripts of one logical database that are known at once; the server keeps every script that it was ever sent.
const SCRIPTS_MAX: usize = 4096;

/// Bytes of them, as wrapped: more than any application's, little enough for every tenant to have as many.
const SCRIPTS_MAX_BYTES: usize = 8 << 20;

/// Turns of loops and calls of functions in one script: some tenths of a second of the server's time, three seconds if
/// each of them catches an error.
const TICKS_MAX: u64 = 3_000_000;

/// What one call of `redis.call` counts as: it takes at least so many times as long as a turn of a loop.
const CALL_TICKS: u64 = 10;

/// Elements of one reply of a script: a second of the server's time if each is a table.
const REPLY_MAX_ITEMS: u64 = 1_000_000;

/// Bytes of the strings in it.
const REPLY_MAX_BYTES: u64 = 128 << 20;

/// Tables inside tables in it: a little more than the server's own limit, which has its own error.
const REPLY_MAX_DEPTH: u64 = 9_000;

/// What a script gets that used up its ticks.
const STOPPED: &str = "ERR Script killed: it ran for too long";

/// Longest script in bytes.
const SCRIPT_MAX_BYTES: usize = 1 << 20;

/// What reaches around a text's own names, or changes what all tenants' texts share (`cjson`'s settings, the metatable
/// of strings, finalizers): it gets one of ours or none.
const SHADOWED: [&str; 9] =
    ["_G", "loadstring", "load", "collectgarbage", "getmetatable", "cjson", "newproxy", "getfenv", "setfenv"];

const PRELUDE: &str = include_str!("prelude.lua");
const ENV: &str = include_str!("env.lua");
const TICK: &str = "local function tick() ticks=ticks+1 if ticks>@TICKS@ then error({err='@STOP@'}) end end";
const GUARD: &str = include_str!("guard.lua");
const LEARNING_GUARD: &str = include_str!("learning_guard.lua");

/// The text of an OOM error that scripts raise; they do not know the tier.
fn oom(what: &str) -> String {
    refuse::oom(&format!("all {what} of the tier")).replace('\'', "\\'")
}

/// SHA-1 as Redis names scripts.
pub fn sha1(text: &[u8]) -> [u8; 20] {
    let mut sha = [0; 20];
    sha.copy_from_slice(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, text).as_ref());
    sha
}

/// 20 bytes from 40 hexadecimal digits of any case.
pub fn parse_sha(text: &[u8]) -> Option<[u8; 20]> {
    let bytes = data_encoding::HEXLOWER_PERMISSIVE.decode(text).ok()?;
    bytes.try_into().ok()
}

/// 40 lower-case hexadecimal digits.
pub fn hex(sha: &[u8; 20]) -> [u8; 40] {
    let mut text = [0; 40];
    data_encoding::HEXLOWER.encode_mut(sha, &mut text);
    text
}

/// What the prelude knows of commands: ` NAME:xyz` for every command that is not simply "one key, creates none, takes no
/// memory"; `x` says where the keys stand, `y` which of them it may create, `z` whether it takes memory (`*`: more than
/// it carries). Built once from
/// the table.
fn classes() -> &'static str {
    static CLASSES: OnceLock<String> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut text = String::from(" ");
        for row in commands::ROWS {
            let (name, sub) = row.name.split_once('|').map_or((row.name, None), |(name, sub)| (name, Some(sub)));
            let keys = match (row.policy, row.name) {
                (_, "keys") => 'g',
                (_, "scan") => 'h',
                (_, "randomkey") => 'y',
                (Policy::Publish, _) => 'p',
                _ => match row.keys {
                    Keys::Nowhere => '0',
                    Keys::At1 => 'k',
                    Keys::At2 => 'c',
                    Keys::First2 => 'b',
                    Keys::All => 'a',
                    Keys::Every2 => 'e',
                    Keys::AllButLast => 'l',
                    Keys::From2 => 'f',
                    Keys::Num1 => 'n',
                    Keys::Num2 => 'm',
                    Keys::DestNum2 => 'd',
                    Keys::Streams => 's',
                    Keys::Radius => 'r',
                    Keys::Sort => 't',
                },
            };
            let made = match row.made {
                Made::First => 'F',
                Made::Last => 'L',
                Made::All => 'E',
                Made::Store => 'S',
                Made::None if row.flags & TTL != 0 => 'T',
                Made::None => '-',
            };
            // The prelude sees a container's name only; all its subcommands with a key have it at 2.
            match sub {
                Some("create") if name == "xgroup" => text.push_str("XGROUP:cF+ "),
                Some("encoding" | "usage" | "stream") => text.push_str(&format!("{}:c-- ", name.to_uppercase())),
                Some(_) => {}
                None if row.policy == Policy::Container && has_keys(name) => {}
                None if keys == 'k' && made == '-' && !row.grows() => {}
                None => {
                    let grows = match row.name {
                        // They may make more than they carry.
                        "setrange" | "setbit" | "bitfield" | "pfadd" | "pfmerge" => '*',
                        _ if row.grows() => '+',
                        _ => '-',
                    };
                    text.push_str(&format!("{}:{keys}{made}{grows} ", name.to_uppercase()));
                }
            }
        }
        text
    })
}

/// Whether subcommands of a container have keys.
fn has_keys(container: &str) -> bool {
    let of = |name: &str| name.strip_prefix(container).is_some_and(|rest| rest.starts_with('|'));
    commands::ROWS.iter().any(|row| row.keys != Keys::Nowhere && of(row.name))
}

/// What a text needs of the prelude.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    /// The tenant's databases are its own.
    pub alone: bool,
    /// There is a loop or a function in the text.
    pub ticks: bool,
    /// It has a name that it gets ours for.
    pub names: bool,
}

/// What stands between the server and a text of a tenant: a function in Lua that gives it a `redis` of its own, counts
/// what it does and looks at what it gives. On one line, so that line numbers in errors stay right.
/// Each part of it costs every call, so what the text has no use for is left out.
///
/// It gives the `redis`, and what ends the text; then, if it has them, what ticks, and what makes the names of ours.
pub(super) fn prelude(parts: Parts, channels: &[u8]) -> String {
    let Parts { alone, ticks, names } = parts;
    // The number of keys that it created comes back beside its reply.
    let (held, reply) = if alone {
        ("redis.call('DBSIZE')", "return r")
    } else {
        ("made+1", "if r==nil then r=false end return {made,r}")
    };
    let (tick, given) = if ticks || names { (TICK, ",tick") } else { ("", "") };
    let (env, made) = if names { (ENV, ",env") } else { ("", "") };
    PRELUDE
        .replace("@ENV@", env)
        .replace("@TICK@", tick)
        .replace("@GIVEN@", &format!("{given}{made}"))
        .replace('\n', " ")
        .replace("@HELD@", held)
        .replace("@RETURN@", reply)
        .replace("@C@", &String::from_utf8_lossy(channels))
        .replace("@S@", classes())
        .replace("@OOM@", &oom("keys"))
        .replace("@OOMMEMORY@", &oom("memory"))
        .replace("@TICKS@", &TICKS_MAX.to_string())
        .replace("@CALL@", &CALL_TICKS.to_string())
        .replace("@ITEMS@", &REPLY_MAX_ITEMS.to_string())
        .replace("@BYTES@", &REPLY_MAX_BYTES.to_string())
        .replace("@DEPTH@", &REPLY_MAX_DEPTH.to_string())
        .replace("@STOP@", STOPPED)
        .replace("@LARGE@", "ERR the reply of the script is too large")
        .replace("@NOTEXT@", "the script raised a value that is no text")
        .replace("@NAMES@", &SHADOWED.join(","))
        .replace("@HIDDEN@", &format!("redis {}", SHADOWED.join(" ")))
}

/// The names that a text gets ours for, if it has any of them: making those takes time. A text reaches a global by
/// writing its name, so that what is nowhere in it is out of its reach.
pub(super) fn shadowed(text: &[u8]) -> Option<String> {
    let names = SHADOWED.iter().any(|name| memchr::memmem::find(text, name.as_bytes()).is_some());
    names.then(|| SHADOWED.join(","))
}

/// Wraps a script for one logical database.
fn wrap(database: &Database, body: &[u8]) -> Result<Box<[u8]>, Refused> {
    // A shebang line has to stay the first; the prelude adds no line.
    let (head, rest) = match body.strip_prefix(b"#!").and_then(|_| body.iter().position(|b| *b == b'\n')) {
        Some(at) => body.split_at(at + 1),
        None => (&[][..], body),
    };
    let text = lua::confine(rest).map_err(|lua::Refused { line, text }| {
        let line = line + usize::from(!head.is_empty());
        Refused(format!("ERR Error compiling script (new function): user_script:{line}: {text}"))
    })?;
    let names = shadowed(rest);
    let ticks = text.len() > rest.len();
    let given = match (ticks, names.is_some()) {
        (_, true) => ",dynabase_tick,dynabase_env",
        (true, false) => ",dynabase_tick",
        (false, false) => "",
    };
    let open = format!(
        "local redis,dynabase_end{given}=({})(KEYS,ARGV,'{}') {}local function dynabase_main(...) ",
        prelude(Parts { alone: database.alone, ticks, names: names.is_some() }, &database.channels),
        String::from_utf8_lossy(&database.prefix),
        names.map_or_else(String::new, |names| format!("local {names}=dynabase_env() "))
    );
    Ok([head, open.as_bytes(), &text, b"\nend return dynabase_end(dynabase_main)"].concat().into())
}

/// The script that applies the limits to one command, exactly, in the server.
pub fn guard() -> &'static Arc<Script> {
    static SCRIPT: OnceLock<Arc<Script>> = OnceLock::new();
    SCRIPT.get_or_init(|| ours(GUARD))
}

/// The same where the database holds other tenants' keys too: it is given how many keys are left, and says how many it
/// created.
pub fn learning_guard() -> &'static Arc<Script> {
    static SCRIPT: OnceLock<Arc<Script>> = OnceLock::new();
    SCRIPT.get_or_init(|| ours(LEARNING_GUARD))
}

fn ours(text: &str) -> Arc<Script> {
    let text = text.replace('\n', " ").replace("@OOM@", &oom("keys"));
    Arc::new(Script { sha: hex(&sha1(text.as_bytes())), text: text.into_bytes().into() })
}

/// Why a script is not taken: the error to give.
#[derive(Debug)]
pub struct Refused(pub String);

/// Remembers a script of a tenant's client and gives it as the server shall know it.
///
/// # Errors
/// It can't be a script, or there are too many.
pub fn remember(database: &Database, body: &[u8]) -> Result<([u8; 20], Arc<Script>), Refused> {
    let sha = sha1(body);
    if let Some(script) = find(database, &sha) {
        return Ok((sha, script));
    }
    if body.len() > SCRIPT_MAX_BYTES {
        return Err(Refused("ERR the script is too long".to_owned()));
    }
    let text = wrap(database, body)?;
    let script = Arc::new(Script { sha: hex(&sha1(&text)), text });
    let mut scripts = database.scripts.lock();
    let bytes: usize = scripts.values().map(|known| known.text.len()).sum();
    if scripts.len() >= SCRIPTS_MAX || bytes + script.text.len() > SCRIPTS_MAX_BYTES {
        let text = "OOM too many different scripts: use EVALSHA with arguments, or SCRIPT FLUSH";
        return Err(Refused(text.to_owned()));
    }
    database.script_bytes.fetch_add(script.text.len() as u64, Ordering::Relaxed);
    Ok((sha, Arc::clone(scripts.entry(sha).or_insert(script))))
}

/// The script that a tenant's clients know by this SHA-1.
pub fn find(database: &Database, sha: &[u8; 20]) -> Option<Arc<Script>> {
    database.scripts.lock().get(sha).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prelude_knows_every_command_that_is_not_plain() {
        let classes = classes();
        for expected in [
            " SET:kF+ ",
            " MSET:eE+ ",
            " DEL:a-- ",
            " LMOVE:bL+ ",
            " ZUNIONSTORE:dF+ ",
            " BITOP:fF+ ",
            " XREAD:s-- ",
            " PUBLISH:p-- ",
            " SCAN:h-- ",
            " KEYS:g-- ",
            " EXPIRE:kT- ",
            " SORT:tS+ ",
            " OBJECT:c-- ",
            " XGROUP:cF+ ",
            " XINFO:c-- ",
            " ZMPOP:n-- ",
            " SETRANGE:kF* ",
            " FUNCTION:0-- ",
            " RANDOMKEY:y-- ",
            " PING:0-- ",
            " DBSIZE:0-- ",
            " BZMPOP:m-- ",
            " GEORADIUS:rS+ ",
            " MEMORY:c-- ",
        ] {
            assert!(classes.contains(expected), "{expected} in {classes}");
        }
        assert!(classes.contains(" LSET:k-+ ") && !classes.contains(" GET:"));
        for text in [PRELUDE, ENV, super::super::library::LIBRARY] {
            assert!(text.lines().all(|line| !line.contains("--")), "a comment would swallow the rest of the line");
        }
    }
}
