//! The Redis front before a real server.

mod basic;
mod differential;
mod drivers;
mod functions;
mod hostile;
mod killed;
mod kinds;
mod large;
mod limits;
mod moving;
mod scripts;
mod support;
mod table;
mod tracking;
mod truth;
