//! What the shared server calls a session or a cursor, hidden from tenants: both are permuted by keys of the tenant's
//! own, so that an id which another tenant was given means nothing here. No table: any process that knows the keys
//! serves the next request.

use aws_lc_rs::{
    cipher::{AES_256, DecryptingKey, DecryptionContext, EncryptingKey, UnboundCipherKey},
    error::Unspecified,
};

/// Rounds of the cursors' permutation.
const ROUNDS: u8 = 6;

/// A tenant's permutations.
pub struct Mask {
    sessions: EncryptingKey,
    sessions_back: DecryptingKey,
    cursors: EncryptingKey,
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mask")
    }
}

impl Mask {
    /// From the tenant's keys for sessions and for cursors.
    ///
    /// # Errors
    /// The cipher can't be made.
    pub fn new(sessions: &[u8; 32], cursors: &[u8; 32]) -> Result<Self, Unspecified> {
        let key = |bytes: &[u8; 32]| UnboundCipherKey::new(&AES_256, bytes);
        Ok(Self {
            sessions: EncryptingKey::ecb(key(sessions)?)?,
            sessions_back: DecryptingKey::ecb(key(sessions)?)?,
            cursors: EncryptingKey::ecb(key(cursors)?)?,
        })
    }

    /// A client's session id as the server is to know it.
    ///
    /// # Errors
    /// The cipher fails: the request must not be sent.
    pub fn session(&self, id: &mut [u8; 16]) -> Result<(), Unspecified> {
        self.sessions.encrypt(id).map(drop)
    }

    /// A server's session id as the client is to know it.
    ///
    /// # Errors
    /// The cipher fails.
    pub fn session_back(&self, id: &mut [u8; 16]) -> Result<(), Unspecified> {
        self.sessions_back.decrypt(id, DecryptionContext::None).map(drop)
    }

    /// A server's cursor as the client is to know it; 0 stays.
    ///
    /// # Errors
    /// The cipher fails.
    pub fn cursor(&self, id: i64) -> Result<i64, Unspecified> {
        self.walk(id, |mask, it| (0..ROUNDS).try_fold(it, |it, round| mask.round(it, round)))
    }

    /// A client's cursor as the server knows it; 0 stays, and what is not positive is nobody's.
    ///
    /// # Errors
    /// The cipher fails: the request must not be sent.
    pub fn cursor_back(&self, id: i64) -> Result<i64, Unspecified> {
        let swap = |it: u64| it.rotate_left(32);
        self.walk(id, |mask, it| (0..ROUNDS).rev().try_fold(swap(it), |it, round| mask.round(it, round)).map(swap))
    }

    /// Permutes the positive numbers: walks on until it is among them again, twice on average.
    fn walk(&self, id: i64, step: impl Fn(&Self, u64) -> Result<u64, Unspecified>) -> Result<i64, Unspecified> {
        let Some(mut it) = u64::try_from(id).ok().filter(|&it| it != 0) else { return Ok(id) };
        loop {
            it = step(self, it)?;
            if let Some(found) = i64::try_from(it).ok().filter(|&found| found != 0) {
                return Ok(found);
            }
        }
    }

    /// One round of a Feistel network on two halves; its own inverse between swaps.
    fn round(&self, it: u64, round: u8) -> Result<u64, Unspecified> {
        let (left, right) = (it >> 32, it & 0xffff_ffff);
        let mut block = [0; 16];
        block[0] = round;
        block[8..].copy_from_slice(&right.to_le_bytes());
        self.cursors.encrypt(&mut block)?;
        let mut word = [0; 8];
        word.copy_from_slice(&block[..8]);
        let mixed = left ^ (u64::from_le_bytes(word) & 0xffff_ffff);
        Ok(right << 32 | mixed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mask(key: u8) -> Mask {
        Mask::new(&[key; 32], &[key.wrapping_add(1); 32]).expect("a cipher")
    }

    proptest! {
        #[test]
        fn every_id_comes_back_and_means_nothing_to_another(id in 1..i64::MAX, session in any::<[u8; 16]>()) {
            let (one, other) = (mask(1), mask(9));
            let seen = one.cursor(id).expect("works");
            prop_assert!(seen > 0);
            prop_assert_eq!(one.cursor_back(seen).expect("works"), id);
            prop_assert_ne!(other.cursor_back(seen).expect("works"), id);
            let mut there = session;
            one.session(&mut there).expect("works");
            prop_assert_ne!(there, session);
            let mut foreign = session;
            other.session(&mut foreign).expect("works");
            prop_assert_ne!(there, foreign);
            one.session_back(&mut there).expect("works");
            prop_assert_eq!(there, session);
        }
    }

    #[test]
    fn the_edges() {
        let mask = mask(1);
        for id in [0, -1, i64::MIN] {
            assert_eq!((mask.cursor(id), mask.cursor_back(id)), (Ok(id), Ok(id)));
        }
        for id in [1, 2, i64::MAX, i64::MAX - 1, 1 << 32] {
            assert_eq!(mask.cursor_back(mask.cursor(id).expect("works")), Ok(id));
        }
    }
}
