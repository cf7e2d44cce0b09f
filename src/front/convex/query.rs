//! The query part of a URL: read with its escapes resolved, written with all of them.

use std::borrow::Cow;

/// Its names and values, in order. What is no UTF-8 after decoding becomes U+FFFD, which no name we look for has.
pub fn pairs(text: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key), decode(value))
    })
}

fn decode(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return text.into();
    }
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = |offset: usize| bytes.get(at + offset).and_then(|b| char::from(*b).to_digit(16));
        match (byte, hex(1), hex(2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                at += 3;
                continue;
            }
            (b'+', ..) => decoded.push(b' '),
            _ => decoded.push(*byte),
        }
        at += 1;
    }
    match String::from_utf8_lossy(&decoded) {
        Cow::Borrowed(_) => String::from_utf8(decoded).unwrap_or_default().into(),
        Cow::Owned(lossy) => lossy.into(),
    }
}

/// A value with everything escaped that could be anything else.
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_however_it_is_written() {
        for text in ["adminKey=x", "a=1&adminKey=x", "%61dminKey=x", "admin%4Bey", "&&adminKey"] {
            assert!(pairs(text).any(|(key, _)| key == "adminKey"), "{text}");
        }
        let read: Vec<_> =
            pairs("a=%7B%22b%22%3A+1%7D&c=%ff%zz&d").map(|(k, v)| (k.into_owned(), v.into_owned())).collect();
        assert_eq!(read[0], ("a".into(), r#"{"b": 1}"#.into()));
        assert_eq!(read[1], ("c".into(), "\u{fffd}%zz".into()));
        assert_eq!(read[2], ("d".into(), String::new()));
        let hard = "{\"a\":\"é&=%+ \"}";
        assert_eq!(
            pairs(&format!("x={}", encode(hard))).next().map(|(_, value)| value.into_owned()).as_deref(),
            Some(hard)
        );
    }
}
