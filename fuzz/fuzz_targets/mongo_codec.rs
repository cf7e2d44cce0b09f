//! BSON in place: what was checked can be walked to its leaves, copies are the same bytes, and a decoder of another
//! house reads no less.
#![no_main]

use dynabase::wire::mongo::bson::{self, DEPTH_MAX, Document, Index};
use libfuzzer_sys::fuzz_target;

/// Walks what was checked; gives the number of elements.
fn walk(document: Document<'_>, depth: usize) -> usize {
    assert!(depth < DEPTH_MAX, "checked not to be deeper");
    let mut spans = 0;
    let mut count = 0;
    for element in document {
        let element = element.expect("checked");
        assert!(element.span.ends_with(element.value) && !element.key.contains(&0));
        spans += element.span.len();
        count += 1;
        let _ = (element.whole(), element.truthy(), element.str(), element.binary(), element.name());
        if let Some(inner) = element.document().or(element.array()) {
            count += walk(inner, depth + 1);
        }
    }
    assert_eq!(spans, document.elements().len());
    count
}

fuzz_target!(|data: &[u8]| {
    let Ok((document, rest)) = Document::split(data) else { return };
    assert_eq!(document.bytes().len() + rest.len(), data.len());
    let _ = document.has_duplicate_key();
    if bson::validate(document, DEPTH_MAX).is_err() {
        return;
    }
    walk(document, 0);
    let mut copy = Vec::new();
    let open = bson::open(&mut copy);
    for element in document {
        bson::put(&mut copy, &element.expect("checked"));
    }
    bson::close(&mut copy, open);
    assert_eq!(copy, document.bytes());
    let mut array = Vec::new();
    let open = bson::open(&mut array);
    for (at, element) in document.iter().enumerate() {
        bson::put_as(&mut array, Index::new(at).as_str(), &element.expect("checked"));
    }
    bson::close(&mut array, open);
    bson::validate(Document::new(&array).expect("closed"), DEPTH_MAX).expect("as good as the first");
    // The other decoder is stricter in texts and looser in nothing.
    if let Ok(theirs) = ::bson::Document::from_reader(document.bytes()) {
        for (key, _) in &theirs {
            assert!(document.get(key).expect("checked").is_some());
        }
    }
});
