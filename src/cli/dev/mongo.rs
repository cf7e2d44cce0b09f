//! A private MongoDB-wire server as a child process: its data in one folder, loopback only, ended with us.
//!
//! The server is SecantusDB, a Python package: it has change streams, transactions and users, and starts in half a
//! second. It knows no first user, so the first start makes one on a server that asks for no login, before the
//! folder holds anything worth a login, and every later one asks.

use std::{
    fs::{self, File, OpenOptions},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bson::doc;
use mongodb::{
    Client,
    options::{ClientOptions, Credential, ServerAddress},
};
use rustix::process::{Pid, Signal, kill_process};

use super::{folder::write_private, port};
use crate::{config::program_folders, tenant::namespace::Password};

/// The server's program.
const PROGRAM: &str = "secantusd-py";

/// Where `.ci/tools` installs it, in the repository that this program was built in.
const INSTALLED: &str = ".cache/mongodb/bin";

/// The administrator.
pub const ADMINISTRATOR: &str = "root";

/// How long it may take to start. It may have to wait for a server of an earlier run that is ending.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long it may take to end in order: it gives its clients 5 s.
const STOP_PATIENCE: Duration = Duration::from_secs(8);

/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// The server's cache of documents: a fraction of its default of 1 GB, which a laptop has other uses for.
const CACHE: &str = "256M";

/// How often an entry is written that means nothing, so that a follower of changes stays inside the log: as MongoDB.
const HEARTBEAT_SECS: &str = "10";

/// Is there once the administrator is made.
const HAS_USER: &str = "has-administrator";

/// MongoDB's code for a user that is there already.
const USER_EXISTS: i32 = 51003;

/// A running server. Dropping it stops it and waits.
#[derive(Debug)]
pub struct Server {
    child: Child,
    port: u16,
    password: Option<Password>,
}

/// Finds the program: on PATH, or where this program's own repository has it.
///
/// # Errors
/// It is not there; with the line that installs it.
pub fn find() -> Result<PathBuf, String> {
    let own = std::env::current_exe().ok();
    let beside = own.iter().flat_map(|path| path.ancestors().skip(1)).map(|folder| folder.join(INSTALLED));
    program_folders()
        .into_iter()
        .chain(beside)
        .map(|folder| folder.join(PROGRAM))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!(
                "no MongoDB server found (program {PROGRAM} of the Python package secantusdb).\n\
                 In the repository:  sh .ci/tools\n\
                 Elsewhere:          pipx install --pip-args=--pre secantusdb"
            )
        })
}

impl Server {
    /// Starts a server on `folder`; with a password it asks for logins. Returns once it answers. Call it from a thread
    /// that outlives the server: the kernel ends the server with that thread, where `setpriv` is there.
    ///
    /// # Errors
    /// In words, with the end of the server's log where it says why.
    pub async fn start(program: &Path, folder: &Path, password: Option<Password>) -> Result<Self, String> {
        let io = |error: std::io::Error| format!("{}: {error}", folder.display());
        fs::create_dir_all(folder).map_err(io)?;
        let folder = folder.canonicalize().map_err(io)?;
        // Without one the server would look for settings in the home folder and in /etc.
        write_private(&folder.join("secantusd.toml"), b"")?;
        let made = folder.join(HAS_USER);
        if let Some(password) = password.as_ref().filter(|_| !made.exists()) {
            let mut first = launch(program, &folder, None).await?;
            create_administrator(&first, password).await.map_err(|error| format!("MongoDB's first user: {error}"))?;
            first.end().await?;
            write_private(&made, b"")?;
        }
        launch(program, &folder, password).await
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The administrator's URL.
    pub fn url(&self) -> String {
        let login = self.password.as_ref().map(|password| format!("{ADMINISTRATOR}:{}@", password.expose()));
        format!("mongodb://{}127.0.0.1:{}/?directConnection=true", login.unwrap_or_default(), self.port)
    }

    /// Whether it has ended, by itself or by us.
    pub fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Writes what is not yet on disk and ends it. One that does not end in time is killed, and finds what it had
    /// accepted in its journal: a signal can meet it where it waits for itself.
    ///
    /// # Errors
    /// It does not even die.
    pub fn stop(&mut self) -> Result<(), String> {
        for signal in [Signal::TERM, Signal::KILL] {
            self.signal(signal);
            let deadline = Instant::now() + STOP_PATIENCE;
            while Instant::now() < deadline {
                if self.ended() {
                    return Ok(());
                }
                std::thread::sleep(LOOK);
                self.knock();
            }
        }
        Err("MongoDB does not end".into())
    }

    /// [`Self::stop`] without holding up the thread.
    async fn end(&mut self) -> Result<(), String> {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + STOP_PATIENCE;
        while !self.ended() && Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
            self.knock();
        }
        self.stop()
    }

    fn signal(&mut self, signal: Signal) {
        if !self.ended() {
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
    }

    /// The server sees that it is to end when its listener wakes up, which a caller makes it do; else after 2 s.
    fn knock(&self) {
        let _ = TcpStream::connect_timeout(&loopback(self.port), LOOK);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.ended()
            && let Err(error) = self.stop()
        {
            tracing::warn!(%error, "stopping MongoDB");
        }
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Starts the program and waits until it answers. While another server has the data, which one that is ending has for
/// a moment, it is tried again.
async fn launch(program: &Path, folder: &Path, password: Option<Password>) -> Result<Server, String> {
    let log = folder.join("mongodb.log");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let port = port::free()?;
        let child = spawn(program, folder, &log, port, password.is_some())?;
        let mut server = Server { child, port, password: password.clone() };
        loop {
            if TcpStream::connect_timeout(&loopback(port), LOOK).is_ok() {
                return Ok(server);
            }
            if server.ended() || Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        if !server.ended() {
            return Err(format!("MongoDB does not answer\n{}", end_of(&said)));
        }
        if !said.contains("resource busy") || Instant::now() > deadline {
            return Err(format!("MongoDB ended while starting: {} says\n{}", log.display(), end_of(&said)));
        }
        tokio::time::sleep(LOOK * 10).await;
    }
}

fn spawn(program: &Path, folder: &Path, log: &Path, port: u16, login: bool) -> Result<Child, String> {
    let out: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(log)
        .map_err(|error| format!("{}: {error}", log.display()))?;
    let errors = out.try_clone().map_err(|error| error.to_string())?;
    let setpriv = program_folders().into_iter().map(|folder| folder.join("setpriv")).find(|path| path.is_file());
    let mut command = match setpriv {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "TERM"]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.arg("--config").arg(folder.join("secantusd.toml")).arg("--storage-path").arg(folder.join("data"));
    command.args(["--host", "127.0.0.1", "--port", &port.to_string(), "--cache-size", CACHE]);
    command.args(["--noop-heartbeat-seconds", HEARTBEAT_SECS]);
    if login {
        command.arg("--auth");
    }
    // Its own process group: the terminal's Ctrl-C is for us, who end it after its clients. No variable of the caller
    // may change what starts.
    command.process_group(0).current_dir("/").env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin");
    command.stdin(Stdio::null()).stdout(out).stderr(errors);
    command.spawn().map_err(|error| format!("MongoDB can't be started: {error}"))
}

/// Makes the administrator, or gives it the password where an earlier start was stopped half-way.
async fn create_administrator(server: &Server, password: &Password) -> mongodb::error::Result<()> {
    let client = connect(server.port, None)?;
    let admin = client.database("admin");
    let made = admin.run_command(doc! {
        "createUser": ADMINISTRATOR, "pwd": password.expose(), "roles": [{"role": "root", "db": "admin"}],
    });
    match made.await {
        Err(error) if code(&error) == Some(USER_EXISTS) => {
            admin.run_command(doc! {"updateUser": ADMINISTRATOR, "pwd": password.expose()}).await?;
        }
        done => {
            done?;
        }
    }
    client.shutdown().await;
    Ok(())
}

fn code(error: &mongodb::error::Error) -> Option<i32> {
    match error.kind.as_ref() {
        mongodb::error::ErrorKind::Command(command) => Some(command.code),
        _ => None,
    }
}

fn connect(port: u16, credential: Option<Credential>) -> mongodb::error::Result<Client> {
    let address = ServerAddress::Tcp { host: Ipv4Addr::LOCALHOST.to_string(), port: Some(port) };
    let mut options = ClientOptions::builder().hosts(vec![address]).build();
    options.direct_connection = Some(true);
    options.credential = credential;
    options.server_selection_timeout = Some(PATIENCE);
    Client::with_options(options)
}

fn end_of(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn may(url: &str) -> bool {
        let mut options = ClientOptions::parse(url).await.expect("a URL");
        options.server_selection_timeout = Some(PATIENCE);
        let client = Client::with_options(options).expect("a client");
        client.database("dynabase").collection::<bson::Document>("seen").find_one(doc! {}).await.is_ok()
    }

    /// Twice on one folder: the data stays, and nobody gets in without the password.
    #[tokio::test]
    async fn it_asks_for_the_password_and_keeps_its_data() {
        let folder = tempfile::tempdir().expect("a folder");
        let program = find().expect("a MongoDB server is installed");
        let password = || Some(Password::new("of-the-administrator"));
        let mut first = Server::start(&program, folder.path(), password()).await.expect("it starts");
        let client = Client::with_uri_str(first.url()).await.expect("a client");
        let seen = client.database("dynabase").collection("seen");
        seen.insert_one(doc! {"_id": 1}).await.expect("written");
        assert!(!may(&format!("mongodb://127.0.0.1:{}/?directConnection=true", first.port())).await);
        assert!(!may(&first.url().replace("of-the", "of-another")).await);
        client.shutdown().await;
        first.stop().expect("in order");
        let second = Server::start(&program, folder.path(), password()).await.expect("it starts again");
        let client = Client::with_uri_str(second.url()).await.expect("a client");
        let seen = client.database("dynabase").collection::<bson::Document>("seen");
        assert_eq!(seen.count_documents(doc! {}).await.expect("read"), 1);
    }
}
