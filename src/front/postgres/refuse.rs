//! Refusals in PostgreSQL's words. Each code is chosen by what drivers do with it.

use crate::{
    refusal::{Limit, Over, Refusal},
    wire::postgres::backend::{Report, Severity},
};

/// The refusal of a login or of a whole session: FATAL, the connection ends.
pub fn fatal(refusal: &Refusal) -> Report {
    report(Severity::Fatal, refusal)
}

/// The refusal of one request: ERROR, the session goes on.
pub fn error(refusal: &Refusal) -> Report {
    report(Severity::Error, refusal)
}

/// PostgreSQL's own words for a database that is not there.
pub fn unknown_database(database: &str) -> Report {
    plain(Severity::Fatal, "3D000", format!("database \"{database}\" does not exist"))
}

/// PostgreSQL's own words for a password that is wrong, also used for a user that is not there: a client can't
/// tell which.
pub fn wrong_password(user: &str) -> Report {
    let mut report = plain(Severity::Fatal, "28P01", format!("password authentication failed for user \"{user}\""));
    report.hint = "The password is your Supabase access token (or a dynabase service key); it may have expired.".into();
    report
}

/// A report without detail and hint.
pub fn plain(severity: Severity, code: &'static str, message: impl Into<String>) -> Report {
    Report { severity, code, message: message.into(), detail: String::new(), hint: String::new() }
}

fn report(severity: Severity, refusal: &Refusal) -> Report {
    let plain = |code, message: &str| plain(severity, code, message);
    let hinted = |code, message: &str, hint: &str| Report { hint: hint.into(), ..plain(code, message) };
    match refusal {
        // asyncpg, Npgsql and others map 28P01 to "invalid password" and don't retry.
        Refusal::BadToken(_) => hinted(
            "28P01",
            "password authentication failed",
            "The password is your Supabase access token (or a dynabase service key); it may have expired.",
        ),
        // One text for an unknown organisation and one that is not served to this caller: nothing to probe.
        Refusal::UnknownOrg => plain("28000", "this token's organisation has no database here"),
        Refusal::PlaintextToken => hinted(
            "28000",
            "connection requires TLS",
            "A token may not travel in clear text: connect with sslmode=require, or set allow_plaintext in dynabase's configuration.",
        ),
        // PostgreSQL's own code for a database that is not currently accepting connections; 57P03 would invite retries.
        // On a live session pools understand 57P01 as "this connection is gone".
        Refusal::Suspended => plain("57P01", "terminating connection because the tenant is suspended"),
        Refusal::Revoked => hinted(
            "57P01",
            "terminating connection because its credential has expired or was revoked",
            "Reconnect with a fresh token; give pooled connections a lifetime below the token's (55 minutes).",
        ),
        Refusal::Forbidden { what } => plain("42501", &format!("{what} is not available to tenants")),
        Refusal::Malformed { what } => plain("08P01", what),
        Refusal::TooLarge { max_bytes } => plain("08P01", &format!("message is longer than {max_bytes} bytes")),
        Refusal::OverLimit(over) => over_limit(severity, over),
        Refusal::Full => plain("53300", "sorry, too many clients already"),
        // The one login error on which libpq tries its next host.
        Refusal::UpstreamDown => plain("57P03", "the database is not reachable at the moment"),
        Refusal::UpstreamSlow => plain("57P03", "the database did not answer in time"),
        Refusal::CatalogDown => plain("57P03", "the tenant catalog is not reachable at the moment"),
        Refusal::Draining => plain("57P01", "terminating connection due to administrator command"),
        Refusal::Internal => plain("XX000", "internal error"),
    }
}

/// A suspended tenant at login.
pub fn suspended_login() -> Report {
    plain(Severity::Fatal, "55000", "the tenant is suspended and not currently accepting connections")
}

/// Over the storage of the tier, in the words that a statement gets.
pub fn storage_text(over: &Over) -> (String, String) {
    let message = "could not extend the database: the storage of its tier is used up".into();
    let detail = format!("limit=storage tier={} max_bytes={} used_bytes={}", over.tier, over.max, over.in_use);
    (message, detail)
}

/// The hint that goes with [`storage_text`].
pub const STORAGE_HINT: &str = "DELETE, TRUNCATE, DROP and VACUUM still work; or move to a larger tier.";

fn over_limit(severity: Severity, over: &Over) -> Report {
    let Over { limit, tier, max, in_use, retry_after } = over;
    let wait_ms = retry_after.map(|wait| wait.as_millis().max(1));
    let counted = format!("limit={} tier={tier} max={max} in_use={in_use}", limit.label());
    let (code, message, detail, hint) = match limit {
        Limit::ClientSockets => (
            "53300",
            format!("too many connections: {in_use} of {max} client connections of tier {tier} are in use"),
            counted,
            "Use a smaller pool in the application, or move to a larger tier.".into(),
        ),
        Limit::Connections => (
            "53300",
            format!("too many connections: all {max} database connections of tier {tier} stayed busy"),
            match wait_ms {
                Some(wait) => format!("{counted} waited_ms={wait}"),
                None => counted,
            },
            "Shorter transactions free connections sooner; LISTEN, advisory locks, temporary tables and session mode hold one each.".into(),
        ),
        Limit::Rate => (
            "53400",
            format!("too many requests: tier {tier} allows {max} per second"),
            format!("limit=rate tier={tier} max_per_second={max} retry_after_ms={}", wait_ms.unwrap_or(1)),
            format!("Try again in {} ms, or move to a larger tier.", wait_ms.unwrap_or(1)),
        ),
        // Keys and memory are Redis' limits; the nearest thing here is storage.
        Limit::Storage | Limit::Keys | Limit::Memory => {
            let (message, detail) = storage_text(over);
            ("53100", message, detail, STORAGE_HINT.into())
        }
        // Word for word PostgreSQL's own, which drivers compare.
        Limit::StatementTimeout => (
            "57014",
            "canceling statement due to statement timeout".into(),
            format!("limit=statement_timeout tier={tier} max_ms={max}"),
            "Make the statement faster, or move to a larger tier; SET statement_timeout can't raise this limit.".into(),
        ),
        Limit::IdleInTransaction => (
            "25P03",
            "terminating connection due to idle-in-transaction timeout".into(),
            format!("limit=idle_in_transaction_timeout tier={tier} max_ms={max}"),
            String::new(),
        ),
        // Limits of other databases; nothing here meets them.
        Limit::Cursors
        | Limit::Collections
        | Limit::Indexes
        | Limit::Subscriptions
        | Limit::InFlight
        | Limit::Branches => (
            "53400",
            format!("too many {}: {in_use} of {max} of tier {tier}", limit.label()),
            counted,
            "Move to a larger tier.".into(),
        ),
    };
    Report { severity, code, message, detail, hint }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{refusal::TokenFault, tenant::Tier};

    #[test]
    fn codes_are_those_that_drivers_act_on() {
        let over = |limit| Refusal::OverLimit(Over { limit, tier: Tier::Free, max: 5, in_use: 5, retry_after: None });
        for (refusal, code) in [
            (Refusal::BadToken(TokenFault::Expired), "28P01"),
            (Refusal::UnknownOrg, "28000"),
            (Refusal::Revoked, "57P01"),
            (over(Limit::ClientSockets), "53300"),
            (over(Limit::Connections), "53300"),
            (over(Limit::Rate), "53400"),
            (over(Limit::Storage), "53100"),
            (over(Limit::StatementTimeout), "57014"),
            (over(Limit::IdleInTransaction), "25P03"),
            (Refusal::UpstreamDown, "57P03"),
            (Refusal::Draining, "57P01"),
        ] {
            assert_eq!(fatal(&refusal).code, code, "{refusal:?}");
        }
    }

    #[test]
    fn the_reason_why_a_token_is_bad_stays_in_the_log() {
        assert_eq!(fatal(&Refusal::BadToken(TokenFault::Expired)), fatal(&Refusal::BadToken(TokenFault::Signature)));
    }
}
