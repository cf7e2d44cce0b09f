//! The Redis front before a real server.

mod basic;
mod differential;
mod limits;
mod scripts;
mod support;
mod table;
