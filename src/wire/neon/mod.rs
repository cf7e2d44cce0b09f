//! Neon's SQL over HTTP: the JSON of its requests, read in place, and of its answers, written straight from the
//! server's messages. No tree of values on either way.
//!
//! [`request`] reads what is asked and turns JSON parameters into Postgres' text; [`value`] turns Postgres' text into
//! JSON; [`reply`] writes results and errors; [`json`] is what they share, and [`sink`] the bounded room they write into.

pub mod json;
pub mod reply;
pub mod request;
pub mod sink;
pub mod value;
