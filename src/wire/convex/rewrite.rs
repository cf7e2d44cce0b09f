//! The frames that go on otherwise than they came. What is kept is copied byte by byte.

use std::ops::Range;

use super::{
    super::Error,
    client::OBSERVED,
    json::{Cursor, fault},
};

/// `Connect` without the timestamp that the client has seen.
///
/// # Errors
/// Not an object.
pub fn forget_observed(text: &str) -> Result<String, Error> {
    let members = Cursor::new(text).members()?;
    let kept = members.iter().filter(|member| member.key != OBSERVED).map(|member| &text[member.all.clone()]);
    Ok(object(kept))
}

/// `text` with `new` where `range` was.
pub fn replace(text: &str, range: &Range<usize>, new: &str) -> String {
    [&text[..range.start], new, &text[range.end..]].concat()
}

/// An array of `elements`.
pub fn array<'a>(elements: impl IntoIterator<Item = &'a str>) -> String {
    join('[', elements, ']')
}

fn object<'a>(members: impl IntoIterator<Item = &'a str>) -> String {
    join('{', members, '}')
}

fn join<'a>(open: char, parts: impl IntoIterator<Item = &'a str>, close: char) -> String {
    let mut text = String::from(open);
    for (at, part) in parts.into_iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        text.push_str(part);
    }
    text.push(close);
    text
}

/// Arguments (an object, or an array with one) in which `key` is `value`, whatever the client wrote there. Both are
/// names without anything to escape.
///
/// # Errors
/// Arguments of another form, or keys in which `key` could hide.
pub fn with_argument(args: &str, key: &str, value: &str) -> Result<String, Error> {
    let mut cursor = Cursor::new(args);
    let own = format!("\"{key}\":\"{value}\"");
    if cursor.peek() == Some(b'[') {
        let elements = cursor.elements(1)?;
        cursor.end()?;
        return match elements.first() {
            Some(first) => Ok(array([with_member(&args[first.clone()], key, &own)?.as_str()])),
            None => Ok(format!("[{{{own}}}]")),
        };
    }
    with_member(args, key, &own)
}

fn with_member(text: &str, key: &str, own: &str) -> Result<String, Error> {
    let mut cursor = Cursor::new(text);
    if cursor.peek() != Some(b'{') {
        return Err(fault("arguments that are no object"));
    }
    let members = cursor.members()?;
    cursor.end()?;
    let others = members.iter().filter(|member| member.key != key).map(|member| &text[member.all.clone()]);
    Ok(object(std::iter::once(own).chain(others)))
}

/// What a body of the HTTP API holds that is read here: the member's range, for each of `keys`.
///
/// # Errors
/// Not one object, or a key twice.
pub fn body<const N: usize>(text: &str, keys: [&str; N]) -> Result<[Option<Range<usize>>; N], Error> {
    let mut cursor = Cursor::new(text);
    let members = cursor.members()?;
    cursor.end()?;
    Ok(keys.map(|key| members.iter().find(|member| member.key == key).map(|member| member.value.clone())))
}

/// The elements of the array at `range`, at most `max`.
///
/// # Errors
/// No array, or a longer one.
pub fn elements(text: &str, range: &Range<usize>, max: usize) -> Result<Vec<Range<usize>>, Error> {
    Cursor::at(text, range).elements(max)
}
