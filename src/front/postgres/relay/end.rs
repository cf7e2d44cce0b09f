//! The ends of a session: what the client is told, what becomes of the connection, what is written down.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::io::AsyncWriteExt;

use super::{Metered, Relay, Told, link};
use crate::{
    front::postgres::{self as front, conversation::Fault, count_refusal, farewell, refuse},
    net::Peer,
    quota::{Stop, clock},
    refusal::Refusal,
    session::Session,
    tenant::PoolMode,
    wire::postgres::backend::{Report, Severity},
};

/// The one line about a session, at its end. `sums`: bytes in, bytes out, transactions.
pub(super) fn log_end(id: u64, peer: Peer, session: &Session, reason: &'static str, sums: [u64; 3]) {
    let [bytes_in, bytes_out, transactions] = sums;
    let protocol = session.protocol().label();
    metrics::counter!("dynabase_connections_ended_total", "protocol" => protocol, "reason" => reason).increment(1);
    let milliseconds = clock::now_ms().saturating_sub(session.live().opened_ms);
    tracing::info!(
        conn = id, %peer, org = %session.slot().org(), subject = %session.identity().subject, protocol, reason, bytes_in,
        bytes_out, transactions, seconds = Duration::from_millis(milliseconds).as_secs_f64(), "postgres session ended"
    );
}

impl Relay {
    /// Adds what was used since the last time to the tenant's meter, and to its rate what was not asked for before.
    pub(super) fn meter(&mut self) {
        let now = Metered {
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            completed: self.conversation.ledger().completed(),
            errors: self.conversation.errors(),
        };
        let before = std::mem::replace(&mut self.metered, now);
        let meter = self.session.meter();
        let statements = now.completed - before.completed;
        meter.transactions.fetch_add(1, Ordering::Relaxed);
        meter.requests.fetch_add(statements, Ordering::Relaxed);
        meter.bytes_in.fetch_add(now.bytes_in - before.bytes_in, Ordering::Relaxed);
        meter.bytes_out.fetch_add(now.bytes_out - before.bytes_out, Ordering::Relaxed);
        if now.errors > before.errors {
            meter.errors.fetch_add(now.errors - before.errors, Ordering::Relaxed);
        }
        if statements > 1 {
            self.session.charge(statements - 1);
        }
    }

    pub(super) fn log(&self, reason: &'static str) {
        if self.told == Told::Nothing {
            return;
        }
        let sums = [self.bytes_in, self.bytes_out, self.transactions];
        log_end(self.id, self.peer, &self.session, reason, sums);
    }

    pub(super) async fn stop(&mut self, stop: Stop) -> &'static str {
        self.end(&Session::farewell(stop)).await
    }

    /// Ends the session with a FATAL report, where the client is between two messages.
    pub(super) async fn end(&mut self, refusal: &Refusal) -> &'static str {
        count_refusal(self.session.protocol(), refusal);
        self.say_goodbye(&refuse::fatal(refusal)).await;
        refusal.kind()
    }

    pub(super) async fn say_goodbye(&mut self, report: &Report) {
        if self.to_client.is_empty() && self.conversation.is_between_replies() {
            let held = std::mem::take(&mut self.held);
            farewell(&mut self.client, &held, report).await;
        }
    }

    pub(super) async fn server_gone(&mut self, told: bool) -> &'static str {
        // What it sent before is with the client already; nothing is ever sent to it again.
        if !told {
            let mut report = refuse::plain(Severity::Fatal, "08006", "the connection to the database was lost");
            report.hint = "The statement may or may not have run: reconnect and look before repeating it.".into();
            self.say_goodbye(&report).await;
        } else {
            let flush = std::future::poll_fn(|cx| self.to_client.poll(&mut self.client, cx));
            // Its own last words; a client that does not take them in time misses them.
            let _ = tokio::time::timeout(front::LINGER, flush).await;
            let _ = tokio::time::timeout(front::LINGER, self.client.shutdown()).await;
        }
        self.link = None;
        "upstream_lost"
    }

    pub(super) async fn fault(&mut self, fault: Fault) -> &'static str {
        let (report, reason) = match fault {
            Fault::Client(error) => (refuse::plain(Severity::Fatal, "08P01", error.what), "protocol"),
            Fault::Server(error) => {
                tracing::error!(org = %self.session.slot().org(), %error, "the upstream does not follow the protocol");
                (refuse::fatal(&Refusal::UpstreamDown), "upstream_protocol")
            }
            Fault::Unasked => {
                tracing::error!(org = %self.session.slot().org(), "the upstream answered what nobody asked");
                (refuse::fatal(&Refusal::UpstreamDown), "upstream_protocol")
            }
        };
        self.say_goodbye(&report).await;
        reason
    }

    /// Leaves no trace: gives a clean connection back, cancels what still runs, closes everything else.
    pub(super) fn leave(&mut self) {
        let Some(mut lease) = self.link.take() else { return };
        let ledger = self.conversation.ledger();
        if self.conversation.may_release() && self.cancelling.is_none() && self.to_server.is_empty() {
            // A session-mode client may have left anything behind.
            lease.remote.soiled |= self.mode == PoolMode::Session;
            lease.release();
        } else if ledger.is_settled() || lease.key.is_empty() {
            drop(lease);
        } else {
            let (upstream, home) = (Arc::clone(self.upstream()), Arc::clone(&self.home));
            tokio::spawn(async move { link::abandon(&upstream, lease, &home).await });
        }
    }
}
