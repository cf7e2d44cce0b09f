//! The way to MongoDB.

mod config;

pub use config::{Config, Login, Target};
