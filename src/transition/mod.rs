//! Moving a tenant from one tier to another, in all of its databases or in none; and the steps of its life, from making
//! it to purging it ([`life`]).
//!
//! [`state`] decides, purely; [`Coordinator`] does what it says, over the databases in [`participant`] and the ledger in
//! the catalog; `recover` takes up what a crash left. What is atomic is the *enforcement*: every request is judged by the
//! one record, which changes in one write. The databases' own settings are outer ceilings, wide enough at every instant.

mod coordinator;
mod life;
pub mod participant;
mod recover;
mod refused;
pub mod state;
mod work;

pub use coordinator::{Coordinator, Request, Verified, described, word};
pub use life::{Act, Errand, Held, Purging, holdings_json};
pub use participant::Participants;
pub use recover::STUCK_AFTER;
pub use refused::Refused;

#[cfg(test)]
mod tests;
