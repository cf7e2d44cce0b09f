//! The way out to the real databases.

pub mod redis;
