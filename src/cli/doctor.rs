//! `dynabase doctor`: tries every dependency the way the proxy would, and says what is wrong and how to mend it.
//!
//! It changes nothing anywhere. One part that is away does not keep the others from being tried.

mod sql;

use std::{fmt, path::PathBuf, time::Duration};

use bson::{Document, doc};
use clap::Args;
use http_body_util::{BodyExt, Empty};
use hyper::http;
use mongodb::{
    Client,
    options::{ClientOptions, Tls},
};
use serde_json::json;

use super::{FAILED, Failure, USAGE, place, print};
use crate::{
    catalog::{Catalog, Fault},
    config::Config,
    identity,
    tenant::Home,
    upstream::{convex::Origin, redis},
    wire::resp,
};

/// Longest look at one dependency.
const PATIENCE: Duration = Duration::from_secs(10);

/// Documents of the catalog that are read to find damaged ones.
const DOCUMENTS_MAX: u64 = 10_000;

#[derive(Debug, Args)]
pub struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// How a dependency does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Good,
    /// It works, and less well than it could.
    Warning,
    Fault,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Good => "good",
            State::Warning => "warning",
            State::Fault => "fault",
        }
    }
}

/// One thing that was tried.
#[derive(Debug)]
struct Finding {
    part: &'static str,
    state: State,
    what: String,
    mend: Option<String>,
}

/// What was found so far.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn good(&mut self, part: &'static str, what: impl fmt::Display) {
        self.0.push(Finding { part, state: State::Good, what: what.to_string(), mend: None });
    }

    fn warning(&mut self, part: &'static str, what: impl fmt::Display, mend: impl fmt::Display) {
        self.0.push(Finding { part, state: State::Warning, what: what.to_string(), mend: Some(mend.to_string()) });
    }

    fn fault(&mut self, part: &'static str, what: impl fmt::Display, mend: impl fmt::Display) {
        self.0.push(Finding { part, state: State::Fault, what: what.to_string(), mend: Some(mend.to_string()) });
    }

    fn count(&self, state: State) -> usize {
        self.0.iter().filter(|finding| finding.state == state).count()
    }
}

pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mut findings = Findings::default();
    let code = match Config::load(&arguments.config) {
        Err(error) => {
            for fault in error.faults() {
                let line = fault.line.map_or_else(String::new, |line| format!("line {line}: "));
                let what = format!("{line}{} {}", fault.key, fault.what);
                findings.fault("configuration", what, format_args!("edit {}", arguments.config.display()));
            }
            USAGE
        }
        Ok(config) => {
            findings.good("configuration", arguments.config.display());
            place::block_on(async {
                examine(&config, &mut findings).await;
                Ok(())
            })?;
            FAILED
        }
    };
    show(&findings, arguments.json);
    match findings.count(State::Fault) {
        0 => Ok(()),
        count => Err(Failure { code, what: format!("{count} fault(s) found") }),
    }
}

async fn examine(config: &Config, findings: &mut Findings) {
    keys(config, findings).await;
    catalog(config, findings).await;
    sql::postgres("postgres", &config.upstream.postgres, findings).await;
    sql::neon(config, findings).await;
    sql::homes(config, findings).await;
    redis(config, findings).await;
    mongodb(config, findings).await;
    convex(config, findings).await;
}

fn show(findings: &Findings, as_json: bool) {
    if as_json {
        let list: Vec<_> = findings
            .0
            .iter()
            .map(|it| json!({"part": it.part, "state": it.state.word(), "what": it.what, "mend": it.mend}))
            .collect();
        print(
            json!({"faults": findings.count(State::Fault), "warnings": findings.count(State::Warning), "findings": list}),
        );
        return;
    }
    for finding in &findings.0 {
        print(format_args!("{:8} {:14} {}", finding.state.word(), finding.part, finding.what));
        if let Some(mend) = &finding.mend {
            print(format_args!("{:23} → {mend}", ""));
        }
    }
}

/// Gives up on what hangs.
async fn within<T, E: fmt::Display>(work: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {PATIENCE:?}")),
    }
}

async fn keys(config: &Config, findings: &mut Findings) {
    const PART: &str = "identity";
    let Some(settings) = &config.identity else { return };
    match within(identity::read_keys(settings)).await {
        Ok(None) => findings.warning(
            PART,
            "tokens are signed with a shared secret (HS256)",
            "have the issuer sign with ES256 and set identity.jwks_url: then no secret here can make tokens",
        ),
        Ok(Some(0)) => findings.fault(
            PART,
            "the issuer's key set holds no ES256 or RS256 key: no token will be accepted",
            "look at the issuer's signing keys, and at identity.jwks_url or jwks_file",
        ),
        Ok(Some(count)) => findings.good(PART, format_args!("{count} key(s) of {}", settings.issuer)),
        Err(error) => findings.fault(
            PART,
            format_args!("the issuer's keys can't be read: {error}"),
            "open identity.jwks_url from this machine, or look at jwks_file",
        ),
    }
}

async fn catalog(config: &Config, findings: &mut Findings) {
    const PART: &str = "catalog";
    let reach = "look at [catalog]: the server, its user and password, TLS, or the folder's rights";
    let catalog = match place::catalog(config).await {
        Ok(catalog) => catalog,
        Err(error) => return findings.fault(PART, error, reach),
    };
    if let Err(error) = within(catalog.ping()).await {
        return findings.fault(PART, error, reach);
    }
    match within(catalog.about()).await {
        Err(error) => return findings.fault(PART, error, "give its user the role readWrite on that database"),
        Ok(about) => {
            if !about.missing.is_empty() {
                let names = about.missing.join(", ");
                findings.warning(
                    PART,
                    format_args!("without the collections {names}: nothing keeps an operator's typing error out"),
                    "run `dynabase catalog init`",
                );
            }
            if let Some(why) = about.without_streams {
                findings.warning(
                    PART,
                    format_args!("no change streams, so changes are seen after a second: {why}"),
                    "make the server a replica set (one member is enough), and give its user the role readWrite",
                );
            }
        }
    }
    match place::tiers(config, &catalog).await {
        Ok(_) if catalog.damaged() > 0 => findings.fault(
            "tiers",
            "a document of the collection tiers does not fit tiers.toml, and is left out",
            "its words are those of tiers.toml: `_id` is the tier, the rest its sections",
        ),
        Ok(_) => findings.good("tiers", config.tiers.0.display()),
        Err(error) => findings.fault("tiers", error, "mend the tiers' file, or the collection tiers"),
    }
    let (mut good, mut damaged, mut at_neon) = (0u64, Vec::new(), 0u64);
    let mut list = catalog.list();
    while good + (damaged.len() as u64) < DOCUMENTS_MAX
        && let Some(item) = list.recv().await
    {
        match item {
            Ok(record) => {
                good += 1;
                at_neon += u64::from(record.tenant.home() == Home::Neon);
            }
            Err(Fault::Damaged(what)) => damaged.push(what),
            Err(fault) => return findings.fault(PART, fault, reach),
        }
    }
    for what in damaged.iter().take(10) {
        findings.fault(
            PART,
            format_args!("damaged document, {what}"),
            "mend it: `dynabase tenant show` tells when it is good",
        );
    }
    let more = if good + damaged.len() as u64 >= DOCUMENTS_MAX { " (only these were looked at)" } else { "" };
    let kind = match catalog {
        Catalog::File(_) => "a folder",
        Catalog::Mongo(_) => "MongoDB",
    };
    findings.good(
        PART,
        format_args!(
            "{kind}, {good} organisation(s), {} at the main home, {at_neon} at Neon, {} damaged{more}",
            good - at_neon,
            damaged.len()
        ),
    );
    if at_neon > 0 && !config.upstream.neon.is_on() {
        findings.fault(
            PART,
            format_args!("{at_neon} organisation(s) have a Neon home, and there is no [upstream.neon]: their Postgres port refuses"),
            "configure [upstream.neon] as it was when they were created",
        );
    }
}

async fn redis(config: &Config, findings: &mut Findings) {
    const PART: &str = "redis";
    let upstream = match config.redis() {
        Ok(Some(upstream)) => upstream,
        Ok(None) => return findings.good(PART, "not configured: no Redis front"),
        Err(error) => return findings.fault(PART, error, "edit upstream.redis.url"),
    };
    let server = match within(upstream.server()).await {
        Ok(server) => server,
        Err(error) => {
            return findings.fault(PART, error, "look at upstream.redis.url: host, port, user and password");
        }
    };
    let mut ask = Vec::new();
    // Would it let us make users? Asked without making one.
    resp::put_request(&mut ask, &[b"ACL", b"WHOAMI"]);
    resp::put_request(&mut ask, &[b"ACL", b"LIST"]);
    resp::put_request(&mut ask, &[b"CONFIG", b"GET", b"maxmemory-policy"]);
    resp::put_request(&mut ask, &[b"CONFIG", b"GET", b"client-output-buffer-limit"]);
    let answers = match within(upstream.platform(&ask, 4)).await {
        Ok(answers) => answers,
        Err(error) => return findings.fault(PART, error, "look at the server's log"),
    };
    if let Err(error) = redis::dial::refused(&answers[1]) {
        findings.fault(
            PART,
            format_args!("the platform's user may not make ACL users: {error}"),
            "let it: ACL SETUSER <user> on ~* &* +@all",
        );
    }
    let policy = redis::dial::strings(&answers[2]);
    if let Some(policy) = policy.get(1).filter(|policy| *policy != "noeviction") {
        findings.warning(
            PART,
            format_args!("maxmemory-policy is {policy}: one tenant's keys may push out another's"),
            "CONFIG SET maxmemory-policy noeviction",
        );
    }
    let limits = redis::dial::strings(&answers[3]);
    if limits.get(1).is_some_and(|limits| limits.starts_with("normal 0 ")) {
        findings.warning(
            PART,
            "client-output-buffer-limit has none for normal clients: a pipeline of large replies can fill the server",
            "CONFIG SET client-output-buffer-limit 'normal 1gb 0 0'",
        );
    }
    if !server.sanitizes {
        findings.warning(
            PART,
            "sanitize-dump-payload is off or not told: a made-up payload would end the server, so RESTORE is refused",
            "CONFIG SET sanitize-dump-payload clients, and restart dynabase",
        );
    }
    if server.databases <= 16 {
        findings.warning(
            PART,
            format_args!("{} logical databases: each tenant takes one for each that it uses", server.databases),
            "start it with --databases 16384",
        );
    }
    findings.good(PART, format_args!("Redis {} with {} logical databases", server.version, server.databases));
}

async fn mongodb(config: &Config, findings: &mut Findings) {
    const PART: &str = "mongodb";
    let settings = &config.upstream.mongodb;
    let Some(url) = &settings.url else { return findings.good(PART, "not configured: no MongoDB front") };
    if let Some(member) = config.mongodb.member().ok().flatten()
        && let Some(host) = config.mongodb_stranger(&member)
    {
        findings.warning(
            PART,
            format_args!(
                "the certificate in tls.cert_file is not for {host}, to which mongodb.advertise leads drivers"
            ),
            "advertise a name that the certificate is for, unless a balancer ends TLS with another one",
        );
    }
    let asked = within(async {
        let mut options = ClientOptions::parse(url.expose()).await?;
        options.server_selection_timeout = Some(Duration::from_secs(3));
        options.connect_timeout = Some(Duration::from_secs(3));
        if let (Some(Tls::Enabled(tls)), Some(path)) = (&mut options.tls, &settings.ca_file) {
            tls.ca_file_path = Some(path.clone());
        }
        let admin = Client::with_options(options)?.database("admin");
        let hello = admin.run_command(doc! {"hello": 1}).await?;
        let who = admin.run_command(doc! {"connectionStatus": 1, "showPrivileges": false}).await?;
        let build = admin.run_command(doc! {"buildInfo": 1}).await?;
        Ok::<_, mongodb::error::Error>((hello, who, build))
    });
    let (hello, who, build) = match asked.await {
        Ok(answers) => answers,
        Err(error) => {
            let error: String = error.chars().take(300).collect();
            return findings.fault(
                PART,
                error,
                "look at upstream.mongodb.url: hosts, user and password, tls, replicaSet",
            );
        }
    };
    let is_set = hello.get_str("setName").is_ok() || hello.get_str("msg").is_ok_and(|msg| msg == "isdbgrid");
    if !is_set {
        findings.fault(
            PART,
            "it is a standalone server: no transactions, no change streams, no retryable writes for tenants",
            "make it a replica set, also of one member: --replSet rs0, then rs.initiate()",
        );
    }
    let login = who.get_document("authInfo").cloned().unwrap_or_default();
    let users = login.get_array("authenticatedUsers").map_or(0, Vec::len);
    let roles: Vec<&str> = login
        .get_array("authenticatedUserRoles")
        .into_iter()
        .flatten()
        .filter_map(|role| role.as_document().and_then(|role: &Document| role.get_str("role").ok()))
        .collect();
    if users == 0 {
        findings.warning(
            PART,
            "nobody is logged in: whoever reaches the server can do all that we can",
            "start it with --auth, and put a user into upstream.mongodb.url",
        );
    } else if !roles.contains(&"root") && !roles.iter().any(|role| role.starts_with("userAdmin")) {
        findings.warning(
            PART,
            format_args!("its roles ({}) may not be enough to make the tenants' users", roles.join(", ")),
            "give it userAdminAnyDatabase and readWriteAnyDatabase, or root",
        );
    }
    findings.good(PART, format_args!("release {}", build.get_str("version").unwrap_or("unknown")));
}

async fn convex(config: &Config, findings: &mut Findings) {
    const PART: &str = "convex";
    let upstream = match config.convex() {
        Ok(Some(upstream)) => upstream,
        Ok(None) => return findings.good(PART, "not configured: no Convex"),
        Err(error) => return findings.fault(PART, error, "edit [upstream.convex]"),
    };
    let Some(url) = config.upstream.convex.url.as_deref().filter(|url| !url.contains("{org}")) else {
        return findings.good(PART, "a deployment for each organisation: none was tried");
    };
    let look = "look at upstream.convex.url: the deployment's address, https, ca_file";
    let asked = within(async {
        let uri = Origin::parse(url)?.uri(http::uri::PathAndQuery::from_static("/version"));
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let request = hyper::Request::get(uri).body(body).map_err(|error| error.to_string())?;
        upstream.request(request).await.map_err(|error| error.to_string())
    });
    match asked.await {
        Ok(answer) if answer.status().is_success() => findings.good(PART, format_args!("a deployment at {url}")),
        Ok(answer) => findings.fault(PART, format_args!("{url}/version says {}", answer.status()), look),
        Err(error) => findings.fault(PART, error, look),
    }
}
