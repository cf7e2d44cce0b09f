//! Where tenants' Neon homes are: databases of any PostgreSQL server, or projects at Neon.
//!
//! The data path is [`crate::upstream::postgres::Upstream`] either way; here is what is Neon's own.
//!
//! Entry point: [`Config`].

mod config;

pub use config::Config;
