//! What a query text may do to its session and to storage, without parsing SQL: one pass over its words, quotes and
//! comments respected.
//!
//! Nothing is decided here that isolation between tenants rests on: roles and databases do that. This decides what
//! transaction pooling must keep apart between clients of one tenant, and which texts grow storage. A false alarm
//! costs a reset or a pinned connection; what is missed is named in [`Shape`].

use crate::upstream::postgres::connection::Value;

/// What a text may do. A set of bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape(u32);

impl Shape {
    /// Makes the database larger.
    pub const GROWS: Shape = Shape(1);
    /// May leave session state that nothing on the wire shows: a function that is not one of PostgreSQL's own,
    /// `DO`, `CALL`, `EXECUTE`. Missed: triggers, defaults, views and operators that call such functions.
    pub const HIDDEN: Shape = Shape(1 << 1);
    /// Makes or uses temporary objects.
    pub const TEMP: Shape = Shape(1 << 2);
    /// Takes a session-level advisory lock.
    pub const ADVISORY: Shape = Shape(1 << 3);
    /// Declares a cursor that outlives its transaction.
    pub const HOLD: Shape = Shape(1 << 4);
    /// Sets something in a way that can't be tracked.
    pub const SETS: Shape = Shape(1 << 5);
    /// Loads a library or seeds the generator: only a new connection is clean of it.
    pub const LOAD: Shape = Shape(1 << 6);
    /// Reads `currval` or `lastval`.
    pub const READS_SEQUENCE: Shape = Shape(1 << 7);
    /// May advance a sequence, and so set `currval` and `lastval`.
    pub const MOVES_SEQUENCE: Shape = Shape(1 << 8);
    /// Releases all advisory locks of the session.
    pub const UNLOCKS_ALL: Shape = Shape(1 << 9);
    /// Closes all cursors.
    pub const CLOSES_ALL: Shape = Shape(1 << 10);
    /// Stops listening to everything.
    pub const UNLISTENS_ALL: Shape = Shape(1 << 14);
    /// Begins or ends a transaction.
    pub const TRANSACTION: Shape = Shape(1 << 11);
    /// A lone SELECT, INSERT, UPDATE, DELETE, VALUES or WITH: worth keeping prepared upstream.
    pub const PLAIN: Shape = Shape(1 << 12);
    /// Reads, or frees storage: what a tenant over its storage may always do.
    pub const FREES: Shape = Shape(1 << 13);

    /// The client listens. Known from the server's answer, not from the text.
    pub const LISTENS: Shape = Shape(1 << 15);
    /// The client has statements prepared in SQL. Known from the server's answer.
    pub const PREPARES: Shape = Shape(1 << 16);
    /// The client has statements that are too large or too many to follow it.
    pub const LARGE: Shape = Shape(1 << 17);

    /// May take prepared statements away: `DISCARD`, `DEALLOCATE`. Whether it did, the server's answer tells.
    pub const WIPES: Shape = Shape(1 << 18);

    /// What a text that was too long to read may do.
    pub const UNREAD: Shape = Shape(Shape::GROWS.0 | Shape::HIDDEN.0 | Shape::MOVES_SEQUENCE.0);

    /// What holds a client to its connection until undone.
    pub const PINS: Shape = Shape(
        Shape::TEMP.0 | Shape::ADVISORY.0 | Shape::HOLD.0 | Shape::SETS.0 | Shape::LOAD.0 | Shape::READS_SEQUENCE.0,
    );

    /// The metric labels of the bits that pin.
    pub fn pin_labels(self) -> impl Iterator<Item = &'static str> {
        [
            (Shape::TEMP, "temp"),
            (Shape::ADVISORY, "advisory_lock"),
            (Shape::HOLD, "cursor_with_hold"),
            (Shape::SETS, "set"),
            (Shape::LOAD, "load"),
            (Shape::READS_SEQUENCE, "currval"),
            (Shape::LISTENS, "listen"),
            (Shape::PREPARES, "sql_prepare"),
            (Shape::LARGE, "large_statement"),
        ]
        .into_iter()
        .filter(move |(shape, _)| self.has(*shape))
        .map(|(_, label)| label)
    }

    /// Whether any bit of `other` is set.
    pub fn has(self, other: Shape) -> bool {
        self.0 & other.0 != 0
    }

    /// The bits of both.
    #[must_use]
    pub fn and(self, other: Shape) -> Shape {
        Shape(self.0 | other.0)
    }

    /// The bits that both have.
    #[must_use]
    pub fn only(self, other: Shape) -> Shape {
        Shape(self.0 & other.0)
    }

    /// Without the bits of `other`.
    #[must_use]
    pub fn without(self, other: Shape) -> Shape {
        Shape(self.0 & !other.0)
    }

    /// Whether no bit is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// What a SET or RESET statement does to the session's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Track {
    /// Sets one.
    Set(Box<str>, Value),
    /// Resets one.
    Reset(Box<str>),
    /// Resets all.
    ResetAll,
    /// Nothing that outlives the transaction.
    Nothing,
    /// Something that can't be replayed.
    Unknown,
}

/// By which command tag the server says that a tracked statement has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// `SET` or `RESET`.
    Set,
    /// `SELECT`, for `set_config`.
    Select,
}

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

enum Lead {
    Set,
    Reset,
    Deallocate,
    Other,
}

struct Statement {
    lead: Lead,
    end: usize,
    frees: bool,
    set_config: bool,
}

/// Longest word that is compared; longer ones are nobody's keyword.
const WORD_MAX: usize = 32;

#[derive(Clone, Copy)]
enum Token<'a> {
    Word(&'a [u8]),
    Quoted(&'a [u8]),
    Open,
    Semicolon,
    Dot,
    Other,
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

/// What stands for a quoted name, and for one too long to be a keyword or a function of PostgreSQL's own.
const NAME: &[u8] = b"\"";

/// A word as written.
#[derive(Clone, Copy, Default)]
struct Word<'a>(&'a [u8]);

impl Word<'_> {
    /// Whether it is this keyword, which is in lower case.
    fn is(self, keyword: &[u8]) -> bool {
        self.0.eq_ignore_ascii_case(keyword)
    }

    fn is_any(self, keywords: &[&[u8]]) -> bool {
        keywords.iter().any(|keyword| self.is(keyword))
    }

    /// In lower case.
    fn lower(self, space: &mut [u8; WORD_MAX]) -> &[u8] {
        let Some(space) = space.get_mut(..self.0.len()) else { return NAME };
        space.copy_from_slice(self.0);
        space.make_ascii_lowercase();
        space
    }
}

/// What a statement's first word says: its kind, its shape, and whether it is one that frees storage or reads.
fn lead_of(word: &[u8]) -> (Lead, Shape, bool) {
    let other = |shape| (Lead::Other, shape, false);
    match word {
        b"select" | b"values" | b"with" | b"table" => other(Shape::PLAIN),
        b"delete" => (Lead::Other, Shape::PLAIN, true),
        b"insert" => other(Shape::PLAIN.and(Shape::GROWS).and(Shape::MOVES_SEQUENCE)),
        b"update" => other(Shape::PLAIN.and(Shape::GROWS)),
        b"merge" => other(Shape::GROWS.and(Shape::MOVES_SEQUENCE)),
        b"set" => (Lead::Set, Shape::default(), true),
        b"reset" => (Lead::Reset, Shape::default(), true),
        b"deallocate" => (Lead::Deallocate, Shape::WIPES, true),
        b"discard" => (Lead::Other, Shape::WIPES, true),
        b"begin" | b"start" | b"commit" | b"end" | b"rollback" | b"abort" | b"savepoint" | b"release" => {
            (Lead::Other, Shape::TRANSACTION, true)
        }
        b"truncate" | b"drop" | b"vacuum" | b"show" | b"fetch" | b"move" | b"close" | b"analyze" | b"declare"
        | b"explain" | b"listen" | b"unlisten" | b"lock" | b"checkpoint" | b"copy" => {
            (Lead::Other, Shape::default(), true)
        }
        b"create" | b"alter" | b"reindex" | b"cluster" | b"refresh" | b"import" => other(Shape::GROWS),
        b"do" | b"call" | b"execute" => other(Shape::HIDDEN.and(Shape::GROWS).and(Shape::MOVES_SEQUENCE)),
        b"load" => other(Shape::LOAD),
        _ => other(Shape::default()),
    }
}

/// What a name followed by a parenthesis may do; `before` is the word before it.
fn call(name: &[u8], before: &[u8], set_config: &mut bool) -> Shape {
    // Here a name with a parenthesis is a table, a column list or a type, not a call.
    if matches!(
        before,
        b"into" | b"table" | b"update" | b"copy" | b"index" | b"view" | b"references" | b"constraint" | b"exists"
    ) && name != b"exists"
    {
        return Shape::default();
    }
    match name {
        b"set_config" => {
            *set_config = true;
            Shape::default()
        }
        b"currval" | b"lastval" => Shape::READS_SEQUENCE,
        b"nextval" | b"setval" => Shape::MOVES_SEQUENCE,
        b"setseed" => Shape::LOAD,
        b"pg_advisory_unlock_all" => Shape::UNLOCKS_ALL,
        b"pg_advisory_lock" | b"pg_advisory_lock_shared" | b"pg_try_advisory_lock" | b"pg_try_advisory_lock_shared" => {
            Shape::ADVISORY
        }
        _ if KNOWN.binary_search(&name).is_ok() || KNOWN_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) => {
            Shape::default()
        }
        _ => Shape::HIDDEN.and(Shape::MOVES_SEQUENCE),
    }
}

/// Families of PostgreSQL's own functions that leave nothing behind. `pg_advisory_…` is dealt with above.
const KNOWN_PREFIXES: [&[u8]; 14] = [
    b"pg_",
    b"has_",
    b"json_",
    b"jsonb_",
    b"array_",
    b"regexp_",
    b"to_",
    b"date_",
    b"make_",
    b"ts_",
    b"current_",
    b"percentile_",
    b"string_",
    b"quote_",
];

/// Keywords, types and functions of PostgreSQL that may stand before a parenthesis and leave nothing behind. Sorted.
const KNOWN: &[&[u8]] = &[
    b"abs",
    b"add",
    b"age",
    b"all",
    b"and",
    b"any",
    b"array",
    b"as",
    b"asc",
    b"ascii",
    b"avg",
    b"between",
    b"bigint",
    b"bit",
    b"bit_and",
    b"bit_length",
    b"bit_or",
    b"bool",
    b"bool_and",
    b"bool_or",
    b"btrim",
    b"by",
    b"bytea",
    b"cardinality",
    b"cast",
    b"cbrt",
    b"ceil",
    b"ceiling",
    b"char",
    b"char_length",
    b"character",
    b"check",
    b"chr",
    b"clock_timestamp",
    b"coalesce",
    b"col_description",
    b"collate",
    b"columns",
    b"concat",
    b"concat_ws",
    b"conflict",
    b"convert_from",
    b"convert_to",
    b"corr",
    b"count",
    b"cross",
    b"cube",
    b"cume_dist",
    b"cycle",
    b"dec",
    b"decimal",
    b"decode",
    b"default",
    b"degrees",
    b"dense_rank",
    b"desc",
    b"distinct",
    b"div",
    b"double",
    b"else",
    b"encode",
    b"every",
    b"except",
    b"exists",
    b"exp",
    b"extract",
    b"factorial",
    b"filter",
    b"first_value",
    b"float",
    b"floor",
    b"for",
    b"foreign",
    b"format",
    b"format_type",
    b"from",
    b"full",
    b"gen_random_uuid",
    b"generate_series",
    b"generate_subscripts",
    b"get_bit",
    b"greatest",
    b"group",
    b"grouping",
    b"groups",
    b"hashtext",
    b"having",
    b"if",
    b"ilike",
    b"in",
    b"include",
    b"initcap",
    b"inner",
    b"int",
    b"integer",
    b"intersect",
    b"interval",
    b"is",
    b"isfinite",
    b"join",
    b"justify_days",
    b"justify_hours",
    b"key",
    b"lag",
    b"last_value",
    b"lateral",
    b"lead",
    b"least",
    b"left",
    b"length",
    b"like",
    b"limit",
    b"ln",
    b"log",
    b"lower",
    b"lpad",
    b"ltrim",
    b"matched",
    b"materialized",
    b"max",
    b"md5",
    b"min",
    b"mod",
    b"mode",
    b"natural",
    b"not",
    b"now",
    b"nth_value",
    b"ntile",
    b"nullif",
    b"nulls",
    b"num_nonnulls",
    b"num_nulls",
    b"numeric",
    b"obj_description",
    b"octet_length",
    b"offset",
    b"on",
    b"or",
    b"order",
    b"outer",
    b"over",
    b"overlaps",
    b"overlay",
    b"partition",
    b"position",
    b"power",
    b"primary",
    b"random",
    b"range",
    b"rank",
    b"real",
    b"regr_slope",
    b"repeat",
    b"replace",
    b"returning",
    b"reverse",
    b"right",
    b"rollup",
    b"round",
    b"row",
    b"row_number",
    b"row_to_json",
    b"rows",
    b"rpad",
    b"rtrim",
    b"select",
    b"set",
    b"sets",
    b"shobj_description",
    b"sign",
    b"similarity",
    b"smallint",
    b"some",
    b"split_part",
    b"sqrt",
    b"stddev",
    b"stddev_pop",
    b"stddev_samp",
    b"string_agg",
    b"strpos",
    b"substr",
    b"substring",
    b"sum",
    b"tablesample",
    b"text",
    b"then",
    b"time",
    b"timestamp",
    b"timestamptz",
    b"timetz",
    b"translate",
    b"trim",
    b"trunc",
    b"union",
    b"unique",
    b"unnest",
    b"upper",
    b"using",
    b"uuid",
    b"uuid_generate_v4",
    b"values",
    b"var_pop",
    b"var_samp",
    b"varbit",
    b"varchar",
    b"variance",
    b"varying",
    b"version",
    b"when",
    b"where",
    b"width_bucket",
    b"window",
    b"with",
    b"within",
    b"xmlagg",
    b"xmlelement",
];

struct Lexer<'a> {
    text: &'a [u8],
    at: usize,
    commented: bool,
}

impl<'a> Lexer<'a> {
    /// The next token; `None` at the end, also where a quote or comment is not closed (the server will say so).
    fn next(&mut self) -> Option<Token<'a>> {
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

/// Splits the first word off, in lower case.
fn word(text: &str) -> (String, &str) {
    let text = text.trim_start();
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.' || c == '$')).unwrap_or(text.len());
    (text[..end].to_ascii_lowercase(), &text[end..])
}

fn read_set(body: &[u8]) -> Track {
    let Ok(text) = std::str::from_utf8(body) else { return Track::Unknown };
    let text = text.trim().trim_end_matches(';').trim_end();
    let (_, rest) = word(text);
    let (mut name, mut rest) = word(rest);
    if name == "local" {
        return Track::Nothing;
    }
    if name == "session" {
        (name, rest) = word(rest);
        if matches!(name.as_str(), "authorization" | "characteristics") {
            return Track::Unknown;
        }
    }
    match name.as_str() {
        // These last for a transaction only, and outside one for nothing.
        "transaction"
        | "constraints"
        | "transaction_isolation"
        | "transaction_read_only"
        | "transaction_deferrable" => {
            return Track::Nothing;
        }
        "seed" => return Track::Unknown,
        "role" | "xml" | "session_authorization" | "" => return Track::Unknown,
        "names" => return value("client_encoding", rest),
        "schema" => return value("search_path", rest),
        "time" => {
            let (zone, rest) = word(rest);
            return if zone == "zone" && rest.trim_start().starts_with('\'') {
                value("timezone", rest)
            } else {
                Track::Unknown
            };
        }
        _ => {}
    }
    let rest = rest.trim_start();
    match rest.strip_prefix('=') {
        Some(rest) => value(&name, rest),
        None => match word(rest) {
            (to, rest) if to == "to" => value(&name, rest),
            _ => Track::Unknown,
        },
    }
}

fn value(name: &str, text: &str) -> Track {
    let text = text.trim();
    // A path through the temporary schema makes temporary tables out of ordinary statements.
    if text.is_empty() || (name == "search_path" && text.contains("pg_temp")) {
        Track::Unknown
    } else if text.eq_ignore_ascii_case("default") {
        Track::Reset(name.into())
    } else {
        Track::Set(name.into(), Value::Verbatim(text.into()))
    }
}

fn read_reset(body: &[u8]) -> Track {
    let Ok(text) = std::str::from_utf8(body) else { return Track::Unknown };
    let (_, rest) = word(text);
    let (name, rest) = word(rest);
    match (name.as_str(), rest.trim().trim_end_matches(';').trim()) {
        ("all", "") => Track::ResetAll,
        ("" | "role" | "session" | "time" | "transaction", _) => Track::Unknown,
        (name, "") => Track::Reset(name.into()),
        _ => Track::Unknown,
    }
}

fn read_deallocate(body: &[u8]) -> Option<Box<[u8]>> {
    let text = std::str::from_utf8(body).ok()?;
    let (_, rest) = word(text);
    let rest = rest.trim().trim_end_matches(';').trim();
    let rest = match word(rest) {
        (prepare, tail) if prepare == "prepare" && !tail.trim().is_empty() => tail.trim(),
        _ => rest,
    };
    match rest.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(quoted) => Some(quoted.replace("\"\"", "\"").as_bytes().into()),
        None => match word(rest) {
            (name, "") if name != "all" && !name.is_empty() => Some(name.as_bytes().into()),
            _ => None,
        },
    }
}

/// Reads `SELECT [pg_catalog.]set_config('name', 'value', true|false)` and nothing else. A text where every call is
/// local to its transaction sets nothing that outlives it.
fn read_set_config(body: &[u8]) -> Option<Track> {
    let text = std::str::from_utf8(body).ok()?;
    let (select, rest) = word(text);
    let (function, rest) = word(rest);
    if select != "select" || !matches!(function.as_str(), "set_config" | "pg_catalog.set_config") {
        return None;
    }
    let rest = rest.trim_start().strip_prefix('(')?;
    let (name, rest) = argument(rest)?;
    let (value, rest) = argument(rest.trim_start().strip_prefix(',')?)?;
    let (local, rest) = word(rest.trim_start().strip_prefix(',')?);
    let tail = rest.trim_start().strip_prefix(')')?.trim().trim_end_matches(';').trim();
    if !tail.is_empty() {
        return None;
    }
    match (local.as_str(), name, value) {
        ("true", ..) => Some(Track::Nothing),
        ("false", Some(name), Some(value)) => {
            Some(Track::Set(name.to_ascii_lowercase().into(), Value::Raw(value.into())))
        }
        _ => None,
    }
}

/// One argument: a plain string constant (its value) or a parameter such as `$1` (`None`).
fn argument(text: &str) -> Option<(Option<String>, &str)> {
    let text = text.trim_start();
    if let Some(rest) = text.strip_prefix('$') {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        return Some((None, &rest[end..]));
    }
    let rest = text.strip_prefix('\'')?;
    let end = rest.find('\'')?;
    let value = &rest[..end];
    // A doubled quote or a backslash needs the server's own reading.
    (!rest[end + 1..].starts_with('\'') && !value.contains('\\')).then(|| (Some(value.to_owned()), &rest[end + 1..]))
}

#[cfg(test)]
mod tests;
