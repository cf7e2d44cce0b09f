//! A private Redis server as a child process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{folder::write_private, port};
use crate::{
    config::program_folders,
    tenant::{Names, namespace::Password},
    upstream::redis::{Config, Target, Upstream},
};

/// How long it may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(20);

/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Logical databases: one for each logical database that a tenant uses; an empty one costs half a kilobyte.
const DATABASES: u32 = 16_384;

/// A running server. Dropping it stops it and waits.
#[derive(Debug)]
pub struct Server {
    child: Child,
    port: u16,
    password: Password,
}

/// Finds the program.
///
/// # Errors
/// It is not there; with the line that installs it.
pub fn find() -> Result<PathBuf, String> {
    program_folders().into_iter().map(|folder| folder.join("redis-server")).find(|path| path.is_file()).ok_or_else(
        || {
            "no Redis server found (program redis-server, 7.0 or newer).\n\
         Debian, Ubuntu:  sudo apt-get install -y redis-server\n\
         Fedora:          sudo dnf install -y valkey-compat-redis\n\
         macOS:           brew install redis"
                .into()
        },
    )
}

impl Server {
    /// Starts a server on `folder`. Returns once it answers. Call it from a thread that outlives the server: the
    /// kernel ends the server with that thread, where `setpriv` is there.
    ///
    /// # Errors
    /// In words.
    pub async fn start(program: &Path, folder: &Path, password: Password, names: Names) -> Result<Self, String> {
        let io = |error: std::io::Error| format!("{}: {error}", folder.display());
        fs::create_dir_all(folder).map_err(io)?;
        let folder = folder.canonicalize().map_err(io)?;
        let port = port::free()?;
        let config = folder.join("redis.conf");
        let text = format!(
            "bind 127.0.0.1\nport {port}\ndatabases {DATABASES}\nrequirepass {}\ndir {:?}\nappendonly yes\nsave \"\"\n\
             maxmemory-policy noeviction\nsanitize-dump-payload clients\n\
             client-output-buffer-limit normal 1gb 0 0\nlogfile redis.log\n",
            password.expose(),
            folder
        );
        write_private(&config, text.as_bytes())?;
        let setpriv = program_folders().into_iter().map(|folder| folder.join("setpriv")).find(|path| path.is_file());
        let mut command = match setpriv {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "TERM"]).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| format!("Redis can't be started: {error}"))?;
        let mut server = Self { child, port, password };
        let upstream = Upstream::new(server.target()?, names, Vec::new());
        let deadline = Instant::now() + PATIENCE;
        loop {
            match upstream.ping().await {
                Ok(()) => return Ok(server),
                Err(_) if server.ended() => {
                    return Err(format!("Redis ended while starting: {}", folder.join("redis.log").display()));
                }
                Err(error) if Instant::now() > deadline => return Err(format!("Redis does not answer: {error}")),
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    fn target(&self) -> Result<Target, String> {
        let config = Config { url: Some(Password::new(self.url())), ca_file: None };
        config.target()?.ok_or_else(|| "no server".into())
    }

    /// The administrator's URL.
    pub fn url(&self) -> String {
        format!("redis://default:{}@127.0.0.1:{}/0", self.password.expose(), self.port)
    }

    /// Whether it has ended, by itself or by us.
    pub fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Writes what is not yet on disk and ends it.
    ///
    /// # Errors
    /// It had to be killed.
    pub fn stop(&mut self) -> Result<(), String> {
        for signal in [Signal::TERM, Signal::KILL] {
            if self.ended() {
                return Ok(());
            }
            let _ = kill_process(Pid::from_child(&self.child), signal);
            let deadline = Instant::now() + PATIENCE;
            while Instant::now() < deadline {
                if self.ended() {
                    return if signal == Signal::TERM { Ok(()) } else { Err("Redis had to be killed".into()) };
                }
                std::thread::sleep(LOOK);
            }
        }
        Err("Redis does not end".into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "stopping Redis");
        }
    }
}
