//! A cursor over JSON text: walks the objects it is told to enter, skips everything else by its brackets. What it skips
//! is not checked further: whoever receives it does.

use std::ops::Range;

use super::super::Error;

/// Deepest nesting that is skipped; Convex itself allows values of 64 levels.
const DEPTH_MAX: u32 = 128;

/// Most members of an object that is read here. A call's own fields are some ten; its first argument is an object of
/// the application, for which Convex allows 1 024 fields.
const MEMBERS_MAX: usize = 1024;

/// One member of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member<'a> {
    /// Its key, which has no escapes.
    pub key: &'a str,
    /// Where its value stands.
    pub value: Range<usize>,
    /// Where all of it stands, key and value.
    pub all: Range<usize>,
}

/// Where we are in a text.
pub(super) struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

pub(super) const fn fault(what: &'static str) -> Error {
    Error::new("convex", what)
}

impl<'a> Cursor<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    pub(super) fn at(text: &'a str, range: &Range<usize>) -> Self {
        Self { text: &text[..range.end], at: range.start }
    }

    pub(super) fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while matches!(bytes.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
        bytes.get(self.at).copied()
    }

    pub(super) fn take(&mut self, wanted: u8) -> Result<(), Error> {
        match self.peek() {
            Some(byte) if byte == wanted => {
                self.at += 1;
                Ok(())
            }
            Some(_) => Err(fault("not the JSON that was expected")),
            None => Err(fault("the JSON breaks off")),
        }
    }

    /// Nothing may follow.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        if self.peek().is_none() { Ok(()) } else { Err(fault("something follows the JSON")) }
    }

    /// The inside of a string, escapes and all, and whether there are any.
    pub(super) fn string(&mut self) -> Result<(Range<usize>, bool), Error> {
        self.take(b'"')?;
        let bytes = self.text.as_bytes();
        let start = self.at;
        let mut escapes = false;
        loop {
            let Some(found) = memchr::memchr2(b'"', b'\\', &bytes[self.at..]) else {
                return Err(fault("a string breaks off"));
            };
            self.at += found;
            if bytes[self.at] == b'"' {
                let inside = start..self.at;
                self.at += 1;
                return Ok((inside, escapes));
            }
            escapes = true;
            self.at += 2;
            if self.at > bytes.len() {
                return Err(fault("a string breaks off"));
            }
        }
    }

    /// A string without escapes.
    pub(super) fn plain(&mut self) -> Result<&'a str, Error> {
        let (inside, escapes) = self.string()?;
        if escapes { Err(fault("escapes where none are needed")) } else { Ok(&self.text[inside]) }
    }

    /// An unsigned number of 32 bits, written with digits alone.
    pub(super) fn number(&mut self) -> Result<u32, Error> {
        let range = self.skip()?;
        let digits = &self.text[range];
        if digits.bytes().all(|b| b.is_ascii_digit()) {
            digits.parse().map_err(|_| fault("a number beyond 32 bits"))
        } else {
            Err(fault("not a number"))
        }
    }

    /// Steps over one value, whatever it is; gives where it stands.
    pub(super) fn skip(&mut self) -> Result<Range<usize>, Error> {
        let first = self.peek().ok_or(fault("the JSON breaks off"))?;
        let start = self.at;
        match first {
            b'"' => {
                self.string()?;
            }
            b'{' | b'[' => self.container()?,
            _ => {
                let bytes = self.text.as_bytes();
                let scalar = |b: &u8| b.is_ascii_alphanumeric() || b"+-.".contains(b);
                self.at += bytes[self.at..].iter().take_while(|b| scalar(b)).count();
                if self.at == start {
                    return Err(fault("not JSON"));
                }
            }
        }
        Ok(start..self.at)
    }

    /// From an opening bracket to the one that closes it.
    fn container(&mut self) -> Result<(), Error> {
        let bytes = self.text.as_bytes();
        // One bit per open bracket, innermost lowest: 1 is a brace.
        let (mut open, mut depth) = (0_u128, 0_u32);
        while let Some(byte) = bytes.get(self.at) {
            match byte {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => {
                    if depth == DEPTH_MAX {
                        return Err(fault("nested too deeply"));
                    }
                    depth += 1;
                    open = open << 1 | u128::from(*byte == b'{');
                }
                b'}' | b']' => {
                    if (open & 1 == 1) != (*byte == b'}') {
                        return Err(fault("brackets that don't match"));
                    }
                    depth -= 1;
                    open >>= 1;
                    if depth == 0 {
                        self.at += 1;
                        return Ok(());
                    }
                }
                _ => {}
            }
            self.at += 1;
        }
        Err(fault("the JSON breaks off"))
    }

    /// Walks an object: `each` gets every key with the cursor at its value and has to step over it; `false` ends the
    /// walk in the middle.
    pub(super) fn walk(
        &mut self,
        mut each: impl FnMut(&'a str, &mut Self) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        self.take(b'{')?;
        if self.peek() == Some(b'}') {
            return self.take(b'}');
        }
        loop {
            self.peek();
            let key = self.plain()?;
            self.take(b':')?;
            self.peek();
            if !each(key, self)? {
                return Ok(());
            }
            match self.peek() {
                Some(b',') => self.take(b',')?,
                _ => return self.take(b'}'),
            }
        }
    }

    /// All members of an object, no key twice.
    pub(super) fn members(&mut self) -> Result<Vec<Member<'a>>, Error> {
        let mut members: Vec<Member<'a>> = Vec::with_capacity(8);
        self.walk(|key, cursor| {
            // The key and its quotes stand before the colon, with or without space.
            let start = key.as_ptr() as usize - cursor.text.as_ptr() as usize - 1;
            if members.len() == MEMBERS_MAX {
                return Err(fault("too many keys"));
            }
            let value = cursor.skip()?;
            members.push(Member { key, all: start..value.end, value });
            Ok(true)
        })?;
        let twice = if members.len() <= 16 {
            members.iter().enumerate().any(|(at, one)| members[..at].iter().any(|other| other.key == one.key))
        } else {
            let mut keys: Vec<&str> = members.iter().map(|member| member.key).collect();
            keys.sort_unstable();
            keys.windows(2).any(|pair| pair[0] == pair[1])
        };
        if twice { Err(fault("a key twice")) } else { Ok(members) }
    }

    /// The elements of an array, at most `max`.
    pub(super) fn elements(&mut self, max: usize) -> Result<Vec<Range<usize>>, Error> {
        self.take(b'[')?;
        let mut elements = Vec::new();
        if self.peek() == Some(b']') {
            self.take(b']')?;
            return Ok(elements);
        }
        loop {
            if elements.len() == max {
                return Err(fault("too many elements"));
            }
            elements.push(self.skip()?);
            match self.peek() {
                Some(b',') => self.take(b',')?,
                _ => {
                    self.take(b']')?;
                    return Ok(elements);
                }
            }
        }
    }
}

/// The member of that name, read by `read`.
pub(super) fn of<'a, T>(
    text: &'a str,
    members: &[Member<'a>],
    key: &str,
    read: impl FnOnce(&mut Cursor<'a>) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    let Some(member) = members.iter().find(|member| member.key == key) else { return Ok(None) };
    read(&mut Cursor::at(text, &member.value)).map(Some)
}
