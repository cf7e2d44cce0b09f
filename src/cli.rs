//! The commands: arguments in, exit code out. What they do lives in the modules below; nothing is decided here.
//!
//! Exit codes: 0 done; 1 it failed (the reason is on standard error); 2 the command line or the configuration is
//! wrong. Results go to standard output, all else to standard error.

mod catalog;
mod check;
pub mod dev;
mod doctor;
mod key;
mod place;
mod serve;
mod tenant;
mod tier;
mod token;

use std::{fmt, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

/// It failed.
const FAILED: u8 = 1;

/// The command line or the configuration is wrong.
const USAGE: u8 = 2;

/// One front door for a SaaS tenant's databases: a Supabase JWT as the password, every request confined to the
/// tenant and its tier.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.\n\n\
                  Example: dynabase dev          a tenant's psql line to paste, two minutes from now"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything on this machine: databases, catalog, four demo tenants, all listeners
    #[command(
        after_help = "Examples:\n  dynabase dev\n  dynabase dev --data-dir /tmp/d --port-offset 1000 --ready-file /tmp/d.json"
    )]
    Dev(dev::Arguments),
    /// Run the proxy
    #[command(after_help = "Example: dynabase serve --config /etc/dynabase/dynabase.toml")]
    Serve(serve::Arguments),
    /// Check a configuration: every fault with its line; exits 0 or 2
    #[command(after_help = "Example: dynabase check --config dynabase.toml")]
    Check(check::Arguments),
    /// Try every dependency the way the proxy would: what is wrong, and how to mend it; exits 0, 1 or 2
    #[command(after_help = "Example: dynabase doctor --config /etc/dynabase/dynabase.toml")]
    Doctor(doctor::Arguments),
    /// Make a development token (only where a signing secret is configured)
    #[command(
        after_help = "Example: psql \"postgres://app:$(dynabase token --org acme --dev dynabase-dev)@127.0.0.1:6432/app\""
    )]
    Token(token::Arguments),
    /// Service keys: credentials for programs that can't renew a token
    #[command(subcommand, after_help = "Example: dynabase key create --org acme --expires 90d --config dynabase.toml")]
    Key(key::Command),
    /// Tenants: their records in the catalog and their places on the databases
    #[command(subcommand, after_help = "Example: dynabase tenant create acme --tier STARTER --config dynabase.toml")]
    Tenant(tenant::Command),
    /// Tiers: move a tenant from one to another in all of its databases, or in none
    #[command(subcommand, after_help = "Example: dynabase tier set acme PRO --config dynabase.toml")]
    Tier(tier::Command),
    /// The catalog on MongoDB: make its collections, copy documents from and to a folder
    #[command(subcommand, after_help = "Example: dynabase catalog init --config dynabase.toml")]
    Catalog(catalog::Command),
    /// Print a shell's completion script
    #[command(after_help = "Example: dynabase completions bash > /etc/bash_completion.d/dynabase")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Why a command did not do its work.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    what: String,
}

impl Failure {
    fn failed(what: impl fmt::Display) -> Self {
        Self { code: FAILED, what: what.to_string() }
    }

    fn usage(what: impl fmt::Display) -> Self {
        Self { code: USAGE, what: what.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    // Where a dependency brings a second provider along and leaves the choice to the process, it is this one; it can't
    // have been chosen before.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let done = match Arguments::parse().command {
        Command::Dev(arguments) => dev::run(&arguments),
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Token(arguments) => token::run(&arguments),
        Command::Key(command) => key::run(command),
        Command::Tenant(command) => tenant::run(command),
        Command::Tier(command) => tier::run(command),
        Command::Catalog(command) => catalog::run(command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "dynabase", &mut std::io::stdout());
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("dynabase: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

/// Writes a line of a result; a reader that has gone away (`| head`) is no failure.
fn print(line: impl fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Columns under their heads, as wide as their widest cell.
fn table<const N: usize>(heads: [&str; N], rows: &[[String; N]]) -> String {
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).chain([heads[at].len()]).max().unwrap_or(0);
    let line = |cells: [&str; N]| {
        let cells: Vec<String> =
            cells.iter().enumerate().map(|(at, cell)| format!("{cell:<width$}", width = width(at))).collect();
        cells.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(heads)];
    lines.extend(rows.iter().map(|row| line(row.each_ref().map(String::as_str))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_well_formed_and_each_help_has_an_example() {
        let mut command = Arguments::command();
        command.clone().debug_assert();
        command.build();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{} has no example", sub.get_name());
            for deeper in sub.get_subcommands().filter(|sub| sub.get_name() != "help") {
                let help = deeper.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "{} {} has no example", sub.get_name(), deeper.get_name());
            }
        }
    }

    #[test]
    fn the_literal_interface_parses() {
        for line in [
            "dev",
            "dev --data-dir d --port-offset 100 --ready-file f --reset",
            "serve --config f",
            "check --config f",
            "doctor --config f",
            "doctor --config f --json",
            "token --org acme --sub 018f3c2e-7b5a-7cc1-9a2f-0123456789ab --ttl 1h --config f",
            "token --org acme --dev d",
            "key create --org acme --user app --expires 90d --config f",
            "key list --org acme --dev d",
            "key revoke --org acme key:0123456789ab --dev d",
            "tenant create acme --tier PRO --config f",
            "tenant list --json --dev d",
            "tenant show acme --dev d",
            "tenant suspend acme --dev d",
            "tenant resume acme --dev d",
            "tenant delete acme --yes --dev d",
            "tenant delete acme --dry-run --json --dev d",
            "tenant delete acme --grace 30d --dev d",
            "tenant delete acme --now --yes --config f",
            "tenant restore acme --dev d",
            "tenant purge acme --yes --dev d",
            "tenant rotate acme --dev d",
            "tier set acme PRO --dev d",
            "tier set acme free --force --wait --config f",
            "tier show acme --json --dev d",
            "tier history acme --dev d",
            "tier verify acme --json --dev d",
            "tier retry acme --dev d",
            "tier abort acme --dev d",
            "catalog init --config f",
            "catalog import --folder d --dev d",
            "catalog export --folder d --config f",
            "completions zsh",
        ] {
            let words = std::iter::once("dynabase").chain(line.split(' '));
            assert!(Arguments::try_parse_from(words).is_ok(), "{line}");
        }
        for line in ["token --org acme", "token --org acme --dev d --config f", "token --org ACME --dev d", "serve"] {
            let words = std::iter::once("dynabase").chain(line.split(' '));
            assert!(Arguments::try_parse_from(words).is_err(), "{line}");
        }
    }
}
