//! Real MongoDB-wire servers: one that all tests of a process share, and private ones for tests that stop or reconfigure
//! it. They ask for no login, which saves each its second start; `dynabase dev` and the server's own test have one.

use std::sync::{OnceLock, mpsc};

use dynabase::{
    cli::dev::mongo::{self, Server},
    tenant::namespace::Password,
};
use mongodb::Client;
use tempfile::TempDir;

use super::postgres::keep;

/// Where a server is.
#[derive(Clone, Debug)]
pub struct Place {
    /// The administrator's URL.
    pub url: String,
    pub port: u16,
    pub pid: i32,
}

impl Place {
    fn of(server: &Server) -> Self {
        Self { url: server.url(), port: server.port(), pid: i32::try_from(server.pid()).expect("a process id") }
    }

    /// A driver's client as the administrator; of use in the runtime that calls this.
    pub async fn client(&self) -> Client {
        Client::with_uri_str(&self.url).await.expect("a URL")
    }
}

async fn start(folder: &TempDir, password: Option<&str>) -> Server {
    let program = mongo::find().expect("a MongoDB-wire server is installed");
    Server::start(&program, folder.path(), password.map(Password::new)).await.expect("it starts")
}

fn start_here(folder: &TempDir, password: Option<&str>) -> Server {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(start(folder, password))
}

/// A server of one test's own; stopped and removed when dropped.
#[derive(Debug)]
pub struct Own {
    pub place: Place,
    server: Option<Server>,
    password: Option<&'static str>,
    folder: TempDir,
}

impl Own {
    /// Starts one. The kernel ends it with the calling thread, which is the test's. Not from inside a runtime.
    pub fn start(password: Option<&'static str>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let server = start_here(&folder, password);
        Self { place: Place::of(&server), server: Some(server), password, folder }
    }

    /// Stops it; its data stays.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.stop().expect("it stops");
        }
    }

    /// Starts it again on the same data, and on another port.
    pub fn start_again(&mut self) {
        self.stop();
        let server = start_here(&self.folder, self.password);
        self.place = Place::of(&server);
        self.server = Some(server);
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
            let server = start_here(&folder, None);
            let place = Place::of(&server);
            keep(place.pid, folder.path().into());
            sender.send(place).expect("somebody waits");
            loop {
                std::thread::park();
            }
        });
        receiver.recv().expect("it starts")
    })
}
