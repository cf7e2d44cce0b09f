//! A rewritten request on its way: its turn, its connection, its time, its reply.
//!
//! ```text
//! ids hidden ─► turn (a transaction brings its own) ─► connection ─► sent ─► reply mapped ─► client
//!                  │ over queue_timeout: 462             │ over the tier's time: 50, connection closed
//!                  └ client gone ──────────────────────── └ client gone: connection closed, transaction aborted
//! ```
//!
//! A connection on which a reply is outstanding is closed, at which the server ends the operation.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::sync::OwnedSemaphorePermit;

use super::{
    Server,
    client::Client,
    commands::{Home, ReplyRule},
    cursors::{self, Named},
    large::{LARGE_BYTES, Room},
    mask::Mask,
    prepare::{self, Ready},
    refuse::{self, After, Answer, Repeat},
    reply::{Mapping, Seen},
    rewrite::Forward,
    send::Asked,
    spare,
    tenancy::{self, Open, RETURNS_MAX, SessionId, Tenancy, Way},
    turn::Turn,
};
use crate::{
    quota::clock,
    refusal::{Limit, Over, Refusal},
    session::Session,
    tenant::Isolation,
    upstream::mongo::{Error, Lease, account, connection},
    wire::mongo::bson::{Document, kind},
};

/// How much later than the server our own timer ends an operation.
const GRACE: Duration = Duration::from_millis(500);

/// `CursorNotFound`.
const CURSOR_NOT_FOUND: i64 = 43;

/// Flags and the kind of the first section, behind the header.
const FLAGS_AT: usize = 16;

/// What a request holds while it runs.
#[derive(Default)]
struct Held {
    /// Its own turn; `None` where a transaction has it or none is needed.
    _turn: Option<Turn>,
    /// Its place among what gives things back.
    _returning: Option<OwnedSemaphorePermit>,
    /// Its transaction.
    transaction: Option<(SessionId, Open)>,
    /// The cursors that it closes.
    named: Named,
}

/// How it ended.
enum Outcome {
    Replied(Lease, Option<Room>),
    Failed(Error),
    /// Not sent on.
    Refused(Answer),
    /// Not sent on, and the client is told that it was done: nothing that it can see depends on it.
    LeftOut,
    Late,
    Gone,
}

/// Sends a request on and answers it.
pub async fn run(
    client: &mut Client,
    asked: Asked,
    tenancy: &Arc<Tenancy>,
    way: &Arc<Way>,
    forward: &Forward<'_>,
    sent: &mut Vec<u8>,
) -> After {
    let repeat = match (forward.transaction, forward.row.name) {
        (_, "commitTransaction") => Repeat::Commit,
        (Some(_), _) => Repeat::Transaction,
        (None, _) if forward.retryable => Repeat::Retryable,
        _ => Repeat::Plain,
    };
    // Every request is sent with an answer wanted: one reply, and its turn ends with it.
    sent[FLAGS_AT..FLAGS_AT + 4].fill(0);
    let Some(session_id) = hide(&tenancy.mask, forward, sent) else {
        tracing::error!(conn = client.id, "an id can't be hidden");
        return client.answer(asked, &refuse::render(&Refusal::Internal, Repeat::Plain)).await;
    };
    let named = match forward.row.name {
        "killCursors" => Named::read(tenancy, forward, sent),
        _ => Named::default(),
    };
    if !named.others.is_empty() {
        if named.known.is_empty() {
            let mut out = Vec::new();
            return match named.put_unknown(&tenancy.mask, &mut out) {
                Ok(()) => client.send_document(asked, &out).await,
                Err(_) => client.answer(asked, &refuse::render(&Refusal::Internal, Repeat::Plain)).await,
            };
        }
        if named.leave_known(sent).is_err() {
            return client.answer(asked, &refuse::render(&Refusal::Internal, Repeat::Plain)).await;
        }
    }
    let mut held = match hold(client, tenancy, way, forward, session_id).await {
        Ok(Some(held)) => Held { named, ..held },
        Ok(None) => return After::Close,
        Err(over) => {
            client.count_refused();
            return client.answer(asked, &refuse::render(&Refusal::OverLimit(over), repeat)).await;
        }
    };
    let Some(session) = &client.session else { return After::Close };
    let policy = Arc::clone(&session.slot().policy());
    let limits = &policy.limits.mongodb;
    session.meter().transactions.fetch_add(1, Ordering::Relaxed);
    let server = Arc::clone(&client.server);
    let mut reply = spare::take(0);
    let outcome = {
        let work = exchange(&server, tenancy, way, forward, sent, &mut reply);
        tokio::select! {
            biased;
            done = work => done.unwrap_or_else(Outcome::Failed),
            () = client.inbox.gone() => Outcome::Gone,
            () = tokio::time::sleep(limits.timeout + GRACE) => Outcome::Late,
        }
    };
    let answer = match outcome {
        Outcome::Replied(lease, _room) => {
            lease.release();
            return replied(client, asked, tenancy, way, forward, held, sent, reply).await;
        }
        Outcome::Gone => {
            abort_later(client, held.transaction.take());
            return After::Close;
        }
        Outcome::Late => {
            let max = u64::try_from(limits.timeout.as_millis()).unwrap_or(u64::MAX);
            let tier = policy.tenant.tier;
            let over = Over { limit: Limit::StatementTimeout, tier, max, in_use: max, retry_after: None };
            refuse::render(&Refusal::OverLimit(over), repeat)
        }
        Outcome::Refused(answer) => answer,
        Outcome::LeftOut => {
            let mut out = Vec::new();
            super::local::put_ok(&mut out);
            return client.send_document(asked, &out).await;
        }
        Outcome::Failed(Error::Refused { code, message }) if code == account::TOO_MANY_DATABASES => {
            Answer::new(code, "Unauthorized", message)
        }
        Outcome::Failed(error) => {
            tracing::warn!(conn = client.id, %error, command = forward.row.name, "the upstream failed");
            refuse::render(&Refusal::UpstreamDown, repeat)
        }
    };
    abort_later(client, held.transaction.take());
    drop(held);
    if let Some(session) = &client.session {
        session.meter().errors.fetch_add(1, Ordering::Relaxed);
    }
    client.answer(asked, &answer).await
}

/// Permutes the ids in a request; gives the session's as the server will know it, `Some(None)` without one.
fn hide(mask: &Mask, forward: &Forward<'_>, sent: &mut [u8]) -> Option<Option<SessionId>> {
    let session_at = |sent: &mut [u8], at: usize| {
        let place: &mut SessionId = sent.get_mut(at..at + 16)?.try_into().ok()?;
        mask.session(place).ok()?;
        Some(*place)
    };
    let session = match forward.lsid {
        Some(at) => Some(session_at(sent, at)?),
        None => None,
    };
    for &at in &forward.ids {
        if matches!(forward.row.name, "endSessions" | "killSessions" | "refreshSessions") {
            session_at(sent, at)?;
        } else {
            let place: &mut [u8; 8] = sent.get_mut(at..at + 8)?.try_into().ok()?;
            *place = mask.cursor_back(i64::from_le_bytes(*place)).ok()?.to_le_bytes();
        }
    }
    Some(session)
}

/// Takes what the request needs to run; `None` when the client has gone meanwhile.
async fn hold(
    client: &mut Client,
    tenancy: &Arc<Tenancy>,
    way: &Arc<Way>,
    forward: &Forward<'_>,
    session_id: Option<SessionId>,
) -> Result<Option<Held>, Over> {
    let starts = match (forward.transaction, session_id) {
        (Some(transaction), Some(id)) if transaction.starts => {
            tenancy.replace_transaction(&id);
            Some((id, transaction.number))
        }
        (Some(transaction), Some(id)) => {
            if let Some(open) = tenancy.take_transaction(&id, transaction.number) {
                return Ok(Some(Held { transaction: Some((id, open)), ..Held::default() }));
            }
            None
        }
        _ => None,
    };
    let Client { session: Some(session), inbox, .. } = client else { return Ok(None) };
    // What gives things back does not wait for a turn: it has places of its own.
    if matches!(
        forward.row.name,
        "endSessions" | "killSessions" | "refreshSessions" | "startSession" | "killCursors" | "abortTransaction"
    ) {
        let policy = Arc::clone(&session.slot().policy());
        let place = tokio::select! {
            biased;
            place = Arc::clone(&tenancy.returns).acquire_owned() => place.ok(),
            () = inbox.gone() => return Ok(None),
            () = tokio::time::sleep(policy.limits.mongodb.queue_timeout) => None,
        };
        let max = u64::try_from(RETURNS_MAX).unwrap_or(u64::MAX);
        return match place {
            Some(place) => Ok(Some(Held { _returning: Some(place), ..Held::default() })),
            None => {
                Err(Over { limit: Limit::Connections, tier: policy.tenant.tier, max, in_use: max, retry_after: None })
            }
        };
    }
    let turn = tokio::select! {
        biased;
        turn = tenancy.turns.take(session.meter()) => turn?,
        () = inbox.gone() => return Ok(None),
    };
    Ok(Some(match starts {
        Some((id, number)) => {
            let open = Open {
                number,
                _turn: turn,
                _inside: tenancy.threshold.pass(),
                client: client.id,
                way: Arc::clone(way),
                used_ms: clock::now_ms(),
            };
            Held { transaction: Some((id, open)), ..Held::default() }
        }
        None => Held { _turn: Some(turn), ..Held::default() },
    }))
}

/// Sends the request and reads the reply.
async fn exchange(
    server: &Server,
    tenancy: &Tenancy,
    way: &Way,
    forward: &Forward<'_>,
    sent: &mut [u8],
    reply: &mut Vec<u8>,
) -> Result<Outcome, Error> {
    let upstream = &server.upstream;
    match prepare::before(server, tenancy, way, forward, sent).await? {
        Ready::Go => {}
        Ready::LeftOut => return Ok(Outcome::LeftOut),
        Ready::Refused(answer) => return Ok(Outcome::Refused(answer)),
    }
    let database = (forward.row.home == Home::Data || forward.database != "admin").then_some(forward.database);
    let mut lease = way.lease(upstream, database).await?;
    let length = lease.connection.ask(sent, reply).await?;
    let mut room = None;
    if length > LARGE_BYTES {
        // Twice: as it came, and as it goes.
        room = server.rooms.reply(&tenancy.rooms, 2 * length).await;
    }
    lease.connection.rest(length, reply).await?;
    Ok(Outcome::Replied(lease, room))
}

/// Maps a reply, keeps the books, answers.
#[allow(clippy::too_many_arguments, reason = "everything that one request was")]
async fn replied(
    client: &mut Client,
    asked: Asked,
    tenancy: &Arc<Tenancy>,
    way: &Arc<Way>,
    forward: &Forward<'_>,
    mut held: Held,
    sent: &[u8],
    reply: Vec<u8>,
) -> After {
    let Some(session) = &client.session else { return After::Close };
    let cursor = cursors::asked_for(forward, sent).filter(|_| forward.row.name == "getMore");
    let before = cursor.filter(|_| forward.reply == ReplyRule::BulkWrite).and_then(|id| tenancy.refused_of(id));
    let mapping = Mapping {
        rule: forward.reply,
        isolation: way.isolation,
        org: session.slot().org(),
        place: &way.place,
        mask: &tenancy.mask,
        failed: before.as_deref().unwrap_or(&forward.failed),
        ordered: forward.ordered,
        cursor,
        not_there: &held.named.others,
    };
    let mut out = spare::take(reply.len() + 64);
    Client::begin(asked, &mut out);
    let mapped = connection::body(&reply).and_then(|body| mapping.put(body, &mut out));
    let seen = match mapped {
        Ok(seen) => seen,
        Err(fault) => {
            tracing::error!(conn = client.id, %fault, command = forward.row.name, "a reply that can't be mapped");
            abort_later(client, held.transaction.take());
            return client.answer(asked, &refuse::render(&Refusal::Internal, Repeat::Plain)).await;
        }
    };
    if !seen.ok {
        session.meter().errors.fetch_add(1, Ordering::Relaxed);
    }
    if seen.topology {
        client.server.upstream.renew();
    }
    if way.isolation == Isolation::Database && forward.row.takes_away() {
        client.server.registry.known.forget_all(way.place.prefix());
    }
    if seen.ok {
        held.named.known.iter().for_each(|&id| tenancy.drop_cursor(id));
    }
    let over = books(client, session, tenancy, way, forward, &seen, sent);
    if let Some((id, open)) = held.transaction.take() {
        let ends = matches!(forward.row.name, "commitTransaction" | "abortTransaction");
        if !ends && !seen.transient {
            let open = Open { client: client.id, used_ms: clock::now_ms(), ..open };
            tenancy.keep_transaction(id, open);
        }
    }
    drop(held);
    // A slow client keeps one copy, not two.
    spare::give(reply);
    if !Client::waits(asked) {
        return After::Stay;
    }
    match over {
        Some(over) => client.answer(asked, &refuse::render(&Refusal::OverLimit(over), Repeat::Plain)).await,
        None => client.send(asked, out).await,
    }
}

/// The tenant's open cursors after a reply; the limit, when the reply opened one too many. That one is closed.
fn books(
    client: &Client,
    session: &Session,
    tenancy: &Arc<Tenancy>,
    way: &Arc<Way>,
    forward: &Forward<'_>,
    seen: &Seen,
    sent: &[u8],
) -> Option<Over> {
    match (forward.row.name, cursors::asked_for(forward, sent)) {
        ("getMore", Some(id)) if seen.code == Some(CURSOR_NOT_FOUND) => tenancy.drop_cursor(id),
        ("getMore", Some(id)) if matches!(seen.cursor, Some((0, _))) => tenancy.drop_cursor(id),
        _ => {}
    }
    let (id, namespace) = seen.cursor.as_ref().filter(|(id, _)| *id != 0)?;
    let policy = session.slot().policy();
    let max = usize::try_from(policy.limits.mongodb.cursors).unwrap_or(usize::MAX);
    // Not read on: what would come is others' as well, and all of the tenant's is there.
    let unread = forward.reply == ReplyRule::Indexes && way.isolation == Isolation::Filter;
    if !unread && tenancy.keep_cursor(*id, namespace, way, max, &forward.failed) {
        return None;
    }
    let (server, way, id, namespace) = (Arc::clone(&client.server), Arc::clone(way), *id, namespace.clone());
    client.server.later(async move { tenancy::kill_cursor(&server.upstream, &way, id, &namespace).await });
    if unread {
        return None;
    }
    Some(Over {
        limit: Limit::Cursors,
        tier: policy.tenant.tier,
        max: u64::try_from(max).unwrap_or(u64::MAX),
        in_use: u64::try_from(tenancy.cursors()).unwrap_or(u64::MAX),
        retry_after: None,
    })
}

/// Ends a transaction whose request has failed here: its client may never do it, and it holds locks.
fn abort_later(client: &Client, transaction: Option<(SessionId, Open)>) {
    let Some((id, open)) = transaction else { return };
    let server = Arc::clone(&client.server);
    client.server.later(async move { tenancy::abort(&server.upstream, &id, open).await });
}

/// A statement that was refused ends its transaction, as the server's own errors do.
pub fn abort_refused(client: &Client, tenancy: &Arc<Tenancy>, body: Document<'_>) {
    let found = || {
        let number = body.get("txnNumber").ok()??.whole()?;
        body.get("autocommit").ok()??.bool().filter(|auto| !auto)?;
        let lsid = body.get("lsid").ok()??.document()?;
        let id = lsid.get("id").ok()??;
        let mut id: SessionId = (id.kind == kind::BINARY).then(|| id.binary())??.1.try_into().ok()?;
        tenancy.mask.session(&mut id).ok()?;
        Some((id, tenancy.take_transaction(&id, number)?))
    };
    abort_later(client, found());
}
