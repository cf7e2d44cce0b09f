//! The way out to real databases.

pub mod convex;
pub mod mongo;
pub mod neon;
pub mod postgres;
pub mod redis;
mod scram;
