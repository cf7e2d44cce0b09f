//! `dynabase token`.

use std::time::{Duration, SystemTime};

use clap::Args;

use super::{Failure, place};
use crate::{config::Config, identity::mint, tenant::OrgId};

#[derive(Debug, Args)]
pub struct Arguments {
    /// The organisation it speaks for
    #[arg(long, value_parser = place::org)]
    org: OrgId,
    /// The user's id; default: one that is the same for every token of the organisation
    #[arg(long, value_name = "UUID", value_parser = place::uuid)]
    sub: Option<String>,
    /// How long it lives
    #[arg(long, default_value = "1h", value_parser = place::duration)]
    ttl: Duration,
    #[command(flatten)]
    place: place::Place,
}

pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let config = arguments.place.load()?;
    super::print(token(&config, &arguments.org, arguments.sub.as_deref(), arguments.ttl)?);
    Ok(())
}

/// A token that this configuration accepts.
pub fn token(config: &Config, org: &OrgId, sub: Option<&str>, ttl: Duration) -> Result<String, Failure> {
    let identity = config.identity.as_ref().ok_or_else(|| Failure::usage("identity.issuer is required"))?;
    let secret = identity.secret().map_err(Failure::usage)?.ok_or_else(|| {
        Failure::usage(
            "no identity.hs256_secret is configured, so only the issuer can make tokens: \
             log in there, or use `dynabase key create` for a program",
        )
    })?;
    let sub = sub.map_or_else(|| mint::subject(org), str::to_owned);
    Ok(mint::token(&secret, &identity.issuer, &identity.audience, org, &sub, ttl, SystemTime::now()))
}
