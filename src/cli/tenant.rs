//! `dynabase tenant`: records in the catalog, places on the databases.

mod life;

use std::time::Duration;

use clap::{Args, Subcommand};
pub use life::create;
use serde_json::{Value, json};

use super::{Failure, key, place, print, table};
use crate::{
    catalog::{Catalog, Record},
    identity::service_key,
    tenant::{DEFAULT_NAME, OrgId, Protocol, Status, Tier},
    transition::Act,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a tenant: its place on every database, then it is served. Interrupted, the same command goes on
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
    /// Delete a tenant: refused at once, its data purged after a grace in which `restore` takes it back
    #[command(
        after_help = "Examples:\n  dynabase tenant delete acme --dry-run --dev dynabase-dev\n  dynabase tenant delete acme --grace 30d --dev dynabase-dev\n  dynabase tenant delete acme --now --yes --dev dynabase-dev"
    )]
    Delete {
        #[command(flatten)]
        which: Which,
        /// Only list what would go, database by database
        #[arg(long)]
        dry_run: bool,
        /// As JSON, with --dry-run
        #[arg(long, requires = "dry_run")]
        json: bool,
        /// How long its data is kept; default the configuration's `tenants.grace`
        #[arg(long, value_parser = place::duration, conflicts_with = "now")]
        grace: Option<Duration>,
        /// Without a grace: all its data goes now. Needs --yes
        #[arg(long)]
        now: bool,
        /// Yes, all its data
        #[arg(long)]
        yes: bool,
    },
    /// Take a deletion back, within its grace
    #[command(after_help = "Example: dynabase tenant restore acme --dev dynabase-dev")]
    Restore {
        #[command(flatten)]
        which: Which,
    },
    /// Purge a deleted tenant now: the data of all its databases, its keys and its record
    #[command(after_help = "Example: dynabase tenant purge acme --yes --dev dynabase-dev")]
    Purge {
        #[command(flatten)]
        which: Which,
        /// Only list what would go, database by database
        #[arg(long)]
        dry_run: bool,
        /// As JSON, with --dry-run
        #[arg(long, requires = "dry_run")]
        json: bool,
        /// Yes, all its data
        #[arg(long)]
        yes: bool,
    },
    /// Give a tenant new credentials on every database; open sessions go on, and it notices nothing
    #[command(after_help = "Example: dynabase tenant rotate acme --dev dynabase-dev")]
    Rotate {
        #[command(flatten)]
        which: Which,
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
            Command::Provision { which } => life::provision(&which).await,
            Command::Suspend { which } => life::act(&which, Act::Suspend).await,
            Command::Resume { which } => life::act(&which, Act::Resume).await,
            Command::Delete { which, dry_run: true, json, .. } | Command::Purge { which, dry_run: true, json, .. } => {
                life::holdings(&which, json).await
            }
            Command::Delete { which, now: true, yes: false, .. } | Command::Purge { which, yes: false, .. } => {
                Err(Failure::usage(format_args!("this deletes all data of {}: add --yes", which.org)))
            }
            Command::Delete { which, now, grace, .. } => life::delete(&which, grace, now).await,
            Command::Restore { which } => life::act(&which, Act::Restore).await,
            Command::Purge { which, .. } => life::act(&which, Act::Purge).await,
            Command::Rotate { which } => life::act(&which, Act::Rotate).await,
        }
    })
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
                [
                    tenant.org.to_string(),
                    tenant.tier.to_string(),
                    word(tenant.status).into(),
                    tenant.home().label().into(),
                    created_at.clone(),
                ]
            })
            .collect();
        print(table(["ORG", "TIER", "STATUS", "HOME", "CREATED"], &rows));
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
    let places = |home| -> Vec<(String, String)> {
        let databases = std::iter::once(DEFAULT_NAME).chain(record.tenant.databases.iter().map(String::as_str));
        databases.map(|database| (database.to_owned(), names.sql(home, &which.org, database).database)).collect()
    };
    let (main, neon) = (places(Protocol::Postgres), config.upstream.neon.is_on().then(|| places(Protocol::Neon)));
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
        let place = |home, databases: &[(String, String)]| {
            json!({
                "role": names.sql(home, &which.org, DEFAULT_NAME).role,
                "databases": databases.iter().map(|(logical, physical)| (logical.clone(), json!(physical)))
                    .collect::<serde_json::Map<_, _>>(),
            })
        };
        described["postgres"] = place(Protocol::Postgres, &main);
        described["neon"] = neon.as_ref().map_or(Value::Null, |databases| {
            let mut home = place(Protocol::Neon, databases);
            home["project"] = json!(record.tenant.routes.neon.project);
            home
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
        ["home".into(), home(&record)],
        ["created".into(), record.created_at.clone()],
        ["credentials".into(), format!("generation {}", tenant.generation)],
        [
            "users".into(),
            std::iter::once(DEFAULT_NAME.to_owned()).chain(tenant.users.clone()).collect::<Vec<_>>().join(", "),
        ],
        ["service keys".into(), if keys.is_empty() { "none".into() } else { keys.join(", ") }],
        ["postgres role".into(), names.base(&which.org)],
    ];
    rows.extend(record.deletion().map(|deletion| ["data goes".into(), format!("after {}", deletion.purge_after)]));
    rows.extend(main.into_iter().map(|(logical, physical)| [format!("postgres {logical}"), physical]));
    rows.extend(
        tenant.routes.neon.project.iter().map(|it| ["neon project".into(), format!("{} at {}", it.id, it.host)]),
    );
    rows.extend(neon.into_iter().flatten().map(|(logical, physical)| [format!("neon {logical}"), physical]));
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

async fn fetch(catalog: &Catalog, org: &OrgId) -> Result<Record, Failure> {
    catalog.get(org).await.map_err(|fault| key::unknown(org, &fault))
}

/// Where its databases are, and what they have left.
fn home(record: &Record) -> String {
    let home = record.tenant.home().label();
    match record.kept() {
        Some(kept) => {
            format!("{home} (moved from {}, where the old copy goes after {})", kept.home.label(), kept.purge_after)
        }
        None => home.to_owned(),
    }
}

fn described(record: &Record) -> Value {
    let tenant = &record.tenant;
    json!({
        "org_id": tenant.org,
        "tier": tenant.tier,
        "status": tenant.status,
        "epoch": tenant.epoch,
        "generation": tenant.generation,
        "home": tenant.home(),
        "left": record.kept(),
        "databases": tenant.databases,
        "users": tenant.users,
        "created_at": record.created_at,
        "purge_after": record.deletion().map(|deletion| deletion.purge_after),
    })
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Active => "active",
        Status::Suspended => "suspended",
        Status::Deleting => "deleting",
    }
}
