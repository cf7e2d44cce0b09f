//! Pure codecs: bytes to messages and back. No tokio, no tenant.

pub mod resp;
