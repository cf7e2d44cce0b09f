//! A tenant's library of functions as the server holds it.
//!
//! The server knows libraries and functions by name, once for everybody. So every name gets the tenant's mark before
//! it, and the code becomes the body of a function of ours, as a script does ([`super::script`]):
//!
//! ```text
//!   #!lua name=<mark>lib
//!   --[[the tenant's own first line]] ours … local function dynabase_main(…) the tenant's code, confined
//!   end dynabase_end(dynabase_main)
//! ```
//!
//! - *While it is loaded* the code runs once, with a `redis` that has `register_function` and no more: what is
//!   registered is a function of ours that knows the name, with the mark before it.
//! - *When it is called* the code runs once more, behind a new prelude, and what it registers under that name is called.
//!   So nothing that a function keeps lives longer than its call: the server's Lua has one memory for all tenants, and
//!   no limit on it.
//!
//! The tenant's text comes back exactly ([`original`]): its first line is kept as it was, what [`lua::confine`] put in
//! is taken out. The server holds nothing else, so there is nothing to go out of step.

use std::fmt::Write;

use super::{lua, script};
use crate::{tenant::namespace::RedisNamespace, wire::resp};

/// Functions of one library: each costs the server some hundred bytes.
const FUNCTIONS_MAX: u32 = 128;

/// Longest name of a library or function in bytes.
const NAME_MAX_BYTES: usize = 64;

/// Longest description of a function in bytes.
const DESCRIPTION_MAX_BYTES: usize = 1 << 10;

/// Longest first line in bytes: there is a name in it and no more.
const HEADER_MAX_BYTES: usize = 512;

/// Turns of loops and calls of functions while a library is loaded: some ten milliseconds of the server's time.
const LOAD_TICKS_MAX: u32 = 200_000;

/// What runs before the tenant's code.
pub(super) const LIBRARY: &str = include_str!("library.lua");

/// What the tenant's code is the body of, up to its further parameters.
const OPEN: &str = " local function dynabase_main(redis,dynabase_tick";

/// Where its parameters end.
const OPENED: &str = ",...) ";

/// What stands behind it.
const CLOSE: &str = "\nend dynabase_end(dynabase_main)";

/// A library, wrapped.
#[derive(Debug)]
pub struct Wrapped {
    /// Its name, as the tenant gave it.
    pub name: String,
    /// What the server gets.
    pub text: Vec<u8>,
}

/// Wraps a library of a tenant whose databases are its own (`alone`) or not.
///
/// # Errors
/// It is none; the text of the error, which is the server's own where it has one.
pub fn wrap(code: &[u8], space: &RedisNamespace, alone: bool) -> Result<Wrapped, String> {
    let (header, body) = split(code)?;
    let name = name(header)?;
    let text = lua::confine(body).map_err(|lua::Refused { line, text }| {
        format!("ERR Error compiling function: user_function:{}: {text}", line + 1)
    })?;
    let names = script::shadowed(body);
    let parts = script::Parts { alone, ticks: true, names: names.is_some() };
    let mark = space.function_mark();
    let ours = LIBRARY
        .replace('\n', " ")
        .replace("@M@", mark)
        .replace("@ENV@", if names.is_some() { ",env()" } else { "" })
        .replace("@FUNCTIONS@", &FUNCTIONS_MAX.to_string())
        .replace("@NAME@", &NAME_MAX_BYTES.to_string())
        .replace("@DESCRIPTION@", &DESCRIPTION_MAX_BYTES.to_string())
        .replace("@TICKS@", &LOAD_TICKS_MAX.to_string())
        .replace("@PRELUDE@", &script::prelude(parts, &space.channel_prefix()));
    let mut head = format!("#!lua name={mark}{name}\n--[[{}]] {ours}{OPEN}", data_encoding::BASE64.encode(header));
    if let Some(names) = names {
        let _ = write!(head, ",{names}");
    }
    Ok(Wrapped { name, text: [head.as_bytes(), OPENED.as_bytes(), &text, CLOSE.as_bytes()].concat() })
}

/// The first line without its end, and the rest.
fn split(code: &[u8]) -> Result<(&[u8], &[u8]), String> {
    if !code.starts_with(b"#!") {
        return Err("ERR Missing library metadata".to_owned());
    }
    match memchr::memchr2(b'\n', 0, code) {
        Some(at) if code[at] == b'\n' && at <= HEADER_MAX_BYTES => Ok((&code[..at], &code[at + 1..])),
        _ => Err("ERR Invalid library metadata".to_owned()),
    }
}

/// Reads the first line as the server does.
fn name(header: &[u8]) -> Result<String, String> {
    let words = resp::split_inline(header).unwrap_or_default();
    let show = |text: &[u8]| text.iter().map(|b| if b.is_ascii_control() { ' ' } else { char::from(*b) }).collect();
    let Some((engine, parts)) = words.split_first() else { return Err("ERR Invalid library metadata".to_owned()) };
    let engine = engine.get(2..).unwrap_or_default();
    let mut name = None;
    for part in parts {
        match part.get(..5) {
            Some(key) if key.eq_ignore_ascii_case(b"name=") => {
                if name.replace(&part[5..]).is_some() {
                    let text = "ERR Invalid metadata value, name argument was given multiple times";
                    return Err(text.to_owned());
                }
            }
            _ => {
                let part: String = show(part);
                return Err(format!("ERR Invalid metadata value given: {part}"));
            }
        }
    }
    let Some(name) = name else { return Err("ERR Library name was not given".to_owned()) };
    if name.is_empty() || !name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_') {
        let text = "ERR Library names can only contain letters, numbers, or underscores(_) and must be at least one \
                    character long";
        return Err(text.to_owned());
    }
    if name.len() > NAME_MAX_BYTES {
        return Err(format!("ERR Library names have at most {NAME_MAX_BYTES} characters"));
    }
    if !engine.eq_ignore_ascii_case(b"lua") {
        let engine: String = show(engine);
        return Err(format!("ERR Engine '{engine}' not found"));
    }
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// The code of a library as its tenant gave it; `None` if we did not wrap it.
pub fn original(text: &[u8]) -> Option<Vec<u8>> {
    let (_, rest) = text.split_at_checked(memchr::memchr(b'\n', text)? + 1)?;
    let rest = rest.strip_prefix(b"--[[")?;
    let (header, rest) = rest.split_at_checked(memchr::memmem::find(rest, b"]]")?)?;
    let mut code = data_encoding::BASE64.decode(header).ok()?;
    let rest = &rest[memchr::memmem::find(rest, OPEN.as_bytes())?..];
    let body = &rest[memchr::memmem::find(rest, OPENED.as_bytes())? + OPENED.len()..];
    code.push(b'\n');
    code.extend(lua::bare(body.strip_suffix(CLOSE.as_bytes())?).ok()?);
    Some(code)
}

/// The server's error on a library in words that know nothing of ours.
pub fn told(error: &str) -> String {
    for (name, text) in [
        ("dynabase_ticks", "it ran for too long".to_owned()),
        ("dynabase_count", format!("a library has at most {FUNCTIONS_MAX} functions")),
        ("dynabase_length", format!("names have at most {NAME_MAX_BYTES} bytes, descriptions {DESCRIPTION_MAX_BYTES}")),
    ] {
        if error.contains(name) {
            return format!("ERR Error registering functions: {text}");
        }
    }
    error.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::{
        Names, OrgId,
        namespace::{NameStyle, RootSecret},
    };

    fn space() -> RedisNamespace {
        let names = Names::new(RootSecret::new(&[7; 32]).expect("32 bytes"), NameStyle::Plain);
        names.redis(&OrgId::parse("a").expect("an id"))
    }

    #[test]
    fn a_library_comes_back_as_it_was_given() {
        for code in [
            "#!lua name=lib\n",
            "#!LUA   NAME=lib  \nreturn 1",
            "#!lua \"name=lib\"\r\nlocal function f() while true do end end\nredis.register_function('f',f)\n\n",
            "#!lua name=lib\n-- ]] local function dynabase\nlocal s=' dynabase_tick();,...) ' do end --[[ do ]]",
            "#!lua name=lib\nreturn '\nend'".replace("'\nend'", "[[\nend dynabase_end(dynabase_main)]]").as_str(),
            "#!lua name=lib\nlocal x=cjson for i=1,2 do end",
        ] {
            let wrapped = wrap(code.as_bytes(), &space(), true).expect("a library");
            assert_eq!(wrapped.name, "lib");
            let text = String::from_utf8(wrapped.text.clone()).expect("text");
            assert!(text.starts_with(&format!("#!lua name={}lib\n--[[", space().function_mark())), "{text}");
            // Lines stay where they were.
            assert_eq!(text.matches('\n').count(), code.matches('\n').count() + 1);
            assert_eq!(original(&wrapped.text).as_deref(), Some(code.as_bytes()), "{text}");
        }
        for strange in ["", "#!lua name=x\n", "#!lua name=x\nreturn 1", "#!lua name=x\n--[[?]] "] {
            assert_eq!(original(strange.as_bytes()), None);
        }
    }

    #[test]
    fn first_lines_are_read_as_the_server_does() {
        for (code, expected) in [
            ("", "ERR Missing library metadata"),
            ("return 1", "ERR Missing library metadata"),
            ("#!lua name=x", "ERR Invalid library metadata"),
            ("#!lua name=x\0\n", "ERR Invalid library metadata"),
            ("#!lua name='x\n", "ERR Invalid library metadata"),
            ("#!lua name=\n", "ERR Library names can only contain letters"),
            ("#!lua\n", "ERR Library name was not given"),
            ("#!lua name=x name=y\n", "ERR Invalid metadata value, name argument was given multiple times"),
            ("#!lua foo=x\n", "ERR Invalid metadata value given: foo=x"),
            ("#!js name=x\n", "ERR Engine 'js' not found"),
            ("#!lua name=a-b\n", "ERR Library names can only contain letters"),
            ("#!lua name='x'..y\n", "ERR Invalid library metadata"),
            ("#!lua name=x\nend do", "ERR Error compiling function: user_function:2: '<eof>' expected near 'end'"),
            (
                "#!lua name=x\n\ndynabase_tick()",
                "ERR Error compiling function: user_function:3: names that begin with 'dynabase_' are reserved",
            ),
        ] {
            let error = wrap(code.as_bytes(), &space(), true).expect_err(code);
            assert!(error.starts_with(expected), "{code:?}: {error}");
        }
        assert!(wrap(format!("#!lua name={}\n", "x".repeat(65)).as_bytes(), &space(), true).is_err());
        assert!(wrap(format!("#!lua name=x{}\n", " ".repeat(600)).as_bytes(), &space(), true).is_err());
    }
}
