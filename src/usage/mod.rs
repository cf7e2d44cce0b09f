//! What was used. Counters that the data path touches, one set per tenant and protocol.

mod meter;

pub use meter::{Meter, Meters};
