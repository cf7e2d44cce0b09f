//! Sockets: transport only. Nothing here knows what a tenant is.
//!
//! [`listen::run`] accepts and hands each [`Conn`] to a front; [`tls`] turns a plain [`Stream`] into a TLS one, at once
//! or where the protocol asks for it; [`Drain`] ends it all in order.

mod bind;
pub mod drain;
pub mod limit;
pub mod listen;
pub mod proxy;
pub mod stream;
pub mod tls;
mod trust;
pub mod websocket;

pub use bind::{Address, ListenConfig, Listener};
pub use drain::Drain;
pub use limit::{AcceptLimits, Unauthenticated};
pub use stream::{Conn, Peer, Raw, Stream};
pub use tls::{ClientTls, ServerTls, TlsConfig, TlsError, TlsMode, accept_tls};
