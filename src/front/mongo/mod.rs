//! MongoDB as clients see it.

pub mod commands;
pub mod rewrite;
