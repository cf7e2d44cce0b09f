//! Pure codecs: bytes to messages and back. No tokio, no tenant.
//!
//! The contract of every decoder here: `Ok(None)` means "not enough bytes yet" and is a normal answer; a length is
//! checked against its cap before anything is allocated or waited for; an [`Error`] is the peer's fault.

pub mod convex;
pub mod mongo;
pub mod neon;
pub mod postgres;
pub mod resp;

use std::fmt;

/// Bytes that are not the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// The message or state in which it happened.
    pub at: &'static str,
    /// What is wrong.
    pub what: &'static str,
}

impl Error {
    pub(crate) const fn new(at: &'static str, what: &'static str) -> Self {
        Self { at, what }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.what)
    }
}

impl std::error::Error for Error {}
