//! `dynabase dev`: everything on this machine. Real servers as child processes on private ports, the catalog, four
//! demo tenants, and then the very same proxy that `serve` runs.
//!
//! All of it lives in one folder, marked as ours; nothing else is touched.

mod convex;
mod folder;
pub mod mongo;
pub mod port;
pub mod postgres;
mod ready;
mod redis;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use futures_util::TryFutureExt;

use self::{
    folder::{Folder, Secrets},
    postgres::{Programs, Server},
    ready::{Demo, Ready},
};
use super::{Failure, key, place, tenant, token};
use crate::{
    app::{self, App},
    catalog::{Catalog, Expect},
    config::{Config, Runtime},
    tenant::{
        DEFAULT_NAME, Names, OrgId, Tier,
        namespace::{NameStyle, Password, RootSecret},
    },
};

/// The tenants there are from the first start on.
const DEMO: [(&str, Tier); 4] =
    [("acme", Tier::Free), ("globex", Tier::Starter), ("initech", Tier::Pro), ("umbrella", Tier::Enterprise)];

/// How long the printed tokens live: a day's work.
const TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);

/// How often the children are looked after.
const LOOK: Duration = Duration::from_secs(1);

/// What `dynabase dev` was asked.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where everything lives; made on the first start, used again on the next
    #[arg(long, value_name = "DIR", default_value = "dynabase-dev")]
    data_dir: PathBuf,
    /// Added to every port (PostgreSQL 6432, Redis 6380, MongoDB 27018, HTTP 8080, admin 9900)
    #[arg(long, value_name = "N", default_value_t = 0)]
    port_offset: u16,
    /// Written, as JSON, once every listener accepts
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// A Convex deployment that all tenants share, instead of the double that is started otherwise
    #[arg(long, value_name = "URL")]
    convex_url: Option<String>,
    /// Begin with an empty folder; only wipes one that an earlier `dynabase dev` made
    #[arg(long)]
    reset: bool,
}

/// The listeners' ports.
#[derive(Clone, Copy, Debug)]
struct Ports {
    postgres: u16,
    redis: u16,
    mongodb: u16,
    http: u16,
    admin: u16,
}

impl Ports {
    fn with_offset(offset: u16) -> Result<Self, Failure> {
        let port = |base: u16| {
            base.checked_add(offset)
                .ok_or_else(|| Failure::usage(format_args!("--port-offset {offset} leads beyond port 65535")))
        };
        Ok(Self {
            postgres: port(6432)?,
            redis: port(6380)?,
            mongodb: port(27018)?,
            http: port(8080)?,
            admin: port(9900)?,
        })
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let ports = Ports::with_offset(arguments.port_offset)?;
    let programs = Programs::find().map_err(Failure::failed)?;
    let redis = redis::find().map_err(Failure::failed)?;
    let mongo = mongo::find().map_err(Failure::failed)?;
    if let Some(path) = &arguments.ready_file {
        // Whoever waits for the file must not meet that of an earlier run.
        ready::remove(path).map_err(Failure::failed)?;
    }
    let folder = Folder::open(&arguments.data_dir, arguments.reset).map_err(Failure::failed)?;
    let runtime = app::runtime(&Runtime::default()).map_err(Failure::failed)?;
    // On this thread, which lives as long as the process: the kernel ends the children with the thread that made them.
    let done = runtime.block_on(start(arguments, ports, &programs, &redis, &mongo, &folder));
    if let Some(path) = &arguments.ready_file {
        let _ = ready::remove(path);
    }
    done
}

async fn start(
    arguments: &Arguments,
    ports: Ports,
    programs: &Programs,
    redis: &Path,
    mongo: &Path,
    folder: &Folder,
) -> Result<(), Failure> {
    let secrets = folder.secrets().map_err(Failure::failed)?;
    eprintln!("starting PostgreSQL and MongoDB in {} …", folder.path().display());
    let password = Password::new(secrets.postgres_password.as_str());
    let (postgres, documents) = (folder.path().join("postgres"), folder.path().join("mongodb"));
    // At the same time: each waits for its own server most of the while.
    let (mongo, server) = tokio::try_join!(
        mongo::Server::start(mongo, &documents, Some(platform_password(&secrets, "mongodb platform")?))
            .map_err(Failure::failed),
        Server::start(programs, &postgres, password).map_err(Failure::failed),
    )?;
    eprintln!("starting Redis …");
    let redis = start_redis(redis, folder, &secrets).await?;
    let mut double = plan_convex(arguments, folder, &secrets)?;
    let convex_url = arguments.convex_url.clone().or_else(|| double.as_ref().map(convex::Plan::url));
    let config = configure(folder, ports, &secrets, &server, &redis, &mongo, convex_url.as_deref())?;
    app::log_to_stderr(&config.log).map_err(Failure::usage)?;
    let convex = start_convex(&config, double.as_mut()).await?;
    let catalog = place::catalog(&config).await?;
    catalog.init().await.map_err(Failure::failed)?;
    let mut tenants = Vec::new();
    for (org, tier) in DEMO {
        tenants.push(demo(&config, &catalog, folder, org, tier).await?);
        if let Some(double) = &double {
            route_convex(&catalog, double, org).await?;
        }
    }
    drop(catalog);
    let ready = Ready {
        ports,
        admin_token: secrets.admin_token.clone(),
        postgres_url: server.url(),
        redis_url: redis.url(),
        mongodb_url: mongo.url(),
        convex: convex_url.map(|url| (url, double.as_ref().map(convex::Plan::described))),
        tenants,
    };
    let log = |name: &str| folder.path().join(name).join(format!("{name}.log"));
    let mut children: Vec<(&str, PathBuf, Box<dyn Child>)> =
        vec![("PostgreSQL", log("postgres"), Box::new(server)), ("Redis", log("redis"), Box::new(redis))];
    children.push(("MongoDB", log("mongodb"), Box::new(mongo)));
    if let Some(convex) = convex {
        children.push(("the Convex double", log("convex"), Box::new(convex)));
    }
    let app = App::build(config, Some(folder.config())).await.map_err(Failure::failed)?;
    let serving = app.run(|| {
        super::print(ready.table());
        arguments.ready_file.as_ref().map_or(Ok(()), |path| ready.write(path))
    });
    let done = tokio::select! {
        done = serving => done.map_err(Failure::failed),
        (name, log) = first_ended(&mut children) => {
            Err(Failure::failed(format_args!("{name} ended by itself: {} says why", log.display())))
        }
    };
    // In the reverse order of their start; one that can't be stopped does not keep the others.
    children.into_iter().rev().fold(done, |done, (name, _, mut child)| {
        eprintln!("stopping {name} …");
        done.and(child.stop().map_err(Failure::failed))
    })
}

/// A server that lives as long as we do.
trait Child {
    /// Whether it has ended by itself.
    fn ended(&mut self) -> bool;

    /// Ends it and waits for that.
    fn stop(&mut self) -> Result<(), String>;
}

impl Child for Server {
    fn ended(&mut self) -> bool {
        Server::ended(self)
    }

    fn stop(&mut self) -> Result<(), String> {
        Server::stop(self)
    }
}

impl Child for redis::Server {
    fn ended(&mut self) -> bool {
        redis::Server::ended(self)
    }

    fn stop(&mut self) -> Result<(), String> {
        redis::Server::stop(self)
    }
}

impl Child for mongo::Server {
    fn ended(&mut self) -> bool {
        mongo::Server::ended(self)
    }

    fn stop(&mut self) -> Result<(), String> {
        mongo::Server::stop(self)
    }
}

impl Child for convex::Server {
    fn ended(&mut self) -> bool {
        convex::Server::ended(self)
    }

    fn stop(&mut self) -> Result<(), String> {
        convex::Server::stop(self)
    }
}

/// The Convex double, unless there is a deployment to use. A machine without Node has all the rest.
fn plan_convex(arguments: &Arguments, folder: &Folder, secrets: &Secrets) -> Result<Option<convex::Plan>, Failure> {
    if arguments.convex_url.is_some() {
        return Ok(None);
    }
    let key = platform_password(secrets, "convex platform")?;
    match convex::Plan::new(&folder.path().join("convex"), key) {
        Ok(plan) => Ok(Some(plan)),
        Err(missing) => {
            eprintln!("there will be no Convex: {missing}");
            Ok(None)
        }
    }
}

async fn start_convex(config: &Config, double: Option<&mut convex::Plan>) -> Result<Option<convex::Server>, Failure> {
    let (Some(double), Some(upstream)) = (double, config.convex().map_err(Failure::usage)?) else { return Ok(None) };
    eprintln!("starting the Convex double …");
    let public_url = config.upstream.convex.public_url.as_deref().unwrap_or_default();
    double.start(&upstream, public_url).await.map(Some).map_err(Failure::failed)
}

/// Says in a tenant's record where its deployment is this time: the double's ports are new on each start.
async fn route_convex(catalog: &Catalog, double: &convex::Plan, org: &str) -> Result<(), Failure> {
    let org = OrgId::parse(org).ok_or_else(|| Failure::failed("a demo tenant's name"))?;
    let mut record = catalog.get(&org).await.map_err(|fault| key::unknown(&org, &fault))?;
    let (present, wanted) = (&mut record.tenant.routes.convex, double.route(&org));
    // A deployment that somebody entered by hand stays.
    let ours = present.as_ref().is_none_or(|route| route.url.starts_with("http://127.0.0.1:"));
    if !ours || *present == wanted {
        return Ok(());
    }
    *present = wanted;
    let epoch = record.tenant.epoch;
    record.tenant.epoch += 1;
    catalog.put(record, Expect::Epoch(epoch)).await.map_err(Failure::failed)
}

/// Waits until one of them has ended; gives its name and its log.
async fn first_ended<'a>(children: &mut [(&'a str, PathBuf, Box<dyn Child>)]) -> (&'a str, PathBuf) {
    loop {
        if let Some((name, log, _)) = children.iter_mut().find_map(|it| it.2.ended().then_some(it)) {
            return (name, log.clone());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Starts the Redis server.
async fn start_redis(program: &Path, folder: &Folder, secrets: &Secrets) -> Result<redis::Server, Failure> {
    let password = platform_password(secrets, "redis platform")?;
    let place = folder.path().join("redis");
    redis::Server::start(program, &place, password, names(secrets)?).await.map_err(Failure::failed)
}

fn names(secrets: &Secrets) -> Result<Names, Failure> {
    let root = RootSecret::new(secrets.root_secret.as_bytes()).ok_or_else(|| Failure::failed("a short root secret"))?;
    Ok(Names::new(root, NameStyle::Opaque))
}

/// An administrator's password, derived like all others.
fn platform_password(secrets: &Secrets, purpose: &str) -> Result<Password, Failure> {
    let platform = OrgId::parse("platform").ok_or_else(|| Failure::failed("the platform's name"))?;
    Ok(names(secrets)?.password(purpose, &platform, 1))
}

/// Writes the configuration, anew on each start, and the tiers, on the first start only; reads both.
fn configure(
    folder: &Folder,
    ports: Ports,
    secrets: &Secrets,
    server: &Server,
    redis: &redis::Server,
    mongo: &mongo::Server,
    convex_url: Option<&str>,
) -> Result<Config, Failure> {
    let convex = convex_url.map_or_else(String::new, |url| {
        format!(
            "[upstream.convex]\npublic_url = \"http://127.0.0.1:{}\"\nurl = {url:?}\ndomain = \"localhost\"\n\n",
            ports.http
        )
    });
    let text = format!(
        "# Written by `dynabase dev` on each start; tiers.toml beside it is yours to change (SIGHUP reloads it).\n\
         tiers = \"tiers.toml\"\n\n\
         [listen]\npostgres = \"127.0.0.1:{}\"\nredis = \"127.0.0.1:{}\"\nmongodb = \"127.0.0.1:{}\"\n\
         http = \"127.0.0.1:{}\"\ndrain_timeout = \"5s\"\n\n\
         [identity]\nissuer = \"https://dev.dynabase.invalid/auth/v1\"\nhs256_secret = {:?}\n\n\
         [catalog]\nkind = \"mongodb\"\nurl = {:?}\n\n\
         [names]\nroot_secret = {:?}\n\n\
         [upstream.postgres]\nurl = {:?}\nmax_connections = 180\n\n\
         [upstream.neon]\nurl = {:?}\nmax_connections = 100\n\n\
         [upstream.redis]\nurl = {:?}\n\n\
         [upstream.mongodb]\nurl = {:?}\n\n{convex}\
         [admin]\nlisten = \"127.0.0.1:{}\"\ntoken = {:?}\n\n\
         [log]\nfilter = \"warn,dynabase=info\"\n",
        ports.postgres,
        ports.redis,
        ports.mongodb,
        ports.http,
        secrets.hs256_secret,
        mongo.url(),
        secrets.root_secret,
        server.local_url(),
        server.local_url(),
        redis.url(),
        mongo.url(),
        ports.admin,
        secrets.admin_token,
    );
    let config = folder.config();
    folder::write_private(&config, text.as_bytes()).map_err(Failure::failed)?;
    let tiers = folder.path().join("tiers.toml");
    if !tiers.exists() {
        folder::write_private(&tiers, include_bytes!("../../config/tiers.toml")).map_err(Failure::failed)?;
    }
    Config::load(&config).map_err(Failure::failed)
}

/// A demo tenant with what its developer needs; made if it is not there.
async fn demo(config: &Config, catalog: &Catalog, folder: &Folder, org: &str, tier: Tier) -> Result<Demo, Failure> {
    let org = OrgId::parse(org).ok_or_else(|| Failure::failed("a demo tenant's name"))?;
    // A start that was cut off may have left one that is not wholly made.
    if !catalog.get(&org).await.is_ok_and(|record| record.tenant.epoch > 0) {
        tenant::create(config, catalog, &org, tier).await?;
    }
    let record = catalog.get(&org).await.map_err(|fault| key::unknown(&org, &fault))?;
    let kept = folder.service_key(&org).map_err(Failure::failed)?;
    let known = key::of(catalog, &org).await?;
    let hash = kept.as_ref().and_then(|kept| crate::identity::service_key::parse(kept.as_bytes()));
    let service_key = match kept {
        Some(kept) if known.iter().any(|record| Some(record.key.hash) == hash) => kept,
        _ => {
            let fresh = key::create(catalog, &org, DEFAULT_NAME, None).await?;
            folder.keep_service_key(&org, &fresh).map_err(Failure::failed)?;
            fresh
        }
    };
    let token = token::token(config, &org, None, TOKEN_TTL)?;
    Ok(Demo { org, tier: record.tenant.tier, token, service_key })
}
