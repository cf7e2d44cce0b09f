//! Service keys: for programs that can't renew a token. `dyk_` and 32 random bytes in base62, always 47 characters;
//! shown once, kept as SHA-256.

use std::fmt;

use super::keys::sha256;
use crate::tenant::directory::KeyHash;

/// What every service key starts with, so that scanners for leaked secrets recognise one.
pub const PREFIX: &str = "dyk_";

/// Characters after the prefix: 43 base62 digits hold 256 bits.
const DIGITS: usize = 43;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A fresh service key. Its `Debug` prints nothing; the text is for the one time it is shown.
pub struct NewKey {
    text: String,
    hash: KeyHash,
}

impl NewKey {
    /// The key itself.
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// What the catalog keeps of it.
    pub fn hash(&self) -> KeyHash {
        self.hash
    }
}

impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NewKey")
    }
}

/// Makes a key.
///
/// # Errors
/// The system gives no randomness.
pub fn mint() -> Result<NewKey, String> {
    let mut secret = [0; 32];
    aws_lc_rs::rand::fill(&mut secret).map_err(|_| "the system gives no randomness".to_owned())?;
    let text = encode(&secret);
    let hash = sha256(text.as_bytes());
    Ok(NewKey { text, hash })
}

/// The hash by which the catalog knows this key, or `None` when it can't be one.
pub fn parse(credential: &[u8]) -> Option<KeyHash> {
    let digits = credential.strip_prefix(PREFIX.as_bytes())?;
    let fits = digits.len() == DIGITS && digits.iter().all(u8::is_ascii_alphanumeric);
    fits.then(|| sha256(credential))
}

/// A name for the key that tells nothing of it: for logs and lists.
pub fn fingerprint(hash: &KeyHash) -> String {
    format!("key:{}", data_encoding::HEXLOWER.encode(&hash[..6]))
}

/// The prefix and the big-endian number `secret` in base62, leading zeros kept.
fn encode(secret: &[u8; 32]) -> String {
    let mut number = *secret;
    let mut digits = [0; DIGITS];
    for digit in digits.iter_mut().rev() {
        let mut rest = 0u32;
        for byte in &mut number {
            let value = rest << 8 | u32::from(*byte);
            // The quotient of something below 62 * 256 by 62 fits a byte.
            *byte = (value / 62) as u8;
            rest = value % 62;
        }
        *digit = ALPHABET[rest as usize];
    }
    let digits = digits.iter().map(|&digit| char::from(digit));
    PREFIX.chars().chain(digits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_fixed_and_the_number_is_kept() {
        assert_eq!(encode(&[0; 32]), format!("dyk_{}", "0".repeat(43)));
        let mut one = [0; 32];
        one[31] = 62;
        assert_eq!(encode(&one), format!("dyk_{}10", "0".repeat(41)));
        assert_eq!(encode(&[255; 32]).len(), 47);
        // 62^43 > 2^256: the last carry has nowhere to go wrong.
        assert_ne!(
            encode(&[255; 32]),
            encode(&{
                let mut less = [255; 32];
                less[0] = 254;
                less
            })
        );
    }

    #[test]
    fn keys_differ_and_are_recognised() {
        let (a, b) = (mint().expect("randomness"), mint().expect("randomness"));
        assert_ne!(a.reveal(), b.reveal());
        assert_eq!(parse(a.reveal().as_bytes()), Some(a.hash()));
        assert_eq!(format!("{a:?}"), "NewKey");
        let long = format!("{}0", a.reveal());
        for bad in ["", "dyk_", "dyk_x", &long, &a.reveal()[1..], &a.reveal().replace("dyk_", "DYK_")] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        let mut quoted = a.reveal().as_bytes().to_vec();
        quoted[20] = b'\'';
        assert_eq!(parse(&quoted), None);
    }
}
