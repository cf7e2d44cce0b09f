//! The packets before the first message.
#![no_main]

use dynabase::wire::postgres::startup::{STARTUP_MAX, Startup, decode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(Some((taken, startup))) = decode(data) else { return };
    assert!((8..=STARTUP_MAX).contains(&taken) && taken <= data.len());
    // Neither what follows nor how it arrives in pieces changes what was read.
    assert_eq!(decode(&data[..taken]), Ok(Some((taken, startup.clone()))));
    for cut in [0, 3, 4, 7, taken / 2, taken - 1] {
        assert!(!matches!(decode(&data[..cut.min(taken - 1)]), Ok(Some(_))), "read from a part of itself");
    }
    if let Startup::Login(login) = startup {
        assert!(login.parameters.iter().all(|(name, value)| !name.is_empty() && !value.contains('\0')));
        assert!(login.parameters.iter().all(|(name, _)| !name.starts_with("_pq_.")));
    }
});
