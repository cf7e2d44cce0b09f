//! Why we said no: one value, rendered by each front in its database's own language (`front/*/refuse.rs`, one
//! exhaustive `match` each).

use std::{fmt, time::Duration};

use crate::tenant::Tier;

/// What is wrong with a credential. For logs and metrics; clients get one text for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenFault {
    /// Empty, too long, not UTF-8, not three parts, not base64url, not JSON, duplicate keys.
    Malformed,
    /// A Supabase publishable or secret key (`sb_…`), which is not a token.
    ApiKey,
    /// `alg` is not allowed, or not the one that its key is for.
    Algorithm,
    /// `crit` or another header that may not be there.
    Header,
    /// No key with this `kid`, or none at all.
    UnknownKey,
    /// The signature does not match.
    Signature,
    /// A required claim is missing or has the wrong type.
    Claims,
    /// `iss` is not the configured issuer.
    Issuer,
    /// `aud` does not contain the configured audience.
    Audience,
    /// `exp` has passed.
    Expired,
    /// `nbf` or `iat` lies in the future.
    NotYetValid,
    /// `role` is not allowed (`anon`, `service_role`).
    Role,
    /// No organisation claim.
    NoOrg,
    /// The organisation claim is not an organisation id.
    BadOrg,
    /// No such service key, or it was revoked.
    UnknownServiceKey,
}

impl TokenFault {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            TokenFault::Malformed => "malformed",
            TokenFault::ApiKey => "api_key",
            TokenFault::Algorithm => "algorithm",
            TokenFault::Header => "header",
            TokenFault::UnknownKey => "unknown_key",
            TokenFault::Signature => "signature",
            TokenFault::Claims => "claims",
            TokenFault::Issuer => "issuer",
            TokenFault::Audience => "audience",
            TokenFault::Expired => "expired",
            TokenFault::NotYetValid => "not_yet_valid",
            TokenFault::Role => "role",
            TokenFault::NoOrg => "no_org",
            TokenFault::BadOrg => "bad_org",
            TokenFault::UnknownServiceKey => "unknown_service_key",
        }
    }
}

/// A limit that can be hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Client sockets of the tenant.
    ClientSockets,
    /// Upstream connections of the tenant.
    Connections,
    /// Requests per second.
    Rate,
    /// Bytes stored.
    Storage,
    /// Duration of one statement, in milliseconds.
    StatementTimeout,
    /// Pause inside a transaction, in milliseconds.
    IdleInTransaction,
    /// Keys stored.
    Keys,
    /// Bytes of memory used.
    Memory,
    /// Open cursors.
    Cursors,
    /// Collections.
    Collections,
    /// Indexes of one collection.
    Indexes,
    /// Subscribed queries.
    Subscriptions,
    /// Writes under way.
    InFlight,
    /// Branches of a database.
    Branches,
}

impl Limit {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Limit::ClientSockets => "client_sockets",
            Limit::Connections => "connections",
            Limit::Rate => "rate",
            Limit::Storage => "storage",
            Limit::StatementTimeout => "statement_timeout",
            Limit::IdleInTransaction => "idle_in_transaction_timeout",
            Limit::Keys => "keys",
            Limit::Memory => "memory",
            Limit::Cursors => "cursors",
            Limit::Collections => "collections",
            Limit::Indexes => "indexes",
            Limit::Subscriptions => "subscriptions",
            Limit::InFlight => "in_flight",
            Limit::Branches => "branches",
        }
    }
}

/// A limit met: which, of what tier, how much of how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over {
    /// Which limit.
    pub limit: Limit,
    /// The tier it belongs to.
    pub tier: Tier,
    /// What the tier allows, in the limit's unit.
    pub max: u64,
    /// What is in use, in the limit's unit.
    pub in_use: u64,
    /// When trying again may succeed.
    pub retry_after: Option<Duration>,
}

/// Why we said no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The credential does not prove who is asking.
    BadToken(TokenFault),
    /// The credential is good, its organisation is not known here.
    UnknownOrg,
    /// The organisation is suspended or being deleted.
    Suspended,
    /// The credential was good and no longer is: it expired or its key was revoked.
    Revoked,
    /// A credential came over a transport that may not carry one.
    PlaintextToken,
    /// Not allowed to tenants.
    Forbidden {
        /// What was asked for.
        what: &'static str,
    },
    /// Not the protocol.
    Malformed {
        /// What is wrong with it.
        what: &'static str,
    },
    /// A message over its cap.
    TooLarge {
        /// The cap.
        max_bytes: u64,
    },
    /// A tier's limit is reached.
    OverLimit(Over),
    /// The process as a whole accepts no more connections.
    Full,
    /// The upstream can't be reached or refused us.
    UpstreamDown,
    /// The upstream did not answer in time.
    UpstreamSlow,
    /// The catalog can't say who this is right now.
    CatalogDown,
    /// This process is shutting down.
    Draining,
    /// A fault of ours; the log has it.
    Internal,
}

impl Refusal {
    /// The metric label: a small closed set.
    pub fn kind(&self) -> &'static str {
        match self {
            Refusal::BadToken(_) => "bad_token",
            Refusal::UnknownOrg => "unknown_org",
            Refusal::Suspended => "suspended",
            Refusal::Revoked => "revoked",
            Refusal::PlaintextToken => "plaintext_token",
            Refusal::Forbidden { .. } => "forbidden",
            Refusal::Malformed { .. } => "malformed",
            Refusal::TooLarge { .. } => "too_large",
            Refusal::OverLimit(over) => over.limit.label(),
            Refusal::Full => "full",
            Refusal::UpstreamDown => "upstream_down",
            Refusal::UpstreamSlow => "upstream_slow",
            Refusal::CatalogDown => "catalog_down",
            Refusal::Draining => "draining",
            Refusal::Internal => "internal",
        }
    }

    /// When trying again may succeed, where we know it.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Refusal::OverLimit(over) => over.retry_after,
            _ => None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::BadToken(fault) => write!(f, "bad token ({})", fault.label()),
            Refusal::OverLimit(over) => {
                write!(f, "{} of tier {}: {} of {}", over.limit.label(), over.tier, over.in_use, over.max)
            }
            other => f.write_str(other.kind()),
        }
    }
}
