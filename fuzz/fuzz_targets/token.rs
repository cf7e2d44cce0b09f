//! Tokens and key sets: nothing unsigned is accepted, and what is signed gives only what it says.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| dynabase::identity::fuzz_token(input));
