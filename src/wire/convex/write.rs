//! The frames of our own. A client takes them only in their time: nothing but [`PING`] between two chunks, and a
//! transition only from the version where the client is.

use std::fmt::Write;

use super::{Kind, Version};

/// I am here.
pub const PING: &str = r#"{"type":"Ping"}"#;

/// What became of one query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It failed.
    Failed {
        /// In words.
        message: &'a str,
        /// For programs: JSON.
        data: &'a str,
    },
    /// It is no longer subscribed.
    Removed,
}

/// A transition: from where to where, and what became of which queries.
pub fn transition<'a>(
    start: &Version,
    end: &Version,
    outcomes: impl IntoIterator<Item = (u32, Outcome<'a>)>,
) -> String {
    let mut text = String::from(r#"{"type":"Transition","startVersion":"#);
    version(&mut text, start);
    text.push_str(r#","endVersion":"#);
    version(&mut text, end);
    text.push_str(r#","modifications":["#);
    for (at, (query, outcome)) in outcomes.into_iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        // Writing to a String never fails.
        let _ = match outcome {
            Outcome::Failed { message, data } => write!(
                text,
                r#"{{"type":"QueryFailed","queryId":{query},"errorMessage":{},"logLines":[],"journal":null,"errorData":{data}}}"#,
                quoted(message)
            ),
            Outcome::Removed => write!(text, r#"{{"type":"QueryRemoved","queryId":{query}}}"#),
        };
    }
    text.push_str("]}");
    text
}

/// The answer to a call that failed.
pub fn failed(kind: Kind, request: u32, message: &str, data: &str) -> String {
    let (name, ts) = match kind {
        Kind::Mutation => ("MutationResponse", r#","ts":null"#),
        Kind::Action => ("ActionResponse", ""),
    };
    let message = quoted(message);
    format!(
        r#"{{"type":"{name}","requestId":{request},"success":false,"result":{message}{ts},"logLines":[],"errorData":{data}}}"#
    )
}

/// The token was not taken (`attempted`), or is no longer.
pub fn auth_error(message: &str, base: u32, attempted: bool) -> String {
    let message = quoted(message);
    format!(r#"{{"type":"AuthError","error":{message},"baseVersion":{base},"authUpdateAttempted":{attempted}}}"#)
}

fn version(text: &mut String, Version { query_set, identity, ts }: &Version) {
    let _ = write!(text, r#"{{"querySet":{query_set},"identity":{identity},"ts":"{}"}}"#, ts.as_str());
}

/// A JSON string.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
