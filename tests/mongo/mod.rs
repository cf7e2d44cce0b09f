//! The MongoDB front before a real server and before one of our own that misbehaves, spoken to in raw bytes; and the
//! Rust driver.

mod batches;
mod driver;
mod holds;
mod hostile;
mod large;
mod limits;
mod login;
mod room;
mod shown;
pub(crate) mod support;
