//! The session's account of requests and answers, with a server that says whatever it likes; and the scan of query
//! texts that decides who is pinned.
#![no_main]

pub use dynabase::{upstream, wire};
use libfuzzer_sys::fuzz_target;

// The file itself: the front keeps it to itself.
#[allow(dead_code)]
#[path = "../../src/front/postgres/ledger.rs"]
mod ledger;

use ledger::{How, Ledger, Owed};
use wire::postgres::backend::Status;

const OWED: [Owed; 9] = [
    Owed::Parse,
    Owed::Bind,
    Owed::Describe,
    Owed::Execute,
    Owed::Close,
    Owed::Sync,
    Owed::Query,
    Owed::Call,
    Owed::Deallocate,
];
const HOW: [How; 3] = [How::Forward, How::Swallow, How::Invent];
const KINDS: &[u8] = b"123tTnDCIsEGHWVNASZdc";

fuzz_target!(|data: &[u8]| {
    dynabase::front::postgres::fuzz_scan(data);
    let mut ledger = Ledger::default();
    for pair in data.chunks_exact(2) {
        let (act, detail) = (pair[0] % 8, usize::from(pair[1]));
        let completed = ledger.completed();
        match act {
            0..=2 => _ = ledger.push(OWED[detail % OWED.len()], HOW[detail / OWED.len() % HOW.len()]),
            3 | 4 => {
                let mut dropped = 0;
                if ledger.answer(KINDS[detail % KINDS.len()], |_, _| dropped += 1).is_err() {
                    return;
                }
            }
            5 => {
                let status = [Status::Idle, Status::Transaction, Status::Failed][detail % 3];
                if ledger.ready(status).is_err() {
                    return;
                }
                assert_eq!(ledger.status(), status);
            }
            6 => _ = ledger.take_invented(),
            _ => {
                ledger.end_copy();
                ledger.shrink();
            }
        }
        assert!(ledger.completed() >= completed);
        // The server may be given back only when it owes nothing.
        assert!(!ledger.is_idle() || (ledger.is_settled() && ledger.status() == Status::Idle && !ledger.copies_in()));
    }
});
