//! Startup parameters: which are ours, which become settings of the session, which are refused.

use super::refuse;
use crate::{
    tenant::{OrgId, PoolMode},
    upstream::postgres::connection::{Settings, Value},
    wire::postgres::{
        backend::{Report, Severity},
        startup::Login,
    },
};

/// Longest `application_name`, as in PostgreSQL (NAMEDATALEN - 1).
const NAME_MAX: usize = 63;

/// How the client wants to show who it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// The token as cleartext password.
    #[default]
    Password,
    /// SASL OAUTHBEARER: `options=-c dynabase.auth=oauth`.
    Bearer,
}

/// What a StartupMessage asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The logical user.
    pub user: String,
    /// The logical database.
    pub database: String,
    /// `options=-c dynabase.pool_mode=…`.
    pub pool_mode: Option<PoolMode>,
    /// `options=-c dynabase.auth=…`.
    pub auth: Auth,
    /// `application_name`, as PostgreSQL would keep it.
    pub application_name: Option<String>,
    /// Every other setting, in the client's words.
    pub settings: Settings,
    /// The organisation whose host the client came to: nobody else's token opens anything there.
    pub host_org: Option<OrgId>,
}

impl Options {
    /// Reads the parameters.
    ///
    /// # Errors
    /// The report that ends the connection.
    pub fn read(login: &Login) -> Result<Self, Report> {
        let fatal = |code, message: String| refuse::plain(Severity::Fatal, code, message);
        let user = login.parameter("user").unwrap_or_default();
        if user.is_empty() {
            return Err(fatal("28000", "no PostgreSQL user name specified in startup packet".into()));
        }
        let database = login.parameter("database").filter(|database| !database.is_empty()).unwrap_or(user);
        let mut options = Options { user: user.into(), database: database.into(), ..Options::default() };
        for (name, value) in &login.parameters {
            match name.as_str() {
                "user" | "database" => {}
                "options" => {
                    for (name, value) in command_line(value).map_err(|word| {
                        fatal("42601", format!("invalid command-line argument for server process: {word}"))
                    })? {
                        options.set(&name, &value)?;
                    }
                }
                "replication" if matches!(value.as_str(), "false" | "off" | "no" | "0") => {}
                "replication" => {
                    return Err(fatal("0A000", "replication connections are not available through dynabase".into()));
                }
                name => options.set(name, value)?,
            }
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), Report> {
        let fatal = |code, message: String| refuse::plain(Severity::Fatal, code, message);
        let invalid = |name: &str| fatal("22023", format!("invalid value for parameter \"{name}\": \"{value}\""));
        match name.to_ascii_lowercase().as_str() {
            "dynabase.pool_mode" => {
                self.pool_mode = Some(match value {
                    "transaction" => PoolMode::Transaction,
                    "session" => PoolMode::Session,
                    _ => return Err(invalid(name)),
                });
            }
            "dynabase.auth" => {
                self.auth = match value {
                    "password" => Auth::Password,
                    "oauth" => Auth::Bearer,
                    _ => return Err(invalid(name)),
                };
            }
            other if other.starts_with("dynabase.") => {
                return Err(fatal("42704", format!("unrecognized configuration parameter \"{name}\"")));
            }
            "role" | "session_authorization" => {
                return Err(fatal("42501", format!("permission denied to set parameter \"{name}\"")));
            }
            "application_name" => self.application_name = Some(clean(value)),
            _ => self.settings = self.settings.with(name, Value::Raw(value.into())),
        }
        Ok(())
    }
}

/// PostgreSQL keeps names printable ASCII and cuts them.
pub fn clean(name: &str) -> String {
    name.bytes().map(|b| if (32..127).contains(&b) { char::from(b) } else { '?' }).take(NAME_MAX).collect()
}

/// Splits `options` as the server does: at white space, with backslash escapes; `-c name=value`, `-cname=value`,
/// `--name=value`. A dash in a long option's name stands for an underscore.
///
/// # Errors
/// The word that is none of these.
fn command_line(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c' => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(chars.next()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    let mut settings = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("--") {
            Some(long) => long.to_owned(),
            None => match word.strip_prefix("-c") {
                Some("") => words.next().ok_or(word)?,
                Some(joined) => joined.to_owned(),
                None => return Err(word),
            },
        };
        let (name, value) = setting.split_once('=').ok_or_else(|| setting.clone())?;
        settings.push((name.replace('-', "_"), value.to_owned()));
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(parameters: &[(&str, &str)]) -> Result<Options, Report> {
        let parameters = parameters.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Options::read(&Login { minor: 0, parameters, extensions: Vec::new() })
    }

    #[test]
    fn options_are_split_as_the_server_splits_them() {
        let split = |text| command_line(text).unwrap();
        let pair = |n: &str, v: &str| (n.to_owned(), v.to_owned());
        assert_eq!(split("-c a=1  -cb=2 --c-d=3"), [pair("a", "1"), pair("b", "2"), pair("c_d", "3")]);
        assert_eq!(split(r"-c search_path=a\ b\\c"), [pair("search_path", r"a b\c")]);
        assert_eq!(split("-c a=x+y=z"), [pair("a", "x+y=z")]);
        assert_eq!(split(""), []);
        for bad in ["-d 1", "-c", "-c novalue", "x"] {
            assert!(command_line(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn who_is_asked_for_and_what_is_refused() {
        let options =
            read(&[("user", "app"), ("options", "-c dynabase.pool_mode=session"), ("DateStyle", "ISO")]).unwrap();
        assert_eq!((options.user.as_str(), options.database.as_str()), ("app", "app"));
        assert_eq!(options.pool_mode, Some(PoolMode::Session));
        assert_eq!(options.settings.value("datestyle"), Some(&Value::Raw("ISO".into())));
        let code = |parameters: &[(&str, &str)]| read(parameters).unwrap_err().code;
        assert_eq!(code(&[("database", "x")]), "28000");
        assert_eq!(code(&[("user", "a"), ("replication", "database")]), "0A000");
        assert_eq!(code(&[("user", "a"), ("role", "postgres")]), "42501");
        assert_eq!(code(&[("user", "a"), ("options", "-c session_authorization=x")]), "42501");
        assert_eq!(code(&[("user", "a"), ("options", "-c dynabase.pool_mode=x")]), "22023");
        assert_eq!(code(&[("user", "a"), ("dynabase.other", "x")]), "42704");
    }

    #[test]
    fn application_names_are_kept_as_the_server_keeps_them() {
        assert_eq!(clean("ünïcode\n"), "??n??code?");
        assert_eq!(clean(&"x".repeat(100)).len(), 63);
    }
}
