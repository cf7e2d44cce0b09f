//! How answers go back: in the form in which they were asked for, compressed where that was, in bounded time.

use std::{sync::atomic::Ordering, time::Duration};

use super::{
    client::Client,
    refuse::{After, Answer},
    spare,
};
use crate::wire::mongo::{
    self, HEADER_BYTES,
    bson::Document,
    compress::{self, Compressor},
};

/// Longest time for a client to take an answer.
const SEND_TIMEOUT: Duration = Duration::from_secs(120);

/// Smallest reply that is compressed: below, it grows.
const COMPRESSED_MIN_BYTES: usize = 256;

/// How an answer goes back.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The request's number.
    pub id: i32,
    pub(super) form: Form,
    pub(super) compressor: Option<Compressor>,
}

impl Asked {
    /// As a message that is not compressed.
    pub fn message(id: i32) -> Self {
        Self { id, form: Form::Message, compressor: None }
    }
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// An OP_MSG.
    Message,
    /// The client wants none.
    Silent,
    /// Legacy.
    Query,
}

impl Client {
    /// Sends an error.
    pub(super) async fn answer(&mut self, asked: Asked, answer: &Answer) -> After {
        let mut out = spare::take(0);
        answer.put(&mut out);
        let sent = self.send_document(asked, &out).await;
        spare::give(out);
        if answer.after == After::Close { After::Close } else { sent }
    }

    /// Sends a document in the form that was asked for.
    pub(super) async fn send_document(&mut self, asked: Asked, document: &[u8]) -> After {
        let mut message = spare::take(HEADER_BYTES + 32 + document.len());
        match asked.form {
            Form::Silent => {
                spare::give(message);
                return After::Stay;
            }
            Form::Message => mongo::begin_message(&mut message, 0, asked.id),
            Form::Query => {
                let failed = Document::new(document).and_then(|it| it.get("ok")).ok().flatten();
                mongo::begin_reply(&mut message, asked.id, failed.is_some_and(|ok| !ok.truthy()))
            }
        };
        message.extend_from_slice(document);
        self.send(asked, message).await
    }

    /// Begins an answer whose document follows.
    pub(super) fn begin(asked: Asked, out: &mut Vec<u8>) {
        mongo::begin_message(out, 0, asked.id);
    }

    /// Whether the client waits for an answer.
    pub(super) fn waits(asked: Asked) -> bool {
        asked.form != Form::Silent
    }

    /// Sends a message whose length is yet to be written.
    pub(super) async fn send(&mut self, asked: Asked, mut message: Vec<u8>) -> After {
        mongo::end(&mut message, 0);
        if let Some(compressor) = asked.compressor
            && message.len() >= COMPRESSED_MIN_BYTES
        {
            let mut sealed = Vec::new();
            compress::seal(&message, compressor, &mut sealed);
            message = sealed;
        }
        if let Some(session) = &self.session {
            session.meter().bytes_out.fetch_add(message.len() as u64, Ordering::Relaxed);
        }
        let sent = tokio::time::timeout(SEND_TIMEOUT, self.inbox.send(&message)).await;
        spare::give(message);
        match sent {
            Ok(Ok(())) => After::Stay,
            _ => After::Close,
        }
    }
}
