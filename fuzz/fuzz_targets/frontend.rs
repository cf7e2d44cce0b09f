//! Messages from clients, as many as arrive in one read.
#![no_main]

use dynabase::wire::postgres::frontend;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Ok(Some(head)) = frontend::frontend_head(rest) {
        let whole = head.len <= rest.len();
        let message = &rest[..head.len.min(rest.len())];
        if head.kind == b'B'
            && let Ok(Some(bind)) = frontend::bind(message, whole)
        {
            assert!(bind.head_len <= message.len());
            // What we put in place of the head is read as the same names.
            let mut rewritten = Vec::new();
            frontend::put_bind_head(&mut rewritten, bind.portal, bind.statement, message.len() - bind.head_len);
            rewritten.extend_from_slice(&message[bind.head_len..]);
            let again = frontend::bind(&rewritten, true).expect("it was just written").expect("it is whole");
            assert_eq!((again.portal, again.statement), (bind.portal, bind.statement));
        }
        if !whole {
            return;
        }
        if let Ok(parse) = frontend::parse(message) {
            let mut rewritten = Vec::new();
            frontend::put_parse(&mut rewritten, parse.name, parse.definition);
            assert_eq!(frontend::parse(&rewritten), Ok(parse));
        }
        let _ = frontend::subject(message);
        let _ = frontend::query(message);
        let _ = frontend::password(message);
        let _ = frontend::sasl_initial(message);
        rest = &rest[head.len..];
    }
});
