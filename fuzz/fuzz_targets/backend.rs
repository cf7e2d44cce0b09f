//! Messages from servers: a tenant can make its server say nearly anything.
#![no_main]

use dynabase::wire::postgres::{backend, head};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Ok(Some(found)) = head(rest) {
        let Some(message) = rest.get(..found.len) else { return };
        if let Ok(status) = backend::ready(message) {
            assert_eq!(backend::ready(&backend::ready_message(status)), Ok(status));
        }
        if let Ok((name, value)) = backend::parameter(message) {
            assert!(!name.contains(&0) && !value.contains(&0));
        }
        if let Ok(tag) = backend::tag(message) {
            assert!(!tag.contains(&0));
        }
        for field in *b"SVCMDHPWs\0" {
            if let Some(text) = backend::field(message, field) {
                assert!(text.len() < message.len());
            }
        }
        rest = &rest[found.len..];
    }
});
