//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS as a client (RFC 5802, RFC 7677, RFC 5929), with the derived keys kept:
//! 4096 rounds of PBKDF2 cost a millisecond, two HMACs cost nothing.
//!
//! The server is not trusted: its nonce must begin with ours, its round count is bounded, its signature is checked.

use aws_lc_rs::{constant_time, digest, hmac, pbkdf2, rand};
use base64::{Engine, engine::general_purpose::STANDARD};

use crate::tenant::namespace::Password;

/// Most PBKDF2 rounds we are willing to run for a server.
const ROUNDS_MAX: u32 = 1_000_000;

/// Longest message we accept from a server.
const MESSAGE_MAX: usize = 4096;

/// Which mechanism, and what it says about channel binding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    /// No TLS: `n`.
    None,
    /// TLS, and the server did not offer `-PLUS`: `y`.
    NotOffered,
    /// `-PLUS` with the `tls-server-end-point` data.
    EndPoint(Vec<u8>),
}

impl Binding {
    fn header(&self) -> &'static str {
        match self {
            Binding::None => "n,,",
            Binding::NotOffered => "y,,",
            Binding::EndPoint(_) => "p=tls-server-end-point,,",
        }
    }

    /// The mechanism's name.
    pub fn mechanism(&self) -> &'static str {
        match self {
            Binding::EndPoint(_) => "SCRAM-SHA-256-PLUS",
            _ => "SCRAM-SHA-256",
        }
    }
}

/// What the password comes to under one salt. `Debug` prints nothing of it.
#[derive(Clone)]
pub struct Keys {
    salt: Vec<u8>,
    rounds: u32,
    client: [u8; 32],
    server: [u8; 32],
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

/// What is wrong with the server's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does not follow the grammar, or is too long.
    Malformed,
    /// Its nonce does not begin with ours.
    Nonce,
    /// It asks for more rounds than we run, or for none.
    Rounds,
    /// It refused us.
    Refused,
    /// Its signature is wrong: it does not know the password.
    Signature,
    /// No randomness.
    Random,
}

/// One exchange: [`Exchange::new`], [`Exchange::answer`], [`Exchange::finish`].
#[derive(Debug)]
pub struct Exchange {
    binding: Binding,
    nonce: String,
    first_bare: String,
    expected: Option<[u8; 32]>,
}

impl Exchange {
    /// Starts an exchange as `user` (empty for PostgreSQL, which has it from the startup packet); the second value is the
    /// client-first-message.
    pub fn new(binding: Binding, user: &str) -> Result<(Self, String), Fault> {
        let mut random = [0; 18];
        rand::fill(&mut random).map_err(|_| Fault::Random)?;
        let nonce = STANDARD.encode(random);
        let first_bare = format!("n={},r={nonce}", user.replace('=', "=3D").replace(',', "=2C"));
        let first = format!("{}{first_bare}", binding.header());
        Ok((Self { binding, nonce, first_bare, expected: None }, first))
    }

    /// Answers the server-first-message with the client-final-message. `keys` is used when it fits the salt, and
    /// replaced when it does not.
    pub fn answer(
        &mut self,
        server_first: &[u8],
        password: &Password,
        keys: &mut Option<Keys>,
    ) -> Result<String, Fault> {
        let text = text(server_first)?;
        let mut parts = text.split(',');
        let nonce = parts.next().and_then(|part| part.strip_prefix("r=")).ok_or(Fault::Malformed)?;
        let salt = parts.next().and_then(|part| part.strip_prefix("s=")).ok_or(Fault::Malformed)?;
        let rounds = parts.next().and_then(|part| part.strip_prefix("i=")).ok_or(Fault::Malformed)?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(Fault::Nonce);
        }
        let salt = STANDARD.decode(salt).map_err(|_| Fault::Malformed)?;
        let rounds: u32 = rounds.parse().map_err(|_| Fault::Malformed)?;
        if !(1..=ROUNDS_MAX).contains(&rounds) {
            return Err(Fault::Rounds);
        }
        if keys.as_ref().is_none_or(|keys| keys.salt != salt || keys.rounds != rounds) {
            *keys = Some(derive(password, salt, rounds));
        }
        let Some(keys) = keys else { return Err(Fault::Malformed) };

        let mut bound = self.binding.header().as_bytes().to_vec();
        if let Binding::EndPoint(data) = &self.binding {
            bound.extend_from_slice(data);
        }
        let without_proof = format!("c={},r={nonce}", STANDARD.encode(bound));
        let auth_message = format!("{},{text},{without_proof}", self.first_bare);
        let stored = digest::digest(&digest::SHA256, &keys.client);
        let signature = mac(stored.as_ref(), auth_message.as_bytes());
        let proof: Vec<u8> = keys.client.iter().zip(signature).map(|(a, b)| a ^ b).collect();
        self.expected = Some(mac(&keys.server, auth_message.as_bytes()));
        Ok(format!("{without_proof},p={}", STANDARD.encode(proof)))
    }

    /// Checks the server-final-message.
    pub fn finish(self, server_final: &[u8]) -> Result<(), Fault> {
        let text = text(server_final)?;
        let first = text.split(',').next().unwrap_or_default();
        if first.starts_with("e=") {
            return Err(Fault::Refused);
        }
        let verifier = first.strip_prefix("v=").ok_or(Fault::Malformed)?;
        let verifier = STANDARD.decode(verifier).map_err(|_| Fault::Malformed)?;
        let expected = self.expected.ok_or(Fault::Malformed)?;
        constant_time::verify_slices_are_equal(&verifier, &expected).map_err(|_| Fault::Signature)
    }
}

fn text(message: &[u8]) -> Result<&str, Fault> {
    if message.len() > MESSAGE_MAX {
        return Err(Fault::Malformed);
    }
    std::str::from_utf8(message).map_err(|_| Fault::Malformed)
}

fn mac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message);
    let mut bytes = [0; 32];
    bytes.copy_from_slice(tag.as_ref());
    bytes
}

fn derive(password: &Password, salt: Vec<u8>, rounds: u32) -> Keys {
    let mut salted = [0; 32];
    let rounds_nonzero = std::num::NonZeroU32::new(rounds).unwrap_or(std::num::NonZeroU32::MIN);
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds_nonzero, &salt, password.expose().as_bytes(), &mut salted);
    Keys { salt, rounds, client: mac(&salted, b"Client Key"), server: mac(&salted, b"Server Key") }
}

/// The `tls-server-end-point` data of a DER certificate: its hash under the hash function of its signature, with
/// SHA-256 in place of MD5 and SHA-1. `None` for signatures that name no such function (RFC 5929, section 4.1).
pub fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let (outer, _) = der(certificate, 0x30)?;
    let (_, rest) = der(outer, 0x30)?;
    let (algorithm, _) = der(rest, 0x30)?;
    let (oid, _) = der(algorithm, 0x06)?;
    // 1.2.840.113549.1.1.n (RSA), 1.2.840.10045.4.1 and .4.3.n (ECDSA).
    let function = match oid {
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 4 | 5 | 11] => &digest::SHA256,
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 12] => &digest::SHA384,
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 13] => &digest::SHA512,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 1] | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 2] => &digest::SHA256,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 3] => &digest::SHA384,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 4] => &digest::SHA512,
        _ => return None,
    };
    Some(digest::digest(function, certificate).as_ref().to_vec())
}

/// Splits one DER element of the given kind off `bytes`: its content and what follows.
fn der(bytes: &[u8], kind: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |len, &digit| len << 8 | usize::from(digit)), rest)
        }
        _ => return None,
    };
    (found == kind).then(|| rest.split_at_checked(len)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The server's side, enough to answer one exchange.
    fn server_answer(exchange: &Exchange, password: &str, rounds: u32) -> (String, Keys) {
        let salt = b"0123456789abcdef".to_vec();
        let keys = derive(&Password::new(password), salt.clone(), rounds);
        (format!("r={}server,s={},i={rounds}", exchange.nonce, STANDARD.encode(salt)), keys)
    }

    #[test]
    fn an_exchange_proves_both_sides_and_keeps_the_keys() {
        let (mut exchange, first) = Exchange::new(Binding::None, "").unwrap();
        assert!(first.starts_with("n,,n=,r="));
        let (server_first, server_keys) = server_answer(&exchange, "secret", 4096);
        let mut keys = None;
        let last = exchange.answer(server_first.as_bytes(), &Password::new("secret"), &mut keys).unwrap();
        assert_eq!(keys.as_ref().map(|keys| keys.client), Some(server_keys.client));
        let auth = format!("{},{server_first},{}", exchange.first_bare, last.rsplit_once(",p=").unwrap().0);
        let good = format!("v={}", STANDARD.encode(mac(&server_keys.server, auth.as_bytes())));
        assert_eq!(exchange.finish(good.as_bytes()), Ok(()));
    }

    #[test]
    fn a_hostile_server_is_found_out() {
        let answer = |first: &dyn Fn(&Exchange) -> String| {
            let (mut exchange, _) = Exchange::new(Binding::None, "").unwrap();
            let first = first(&exchange);
            exchange.answer(first.as_bytes(), &Password::new("p"), &mut None).map(|_| exchange)
        };
        assert_eq!(answer(&|_| "r=other,s=AAAA,i=4096".into()).unwrap_err(), Fault::Nonce);
        assert_eq!(answer(&|e| format!("r={},s=AAAA,i=4096", e.nonce)).unwrap_err(), Fault::Nonce);
        assert_eq!(answer(&|e| format!("r={}x,s=AAAA,i=2147483647", e.nonce)).unwrap_err(), Fault::Rounds);
        assert_eq!(answer(&|e| format!("r={}x,s=AAAA,i=0", e.nonce)).unwrap_err(), Fault::Rounds);
        assert_eq!(answer(&|e| format!("m=ext,r={}x,s=AAAA,i=1", e.nonce)).unwrap_err(), Fault::Malformed);
        assert_eq!(answer(&|e| format!("r={}{},s=AAAA,i=1", e.nonce, "x".repeat(5000))).unwrap_err(), Fault::Malformed);
        let exchange = answer(&|e| format!("r={}x,s=AAAA,i=1", e.nonce)).unwrap();
        assert_eq!(exchange.finish(format!("v={}", STANDARD.encode([0; 32])).as_bytes()), Err(Fault::Signature));
        let exchange = answer(&|e| format!("r={}x,s=AAAA,i=1", e.nonce)).unwrap();
        assert_eq!(exchange.finish(b"e=invalid-proof"), Err(Fault::Refused));
    }

    #[test]
    fn the_end_point_of_a_certificate_is_its_hash() {
        let key = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let der = key.cert.der();
        assert_eq!(end_point(der).unwrap(), digest::digest(&digest::SHA256, der).as_ref());
        assert_eq!(end_point(&der[..40]), None);
        assert_eq!(end_point(b"\x30\x84\xff\xff\xff\xff"), None);
    }
}
