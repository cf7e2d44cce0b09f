//! Where tenants' Neon homes are: databases of any PostgreSQL server, or projects at Neon.
//!
//! The data path is [`crate::upstream::postgres::Upstream`] either way; here is what is Neon's own.
//!
//! Entry points: [`Config`], [`Branches`].

pub mod api;
mod branches;
mod config;

pub use branches::{BranchError, Branches};
pub use config::Config;
