//! Refusals in Redis' language. Drivers switch on the first word, so each is the one that makes them do the right
//! thing: redis-py takes `max number of clients reached` for a connection error, ioredis reconnects on `READONLY`,
//! every driver retries on `LOADING`, `BUSY`, `TRYAGAIN` and `CLUSTERDOWN` (so a limit must not say those).

use std::time::Duration;

use crate::refusal::{Limit, Over, Refusal};

/// What stays on the line after a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The client may go on.
    Stay,
    /// The connection ends.
    Close,
}

/// Before anybody is admitted.
pub const NOAUTH: &str = "NOAUTH Authentication required.";

/// Where the server would believe any payload.
pub const RESTORE: &str = "NOPERM RESTORE needs a server that looks into payloads (sanitize-dump-payload clients)";

/// The error line of a refusal, and whether the connection ends with it.
pub fn render(refusal: &Refusal) -> (String, After) {
    let text = |text: &str| text.to_owned();
    match refusal {
        // One text for all, as Redis: it does not say what is wrong with a credential.
        Refusal::BadToken(_) | Refusal::UnknownOrg => {
            (text("WRONGPASS invalid username-password pair or user is disabled."), After::Stay)
        }
        Refusal::Suspended => (text("NOPERM this organization is suspended"), After::Close),
        Refusal::Revoked => {
            (text("NOAUTH the credential has expired or was revoked; authenticate again"), After::Close)
        }
        Refusal::PlaintextToken => {
            (text("ERR a token may not travel over plaintext: connect with TLS (rediss://)"), After::Close)
        }
        Refusal::Forbidden { what } => {
            (format!("NOPERM this user has no permissions to run the '{what}' command"), After::Stay)
        }
        Refusal::Malformed { what } => (format!("ERR Protocol error: {what}"), After::Close),
        Refusal::TooLarge { max_bytes } => {
            (format!("ERR max request size exceeded. Limit: {max_bytes} bytes"), After::Close)
        }
        Refusal::OverLimit(over) => over_limit(over),
        Refusal::Full => (text("ERR max number of clients reached"), After::Close),
        Refusal::UpstreamDown => (text("ERR upstream unavailable"), After::Stay),
        Refusal::UpstreamSlow => (text("ERR upstream did not answer in time"), After::Stay),
        Refusal::CatalogDown => (text("ERR the tenant catalog is unavailable; try again"), After::Stay),
        Refusal::Draining => (text("LOADING this proxy is shutting down; reconnect"), After::Close),
        Refusal::Internal => (text("ERR internal error"), After::Close),
    }
}

fn over_limit(over: &Over) -> (String, After) {
    let Over { tier, max, in_use, .. } = over;
    let text = |text: &str| text.to_owned();
    match over.limit {
        // To the letter: redis-py compares the whole text, and takes anything longer for an error of the command.
        Limit::ClientSockets => (text("ERR max number of clients reached"), After::Close),
        Limit::Connections => (
            format!(
                "ERR max number of blocked, watching or subscribed clients reached ({in_use} of {max} of tier {tier})"
            ),
            After::Stay,
        ),
        Limit::Rate => {
            let wait = over.retry_after.unwrap_or(Duration::ZERO).as_millis().max(1);
            (
                format!(
                    "ERR max requests limit exceeded. Limit: {max} commands per second (tier {tier}); retry in {wait} ms"
                ),
                After::Stay,
            )
        }
        Limit::Keys => (oom(&format!("{in_use} of {max} keys of tier {tier}")), After::Stay),
        Limit::Memory | Limit::Storage => {
            (oom(&format!("{} of {} MB of tier {tier}", in_use >> 20, max >> 20)), After::Stay)
        }
        Limit::StatementTimeout | Limit::IdleInTransaction => {
            (format!("ERR {} exceeded", over.limit.label()), After::Stay)
        }
        // Limits of other databases; nothing here meets them.
        Limit::Cursors
        | Limit::Collections
        | Limit::Indexes
        | Limit::Subscriptions
        | Limit::InFlight
        | Limit::Branches => {
            (format!("ERR too many {}: {in_use} of {max} of tier {tier}", over.limit.label()), After::Stay)
        }
    }
}

/// Redis' own words for a full memory, which every driver knows, with the limit that was met behind them.
pub fn oom(what: &str) -> String {
    format!("OOM command not allowed when used memory > 'maxmemory'. ({what} used; delete some or raise the tier)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{refusal::TokenFault, tenant::Tier};

    #[test]
    fn no_refusal_of_a_limit_makes_drivers_reconnect_or_retry_at_once() {
        for limit in [Limit::Rate, Limit::Keys, Limit::Memory, Limit::Connections] {
            let over = Over { limit, tier: Tier::Free, max: 5, in_use: 6, retry_after: None };
            let (text, after) = render(&Refusal::OverLimit(over));
            assert_eq!(after, After::Stay);
            assert!(text.starts_with("ERR ") || text.starts_with("OOM "), "{text}");
        }
    }

    #[test]
    fn too_many_clients_is_what_redis_says_to_the_letter() {
        let over = Over { limit: Limit::ClientSockets, tier: Tier::Free, max: 50, in_use: 50, retry_after: None };
        let said = render(&Refusal::OverLimit(over));
        assert_eq!(said, ("ERR max number of clients reached".to_owned(), After::Close));
    }

    #[test]
    fn what_is_wrong_with_a_credential_is_not_told() {
        let one = render(&Refusal::BadToken(TokenFault::Expired));
        assert_eq!(one, render(&Refusal::UnknownOrg));
        assert_eq!(one, render(&Refusal::BadToken(TokenFault::Signature)));
    }
}
