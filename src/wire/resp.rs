//! The Redis protocol, both versions: finding the end of what came without building anything from it.
//!
//! Requests: [`Request`] walks one command, resumable at any byte. Replies: [`Reply`] finds the end of one reply
//! without recursion and without remembering it, so that depth costs nothing and a large array is walked once.
//! Encoding: the small `put_*` functions. Nothing here knows what a command means.

/// Longest bulk string of a request in bytes; Redis' own `proto-max-bulk-len`.
pub const BULK_MAX: usize = 512 << 20;

/// Most arguments of one request. Redis allows 2^31 - 1; a million keys in one MSET is what a client may need.
pub const ARGS_MAX: usize = 1 << 20;

/// Longest header or inline line in bytes, as in Redis.
pub const LINE_MAX: usize = 64 << 10;

/// Longest bulk string before authentication, as in Redis; a token fits.
pub const BULK_MAX_UNAUTHENTICATED: usize = 16 << 10;

/// Most arguments before authentication, as in Redis.
pub const ARGS_MAX_UNAUTHENTICATED: usize = 10;

/// Values that may be outstanding inside one reply, a guard against a count that overflows.
const VALUES_MAX: u64 = 1 << 40;

/// What is wrong with bytes from a client. The text is Redis' own, after `ERR Protocol error: `.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault(pub &'static str);

/// One argument's place, counted from the first byte of its command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arg {
    /// First byte.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

impl Arg {
    /// The bytes of this argument in the command's own bytes.
    pub fn of<'a>(&self, command: &'a [u8]) -> &'a [u8] {
        &command[self.start..self.start + self.len]
    }
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Complete: this many bytes are the command. No arguments means an empty line, to be skipped.
    Complete(usize),
    /// An inline command: this many bytes with its line end. Its arguments are not in [`Request::args`].
    Inline(usize),
    /// More bytes are needed.
    Incomplete,
}

/// Walks one request. Feed it the bytes from the command's first byte on, each time with more of them; it goes on
/// where it stopped.
#[derive(Debug, Default)]
pub struct Request {
    /// The arguments found so far.
    pub args: Vec<Arg>,
    left: usize,
    at: usize,
    /// Bytes of the bulk at `at` whose header is already read.
    bulk: Option<usize>,
    started: bool,
}

impl Request {
    /// Forgets the present command and keeps the memory, unless one long command made it large.
    pub fn reset(&mut self) {
        self.args.clear();
        if self.args.capacity() > 4096 {
            self.args.shrink_to(64);
        }
        self.left = 0;
        self.at = 0;
        self.bulk = None;
        self.started = false;
    }

    /// Bytes that the command needs at least, counted from its first: how much to read on.
    pub fn wanted(&self) -> usize {
        self.at + self.bulk.map_or(1, |len| len + 2)
    }

    /// All arguments that the command's header announces; 0 before the header came.
    pub fn announced(&self) -> usize {
        self.args.len() + self.left
    }

    /// Where the first unfinished argument begins (its payload if its header came), and a walker over all that follows.
    pub fn rest(&self) -> (usize, Rest) {
        let rest = match self.bulk {
            Some(len) => Rest { left: self.left.saturating_sub(1), bulk: len, end: 2, announced: len as u64 },
            None => Rest { left: self.left, bulk: 0, end: 0, announced: 0 },
        };
        (self.at, rest)
    }

    /// Goes on with `bytes`, the command's own from its first byte. `bulk_max` and `args_max` are the caps in force.
    ///
    /// # Errors
    /// A [`Fault`]; the stream can't be followed any more.
    #[inline]
    pub fn advance(&mut self, bytes: &[u8], args_max: usize, bulk_max: usize) -> Result<Progress, Fault> {
        if !self.started {
            match bytes.first() {
                None => return Ok(Progress::Incomplete),
                Some(b'*') => {}
                Some(_) => return inline(bytes),
            }
            let Some((count, next)) = number(bytes, 1, "invalid multibulk length")? else {
                return Ok(Progress::Incomplete);
            };
            self.started = true;
            self.at = next;
            if count <= 0 {
                return Ok(Progress::Complete(next));
            }
            let count = usize::try_from(count).map_err(|_| Fault("invalid multibulk length"))?;
            if count > args_max {
                return Err(Fault(if args_max == ARGS_MAX_UNAUTHENTICATED {
                    "unauthenticated multibulk length"
                } else {
                    "invalid multibulk length"
                }));
            }
            self.left = count;
        }
        while self.left > 0 {
            let len = match self.bulk {
                Some(len) => len,
                None => {
                    match bytes.get(self.at) {
                        None => return Ok(Progress::Incomplete),
                        Some(b'$') => {}
                        Some(_) => return Err(Fault("expected '$'")),
                    }
                    let Some((len, next)) = number(bytes, self.at + 1, "invalid bulk length")? else {
                        return Ok(Progress::Incomplete);
                    };
                    let len = usize::try_from(len).map_err(|_| Fault("invalid bulk length"))?;
                    if len > bulk_max {
                        return Err(Fault(if bulk_max == BULK_MAX_UNAUTHENTICATED {
                            "unauthenticated bulk length"
                        } else {
                            "invalid bulk length"
                        }));
                    }
                    self.at = next;
                    self.bulk = Some(len);
                    len
                }
            };
            let end = self.at + len;
            if bytes.len() < end + 2 {
                return Ok(Progress::Incomplete);
            }
            // Redis skips these two bytes unread; a parser that disagrees about them is how requests are smuggled.
            if &bytes[end..end + 2] != b"\r\n" {
                return Err(Fault("invalid bulk length"));
            }
            self.args.push(Arg { start: self.at, len });
            self.at = end + 2;
            self.bulk = None;
            self.left -= 1;
        }
        Ok(Progress::Complete(self.at))
    }
}

/// Walks the rest of a command whose beginning is known, without keeping it: for commands too large to be held.
#[derive(Debug)]
pub struct Rest {
    /// Arguments whose header is still to come.
    left: usize,
    /// Payload bytes of the present one still to come.
    bulk: usize,
    /// Bytes of its line end still to come.
    end: u8,
    /// Payload bytes that the headers so far announced.
    pub announced: u64,
}

impl Rest {
    /// Walks `bytes` on. Gives how many of them belong to the command and are as they should be, and whether it ends
    /// there. When it does not, the unwalked rest is an unfinished header: bring it again with more.
    ///
    /// # Errors
    /// A [`Fault`]; none of `bytes` may be passed on.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<(usize, bool), Fault> {
        let mut at = 0;
        loop {
            let step = self.bulk.min(bytes.len() - at);
            at += step;
            self.bulk -= step;
            if self.bulk > 0 {
                return Ok((at, false));
            }
            while self.end > 0 {
                match (bytes.get(at), self.end) {
                    (None, _) => return Ok((at, false)),
                    (Some(b'\r'), 2) | (Some(b'\n'), 1) => {}
                    (Some(_), _) => return Err(Fault("invalid bulk length")),
                }
                at += 1;
                self.end -= 1;
            }
            if self.left == 0 {
                return Ok((at, true));
            }
            match bytes.get(at) {
                None => return Ok((at, false)),
                Some(b'$') => {}
                Some(_) => return Err(Fault("expected '$'")),
            }
            let Some((len, next)) = number(bytes, at + 1, "invalid bulk length")? else { return Ok((at, false)) };
            let len = usize::try_from(len).map_err(|_| Fault("invalid bulk length"))?;
            if len > BULK_MAX {
                return Err(Fault("invalid bulk length"));
            }
            at = next;
            self.left -= 1;
            self.bulk = len;
            self.end = 2;
            self.announced += len as u64;
        }
    }
}

fn inline(bytes: &[u8]) -> Result<Progress, Fault> {
    match memchr::memchr(b'\n', bytes) {
        Some(at) if at < LINE_MAX => Ok(Progress::Inline(at + 1)),
        None if bytes.len() < LINE_MAX => Ok(Progress::Incomplete),
        _ => Err(Fault("too big inline request")),
    }
}

/// Reads a decimal number that starts at `at` and ends with CRLF; gives it with the next line's place.
#[inline]
fn number(bytes: &[u8], at: usize, what: &'static str) -> Result<Option<(i64, usize)>, Fault> {
    let mut value: i64 = 0;
    let mut i = at;
    let negative = bytes.get(i) == Some(&b'-');
    if negative {
        i += 1;
    }
    let digits = i;
    loop {
        match bytes.get(i) {
            None => {
                return if i - at > 20 { Err(Fault(what)) } else { Ok(None) };
            }
            // No leading zero: Redis refuses it, and the header is forwarded as it came.
            Some(b'0') if i == digits && !negative && matches!(bytes.get(i + 1), None | Some(b'\r')) => {}
            Some(b'0') if i == digits => return Err(Fault(what)),
            Some(b @ b'0'..=b'9') if i - digits < 18 => value = value * 10 + i64::from(b - b'0'),
            Some(b'\r') if i > digits => break,
            Some(_) => return Err(Fault(what)),
        }
        i += 1;
    }
    match bytes.get(i + 1) {
        None => Ok(None),
        Some(b'\n') => Ok(Some((if negative { -value } else { value }, i + 2))),
        Some(_) => Err(Fault(what)),
    }
}

/// Splits an inline command as Redis does: blanks separate, `"…"` with escapes, `'…'` with `\'`.
///
/// # Errors
/// Unbalanced quotes.
pub fn split_inline(line: &[u8]) -> Result<Vec<Vec<u8>>, Fault> {
    let bad = Fault("unbalanced quotes in request");
    let mut words = Vec::new();
    let mut i = 0;
    loop {
        while line.get(i).is_some_and(|b| b.is_ascii_whitespace() || *b == 0x0b) {
            i += 1;
        }
        if i >= line.len() {
            return Ok(words);
        }
        let mut word = Vec::new();
        loop {
            match line.get(i) {
                None => break,
                Some(b) if b.is_ascii_whitespace() => break,
                Some(quote @ (b'"' | b'\'')) => {
                    let double = *quote == b'"';
                    let quote = *quote;
                    i += 1;
                    loop {
                        match (line.get(i), line.get(i + 1)) {
                            (None, _) => return Err(bad),
                            (Some(b'\\'), Some(b'x')) if double && hex(line, i + 2).is_some() => {
                                word.extend(hex(line, i + 2));
                                i += 4;
                            }
                            (Some(b'\\'), Some(next)) if double => {
                                word.push(match next {
                                    b'n' => b'\n',
                                    b'r' => b'\r',
                                    b't' => b'\t',
                                    b'b' => 8,
                                    b'a' => 7,
                                    other => *other,
                                });
                                i += 2;
                            }
                            (Some(b'\\'), Some(b'\'')) => {
                                word.push(b'\'');
                                i += 2;
                            }
                            (Some(b), next) if *b == quote => {
                                if next.is_some_and(|b| !b.is_ascii_whitespace()) {
                                    return Err(bad);
                                }
                                i += 1;
                                break;
                            }
                            (Some(b), _) => {
                                word.push(*b);
                                i += 1;
                            }
                        }
                    }
                }
                Some(b) => {
                    word.push(*b);
                    i += 1;
                }
            }
        }
        words.push(word);
    }
}

fn hex(line: &[u8], at: usize) -> Option<u8> {
    let digit = |i: usize| line.get(i).and_then(|b| char::from(*b).to_digit(16));
    u8::try_from(digit(at)? * 16 + digit(at + 1)?).ok()
}

/// Finds the end of one reply, of any depth, resumable at any byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reply {
    /// Values still to come; 0 before the first byte.
    values: u64,
    /// A first header was walked.
    begun: bool,
    /// Payload bytes of a bulk (with its CRLF) still to come.
    skip: usize,
}

impl Reply {
    /// Whether a reply is begun and not ended.
    pub fn is_open(&self) -> bool {
        self.values > 0 || self.skip > 0
    }

    /// Whether any of its bytes were walked.
    pub fn is_begun(&self) -> bool {
        self.begun
    }

    /// Walks `bytes` on. Gives how many of them belong to the reply, and whether it ends there. When it does not
    /// end, the unwalked rest is an unfinished line: bring it again with more.
    ///
    /// # Errors
    /// A [`Fault`]: this is no reply.
    #[inline]
    pub fn advance(&mut self, bytes: &[u8]) -> Result<(usize, bool), Fault> {
        let mut at = 0;
        if !self.is_open() {
            self.values = 1;
        }
        loop {
            if self.skip > 0 {
                let step = self.skip.min(bytes.len() - at);
                at += step;
                self.begun = true;
                self.skip -= step;
                if self.skip > 0 {
                    return Ok((at, false));
                }
            }
            if self.values == 0 {
                return Ok((at, true));
            }
            self.begun |= at > 0;
            let Some(kind) = bytes.get(at) else { return Ok((at, false)) };
            match kind {
                b'$' | b'!' | b'=' => {
                    let Some((len, next)) = number(bytes, at + 1, "bad length in a reply")? else {
                        return Ok((at, false));
                    };
                    at = next;
                    self.values -= 1;
                    if let Ok(len) = usize::try_from(len) {
                        self.skip = len + 2;
                    }
                }
                b'*' | b'~' | b'>' | b'%' | b'|' => {
                    let Some((count, next)) = number(bytes, at + 1, "bad count in a reply")? else {
                        return Ok((at, false));
                    };
                    at = next;
                    let count = u64::try_from(count).unwrap_or(0);
                    let children = match kind {
                        b'%' => count.saturating_mul(2),
                        // An attribute stands before the value that it describes.
                        b'|' => count.saturating_mul(2).saturating_add(1),
                        _ => count,
                    };
                    self.values = (self.values - 1).saturating_add(children);
                    if self.values > VALUES_MAX {
                        return Err(Fault("bad count in a reply"));
                    }
                }
                b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => match memchr::memchr(b'\n', &bytes[at..]) {
                    Some(end) => {
                        at += end + 1;
                        self.values -= 1;
                    }
                    None => return Ok((at, false)),
                },
                _ => return Err(Fault("unknown type of reply")),
            }
        }
    }
}

/// A cursor over one complete reply, for the few whose inside we rewrite.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a> {
    /// What is not yet read.
    pub rest: &'a [u8],
}

/// One header or scalar of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// `$`, with its payload.
    Bulk(&'a [u8]),
    /// `*`, `~`, `>` or `%`: its mark and the number of values that follow.
    Many(u8, usize),
    /// Anything else, a null too, as its own bytes.
    Other(&'a [u8]),
}

impl<'a> Cursor<'a> {
    /// Reads the next header or scalar; `None` at the end or where the bytes are not a reply.
    pub fn item(&mut self) -> Option<Item<'a>> {
        let bytes = self.rest;
        match *bytes.first()? {
            b'$' => {
                let (len, next) = number(bytes, 1, "").ok()??;
                match usize::try_from(len) {
                    Ok(len) => {
                        let payload = bytes.get(next..next + len)?;
                        self.rest = bytes.get(next + len + 2..)?;
                        Some(Item::Bulk(payload))
                    }
                    Err(_) => {
                        self.rest = &bytes[next..];
                        Some(Item::Other(&bytes[..next]))
                    }
                }
            }
            mark @ (b'*' | b'~' | b'>' | b'%') => {
                let (count, next) = number(bytes, 1, "").ok()??;
                self.rest = &bytes[next..];
                match usize::try_from(count) {
                    Ok(count) => Some(Item::Many(mark, if mark == b'%' { count * 2 } else { count })),
                    Err(_) => Some(Item::Other(&bytes[..next])),
                }
            }
            _ => {
                let whole = self.whole()?;
                Some(Item::Other(whole))
            }
        }
    }

    /// Reads the next value whole, whatever is inside.
    pub fn whole(&mut self) -> Option<&'a [u8]> {
        let (len, done) = Reply::default().advance(self.rest).ok()?;
        if !done {
            return None;
        }
        let (value, rest) = self.rest.split_at(len);
        self.rest = rest;
        Some(value)
    }
}

/// Appends `*count`.
#[inline]
pub fn put_array(out: &mut Vec<u8>, count: usize) {
    put_head(out, b'*', count);
}

/// Appends any header: `mark`, `count`, CRLF.
#[inline]
pub fn put_head(out: &mut Vec<u8>, mark: u8, count: usize) {
    out.push(mark);
    put_decimal(out, count as u64);
    out.extend_from_slice(b"\r\n");
}

/// Appends a bulk string.
#[inline]
pub fn put_bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    put_head(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// Appends a bulk string made of a prefix and a rest.
#[inline]
pub fn put_bulk_joined(out: &mut Vec<u8>, prefix: &[u8], rest: &[u8]) {
    put_head(out, b'$', prefix.len() + rest.len());
    out.extend_from_slice(prefix);
    out.extend_from_slice(rest);
    out.extend_from_slice(b"\r\n");
}

/// Appends `:value`.
pub fn put_integer(out: &mut Vec<u8>, value: i64) {
    out.push(b':');
    if value < 0 {
        out.push(b'-');
    }
    put_decimal(out, value.unsigned_abs());
    out.extend_from_slice(b"\r\n");
}

/// Appends an error line. Line breaks in `text` become blanks, as in Redis.
pub fn put_error(out: &mut Vec<u8>, text: &str) {
    out.push(b'-');
    out.extend(text.bytes().map(|b| if b == b'\r' || b == b'\n' { b' ' } else { b }));
    out.extend_from_slice(b"\r\n");
}

/// Appends a status line.
pub fn put_status(out: &mut Vec<u8>, text: &str) {
    out.push(b'+');
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Appends a whole request.
pub fn put_request(out: &mut Vec<u8>, words: &[&[u8]]) {
    put_array(out, words.len());
    words.iter().for_each(|word| put_bulk(out, word));
}

/// Appends decimal digits.
#[inline]
pub fn put_decimal(out: &mut Vec<u8>, value: u64) {
    if value < 10 {
        out.push(b'0' + value as u8);
        return;
    }
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut left = value;
    while left > 0 {
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
    }
    out.extend_from_slice(&digits[at..]);
}

#[cfg(test)]
mod tests;
