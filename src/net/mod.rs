//! Sockets: transport only. Nothing here knows what a tenant is.

pub mod stream;
pub mod tls;

pub use stream::{Conn, Peer, Stream};
