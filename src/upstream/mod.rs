//! The way out to real databases.

pub mod mongo;
pub mod postgres;
pub mod redis;
mod scram;
