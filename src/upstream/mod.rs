//! The way out to real databases.

pub mod postgres;
pub mod redis;
