//! Two clients, two servers, one pool: the pure machine between them, with every answer accounted for.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| dynabase::front::postgres::fuzz_conversation(script));
