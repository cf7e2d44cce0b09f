//! Why something with a tenant did not begin.

use std::fmt;

use super::participant::Trouble;
use crate::{
    catalog::{Fault, LedgerFault, Over},
    tenant::{Protocol, Tier},
};

/// Why a transition did not begin. Nothing was changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Refused {
    /// There is no such tenant.
    Unknown,
    /// It has this tier.
    Same,
    /// It is being deleted.
    Deleting,
    /// It is there already.
    Exists,
    /// Its making was begun on another tier.
    OtherTier {
        /// Which.
        begun: Tier,
    },
    /// It is not wholly made.
    Unmade,
    /// It was not deleted.
    NotDeleted,
    /// Another transition of it is open.
    Busy {
        /// Which.
        id: String,
    },
    /// It has more than the new tier allows.
    Over(Vec<Over>),
    /// A database can't take part.
    Participant {
        /// Which.
        database: Protocol,
        /// Why.
        why: Trouble,
    },
    /// Its record was changed meanwhile.
    Outdated,
    /// The catalog can't be used.
    Catalog(Fault),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Unknown => f.write_str("there is no such tenant"),
            Refused::Same => f.write_str("nothing to do: the tenant is there already"),
            Refused::Deleting => f.write_str("the tenant is being deleted"),
            Refused::Exists => f.write_str("the tenant exists"),
            Refused::OtherTier { begun } => write!(f, "its creation on {begun} was begun: finish that, or delete it"),
            Refused::Unmade => f.write_str("the tenant is not wholly made: `tenant create` goes on with that"),
            Refused::NotDeleted => f.write_str("the tenant is not deleted"),
            Refused::Busy { id } => write!(f, "transition {id} of this tenant is not over yet"),
            Refused::Over(over) => {
                f.write_str("the tenant has more than the new tier allows:")?;
                over.iter().try_for_each(|it| write!(f, " {} {}: {} of {};", it.database, it.what, it.used, it.max))
            }
            Refused::Participant { database, why } => write!(f, "{}: {why}", database.label()),
            Refused::Outdated => f.write_str("the tenant's record was changed meanwhile: look again, ask again"),
            Refused::Catalog(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for Refused {}

impl From<LedgerFault> for Refused {
    fn from(fault: LedgerFault) -> Self {
        match fault {
            LedgerFault::Busy { id } => Refused::Busy { id },
            LedgerFault::Overtaken | LedgerFault::Outdated => Refused::Outdated,
            LedgerFault::Catalog(Fault::Unknown) => Refused::Unknown,
            LedgerFault::Catalog(fault) => Refused::Catalog(fault),
        }
    }
}
