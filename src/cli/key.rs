//! `dynabase key`: service keys.

use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Failure, place, print, table};
use crate::{
    catalog::{Catalog, Fault, KeyRecord, date},
    identity::service_key,
    tenant::{DEFAULT_NAME, OrgId, directory::ServiceKey},
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a key; it is shown this once
    #[command(after_help = "Example: dynabase key create --org acme --expires 90d --dev dynabase-dev")]
    Create(Create),
    /// List an organisation's keys
    #[command(after_help = "Example: dynabase key list --org acme --json --dev dynabase-dev")]
    List(List),
    /// Revoke a key; its live sessions end
    #[command(after_help = "Example: dynabase key revoke --org acme key:0123456789ab --dev dynabase-dev")]
    Revoke(Revoke),
}

#[derive(Debug, Args)]
pub struct Create {
    /// The organisation it speaks for
    #[arg(long, value_parser = place::org)]
    org: OrgId,
    /// The logical user it may connect as
    #[arg(long, default_value = DEFAULT_NAME)]
    user: String,
    /// How long it lives; default: until revoked
    #[arg(long, value_name = "DURATION", value_parser = place::duration)]
    expires: Option<Duration>,
    #[command(flatten)]
    place: place::Place,
}

#[derive(Debug, Args)]
pub struct List {
    /// The organisation
    #[arg(long, value_parser = place::org)]
    org: OrgId,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: place::Place,
}

#[derive(Debug, Args)]
pub struct Revoke {
    /// The organisation
    #[arg(long, value_parser = place::org)]
    org: OrgId,
    /// The key as `key list` names it
    #[arg(required_unless_present = "all")]
    key: Option<String>,
    /// Every key of the organisation
    #[arg(long, conflicts_with = "key")]
    all: bool,
    #[command(flatten)]
    place: place::Place,
}

pub fn run(command: Command) -> Result<(), Failure> {
    place::block_on(async move {
        match command {
            Command::Create(arguments) => {
                let catalog = place::catalog(&arguments.place.load()?).await?;
                let lives = arguments.expires;
                let key = create(&catalog, &arguments.org, &arguments.user, lives).await?;
                eprintln!("Keep this key: it is not shown again. It is accepted wherever a token is.");
                print(key);
                Ok(())
            }
            Command::List(arguments) => list(&arguments).await,
            Command::Revoke(arguments) => revoke(&arguments).await,
        }
    })
}

/// Makes a key and gives it in clear.
pub async fn create(catalog: &Catalog, org: &OrgId, user: &str, lives: Option<Duration>) -> Result<String, Failure> {
    let tenant = catalog.get(org).await.map_err(|fault| unknown(org, &fault))?.tenant;
    if !tenant.has_user(user) {
        return Err(Failure::failed(format_args!("{org} has no user {user:?}: add it to `users` of its record first")));
    }
    let key = service_key::mint().map_err(Failure::failed)?;
    let expires_at = match lives.map(|lives| SystemTime::now().checked_add(lives)) {
        Some(None) => return Err(Failure::usage("--expires lies beyond the end of time")),
        Some(at) => at,
        None => None,
    };
    let record = ServiceKey { hash: key.hash(), org: org.clone(), user: user.to_owned(), expires_at };
    catalog.create_key(KeyRecord::new(record)).await.map_err(Failure::failed)?;
    Ok(key.reveal().to_owned())
}

async fn list(arguments: &List) -> Result<(), Failure> {
    let catalog = place::catalog(&arguments.place.load()?).await?;
    let keys = of(&catalog, &arguments.org).await?;
    let until = |key: &ServiceKey| key.expires_at.map(date::format);
    if arguments.json {
        let keys: Vec<_> = keys
            .iter()
            .map(|record| {
                json!({
                    "key": service_key::fingerprint(&record.key.hash),
                    "org_id": record.key.org,
                    "user": record.key.user,
                    "created_at": record.created_at,
                    "expires_at": until(&record.key),
                })
            })
            .collect();
        print(json!(keys));
        return Ok(());
    }
    let rows: Vec<_> = keys
        .iter()
        .map(|record| {
            let expires = until(&record.key).unwrap_or_else(|| "never".into());
            [service_key::fingerprint(&record.key.hash), record.key.user.clone(), record.created_at.clone(), expires]
        })
        .collect();
    print(table(["KEY", "USER", "CREATED", "EXPIRES"], &rows));
    Ok(())
}

async fn revoke(arguments: &Revoke) -> Result<(), Failure> {
    let catalog = place::catalog(&arguments.place.load()?).await?;
    let named = |record: &KeyRecord| match &arguments.key {
        Some(name) => {
            service_key::fingerprint(&record.key.hash) == *name
                || service_key::parse(name.as_bytes()) == Some(record.key.hash)
        }
        None => arguments.all,
    };
    let doomed: Vec<_> = of(&catalog, &arguments.org).await?.into_iter().filter(named).collect();
    if doomed.is_empty() && arguments.key.is_some() {
        return Err(Failure::failed(format_args!(
            "{} has no such key: `dynabase key list --org {}` names them",
            arguments.org, arguments.org
        )));
    }
    for record in &doomed {
        catalog.revoke_key(&record.key.hash).await.map_err(Failure::failed)?;
        eprintln!("revoked {}", service_key::fingerprint(&record.key.hash));
    }
    Ok(())
}

/// An organisation's keys.
pub async fn of(catalog: &Catalog, org: &OrgId) -> Result<Vec<KeyRecord>, Failure> {
    let mut stream = catalog.list_keys(Some(org));
    let mut keys = Vec::new();
    while let Some(key) = stream.recv().await {
        match key {
            Ok(key) => keys.push(key),
            Err(fault) => eprintln!("skipped: {fault}"),
        }
    }
    Ok(keys)
}

/// A fault about an organisation, with what to do.
pub fn unknown(org: &OrgId, fault: &Fault) -> Failure {
    match fault {
        Fault::Unknown => Failure::failed(format_args!(
            "there is no tenant {org}: `dynabase tenant list` shows them, `dynabase tenant create {org} --tier FREE` makes one"
        )),
        other => Failure::failed(format_args!("{org}: {other}")),
    }
}
