//! The way out: connections to the real databases. Nothing here knows a client.

pub mod postgres;
