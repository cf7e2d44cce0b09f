//! What a body asks for: one query, or several as one transaction.

use std::borrow::Cow;

use super::json::{DEPTH_MAX, Fault, Scanner};

/// Parameters of one query: the wire counts them in sixteen bits.
pub const PARAMS_MAX: usize = 65_535;

/// Queries of one transaction: what a driver gathers in an array, far below what would fit into a body.
pub const QUERIES_MAX: usize = 10_000;

/// One query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query<'a> {
    /// Its text.
    pub text: Cow<'a, str>,
    /// Its parameters, each a JSON value's own text.
    pub params: Vec<&'a str>,
    /// Whether its rows are arrays; `None` follows the request's header.
    pub array_mode: Option<bool>,
}

/// A body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// One query.
    Single(Query<'a>),
    /// Queries of one transaction.
    Batch(Vec<Query<'a>>),
}

/// Reads a body.
///
/// # Errors
/// It is not JSON, or not of the shape.
pub fn parse(body: &[u8]) -> Result<Request<'_>, Fault> {
    let text = std::str::from_utf8(body).map_err(|error| Fault { at: error.valid_up_to(), what: "invalid UTF-8" })?;
    let mut scanner = Scanner::new(text);
    let mut batch = None;
    let single = query(&mut scanner, Some(&mut batch))?;
    scanner.end()?;
    match (single, batch) {
        (Some(single), _) => Ok(Request::Single(single)),
        (None, Some(queries)) => Ok(Request::Batch(queries)),
        (None, None) => Err(scanner.fault("missing field `query` or `queries`")),
    }
}

/// Reads one object: a query, if it has a text; and the queries of a batch where they may stand.
fn query<'a>(
    scanner: &mut Scanner<'a>,
    mut batch: Option<&mut Option<Vec<Query<'a>>>>,
) -> Result<Option<Query<'a>>, Fault> {
    scanner.expect(b'{', "expected an object")?;
    let (mut text, mut params, mut array_mode) = (None, None, None);
    if !scanner.pass(b'}') {
        loop {
            let key = scanner.string()?;
            scanner.expect(b':', "expected `:`")?;
            match &*key {
                "query" if text.is_none() => text = Some(scanner.string()?),
                "params" if params.is_none() => params = Some(params_of(scanner)?),
                "arrayMode" if array_mode.is_none() => {
                    array_mode = match scanner.value(DEPTH_MAX)? {
                        "true" => Some(true),
                        "false" => Some(false),
                        "null" => None,
                        _ => return Err(scanner.fault("`arrayMode` has to be true or false")),
                    }
                }
                "queries" if batch.as_ref().is_some_and(|batch| batch.is_none()) => {
                    let queries = queries(scanner)?;
                    if let Some(batch) = &mut batch {
                        **batch = Some(queries);
                    }
                }
                // Two readers that pick different ones of two keys see two different requests.
                "query" | "params" | "queries" => return Err(scanner.fault("duplicate or misplaced field")),
                _ => {
                    scanner.value(DEPTH_MAX)?;
                }
            }
            if !scanner.pass(b',') {
                break;
            }
        }
        scanner.expect(b'}', "expected `,` or `}`")?;
    }
    Ok(text.map(|text| Query { text, params: params.unwrap_or_default(), array_mode }))
}

fn queries<'a>(scanner: &mut Scanner<'a>) -> Result<Vec<Query<'a>>, Fault> {
    scanner.expect(b'[', "`queries` has to be an array")?;
    let mut queries = Vec::new();
    if scanner.pass(b']') {
        return Ok(queries);
    }
    loop {
        if queries.len() >= QUERIES_MAX {
            return Err(scanner.fault("more than 10000 queries"));
        }
        queries.push(query(scanner, None)?.ok_or(scanner.fault("missing field `query`"))?);
        if !scanner.pass(b',') {
            break;
        }
    }
    scanner.expect(b']', "expected `,` or `]`")?;
    Ok(queries)
}

fn params_of<'a>(scanner: &mut Scanner<'a>) -> Result<Vec<&'a str>, Fault> {
    scanner.expect(b'[', "`params` has to be an array")?;
    let mut params = Vec::new();
    if scanner.pass(b']') {
        return Ok(params);
    }
    loop {
        if params.len() >= PARAMS_MAX {
            return Err(scanner.fault("more than 65535 parameters"));
        }
        params.push(scanner.value(DEPTH_MAX)?);
        if !scanner.pass(b',') {
            break;
        }
    }
    scanner.expect(b']', "expected `,` or `]`")?;
    Ok(params)
}

/// What Postgres is sent for a parameter, as text; `None` is NULL. `value` is a JSON value's own text: numbers keep
/// their digits.
///
/// # Errors
/// A string that is no Unicode.
pub fn param(value: &str) -> Result<Option<Cow<'_, str>>, Fault> {
    match value.as_bytes().first() {
        Some(b'n') => Ok(None),
        Some(b'"') => Scanner::new(value).string().map(Some),
        Some(b'{') => Ok(Some(Cow::Owned(compact(value)))),
        Some(b'[') => {
            let mut literal = String::with_capacity(value.len() + 2);
            put_array(&mut literal, &mut Scanner::new(value))?;
            Ok(Some(Cow::Owned(literal)))
        }
        _ => Ok(Some(Cow::Borrowed(value))),
    }
}

/// A valid JSON text without white space between its parts.
fn compact(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let (mut quoted, mut escaped) = (false, false);
    for character in value.chars() {
        if quoted || !matches!(character, ' ' | '\t' | '\n' | '\r') {
            text.push(character);
        }
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = quoted,
            '"' => quoted = !quoted,
            _ => {}
        }
    }
    text
}

/// A JSON array as an array literal. The text was validated, depth included.
fn put_array(out: &mut String, scanner: &mut Scanner<'_>) -> Result<(), Fault> {
    scanner.expect(b'[', "expected an array")?;
    out.push('{');
    if !scanner.pass(b']') {
        loop {
            match scanner.peek() {
                Some(b'[') => put_array(out, scanner)?,
                Some(b'"') => put_quoted(out, &scanner.string()?),
                Some(b'{') => put_quoted(out, &compact(scanner.value(DEPTH_MAX)?)),
                Some(b'n') => {
                    scanner.value(1)?;
                    out.push_str("NULL");
                }
                _ => out.push_str(scanner.value(1)?),
            }
            if !scanner.pass(b',') {
                break;
            }
            out.push(',');
        }
        scanner.expect(b']', "expected `,` or `]`")?;
    }
    out.push('}');
    Ok(())
}

/// An element in quotes, as array literals have them: only quotes and backslashes are escaped.
fn put_quoted(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            out.push('\\');
        }
        out.push(character);
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(value: &str) -> Option<String> {
        param(value).expect("good").map(Cow::into_owned)
    }

    #[test]
    fn parameters_become_postgres_text() {
        for (json, wanted) in [
            ("null", None),
            ("true", Some("true")),
            ("42", Some("42")),
            ("1.250", Some("1.250")),
            ("123456789012345678901234567890.5", Some("123456789012345678901234567890.5")),
            (r#""a\"b""#, Some("a\"b")),
            (r#"{ "a" : [1, "x y", {"b": " \" "}] }"#, Some(r#"{"a":[1,"x y",{"b":" \" "}]}"#)),
            ("[]", Some("{}")),
            ("[1, 2,null , true]", Some("{1,2,NULL,true}")),
            (
                r#"["NULL", "a\"b", "c\\d", "x,y", "", "line\nbreak"]"#,
                Some("{\"NULL\",\"a\\\"b\",\"c\\\\d\",\"x,y\",\"\",\"line\nbreak\"}"),
            ),
            ("[[1,2],[3,4]]", Some("{{1,2},{3,4}}")),
            (r#"[{"a": "b\"c"}]"#, Some(r#"{"{\"a\":\"b\\\"c\"}"}"#)),
        ] {
            assert_eq!(text(json).as_deref(), wanted, "{json}");
        }
    }

    #[test]
    fn bodies_are_read() {
        let single = |body: &'static str| match parse(body.as_bytes()) {
            Ok(Request::Single(query)) => query,
            other => panic!("{body}: {other:?}"),
        };
        let query = single(r#" {"params":["a", 1] , "query":"select \u0041", "arrayMode":true, "other":{"x":[]}} "#);
        assert_eq!((&*query.text, query.params, query.array_mode), ("select A", vec!["\"a\"", "1"], Some(true)));
        assert_eq!(single(r#"{"query":""}"#).params, Vec::<&str>::new());
        assert_eq!(single(r#"{"queries":[],"query":"x"}"#).text, "x", "the single one wins");
        assert_eq!(parse(br#"{"queries":[]}"#), Ok(Request::Batch(Vec::new())));
        assert!(
            matches!(parse(br#"{"queries":[{"query":"a"},{"query":"b","params":[]}]}"#), Ok(Request::Batch(q)) if q.len() == 2)
        );
    }

    #[test]
    fn other_shapes_are_refused() {
        for bad in [
            "",
            "[]",
            "1",
            "{}",
            r#"{"query":1}"#,
            r#"{"query":null}"#,
            r#"{"query":"x","params":null}"#,
            r#"{"query":"x","params":{}}"#,
            r#"{"queries":null}"#,
            r#"{"queries":[{}]}"#,
            r#"{"queries":[1]}"#,
            r#"{"query":"x"} x"#,
            r#"{"query":"x","arrayMode":1}"#,
            r#"{"query":"x","query":"y"}"#,
            r#"{"queries":[{"query":"a","queries":[]}]}"#,
            r#"{"query":"\ud800"}"#,
            "{\"query\":\"\u{1}\"}",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(b"{\"query\":\"\xff\"}").is_err());
        let many = format!(r#"{{"query":"x","params":[{}1]}}"#, "1,".repeat(PARAMS_MAX));
        assert!(parse(many.as_bytes()).is_err());
    }
}
