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
    let config = Config::load(&arguments.config).map_err(Failure::usage)?;
    super::print(format_args!("{}: good", arguments.config.display()));
    for tier in config.without_neon(&config.load_tiers().map_err(Failure::usage)?) {
        super::print(format_args!(
            "new tenants on {tier} get the main home: {} says postgres.home = \"neon\", and [upstream.neon] has neither url \
             nor api_key",
            config.tiers.0.display()
        ));
    }
    Ok(())
}
