//! `dynabase check`.

use std::path::PathBuf;

use clap::Args;

use super::Failure;
use crate::config::Config;

#[derive(Debug, Args)]
pub struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    Config::load(&arguments.config).map_err(Failure::usage)?;
    super::print(format_args!("{}: good", arguments.config.display()));
    Ok(())
}
