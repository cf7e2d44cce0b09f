//! The Redis front before a real server.

mod basic;
mod differential;
mod drivers;
mod limits;
mod scripts;
mod support;
mod table;
mod tracking;
