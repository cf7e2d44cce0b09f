//! Where a tenant's databases are: what its own record says beyond its tier.

use serde::{Deserialize, Serialize};

/// Where the Postgres port finds a tenant's database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Home {
    /// The platform's PostgreSQL server.
    Main,
    /// The tenant's Neon endpoint, which sleeps when nobody asks.
    Neon,
}

/// How a tenant's documents are kept apart from others' in a shared MongoDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Shared collections; `org_id` in every document, filter and pipeline.
    Filter,
    /// Databases of its own.
    Database,
}

/// Whether a Convex deployment is one tenant's or many tenants'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// One tenant's own.
    #[serde(rename = "deployment")]
    Own,
    /// Shared: the organisation is written into the arguments of every call.
    Shared,
}

/// A tenant's Convex deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvexRoute {
    /// Its address: `https://happy-animal-123.convex.cloud`, `http://convex-acme:3210`.
    pub url: String,
    /// Whether it is the tenant's alone.
    #[serde(default = "own")]
    pub isolation: Sharing,
}

fn own() -> Sharing {
    Sharing::Own
}

/// The `routes` of an organisation's document. What is absent follows the tier or the configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Routes {
    /// Instead of the tier's `postgres.home`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postgres: Option<Home>,
    /// Instead of the tier's `mongodb.isolation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mongodb: Option<Isolation>,
    /// Instead of the configuration's deployment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub convex: Option<ConvexRoute>,
}

impl Routes {
    /// Whether the record says nothing beyond the tier.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
