//! The schema: read by `pg_dump`, made on the other side in three parts with the rows between them.
//!
//! `pg_dump` reaches its server through here ([`Dump::schema`]): a socket in a folder that only we may enter leads to
//! whatever way we have to it, with its TLS. It is let in without a password; the login behind is ours. (Nor would it give
//! one: over a socket without TLS it takes a server's offer of channel binding for an attack.)

use std::{
    fmt::Write as _,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    process::Command,
    task::JoinSet,
};

use super::{Ends, MoveError, reach};
use crate::{
    tenant::{Namespace, namespace::Password},
    upstream::postgres::{
        Admin, AdminError,
        admin::Connection,
        login::{self, Login},
        provision::run,
    },
    wire::postgres::backend::{self, Status},
};

/// Longest startup packet of `pg_dump`.
const STARTUP_MAX: usize = 10_000;

/// Longest login for it.
const LOGIN_WITHIN: Duration = Duration::from_secs(20);

/// Longest run of `pg_dump`.
const DUMP_WITHIN: Duration = Duration::from_secs(60);

/// Largest schema as text.
const SCHEMA_MAX: u64 = 64 << 20;

/// Most of what `pg_dump` says of an error.
const SAID_MAX: u64 = 4 << 10;

/// Where PostgreSQL's packages put programs of several releases.
const VERSIONED: [&str; 2] = ["/usr/lib/postgresql", "/usr/pgsql"];

/// The port in the socket's name; nothing listens on it.
const PORT: u16 = 5432;

/// Made after the rows: what looks at every row once, or would look at each that is changed.
const AFTER: [&str; 10] = [
    "FK CONSTRAINT",
    "TRIGGER",
    "EVENT TRIGGER",
    "POLICY",
    "ROW SECURITY",
    "PUBLICATION",
    "PUBLICATION TABLE",
    "PUBLICATION TABLES IN SCHEMA",
    "ACL",
    "DEFAULT ACL",
];

/// What is said of things that are made after the rows is said then.
const SAYS: [&str; 2] = ["COMMENT", "SECURITY LABEL"];

/// Where the part begins that `pg_dump` calls post-data.
const INDEXES: [&str; 4] = ["INDEX", "CONSTRAINT", "INDEX ATTACH", "STATISTICS"];

/// Where the programs of PostgreSQL are.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    folders: Vec<PathBuf>,
}

impl Dump {
    /// Looks in these folders, after those of the system's packages.
    pub fn new(folders: Vec<PathBuf>) -> Self {
        Self { folders }
    }

    /// A `pg_dump` for servers of this release.
    ///
    /// # Errors
    /// There is none; says how to install it.
    pub fn find(&self, release: u32) -> Result<PathBuf, String> {
        let mut versioned: Vec<(u32, PathBuf)> = Vec::new();
        for folder in VERSIONED.iter().flat_map(std::fs::read_dir).flatten().flatten() {
            if let Some(version) = folder.file_name().to_str().and_then(|name| name.parse().ok()) {
                versioned.push((version, folder.path().join("bin/pg_dump")));
            }
        }
        versioned.sort_by_key(|(version, _)| *version);
        versioned.retain(|(version, path)| *version >= release && path.is_file());
        let elsewhere = self.folders.iter().map(|folder| folder.join("pg_dump")).find(|path| path.is_file());
        versioned.into_iter().map(|(_, path)| path).next().or(elsewhere).ok_or_else(|| {
            format!(
                "moving a database needs pg_dump of PostgreSQL {release} or newer on the machine that runs dynabase \
                 (Debian, Ubuntu: apt-get install postgresql-client-{release})"
            )
        })
    }

    /// The schema of the database that `login` leads to, as `pg_dump` writes it.
    pub(super) async fn schema(&self, login: &Admin, release: u32) -> Result<String, MoveError> {
        let program = self.find(release).map_err(MoveError::Unfit)?;
        let io = |error: std::io::Error| MoveError::Unfit(format!("running {}: {error}", program.display()));
        let folder = Folder::make().map_err(io)?;
        let listener = UnixListener::bind(folder.0.join(format!(".s.PGSQL.{PORT}"))).map_err(io)?;
        let mut child = Command::new(&program)
            .args(["--schema-only", "--no-owner", "--no-subscriptions", "--no-tablespaces", "--no-security-labels"])
            .args(["--encoding=UTF8", "--no-password", "--lock-wait-timeout=10000"])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C")
            .env("PGHOST", &folder.0)
            .env("PGPORT", PORT.to_string())
            .env("PGUSER", login.user())
            .env("PGDATABASE", login.database())
            .env("PGSSLMODE", "disable")
            .env("PGGSSENCMODE", "disable")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(io)?;
        let (said, words) = (child.stdout.take(), child.stderr.take());
        let run = async {
            let (text, words) = tokio::try_join!(whole(said, SCHEMA_MAX), whole(words, SAID_MAX))?;
            Ok((child.wait().await?, text, words))
        };
        let ended = tokio::select! {
            ended = tokio::time::timeout(DUMP_WITHIN, run) => ended,
            () = lead(&listener, login) => return Err(MoveError::Unfit("pg_dump's socket broke".into())),
        };
        let (status, text, words) = match ended {
            Ok(ended) => ended.map_err(io)?,
            Err(_) => return Err(MoveError::Unfit(format!("pg_dump did not end within {DUMP_WITHIN:?}"))),
        };
        if !status.success() {
            let why = String::from_utf8_lossy(&words);
            return Err(MoveError::Unfit(why.lines().next().unwrap_or("pg_dump failed").to_owned()));
        }
        String::from_utf8(text).map_err(|_| MoveError::Unfit("its schema is not UTF-8".into()))
    }
}

async fn whole(of: Option<impl AsyncRead + Unpin>, max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let Some(mut of) = of else { return Ok(bytes) };
    (&mut of).take(max).read_to_end(&mut bytes).await?;
    let more = tokio::io::copy(&mut of, &mut tokio::io::sink()).await?;
    match more {
        0 => Ok(bytes),
        _ => Err(std::io::Error::other(format!("more than {max} bytes"))),
    }
}

/// Leads each connection to the server; never ends by itself.
async fn lead(listener: &UnixListener, login: &Admin) {
    let mut led = JoinSet::new();
    while let Ok((near, _)) = listener.accept().await {
        let login = login.clone();
        led.spawn(async move {
            if let Err(why) = lead_one(near, &login).await {
                tracing::warn!(why, "pg_dump can't be led to its server");
            }
        });
    }
}

/// Logs in behind, and says to the one in front that it is in.
async fn lead_one(mut near: UnixStream, login: &Admin) -> Result<(), String> {
    let words = |error: std::io::Error| error.to_string();
    let len = usize::try_from(near.read_u32().await.map_err(words)?).unwrap_or(0);
    // Its startup packet asks for nothing that the login behind does not say itself.
    let mut hello = vec![0; len.checked_sub(4).filter(|len| *len <= STARTUP_MAX).ok_or("no startup packet")?];
    near.read_exact(&mut hello).await.map_err(words)?;
    let place = Namespace { role: login.user().to_owned(), database: login.database().to_owned() };
    let (password, keys) = (Password::new(login.password()), Mutex::default());
    let behind = Login { place: &place, database: &place.database.as_str().into(), password: &password, keys: &keys };
    let mut far = login::connect(login.target(), &behind, LOGIN_WITHIN).await.map_err(|error| error.to_string())?;
    let mut greeting = backend::AUTHENTICATION_OK.to_vec();
    for (name, value) in far.remote.parameters.iter() {
        backend::put_parameter(&mut greeting, name, value);
    }
    greeting.extend_from_slice(&backend::ready_message(Status::Idle));
    near.write_all(&greeting).await.map_err(words)?;
    tokio::io::copy_bidirectional(&mut near, &mut far.stream).await.map(drop).map_err(words)
}

/// A folder for one socket, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn make() -> std::io::Result<Self> {
        let mut bytes = [0; 12];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| std::io::Error::other("no random bytes"))?;
        let name = format!("dynabase-{}", data_encoding::BASE32_NOPAD.encode(&bytes).to_lowercase());
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(Path::new(&self.0)) {
            tracing::debug!(%error, "a folder for a socket stays");
        }
    }
}

/// A schema in its three parts, in the words of the place to go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Script {
    tables: String,
    indexes: String,
    rest: String,
}

impl Script {
    /// Takes what `pg_dump` wrote apart. `from` and `to` are what the tenant's role is called here and there.
    pub(super) fn read(text: &str, from: &str, to: &str) -> Result<Self, MoveError> {
        const ITEM: &str = "\n--\n-- Name: ";
        const END: &str = "\n--\n-- PostgreSQL database dump complete";
        let text = text.rfind(END).and_then(|end| text.get(..end)).ok_or_else(|| {
            MoveError::Unfit("pg_dump's text has no end: a newer program than this one knows?".into())
        })?;
        let mut script = Script { tables: String::new(), indexes: String::new(), rest: String::new() };
        let mut in_indexes = false;
        // What stands before the first item are settings of the session.
        for item in text.split(ITEM).skip(1) {
            let (head, body) = item.split_once('\n').unwrap_or((item, ""));
            let (name, kind) = head.rsplit_once("; Type: ").unwrap_or((head, ""));
            let kind = kind.split(';').next().unwrap_or_default();
            let is_view = kind == "RULE" && name.ends_with(" _RETURN");
            in_indexes |= INDEXES.contains(&kind) || AFTER.contains(&kind);
            let part = if AFTER.contains(&kind) || SAYS.contains(&kind) || (kind == "RULE" && !is_view) {
                &mut script.rest
            } else if in_indexes || is_view {
                &mut script.indexes
            } else {
                &mut script.tables
            };
            let body = body.strip_prefix("--\n").unwrap_or(body);
            match kind {
                "ACL" | "DEFAULT ACL" | "POLICY" => part.push_str(&renamed(body, from, to)),
                _ => part.push_str(body),
            }
        }
        Ok(script)
    }

    /// Makes what rows need.
    pub(super) async fn begin(&self, ends: &Ends) -> Result<(), MoveError> {
        // The one schema that every database begins with.
        const PUBLIC: &str = "select 1 from pg_catalog.pg_namespace where nspname = 'public'";
        let there = ends.from.query_opt(PUBLIC, &[]).await.map_err(AdminError::sql("looking at schemas"))?;
        if there.is_none() {
            run(&ends.to, "dropping schema public", "drop schema if exists public").await?;
        }
        make(&ends.to, &self.tables).await
    }

    /// Makes indexes, and constraints that rest on them.
    pub(super) async fn index(&self, ends: &Ends) -> Result<(), MoveError> {
        make(&ends.to, &self.indexes).await
    }

    /// Makes the rest, and what is computed of rows.
    pub(super) async fn end(&self, ends: &Ends) -> Result<(), MoveError> {
        // In the order in which they were made: later ones may rest on earlier ones.
        const VIEWS: &str = "select pg_catalog.format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_class c \
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.relkind = 'm' and c.relispopulated \
             order by c.oid";
        let doing = || AdminError::sql("listing materialised views");
        let mut refresh = String::new();
        for row in ends.from.query(VIEWS, &[]).await.map_err(doing())? {
            let name: String = row.try_get(0).map_err(doing())?;
            // Writing to a string does not fail.
            let _ = writeln!(refresh, "refresh materialized view {name};");
        }
        make(&ends.to, &refresh).await?;
        reach("after the views");
        make(&ends.to, &self.rest).await
    }

    /// Whether the other place has come out the same.
    pub(super) fn compare(&self, there: &Script) -> Result<(), MoveError> {
        if self == there {
            return Ok(());
        }
        let lines = |script: &Script| {
            [&script.tables, &script.indexes, &script.rest]
                .map(|part| part.lines().map(str::to_owned).collect::<Vec<_>>())
                .concat()
        };
        let (here, there) = (lines(self), lines(there));
        let at = here.iter().zip(&there).position(|(one, other)| one != other).unwrap_or(here.len().min(there.len()));
        let line = |of: &[String]| of.get(at).map_or_else(|| "nothing".to_owned(), |line| format!("{line:?}"));
        Err(MoveError::Unfit(format!(
            "its schema came out otherwise there: {} instead of {}",
            line(&there),
            line(&here)
        )))
    }
}

/// Settings that a role carries for the platform: its ceilings.
const CEILINGS: &str = "'statement_timeout', 'idle_in_transaction_session_timeout', 'temp_file_limit'";

/// Brings what the tenant has set for its own role (`ALTER ROLE … SET`) along, and takes away what it has not. The last thing
/// in a session: it has these settings then.
pub(super) async fn settings(ends: &Ends, database: &str) -> Result<(), MoveError> {
    let mine = format!(
        "from pg_catalog.pg_db_role_setting s cross join lateral pg_catalog.unnest(s.setconfig) as c (said) \
         cross join lateral (select pg_catalog.split_part(c.said, '=', 1)) as n (name) \
         where s.setrole = current_user::pg_catalog.regrole and n.name not in ({CEILINGS}) and s.setdatabase in (0, \
         (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()))"
    );
    let place =
        "case when s.setdatabase <> 0 then pg_catalog.format('in database %I', $1::pg_catalog.text) else '' end";
    let reset = format!("select pg_catalog.format('alter role current_user %s reset %I;', {place}, n.name) {mine}");
    let set = format!(
        "select pg_catalog.format('select pg_catalog.set_config(%1$L, %2$L, false); \
         alter role current_user %3$s set %1$I from current;', \
         n.name, pg_catalog.substr(c.said, pg_catalog.strpos(c.said, '=') + 1), {place}) {mine}"
    );
    let doing = || AdminError::sql("reading the tenant's own settings");
    let mut script = String::new();
    for (client, question) in [(&ends.to, &reset), (&ends.from, &set)] {
        for row in client.query(question, &[&database]).await.map_err(doing())? {
            script.push_str(row.try_get(0).map_err(doing())?);
        }
    }
    make(&ends.to, &script).await
}

async fn make(client: &Connection, script: &str) -> Result<(), MoveError> {
    match run(client, "making the schema", script).await {
        // What it says of the tenant's own words is for the operator.
        Err(error) if error.code().is_some() => Err(MoveError::Unfit(error.to_string())),
        done => Ok(done?),
    }
}

/// Statements about privileges with the tenant's role under its other name.
fn renamed(text: &str, from: &str, to: &str) -> String {
    let mut text = text.to_owned();
    // `pg_dump` quotes a name only where it has to.
    let plain = |name: &str| {
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if name.bytes().all(fits) && !name.starts_with(|c: char| c.is_ascii_digit()) {
            name.to_owned()
        } else {
            format!("\"{name}\"")
        }
    };
    let (from, to) = (plain(from), plain(to));
    for before in [" TO ", " FROM ", " ROLE ", " BY ", ", "] {
        for after in [";", ",", " ", "\n"] {
            text = text.replace(&format!("{before}{from}{after}"), &format!("{before}{to}{after}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = "--\n-- PostgreSQL database dump\n--\n\n\\restrict abc\n\nSET transaction_timeout = 0;\n\n\
        --\n-- Name: t; Type: TABLE; Schema: public; Owner: -\n--\n\nCREATE TABLE public.t (id integer NOT NULL);\n\n\n\
        --\n-- Name: TABLE t; Type: COMMENT; Schema: public; Owner: -\n--\n\nCOMMENT ON TABLE public.t IS 'x';\n\n\n\
        --\n-- Name: t t_pkey; Type: CONSTRAINT; Schema: public; Owner: -\n--\n\nALTER TABLE ONLY public.t\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id);\n\n\n\
        --\n-- Name: v _RETURN; Type: RULE; Schema: public; Owner: -\n--\n\nCREATE OR REPLACE VIEW public.v AS SELECT 1;\n\n\n\
        --\n-- Name: t t_fk; Type: FK CONSTRAINT; Schema: public; Owner: -\n--\n\nALTER TABLE ONLY public.t ADD CONSTRAINT t_fk FOREIGN KEY (id) REFERENCES public.t(id);\n\n\n\
        --\n-- Name: m; Type: MATERIALIZED VIEW; Schema: public; Owner: -\n--\n\nCREATE MATERIALIZED VIEW public.m AS SELECT 1 WITH NO DATA;\n\n\n\
        --\n-- Name: TABLE t; Type: ACL; Schema: public; Owner: -\n--\n\nREVOKE ALL ON TABLE public.t FROM t_a;\nGRANT SELECT ON TABLE public.t TO t_a;\nGRANT SELECT ON TABLE public.t_a TO PUBLIC;\n\n\n\
        --\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict abc\n\n";

    #[test]
    fn a_dump_is_taken_apart_and_speaks_of_the_other_role() {
        let script = Script::read(DUMP, "t_a", "n_b").expect("a dump");
        assert!(script.tables.contains("CREATE TABLE public.t"));
        assert!(!script.tables.contains("SET ") && !script.tables.contains("restrict"), "{}", script.tables);
        for line in ["t_pkey PRIMARY KEY", "CREATE OR REPLACE VIEW", "CREATE MATERIALIZED VIEW"] {
            assert!(script.indexes.contains(line), "{line}: {}", script.indexes);
        }
        for line in [
            "COMMENT ON",
            "t_fk FOREIGN KEY",
            "REVOKE ALL ON TABLE public.t FROM n_b;",
            "GRANT SELECT ON TABLE public.t TO n_b;",
            "GRANT SELECT ON TABLE public.t_a TO PUBLIC;",
        ] {
            assert!(script.rest.contains(line), "{line}: {}", script.rest);
        }
        assert!(!script.rest.contains("complete"));
        assert!(Script::read("--\n-- Name: t; Type: TABLE", "a", "b").is_err(), "it breaks off");
    }

    #[test]
    fn what_came_out_otherwise_is_named() {
        let here = Script::read(DUMP, "t_a", "n_b").expect("a dump");
        let there = Script::read(&DUMP.replace("id integer NOT NULL", "id bigint"), "n_b", "n_b").expect("a dump");
        let error = here.compare(&there).expect_err("they differ").to_string();
        assert!(error.contains("id bigint") && error.contains("id integer NOT NULL"), "{error}");
        assert!(here.compare(&here).is_ok());
    }
}
