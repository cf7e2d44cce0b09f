//! dynabase: one front door for a tenant's databases.
//!
//! The journey of a request: `net` accepts a socket; a front in `front` reads the credential in its own protocol;
//! [`session::Gate::admit`] turns it into a [`session::Session`]; the front rewrites names through
//! [`tenant::namespace`], leases an upstream connection from `upstream`, relays, counts. A refusal is one
//! [`refusal::Refusal`], rendered by each front in its database's own language.
//!
//! Floors, lowest first; a module imports only from modules above it in this list (`tests/floors.rs` checks it).

pub mod net;
pub mod wire;

pub mod tenant;

pub mod refusal;

pub mod identity;
pub mod quota;

pub mod usage;

pub mod catalog;

pub mod upstream;

pub mod session;

pub mod front;
pub mod transition;

pub mod admin;

pub mod config;

pub mod app;
pub mod cli;
