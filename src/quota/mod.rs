//! How much is left: lock-free on the path of a request.
//!
//! One [`Slot`] per resident tenant holds what changes (a rate limiter on one atomic, two counters of places per
//! protocol, the live sessions) beside an immutable [`Policy`] that is swapped as one pointer. A session keeps its
//! slot, so a request costs atomics and no look-up, and meets a changed limit on its next request.
//!
//! Invariants:
//! - A tenant has at most one slot at a time ([`Table`]), or its limits would double.
//! - A [`Permit`] is the only way to hold a place, and dropping it the only way to give it back.
//! - Limits live in the policy, state in the atomics: a tier change rebuilds nothing. The pace alone has a copy
//!   beside its atomic, set with the policy.

mod atomic;
pub mod clock;
pub mod live;
pub mod permit;
#[cfg(test)]
mod proofs;
pub mod rate;
mod slot;
pub mod table;

pub use live::{Live, Stop};
pub use permit::{Permit, Place};
pub use slot::{Policy, Slot};
pub use table::Table;
