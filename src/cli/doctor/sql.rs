//! The servers that tenants' SQL databases are on: the main one, that of the Neon homes, and what moves databases between.

use super::{Findings, within};
use crate::{
    config::{Config, program_folders},
    tenant::Tier,
    upstream::{
        neon::Homes,
        postgres::{self, Dump},
    },
};

/// The server of the main databases, or that of the Neon homes.
pub(super) async fn postgres(part: &'static str, config: &postgres::Config, findings: &mut Findings) {
    let admin = match config.admin() {
        Ok(admin) => admin,
        Err(error) => return findings.fault(part, format_args!("upstream.{part}.url {error}"), "edit it"),
    };
    let about = match within(admin.about()).await {
        Ok(about) => about,
        Err(error) => {
            let look = format!("look at upstream.{part}.url: host, port, role and password; at pg_hba.conf; at tls");
            return findings.fault(part, error, look);
        }
    };
    if about.version < postgres::VERSION_MIN {
        findings.fault(
            part,
            format_args!("PostgreSQL {}: tenants need {} or newer", about.version, postgres::VERSION_MIN),
            "upgrade the server",
        );
    }
    if about.is_standby {
        findings.fault(
            part,
            "it is a standby and takes no writes",
            format_args!("name the primary in upstream.{part}.url"),
        );
    }
    for (may, right, word) in [
        (about.may_create_databases, "make databases", "CREATEDB"),
        (about.may_create_roles, "make roles", "CREATEROLE"),
    ] {
        if !may && !about.is_superuser {
            findings.fault(
                part,
                format_args!("{} may not {right}: no tenant can be made", admin.user()),
                format_args!("as a superuser: ALTER ROLE \"{}\" {word}", admin.user()),
            );
        }
    }
    let wanted = config.max_connections;
    if wanted > about.max_connections {
        findings.warning(
            part,
            format_args!("upstream.{part}.max_connections is {wanted}, the server takes {}", about.max_connections),
            "raise max_connections on the server, or lower ours",
        );
    }
    findings.good(part, format_args!("PostgreSQL {} at {}", about.version, admin.target().address()));
}

pub(super) async fn neon(config: &Config, findings: &mut Findings) {
    const PART: &str = "neon";
    /// No tenant's project is called so; looking for it changes nothing.
    const NOBODY: &str = "dynabase_doctor";
    match config.names().and_then(|names| config.upstream.neon.homes(names)) {
        Ok(None) => {
            let without = config.load_tiers().map(|tiers| config.without_neon(&tiers)).unwrap_or_default();
            let tiers: Vec<&str> = without.iter().map(|tier| tier.name()).collect();
            match tiers.as_slice() {
                [] => findings.good(PART, "not configured: no Neon homes"),
                tiers => findings
                    .good(PART, format_args!("not configured: new tenants on {} get the main home", tiers.join(", "))),
            }
        }
        Err(error) => findings.fault(PART, error, "edit [upstream.neon]"),
        Ok(Some(Homes::Server(_))) => postgres(PART, &config.upstream.neon.server(), findings).await,
        Ok(Some(Homes::Projects(projects))) => match within(projects.api().find_project(NOBODY)).await {
            Ok(_) => findings.good(PART, "homes are projects at Neon, whose API takes the key"),
            Err(error) => findings.fault(PART, error, "look at upstream.neon.api_key, api_url and org_id"),
        },
    }
}

/// Where tiers have different homes, databases move between them.
pub(super) async fn homes(config: &Config, findings: &mut Findings) {
    const PART: &str = "home changes";
    let (Ok(tiers), true) = (config.load_tiers(), config.upstream.neon.is_on()) else { return };
    let homes = Tier::ALL.map(|tier| tiers.limits(tier).postgres.home);
    if homes.iter().all(|home| *home == homes[0]) {
        return;
    }
    let Ok(admin) = config.upstream.postgres.admin() else { return };
    let Ok(about) = within(admin.about()).await else { return };
    match Dump::new(program_folders()).find(about.version) {
        Ok(path) => findings.good(PART, format_args!("schemas are read by {}", path.display())),
        Err(error) => {
            findings.warning(PART, error, "without it a tenant whose new tier has another home stays on its tier")
        }
    }
}
