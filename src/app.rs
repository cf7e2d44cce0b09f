//! The wiring: builds everything from the configuration, binds, runs, and takes it down in order.
//!
//! Going down: listeners stop accepting, sessions end at their next safe point or when `drain_timeout` is over, then
//! the catalog's feeder and the upstreams stop, the operators' port last, so that a drain can be watched.
//!
//! Entry points: [`App::build`], [`App::run`].

use std::{
    io::IsTerminal,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tracing_subscriber::EnvFilter;

use crate::{
    admin,
    catalog::Catalog,
    config::{self, Config, Log, LogFormat},
    front,
    identity::Verifier,
    net::{AcceptLimits, Drain, ListenConfig, Listener, ServerTls, listen},
    quota::{Stop, Table},
    session::Gate,
    tenant::{
        Tiers,
        directory::{Ask, Directory},
    },
    transition::Coordinator,
    upstream,
    usage::Meters,
};

/// Tenants without a session that stay in memory, some 2 KB each.
const RESIDENT_MAX: u64 = 10_000;

/// Longest wait for the issuer's keys before listening; they are fetched again while serving.
const KEYS_WAIT: Duration = Duration::from_secs(5);

/// How often metrics and meters are tidied, and how often a part that is not yet ready is looked at.
const TIDY_EVERY: Duration = Duration::from_secs(5);

/// Who serves the connections of a listener.
#[derive(Clone)]
enum Front {
    Postgres(Arc<front::postgres::Server>),
    Redis(Arc<front::redis::Server>),
    Mongodb(Arc<front::mongo::Server>),
    Http(Arc<front::http::Server>),
}

/// Everything, built and bound; nothing is accepted yet.
pub struct App {
    config: Config,
    path: Option<PathBuf>,
    catalog: Catalog,
    asks: mpsc::Receiver<Ask>,
    verifier: Arc<Verifier>,
    table: Arc<Table>,
    meters: Arc<Meters>,
    recorder: PrometheusHandle,
    postgres: Arc<upstream::postgres::Upstream>,
    coordinator: Coordinator,
    mongodb: Option<(Arc<upstream::mongo::Upstream>, Arc<front::mongo::Server>)>,
    neon: Option<Arc<upstream::postgres::Upstream>>,
    branches: Option<Arc<upstream::neon::Branches>>,
    doors: Vec<(Front, Listener)>,
    tls: Option<Arc<ServerTls>>,
    /// The same certificates, with HTTP's protocols.
    http_tls: Option<Arc<ServerTls>>,
    drain: Drain,
}

/// The runtime that everything but the operators' port runs on.
///
/// # Errors
/// The system gives no threads.
pub fn runtime(config: &config::Runtime) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if config.workers > 0 {
        builder.worker_threads(config.workers.into());
    }
    builder.thread_name("dynabase").enable_all().build()
}

/// Sends log lines to standard error, as configured. Once per process.
///
/// # Errors
/// A filter that can't be parsed.
pub fn log_to_stderr(log: &Log) -> Result<(), String> {
    let filter = EnvFilter::builder().parse(&log.filter).map_err(|error| format!("log.filter: {error}"))?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let set = match log.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
    set.map_err(|error| error.to_string())
}

impl App {
    /// Opens the catalog, loads certificates, binds every listener. `path` is where the configuration came from.
    ///
    /// # Errors
    /// In words, with what to mend.
    pub async fn build(config: Config, path: Option<PathBuf>) -> Result<Self, String> {
        let recorder = PrometheusBuilder::new().install_recorder().map_err(|error| format!("metrics: {error}"))?;
        let identity = config.identity.as_ref().ok_or("identity.issuer is required")?;
        let source = config.catalog.as_ref().ok_or("catalog.path is required")?;
        let catalog = Catalog::open(source).await.map_err(|error| format!("catalog: {error}"))?;
        let coordinator = config.coordinator(catalog.clone(), tiers(&config, &catalog)?)?;
        let (directory, asks) = Directory::new();
        let verifier = Arc::new(Verifier::new(identity, directory.clone())?);
        let table = Arc::new(Table::new(directory, tiers(&config, &catalog)?, RESIDENT_MAX));
        let meters = Arc::new(Meters::default());
        let gate =
            Arc::new(Gate::new(Arc::clone(&verifier), Arc::clone(&table), Arc::clone(&meters), config.allow_plaintext));
        let postgres = upstream::postgres::Upstream::new(&config.upstream.postgres, config.names()?)?;
        let neon = config.upstream.neon.upstream(config.names()?)?;
        let tls = match &config.tls {
            Some(settings) => {
                Some(Arc::new(ServerTls::load(settings, &["postgresql"]).map_err(|error| error.to_string())?))
            }
            None => None,
        };
        let drain = Drain::new();
        let settings = front::postgres::Config {
            handshake_timeout: config.listen.handshake_timeout,
            openid_configuration: format!("{}/.well-known/openid-configuration", identity.issuer.trim_end_matches('/')),
        };
        let postgres_front = front::postgres::Server::new(
            Arc::clone(&gate),
            Arc::clone(&postgres),
            neon.clone(),
            tls.clone(),
            settings,
            drain.clone(),
        );
        let bind = |address: &crate::net::Address| {
            let settings = ListenConfig {
                address: address.clone(),
                backlog: listen::BACKLOG,
                proxy_from: config.listen.proxy_from.clone(),
            };
            Listener::bind(&settings).map_err(|error| error.to_string())
        };
        let branches = match (&neon, config.upstream.neon.homes(config.names()?)?) {
            (Some(neon), Some(homes)) => {
                Some(upstream::neon::Branches::new(catalog.clone(), homes, Arc::clone(neon), config.names()?))
            }
            _ => None,
        };
        let neon_front = branches.as_ref().map(|branches| {
            let domain = config.upstream.neon.domain.clone();
            front::neon::Server::new(Arc::clone(&postgres_front), Arc::clone(branches), domain)
        });
        let mut fronts = vec![(Front::Postgres(postgres_front), &config.listen.postgres)];
        if let Some(redis) = config.redis()? {
            let settings = front::redis::Config { login_timeout: config.listen.handshake_timeout };
            let server = front::redis::Server::new(Arc::clone(&gate), redis, tls.clone(), settings, drain.clone());
            fronts.push((Front::Redis(server), &config.listen.redis));
        }
        let mut mongodb = None;
        if let Some(upstream) = config.mongodb()? {
            let issuer = identity.issuer.clone();
            let settings = front::mongo::Config { login_timeout: config.listen.handshake_timeout, issuer };
            let upstream_parts = Arc::clone(&upstream);
            let server = front::mongo::Server::new(Arc::clone(&gate), upstream, tls.clone(), settings, drain.clone())?;
            server.follow_moves();
            mongodb = Some((upstream_parts, Arc::clone(&server)));
            fronts.push((Front::Mongodb(server), &config.listen.mongodb));
        }
        let convex = config.convex()?.map(|upstream| front::convex::Server::new(Arc::clone(&gate), upstream));
        let behind = front::http::Fronts { neon: neon_front, convex };
        let mut http_tls = None;
        if behind.any() {
            if let Some(settings) = &config.tls {
                let loaded = ServerTls::load(settings, &front::http::ALPN).map_err(|error| error.to_string())?;
                http_tls = Some(Arc::new(loaded));
            }
            let settings = front::http::Config { first_request_timeout: config.listen.handshake_timeout };
            let server = front::http::Server::new(behind, http_tls.clone(), settings, drain.clone());
            fronts.push((Front::Http(server), &config.listen.http));
        }
        let mut doors = Vec::new();
        for (front, addresses) in fronts {
            for address in addresses {
                doors.push((front.clone(), bind(address)?));
            }
        }
        Ok(Self {
            config,
            path,
            catalog,
            asks,
            verifier,
            table,
            meters,
            recorder,
            postgres,
            coordinator,
            mongodb,
            neon,
            branches,
            doors,
            tls,
            http_tls,
            drain,
        })
    }

    /// Serves until SIGTERM or SIGINT, then drains; a second signal ends the drain. `ready` is called once every
    /// listener accepts. SIGHUP reloads tiers, certificates and keys.
    ///
    /// # Errors
    /// In words: a port that is taken, a part that ended by itself, what `ready` said.
    pub async fn run(self, ready: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let mut signals = Signals::new().map_err(|error| format!("signals: {error}"))?;
        let limits =
            Arc::new(AcceptLimits::new(self.config.listen.max_connections, self.config.listen.unadmitted_per_network));
        let state =
            Arc::new(admin::State::new(Arc::clone(&self.table), Arc::clone(&self.meters), self.recorder.clone()));
        let _ = state.connections.set(Arc::clone(&limits));
        let catalog = self.catalog.clone();
        let _ = state.catalog_age.set(Box::new(move || Some(catalog.age())));
        let _ = state.transitions.set(self.coordinator.clone());
        if let Some(branches) = self.branches {
            let _ = state.branches.set(branches);
        }
        let admin = admin::spawn(&self.config.admin, Arc::clone(&state), self.drain.clone())
            .map_err(|error| format!("admin.listen {}: {error}", self.config.admin.listen))?;

        // Parts that end only when they are told to, each with its name for the case that it ends by itself.
        let mut parts: JoinSet<&'static str> = JoinSet::new();
        let (table, verifier, feeder) = (Arc::clone(&self.table), Arc::clone(&self.verifier), self.catalog.clone());
        let asks = self.asks;
        parts.spawn(async move {
            feeder.feed(table, move |key| verifier.forget_key(key), asks).await;
            "the catalog's feeder"
        });
        let (reached, readiness) = (self.catalog.clone(), Arc::clone(&state));
        parts.spawn(async move {
            reached.reached().await;
            readiness.readiness.catalog_loaded.store(true, Ordering::Release);
            std::future::pending::<&'static str>().await
        });
        let table = Arc::clone(&self.table);
        parts.spawn(async move {
            table.run_ticker().await;
            "the table's ticker"
        });
        let (postgres, stills) = (Arc::clone(&self.postgres), self.table.stills());
        parts.spawn(async move {
            postgres.run_maintenance(stills).await;
            "the upstream's maintenance"
        });
        if let Some((upstream, server)) = self.mongodb {
            parts.spawn(async move {
                tokio::join!(upstream.run_maintenance(), server.run_maintenance());
                "MongoDB's maintenance"
            });
        }
        if let Some(neon) = self.neon.clone() {
            let stills = self.table.stills();
            parts.spawn(async move {
                neon.run_maintenance(stills).await;
                "the maintenance of Neon homes"
            });
        }
        let (table, verifier) = (Arc::clone(&self.table), Arc::clone(&self.verifier));
        let _ = tokio::time::timeout(KEYS_WAIT, self.verifier.reload()).await;
        parts.spawn(async move {
            let end = |lost: &dyn Fn(Option<&str>) -> bool| {
                table.stop_where(Stop::Revoked, |live| lost(live.signing_key.as_deref()));
            };
            verifier.run_refresher(end).await;
            "the refreshing of keys"
        });
        let (verifier, recorder) = (Arc::clone(&self.verifier), self.recorder.clone());
        let follows = self.config.identity.as_ref().is_some_and(|it| it.jwks_url.is_some() || it.jwks_file.is_some());
        let readiness = Arc::clone(&state);
        parts.spawn(async move {
            loop {
                if !follows || verifier.keys_age().is_some() {
                    readiness.readiness.keys_loaded.store(true, Ordering::Release);
                }
                recorder.run_upkeep();
                tokio::time::sleep(TIDY_EVERY).await;
            }
        });

        // What a crash left half-way, before anybody is let in.
        self.coordinator.recover().await;
        let coordinator = self.coordinator.clone();
        parts.spawn(async move {
            coordinator.run().await;
            "the coordinator of tier transitions"
        });

        let mut accepting = JoinSet::new();
        for (front, listener) in self.doors {
            let (address, limits, drain) = (listener.local_addr(), Arc::clone(&limits), self.drain.clone());
            match front {
                Front::Postgres(server) => {
                    tracing::info!(%address, "listening for PostgreSQL clients");
                    let serve = move |conn| Arc::clone(&server).serve(conn);
                    accepting.spawn(listen::run(listener, limits, drain, serve));
                }
                Front::Mongodb(server) => {
                    tracing::info!(%address, "listening for MongoDB clients");
                    let serve = move |conn| Arc::clone(&server).serve(conn);
                    accepting.spawn(listen::run(listener, limits, drain, serve));
                }
                Front::Redis(server) => {
                    tracing::info!(%address, "listening for Redis clients");
                    let serve = move |conn| Arc::clone(&server).serve(conn);
                    accepting.spawn(listen::run(listener, limits, drain, serve));
                }
                Front::Http(server) => {
                    tracing::info!(%address, "listening for HTTP clients");
                    let serve = move |conn| Arc::clone(&server).serve(conn);
                    accepting.spawn(listen::run(listener, limits, drain, serve));
                }
            }
        }
        state.readiness.listeners_up.store(true, Ordering::Release);
        let mut result = ready();
        while result.is_ok() {
            tokio::select! {
                asked = signals.next() => match asked {
                    Asked::Reload => {
                        let tls = [self.tls.as_deref(), self.http_tls.as_deref()];
                        reload(&self.config, &self.catalog, &self.table, &self.coordinator, &self.verifier, tls);
                    }
                    Asked::End => break,
                },
                Some(ended) = parts.join_next() => {
                    result = Err(match ended {
                        Ok(part) => format!("{part} ended by itself"),
                        Err(error) => format!("a part of the process failed: {error}"),
                    });
                }
            }
        }
        state.readiness.listeners_up.store(false, Ordering::Release);
        tracing::info!(config = ?self.path, live = self.drain.live(), "draining");
        self.drain.start();
        self.table.stop_where(Stop::Draining, |_| true);
        tokio::select! {
            drained = self.drain.drained(self.config.listen.drain_timeout) => if let Err(left) = drained {
                tracing::warn!(left, "the drain took too long: connections are cut");
            },
            () = signals.ended_again() => tracing::warn!(left = self.drain.live(), "told twice: connections are cut"),
        }
        accepting.shutdown().await;
        parts.shutdown().await;
        admin.stop();
        result
    }
}

/// The tiers' file, under what the catalog is known to say about tiers.
fn tiers(config: &Config, catalog: &Catalog) -> Result<Tiers, String> {
    // Once by itself, for its words about faults.
    config.load_tiers()?;
    catalog.tiers(&config.tiers_text()?)
}

/// Reads again what may change while running. Each part that can't be read leaves the present one in force.
fn reload(
    config: &Config,
    catalog: &Catalog,
    table: &Table,
    coordinator: &Coordinator,
    verifier: &Arc<Verifier>,
    tls: [Option<&ServerTls>; 2],
) {
    match tiers(config, catalog) {
        Ok(tiers) => {
            coordinator.set_tiers(tiers.clone());
            table.set_tiers(tiers);
        }
        Err(error) => tracing::error!(%error, "the tiers were not reloaded"),
    }
    for tls in tls.into_iter().flatten() {
        if let Err(error) = tls.reload() {
            tracing::error!(%error, "the certificates were not reloaded");
        }
    }
    let verifier = Arc::clone(verifier);
    // Fetching takes as long as the issuer takes; signals are heard meanwhile.
    tokio::spawn(async move { verifier.reload().await });
    tracing::info!("reloaded tiers, certificates and keys");
}

/// What a signal asks for.
enum Asked {
    Reload,
    End,
}

struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.hangup.recv() => Asked::Reload,
            _ = self.terminate.recv() => Asked::End,
            _ = self.interrupt.recv() => Asked::End,
        }
    }

    /// Waits for a second request to end; reloads are no longer done.
    async fn ended_again(&mut self) {
        while !matches!(self.next().await, Asked::End) {}
    }
}
