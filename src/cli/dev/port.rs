//! Ports for the servers that dev starts: it has to name one before the server binds it.

use std::{
    hash::{BuildHasher, RandomState},
    net::TcpListener,
    ops::Range,
};

/// Below where the kernel takes the ports of outgoing connections from (32 768 on Linux, 49 152 elsewhere): in that
/// range, a port that was free a moment ago is somebody's connection when the server comes to bind it. A Redis Cluster
/// takes a second port, 10 000 above.
const OURS: Range<u16> = 10_000..22_000;

/// Ports that are looked at before giving up.
const TRIES: u16 = 1_000;

/// A port of 127.0.0.1 that was free a moment ago and that no outgoing connection will take.
///
/// # Errors
/// There is none, in words.
pub fn free() -> Result<u16, String> {
    // Two that start together must not look at the same ports in the same order.
    let first = RandomState::new().hash_one(std::process::id()) % u64::from(OURS.end - OURS.start);
    let first = u16::try_from(first).unwrap_or_default();
    let ours = (0..TRIES).map(|n| OURS.start + (first + n) % (OURS.end - OURS.start));
    ours.into_iter()
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .ok_or_else(|| format!("no free port from {} to {}", OURS.start, OURS.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_is_below_the_kernels_own() {
        let port = free().expect("one is free");
        assert!(OURS.contains(&port) && OURS.end <= 32_768, "{port}");
        let _held = TcpListener::bind(("127.0.0.1", port)).expect("it is free");
        assert_ne!(free().expect("another"), port);
    }
}
