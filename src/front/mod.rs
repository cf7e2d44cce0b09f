//! The protocols as clients see them.

pub mod redis;
