//! Real PostgreSQL servers: dialling, logging in, pooling; and what an administrator's login does there for tenants.
//!
//! Entry points: [`Target::dial`], [`Provisioner`], [`Maintenance`].

mod admin;
mod config;
mod dial;
mod provision;
mod size;

pub use admin::{Admin, AdminError};
pub use config::Config;
pub use dial::{Address, DialError, Retry, Step, Target};
pub use provision::{ProvisionError, Provisioner, Report};
pub use size::Maintenance;
