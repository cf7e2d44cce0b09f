//! What operators write: any fault is a sentence, never a panic.
#![no_main]

use std::path::Path;

use dynabase::{config::Config, tenant::Tiers};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(faults) = Tiers::parse(text) {
        assert!(faults.iter().all(|fault| !fault.is_empty()));
    }
    let _ = Config::parse(Path::new("dynabase.toml"), text, &[]);
});
