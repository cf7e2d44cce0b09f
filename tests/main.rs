//! One binary for all integration tests: linking is the slow part.

mod confinement;
mod dev;
mod floors;
mod postgres;
mod provision;
mod redis;
mod support;
mod transition;
