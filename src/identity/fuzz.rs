//! The check of a token and the reading of a key set, driven by bytes: for the fuzzer and for a property test.

use std::time::{Duration, SystemTime};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use super::{
    config::{Config, Secret},
    json,
    keys::KeySet,
    mint,
    token::{Rules, Token},
};
use crate::tenant::OrgId;

const ISSUER: &str = "https://issuer.invalid/auth/v1";
const NOW: SystemTime = SystemTime::UNIX_EPOCH;

/// Offers the bytes as a credential, as a key set, and, split at the first line end, as header and claims of a token
/// that is signed with the right secret.
///
/// # Panics
/// When a token is accepted that nobody signed, or for an identity that its claims don't give.
pub fn play(input: &[u8]) {
    let secret = Secret::new("a secret of thirty-two characters or more");
    let text = format!(
        "issuer = \"{ISSUER}\"\nhs256_secret = \"{}\"\norg_claims = [\"org_id\", \"app_metadata.org_id\"]",
        secret.reveal()
    );
    let config: Config = toml::from_str(&text).expect("a configuration");
    let rules = Rules::new(&config).expect("rules");
    let keys = KeySet::parse(input).unwrap_or_default();
    let now = NOW + Duration::from_secs(1_000_000);
    if let Ok(token) = Token::parse(input, &rules) {
        assert!(token.verify(&keys, &rules, now).is_err(), "accepted what nobody signed");
    }
    let Some(at) = input.iter().position(|&b| b == b'\n') else { return };
    let (Ok(header), Ok(claims)) = (str::from_utf8(&input[..at]), str::from_utf8(&input[at + 1..])) else { return };
    let signed = mint::sign(&secret, header, claims);
    let accept = |credential: &[u8]| Token::parse(credential, &rules)?.verify(&KeySet::default(), &rules, now);
    let Ok(identity) = accept(signed.as_bytes()) else { return };
    let (head, said) = (json::object(header.as_bytes()), json::object(claims.as_bytes()).expect("an object"));
    assert_eq!(head.expect("an object").get("alg").and_then(|alg| alg.as_str()), Some("HS256"));
    assert_eq!(said.get("iss").and_then(|iss| iss.as_str()), Some(ISSUER));
    assert!(OrgId::parse(identity.org.as_str()).is_some());
    assert!(identity.expires_at.is_some_and(|end| end > now));
    // One bit of another signature, or other claims under this one, is another token.
    let mut forged = signed.clone().into_bytes();
    if let Some(last) = forged.iter_mut().rev().nth(2) {
        *last = if *last == b'A' { b'B' } else { b'A' };
    }
    assert!(forged == signed.as_bytes() || accept(&forged).is_err());
    let signature = signed.rsplit('.').next().unwrap_or_default();
    let other =
        format!("{}.{}.{signature}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(format!("{claims} ")));
    assert!(accept(other.as_bytes()).is_err());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

    fn claims(org: &str, exp: &str, more: &str) -> String {
        format!(
            r#"{HEADER}
{{"iss":"https://issuer.invalid/auth/v1","aud":"authenticated","exp":{exp},"sub":"11111111-2222-4333-8444-555555555555","session_id":"x","role":"authenticated","org_id":{org}{more}}}"#
        )
    }

    #[test]
    fn a_good_token_gets_far_enough_to_be_checked() {
        super::play(claims("\"acme\"", "2000000", "").as_bytes());
    }

    proptest! {
        #[test]
        fn no_bytes_are_accepted_unsigned(input in any::<Vec<u8>>()) {
            super::play(&input);
        }

        #[test]
        fn signed_claims_give_only_what_they_say(org in "\\PC{0,20}", exp in "[0-9.eE+-]{1,20}", more in "(,\"(org_id|iss|exp|nbf|aud)\":[0-9]{1,9})?") {
            super::play(claims(&format!("{org:?}"), &exp, &more).as_bytes());
        }
    }
}
