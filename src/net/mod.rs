//! Sockets: transport only. Nothing here knows what a tenant is.

pub mod stream;

pub use stream::{Conn, Peer, Stream};
