//! Cancel keys: what we hand to clients in place of a server's own, and the way from a key back to its session.
//!
//! A cancel request only sets a signal; the session itself cancels what it is running, so that a request that comes
//! late finds nothing to hit.

use std::sync::{Arc, Weak};

use aws_lc_rs::{constant_time, rand};
use dashmap::{DashMap, Entry};

use crate::quota::Live;

/// Bytes of a secret in protocol 3.0, and in 3.2.
const SHORT: usize = 4;
const LONG: usize = 32;

/// Tries to find a free process id before giving up; with a million sessions one try fails in two thousand.
const TRIES: usize = 16;

/// Every key that is out.
#[derive(Default)]
pub struct Keys(DashMap<u32, (Secret, Weak<Live>)>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

/// The secret half of a key: of 32 bytes where the client speaks protocol 3.2, else of 4. Every sleeping client has
/// one, so the usual one takes no space of its own.
#[derive(Clone)]
pub enum Secret {
    Short([u8; SHORT]),
    Long(Box<[u8; LONG]>),
}

impl Secret {
    /// As it goes over the wire.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Secret::Short(secret) => secret,
            Secret::Long(secret) => secret.as_slice(),
        }
    }
}

/// A key that is out, for as long as this is held.
#[derive(Debug)]
pub struct Key {
    /// The process id the client was told.
    pub pid: u32,
    keys: Arc<Keys>,
}

impl Drop for Key {
    fn drop(&mut self) {
        self.keys.0.remove(&self.pid);
    }
}

impl Keys {
    /// Hands out a key for a session that speaks this minor protocol version, and its secret to tell the client.
    /// `wanted` is the process id to use if it is free.
    pub fn issue(self: &Arc<Self>, live: &Arc<Live>, minor: u16, wanted: Option<u32>) -> Option<(Key, Secret)> {
        let mut wanted = wanted;
        for _ in 0..TRIES {
            // Drawn at once: each draw costs as much as a few hundred bytes of it.
            let mut random = [0; 4 + LONG];
            let (drawn, _) = random.split_at_mut(if minor >= 2 { 4 + LONG } else { 4 + SHORT });
            rand::fill(drawn).ok()?;
            let [a, b, c, d, rest @ ..] = random;
            // Process ids are positive: drivers read them as signed.
            let pid = wanted.take().unwrap_or((u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff).max(1));
            let secret = match rest {
                rest if minor >= 2 => Secret::Long(Box::new(rest)),
                [a, b, c, d, ..] => Secret::Short([a, b, c, d]),
            };
            if let Entry::Vacant(place) = self.0.entry(pid) {
                place.insert((secret.clone(), Arc::downgrade(live)));
                return Some((Key { pid, keys: Arc::clone(self) }, secret));
            }
        }
        None
    }

    /// Passes a cancel request on to the session that holds the key. Nothing tells whether there is one.
    pub fn cancel(&self, pid: u32, secret: &[u8]) {
        let Some(entry) = self.0.get(&pid) else { return };
        let (expected, live) = entry.value();
        if constant_time::verify_slices_are_equal(expected.bytes(), secret).is_ok()
            && let Some(live) = live.upgrade()
        {
            live.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_secret_reaches_the_session_and_only_while_it_lives() {
        let keys = Arc::new(Keys::default());
        let live = Arc::new(Live::new(1, 0, u64::MAX, None, None));
        let (key, secret) = keys.issue(&live, 0, Some(7)).unwrap();
        assert_eq!((key.pid, secret.bytes().len()), (7, SHORT));
        let (other, long) = keys.issue(&live, 2, Some(7)).unwrap();
        assert_ne!(other.pid, 7, "a taken id is not given twice");
        keys.cancel(7, &[0; 5]);
        keys.cancel(8, secret.bytes());
        keys.cancel(other.pid, secret.bytes());
        keys.cancel(other.pid, &long.bytes()[..SHORT]);
        assert!(!live.take_cancel());
        keys.cancel(7, secret.bytes());
        assert!(live.take_cancel());
        keys.cancel(other.pid, long.bytes());
        assert!(live.take_cancel());
        drop(key);
        keys.cancel(7, secret.bytes());
        assert!(!live.take_cancel());
    }
}
