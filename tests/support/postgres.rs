//! Real PostgreSQL servers: one that all tests share, and private ones for tests that stop, stall or reconfigure it.

use std::{
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Mutex, OnceLock, mpsc},
};

use dynabase::{
    cli::dev::postgres::{Programs, Server},
    tenant::namespace::Password,
};
use tempfile::TempDir;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use super::block_on;

/// Where a server is, and how its administrator gets in.
#[derive(Clone, Debug)]
pub struct Place {
    /// The administrator's URL over TCP.
    pub url: String,
    pub port: u16,
    /// The data folder.
    pub data: PathBuf,
}

impl Place {
    fn of(server: &Server, folder: &TempDir) -> Self {
        let data = folder.path().join("data").canonicalize().expect("made by initdb");
        Self { url: server.url(), port: server.port(), data }
    }

    /// Runs statements as the superuser; gives the first column of all rows.
    pub fn sql(&self, statements: &str) -> Vec<String> {
        sql(&self.url, statements)
    }

    /// The first column of the first row.
    pub fn value(&self, statement: &str) -> String {
        self.sql(statement).into_iter().next().unwrap_or_default()
    }

    /// The postmaster's process id.
    pub fn pid(&self) -> i32 {
        let text = std::fs::read_to_string(self.data.join("postmaster.pid")).expect("it runs");
        text.lines().next().and_then(|line| line.trim().parse().ok()).expect("a number")
    }
}

/// Runs statements at `url`; gives the first column of all rows.
pub fn sql(url: &str, statements: &str) -> Vec<String> {
    block_on(async {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the server is there");
        tokio::spawn(connection);
        let messages = client.simple_query(statements).await.expect(statements);
        let first = |message: &SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
            _ => None,
        };
        messages.iter().filter_map(first).collect()
    })
}

async fn start(folder: &TempDir) -> Server {
    // Another release than the installed one: the folder of its initdb and postgres.
    let programs = match std::env::var_os("DYNABASE_TEST_POSTGRES_BIN") {
        Some(folder) => Programs::in_folder(folder),
        None => Programs::find(),
    };
    let programs = programs.expect("a PostgreSQL server is installed");
    Server::start(&programs, folder.path(), Password::new("root-password")).await.expect("it starts")
}

/// A server of one test's own; stopped and removed when dropped.
#[derive(Debug)]
pub struct Own {
    pub place: Place,
    server: Server,
    _folder: TempDir,
}

impl Own {
    /// Starts one. The kernel ends it with the calling thread, which is the test's.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let server = runtime.block_on(start(&folder));
        Self { place: Place::of(&server, &folder), server, _folder: folder }
    }

    /// Stops it now.
    pub fn stop(&mut self) {
        self.server.stop().expect("it stops");
    }
}

/// The server that tests share. It ends with the process, and its folder goes with it.
pub fn shared() -> &'static Place {
    static SHARED: OnceLock<Place> = OnceLock::new();
    SHARED.get_or_init(|| {
        let (sender, receiver) = mpsc::channel();
        // A thread that lives as long as the process: the kernel ends the server with the thread that made it.
        std::thread::spawn(move || {
            let folder = tempfile::tempdir().expect("a folder");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let server = runtime.block_on(start(&folder));
            let place = Place::of(&server, &folder);
            keep(place.pid(), folder.path().into());
            sender.send(place).expect("somebody waits");
            loop {
                std::thread::park();
            }
        });
        receiver.recv().expect("it starts")
    })
}

/// Starts a small process that outlives this one, then ends process `pid` and removes `folder`. SecantusDB, told to end
/// twice at once (by the kernel, as its parent went, and by this), may never do it: it is killed after ten seconds.
pub fn keep(pid: i32, folder: PathBuf) {
    /// Their standard inputs end with this process.
    static KEEPERS: Mutex<Vec<Child>> = Mutex::new(Vec::new());
    const SCRIPT: &str = "cat; kill -INT $1 2>/dev/null; n=0; while kill -0 $1 2>/dev/null; do \
                          n=$((n+1)); [ $n -lt 100 ] || kill -KILL $1 2>/dev/null; sleep 0.1; done; rm -rf $2";
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "keeper", &pid.to_string()]).arg(folder);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    KEEPERS.lock().expect("no panic").push(command.process_group(0).spawn().expect("a shell"));
}
