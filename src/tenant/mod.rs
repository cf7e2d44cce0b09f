//! Plain nouns: who a customer organisation is and what it may use. No I/O here.
//!
//! Entry points: [`OrgId::parse`], [`Tenant`], [`tier::Tiers::parse`], [`namespace::Names`].

pub mod directory;
pub mod namespace;
pub mod route;
mod sql;
pub mod tier;
pub mod unit;

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

pub use namespace::{Names, Namespace};
pub use route::{Branch, ConvexRoute, Home, Isolation, NeonRoute, Project, Routes, Sharing};
pub use sql::SqlLimits;
pub use tier::{Expiry, Limits, OverRate, PoolMode, Tier, Tiers};

/// Longest organisation id in bytes; also keeps every derived name under Postgres' 63 bytes.
const ORG_ID_MAX_BYTES: usize = 48;

/// A customer organisation's id: `[a-z0-9][a-z0-9_-]{0,47}`. A UUID in capitals is folded to lower case,
/// so that one organisation never has two spellings.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct OrgId(Arc<str>);

impl OrgId {
    /// Gives the id, or `None` for anything outside the pattern.
    pub fn parse(text: &str) -> Option<Self> {
        if is_uuid(text) {
            return Some(Self(text.to_ascii_lowercase().into()));
        }
        let bytes = text.as_bytes();
        let first = *bytes.first()?;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let fits = bytes.len() <= ORG_ID_MAX_BYTES
            && plain(first)
            && bytes.iter().all(|&b| plain(b) || b == b'_' || b == b'-');
        fits.then(|| Self(text.into()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for OrgId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for OrgId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for OrgId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "{text:?} is not an organisation id: use [a-z0-9][a-z0-9_-]{{0,47}} or a UUID"
            ))
        })
    }
}

/// 8-4-4-4-12 hexadecimal digits, any case.
pub fn is_uuid(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 36
        && bytes.iter().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => *b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

/// The wire protocols that clients speak to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Protocol {
    /// PostgreSQL frontend/backend protocol 3.
    Postgres,
    /// Redis, RESP2 and RESP3.
    Redis,
    /// MongoDB's OP_MSG.
    Mongodb,
    /// Convex over HTTP and its sync WebSocket.
    Convex,
    /// Neon: SQL over HTTP, Postgres over WebSocket.
    Neon,
}

impl Protocol {
    /// Every protocol, in the order of its discriminant.
    pub const ALL: [Protocol; 5] =
        [Protocol::Postgres, Protocol::Redis, Protocol::Mongodb, Protocol::Convex, Protocol::Neon];

    /// The word used in metrics, logs and configuration.
    pub fn label(self) -> &'static str {
        match self {
            Protocol::Postgres => "postgres",
            Protocol::Redis => "redis",
            Protocol::Mongodb => "mongodb",
            Protocol::Convex => "convex",
            Protocol::Neon => "neon",
        }
    }
}

/// Whether a tenant is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Served.
    Active,
    /// Refused, its sessions ended; its data stays.
    Suspended,
    /// Refused; its data will be purged.
    Deleting,
}

/// An organisation as the catalog last described it. Immutable: a change makes a new value.
#[derive(Clone, Debug, PartialEq)]
pub struct Tenant {
    /// Its id.
    pub org: OrgId,
    /// Its plan.
    pub tier: Tier,
    /// Whether it is served.
    pub status: Status,
    /// Grows by one with every change of tier.
    pub epoch: u64,
    /// Grows by one with every rotation of the derived upstream credentials.
    pub generation: u32,
    /// Logical Postgres databases beyond the default `app`.
    pub databases: Vec<String>,
    /// Logical users beyond the default `app`.
    pub users: Vec<String>,
    /// Where its databases are, as far as that differs from what its tier says.
    pub routes: Routes,
    /// No transaction of its SQL databases begins now: they change their home in a moment.
    pub still: bool,
}

/// The logical user and database that every tenant has.
pub const DEFAULT_NAME: &str = "app";

impl Tenant {
    /// A new organisation: served, nothing special about it.
    pub fn new(org: OrgId, tier: Tier) -> Self {
        Self {
            org,
            tier,
            status: Status::Active,
            epoch: 1,
            generation: 1,
            databases: Vec::new(),
            users: Vec::new(),
            routes: Routes::default(),
            still: false,
        }
    }

    /// Whether `user` is one of the tenant's logical users (exact bytes, as Postgres compares).
    pub fn has_user(&self, user: &str) -> bool {
        user == DEFAULT_NAME || self.users.iter().any(|u| u == user)
    }

    /// Whether `database` is one of the tenant's logical databases.
    pub fn has_database(&self, database: &str) -> bool {
        database == DEFAULT_NAME || self.databases.iter().any(|d| d == database)
    }

    /// Whether `database` is one of the tenant's logical databases in its home of `protocol`: in the Neon home also
    /// `<database>@<branch>`.
    pub fn has_database_in(&self, protocol: Protocol, database: &str) -> bool {
        self.has_database(database)
            || protocol == Protocol::Neon
                && database.rsplit_once('@').is_some_and(|(database, branch)| {
                    self.has_database(database) && self.routes.neon.branch(branch).is_some()
                })
    }

    /// Where the Postgres port finds the tenant's databases: as its record says since it was made. A record that says
    /// nothing (older than that, or written by hand) means the main home. The tier has no word in it: changed by hand,
    /// it would lead to an empty database.
    pub fn home(&self) -> Home {
        self.routes.postgres.unwrap_or(Home::Main)
    }

    /// Where the door of `protocol` leads for `database`. The Neon door leads to the Neon home, unless the tenant's
    /// database has moved from there; a branch stays where branches are.
    pub fn home_of(&self, protocol: Protocol, database: &str) -> Home {
        match protocol {
            Protocol::Neon if self.has_database(database) => self.routes.sql.unwrap_or(Home::Neon),
            Protocol::Neon => Home::Neon,
            _ => self.home(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn org_ids_outside_the_pattern_are_refused() {
        for good in ["a", "acme", "0", "a-b_c", &"x".repeat(48), "018F3c2e-7b5a-7cc1-9a2f-0123456789AB"] {
            assert!(OrgId::parse(good).is_some(), "{good:?}");
        }
        for bad in [
            "",
            "-a",
            "_a",
            "A",
            "a b",
            "a'b",
            "a:b",
            "a/b",
            "a\0",
            "аcme",
            "a.b",
            "ACME",
            &"x".repeat(49),
            "a\n",
            "a{b}",
        ] {
            assert!(OrgId::parse(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_uuid_has_one_spelling() {
        let upper = OrgId::parse("018F3C2E-7B5A-7CC1-9A2F-0123456789AB");
        assert_eq!(upper, OrgId::parse("018f3c2e-7b5a-7cc1-9a2f-0123456789ab"));
    }
}
