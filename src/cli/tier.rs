//! `dynabase tier`: moving a tenant between tiers, and seeing where it stands.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::{Failure, place, print, table};
use crate::{
    catalog::{Deed, Entry, Fault, LedgerFault, Phase},
    tenant::{OrgId, Tier},
    transition::{Coordinator, Refused, Request, Verified, described, participant::Trouble, word},
};

/// After the commit, how long `set` without `--wait` stays for databases that are not there yet.
const FINISH_WAIT: Duration = Duration::from_secs(15);

/// How often an open transition is looked at by who only waits for it.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long `abort` waits for the transition's end.
const ABORT_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move a tenant to another tier: in all of its databases, or in none
    #[command(
        after_help = "Examples:\n  dynabase tier set acme PRO --dev dynabase-dev\n  dynabase tier set acme FREE --force --config dynabase.toml\n\nExit codes: 0 the tenant has the tier, 1 it does not, 2 wrong usage."
    )]
    Set {
        #[command(flatten)]
        which: Which,
        /// FREE, STARTER, PRO or ENTERPRISE
        #[arg(value_parser = place::tier)]
        tier: Tier,
        /// Also when it has more than that allows: it may then only shrink
        #[arg(long)]
        force: bool,
        /// Stay until every database is there, however long that takes
        #[arg(long)]
        wait: bool,
    },
    /// Show a tenant's tier and its open transition
    #[command(after_help = "Example: dynabase tier show acme --dev dynabase-dev")]
    Show {
        #[command(flatten)]
        which: Which,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// List a tenant's transitions, the latest last
    #[command(after_help = "Example: dynabase tier history acme --dev dynabase-dev")]
    History {
        #[command(flatten)]
        which: Which,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Read back every database: is it where the tenant's tier is? Exits 0 if all are
    #[command(after_help = "Example: dynabase tier verify acme --json --dev dynabase-dev")]
    Verify {
        #[command(flatten)]
        which: Which,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Go on with a transition that is stuck
    #[command(after_help = "Example: dynabase tier retry acme --dev dynabase-dev")]
    Retry {
        #[command(flatten)]
        which: Which,
    },
    /// Call a transition off, before it is committed
    #[command(after_help = "Example: dynabase tier abort acme --dev dynabase-dev")]
    Abort {
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

impl Which {
    async fn coordinator(&self) -> Result<Coordinator, Failure> {
        place::coordinator(&self.place.load()?).await
    }
}

pub fn run(command: Command) -> Result<(), Failure> {
    place::block_on(async move {
        match command {
            Command::Set { which, tier, force, wait } => set(&which, tier, force, wait).await,
            Command::Show { which, json } => show(&which, json).await,
            Command::History { which, json } => history(&which, json).await,
            Command::Verify { which, json } => verify(&which, json).await,
            Command::Retry { which } => retry(&which).await,
            Command::Abort { which } => abort(&which).await,
        }
    })
}

async fn set(which: &Which, to: Tier, force: bool, wait: bool) -> Result<(), Failure> {
    let coordinator = which.coordinator().await?;
    let news = coordinator.news();
    let request = Request { org: which.org.clone(), to, force, by: "cli" };
    let entry = match coordinator.begin(&request).await {
        Ok(entry) => entry,
        Err(Refused::Same) => {
            eprintln!("{}: is on {to}", which.org);
            return Ok(());
        }
        Err(Refused::Over(over)) => {
            let rows: Vec<[String; 4]> =
                over.into_iter().map(|it| [it.database, it.what, it.used.to_string(), it.max.to_string()]).collect();
            print(table(["DATABASE", "WHAT", "USED", "MAX"], &rows));
            return Err(Failure::failed(format_args!(
                "{} has more than {to} allows; nothing was changed. With --force it goes there and may only shrink",
                which.org
            )));
        }
        Err(refused) => return Err(Failure::failed(format_args!("{}: {refused}; nothing was changed", which.org))),
    };
    eprintln!("{}: {} → {to}, transition {}", which.org, entry.from, entry.id);
    let id = entry.id.clone();
    let work = coordinator.drive(entry);
    let done = follow(work, news, wait).await;
    outcome(&coordinator, which, &id, done).await
}

/// Runs the work and tells its news. `None`: it is committed and some database is not there yet.
async fn follow(
    work: impl Future<Output = Result<Entry, LedgerFault>>,
    mut news: broadcast::Receiver<std::sync::Arc<Entry>>,
    wait: bool,
) -> Option<Result<Entry, LedgerFault>> {
    let mut work = std::pin::pin!(work);
    let mut told: Vec<String> = Vec::new();
    let mut patience = None;
    loop {
        let over = patience.unwrap_or_else(tokio::time::Instant::now);
        tokio::select! {
            biased;
            Ok(entry) = news.recv() => {
                let now: Vec<String> = entry.participants.iter().map(|part| line(&entry, part)).collect();
                now.iter().filter(|line| !told.contains(line)).for_each(|line| eprintln!("{line}"));
                told = now;
                if entry.phase == Phase::Committed && patience.is_none() {
                    eprintln!("{}: committed: {} is in force", entry.org, entry.to);
                    patience = Some(tokio::time::Instant::now() + FINISH_WAIT);
                }
            }
            done = work.as_mut() => return Some(done),
            () = tokio::time::sleep_until(over), if patience.is_some() && !wait => return None,
        }
    }
}

pub(super) fn line(entry: &Entry, part: &crate::catalog::Part) -> String {
    let note = if part.note.is_empty() { String::new() } else { format!(" ({})", part.note) };
    format!("{}: {}: {}{note}", entry.org, part.database, word(part.step, entry.phase))
}

async fn outcome(
    coordinator: &Coordinator,
    which: &Which,
    id: &str,
    done: Option<Result<Entry, LedgerFault>>,
) -> Result<(), Failure> {
    let entry = match done {
        Some(Ok(entry)) => entry,
        Some(Err(LedgerFault::Overtaken)) => {
            // Another process carries it on; its word counts.
            let entry = coordinator.catalog().transition(id).await.map_err(Failure::failed)?;
            eprintln!("{}: another process goes on with {id}", which.org);
            entry
        }
        Some(Err(fault)) => return Err(Failure::failed(format_args!("{}: {fault}", which.org))),
        None => {
            eprintln!(
                "{}: not every database is there yet; a running dynabase goes on. `dynabase tier show {}`",
                which.org, which.org
            );
            return Ok(());
        }
    };
    match entry.phase {
        Phase::Done if entry.deed != Deed::Tier => {
            eprintln!("{}: {} done", which.org, entry.deed.word());
            Ok(())
        }
        Phase::Done => {
            eprintln!("{}: done: {} in every database", which.org, entry.to);
            Ok(())
        }
        Phase::Committed | Phase::Preparing => Ok(()),
        Phase::Aborting | Phase::Aborted => Err(Failure::failed(format_args!(
            "{} stays on {}: {}",
            which.org,
            entry.from,
            entry.reason.as_deref().unwrap_or("the transition was aborted")
        ))),
    }
}

async fn show(which: &Which, as_json: bool) -> Result<(), Failure> {
    let catalog = place::catalog(&which.place.load()?).await?;
    let record = catalog.get(&which.org).await.map_err(|fault| unknown(&which.org, fault))?;
    let open = match catalog.open_transition(&which.org).await {
        Ok(entry) => Some(entry),
        Err(Fault::Unknown) => None,
        Err(fault) => return Err(Failure::failed(fault)),
    };
    let tenant = &record.tenant;
    if as_json {
        print(json!({
            "org_id": tenant.org, "tier": tenant.tier, "epoch": tenant.epoch,
            "transition": open.as_ref().map(described),
        }));
        return Ok(());
    }
    let mut rows = vec![
        ["org".into(), tenant.org.to_string()],
        ["tier".into(), tenant.tier.to_string()],
        ["epoch".into(), tenant.epoch.to_string()],
    ];
    match open {
        None => rows.push(["transition".into(), "none".into()]),
        Some(entry) => {
            rows.push(["transition".into(), entry.id.clone()]);
            rows.push(match entry.deed {
                Deed::Tier => ["to".into(), entry.to.to_string()],
                deed => ["what".into(), deed.word().to_owned()],
            });
            rows.push(["state".into(), entry.phase.word().into()]);
            rows.extend(entry.reason.iter().map(|reason| ["reason".into(), reason.clone()]));
            rows.extend(entry.participants.iter().map(|part| {
                let state = word(part.step, entry.phase);
                let note = if part.note.is_empty() { state.to_owned() } else { format!("{state} ({})", part.note) };
                [part.database.clone(), note]
            }));
        }
    }
    print(table(["", ""], &rows).trim_start());
    Ok(())
}

async fn history(which: &Which, as_json: bool) -> Result<(), Failure> {
    let catalog = place::catalog(&which.place.load()?).await?;
    let mut stream = catalog.transitions(&which.org);
    let mut entries = Vec::new();
    while let Some(entry) = stream.recv().await {
        match entry {
            Ok(entry) => entries.push(entry),
            Err(fault) => eprintln!("skipped: {fault}"),
        }
    }
    entries.sort_by_key(|entry| (entry.began_ms, entry.fence));
    if as_json {
        print(Value::from_iter(entries.iter().map(described)));
        return Ok(());
    }
    let rows: Vec<[String; 5]> = entries
        .iter()
        .map(|entry| {
            let began = std::time::SystemTime::UNIX_EPOCH + Duration::from_millis(entry.began_ms);
            let what = match entry.deed {
                Deed::Tier => format!("{} → {}", entry.from, entry.to),
                deed => deed.word().to_owned(),
            };
            [
                crate::catalog::date::format(began),
                what,
                entry.phase.word().to_owned(),
                entry.id.clone(),
                entry.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    print(table(["BEGAN", "WHAT", "STATE", "ID", "REASON"], &rows));
    Ok(())
}

async fn verify(which: &Which, as_json: bool) -> Result<(), Failure> {
    let coordinator = which.coordinator().await?;
    let (tenant, answers) = coordinator.verify(&which.org).await.map_err(|fault| unknown(&which.org, fault))?;
    let open = coordinator.catalog().open_transition(&which.org).await.ok();
    let agrees = answers.iter().all(Verified::agrees) && open.is_none();
    if as_json {
        let databases: Vec<Value> = answers.iter().map(verified_json).collect();
        print(json!({
            "org_id": tenant.org, "tier": tenant.tier, "epoch": tenant.epoch, "home": tenant.home(), "agrees": agrees,
            "transition": open.as_ref().map(|entry| &entry.id), "databases": databases,
        }));
    } else {
        let rows: Vec<[String; 3]> = answers
            .iter()
            .map(|it| {
                let (state, words) = verified_words(it);
                let is_home = words.is_empty() && it.database == tenant.home().protocol();
                let words = if is_home { "the Postgres port leads here".to_owned() } else { words };
                [it.database.label().to_owned(), state.to_owned(), words]
            })
            .collect();
        print(table(["DATABASE", tenant.tier.name(), ""], &rows));
    }
    match (agrees, open) {
        (true, _) => Ok(()),
        (false, Some(entry)) => {
            Err(Failure::failed(format_args!("transition {} of {} is not over yet", entry.id, which.org)))
        }
        (false, None) => Err(Failure::failed(format_args!(
            "not every database is where {} of {} is: `dynabase tenant provision {}` brings them there",
            tenant.tier, which.org, which.org
        ))),
    }
}

fn verified_words(it: &Verified) -> (&'static str, String) {
    match &it.answer {
        None => ("not there", "this installation has no such database".into()),
        Some(Ok(read)) if read.agrees => ("yes", String::new()),
        Some(Ok(read)) => ("no", format!("has {}, should have {}", read.found, read.expected)),
        Some(Err(Trouble::No(why))) => ("no", why.clone()),
        Some(Err(trouble)) => ("unknown", trouble.to_string()),
    }
}

fn verified_json(it: &Verified) -> Value {
    let (state, words) = verified_words(it);
    let read = it.answer.as_ref().and_then(|answer| answer.as_ref().ok());
    json!({
        "database": it.database.label(),
        "state": state,
        "expected": read.map(|read| &read.expected),
        "found": read.map(|read| &read.found),
        "why": if words.is_empty() { Value::Null } else { words.into() },
    })
}

async fn retry(which: &Which) -> Result<(), Failure> {
    let coordinator = which.coordinator().await?;
    let news = coordinator.news();
    let open = opened(&coordinator, &which.org).await?;
    match coordinator.take_up(&which.org).await {
        Err(LedgerFault::Overtaken) => {
            eprintln!("{}: another process works on {}; waiting for it", which.org, open.id);
            let done = closed(&coordinator, &open, ABORT_WAIT).await?;
            drop(news);
            outcome(&coordinator, which, &open.id, Some(Ok(done))).await
        }
        done => outcome(&coordinator, which, &open.id, Some(done)).await,
    }
}

async fn abort(which: &Which) -> Result<(), Failure> {
    let coordinator = which.coordinator().await?;
    let open = opened(&coordinator, &which.org).await?;
    if open.phase.decision().is_some() {
        return Err(Failure::failed(format_args!(
            "{} is {}: past that point it only goes on (`dynabase tier retry {}`)",
            open.id,
            open.phase.word(),
            which.org
        )));
    }
    coordinator.catalog().cancel(&which.org).await.map_err(Failure::failed)?;
    // Nobody may be working on it.
    let done = match coordinator.take_up(&which.org).await {
        Ok(entry) => entry,
        Err(LedgerFault::Overtaken | LedgerFault::Catalog(Fault::Unknown)) => {
            closed(&coordinator, &open, ABORT_WAIT).await?
        }
        Err(fault) => return Err(Failure::failed(fault)),
    };
    match done.phase {
        Phase::Aborted | Phase::Aborting => {
            eprintln!("{}: stays on {}: {}", which.org, done.from, done.reason.as_deref().unwrap_or("called off"));
            Ok(())
        }
        phase => Err(Failure::failed(format_args!("{} was {} before it could be called off", done.id, phase.word()))),
    }
}

async fn opened(coordinator: &Coordinator, org: &OrgId) -> Result<Entry, Failure> {
    coordinator.catalog().open_transition(org).await.map_err(|fault| match fault {
        Fault::Unknown => Failure::failed(format_args!("{org} has no open transition")),
        fault => Failure::failed(fault),
    })
}

/// Waits for the end of a transition that another process works on.
pub(super) async fn closed(coordinator: &Coordinator, entry: &Entry, patience: Duration) -> Result<Entry, Failure> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let now = coordinator.catalog().transition(&entry.id).await.map_err(Failure::failed)?;
        if now.phase.is_closed() {
            return Ok(now);
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(Failure::failed(format_args!("{} is {} yet", now.id, now.phase.word())));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn unknown(org: &OrgId, fault: Fault) -> Failure {
    super::key::unknown(org, &fault)
}
