//! A double of Convex's backend as a child process: `dev/convex-double`, which runs real Convex functions behind the
//! real protocol. The real backend can be had from Convex only; `dynabase dev --convex-url` uses one.
//!
//! `acme` and `globex` get a deployment each, all other tenants share one: both ways of isolation are there.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{folder::write_private, port};
use crate::{
    config::program_folders,
    tenant::{ConvexRoute, OrgId, Sharing, Tenant, Tier, namespace::Password},
    upstream::convex::{JWKS_PATH, Upstream},
};

/// How long it may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest installation of its packages, over a slow network.
const INSTALL: Duration = Duration::from_secs(180);

/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Tenants with a deployment of their own.
const OWN: [&str; 2] = ["acme", "globex"];

/// Transitions longer than this come in chunks: far less than the real 5 MB, so that they are met in development.
const CHUNK_BYTES: usize = 64 * 1024;

/// The double's files, so that the binary needs no checkout.
const FILES: [(&str, &str); 5] = [
    ("package.json", include_str!("../../../dev/convex-double/package.json")),
    ("server.js", include_str!("../../../dev/convex-double/server.js")),
    ("convex/http.js", include_str!("../../../dev/convex-double/convex/http.js")),
    ("convex/messages.js", include_str!("../../../dev/convex-double/convex/messages.js")),
    ("convex/_generated/api.js", include_str!("../../../dev/convex-double/convex/_generated/api.js")),
];

/// Where `.ci/tools` keeps its packages, beside the repository's `target`.
const CACHE: &str = ".cache/convex-double";

/// Where the deployments will be; nothing runs yet.
#[derive(Debug)]
pub struct Plan {
    folder: PathBuf,
    node: PathBuf,
    own: [u16; 2],
    shared: u16,
    key: Password,
    /// The ports, held until the double takes them.
    held: Vec<TcpListener>,
}

/// The running double. Dropping it stops it and waits.
#[derive(Debug)]
pub struct Server {
    child: Child,
}

impl Plan {
    /// Lays the files out in `folder` and makes sure of their packages.
    ///
    /// # Errors
    /// What is missing, with the line that installs it.
    pub fn new(folder: &Path, key: Password) -> Result<Self, String> {
        let find = |name: &str| program_folders().into_iter().map(|it| it.join(name)).find(|path| path.is_file());
        let missing = "the Convex double needs Node.js 20 or newer with npm.\n\
                       Debian, Ubuntu:  sudo apt-get install -y nodejs npm\n\
                       Fedora:          sudo dnf install -y nodejs\n\
                       macOS:           brew install node";
        let node = find("node").ok_or(missing)?;
        let version = Command::new(&node).arg("--version").output().map_err(|error| error.to_string())?;
        let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
        let major = version.trim_start_matches('v').split('.').next().and_then(|major| major.parse::<u32>().ok());
        if major.is_none_or(|major| major < 20) {
            return Err(format!("{missing}\n(found Node {version})"));
        }
        let io = |error: std::io::Error| format!("{}: {error}", folder.display());
        fs::create_dir_all(folder.join("convex/_generated")).map_err(io)?;
        let folder = folder.canonicalize().map_err(io)?;
        for (name, text) in FILES {
            fs::write(folder.join(name), text).map_err(io)?;
        }
        let packages = folder.join("node_modules");
        if !packages.join("convex-test").exists() {
            match installed() {
                Some(ready) => {
                    let _ = fs::remove_file(&packages);
                    symlink(ready, &packages).map_err(io)?;
                }
                None => install(&folder, &find("npm").ok_or(missing)?)?,
            }
        }
        let mut held = Vec::new();
        let mut port = || -> Result<u16, String> {
            let socket = TcpListener::bind(("127.0.0.1", port::free()?)).map_err(io)?;
            let port = socket.local_addr().map_err(io)?.port();
            held.push(socket);
            Ok(port)
        };
        let (own, shared) = ([port()?, port()?], port()?);
        Ok(Self { folder, node, own, shared, key, held })
    }

    /// The shared deployment.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.shared)
    }

    /// Every deployment by its name, and the key of their administrator.
    pub fn described(&self) -> Value {
        let mut urls = serde_json::Map::from_iter([("shared".to_owned(), Value::from(self.url()))]);
        urls.extend(
            OWN.iter().zip(self.own).map(|(org, port)| ((*org).into(), format!("http://127.0.0.1:{port}").into())),
        );
        json!({"deployments": urls, "admin_key": self.key.expose()})
    }

    /// The deployment that a demo tenant has for its own.
    pub fn route(&self, org: &OrgId) -> Option<ConvexRoute> {
        let at = OWN.iter().position(|own| *own == org.as_str())?;
        Some(ConvexRoute { url: format!("http://127.0.0.1:{}", self.own[at]), isolation: Sharing::Own })
    }

    /// Starts it. Returns once every deployment answers. `public_url` is where the deployments' clients are, and the
    /// keys of the tokens they get.
    ///
    /// # Errors
    /// In words.
    pub async fn start(&mut self, upstream: &Upstream, public_url: &str) -> Result<Server, String> {
        let http_port = public_url.rsplit(':').next().unwrap_or_default();
        let deployment = |org: &str, origin: String, port: u16| -> Result<Value, String> {
            let org = OrgId::parse(org).ok_or("a demo tenant's name")?;
            let mut tenant = Tenant::new(org, Tier::Free);
            tenant.routes.convex = self.route(&tenant.org);
            let audience = upstream.deployment(&tenant).ok_or("no deployment")?.audience;
            let auth = json!({
                "type": "customJwt", "issuer": public_url, "jwks": format!("{public_url}{JWKS_PATH}"),
                "applicationID": audience, "algorithm": "ES256",
            });
            let key = self.key.expose();
            Ok(
                json!({"name": tenant.org, "port": port, "origin": origin, "adminKey": key, "chunkBytes": CHUNK_BYTES, "auth": auth}),
            )
        };
        let mut deployments = vec![deployment("shared", public_url.into(), self.shared)?];
        for (org, port) in OWN.into_iter().zip(self.own) {
            deployments.push(deployment(org, format!("http://{org}.localhost:{http_port}"), port)?);
        }
        let config = self.folder.join("config.json");
        write_private(&config, json!({"deployments": deployments}).to_string().as_bytes())?;
        let log = self.folder.join("convex.log");
        let io = |error: std::io::Error| format!("{}: {error}", log.display());
        let out = fs::File::create(&log).map_err(io)?;
        let setpriv = program_folders().into_iter().map(|folder| folder.join("setpriv")).find(|path| path.is_file());
        let mut command = match setpriv {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "TERM"]).arg(&self.node);
                command
            }
            None => Command::new(&self.node),
        };
        command.arg("server.js").arg(&config).current_dir(&self.folder).stdin(Stdio::null());
        command.stdout(out.try_clone().map_err(io)?).stderr(out);
        self.held.clear();
        let mut server = Server { child: command.spawn().map_err(|error| format!("node can't be started: {error}"))? };
        let deadline = Instant::now() + PATIENCE;
        for port in self.own.into_iter().chain([self.shared]) {
            while TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), LOOK).is_err() {
                if server.ended() || Instant::now() > deadline {
                    return Err(format!("the Convex double does not start: {} says why", log.display()));
                }
                tokio::time::sleep(LOOK).await;
            }
        }
        Ok(server)
    }
}

/// The packages that `.ci/tools` installed for this checkout, if they are those that are wanted.
fn installed() -> Option<PathBuf> {
    let (program, here) = (std::env::current_exe().ok(), std::env::current_dir().ok());
    let starts: Vec<PathBuf> = [program, here].into_iter().flatten().collect();
    let mut caches = starts.iter().flat_map(|start| start.ancestors()).map(|folder| folder.join(CACHE));
    let found =
        caches.find(|cache| fs::read_to_string(cache.join("package.json")).is_ok_and(|text| text == FILES[0].1))?;
    let packages = found.join("node_modules");
    packages.join("convex-test").exists().then_some(packages)
}

fn install(folder: &Path, npm: &Path) -> Result<(), String> {
    eprintln!("installing the Convex double's packages (npm) …");
    let mut child = Command::new(npm)
        .args(["install", "--no-audit", "--no-fund", "--silent", "--ignore-scripts", "--no-package-lock"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .spawn()
        .map_err(|error| format!("npm can't be started: {error}"))?;
    let deadline = Instant::now() + INSTALL;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(_)) => return Err(format!("`npm install` failed in {}", folder.display())),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err("`npm install` took too long".into());
            }
        }
    }
}

impl Server {
    /// Whether it has ended, by itself or by us.
    pub fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it.
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
                    return if signal == Signal::TERM {
                        Ok(())
                    } else {
                        Err("the Convex double had to be killed".into())
                    };
                }
                std::thread::sleep(LOOK);
            }
        }
        Err("the Convex double does not end".into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(%error, "stopping the Convex double");
        }
    }
}
