//! Who asks for what: the headers of `POST /sql`.

use hyper::{HeaderMap, header};

use crate::{front::postgres::Options, wire::neon::reply::Shape};

/// The header with the connection string.
pub const CONNECTION_STRING: &str = "neon-connection-string";

/// Longest connection string in bytes: a token of 16 KiB, percent-encoded, and the rest.
const CONNECTION_STRING_MAX: usize = 48 * 1024;

/// What the headers ask for.
#[derive(Debug)]
pub struct Login {
    /// User, database, name of the application.
    pub options: Options,
    /// The host in the connection string.
    pub host: String,
    /// The token or service key.
    pub credential: Vec<u8>,
    /// How rows are written where the body does not say.
    pub shape: Shape,
    /// How a batch's transaction begins.
    pub begin: Begin,
}

/// A batch's transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Begin {
    /// As the client said it, and as SQL says it.
    pub isolation: Option<(&'static str, &'static str)>,
    /// `READ ONLY`.
    pub read_only: bool,
    /// `DEFERRABLE`.
    pub deferrable: bool,
}

/// The isolation levels, as headers and as SQL say them.
const LEVELS: [(&str, &str); 4] = [
    ("ReadUncommitted", "READ UNCOMMITTED"),
    ("ReadCommitted", "READ COMMITTED"),
    ("RepeatableRead", "REPEATABLE READ"),
    ("Serializable", "SERIALIZABLE"),
];

impl Begin {
    /// The statement.
    pub fn statement(&self) -> String {
        let mut text = String::from("START TRANSACTION");
        let mut comma = "";
        let level = self.isolation.map(|(_, level)| format!("ISOLATION LEVEL {level}"));
        let modes = [level.as_deref(), self.read_only.then_some("READ ONLY"), self.deferrable.then_some("DEFERRABLE")];
        for mode in modes.into_iter().flatten() {
            text.push_str(comma);
            text.push(' ');
            text.push_str(mode);
            comma = ",";
        }
        text
    }
}

/// Reads the headers. A bearer token goes before a password in the connection string.
///
/// # Errors
/// What is wrong, in Neon's words.
pub fn read(headers: &HeaderMap) -> Result<Login, String> {
    let is_true = |name: &str| headers.get(name).is_some_and(|value| value.as_bytes() == b"true");
    let isolation = match headers.get("neon-batch-isolation-level") {
        None => None,
        Some(value) => {
            let level = LEVELS.into_iter().find(|(name, _)| name.as_bytes() == value.as_bytes());
            Some(level.ok_or("invalid isolation level")?)
        }
    };
    let begin =
        Begin { isolation, read_only: is_true("neon-batch-read-only"), deferrable: is_true("neon-batch-deferrable") };
    let shape = Shape { arrays: is_true("neon-array-mode"), raw: is_true("neon-raw-text-output") };
    let string = headers
        .get(CONNECTION_STRING)
        .and_then(|value| value.to_str().ok())
        .filter(|value| value.len() <= CONNECTION_STRING_MAX)
        .ok_or("invalid header: neon-connection-string")?;
    let place = place(string)?;
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let credential = match (bearer, place.password) {
        (Some(token), _) => token.trim_ascii().to_vec(),
        (None, Some(password)) => password.into_bytes(),
        (None, None) => return Err("missing authentication credentials: required password".into()),
    };
    let options = Options {
        user: place.user,
        database: place.database,
        application_name: place.application_name,
        ..Options::default()
    };
    Ok(Login { options, host: place.host, credential, shape, begin })
}

#[derive(Debug, PartialEq, Eq)]
struct Place {
    user: String,
    password: Option<String>,
    host: String,
    database: String,
    application_name: Option<String>,
}

/// Takes `postgres://user[:password]@host[:port]/database[?…]` apart. Host and port lead nowhere here: the host may say whose
/// it is.
fn place(string: &str) -> Result<Place, String> {
    let (scheme, rest) = string.split_once("://").ok_or("invalid connection string: relative URL without a base")?;
    if !scheme.eq_ignore_ascii_case("postgres") && !scheme.eq_ignore_ascii_case("postgresql") {
        return Err("incorrect scheme".into());
    }
    let rest = rest.split('#').next().unwrap_or_default();
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    // The last one: a password may hold the character unescaped.
    let (login, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    if host.is_empty() {
        return Err("invalid connection string: empty host".into());
    }
    let (user, password) = match login.split_once(':') {
        Some((user, password)) => (user, Some(password)),
        None => (login, None),
    };
    let text = |part: &str| decode(part).ok_or("invalid connection string: malformed percent-encoding");
    let user = text(user)?;
    if user.is_empty() {
        return Err("missing username".into());
    }
    let database = text(path.split('/').next().unwrap_or_default())?;
    if database.is_empty() {
        return Err("missing database name".into());
    }
    if user.contains('\0') || database.contains('\0') {
        return Err("invalid connection string: zero byte".into());
    }
    let password = password.filter(|password| !password.is_empty()).map(text).transpose()?;
    let application_name = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("application_name="))
        .and_then(|value| decode(&value.replace('+', " ")))
        .map(|name| crate::front::postgres::clean(&name));
    Ok(Place { user, password, host: host.to_owned(), database, application_name })
}

/// Percent-decoding; `None` for what is no UTF-8 afterwards, or a `%` without two digits.
pub fn decode(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let digit = |byte: Option<&u8>| byte.and_then(|&byte| char::from(byte).to_digit(16));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        rest = behind;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (high, low) = (digit(rest.first())?, digit(rest.get(1))?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use hyper::header::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    #[test]
    fn a_connection_string_is_taken_apart() {
        let found = place("postgresql://a%40b:p%2Fw@ep-x.example.com:5432/d%20b/x?sslmode=require&application_name=pkg:npm/%40neon%2Fx@1+2#f").unwrap();
        assert_eq!(
            (found.user.as_str(), found.password.as_deref(), found.database.as_str()),
            ("a@b", Some("p/w"), "d b")
        );
        assert_eq!(found.application_name.as_deref(), Some("pkg:npm/@neon/x@1 2"));
        assert_eq!(found.host, "ep-x.example.com:5432");
        assert_eq!(place("postgres://app@h/app").unwrap().password, None);
        assert_eq!(place("postgres://app:@h/app").unwrap().password, None);
    }

    #[test]
    fn what_is_wrong_with_it_is_said_in_neon_s_words() {
        for (string, words) in [
            ("", "invalid connection string"),
            ("app@h/app", "invalid connection string"),
            ("mysql://app@h/app", "incorrect scheme"),
            ("postgres://h/app", "missing username"),
            ("postgres://:x@h/app", "missing username"),
            ("postgres://app@h", "missing database name"),
            ("postgres://app@h/", "missing database name"),
            ("postgres://app@/app", "invalid connection string"),
            ("postgres://a%zz@h/app", "invalid connection string"),
            ("postgres://a%00@h/app", "invalid connection string"),
            ("postgres://a%ff@h/app", "invalid connection string"),
        ] {
            let error = place(string).expect_err(string);
            assert!(error.starts_with(words), "{string}: {error}");
        }
    }

    #[test]
    fn a_bearer_token_goes_before_a_password() {
        let string = ("neon-connection-string", "postgres://app:one@h/app");
        let with = |extra: &[(&str, &str)]| read(&headers(&[&[string][..], extra].concat()));
        assert_eq!(with(&[]).unwrap().credential, b"one");
        assert_eq!(with(&[("authorization", "Bearer two")]).unwrap().credential, b"two");
        assert_eq!(with(&[("authorization", "bearer two")]).unwrap().credential, b"one", "the prefix is exact");
        assert_eq!(read(&headers(&[])).unwrap_err(), "invalid header: neon-connection-string");
        let bare = headers(&[("neon-connection-string", "postgres://app@h/app")]);
        assert_eq!(read(&bare).unwrap_err(), "missing authentication credentials: required password");
    }

    #[test]
    fn only_true_is_true_and_levels_have_one_spelling() {
        let string = ("neon-connection-string", "postgres://app:x@h/app");
        let with = |extra: &[(&str, &str)]| read(&headers(&[&[string][..], extra].concat()));
        let login = with(&[
            ("neon-raw-text-output", "True"),
            ("neon-array-mode", "true"),
            ("neon-batch-read-only", "true"),
            ("neon-batch-deferrable", "1"),
            ("neon-batch-isolation-level", "RepeatableRead"),
        ])
        .unwrap();
        assert_eq!(login.shape, Shape { arrays: true, raw: false });
        assert_eq!(login.begin.statement(), "START TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY");
        assert_eq!(with(&[]).unwrap().begin.statement(), "START TRANSACTION");
        let bad = with(&[("neon-batch-isolation-level", "repeatableread")]);
        assert_eq!(bad.unwrap_err(), "invalid isolation level");
    }
}
