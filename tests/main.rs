//! One binary for all integration tests: linking is the slow part.

mod dev;
mod doctor;
mod floors;
mod postgres;
mod provision;
mod redis;
mod support;
