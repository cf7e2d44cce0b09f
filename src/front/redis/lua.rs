//! Just enough of Lua's grammar to confine a script's text: its tokens and its blocks.
//!
//! A tenant's script becomes the body of a function of ours, so it must not end that function: [`confine`] refuses a
//! text whose blocks close more than they opened, or not all that they opened. It must not reach what is ours either:
//! names that begin with [`RESERVED`] are refused. And it must end: a call of [`TICK`], which counts, goes into every
//! loop and every function, so that nothing in the script runs for ever, whatever it catches. [`bare`] takes them out
//! again: a library's code is shown as its tenant wrote it.
//!
//! The tokens are those of Lua 5.1's own lexer, which every Redis runs. Where a text is none, the server says so; what
//! is refused here is what could be read in two ways.

/// What the names of ours begin with.
pub const RESERVED: &[u8] = b"dynabase_";

/// What each turn of a loop and each call of a function does first. The semicolon keeps a following parenthesis from
/// becoming a call of its result.
const TICK: &[u8] = b" dynabase_tick();";

/// Why a text is refused.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// The line, from 1.
    pub line: usize,
    /// As Lua's compiler would say it.
    pub text: &'static str,
}

/// What the lexer is in after `function`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Head {
    /// No head.
    Outside,
    /// Its name, up to the parenthesis.
    Name,
    /// Its parameters.
    Parameters,
}

/// The text with a [`TICK`] in every loop and function, on the lines that it was on.
///
/// # Errors
/// It can't be the body of one function, or names what is reserved.
pub fn confine(text: &[u8]) -> Result<Vec<u8>, Refused> {
    walk(text, Ticks::Put)
}

/// What [`confine`] made its text of.
///
/// # Errors
/// It did not make it.
pub fn bare(text: &[u8]) -> Result<Vec<u8>, Refused> {
    walk(text, Ticks::Take)
}

/// What is done where a loop or function begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ticks {
    /// A [`TICK`] is put there.
    Put,
    /// One is there, and is left out.
    Take,
}

fn walk(text: &[u8], how: Ticks) -> Result<Vec<u8>, Refused> {
    let mut out = Vec::with_capacity(text.len() + text.len() / 8);
    let (mut at, mut line, mut depth) = (0, 1, 0usize);
    let mut head = Head::Outside;
    let refused = |line, text| Err(Refused { line, text });
    while at < text.len() {
        let start = at;
        let byte = text[at];
        let mut ticks = false;
        match byte {
            b'-' if text[at..].starts_with(b"--") => {
                at = match long(text, at + 2) {
                    Long::Ends(end) => end,
                    Long::Never => return refused(line, "unfinished long comment near '<eof>'"),
                    Long::None => text[at..].iter().position(|b| is_newline(*b)).map_or(text.len(), |len| at + len),
                };
            }
            b'[' => match long(text, at) {
                Long::Ends(end) => at = end,
                Long::Never => return refused(line, "unfinished long string near '<eof>'"),
                Long::None => at += 1,
            },
            b'"' | b'\'' => match quoted(text, at) {
                Some(end) => at = end,
                None => return refused(line, "unfinished string"),
            },
            b'0'..=b'9' => at = number(text, at),
            b'.' if text.get(at + 1).is_some_and(u8::is_ascii_digit) => at = number(text, at),
            b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                at += text[at..].iter().take_while(|b| is_word(**b)).count();
                let word = &text[start..at];
                if word.starts_with(RESERVED) {
                    return refused(line, "names that begin with 'dynabase_' are reserved");
                }
                match word {
                    b"do" | b"repeat" => {
                        depth += 1;
                        ticks = true;
                    }
                    b"if" => depth += 1,
                    b"function" => {
                        depth += 1;
                        head = Head::Name;
                    }
                    b"end" | b"until" => match depth.checked_sub(1) {
                        Some(less) => depth = less,
                        None if word == b"end" => return refused(line, "'<eof>' expected near 'end'"),
                        None => return refused(line, "'<eof>' expected near 'until'"),
                    },
                    _ => {}
                }
            }
            b'(' => {
                at += 1;
                if head == Head::Name {
                    head = Head::Parameters;
                }
            }
            b')' => {
                at += 1;
                ticks = head == Head::Parameters;
                if ticks {
                    head = Head::Outside;
                }
            }
            // No symbol of Lua; in some locales it might be a letter.
            128.. => return refused(line, "unexpected symbol"),
            _ => at += 1,
        }
        line += text[start..at].iter().filter(|b| **b == b'\n').count();
        out.extend_from_slice(&text[start..at]);
        match how {
            Ticks::Put if ticks => out.extend_from_slice(TICK),
            Ticks::Take if ticks && text[at..].starts_with(TICK) => at += TICK.len(),
            Ticks::Take if ticks => return refused(line, "a loop or function that does not count"),
            Ticks::Put | Ticks::Take => {}
        }
    }
    if depth > 0 { refused(line, "'end' expected near '<eof>'") } else { Ok(out) }
}

fn is_newline(byte: u8) -> bool {
    byte == b'\n' || byte == b'\r'
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

/// Where a number ends: whatever follows it without a break is part of it.
fn number(text: &[u8], at: usize) -> usize {
    let digits = text[at..].iter().take_while(|b| b.is_ascii_digit() || **b == b'.').count();
    let mut end = at + digits;
    if text.get(end).is_some_and(|b| b.eq_ignore_ascii_case(&b'e')) {
        end += 1;
        end += usize::from(text.get(end).is_some_and(|b| *b == b'+' || *b == b'-'));
    }
    end + text[end..].iter().take_while(|b| is_word(**b)).count()
}

/// Where a quoted string ends.
fn quoted(text: &[u8], start: usize) -> Option<usize> {
    let quote = text[start];
    let mut at = start + 1;
    loop {
        match *text.get(at)? {
            byte if byte == quote => return Some(at + 1),
            byte if is_newline(byte) => return None,
            b'\\' => {
                let escaped = *text.get(at + 1)?;
                at += 2;
                // Both bytes of a line's end are one.
                if is_newline(escaped) && text.get(at).is_some_and(|next| is_newline(*next) && *next != escaped) {
                    at += 1;
                }
            }
            _ => at += 1,
        }
    }
}

/// Whether `[`, any number of `=` and `[` stand somewhere.
enum Long {
    /// They do, and what they open ends here.
    Ends(usize),
    /// They do, and it never ends.
    Never,
    /// They don't.
    None,
}

fn long(text: &[u8], at: usize) -> Long {
    let Some(rest) = text.get(at..).and_then(|rest| rest.strip_prefix(b"[")) else { return Long::None };
    let level = rest.iter().take_while(|b| **b == b'=').count();
    if rest.get(level) != Some(&b'[') {
        return Long::None;
    }
    let close = [b"]", b"=".repeat(level).as_slice(), b"]"].concat();
    let inside = at + level + 2;
    match memchr::memmem::find(&text[inside..], &close) {
        Some(len) => Long::Ends(inside + len + close.len()),
        None => Long::Never,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confined(text: &str) -> Result<String, String> {
        match confine(text.as_bytes()) {
            Ok(out) => Ok(String::from_utf8(out).expect("text").replace(" dynabase_tick();", "•")),
            Err(Refused { line, text }) => Err(format!("{line}: {text}")),
        }
    }

    #[test]
    fn every_loop_and_function_ticks() {
        for (text, expected) in [
            ("while true do end", "while true do• end"),
            ("for i=1,3 do x() end", "for i=1,3 do• x() end"),
            ("repeat (f)() until x", "repeat• (f)() until x"),
            ("local f=function(a,...) return a end", "local f=function(a,...)• return a end"),
            ("function m.a:b (x) end", "function m.a:b (x)• end"),
            ("function f --(\n(a) end", "function f --(\n(a)• end"),
            ("if (a) then return (b) end", "if (a) then return (b) end"),
            ("return 'while do' -- do\n", "return 'while do' -- do\n"),
            ("return [[do]]..[==[ ]] do ]==]", "return [[do]]..[==[ ]] do ]==]"),
            ("--[[ do ]] do end", "--[[ do ]] do• end"),
            ("--[=x do \ndo end", "--[=x do \ndo• end"),
            ("return 'a\\'do\\\ndo\\\r\ndo'", "return 'a\\'do\\\ndo\\\r\ndo'"),
            ("return x.ended, undo", "return x.ended, undo"),
            ("for i=0x1,3e-1 do end", "for i=0x1,3e-1 do• end"),
            ("return a[b[1]]", "return a[b[1]]"),
            ("return ' dynabase_tick();' do end", "return '•' do• end"),
        ] {
            assert_eq!(confined(text).as_deref(), Ok(expected), "{text}");
            let whole = confine(text.as_bytes()).expect("it was taken");
            assert_eq!(bare(&whole).as_deref(), Ok(text.as_bytes()), "{text}");
        }
        assert!(bare(b"do end").is_err() && bare(b"do dynabase_tick() end").is_err());
    }

    #[test]
    fn nothing_ends_what_is_around_it() {
        for (text, expected) in [
            ("return 1 end do return {-5000,'x'} end local function z()", "1: '<eof>' expected near 'end'"),
            ("\nend do return {-5000,'x'} end local function z()", "2: '<eof>' expected near 'end'"),
            ("until x repeat", "1: '<eof>' expected near 'until'"),
            ("if x then", "1: 'end' expected near '<eof>'"),
            ("return 1 --[[", "1: unfinished long comment near '<eof>'"),
            ("return [==[ ]=]", "1: unfinished long string near '<eof>'"),
            ("return 'a\nend'", "1: unfinished string"),
            ("return \"a", "1: unfinished string"),
            ("return 'a\\", "1: unfinished string"),
            ("dynabase_made=function() return -5000 end", "1: names that begin with 'dynabase_' are reserved"),
            ("\n\nreturn x.dynabase_tick", "3: names that begin with 'dynabase_' are reserved"),
            ("return é", "1: unexpected symbol"),
        ] {
            assert_eq!(confined(text), Err(expected.to_owned()), "{text}");
        }
        // What only looks like an end.
        for text in ["return 'end'", "--end\n", "--[[end]]", "return [[end]]", "return x.ended", "return '\\'end'"] {
            assert!(confined(text).is_ok(), "{text}");
        }
        for text in [&b"return 'dynabase_x'"[..], b"return '\0\xff'", b"--\xff\nreturn 1"] {
            assert!(confine(text).is_ok(), "{}", text.escape_ascii());
        }
    }
}
