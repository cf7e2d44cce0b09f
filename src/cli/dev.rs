//! Everything on this machine.

pub mod postgres;
