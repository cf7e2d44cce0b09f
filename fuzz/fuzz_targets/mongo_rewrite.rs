//! No rewritten MongoDB request can touch a document of another tenant: of requests made out of the bytes, and of the
//! bytes taken as a request.
#![no_main]

#[path = "../../tests/confinement/generate.rs"]
mod generate;
#[path = "../../tests/confinement/oracle.rs"]
mod oracle;
#[path = "../../tests/confinement/sent.rs"]
mod sent;

use dynabase::tenant::Isolation;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&how, bytes)) = data.split_first() else { return };
    let isolation = if how & 1 == 0 { Isolation::Filter } else { Isolation::Database };
    let asker = sent::Asker::new(isolation);
    let out = if how & 2 == 0 {
        asker.bytes(&generate::Choice::new(bytes).request())
    } else {
        // A body, and what follows it as a section of statements.
        let Some(size) = bytes.first_chunk().map(|head| u32::from_le_bytes(*head) as usize) else { return };
        let (body, rest) = bytes.split_at(size.min(bytes.len()));
        let name = ["documents", "updates", "deletes", "ops"][usize::from(how >> 2 & 3)];
        let section = [(name, rest)];
        asker.raw(body, if rest.is_empty() { &[] } else { &section })
    };
    // What is no UTF-8 the oracle can't read; servers can.
    let Some(told) = out.as_deref().and_then(sent::read) else { return };
    if let Err(why) = asker.confined().prove(&told) {
        panic!("{isolation:?}: {why}: {told}");
    }
});
