//! The Postgres front before a real server, seen by clients that choose every byte and by drivers.

mod leaks;
mod parity;
