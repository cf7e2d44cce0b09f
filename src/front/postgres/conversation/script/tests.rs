//! The property: whatever the script, nobody notices anybody else.

use proptest::{collection::vec, prelude::*};

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn whatever_clients_and_servers_say_every_answer_reaches_who_asked(script in vec(any::<u8>(), 0..600)) {
        super::play(&script);
    }

    /// Without raw bytes, so that every check holds to the end.
    #[test]
    fn well_behaved_clients_never_notice_each_other(script in vec((0u8..2, 0u8..120, any::<u8>(), any::<u8>()), 0..150)) {
        let script: Vec<u8> = script.into_iter().flat_map(|(who, act, a, b)| [act | who << 7, a, b]).collect();
        super::play(&script);
    }
}
