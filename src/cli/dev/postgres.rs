//! A private PostgreSQL server as a child process: its data in one folder, loopback only, ended with us.
//!
//! PostgreSQL refuses to run as root, so as root the child gets an unprivileged user and the data folder is that
//! user's. Folders around it need not be open to that user: the server gets its data folder as an open descriptor.

use std::{
    fs::{self, File, OpenOptions},
    io::{Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::port;
use crate::{config::program_folders, tenant::namespace::Password, upstream::postgres};

/// Longest start: recovery after a crash replays what was written since the last checkpoint.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// Longest orderly stop, with a checkpoint in it; then the server is ended without one and recovers next time.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// How often a child's state is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// Longest path of a Unix socket that the kernel takes, less its terminator.
const SOCKET_PATH_MAX: usize = 107;

/// Connections the server takes: ENTERPRISE and PRO tenants at their cap together, and room.
const MAX_CONNECTIONS: u32 = 300;

/// The server's superuser.
pub const SUPERUSER: &str = "postgres";

/// Opens the data folder as descriptor 9 while privileges still allow it, then becomes the program.
const OPEN_FOLDER: &str = "exec 9<\"$1\"; shift; exec \"$@\"";

/// The data folder's name for whoever inherited descriptor 9: needs no permission on the folders above it.
const OPENED: &str = "/proc/self/fd/9";

/// A folder with PostgreSQL's server programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs(PathBuf);

impl Programs {
    /// Finds a server: the first on PATH, where Debian puts none by itself, then the newest in Debian's folders.
    ///
    /// # Errors
    /// None is there; says how to install one.
    pub fn find() -> Result<Self, String> {
        let mut versioned: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
            .collect();
        versioned.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
        program_folders()
            .into_iter()
            .chain(versioned.into_iter().map(|(_, folder)| folder))
            .map(Self)
            .find(Self::complete)
            .ok_or_else(|| {
                "no PostgreSQL server found (programs initdb and postgres, 15 or newer).\n\
                 Debian, Ubuntu:  sudo apt-get install -y postgresql\n\
                 Fedora:          sudo dnf install -y postgresql-server\n\
                 macOS:           brew install postgresql@18"
                    .into()
            })
    }

    /// Takes the programs of one folder.
    ///
    /// # Errors
    /// They are not there.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Result<Self, String> {
        let programs = Self(folder.into());
        if programs.complete() { Ok(programs) } else { Err(format!("{}: no initdb or postgres", programs.0.display())) }
    }

    fn complete(&self) -> bool {
        ["initdb", "postgres"].into_iter().all(|program| self.0.join(program).is_file())
    }
}

/// Whom the server runs as when we are root.
#[derive(Clone, Debug)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

impl Account {
    /// `postgres` if there is such a user, else `nobody`; `None` when we are not root anyway.
    fn unprivileged() -> Result<Option<Self>, String> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let table = fs::read_to_string("/etc/passwd").map_err(|error| format!("/etc/passwd: {error}"))?;
        let find = |name: &str| {
            table.lines().find_map(|line| {
                let mut fields = line.split(':');
                (fields.next() == Some(name)).then_some(())?;
                let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
                Some(Account { name: name.to_owned(), uid, gid })
            })
        };
        let account = find("postgres").or_else(|| find("nobody"));
        account
            .map(Some)
            .ok_or_else(|| "PostgreSQL refuses to run as root, and there is no user postgres or nobody".into())
    }
}

/// A running server. Dropping it stops it and waits.
#[derive(Debug)]
pub struct Server {
    child: Child,
    data: PathBuf,
    port: u16,
    password: Password,
}

impl Server {
    /// Starts a server on `folder`, made on the first start with `password` for its superuser. Returns once it
    /// accepts logins. Call it from a thread that outlives the server: the kernel ends the server with that thread.
    ///
    /// # Errors
    /// In words, with the end of the server's log where it says why.
    pub async fn start(programs: &Programs, folder: &Path, password: Password) -> Result<Self, String> {
        let account = Account::unprivileged()?;
        let data = folder.join("data");
        own_folder(folder, None)?;
        own_folder(&data, account.as_ref())?;
        let data = data.canonicalize().map_err(|error| format!("{}: {error}", data.display()))?;
        end_leftover(&data)?;
        let launch = Launch { programs, data: &data, account: account.as_ref(), log: folder.join("postgres.log") };
        if !data.join("PG_VERSION").exists() {
            launch.initdb(folder, &password)?;
        }
        let port = port::free()?;
        let child = launch.server(port)?;
        let mut server = Self { child, data: data.clone(), port, password };
        match server.wait_until_ready().await {
            Ok(()) => Ok(server),
            Err(error) => Err(format!("{error}\n{}", launch.end_of_log())),
        }
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The administrator's URL over TCP: for people and tests.
    pub fn url(&self) -> String {
        format!("postgres://{SUPERUSER}:{}@127.0.0.1:{}/postgres", self.password.expose(), self.port)
    }

    /// The administrator's URL over the Unix socket, cheaper than TCP; over TCP where its path would be too long.
    pub fn local_url(&self) -> String {
        let folder = self.data.to_string_lossy();
        let fits = folder.len() + "/.s.PGSQL.65535".len() <= SOCKET_PATH_MAX;
        // What needs escaping in a URL is not worth the socket.
        let plain = folder.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
        if !fits || !plain {
            return self.url();
        }
        let password = self.password.expose();
        format!("postgres://{SUPERUSER}:{password}@/postgres?host={folder}&port={}", self.port)
    }

    /// Ends sessions, writes a checkpoint, waits for the end.
    ///
    /// # Errors
    /// It had to be killed.
    pub fn stop(&mut self) -> Result<(), String> {
        // SIGINT is PostgreSQL's "fast": SIGTERM would wait for every client.
        for signal in [Signal::INT, Signal::QUIT, Signal::KILL] {
            if self.ended() {
                return Ok(());
            }
            let _ = kill_process(Pid::from_child(&self.child), signal);
            let deadline = Instant::now() + STOP_TIMEOUT;
            while Instant::now() < deadline {
                if self.ended() {
                    return if signal == Signal::INT { Ok(()) } else { Err("PostgreSQL had to be killed".into()) };
                }
                std::thread::sleep(LOOK);
            }
        }
        Err("PostgreSQL does not end".into())
    }

    /// Whether it has ended, by itself or by us.
    pub fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    async fn wait_until_ready(&mut self) -> Result<(), String> {
        let mut settings = postgres::Config { connect_timeout: Duration::from_secs(2), ..Default::default() };
        settings.url = Some(Password::new(self.url()));
        let admin = settings.admin()?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match admin.check().await {
                Ok(()) => return Ok(()),
                Err(_) if self.ended() => return Err("PostgreSQL ended while starting".into()),
                Err(error) if Instant::now() > deadline => return Err(format!("PostgreSQL does not answer: {error}")),
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "stopping PostgreSQL");
        }
    }
}

/// How the programs are started.
struct Launch<'a> {
    programs: &'a Programs,
    data: &'a Path,
    account: Option<&'a Account>,
    log: PathBuf,
}

impl Launch<'_> {
    /// A command as the unprivileged account, that dies with us, with the data folder's name for it.
    fn command(&self, program: &str) -> Result<(Command, PathBuf), String> {
        let program = self.programs.0.join(program);
        let setpriv = program_folders().into_iter().map(|folder| folder.join("setpriv")).find(|path| path.is_file());
        let blocked = self.account.and_then(|account| blocking_folder(self.data, account));
        let mut data = self.data.to_owned();
        let mut command = match (setpriv, self.account, blocked) {
            (Some(setpriv), Some(account), blocked) => {
                let mut command = Command::new("/bin/sh");
                if blocked.is_some() {
                    data = OPENED.into();
                    command.args(["-c", OPEN_FOLDER, "sh"]).arg(self.data);
                } else {
                    command.args(["-c", "exec \"$@\"", "sh"]);
                }
                command.arg(setpriv).args(["--pdeathsig", "INT", "--clear-groups"]);
                command.args(["--reuid", &account.uid.to_string(), "--regid", &account.gid.to_string()]);
                command.arg(program);
                command
            }
            (Some(setpriv), None, _) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "INT"]).arg(program);
                command
            }
            (None, Some(account), Some(folder)) => {
                return Err(format!(
                    "user {} may not enter {}: install util-linux (setpriv), or choose another --data-dir",
                    account.name,
                    folder.display()
                ));
            }
            (None, Some(account), None) => {
                let mut command = Command::new(program);
                command.uid(account.uid).gid(account.gid);
                command
            }
            (None, None, _) => Command::new(program),
        };
        // Its own process group: the terminal's Ctrl-C is for us, who end it after its clients. No variable of the
        // caller (PGDATA, PGPORT, locale) may change what starts.
        command.process_group(0).current_dir("/").env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin");
        Ok((command, data))
    }

    fn initdb(&self, folder: &Path, password: &Password) -> Result<(), String> {
        let (mut command, data) = self.command("initdb")?;
        // A file without a name that others could open: written, handed over as standard input, gone.
        let path = folder.join("initdb.password");
        let io = |error: std::io::Error| format!("{}: {error}", path.display());
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        if let Some(account) = self.account {
            chown(&path, Some(account.uid), Some(account.gid)).map_err(io)?;
        }
        writeln!(file, "{}", password.expose()).and_then(|()| file.rewind()).map_err(io)?;
        command.arg("-D").arg(&data).args(["-U", SUPERUSER, "-A", "scram-sha-256", "--pwfile=/dev/stdin"]);
        command.args(["--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums", "--no-instructions"]);
        let output = command.stdin(Stdio::from(file)).output();
        let _ = fs::remove_file(&path);
        let output = output.map_err(|error| format!("initdb can't be started: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("initdb failed: {}", String::from_utf8_lossy(&output.stderr).trim_end()))
    }

    fn server(&self, port: u16) -> Result<Child, String> {
        let (mut command, data) = self.command("postgres")?;
        command.arg("-D").arg(&data);
        for setting in [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={port}"),
            // Relative to the data folder, where the server works.
            "unix_socket_directories=.".to_owned(),
            format!("max_connections={MAX_CONNECTIONS}"),
            // One table of locks for all tenants.
            "max_locks_per_transaction=128".into(),
            "log_destination=stderr".to_owned(),
            "logging_collector=off".to_owned(),
        ] {
            command.arg("-c").arg(setting);
        }
        let log = self.log_file().map_err(|error| format!("{}: {error}", self.log.display()))?;
        let errors = log.try_clone().map_err(|error| error.to_string())?;
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        command.spawn().map_err(|error| format!("PostgreSQL can't be started: {error}"))
    }

    /// The log of this start; the one before is not kept.
    fn log_file(&self) -> std::io::Result<File> {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.log)
    }

    fn end_of_log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

/// Makes a folder that only its owner may enter.
fn own_folder(folder: &Path, account: Option<&Account>) -> Result<(), String> {
    let io = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(folder).map_err(io)?;
    if let Some(account) = account {
        chown(folder, Some(account.uid), Some(account.gid)).map_err(io)?;
    }
    let mode = fs::metadata(folder).map_err(io)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(io)?;
    }
    Ok(())
}

/// The first folder above `data` that `account` may not pass through.
fn blocking_folder(data: &Path, account: &Account) -> Option<PathBuf> {
    let blocked = |folder: &&Path| {
        let Ok(about) = fs::metadata(folder) else { return true };
        let passes = match (about.uid() == account.uid, about.gid() == account.gid) {
            (true, _) => 0o100,
            (_, true) => 0o010,
            _ => 0o001,
        };
        about.mode() & passes == 0
    };
    data.ancestors().skip(1).find(blocked).map(Path::to_owned)
}

/// Ends a server that an earlier start left behind on the same data, by being killed itself.
fn end_leftover(data: &Path) -> Result<(), String> {
    let Ok(text) = fs::read_to_string(data.join("postmaster.pid")) else { return Ok(()) };
    let Some(pid) = text.lines().next().and_then(|line| line.trim().parse().ok()).and_then(Pid::from_raw) else {
        return Ok(());
    };
    // The number may be anybody's by now: only a process that works in this very folder is meant.
    let works_here = || fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).is_ok_and(|cwd| cwd == data);
    if !works_here() {
        return Ok(());
    }
    kill_process(pid, Signal::INT).map_err(|error| format!("ending a leftover PostgreSQL: {error}"))?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    while test_kill_process(pid).is_ok() && works_here() {
        if Instant::now() > deadline {
            return Err(format!("process {} still works in {}: end it first", pid.as_raw_nonzero(), data.display()));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
