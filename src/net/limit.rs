//! How many connections there may be before anyone knows whose they are: in the process, and from one source.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Where a connection comes from, as coarsely as addresses are handed out to one party: the /24 of an IPv4
/// address, the /64 of an IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(IpAddr);

impl Source {
    fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & !0xff)),
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        })
    }
}

/// The caps of one process, shared by all its listeners.
#[derive(Debug)]
pub struct AcceptLimits {
    places: Arc<Semaphore>,
    connections_max: usize,
    per_source_max: u32,
    /// Never larger than the number of open connections: an entry goes with its last guard.
    sources: Mutex<HashMap<Source, u32>>,
}

impl AcceptLimits {
    /// At most `connections_max` connections at once (at least 1), of which at most `per_source_max` from one /24
    /// or /64 are not yet authenticated. 0 sets no cap per source: right behind a load balancer that does not say
    /// who its clients are.
    pub fn new(connections_max: u32, per_source_max: u32) -> Self {
        let connections_max = usize::try_from(connections_max).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        Self {
            places: Arc::new(Semaphore::new(connections_max)),
            connections_max,
            per_source_max,
            sources: Mutex::default(),
        }
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        self.connections_max - self.places.available_permits()
    }

    /// The cap on open connections.
    pub fn connections_max(&self) -> usize {
        self.connections_max
    }

    /// Waits for a connection's place, first come first served.
    ///
    /// # Cancel safety
    /// Dropping it gives up the turn.
    pub(super) async fn place(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.places).acquire_owned().await.expect("the semaphore is never closed")
    }

    /// Takes a place among the source's unauthenticated connections; `Err` when they are all taken. Connections from
    /// this machine are not counted: they are its own programs, or a balancer for many.
    pub(super) fn unauthenticated(self: &Arc<Self>, ip: IpAddr) -> Result<Option<Unauthenticated>, SourceFull> {
        if self.per_source_max == 0 || ip.to_canonical().is_loopback() {
            return Ok(None);
        }
        let source = Source::of(ip);
        let mut sources = self.sources.lock();
        let taken = sources.entry(source).or_insert(0);
        if *taken >= self.per_source_max {
            return Err(SourceFull);
        }
        *taken += 1;
        Ok(Some(Unauthenticated { limits: Arc::clone(self), source }))
    }
}

/// One source has as many unauthenticated connections as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SourceFull;

/// A connection that nobody has vouched for yet. A front drops it once the caller is admitted.
#[derive(Debug)]
pub struct Unauthenticated {
    limits: Arc<AcceptLimits>,
    source: Source,
}

impl Drop for Unauthenticated {
    fn drop(&mut self) {
        let mut sources = self.limits.sources.lock();
        if let Some(taken) = sources.get_mut(&self.source) {
            *taken -= 1;
            if *taken == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_source_is_a_24_or_a_64_and_forgotten_with_its_last_guard() {
        let limits = Arc::new(AcceptLimits::new(10, 2));
        let take = |text| limits.unauthenticated(ip(text));
        let a = take("192.0.2.1").unwrap();
        let b = take("192.0.2.200").unwrap();
        assert_eq!(take("192.0.2.7").unwrap_err(), SourceFull);
        assert_eq!(take("::ffff:192.0.2.7").unwrap_err(), SourceFull, "a mapped address is the same source");
        let other = take("192.0.3.7").unwrap();
        let six = (take("2001:db8::1").unwrap(), take("2001:db8::ffff:1").unwrap());
        assert_eq!(take("2001:db8:0:0:1::1").unwrap_err(), SourceFull);
        let seven = take("2001:db8:0:1::1").unwrap();
        drop(a);
        let c = take("192.0.2.7").unwrap();
        drop((b, c, other, six, seven));
        assert!(limits.sources.lock().is_empty());
    }

    #[test]
    fn this_machine_and_a_zero_cap_are_not_counted() {
        let limits = Arc::new(AcceptLimits::new(10, 1));
        assert!(matches!(limits.unauthenticated(ip("127.0.0.1")), Ok(None)));
        assert!(matches!(limits.unauthenticated(ip("::1")), Ok(None)));
        let open = Arc::new(AcceptLimits::new(10, 0));
        assert!(matches!(open.unauthenticated(ip("192.0.2.1")), Ok(None)));
    }
}
