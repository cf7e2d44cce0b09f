//! Events that are rare enough to be counted by name: refusals, endings, errors. Counted through the `metrics` facade,
//! so that nobody here knows who reads them. What happens per request is counted in [`super::Meter`].
//!
//! Labels are small closed sets; no organisation and no text from outside is ever one.

use metrics::{counter, describe_counter, describe_histogram};

use crate::{refusal::Refusal, tenant::Protocol};

/// Which side ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client closed, or broke its protocol.
    Client,
    /// The upstream closed or failed.
    Upstream,
    /// We refused or stopped it.
    Us,
}

impl Side {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Side::Client => "client",
            Side::Upstream => "upstream",
            Side::Us => "us",
        }
    }
}

/// Whether something worked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did.
    Ok,
    /// It did not.
    Failed,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Failed => "failed",
        }
    }
}

/// Counts a refusal told to a client.
pub fn refused(protocol: Protocol, refusal: &Refusal) {
    counter!("dynabase_refusals_total", "protocol" => protocol.label(), "reason" => refusal.kind()).increment(1);
    if let Refusal::BadToken(fault) = refusal {
        counter!("dynabase_token_faults_total", "protocol" => protocol.label(), "fault" => fault.label()).increment(1);
    }
}

/// Counts the end of a connection.
pub fn ended(protocol: Protocol, side: Side) {
    counter!("dynabase_connections_ended_total", "protocol" => protocol.label(), "side" => side.label()).increment(1);
}

/// Counts a failed step on the way to an upstream: `connect`, `tls`, `login`, `reset`, ….
pub fn upstream_failed(protocol: Protocol, step: &'static str) {
    counter!("dynabase_upstream_errors_total", "protocol" => protocol.label(), "step" => step).increment(1);
}

/// Counts a session that came to hold its upstream connection beyond a transaction.
pub fn pinned(protocol: Protocol, reason: &'static str) {
    counter!("dynabase_pins_total", "protocol" => protocol.label(), "reason" => reason).increment(1);
}

/// Counts a script that kept a Redis busy and was told to end.
pub fn script_stopped(outcome: Outcome) {
    counter!("dynabase_redis_scripts_stopped_total", "outcome" => outcome.label()).increment(1);
}

/// Counts a reload of the catalog.
pub fn catalog_reloaded(outcome: Outcome) {
    counter!("dynabase_catalog_reloads_total", "outcome" => outcome.label()).increment(1);
}

/// Counts a fetch of the token keys.
pub fn keys_reloaded(outcome: Outcome) {
    counter!("dynabase_key_reloads_total", "outcome" => outcome.label()).increment(1);
}

/// Every series counted through the facade anywhere in this crate, with its help text.
const DESCRIPTIONS: [(&str, &str); 18] = [
    ("dynabase_refusals_total", "Refusals told to clients."),
    ("dynabase_token_faults_total", "Credentials refused, by what was wrong with them."),
    ("dynabase_connections_ended_total", "Connections that ended, by the side that ended them."),
    ("dynabase_upstream_errors_total", "Failed steps on the way to an upstream."),
    ("dynabase_pins_total", "Sessions that came to hold their upstream connection beyond a transaction."),
    ("dynabase_catalog_reloads_total", "Reloads of the catalog."),
    (
        "dynabase_catalog_rereads_total",
        "Whole readings of what is in use of the catalog, after a break in following it.",
    ),
    ("dynabase_key_reloads_total", "Fetches of the token keys."),
    ("dynabase_accept_errors_total", "Failed accepts: for want of resources, or because the connection had gone."),
    ("dynabase_connections_shed_total", "Connections closed unserved: too many unauthenticated from one network."),
    ("dynabase_connection_panics_total", "Connections whose task panicked: each is a fault of ours."),
    ("dynabase_proxy_header_errors_total", "Connections from a balancer's network without a good PROXY v2 header."),
    ("dynabase_http_responses_total", "HTTP responses, by the front that answered and the class of their status."),
    ("dynabase_convex_sockets_ended_total", "Convex sockets that ended, by the reason."),
    ("dynabase_tier_transitions_total", "Tier transitions that came to an end, by how."),
    ("dynabase_mongodb_large_refused_total", "Large MongoDB messages for which there was no room in time."),
    (
        "dynabase_redis_scripts_stopped_total",
        "Scripts that kept a Redis busy for too long, by whether they could be ended.",
    ),
    ("dynabase_tls_errors_total", "Failed TLS handshakes with clients."),
];

/// Gives the installed recorder the help texts. Call once, after installing it.
pub fn describe() {
    for (name, help) in DESCRIPTIONS {
        describe_counter!(name, help);
    }
    describe_histogram!(
        "dynabase_home_move_pause_seconds",
        "How long transactions of a tenant waited while its database changed its home, by whether it did."
    );
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn sources(dir: &Path, found: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            match entry.path() {
                path if path.is_dir() => sources(&path, found),
                path => found.push_str(&std::fs::read_to_string(path).unwrap()),
            }
        }
    }

    #[test]
    fn every_counted_name_is_described() {
        let mut text = String::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut text);
        let counted: Vec<_> = text
            .split("counter!(")
            .skip(1)
            .filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
            .filter(|name| name.starts_with("dynabase_"))
            .collect();
        assert!(counted.len() >= DESCRIPTIONS.len(), "the search finds them");
        for name in counted {
            assert!(DESCRIPTIONS.iter().any(|(described, _)| *described == name), "{name} has no help text");
            assert!(name.ends_with("_total"), "{name} is a counter");
        }
    }
}
