//! What SET, RESET, DEALLOCATE and `set_config` say, where they can be read.

use crate::upstream::postgres::connection::Value;

/// What a SET or RESET statement does to the session's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Track {
    /// Sets one.
    Set(Box<str>, Value),
    /// Resets one.
    Reset(Box<str>),
    /// Resets all.
    ResetAll,
    /// Nothing that outlives the transaction.
    Nothing,
    /// Something that can't be replayed.
    Unknown,
}

/// By which command tag the server says that a tracked statement has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// `SET` or `RESET`.
    Set,
    /// `SELECT`, for `set_config`.
    Select,
}

/// Splits the first word off, in lower case.
fn word(text: &str) -> (String, &str) {
    let text = text.trim_start();
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.' || c == '$')).unwrap_or(text.len());
    (text[..end].to_ascii_lowercase(), &text[end..])
}

pub(super) fn read_set(body: &[u8]) -> Track {
    let Ok(text) = std::str::from_utf8(body) else { return Track::Unknown };
    let text = text.trim().trim_end_matches(';').trim_end();
    let (_, rest) = word(text);
    let (mut name, mut rest) = word(rest);
    if name == "local" {
        return Track::Nothing;
    }
    if name == "session" {
        (name, rest) = word(rest);
        if matches!(name.as_str(), "authorization" | "characteristics") {
            return Track::Unknown;
        }
    }
    match name.as_str() {
        // These last for a transaction only, and outside one for nothing.
        "transaction"
        | "constraints"
        | "transaction_isolation"
        | "transaction_read_only"
        | "transaction_deferrable" => {
            return Track::Nothing;
        }
        "seed" => return Track::Unknown,
        "role" | "xml" | "session_authorization" | "" => return Track::Unknown,
        "names" => return value("client_encoding", rest),
        "schema" => return value("search_path", rest),
        "time" => {
            let (zone, rest) = word(rest);
            return if zone == "zone" && rest.trim_start().starts_with('\'') {
                value("timezone", rest)
            } else {
                Track::Unknown
            };
        }
        _ => {}
    }
    let rest = rest.trim_start();
    match rest.strip_prefix('=') {
        Some(rest) => value(&name, rest),
        None => match word(rest) {
            (to, rest) if to == "to" => value(&name, rest),
            _ => Track::Unknown,
        },
    }
}

fn value(name: &str, text: &str) -> Track {
    let text = text.trim();
    // A path through the temporary schema makes temporary tables out of ordinary statements.
    if text.is_empty() || (name == "search_path" && text.contains("pg_temp")) {
        Track::Unknown
    } else if text.eq_ignore_ascii_case("default") {
        Track::Reset(name.into())
    } else {
        Track::Set(name.into(), Value::Verbatim(text.into()))
    }
}

pub(super) fn read_reset(body: &[u8]) -> Track {
    let Ok(text) = std::str::from_utf8(body) else { return Track::Unknown };
    let (_, rest) = word(text);
    let (name, rest) = word(rest);
    match (name.as_str(), rest.trim().trim_end_matches(';').trim()) {
        ("all", "") => Track::ResetAll,
        ("" | "role" | "session" | "time" | "transaction", _) => Track::Unknown,
        (name, "") => Track::Reset(name.into()),
        _ => Track::Unknown,
    }
}

pub(super) fn read_deallocate(body: &[u8]) -> Option<Box<[u8]>> {
    let text = std::str::from_utf8(body).ok()?;
    let (_, rest) = word(text);
    let rest = rest.trim().trim_end_matches(';').trim();
    let rest = match word(rest) {
        (prepare, tail) if prepare == "prepare" && !tail.trim().is_empty() => tail.trim(),
        _ => rest,
    };
    match rest.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(quoted) => Some(quoted.replace("\"\"", "\"").as_bytes().into()),
        None => match word(rest) {
            (name, "") if name != "all" && !name.is_empty() => Some(name.as_bytes().into()),
            _ => None,
        },
    }
}

/// Reads `SELECT [pg_catalog.]set_config('name', 'value', true|false)` and nothing else. A text where every call is
/// local to its transaction sets nothing that outlives it.
pub(super) fn read_set_config(body: &[u8]) -> Option<Track> {
    let text = std::str::from_utf8(body).ok()?;
    let (select, rest) = word(text);
    let (function, rest) = word(rest);
    if select != "select" || !matches!(function.as_str(), "set_config" | "pg_catalog.set_config") {
        return None;
    }
    let rest = rest.trim_start().strip_prefix('(')?;
    let (name, rest) = argument(rest)?;
    let (value, rest) = argument(rest.trim_start().strip_prefix(',')?)?;
    let (local, rest) = word(rest.trim_start().strip_prefix(',')?);
    let tail = rest.trim_start().strip_prefix(')')?.trim().trim_end_matches(';').trim();
    if !tail.is_empty() {
        return None;
    }
    match (local.as_str(), name, value) {
        ("true", ..) => Some(Track::Nothing),
        ("false", Some(name), Some(value)) => {
            Some(Track::Set(name.to_ascii_lowercase().into(), Value::Raw(value.into())))
        }
        _ => None,
    }
}

/// One argument: a plain string constant (its value) or a parameter such as `$1` (`None`).
fn argument(text: &str) -> Option<(Option<String>, &str)> {
    let text = text.trim_start();
    if let Some(rest) = text.strip_prefix('$') {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        return Some((None, &rest[end..]));
    }
    let rest = text.strip_prefix('\'')?;
    let end = rest.find('\'')?;
    let value = &rest[..end];
    // A doubled quote or a backslash needs the server's own reading.
    (!rest[end + 1..].starts_with('\'') && !value.contains('\\')).then(|| (Some(value.to_owned()), &rest[end + 1..]))
}
