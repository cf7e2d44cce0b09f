//! Refusals in MongoDB's language. Drivers act on codes and labels, so each is the one that makes them do the right
//! thing: 18 on a handshake makes a driver forget its token and clear its pool (never for limits), 391 makes it log in
//! again on the same connection and repeat, `RetryableError` with `SystemOverloadedError` makes it back off and
//! repeat (only for what was not sent on), `RetryableWriteError` repeat a write once, 91 reconnect. The codes that tell
//! a driver that this server is no longer a primary are never ours.

use std::time::Duration;

use super::{
    mask::Mask,
    rewrite::{Failed, Fault},
};
use crate::{
    refusal::{Limit, Over, Refusal},
    wire::{Error, mongo::bson},
};

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The client may go on.
    Stay,
    /// It ends.
    Close,
}

/// Whether the command belongs to a transaction, and how far it can be repeated: decides on labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// A read, or a write without a number: the driver decides on the code alone.
    Plain,
    /// A write that the server recognises when it comes twice.
    Retryable,
    /// Inside a transaction.
    Transaction,
    /// The end of a transaction: never "start over", its outcome is unknown.
    Commit,
}

/// An error reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The server's number.
    pub code: i32,
    /// Its name.
    pub name: &'static str,
    /// What a person reads.
    pub message: String,
    /// What a driver reads.
    pub labels: &'static [&'static str],
    /// When to try again, as drivers understand it.
    pub backoff: Option<Duration>,
    /// What becomes of the connection.
    pub after: After,
}

/// When to try again with a large message: longer than it takes to pass most of them on.
const NO_ROOM_BACKOFF: Duration = Duration::from_millis(500);

const OVERLOADED: &[&str] = &["SystemOverloadedError", "RetryableError"];
const RETRYABLE_WRITE: &[&str] = &["RetryableWriteError"];
const TRANSIENT: &[&str] = &["TransientTransactionError"];

impl Answer {
    /// Without labels, the client stays.
    pub fn new(code: i32, name: &'static str, message: impl Into<String>) -> Self {
        Self { code, name, message: message.into(), labels: &[], backoff: None, after: After::Stay }
    }

    fn closing(mut self) -> Self {
        self.after = After::Close;
        self
    }

    /// Appends the document.
    pub fn put(&self, out: &mut Vec<u8>) {
        let body = bson::open(out);
        bson::put_f64(out, "ok", 0.0);
        bson::put_str(out, "errmsg", &self.message);
        bson::put_i32(out, "code", self.code);
        bson::put_str(out, "codeName", self.name);
        if !self.labels.is_empty() {
            let labels = bson::open_array(out, "errorLabels");
            for (at, label) in self.labels.iter().enumerate() {
                bson::put_str(out, bson::Index::new(at).as_str(), label);
            }
            bson::close(out, labels);
        }
        if let Some(backoff) = self.backoff {
            let backoff = i32::try_from(backoff.as_millis()).unwrap_or(i32::MAX).max(1);
            bson::put_i32(out, "baseBackoffMS", backoff);
        }
        bson::close(out, body);
    }
}

/// The answer to a refusal of ours.
pub fn render(refusal: &Refusal, repeat: Repeat) -> Answer {
    match refusal {
        // One text for all: it does not say what is wrong with a credential.
        Refusal::BadToken(_) | Refusal::UnknownOrg => {
            Answer::new(18, "AuthenticationFailed", "Authentication failed.").closing()
        }
        Refusal::Suspended => Answer::new(13, "Unauthorized", "this organization is suspended").closing(),
        Refusal::Revoked => Answer::new(
            391,
            "ReauthenticationRequired",
            "the token has expired or was revoked: authenticate again with a new one",
        ),
        Refusal::PlaintextToken => Answer::new(
            13,
            "Unauthorized",
            "a token may not travel over plaintext: connect with TLS (add tls=true to the connection string)",
        )
        .closing(),
        Refusal::Forbidden { what } => Answer::new(13, "Unauthorized", format!("not authorized: {what}")),
        Refusal::Malformed { what } => Answer::new(22, "InvalidBSON", *what),
        Refusal::TooLarge { max_bytes } => {
            Answer::new(10334, "BSONObjectTooLarge", format!("larger than the {max_bytes} bytes that are allowed"))
        }
        Refusal::OverLimit(over) => over_limit(over),
        Refusal::Full => overloaded("this proxy accepts no more connections".into(), None).closing(),
        Refusal::UpstreamDown => {
            let mut answer = Answer::new(6, "HostUnreachable", "the database can't be reached; try again");
            answer.labels = labels(repeat);
            answer
        }
        Refusal::UpstreamSlow => Answer::new(50, "MaxTimeMSExpired", "operation exceeded time limit"),
        Refusal::CatalogDown => overloaded("the tenant catalog can't be reached; try again".into(), None).closing(),
        Refusal::Draining => {
            let mut answer = Answer::new(91, "ShutdownInProgress", "this proxy is shutting down; reconnect").closing();
            answer.labels = labels(repeat);
            answer
        }
        Refusal::Internal => Answer::new(1, "InternalError", "internal error").closing(),
    }
}

fn labels(repeat: Repeat) -> &'static [&'static str] {
    match repeat {
        Repeat::Plain => &[],
        Repeat::Retryable | Repeat::Commit => RETRYABLE_WRITE,
        Repeat::Transaction => TRANSIENT,
    }
}

fn overloaded(message: String, backoff: Option<Duration>) -> Answer {
    let mut answer = Answer::new(462, "IngressRequestRateLimitExceeded", message);
    answer.labels = OVERLOADED;
    answer.backoff = backoff;
    answer
}

/// The answer to a large message for which there was no room.
pub fn no_room() -> Answer {
    let text =
        "too many large messages at a time: try again, or send smaller batches (256 KiB and less are never refused)";
    overloaded(text.into(), Some(NO_ROOM_BACKOFF))
}

fn over_limit(over: &Over) -> Answer {
    let Over { tier, max, in_use, retry_after, .. } = over;
    match over.limit {
        Limit::ClientSockets => overloaded(
            format!(
                "too many client sockets: {in_use} of {max} of tier {tier}; set maxPoolSize lower, or raise the tier"
            ),
            None,
        )
        .closing(),
        Limit::Connections => overloaded(
            format!(
                "too many operations at a time: {in_use} of {max} connections of tier {tier} are in use and none came \
                 free in time; set maxPoolSize to {max}, end idle transactions, or raise the tier"
            ),
            *retry_after,
        ),
        Limit::Rate => {
            let wait = retry_after.unwrap_or_default().as_millis().max(1);
            let text = format!("too many requests: tier {tier} allows {max} per second; retry in {wait} ms");
            overloaded(text, *retry_after)
        }
        Limit::StatementTimeout => Answer::new(
            50,
            "MaxTimeMSExpired",
            format!("operation exceeded time limit: tier {tier} allows {max} ms; narrow it, or raise the tier"),
        ),
        // It will be the same at once: no label that makes a driver repeat it.
        Limit::Cursors => Answer::new(
            462,
            "IngressRequestRateLimitExceeded",
            format!("too many open cursors: {in_use} of {max} of tier {tier}; read to the end or close some"),
        ),
        Limit::Collections => Answer::new(
            242,
            "CannotCreateCollection",
            format!(
                "cannot create a new collection: {in_use} of {max} of tier {tier} are there; drop some (in shared \
                 databases that gives no room: write to one of before), or raise the tier"
            ),
        ),
        Limit::Indexes => Answer::new(
            67,
            "CannotCreateIndex",
            format!(
                "too many indexes: {in_use} of {max} of tier {tier} on one collection; drop some, or raise the tier"
            ),
        ),
        // Limits of other databases; nothing here meets them.
        Limit::Storage
        | Limit::IdleInTransaction
        | Limit::Keys
        | Limit::Memory
        | Limit::Subscriptions
        | Limit::InFlight
        | Limit::Branches => overloaded(format!("too much: {} of tier {tier}", over.limit.label()), None),
    }
}

/// The document of a request that the rewriter refused.
pub fn put_fault(fault: &Fault, out: &mut Vec<u8>) {
    if fault.failed.is_empty() {
        return Answer::new(fault.code, fault.name, fault.message.as_str()).put(out);
    }
    let body = bson::open(out);
    if fault.bulk {
        put_failed_bulk(out, &fault.failed);
    } else {
        bson::put_i32(out, "n", 0);
        put_failed(out, &fault.failed);
    }
    bson::put_f64(out, "ok", 1.0);
    bson::close(out, body);
}

/// `writeErrors` of ours alone.
fn put_failed(out: &mut Vec<u8>, failed: &[Failed]) {
    let list = bson::open_array(out, "writeErrors");
    for (at, one) in failed.iter().enumerate() {
        put_write_error(out, at, one);
    }
    bson::close(out, list);
}

/// An entry of a bulk write's cursor.
pub fn put_bulk_error(out: &mut Vec<u8>, at: usize, failed: &Failed) {
    let entry = bson::open_document(out, bson::Index::new(at).as_str());
    bson::put_f64(out, "ok", 0.0);
    bson::put_i32(out, "idx", i32::try_from(failed.index).unwrap_or(i32::MAX));
    bson::put_i32(out, "code", failed.code);
    bson::put_str(out, "errmsg", &failed.message);
    bson::put_i32(out, "n", 0);
    bson::close(out, entry);
}

/// The results of a `bulkWrite` of which nothing was sent on.
fn put_failed_bulk(out: &mut Vec<u8>, failed: &[Failed]) {
    let cursor = bson::open_document(out, "cursor");
    bson::put_i64(out, "id", 0);
    let batch = bson::open_array(out, "firstBatch");
    for (at, one) in failed.iter().enumerate() {
        put_bulk_error(out, at, one);
    }
    bson::close(out, batch);
    bson::put_str(out, "ns", "admin.$cmd.bulkWrite");
    bson::close(out, cursor);
    bson::put_i32(out, "nErrors", i32::try_from(failed.len()).unwrap_or(i32::MAX));
    for count in ["nInserted", "nMatched", "nModified", "nUpserted", "nDeleted"] {
        bson::put_i32(out, count, 0);
    }
}

/// Cursors that are not there, by the client's numbers, as the elements of a list from `from` on.
///
/// # Errors
/// An id can't be hidden.
pub fn put_not_there(mask: &Mask, ids: &[i64], from: usize, out: &mut Vec<u8>) -> Result<(), Error> {
    for (at, &id) in ids.iter().enumerate() {
        let id = mask.cursor(id).map_err(|_| Error { at: "reply", what: "an id that can't be hidden" })?;
        bson::put_i64(out, bson::Index::new(from + at).as_str(), id);
    }
    Ok(())
}

/// One entry of `writeErrors`.
pub fn put_write_error(out: &mut Vec<u8>, at: usize, failed: &Failed) {
    let entry = bson::open_document(out, bson::Index::new(at).as_str());
    bson::put_i32(out, "index", i32::try_from(failed.index).unwrap_or(i32::MAX));
    bson::put_i32(out, "code", failed.code);
    bson::put_str(out, "errmsg", &failed.message);
    bson::close(out, entry);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{refusal::TokenFault, tenant::Tier};

    fn over(limit: Limit) -> Refusal {
        Refusal::OverLimit(Over { limit, tier: Tier::Free, max: 2, in_use: 2, retry_after: None })
    }

    #[test]
    fn no_limit_makes_a_driver_forget_its_token_or_its_pool() {
        for limit in [
            Limit::ClientSockets,
            Limit::Connections,
            Limit::Rate,
            Limit::Cursors,
            Limit::StatementTimeout,
            Limit::Collections,
            Limit::Indexes,
        ] {
            let answer = render(&over(limit), Repeat::Plain);
            assert!(matches!(answer.code, 462 | 50 | 242 | 67), "{answer:?}");
            assert!(answer.message.contains('2') && answer.message.contains("FREE"), "{answer:?}");
        }
        assert_eq!(render(&over(Limit::Rate), Repeat::Plain).labels, OVERLOADED);
        // Repeated at once it would be the same.
        for limit in [Limit::Cursors, Limit::Collections, Limit::Indexes] {
            assert_eq!(render(&over(limit), Repeat::Plain).labels, [""; 0]);
        }
    }

    #[test]
    fn no_refusal_says_that_this_server_is_not_the_primary() {
        let all = [
            Refusal::BadToken(TokenFault::Expired),
            Refusal::UnknownOrg,
            Refusal::Suspended,
            Refusal::Revoked,
            Refusal::PlaintextToken,
            Refusal::Forbidden { what: "x" },
            Refusal::Malformed { what: "x" },
            Refusal::TooLarge { max_bytes: 1 },
            Refusal::Full,
            Refusal::UpstreamDown,
            Refusal::UpstreamSlow,
            Refusal::CatalogDown,
            Refusal::Draining,
            Refusal::Internal,
        ];
        for refusal in all {
            let code = render(&refusal, Repeat::Plain).code;
            assert!(![10107, 13435, 13436, 10058, 11600, 11602, 189].contains(&code), "{refusal:?}");
        }
    }

    #[test]
    fn a_bulk_write_of_which_nothing_is_left_is_answered_in_its_own_form() {
        let failed = vec![Failed { index: 0, code: 66, message: "org_id".into() }];
        let mut out = Vec::new();
        let fault = Fault { code: 66, name: "ImmutableField", message: String::new(), failed, bulk: true };
        put_fault(&fault, &mut out);
        let told = ::bson::Document::from_reader(out.as_slice()).expect("a document");
        let batch = told.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch")).expect("there");
        assert_eq!(batch[0].as_document().and_then(|entry| entry.get_i32("idx").ok()), Some(0));
        assert_eq!((told.get_i32("nErrors").ok(), told.get_i32("nInserted").ok()), (Some(1), Some(0)));
        assert!(told.get_f64("ok").is_ok_and(|ok| ok == 1.0) && !told.contains_key("writeErrors"), "{told}");
    }

    #[test]
    fn a_commit_of_unknown_outcome_is_never_started_over() {
        assert_eq!(render(&Refusal::UpstreamDown, Repeat::Commit).labels, RETRYABLE_WRITE);
        assert_eq!(render(&Refusal::UpstreamDown, Repeat::Transaction).labels, TRANSIENT);
        assert_eq!(render(&Refusal::UpstreamDown, Repeat::Plain).labels, [""; 0]);
    }

    #[test]
    fn what_is_wrong_with_a_credential_is_not_told() {
        let one = render(&Refusal::BadToken(TokenFault::Expired), Repeat::Plain);
        assert_eq!(one, render(&Refusal::UnknownOrg, Repeat::Plain));
        assert_eq!(one.after, After::Close);
    }
}
