//! A password as PostgreSQL keeps it.

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::{Engine, prelude::BASE64_STANDARD};

use crate::tenant::namespace::Password;

/// PBKDF2 rounds, PostgreSQL's own default. The password is 256 random bits, which no number of rounds improves.
const SCRAM_ROUNDS: u32 = 4096;

/// What PostgreSQL stores of a password (`pg_authid.rolpassword`), computed here so that the password itself reaches
/// neither the server's log nor `pg_stat_activity`. The salt is derived from the password, which is random and
/// unique: repeating the step changes nothing, and login keys kept per salt stay good.
pub(super) fn scram_verifier(password: &Password) -> String {
    let mac = |key: &[u8], text: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text);
    let secret = password.expose().as_bytes();
    let salt = mac(secret, b"dynabase scram salt");
    let salt = &salt.as_ref()[..16];
    let mut salted = [0; digest::SHA256_OUTPUT_LEN];
    let rounds = std::num::NonZeroU32::new(SCRAM_ROUNDS).expect("a constant above zero");
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, salt, secret, &mut salted);
    let stored = digest::digest(&digest::SHA256, mac(&salted, b"Client Key").as_ref());
    format!(
        "SCRAM-SHA-256${SCRAM_ROUNDS}:{}${}:{}",
        BASE64_STANDARD.encode(salt),
        BASE64_STANDARD.encode(stored.as_ref()),
        BASE64_STANDARD.encode(mac(&salted, b"Server Key").as_ref())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifier_is_repeatable_and_does_not_hold_the_password() {
        let verifier = scram_verifier(&Password::new("correct horse battery staple"));
        assert_eq!(verifier, scram_verifier(&Password::new("correct horse battery staple")));
        assert_ne!(verifier, scram_verifier(&Password::new("correct horse battery stapler")));
        assert!(verifier.starts_with("SCRAM-SHA-256$4096:") && !verifier.contains("horse"), "{verifier}");
        assert!(!verifier.contains('\''), "it stands in quotes");
    }
}
