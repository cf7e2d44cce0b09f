//! Moving a tenant from one tier to another, in all of its databases or in none.
//!
//! [`state`] decides, purely; [`Coordinator`] does what it says, over the databases in [`participant`] and the ledger in
//! the catalog; `recover` takes up what a crash left. What is atomic is the *enforcement*: every request is judged by the
//! one record, which changes in one write. The databases' own settings are outer ceilings, wide enough at every instant.

mod coordinator;
pub mod participant;
mod recover;
pub mod state;
mod work;

pub use coordinator::{Coordinator, Refused, Request, Verified, described, word};
pub use participant::Participants;
pub use recover::STUCK_AFTER;

#[cfg(test)]
mod tests;
