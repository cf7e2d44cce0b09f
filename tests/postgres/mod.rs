//! The Postgres front before a real server, seen by clients that choose every byte and by drivers.

mod faults;
mod leaks;
mod limits;
mod logins;
mod parity;
mod startup;
mod tenants;
