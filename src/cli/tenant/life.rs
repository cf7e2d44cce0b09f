//! The steps of a tenant's life on the command line: each begins, or goes on with what was interrupted, and tells how far
//! every database is.

use std::{sync::Arc, time::Duration};

use tokio::sync::broadcast;

use super::{
    super::{Failure, key, place, print, table, tier},
    Which,
};
use crate::{
    catalog::{Catalog, Deed, Entry, Fault, LedgerFault, Phase},
    config::Config,
    tenant::{Home, Isolation, OrgId, Tier},
    transition::{Act, Coordinator, Errand, Refused, holdings_json},
};

/// How long is waited for the end of what another process works on.
const OTHERS_WAIT: Duration = Duration::from_secs(600);

/// Makes a tenant, or goes on with making it.
pub async fn create(config: &Config, catalog: &Catalog, org: &OrgId, tier: Tier) -> Result<(), Failure> {
    let tiers = place::tiers(config, catalog).await?;
    let shared = tiers.limits(tier).mongodb.isolation == Isolation::Filter;
    let meant = tiers.limits(tier).postgres.home;
    let coordinator = config.coordinator(catalog.clone(), tiers).map_err(Failure::usage)?;
    match carry(&coordinator, org, Act::Create(tier)).await {
        Err(Refused::Exists) => Err(Failure::failed(format_args!(
            "tenant {org} exists: `dynabase tenant show {org}`; `dynabase tenant provision {org}` repeats the databases' part"
        ))),
        Err(refused) => Err(failed(org, &refused)),
        Ok(entry) => {
            over(&entry, "Mend that and run the command again: it goes on.")?;
            let home = catalog.get(org).await.map_err(|fault| key::unknown(org, &fault))?.tenant.home();
            eprintln!("{org}: created on {tier}; its PostgreSQL home is {}", home.label());
            if home == Home::Main && meant == Home::Neon {
                eprintln!(
                    "{org}: {tier} says \"neon\" (tiers.toml), and there are no Neon homes here: see [upstream.neon]"
                );
            }
            // A new tenant is where its tier says.
            if config.upstream.mongodb.url.is_some() && shared {
                eprintln!(
                    "{org}: mongodb: its collections are shared with other tenants. Generated ObjectIds never meet; a program \
                     that chooses its own _id gets 11000 for one that another tenant holds, and is better off with \
                     isolation = \"database\" (tiers.toml)"
                );
            }
            Ok(())
        }
    }
}

/// Any other step.
pub async fn act(which: &Which, act: Act) -> Result<(), Failure> {
    let coordinator = place::coordinator(&which.place.load()?).await?;
    step(&coordinator, &which.org, act).await
}

/// Deletes, with the configuration's grace unless another one is said; or purges at once.
pub async fn delete(which: &Which, grace: Option<Duration>, now: bool) -> Result<(), Failure> {
    let coordinator = place::coordinator(&which.place.load()?).await?;
    let grace = if now { Duration::ZERO } else { grace.unwrap_or_else(|| coordinator.grace()) };
    step(&coordinator, &which.org, Act::Delete(grace)).await?;
    if now {
        return step(&coordinator, &which.org, Act::Purge).await;
    }
    let record = coordinator.catalog().get(&which.org).await.map_err(|fault| key::unknown(&which.org, &fault))?;
    if let Some(deletion) = record.deletion() {
        eprintln!(
            "{org}: its data goes after {}; until then `dynabase tenant restore {org}` takes this back",
            deletion.purge_after,
            org = which.org
        );
    }
    Ok(())
}

async fn step(coordinator: &Coordinator, org: &OrgId, act: Act) -> Result<(), Failure> {
    let done = match act {
        Act::Create(_) => "created",
        Act::Suspend => "suspended",
        Act::Resume => "active",
        Act::Delete(_) => "deleted",
        Act::Restore => "restored",
        Act::Purge => "purged",
        Act::Rotate => "rotated: every database has its new credentials",
        Act::Forget => "the home that its databases have left is gone",
    };
    match carry(coordinator, org, act).await {
        Ok(entry) => over(&entry, "Nothing was changed.")?,
        Err(Refused::Same) => {}
        Err(refused) => return Err(failed(org, &refused)),
    }
    eprintln!("{org}: {done}");
    Ok(())
}

fn failed(org: &OrgId, refused: &Refused) -> Failure {
    match refused {
        Refused::Unknown => key::unknown(org, &Fault::Unknown),
        Refused::Deleting => Failure::failed(format_args!(
            "{org} is being deleted; `dynabase tenant restore {org}` takes that back, `dynabase tenant purge {org} --yes` finishes it"
        )),
        Refused::NotDeleted => {
            Failure::failed(format_args!("{org} is not deleted; `dynabase tenant delete {org}` comes first"))
        }
        refused => Failure::failed(format_args!("{org}: {refused}")),
    }
}

/// Whether it ended well.
fn over(entry: &Entry, hint: &str) -> Result<(), Failure> {
    match entry.phase {
        Phase::Aborting | Phase::Aborted => Err(Failure::failed(format_args!(
            "{}: {}\n{hint}",
            entry.org,
            entry.reason.as_deref().unwrap_or("it was called off")
        ))),
        Phase::Preparing | Phase::Committed | Phase::Done => Ok(()),
    }
}

/// Begins the step and carries it to its end, or goes on with the same one that was interrupted. Gives how it ended.
async fn carry(coordinator: &Coordinator, org: &OrgId, act: Act) -> Result<Entry, Refused> {
    let news = coordinator.news();
    let begun = coordinator.begin_errand(&Errand { org: org.clone(), act, by: "cli" }).await;
    let (id, done) = match begun {
        Ok(entry) => (entry.id.clone(), follow(coordinator.drive(entry), news).await),
        Err(Refused::Busy { id }) => {
            let open = coordinator.catalog().transition(&id).await.map_err(Refused::Catalog)?;
            if !goes_on(act, open.deed) {
                return Err(Refused::Busy { id });
            }
            eprintln!("{org}: going on with {id}");
            (id, follow(coordinator.take_up(org), news).await)
        }
        Err(refused) => return Err(refused),
    };
    match done {
        Ok(entry) => Ok(entry),
        // Another process has it, or had it a moment ago.
        Err(LedgerFault::Overtaken | LedgerFault::Catalog(Fault::Unknown)) => {
            let entry = coordinator.catalog().transition(&id).await.map_err(Refused::Catalog)?;
            tier::closed(coordinator, &entry, OTHERS_WAIT)
                .await
                .map_err(|failure| Refused::Catalog(Fault::Unavailable(failure.to_string())))
        }
        Err(fault) => Err(fault.into()),
    }
}

/// Whether the open entry is what is asked for.
fn goes_on(act: Act, open: Deed) -> bool {
    match act {
        Act::Create(_) => open == Deed::Create,
        Act::Suspend => open == Deed::Suspend,
        Act::Resume => open == Deed::Resume,
        Act::Delete(_) => open == Deed::Delete,
        Act::Restore => open == Deed::Restore,
        Act::Purge => open == Deed::Purge,
        Act::Rotate => open == Deed::Rotate,
        Act::Forget => open == Deed::Forget,
    }
}

/// Runs the work and tells its news.
async fn follow(
    work: impl Future<Output = Result<Entry, LedgerFault>>,
    mut news: broadcast::Receiver<Arc<Entry>>,
) -> Result<Entry, LedgerFault> {
    let mut work = std::pin::pin!(work);
    let mut told: Vec<String> = Vec::new();
    loop {
        tokio::select! {
            biased;
            Ok(entry) = news.recv() => {
                let parts = entry.participants.iter().filter(|_| entry.deed.asks_databases());
                let now: Vec<String> = parts.map(|part| tier::line(&entry, part)).collect();
                now.iter().filter(|line| !told.contains(line)).for_each(|line| eprintln!("{line}"));
                told = now;
            }
            done = work.as_mut() => return done,
        }
    }
}

/// Repeats the databases' part of making a tenant.
pub async fn provision(which: &Which) -> Result<(), Failure> {
    let coordinator = place::coordinator(&which.place.load()?).await?;
    let said = coordinator.provision(&which.org).await.map_err(|fault| key::unknown(&which.org, &fault))?;
    let mut failed = None;
    for (database, answer) in said {
        let database = database.label();
        match answer {
            None => eprintln!("{}: {database}: not there", which.org),
            Some(Ok(word)) if word.is_empty() => eprintln!("{}: {database}: done", which.org),
            Some(Ok(word)) => eprintln!("{}: {database}: done ({word})", which.org),
            Some(Err(trouble)) => {
                failed.get_or_insert_with(|| {
                    format!("{database}: {trouble}\nMend that and run the command again: it goes on.")
                });
            }
        }
    }
    failed.map_or(Ok(()), |failed| Err(Failure::failed(failed)))
}

/// What a purge would take away.
pub async fn holdings(which: &Which, as_json: bool) -> Result<(), Failure> {
    let coordinator = place::coordinator(&which.place.load()?).await?;
    let (record, held) = coordinator.holdings(&which.org).await.map_err(|fault| key::unknown(&which.org, &fault))?;
    let keys = key::of(coordinator.catalog(), &which.org).await?.len();
    if as_json {
        let mut all = holdings_json(&record, &held);
        all["service_keys"] = keys.into();
        print(all);
    } else {
        let mut rows: Vec<[String; 4]> = Vec::new();
        let number = |it: Option<u64>| it.map_or_else(String::new, |number| number.to_string());
        for (database, answer) in &held {
            let name = database.label().to_owned();
            match answer {
                None => rows.push([name, "not there".into(), String::new(), String::new()]),
                Some(Ok(holdings)) if holdings.is_empty() => {
                    rows.push([name, "nothing".into(), String::new(), String::new()]);
                }
                Some(Ok(holdings)) => rows.extend(
                    holdings.iter().map(|it| [name.clone(), it.what.clone(), number(it.count), number(it.bytes)]),
                ),
                Some(Err(trouble)) => {
                    rows.push([name, format!("can't be asked: {trouble}"), String::new(), String::new()])
                }
            }
        }
        rows.push(["catalog".into(), "service keys".into(), keys.to_string(), String::new()]);
        print(table(["DATABASE", "WHAT", "COUNT", "BYTES"], &rows));
    }
    match held.iter().any(|(_, answer)| matches!(answer, Some(Err(_)))) {
        true => Err(Failure::failed("not every database could be asked")),
        false => Ok(()),
    }
}
