//! What has to be known of a request to answer it.

use crate::wire::mongo::compress::Compressor;

/// How an answer goes back.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The request's number.
    pub id: i32,
    /// What it came as.
    pub form: Form,
    /// What large answers are compressed by.
    pub compressor: Option<Compressor>,
}

impl Asked {
    /// As a message that is not compressed.
    pub fn message(id: i32) -> Self {
        Self { id, form: Form::Message, compressor: None }
    }
}

/// What a request came as, which is what its answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OP_MSG.
    Message,
    /// The client wants none.
    Silent,
    /// Legacy.
    Query,
}
