//! Where a tenant's databases are: what its own record says beyond its tier.

use serde::{Deserialize, Serialize};

use super::Protocol;

/// Where the Postgres port finds a tenant's database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Home {
    /// The platform's PostgreSQL server.
    Main,
    /// The tenant's Neon endpoint, which sleeps when nobody asks.
    Neon,
}

impl Home {
    /// The word used in configuration, records and on the command line.
    pub fn label(self) -> &'static str {
        match self {
            Home::Main => "main",
            Home::Neon => "neon",
        }
    }

    /// The protocol under which what happens there is counted.
    pub fn protocol(self) -> Protocol {
        match self {
            Home::Main => Protocol::Postgres,
            Home::Neon => Protocol::Neon,
        }
    }
}

/// A tenant's project at Neon, as its management API named it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Its id.
    pub id: String,
    /// The id of its first branch.
    pub branch: String,
    /// The id of the endpoint that serves it.
    pub endpoint: String,
    /// The endpoint's host.
    pub host: String,
}

/// A branch of a tenant's Neon home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Its name: `[a-z0-9][a-z0-9_-]{0,39}`.
    pub name: String,
    /// Where Neon keeps it; absent where a branch is a database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Project>,
}

/// Longest branch name in bytes.
pub const BRANCH_NAME_MAX: usize = 40;

impl Branch {
    /// Whether a branch may be called so.
    pub fn is_name(name: &str) -> bool {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        name.len() <= BRANCH_NAME_MAX
            && name.bytes().next().is_some_and(plain)
            && name.bytes().all(|b| plain(b) || b == b'_' || b == b'-')
    }
}

/// Where a tenant's Neon home is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NeonRoute {
    /// Its project; absent where the home is a database of a configured server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<Project>,
    /// Its branches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub branches: Vec<Branch>,
}

impl NeonRoute {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The branch with this name.
    pub fn branch(&self, name: &str) -> Option<&Branch> {
        self.branches.iter().find(|branch| branch.name == name)
    }
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
    /// The home of its PostgreSQL databases, written down when it is made ([`super::Tenant::home`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postgres: Option<Home>,
    /// Where the Neon door leads instead of the Neon home: the tenant's database was there and has moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sql: Option<Home>,
    /// Instead of the tier's `mongodb.isolation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mongodb: Option<Isolation>,
    /// The Neon home.
    #[serde(skip_serializing_if = "NeonRoute::is_empty")]
    pub neon: NeonRoute,
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
