//! `dynabase serve`.

use std::path::PathBuf;

use clap::Args;

use super::Failure;
use crate::{app, config::Config};

#[derive(Debug, Args)]
pub struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let config = Config::load(&arguments.config).map_err(Failure::usage)?;
    app::log_to_stderr(&config.log).map_err(Failure::usage)?;
    let runtime = app::runtime(&config.runtime).map_err(Failure::failed)?;
    runtime
        .block_on(async {
            let app = app::App::build(config, Some(arguments.config.clone())).await?;
            app.run(|| Ok(())).await
        })
        .map_err(Failure::failed)
}
