//! What a deployment's frame is about. It writes what matters first, so that reading ends after some 250 bytes of a
//! transition of any size; another order is read too, at the cost of skipping.

use super::{
    super::Error,
    Kind, Server, Ts, Version,
    json::{Cursor, fault},
};

/// Peeks into a deployment's frame. A message of an unknown type is [`Server::Other`].
///
/// # Errors
/// It is no frame of the protocol.
pub fn server(text: &str) -> Result<Server<'_>, Error> {
    let (mut kind, mut end, mut request, mut success) = (None, None, None, None);
    let (mut chunk, mut part, mut total) = (None, None, None);
    Cursor::new(text).walk(|key, cursor| {
        match key {
            "type" => kind = Some(cursor.plain()?),
            "endVersion" => end = Some(version(cursor)?),
            "requestId" => request = Some(cursor.number()?),
            "success" => success = Some(&text[cursor.skip()?] == "true"),
            "chunk" => chunk = Some(&text[cursor.string()?.0]),
            "partNumber" => part = Some(cursor.number()?),
            "totalParts" => total = Some(cursor.number()?),
            _ => {
                cursor.skip()?;
            }
        }
        Ok(match kind {
            Some("Transition") => end.is_none(),
            Some("MutationResponse" | "ActionResponse") => request.is_none() || success.is_none(),
            Some("TransitionChunk") => chunk.is_none() || part.is_none() || total.is_none(),
            Some(_) => false,
            None => true,
        })
    })?;
    let missing = fault("a deployment's message without its fields");
    Ok(match kind.ok_or(missing)? {
        "Transition" => Server::Transition { end: end.ok_or(missing)? },
        "TransitionChunk" => {
            Server::Chunk { text: chunk.ok_or(missing)?, part: part.ok_or(missing)?, total: total.ok_or(missing)? }
        }
        kind @ ("MutationResponse" | "ActionResponse") => Server::Response {
            kind: if kind == "MutationResponse" { Kind::Mutation } else { Kind::Action },
            request: request.ok_or(missing)?,
            success: success.ok_or(missing)?,
        },
        "AuthError" => Server::AuthError,
        "Ping" => Server::Ping,
        _ => Server::Other,
    })
}

fn version(cursor: &mut Cursor<'_>) -> Result<Version, Error> {
    let (mut query_set, mut identity, mut ts) = (None, None, None);
    cursor.walk(|key, cursor| {
        match key {
            "querySet" => query_set = Some(cursor.number()?),
            "identity" => identity = Some(cursor.number()?),
            "ts" => ts = Ts::parse(cursor.plain()?),
            _ => {
                cursor.skip()?;
            }
        }
        Ok(true)
    })?;
    let missing = fault("a version without its fields");
    Ok(Version { query_set: query_set.ok_or(missing)?, identity: identity.ok_or(missing)?, ts: ts.ok_or(missing)? })
}

/// The beginning of a transition that comes in chunks, as far as it is needed to see the version at its end.
#[derive(Debug, Default)]
pub struct Prefix {
    text: String,
    end: Option<Version>,
    /// An escape that the border between two chunks would cut can't be: each chunk is a string of its own.
    full: bool,
}

impl Prefix {
    /// Longest beginning that is looked at, in bytes; the versions end within the first 250.
    const MAX_BYTES: usize = 1024;

    /// Takes the next chunk's text, still escaped.
    pub fn push(&mut self, escaped: &str) {
        if self.end.is_some() || self.full {
            return;
        }
        let mut chars = escaped.chars();
        while self.text.len() < Self::MAX_BYTES {
            match chars.next() {
                None => break,
                Some('\\') => match chars.next() {
                    Some(plain @ ('"' | '\\' | '/')) => self.text.push(plain),
                    // Nothing else is escaped in the versions; what stands for it only has to be no bracket or quote.
                    _ => self.text.push('?'),
                },
                Some(plain) => self.text.push(plain),
            }
        }
        self.full = self.text.len() >= Self::MAX_BYTES;
        if let Ok(Server::Transition { end }) = server(&self.text) {
            self.end = Some(end);
            self.text = String::new();
        }
    }

    /// The version at the transition's end, once it was seen.
    pub fn end(&self) -> Option<Version> {
        self.end
    }
}
