//! `dynabase catalog`: makes MongoDB's collections, and moves documents between them and a folder.

use std::{
    io::IsTerminal,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;

use super::{Failure, place, print};
use crate::catalog::{self, Catalog, Expect, Fault, Record};

/// Documents on their way at a time.
const AT_ONCE: usize = 32;

/// Pause between two lines about progress.
const TELL: Duration = Duration::from_secs(1);

/// Faults told one by one; more are counted.
const TOLD_MAX: u64 = 20;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the collections on MongoDB with their rules and indexes; may be repeated
    #[command(after_help = "Example: dynabase catalog init --config dynabase.toml")]
    Init {
        #[command(flatten)]
        place: place::Place,
    },
    /// Copy the documents of a folder (a file catalog) into the configured catalog; what is there stays
    #[command(
        after_help = "Example: dynabase catalog import --folder /var/lib/dynabase/catalog --config dynabase.toml"
    )]
    Import(Move),
    /// Copy the documents of the configured catalog into a folder (a file catalog); what is there stays
    #[command(after_help = "Example: dynabase catalog export --folder /var/backups/catalog --config dynabase.toml")]
    Export(Move),
}

#[derive(Debug, Args)]
pub struct Move {
    /// The folder with orgs/ and service_keys/
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    place: place::Place,
}

pub fn run(command: Command) -> Result<(), Failure> {
    place::block_on(async move {
        match command {
            Command::Init { place } => init(&place::catalog(&place.load()?).await?).await,
            Command::Import(Move { folder, place }) => {
                if !folder.join("orgs").is_dir() {
                    return Err(Failure::usage(format_args!("{}: no folder orgs in it", folder.display())));
                }
                let into = place::catalog(&place.load()?).await?;
                copy(&open(folder).await?, &into).await
            }
            Command::Export(Move { folder, place }) => {
                let from = place::catalog(&place.load()?).await?;
                copy(&from, &open(folder).await?).await
            }
        }
    })
}

async fn open(folder: PathBuf) -> Result<Catalog, Failure> {
    Catalog::open(&catalog::Config::folder(folder)).await.map_err(Failure::failed)
}

/// Makes what the catalog needs, and says what was done.
pub async fn init(catalog: &Catalog) -> Result<(), Failure> {
    let made = catalog.init().await.map_err(Failure::failed)?;
    if made.is_empty() {
        eprintln!("the file catalog makes its folders by itself");
    }
    for one in made {
        let what = if one.new { "made" } else { "was there, rules and indexes brought up to date" };
        eprintln!("{}: {what}", one.collection);
        if let Some(why) = one.without_rules {
            eprintln!("{}: the server takes no rules for documents: {why}", one.collection);
        }
    }
    Ok(())
}

/// What became of the documents of one kind.
#[derive(Default)]
struct Count {
    copied: u64,
    there: u64,
    damaged: u64,
}

async fn copy(from: &Catalog, into: &Catalog) -> Result<(), Failure> {
    let orgs =
        all("organisations", from.list(), |record: Record| async move { into.put(record, Expect::Absent).await });
    let orgs = orgs.await?;
    let keys = all("service keys", from.list_keys(None), |record| async move { into.create_key(record).await }).await?;
    for (what, count) in [("organisations", &orgs), ("service keys", &keys)] {
        print(format_args!(
            "{what}: {} copied, {} were there already, {} damaged and left out",
            count.copied, count.there, count.damaged
        ));
    }
    match orgs.damaged + keys.damaged {
        0 => Ok(()),
        count => Err(Failure::failed(format_args!("{count} document(s) can't be read"))),
    }
}

async fn all<T, W: Future<Output = Result<(), Fault>>>(
    what: &str,
    list: mpsc::Receiver<Result<T, Fault>>,
    write: impl Fn(T) -> W,
) -> Result<Count, Failure> {
    let mut count = Count::default();
    let (mut told, begun) = (Instant::now(), Instant::now());
    let write = &write;
    let reading = stream::unfold(list, async |mut list| list.recv().await.map(|item| (item, list)));
    let mut writing = std::pin::pin!(reading.map(|item| async move { write(item?).await }).buffer_unordered(AT_ONCE));
    while let Some(done) = writing.next().await {
        match done {
            Ok(()) => count.copied += 1,
            Err(Fault::Exists) => count.there += 1,
            Err(Fault::Damaged(why)) => {
                count.damaged += 1;
                if count.damaged <= TOLD_MAX {
                    eprintln!("left out: {why}");
                }
            }
            // What is copied stays; the same command goes on.
            Err(fault) => return Err(Failure::failed(format_args!("{fault}\nMend that and run the command again."))),
        }
        if told.elapsed() > TELL {
            told = Instant::now();
            let sum = count.copied + count.there + count.damaged;
            let end = if std::io::stderr().is_terminal() { "\r" } else { "\n" };
            eprint!("{what}: {sum} after {} s{end}", begun.elapsed().as_secs());
        }
    }
    Ok(count)
}
