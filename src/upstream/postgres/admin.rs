//! The platform's own login: for provisioning, sizes and signals. Never used for a tenant's statements.

use std::{fmt, ops::Deref, time::Duration};

use tokio_postgres::{Client, Config, NoTls, config::SslMode, error::SqlState};

use super::{DialError, Target};
use crate::tenant::namespace::Password;

/// Longest login after the socket stands: a server under load takes seconds to fork, none takes this long.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(15);

/// The administrator's login to one server. Its `Debug` prints no password.
#[derive(Clone)]
pub struct Admin {
    target: Target,
    login: Config,
}

/// Why the administrator's work failed.
#[derive(Debug)]
pub enum AdminError {
    /// The server can't be reached.
    Dial(DialError),
    /// The server said no, or the connection broke.
    Sql {
        /// What was being done, in words.
        doing: String,
        /// What the server said.
        cause: tokio_postgres::Error,
    },
    /// It took longer than it may.
    TimedOut {
        /// What was being done.
        doing: String,
        /// The limit.
        after: Duration,
    },
}

impl AdminError {
    pub(super) fn sql(doing: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> Self {
        let doing = doing.into();
        move |cause| AdminError::Sql { doing, cause }
    }

    /// The server's code, where it said one.
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            AdminError::Sql { cause, .. } => cause.code(),
            _ => None,
        }
    }

    /// Whether the connection is gone, so that a fresh one may do better: it broke, or the server said that it ends it.
    pub(super) fn is_broken_connection(&self) -> bool {
        let AdminError::Sql { cause, .. } = self else { return false };
        let farewell = [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW];
        cause.code().is_none_or(|code| farewell.contains(code))
    }
}

impl fmt::Display for AdminError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminError::Dial(error) => error.fmt(f),
            AdminError::Sql { doing, cause } => match cause.as_db_error() {
                Some(said) => write!(f, "{doing}: {} ({})", said.message(), said.code().code()),
                None => write!(f, "{doing}: {cause}"),
            },
            AdminError::TimedOut { doing, after } => write!(f, "{doing}: no answer within {after:?}"),
        }
    }
}

impl std::error::Error for AdminError {}

/// A logged-in administrator's connection; closing is dropping it.
#[derive(Debug)]
pub(super) struct Connection {
    client: Client,
    /// Moves the bytes; ends by itself once the client is dropped or the server goes.
    _driver: tokio::task::JoinHandle<()>,
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Admin {
    pub(super) fn new(target: Target, mut login: Config) -> Self {
        // TLS is made by `Target::dial`, below the PostgreSQL client.
        login.ssl_mode(SslMode::Disable);
        login.application_name("dynabase");
        Self { target, login }
    }

    /// The login of `user` with `password`, into `database` where nothing else is said.
    pub fn of(target: Target, user: &str, password: &Password, database: &str) -> Self {
        let mut login = Config::new();
        login.user(user).password(password.expose()).dbname(database);
        Self::new(target, login)
    }

    /// The server.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The role it logs in as.
    pub fn user(&self) -> &str {
        self.login.get_user().unwrap_or_default()
    }

    /// Its password.
    pub(super) fn password(&self) -> &str {
        self.login.get_password().and_then(|it| std::str::from_utf8(it).ok()).unwrap_or_default()
    }

    /// The database that it leads to.
    pub(super) fn database(&self) -> &str {
        self.login.get_dbname().unwrap_or_default()
    }

    /// Connects to the URL's database, or to another one.
    pub(super) async fn connect(&self, database: Option<&str>) -> Result<Connection, AdminError> {
        let mut login = self.login.clone();
        if let Some(database) = database {
            login.dbname(database);
        }
        let doing = || format!("logging in to {} as {}", self.target.address(), self.user());
        let stream = self.target.dial().await.map_err(AdminError::Dial)?;
        let (client, connection) = tokio::time::timeout(LOGIN_TIMEOUT, login.connect_raw(stream, NoTls))
            .await
            .map_err(|_| AdminError::TimedOut { doing: doing(), after: LOGIN_TIMEOUT })?
            .map_err(AdminError::sql(doing()))?;
        let driver = tokio::spawn(async move {
            // Whoever uses the client hears of the failure; here it is only the end of the task.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an administrator's connection ended");
            }
        });
        Ok(Connection { client, _driver: driver })
    }

    /// Says whether the server answers to this login.
    ///
    /// # Errors
    /// Why not.
    pub async fn check(&self) -> Result<(), AdminError> {
        let client = self.connect(None).await?;
        client.simple_query("select 1").await.map_err(AdminError::sql("asking for one row"))?;
        Ok(())
    }
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin").field("target", &self.target).field("user", &self.user()).finish_non_exhaustive()
    }
}

/// An identifier as SQL writes it: quoted, quotes doubled. The one function that puts a name into a statement.
pub(super) fn quoted(identifier: &str) -> String {
    let mut text = String::with_capacity(identifier.len() + 2);
    text.push('"');
    for character in identifier.chars() {
        // A NUL can't stand in any statement; without it the name can't match another one.
        match character {
            '"' => text.push_str("\"\""),
            '\0' => {}
            other => text.push(other),
        }
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_quoted_identifier_stays_one_identifier() {
        assert_eq!(quoted("org_a"), "\"org_a\"");
        assert_eq!(quoted("a\"; drop table x; --"), "\"a\"\"; drop table x; --\"");
        assert_eq!(quoted("a\0b"), "\"ab\"");
    }
}
