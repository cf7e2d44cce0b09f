//! What was used. Counters that the data path touches, one set per tenant and protocol; and rare events, by name.

pub mod event;
mod meter;

pub use meter::{KEPT_FOR, Meter, Meters};
