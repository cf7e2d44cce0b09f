//! What an entry of the ledger does with a tenant, and what its commit writes into the tenant's document.

use serde::{Deserialize, Serialize};

use super::{Entry, Phase};
use crate::tenant::{Home, Status};

/// What an entry does with a tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Deed {
    /// Another tier.
    #[default]
    Tier,
    /// A place on every database, then it is served.
    Create,
    /// Refused; its data stays.
    Suspend,
    /// Served again.
    Resume,
    /// Refused; its data stays until the grace is over.
    Delete,
    /// The deletion is taken back.
    Restore,
    /// All data goes, and the record last.
    Purge,
    /// The next generation of derived credentials.
    Rotate,
    /// The home that its SQL databases have left goes.
    Forget,
}

impl Deed {
    /// The word in records and answers.
    pub fn word(self) -> &'static str {
        match self {
            Deed::Tier => "tier",
            Deed::Create => "create",
            Deed::Suspend => "suspend",
            Deed::Resume => "resume",
            Deed::Delete => "delete",
            Deed::Restore => "restore",
            Deed::Purge => "purge",
            Deed::Rotate => "rotate",
            Deed::Forget => "forget",
        }
    }

    /// Whether databases take part; the others are a change of the record alone.
    pub fn asks_databases(self) -> bool {
        match self {
            Deed::Tier | Deed::Create | Deed::Purge | Deed::Rotate | Deed::Forget => true,
            Deed::Suspend | Deed::Resume | Deed::Delete | Deed::Restore => false,
        }
    }

    pub(super) fn is_tier(&self) -> bool {
        *self == Deed::Tier
    }
}

/// What an organisation's document says of its deletion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// From when on its data goes: RFC 3339 in UTC.
    pub purge_after: String,
    /// Its status before.
    pub was: Status,
}

/// What an organisation's document says of the home that its SQL databases have left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Which.
    pub home: Home,
    /// From when on what is there goes: RFC 3339 in UTC.
    pub purge_after: String,
}

/// What a commit writes into the tenant's document besides tier, epoch and routes.
pub(super) struct Change {
    pub(super) status: Option<Status>,
    pub(super) generation: Option<u32>,
    /// `Some(None)`: there is none any more.
    pub(super) deletion: Option<Option<Deletion>>,
    /// As `deletion`.
    pub(super) kept: Option<Option<Kept>>,
}

impl Entry {
    /// How an open entry ends whose tenant has no document any more: that is what a purge comes to.
    pub(super) fn without_its_tenant(&self) -> (Phase, &'static str) {
        match self.deed {
            Deed::Purge => (Phase::Done, ""),
            _ => (Phase::Aborted, "the tenant was deleted"),
        }
    }

    /// What its commit writes.
    pub(super) fn change(&self) -> Change {
        let none = Change { status: None, generation: None, deletion: None, kept: None };
        match self.deed {
            Deed::Tier => Change { kept: self.kept.clone().map(Some), ..none },
            Deed::Forget => Change { kept: Some(None), ..none },
            Deed::Create | Deed::Resume => Change { status: Some(Status::Active), ..none },
            Deed::Suspend => Change { status: Some(Status::Suspended), ..none },
            Deed::Delete => Change { status: Some(Status::Deleting), deletion: Some(self.deletion.clone()), ..none },
            Deed::Restore => {
                let status = self.deletion.as_ref().map_or(Status::Active, |deletion| deletion.was);
                Change { status: Some(status), deletion: Some(None), ..none }
            }
            Deed::Purge => none,
            Deed::Rotate => Change { generation: Some(self.from_generation + 1), ..none },
        }
    }
}
