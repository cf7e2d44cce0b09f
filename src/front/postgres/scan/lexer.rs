//! A text as tokens: words, quoted names, what joins them; strings and comments are passed over.

#[derive(Clone, Copy)]
pub(super) enum Token<'a> {
    Word(&'a [u8]),
    Quoted(&'a [u8]),
    Open,
    Semicolon,
    Dot,
    Other,
}

pub(super) struct Lexer<'a> {
    pub(super) text: &'a [u8],
    pub(super) at: usize,
    pub(super) commented: bool,
}

impl<'a> Lexer<'a> {
    /// The next token; `None` at the end, also where a quote or comment is not closed (the server will say so).
    pub(super) fn next(&mut self) -> Option<Token<'a>> {
        loop {
            let rest = self.text.get(self.at..)?;
            let &first = rest.first()?;
            if CLASS[usize::from(first)] & STARTS != 0 && !(first | 0x20 == b'e' && rest.get(1) == Some(&b'\'')) {
                let len = 1 + run(&rest[1..], CONTINUES);
                self.at += len;
                return Some(Token::Word(&rest[..len]));
            }
            match first {
                b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c => self.at += 1,
                b'-' if rest.get(1) == Some(&b'-') => {
                    self.commented = true;
                    self.at += memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
                }
                b'/' if rest.get(1) == Some(&b'*') => {
                    self.commented = true;
                    self.comment();
                }
                b'\'' => return self.quoted(1, b'\'', false, Token::Other),
                b'"' => {
                    let start = self.at + 1;
                    self.quoted(1, b'"', false, Token::Other);
                    return Some(Token::Quoted(&self.text[start.min(self.at)..self.at]));
                }
                b'e' | b'E' if rest.get(1) == Some(&b'\'') => return self.quoted(2, b'\'', true, Token::Other),
                b'$' => return self.dollar(),
                b';' => return self.single(Token::Semicolon),
                b'(' => return self.single(Token::Open),
                b'.' => return self.single(Token::Dot),
                b'0'..=b'9' => {
                    self.at += run(rest, NUMBER);
                    return Some(Token::Other);
                }
                _ => return self.single(Token::Other),
            }
        }
    }

    fn single(&mut self, token: Token<'a>) -> Option<Token<'a>> {
        self.at += 1;
        Some(token)
    }

    /// Skips to behind the closing quote; doubled quotes stay inside, backslashes escape where `escapes`.
    fn quoted(&mut self, skip: usize, quote: u8, escapes: bool, token: Token<'a>) -> Option<Token<'a>> {
        self.at += skip;
        loop {
            let rest = &self.text[self.at..];
            let found = if escapes { memchr::memchr2(quote, b'\\', rest) } else { memchr::memchr(quote, rest) };
            let Some(found) = found else {
                self.at = self.text.len();
                return Some(token);
            };
            let double = rest[found] == b'\\' || rest.get(found + 1) == Some(&quote);
            self.at = (self.at + found + if double { 2 } else { 1 }).min(self.text.len());
            if !double {
                return Some(token);
            }
        }
    }

    /// A dollar-quoted string, a parameter, or a lone dollar.
    fn dollar(&mut self) -> Option<Token<'a>> {
        let rest = &self.text[self.at..];
        let tag = run(&rest[1..], TAG);
        let closed = rest.get(1 + tag) == Some(&b'$') && !rest[1..].first().is_some_and(u8::is_ascii_digit);
        if closed {
            let tag = &rest[..tag + 2];
            let body = &rest[tag.len()..];
            let end = memchr::memmem::find(body, tag);
            self.at += end.map_or(rest.len(), |end| tag.len() + end + tag.len());
        } else {
            self.at += 1 + tag;
        }
        Some(Token::Other)
    }

    /// Skips a comment with the comments inside it.
    fn comment(&mut self) {
        let mut depth = 0usize;
        while let Some(rest) = self.text.get(self.at..)
            && !rest.is_empty()
        {
            if rest.starts_with(b"/*") {
                depth += 1;
                self.at += 2;
            } else if rest.starts_with(b"*/") {
                depth -= 1;
                self.at += 2;
                if depth == 0 {
                    return;
                }
            } else {
                self.at += 1 + memchr::memchr2(b'/', b'*', &rest[1..]).unwrap_or(rest.len() - 1);
            }
        }
    }
}

/// What a byte may do in a token: begin a word, stand inside one, inside a dollar quote's tag, inside a number.
const STARTS: u8 = 1;
const CONTINUES: u8 = 1 << 1;
const TAG: u8 = 1 << 2;
const NUMBER: u8 = 1 << 3;

const CLASS: [u8; 256] = {
    let mut class = [0; 256];
    let mut at = 0;
    while at < 256 {
        let b = at as u8;
        if b.is_ascii_alphabetic() || b == b'_' {
            class[at] = STARTS | CONTINUES | TAG | NUMBER;
        } else if b >= 0x80 {
            class[at] = STARTS | CONTINUES | TAG;
        } else if b.is_ascii_digit() {
            class[at] = CONTINUES | TAG | NUMBER;
        } else if b == b'$' {
            class[at] = CONTINUES;
        }
        at += 1;
    }
    class
};

/// How many bytes at the head of `bytes` are of a class.
fn run(bytes: &[u8], class: u8) -> usize {
    bytes.iter().position(|&b| CLASS[usize::from(b)] & class == 0).unwrap_or(bytes.len())
}
