//! The protocols as clients see them. A front is a function from a connection to how it ended; fronts share the
//! doors (accept, TLS, admission, pools, meters), never the conversation.

pub mod convex;
pub mod http;
pub mod mongo;
pub mod neon;
pub mod postgres;
pub mod redis;
