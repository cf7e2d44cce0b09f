//! Where tenants' Neon homes are: databases of any PostgreSQL server, or projects at Neon.
//!
//! The data path is [`crate::upstream::postgres::Upstream`] either way; here is what is Neon's own.
//!
//! Entry points: [`Config`], [`Homes`], [`Branches`].

pub mod api;
mod branches;
mod config;
mod homes;
mod projects;

pub use branches::{BranchError, Branches};
pub use config::Config;
pub use homes::{HomeError, Homes};
pub use projects::{ProjectError, Projects, Settings, Sizes, at_branch};
