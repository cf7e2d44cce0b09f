//! Which installation a command is about: `--config FILE` or `--dev DIR`; and the argument types several commands share.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use super::Failure;
use crate::{
    catalog::Catalog,
    config::Config,
    tenant::{OrgId, Tier, is_uuid, unit},
    transition::Coordinator,
};

/// The configuration's name in a folder of `dynabase dev`.
pub const DEV_CONFIG: &str = "dynabase.toml";

/// Which installation.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Place {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder of a `dynabase dev`
    #[arg(long, value_name = "DIR")]
    dev: Option<PathBuf>,
}

impl Place {
    /// Reads its configuration.
    pub fn load(&self) -> Result<Config, Failure> {
        let path = match (&self.config, &self.dev) {
            (Some(path), _) => path.clone(),
            (None, Some(folder)) => folder.join(DEV_CONFIG),
            (None, None) => return Err(Failure::usage("give --config FILE or --dev DIR")),
        };
        Config::load(&path).map_err(Failure::usage)
    }
}

/// Opens the catalog of a configuration.
pub async fn catalog(config: &Config) -> Result<Catalog, Failure> {
    let settings = config.catalog.as_ref().ok_or_else(|| Failure::usage("catalog.path is required"))?;
    Catalog::open(settings).await.map_err(Failure::failed)
}

/// What moves tenants between tiers, over the databases of a configuration.
pub async fn coordinator(config: &Config) -> Result<Coordinator, Failure> {
    config.coordinator(catalog(config).await?).map_err(Failure::usage)
}

/// Runs a command's work to its end, on this thread.
pub fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::failed)?;
    runtime.block_on(work)
}

/// An organisation id as an argument.
pub fn org(text: &str) -> Result<OrgId, String> {
    OrgId::parse(text).ok_or_else(|| "use [a-z0-9][a-z0-9_-]{0,47} or a UUID".into())
}

/// A tier as an argument, in capitals or not.
pub fn tier(text: &str) -> Result<Tier, String> {
    text.to_ascii_uppercase().parse()
}

/// A UUID as an argument.
pub fn uuid(text: &str) -> Result<String, String> {
    is_uuid(text).then(|| text.to_ascii_lowercase()).ok_or_else(|| "use a UUID".into())
}

/// A duration as an argument.
pub fn duration(text: &str) -> Result<Duration, String> {
    unit::parse_duration(text).filter(|it| !it.is_zero()).ok_or_else(|| "use a duration such as 30m, 1h or 90d".into())
}
