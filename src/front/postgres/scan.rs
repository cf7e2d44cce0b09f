//! What a query text may do to its session and to storage, without parsing SQL: one pass over its words, quotes and
//! comments respected.
//!
//! Nothing is decided here that isolation between tenants rests on: roles and databases do that. This decides what
//! transaction pooling must keep apart between clients of one tenant, and which texts grow storage. A false alarm
//! costs a reset or a pinned connection; what is missed is named in [`Shape`].

mod lexer;
mod setting;
mod shape;
mod words;

use lexer::{Lexer, Token};
pub use setting::{By, Track};
use setting::{read_deallocate, read_reset, read_set, read_set_config};
pub use shape::Shape;
use words::{Lead, NAME, WORD_MAX, Word, call, lead_of};

/// The result of one pass over a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// What it may do.
    pub shape: Shape,
    /// Its SET and RESET statements, in order; `SELECT set_config(…)` counts as one where it can be read.
    pub tracks: Vec<(By, Track)>,
    /// The statement that it deallocates, where it does nothing else.
    pub deallocates: Option<Box<[u8]>>,
    /// How many statements it has.
    pub statements: u32,
}

/// Reads a query text.
pub fn scan(text: &[u8]) -> Scan {
    let mut scan = Scan::default();
    let mut all_free = true;
    let mut lexer = Lexer { text, at: 0, commented: false };
    loop {
        let start = lexer.at;
        lexer.commented = false;
        let Some(statement) = statement(&mut lexer, &mut scan) else { break };
        scan.statements += 1;
        all_free &= statement.frees;
        let body = &text[start..statement.end];
        match statement.lead {
            Lead::Set => scan.tracks.push((By::Set, if lexer.commented { Track::Unknown } else { read_set(body) })),
            Lead::Reset => scan.tracks.push((By::Set, read_reset(body))),
            Lead::Deallocate => scan.deallocates = read_deallocate(body),
            Lead::Other => {}
        }
        if statement.set_config {
            match read_set_config(body) {
                Some(track) if !lexer.commented => scan.tracks.push((By::Select, track)),
                _ => scan.shape = scan.shape.and(Shape::SETS),
            }
        }
    }
    if scan.statements > 1 {
        scan.deallocates = None;
        scan.shape = scan.shape.without(Shape::PLAIN);
        // Which of them a COMMIT between the statements has kept is more than we want to know.
        if scan.shape.has(Shape::TRANSACTION) && scan.tracks.iter().any(|(_, track)| *track != Track::Nothing) {
            scan.shape = scan.shape.and(Shape::SETS);
        }
    }
    if all_free && scan.statements <= 1 {
        scan.shape = scan.shape.and(Shape::FREES);
    }
    scan
}

struct Statement {
    lead: Lead,
    end: usize,
    frees: bool,
    set_config: bool,
}

/// Reads one statement's words into `scan`; `None` at the end of the text.
fn statement(lexer: &mut Lexer<'_>, scan: &mut Scan) -> Option<Statement> {
    let mut shape = scan.shape;
    let mut lead: Option<Lead> = None;
    let mut frees = false;
    let mut set_config = false;
    let mut declares = false;
    let mut copies = false;
    let mut reads = false;
    let mut unlistens = false;
    // The last word, when nothing but white space came since: a function's name if a parenthesis follows.
    let mut name: Option<Word<'_>> = None;
    // The keyword before that name: after INTO, say, a name with a parenthesis is a table with columns.
    let mut before = Word::default();
    let mut previous = Word::default();
    let mut any = false;
    loop {
        let token = lexer.next();
        match token {
            None | Some(Token::Semicolon) => {
                if token.is_none() && !any {
                    return None;
                }
                if !any {
                    continue;
                }
                break;
            }
            Some(Token::Word(text)) => {
                any = true;
                let word = Word(text);
                if lead.is_none() {
                    let mut space = [0; WORD_MAX];
                    let lower = word.lower(&mut space);
                    let (found, lead_shape, is_free) = lead_of(lower);
                    lead = Some(found);
                    shape = shape.and(lead_shape);
                    frees = is_free;
                    declares = lower == b"declare";
                    reads = lower == b"select";
                    copies = lower == b"copy";
                    unlistens = lower == b"unlisten";
                } else {
                    // By length first: most words are none of these, and this is on the way of every query.
                    shape = shape.and(match text.len() {
                        3 if word.is(b"all") && previous.is(b"close") => Shape::CLOSES_ALL,
                        4 if copies && word.is(b"from") => Shape::GROWS.and(Shape::MOVES_SEQUENCE),
                        4 if declares && word.is(b"hold") => Shape::HOLD,
                        4 if word.is(b"temp") => Shape::TEMP,
                        4 if word.is(b"into") && !previous.is_any(&[b"insert", b"merge"]) => Shape::GROWS,
                        5 if word.is(b"merge") => Shape::GROWS.and(Shape::MOVES_SEQUENCE),
                        6 if word.is(b"insert") => Shape::GROWS.and(Shape::MOVES_SEQUENCE),
                        6 if word.is(b"update") && !previous.is_any(&[b"for", b"on", b"key"]) => Shape::GROWS,
                        7 if word.is(b"pg_temp") => Shape::TEMP,
                        9 if word.is(b"temporary") => Shape::TEMP,
                        // Updating this view sets.
                        11 if !reads && word.is(b"pg_settings") => Shape::SETS,
                        _ => Shape::default(),
                    });
                }
                before = previous;
                previous = word;
                name = Some(word);
            }
            Some(Token::Open) => {
                any = true;
                if let Some(word) = name.take() {
                    let (mut name, mut keyword) = ([0; WORD_MAX], [0; WORD_MAX]);
                    shape = shape.and(call(word.lower(&mut name), before.lower(&mut keyword), &mut set_config));
                }
            }
            Some(Token::Dot) => {
                // In `schema.name(` what came before the schema decides.
                any = true;
                previous = before;
                name = None;
            }
            Some(Token::Quoted(text)) => {
                any = true;
                if text.starts_with(b"pg_temp") {
                    shape = shape.and(Shape::TEMP);
                }
                // A quoted name may be a function's; `"f"(` is one unless a table is expected here.
                before = previous;
                previous = Word(NAME);
                name = Some(previous);
            }
            Some(Token::Other) => {
                any = true;
                if unlistens {
                    shape = shape.and(Shape::UNLISTENS_ALL);
                }
                name = None;
                previous = Word::default();
            }
        }
    }
    if !shape.has(Shape::GROWS) && scan.shape.is_empty() {
        // Reading is always allowed.
        frees |= shape.has(Shape::PLAIN);
    }
    scan.shape = shape;
    if shape.has(Shape::GROWS) {
        frees = false;
    }
    Some(Statement { lead: lead.unwrap_or(Lead::Other), end: lexer.at, frees, set_config })
}

#[cfg(test)]
mod tests;
