//! Following changes: a change stream over the three collections, resumed where it broke off. Where the server has
//! none, what was handed out is read again and again.
//!
//! Without a gap: the stream is open before anything is read, and where it can't be resumed everything that was handed
//! out is read again after the new one is open. An event says no more than that a document may have changed; the
//! document is then read, so that a repeated or late event does no harm.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use bson::{RawDocument, RawDocumentBuf, doc};
use mongodb::{
    change_stream::{ChangeStream, event::ResumeToken},
    error::{Error, ErrorKind},
};

use super::{Inner, KEYS, ORGS, State, TIERS, code, document, tiers, words};
use crate::{
    catalog::source::{Change, Teller},
    quota::Table,
};

/// How long the server holds an empty answer back; so often we hear from a quiet one.
const AWAIT: Duration = Duration::from_secs(1);

/// A server that says nothing for so long is not there, whatever its socket says.
const SILENCE_MAX: Duration = Duration::from_secs(4);

/// Pause before the next attempt: doubled each time, half of it by chance, so that many processes don't come at once.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How often documents are read again where there are no change streams.
const POLL: Duration = Duration::from_secs(1);

/// How often change streams are tried again there: somebody may have made a replica set of it, or given the right.
const TRY_STREAM: Duration = Duration::from_secs(60);

/// Errors after which a resume token is of no use: bad token, history lost, fatal, token not found.
const TOKEN_LOST: [i32; 6] = [9, 260, 280, 286, 40576, 40647];

/// The label of the same.
const NOT_RESUMABLE: &str = "NonResumableChangeStreamError";

/// Errors of a server without change streams, or of a user without the right to them: not authorized, no such
/// command, not supported, no such stage, only on replica sets, not on this engine.
const NO_STREAMS: [i32; 6] = [13, 59, 115, 40324, 40573, 40415];

/// How following came to an end.
enum Ended {
    /// The server went away; the token still holds.
    Broken(String),
    /// The token does not hold any more.
    TokenLost(String),
    /// There are no change streams here.
    NoStreams(String),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        let words = words(&error);
        match code(&error) {
            Some(code) if NO_STREAMS.contains(&code) => Self::NoStreams(words),
            Some(code) if TOKEN_LOST.contains(&code) => Self::TokenLost(words),
            _ if error.contains_label(NOT_RESUMABLE) => Self::TokenLost(words),
            _ if matches!(error.kind.as_ref(), ErrorKind::MissingResumeToken) => Self::TokenLost(words),
            _ => Self::Broken(words),
        }
    }
}

/// Follows until dropped.
pub(super) async fn run(inner: Arc<Inner>, table: Arc<Table>, teller: Teller) {
    let mut token = None;
    let mut pause = Pause::new();
    let mut told_polling = false;
    loop {
        let was_up = Instant::now();
        match stream(&inner, &table, &teller, &mut token).await {
            Ended::Broken(what) => away(&inner, &what),
            Ended::TokenLost(what) => {
                token = None;
                metrics::counter!("dynabase_catalog_rereads_total").increment(1);
                tracing::warn!(
                    what,
                    "the catalog's changes can't be followed from where they were: everything in use is read again"
                );
            }
            Ended::NoStreams(what) => {
                token = None;
                if !told_polling {
                    tracing::warn!(
                        what,
                        "MongoDB gives no change streams here: the catalog is read every second instead"
                    );
                    told_polling = true;
                }
                if let Err(what) = poll(&inner, &table, &teller).await {
                    away(&inner, &what);
                }
            }
        }
        if was_up.elapsed() > PAUSE_MAX {
            pause = Pause::new();
        }
        tokio::time::sleep(pause.next()).await;
    }
}

/// Says once that MongoDB is away.
fn away(inner: &Inner, what: &str) {
    if inner.set_state(State::Away) {
        tracing::warn!(what, "MongoDB is away: those who are known are served, others are told to come again");
    }
}

fn up(inner: &Inner, how: &str) {
    inner.health.set_good();
    if inner.set_state(State::Up) {
        tracing::info!(how, "the catalog on MongoDB is followed");
    }
}

/// Follows a change stream to its end. `token` is kept up to date.
async fn stream(inner: &Inner, table: &Table, teller: &Teller, token: &mut Option<ResumeToken>) -> Ended {
    let mut stream = match open(inner, token.clone()).await {
        Ok(stream) => stream,
        Err(ended) => return ended,
    };
    if token.is_none() {
        // After the stream is open, so that nothing falls between.
        if let Err(error) = apply_tiers(inner, table).await {
            return Ended::Broken(words(&error));
        }
        *token = stream.resume_token();
        up(inner, "from now on");
        teller.tell_lost();
    } else {
        up(inner, "from where it broke off");
        teller.look_again();
    }
    loop {
        let event = match tokio::time::timeout(SILENCE_MAX, stream.next_if_any()).await {
            Ok(Ok(event)) => event,
            Ok(Err(error)) => return error.into(),
            Err(_) => return Ended::Broken("MongoDB says nothing".into()),
        };
        inner.health.set_good();
        let mut tiers_changed = false;
        if let Some(event) = &event {
            match about(event) {
                About::Document(change) => teller.tell(change),
                About::Tiers => tiers_changed = true,
                About::Everything => teller.tell_lost(),
                About::Nothing => {}
            }
        }
        // Kept only once the event is told: after a break it comes again, never not at all.
        *token = stream.resume_token();
        if tiers_changed && let Err(error) = apply_tiers(inner, table).await {
            // They are read again with the next stream.
            return Ended::TokenLost(words(&error));
        }
        if event.is_none() && !stream.is_alive() {
            return Ended::TokenLost("the server ended the stream".into());
        }
    }
}

async fn open(inner: &Inner, token: Option<ResumeToken>) -> Result<ChangeStream<RawDocumentBuf>, Ended> {
    let of_ours = doc! {"$match": {"$or": [
        {"ns.coll": {"$in": [ORGS, TIERS, KEYS]}},
        {"operationType": {"$in": ["dropDatabase", "invalidate"]}},
    ]}};
    // Documents are read by their names, so the events need not carry them.
    let names = doc! {"$project": {"operationType": 1, "ns": 1, "documentKey": 1}};
    let mut watch = inner.database.watch().pipeline([of_ours, names]).max_await_time(AWAIT);
    if let Some(token) = token {
        watch = watch.resume_after(token);
    }
    match tokio::time::timeout(SILENCE_MAX, watch).await {
        Ok(opened) => Ok(opened?.with_type()),
        Err(_) => Err(Ended::Broken("MongoDB does not answer".into())),
    }
}

async fn apply_tiers(inner: &Inner, table: &Table) -> mongodb::error::Result<()> {
    if let Some(changed) = tiers::read(inner).await? {
        table.set_tiers(changed);
        tracing::info!("limits changed by the collection tiers");
    }
    Ok(())
}

/// What an event is about.
enum About {
    Document(Change),
    Tiers,
    Everything,
    Nothing,
}

fn about(event: &RawDocument) -> About {
    let collection = event.get_document("ns").and_then(|ns| ns.get_str("coll")).unwrap_or_default();
    let key = event.get_document("documentKey");
    match (collection, key) {
        (TIERS, _) => About::Tiers,
        // What has another _id is no document of ours: nobody can have been given it.
        (ORGS, Ok(key)) => document::org_of(key).map_or(About::Nothing, |org| About::Document(Change::Org(org))),
        (KEYS, Ok(key)) => document::key_of(key).map_or(About::Nothing, |hash| About::Document(Change::Key(hash))),
        // A collection dropped or renamed, and with them whatever is no change of one document.
        _ => match event.get_str("operationType") {
            Ok("drop" | "rename" | "dropDatabase" | "invalidate") => About::Everything,
            _ => About::Nothing,
        },
    }
}

/// Has everything that was handed out read again and again, until it is time to try a stream.
async fn poll(inner: &Inner, table: &Table, teller: &Teller) -> Result<(), String> {
    let until = Instant::now() + TRY_STREAM;
    while Instant::now() < until {
        match tokio::time::timeout(SILENCE_MAX, apply_tiers(inner, table)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(words(&error)),
            Err(_) => return Err("MongoDB does not answer".into()),
        }
        up(inner, "by reading it every second");
        teller.tell_lost();
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Pauses that grow.
struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Self(PAUSE_MIN)
    }

    fn next(&mut self) -> Duration {
        let full = self.0;
        self.0 = (full * 2).min(PAUSE_MAX);
        // Seeded anew by the system for each.
        let chance = RandomState::new().build_hasher().finish() % 1000;
        full / 2 + (full / 2) * u32::try_from(chance).unwrap_or(0) / 1000
    }
}

#[cfg(test)]
mod tests {
    use bson::rawdoc;

    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let mut pause = Pause::new();
        let pauses: Vec<Duration> = (0..12).map(|_| pause.next()).collect();
        assert!(pauses[0] >= PAUSE_MIN / 2 && pauses[0] <= PAUSE_MIN);
        assert!(pauses.iter().all(|pause| *pause <= PAUSE_MAX));
        assert!(pauses[11] >= PAUSE_MAX / 2);
    }

    #[test]
    fn an_event_is_about_one_document_or_about_all() {
        let event = |kind: &str, collection: &str, id: &str| {
            rawdoc! {"_id": {"_data": "1"}, "operationType": kind, "ns": {"db": "dynabase", "coll": collection},
            "documentKey": {"_id": id}}
        };
        let key = "ab".repeat(32);
        assert!(
            matches!(about(&event("delete", "orgs", "acme")), About::Document(Change::Org(org)) if org.as_str() == "acme")
        );
        assert!(matches!(about(&event("insert", "service_keys", &key)), About::Document(Change::Key(_))));
        assert!(matches!(about(&event("update", "tiers", "FREE")), About::Tiers));
        assert!(matches!(about(&event("update", "orgs", "ACME corp")), About::Nothing));
        assert!(matches!(about(&event("update", "usage", "acme")), About::Nothing));
        for kind in ["drop", "rename"] {
            let gone = rawdoc! {"operationType": kind, "ns": {"db": "dynabase", "coll": "orgs"}};
            assert!(matches!(about(&gone), About::Everything), "{kind}");
        }
        assert!(matches!(about(&rawdoc! {"operationType": "invalidate"}), About::Everything));
    }
}
