//! Whatever is loaded as a library stays inside its tenant's name and comes back as it was given.
#![no_main]

use dynabase::{
    front::redis::library,
    tenant::{
        Names, OrgId,
        namespace::{NameStyle, RootSecret},
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let root = RootSecret::new(&[7; 32]).expect("32 bytes");
    let space = Names::new(root, NameStyle::Opaque).redis(&OrgId::parse("a").expect("an id"));
    // Most inputs are no library: the same text behind a first line that is one.
    for code in [bytes.to_vec(), [b"#!lua name=l\n", bytes].concat()] {
        let Ok(wrapped) = library::wrap(&code, &space, true) else { continue };
        let head = format!("#!lua name={}{}\n--[[", space.function_mark(), wrapped.name);
        assert!(wrapped.text.starts_with(head.as_bytes()));
        assert_eq!(library::original(&wrapped.text), Some(code));
    }
});
