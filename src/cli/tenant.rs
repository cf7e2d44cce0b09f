//! `dynabase tenant`: records in the catalog, places on the databases.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Failure, key, place, print, table};
use crate::{
    catalog::{Catalog, Expect, Fault, Record},
    config::Config,
    identity::service_key,
    tenant::{DEFAULT_NAME, NeonRoute, OrgId, Status, Tenant, Tier},
    upstream::{neon::HomeError, postgres::Provisioner},
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a tenant: its role and databases, then its record
    #[command(after_help = "Example: dynabase tenant create acme --tier STARTER --dev dynabase-dev")]
    Create {
        #[command(flatten)]
        which: Which,
        /// FREE, STARTER, PRO or ENTERPRISE
        #[arg(long, default_value = "FREE", value_parser = place::tier)]
        tier: Tier,
    },
    /// List all tenants
    #[command(after_help = "Example: dynabase tenant list --json --dev dynabase-dev")]
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        place: place::Place,
    },
    /// Show one tenant
    #[command(after_help = "Example: dynabase tenant show acme --dev dynabase-dev")]
    Show {
        #[command(flatten)]
        which: Which,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Repeat what `create` does on the databases: after a new logical database or tier in the record
    #[command(after_help = "Example: dynabase tenant provision acme --dev dynabase-dev")]
    Provision {
        #[command(flatten)]
        which: Which,
    },
    /// Refuse a tenant and end its sessions; its data stays
    #[command(after_help = "Example: dynabase tenant suspend acme --dev dynabase-dev")]
    Suspend {
        #[command(flatten)]
        which: Which,
    },
    /// Serve a suspended tenant again
    #[command(after_help = "Example: dynabase tenant resume acme --dev dynabase-dev")]
    Resume {
        #[command(flatten)]
        which: Which,
    },
    /// Delete a tenant with all its data
    #[command(after_help = "Example: dynabase tenant delete acme --yes --dev dynabase-dev")]
    Delete {
        #[command(flatten)]
        which: Which,
        /// Yes, all its data
        #[arg(long)]
        yes: bool,
    },
}

/// One tenant of one installation.
#[derive(Debug, Args)]
pub struct Which {
    /// The organisation
    #[arg(value_parser = place::org)]
    org: OrgId,
    #[command(flatten)]
    place: place::Place,
}

pub fn run(command: Command) -> Result<(), Failure> {
    place::block_on(async move {
        match command {
            Command::Create { which, tier } => {
                let config = which.place.load()?;
                create(&config, &place::catalog(&config).await?, &which.org, tier).await
            }
            Command::List { json, place } => list(&place::catalog(&place.load()?).await?, json).await,
            Command::Show { which, json } => show(&which, json).await,
            Command::Provision { which } => {
                let config = which.place.load()?;
                let catalog = place::catalog(&config).await?;
                let record = fetch(&catalog, &which.org).await?;
                again(&config, &catalog, record).await
            }
            Command::Suspend { which } => set_status(&which, Status::Suspended).await,
            Command::Resume { which } => set_status(&which, Status::Active).await,
            Command::Delete { which, yes: true } => delete(&which).await,
            Command::Delete { which, yes: false } => {
                Err(Failure::usage(format_args!("this deletes all data of {}: add --yes", which.org)))
            }
        }
    })
}

/// Makes a tenant. The record comes last: with it the tenant is served. Stopped half-way, the same command goes on.
pub async fn create(config: &Config, catalog: &Catalog, org: &OrgId, tier: Tier) -> Result<(), Failure> {
    let exists = || {
        Failure::failed(format_args!(
            "tenant {org} exists: `dynabase tenant show {org}`; `dynabase tenant provision {org}` repeats the databases' part"
        ))
    };
    match catalog.get(org).await {
        Err(Fault::Unknown) => {}
        Ok(_) => return Err(exists()),
        Err(fault) => return Err(key::unknown(org, &fault)),
    }
    let mut tenant = Tenant::new(org.clone(), tier);
    tenant.routes.neon = provision(config, &tenant).await?;
    match catalog.put(Record::new(tenant), Expect::Absent).await {
        Ok(()) => {
            eprintln!("{org}: created on {tier}");
            Ok(())
        }
        Err(Fault::Exists) => Err(exists()),
        Err(fault) => Err(Failure::failed(fault)),
    }
}

/// Repeats what `create` does; what has moved meanwhile is recorded.
async fn again(config: &Config, catalog: &Catalog, record: Record) -> Result<(), Failure> {
    let route = provision(config, &record.tenant).await?;
    if route == record.tenant.routes.neon {
        return Ok(());
    }
    change(catalog, record, |tenant| tenant.routes.neon = route).await
}

/// Makes the tenant's place on every database there is; gives where its Neon home is.
async fn provision(config: &Config, tenant: &Tenant) -> Result<NeonRoute, Failure> {
    let names = config.names().map_err(Failure::usage)?;
    let tiers = place::tiers(config, &place::catalog(config).await?).await?;
    eprintln!("{}: postgres: role, databases, privileges …", tenant.org);
    let report =
        provisioner(config)?.ensure(tenant, &names, &tiers.limits(tenant.tier).postgres).await.map_err(|error| {
            Failure::failed(format_args!("postgres: {error}\nMend that and run the command again: it goes on."))
        })?;
    let made = match report.created_databases.len() {
        0 => "all was there".into(),
        count => format!("{count} database(s) made"),
    };
    eprintln!("{}: postgres: {made}", tenant.org);
    report.warnings.iter().for_each(|warning| eprintln!("{}: postgres: warning: {warning}", tenant.org));
    let mut route = tenant.routes.neon.clone();
    if let Some(neon) = config.upstream.neon.homes(names.clone()).map_err(Failure::usage)? {
        let (there, report) = neon.ensure(tenant, &names, tiers.limits(tenant.tier)).await.map_err(neon_failure)?;
        route = there;
        let host = route.project.as_ref().map_or_else(String::new, |project| format!(" at {}", project.host));
        eprintln!("{}: neon: role and {} new database(s){host}", tenant.org, report.created_databases.len());
    }
    if let Some(redis) = config.redis().map_err(Failure::usage)? {
        redis.provision(&tenant.org, tenant.generation).await.map_err(redis_failure)?;
        eprintln!("{}: redis: user and database are there", tenant.org);
    }
    if let Some(mongodb) = config.mongodb().map_err(Failure::usage)? {
        mongodb.provision(&tenant.org, tenant.generation).await.map_err(mongodb_failure)?;
        eprintln!("{}: mongodb: user and rights are there", tenant.org);
    }
    Ok(route)
}

fn neon_failure(error: HomeError) -> Failure {
    Failure::failed(format_args!("neon: {error}\nMend that and run the command again: it goes on."))
}

fn mongodb_failure(error: crate::upstream::mongo::Error) -> Failure {
    Failure::failed(format_args!("mongodb: {error}\nMend that and run the command again: it goes on."))
}

fn redis_failure(error: crate::upstream::redis::DialError) -> Failure {
    Failure::failed(format_args!("redis: {error}\nMend that and run the command again: it goes on."))
}

fn provisioner(config: &Config) -> Result<Provisioner, Failure> {
    config.upstream.postgres.admin().map(Provisioner::new).map_err(Failure::usage)
}

async fn list(catalog: &Catalog, as_json: bool) -> Result<(), Failure> {
    let mut stream = catalog.list();
    let (mut tenants, mut damaged) = (Vec::new(), 0);
    while let Some(record) = stream.recv().await {
        match record {
            Ok(record) => tenants.push(record),
            Err(fault) => {
                eprintln!("skipped: {fault}");
                damaged += 1;
            }
        }
    }
    tenants.sort_by(|a, b| a.tenant.org.cmp(&b.tenant.org));
    if as_json {
        print(Value::from_iter(tenants.iter().map(described)));
    } else {
        let rows: Vec<_> = tenants
            .iter()
            .map(|Record { tenant, created_at, .. }| {
                [tenant.org.to_string(), tenant.tier.to_string(), word(tenant.status).into(), created_at.clone()]
            })
            .collect();
        print(table(["ORG", "TIER", "STATUS", "CREATED"], &rows));
    }
    match damaged {
        0 => Ok(()),
        count => Err(Failure::failed(format_args!("{count} document(s) can't be read"))),
    }
}

async fn show(which: &Which, as_json: bool) -> Result<(), Failure> {
    let config = which.place.load()?;
    let catalog = place::catalog(&config).await?;
    let record = fetch(&catalog, &which.org).await?;
    let keys = key::of(&catalog, &which.org).await?;
    let names = config.names().map_err(Failure::usage)?;
    let databases = std::iter::once(DEFAULT_NAME).chain(record.tenant.databases.iter().map(String::as_str));
    let places: Vec<(String, String)> =
        databases.map(|database| (database.to_owned(), names.postgres(&which.org, database).database)).collect();
    let keys: Vec<String> = keys.iter().map(|record| service_key::fingerprint(&record.key.hash)).collect();
    let upstream = config.convex().map_err(Failure::usage)?;
    let convex = upstream.as_ref().and_then(|upstream| Some((upstream, upstream.deployment(&record.tenant)?)));
    if as_json {
        let mut described = described(&record);
        if let Some((upstream, deployment)) = &convex {
            described["convex"] = json!({
                "deployment": deployment.origin.to_string(),
                "shared": deployment.org_argument.is_some(),
                "audience": deployment.audience,
                "auth_config": upstream.auth_config(deployment),
            });
        }
        described["service_keys"] = json!(keys);
        described["postgres"] = json!({
            "role": names.base(&which.org),
            "databases": places.iter().map(|(logical, physical)| (logical.clone(), json!(physical)))
                .collect::<serde_json::Map<_, _>>(),
        });
        print(described);
        return Ok(());
    }
    let tenant = &record.tenant;
    let mut rows = vec![
        ["org".into(), tenant.org.to_string()],
        ["tier".into(), tenant.tier.to_string()],
        ["status".into(), word(tenant.status).into()],
        ["epoch".into(), tenant.epoch.to_string()],
        ["created".into(), record.created_at.clone()],
        [
            "users".into(),
            std::iter::once(DEFAULT_NAME.to_owned()).chain(tenant.users.clone()).collect::<Vec<_>>().join(", "),
        ],
        ["service keys".into(), if keys.is_empty() { "none".into() } else { keys.join(", ") }],
        ["postgres role".into(), names.base(&which.org)],
    ];
    rows.extend(places.into_iter().map(|(logical, physical)| [format!("postgres {logical}"), physical]));
    if let Some((_, deployment)) = &convex {
        let how = if deployment.org_argument.is_some() { "shared" } else { "its own" };
        rows.push(["convex deployment".into(), format!("{} ({how})", deployment.origin)]);
    }
    print(table(["", ""], &rows).trim_start());
    if let Some((upstream, deployment)) = &convex {
        print(format_args!("\nconvex/auth.config.ts of that deployment:\n\n{}", upstream.auth_config(deployment)));
    }
    Ok(())
}

async fn set_status(which: &Which, status: Status) -> Result<(), Failure> {
    let catalog = place::catalog(&which.place.load()?).await?;
    let record = fetch(&catalog, &which.org).await?;
    match (record.tenant.status, status) {
        (Status::Deleting, Status::Active) => {
            return Err(Failure::failed(format_args!(
                "{} is being deleted; `dynabase tenant delete {} --yes` finishes that",
                which.org, which.org
            )));
        }
        (present, wanted) if present == wanted => {}
        _ => put_status(&catalog, record, status).await?,
    }
    eprintln!("{}: {}", which.org, word(status));
    Ok(())
}

async fn put_status(catalog: &Catalog, record: Record, status: Status) -> Result<(), Failure> {
    change(catalog, record, |tenant| tenant.status = status).await
}

async fn change(catalog: &Catalog, mut record: Record, change: impl FnOnce(&mut Tenant)) -> Result<(), Failure> {
    let present = record.tenant.epoch;
    change(&mut record.tenant);
    // A new epoch: whoever still holds the record of before can't write it back.
    record.tenant.epoch += 1;
    catalog.put(record, Expect::Epoch(present)).await.map_err(|fault| match fault {
        Fault::Stale { .. } => Failure::failed("somebody changed the tenant meanwhile: look again, run it again"),
        other => Failure::failed(other),
    })
}

/// Refused first, then its data, its keys, and the record last: stopped half-way, the same command goes on.
async fn delete(which: &Which) -> Result<(), Failure> {
    let config = which.place.load()?;
    let catalog = place::catalog(&config).await?;
    let record = fetch(&catalog, &which.org).await?;
    let tenant = record.tenant.clone();
    if tenant.status != Status::Deleting {
        put_status(&catalog, record, Status::Deleting).await?;
    }
    eprintln!("{}: postgres: dropping databases and role …", which.org);
    let names = config.names().map_err(Failure::usage)?;
    provisioner(&config)?.drop(&tenant, &names).await.map_err(|error| {
        Failure::failed(format_args!("postgres: {error}\nMend that and run the command again: it goes on."))
    })?;
    if let Some(neon) = config.upstream.neon.homes(names.clone()).map_err(Failure::usage)? {
        eprintln!("{}: neon: removing its home …", which.org);
        neon.remove(&tenant, &names).await.map_err(neon_failure)?;
    }
    if let Some(redis) = config.redis().map_err(Failure::usage)? {
        eprintln!("{}: redis: removing keys and user …", which.org);
        redis.remove(&which.org, true).await.map_err(redis_failure)?;
    }
    if let Some(mongodb) = config.mongodb().map_err(Failure::usage)? {
        eprintln!("{}: mongodb: removing databases, documents and user …", which.org);
        mongodb.remove(&which.org, true).await.map_err(mongodb_failure)?;
    }
    for record in key::of(&catalog, &which.org).await? {
        match catalog.revoke_key(&record.key.hash).await {
            Ok(()) | Err(Fault::Unknown) => {}
            Err(fault) => return Err(Failure::failed(fault)),
        }
    }
    catalog.delete(&which.org).await.map_err(Failure::failed)?;
    eprintln!("{}: deleted", which.org);
    Ok(())
}

async fn fetch(catalog: &Catalog, org: &OrgId) -> Result<Record, Failure> {
    catalog.get(org).await.map_err(|fault| key::unknown(org, &fault))
}

fn described(record: &Record) -> Value {
    let tenant = &record.tenant;
    json!({
        "org_id": tenant.org,
        "tier": tenant.tier,
        "status": tenant.status,
        "epoch": tenant.epoch,
        "generation": tenant.generation,
        "databases": tenant.databases,
        "users": tenant.users,
        "created_at": record.created_at,
    })
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Active => "active",
        Status::Suspended => "suspended",
        Status::Deleting => "deleting",
    }
}
