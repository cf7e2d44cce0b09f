//! One client's conversation: one message, one answer, in order.
//!
//! ```text
//! message ─► sections ─► hello, sasl: login.rs
//!                     ─► not logged in: 13      expired: 391      over its rate: 462
//!                     ─► rewrite ─► Refuse: its code
//!                                ─► Local: local.rs
//!                                ─► Forward: forward.rs (turn, connection, time, reply)
//! ```
//!
//! A request that wants no answer (`moreToCome`) never gets one, not even a refusal.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::Sleep;

use super::{
    Server,
    commands::{self, Emulate, Found, Treat},
    inbox::{Arrived, Gone, Inbox},
    large::{self, RECEIVED_WITHIN, Room},
    login,
    refuse::{self, After, Answer, Repeat},
    rewrite::{self, Request, Scope, Verdict},
    send::{Asked, Form},
    spare,
    tenancy::Tenancy,
    threshold,
};
use crate::{
    net::{Peer, Stream, limit::Unauthenticated},
    quota::Stop,
    refusal::Refusal,
    session::{Session, Transport},
    tenant::{OverRate, Protocol},
    wire::mongo::{
        self, CHECKSUM_PRESENT, HEADER_BYTES, Header, MESSAGE_MAX_BYTES, Message, OP_COMPRESSED, OP_MSG, OP_QUERY,
        Query,
        bson::Document,
        compress::{self, Compressor},
    },
};

/// The longest message of who has not logged in: a token and a driver's description of itself.
const STRANGER_MESSAGE_MAX_BYTES: usize = 64 << 10;

/// How long a client that has not logged in may say nothing: drivers' monitors, which never log in, ask every 10 s.
const STRANGER_SILENCE_MAX: Duration = Duration::from_secs(90);

/// How long an idle client whose token has expired is kept, so that its driver can log in again on it.
const EXPIRED_KEPT: Duration = Duration::from_secs(60);

/// What a body usually grows by when it is rewritten.
const GROWTH_BYTES: usize = 256;

/// Longest wait of what gives things back and comes faster than the tier allows. It is never refused.
const GIVING_BACK_WAITS: Duration = Duration::from_secs(1);

/// Messages after which a client that has more at hand lets others go on.
const MESSAGES_AT_ONCE: u32 = 32;

/// One client.
pub struct Client {
    pub(super) server: Arc<Server>,
    pub(super) id: u64,
    pub(super) peer: Peer,
    pub(super) transport: Transport,
    pub(super) unauthenticated: Option<Unauthenticated>,
    pub(super) inbox: Inbox,
    pub(super) session: Option<Session>,
    pub(super) tenancy: Option<Arc<Tenancy>>,
    /// Compressors that the first hello agreed on.
    pub(super) compressors: Vec<Compressor>,
    /// A login was begun that wants a second step.
    pub(super) conversing: bool,
    /// The end of an idle client whose token has expired.
    pub(super) expired: Option<Pin<Box<Sleep>>>,
}

/// What ends the wait for a message.
enum Event {
    Message(Header, Vec<u8>, Option<Room>),
    /// A message that takes so many bytes has begun.
    Large(usize),
    Malformed,
    End,
}

impl Client {
    pub(super) fn new(
        server: Arc<Server>,
        id: u64,
        peer: Peer,
        transport: Transport,
        stream: Stream,
        unauthenticated: Option<Unauthenticated>,
    ) -> Self {
        Self {
            server,
            id,
            peer,
            transport,
            unauthenticated,
            inbox: Inbox::new(stream),
            session: None,
            tenancy: None,
            compressors: Vec::new(),
            conversing: false,
            expired: None,
        }
    }

    /// The connection's number as drivers want it.
    pub(super) fn number(&self) -> i32 {
        i32::try_from(self.id & 0x7fff_ffff).unwrap_or(1)
    }

    /// Serves it to its end.
    pub(super) async fn run(&mut self) {
        let drain = self.server.drain.clone();
        let mut started = std::pin::pin!(drain.started());
        let mut silence = std::pin::pin!(tokio::time::sleep(self.server.config.login_timeout));
        let mut received = std::pin::pin!(tokio::time::sleep(RECEIVED_WITHIN));
        let mut messages: u32 = 0;
        loop {
            if messages >= MESSAGES_AT_ONCE {
                messages = 0;
                tokio::task::yield_now().await;
            }
            if let Some(session) = &self.session {
                session.live().set_idle(true);
            }
            let (stranger, lent) = (self.session.is_none(), self.inbox.is_lent());
            let event = tokio::select! {
                biased;
                event = poll_fn(|cx| self.poll(cx)) => event,
                () = &mut started => Event::End,
                () = &mut silence, if stranger => Event::End,
                () = &mut received, if lent => Event::End,
            };
            match event {
                Event::End => break,
                // How long the next message is can't be known.
                Event::Malformed => {
                    let asked = Asked::message(0);
                    let answer = refuse::render(&Refusal::Malformed { what: "not a MongoDB message" }, Repeat::Plain);
                    let _ = self.answer(asked, &answer).await;
                    break;
                }
                Event::Large(bytes) => {
                    if large::make_room(self, bytes).await == After::Close {
                        break;
                    }
                    received.as_mut().reset(tokio::time::Instant::now() + RECEIVED_WITHIN);
                }
                Event::Message(header, bytes, _room) => {
                    messages += 1;
                    if let Some(session) = &self.session {
                        session.live().set_idle(false);
                    }
                    if self.message(header, bytes).await == After::Close {
                        break;
                    }
                    if self.session.is_none() {
                        silence.as_mut().reset(tokio::time::Instant::now() + STRANGER_SILENCE_MAX);
                    }
                }
            }
        }
        self.inbox.shutdown().await;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let max = if self.session.is_some() { MESSAGE_MAX_BYTES } else { STRANGER_MESSAGE_MAX_BYTES };
        match self.inbox.poll_message(cx, max) {
            Poll::Ready(Ok(Arrived::Message(header, bytes, room))) => {
                return Poll::Ready(Event::Message(header, bytes, room));
            }
            Poll::Ready(Ok(Arrived::Large(bytes))) => return Poll::Ready(Event::Large(bytes)),
            Poll::Ready(Err(Gone::Left)) => return Poll::Ready(Event::End),
            Poll::Ready(Err(Gone::Malformed(fault))) => {
                tracing::debug!(conn = self.id, peer = %self.peer, %fault, "not MongoDB's protocol");
                return Poll::Ready(Event::Malformed);
            }
            Poll::Pending => {}
        }
        let Some(session) = &self.session else { return Poll::Pending };
        session.live().register(cx);
        match session.live().stopped() {
            None => Poll::Pending,
            // Its driver may log in again here.
            Some(Stop::Expired | Stop::Revoked) => {
                let expired = self.expired.get_or_insert_with(|| Box::pin(tokio::time::sleep(EXPIRED_KEPT)));
                expired.as_mut().poll(cx).map(|()| Event::End)
            }
            Some(Stop::Suspended | Stop::Shed | Stop::Draining) => Poll::Ready(Event::End),
        }
    }

    /// Opens a message and answers it.
    async fn message(&mut self, header: Header, bytes: Vec<u8>) -> After {
        if let Some(session) = &self.session {
            session.meter().bytes_in.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        let mut asked = Asked::message(header.request_id);
        match header.opcode {
            OP_MSG => {
                let Some((head, payload)) = bytes.split_first_chunk() else { return After::Close };
                let after = self.command(asked, head, payload).await;
                spare::give(bytes);
                after
            }
            OP_COMPRESSED => {
                let max = if self.session.is_some() { MESSAGE_MAX_BYTES } else { STRANGER_MESSAGE_MAX_BYTES };
                let mut opened = Vec::new();
                match compress::open(&bytes[HEADER_BYTES..], max, &mut opened) {
                    Ok(inside)
                        if inside.opcode == OP_MSG
                            && (self.compressors.contains(&inside.compressor)
                                || inside.compressor == Compressor::Noop) =>
                    {
                        asked.compressor = Some(inside.compressor);
                        let mut head = [0; HEADER_BYTES];
                        let length = i32::try_from(opened.len() + HEADER_BYTES).unwrap_or(i32::MAX);
                        head[..4].copy_from_slice(&length.to_le_bytes());
                        head[4..12].copy_from_slice(&bytes[4..12]);
                        head[12..].copy_from_slice(&OP_MSG.to_le_bytes());
                        drop(bytes);
                        self.command(asked, &head, &opened).await
                    }
                    _ => {
                        tracing::debug!(conn = self.id, "a compressed message that can't be opened");
                        After::Close
                    }
                }
            }
            OP_QUERY => {
                asked.form = Form::Query;
                self.query(asked, &bytes[HEADER_BYTES..]).await
            }
            // Dead since server 5.1, or none.
            _ => After::Close,
        }
    }

    /// The legacy form, in which only the first hello still comes.
    async fn query(&mut self, asked: Asked, payload: &[u8]) -> After {
        let Ok(query) = Query::parse(payload) else { return After::Close };
        let hello = query.as_ref().filter(|query| {
            let first = query.command.iter().next().and_then(Result::ok);
            let row = first.map(|first| commands::find(first.key));
            matches!(row, Some(Found::Row(row)) if row.database == Treat::Local(Emulate::Hello))
        });
        let mut out = spare::take(0);
        let done = match hello {
            Some(query) => self.hello(&asked, query.command, &mut out).await,
            None => Err(Answer::new(
                352,
                "UnsupportedOpQueryCommand",
                "Unsupported OP_QUERY command: the client driver may require an upgrade",
            )),
        };
        let after = match done {
            Ok(()) => self.send_document(asked, &out).await,
            Err(answer) => self.answer(asked, &answer).await,
        };
        spare::give(out);
        after
    }

    /// An OP_MSG.
    async fn command(&mut self, mut asked: Asked, head: &[u8; HEADER_BYTES], payload: &[u8]) -> After {
        let silent = payload.first_chunk().is_some_and(|flags| u32::from_le_bytes(*flags) & mongo::MORE_TO_COME != 0);
        if silent {
            asked.form = Form::Silent;
        }
        let message = match Message::parse(head, payload) {
            Ok(message) => message,
            Err(fault) => {
                let answer = refuse::render(&Refusal::Malformed { what: fault.what }, Repeat::Plain);
                let broken = payload.first().is_some_and(|flags| u32::from(*flags) & CHECKSUM_PRESENT != 0);
                let after = self.answer(asked, &answer).await;
                // Bytes that changed on the way: what follows is as doubtful.
                return if broken { After::Close } else { after };
            }
        };
        let first = match message.body.iter().next() {
            Some(Ok(first)) => first,
            _ => {
                let refusal = Refusal::Malformed { what: "a command without a name" };
                return self.answer(asked, &refuse::render(&refusal, Repeat::Plain)).await;
            }
        };
        let emulate = match commands::find(first.key) {
            Found::Row(row) => match row.database {
                Treat::Local(emulate) => Some(emulate),
                _ => None,
            },
            _ => None,
        };
        if self.session.is_none() && !emulate.is_some_and(login::is_open) {
            let name = first.name().filter(|name| name.len() <= 64).unwrap_or("?");
            let text = format!("Command {name} requires authentication");
            return self.answer(asked, &Answer::new(13, "Unauthorized", text)).await;
        }
        let mut out = spare::take(0);
        let done = match emulate {
            Some(Emulate::Hello | Emulate::Sasl | Emulate::Logout) => match message.body.has_duplicate_key() {
                Ok(false) => self.handshake(&asked, emulate, message.body, &mut out).await,
                _ => Err(refuse::render(&Refusal::Malformed { what: "a field stands twice" }, Repeat::Plain)),
            },
            Some(emulate) if self.session.is_none() => {
                super::local::put_open(self, emulate, &mut out);
                Ok(())
            }
            _ => {
                spare::give(out);
                return self.request(asked, &message).await;
            }
        };
        let after = match done {
            Ok(()) => self.send_document(Asked { compressor: None, ..asked }, &out).await,
            Err(answer) => self.answer(Asked { compressor: None, ..asked }, &answer).await,
        };
        spare::give(out);
        after
    }

    async fn handshake(
        &mut self,
        asked: &Asked,
        emulate: Option<Emulate>,
        body: Document<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Answer> {
        match emulate {
            Some(Emulate::Hello) => self.hello(asked, body, out).await,
            Some(Emulate::Sasl) => self.sasl(body, out).await,
            _ => {
                self.leave().await;
                super::local::put_ok(out);
                Ok(())
            }
        }
    }

    /// A command of who is logged in.
    async fn request(&mut self, asked: Asked, message: &Message<'_>) -> After {
        if let Err(answer) = self.may_ask(message.body).await {
            self.count_refused();
            return self.answer(asked, &answer).await;
        }
        let (Some(session), Some(tenancy)) = (&self.session, &self.tenancy) else { return After::Close };
        let tenancy = Arc::clone(tenancy);
        // Before its way is chosen: where its documents are may be about to change.
        let entered = match threshold::continues(message.body) {
            true => Some(tenancy.threshold.pass()),
            false => self.server.registry.thresholds.enter(&tenancy.threshold).await,
        };
        let Some(_inside) = entered else {
            tracing::warn!(conn = self.id, "a request waited too long for the tenant's documents to be moved");
            return self.answer(asked, &refuse::render(&Refusal::UpstreamDown, Repeat::Plain)).await;
        };
        let way = tenancy.way(&self.server.upstream);
        let (max_time, shows_org) = {
            let limits = &session.slot().policy().limits.mongodb;
            (limits.timeout, limits.show_org_id)
        };
        let org = session.slot().org().clone();
        let scope = Scope {
            isolation: way.isolation,
            org: &org,
            place: &way.place,
            max_time_ms: i32::try_from(max_time.as_millis()).unwrap_or(i32::MAX),
            shows_org,
        };
        let request = Request { body: message.body.bytes(), sections: message.sections() };
        let bytes: usize = request.sections.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut sent = spare::take(request.body.len() + bytes + bytes / 8 + GROWTH_BYTES);
        mongo::begin(&mut sent, 0, 0, OP_MSG);
        let after = match rewrite::rewrite(&scope, &request, &mut sent) {
            Verdict::Refuse(fault) => {
                self.count_refused();
                super::forward::abort_refused(self, &tenancy, message.body);
                let mut out = spare::take(0);
                refuse::put_fault(&fault, &mut out);
                let after = self.send_document(asked, &out).await;
                spare::give(out);
                after
            }
            Verdict::Local(local) => {
                let mut out = spare::take(0);
                let after = match super::local::put(self, &tenancy, &way, &local, message.body, &mut out).await {
                    Ok(()) => self.send_document(asked, &out).await,
                    Err(answer) => self.answer(asked, &answer).await,
                };
                spare::give(out);
                after
            }
            Verdict::Forward(forward) => {
                mongo::end(&mut sent, 0);
                super::forward::run(self, asked, &tenancy, &way, &forward, &mut sent).await
            }
        };
        spare::give(sent);
        after
    }

    /// Whether the session may go on, and its rate.
    async fn may_ask(&mut self, body: Document<'_>) -> Result<(), Answer> {
        let Some(session) = &self.session else { return Err(refuse::render(&Refusal::Internal, Repeat::Plain)) };
        if let Some(stop) = session.live().stopped() {
            return Err(refuse::render(&Session::farewell(stop), Repeat::Plain));
        }
        session.meter().requests.fetch_add(1, Ordering::Relaxed);
        // What gives things back is never refused: it waits a moment, and owes.
        let first = body.iter().next().and_then(Result::ok);
        if first.is_some_and(|it| matches!(it.key, b"endSessions" | b"killCursors" | b"abortTransaction")) {
            if let Err(over) = session.take(1) {
                session.charge(1);
                tokio::time::sleep(over.retry_after.unwrap_or_default().min(GIVING_BACK_WAITS)).await;
            }
            return Ok(());
        }
        let Err(over) = session.take(1) else { return Ok(()) };
        let policy = Arc::clone(&session.slot().policy());
        let rate = policy.limits.rate(Protocol::Mongodb);
        let wait = over.retry_after.unwrap_or_default();
        if rate.over == OverRate::Delay && wait <= rate.max_delay {
            tokio::time::sleep(wait).await;
            if session.take(1).is_ok() {
                return Ok(());
            }
        }
        Err(refuse::render(&Refusal::OverLimit(over), Repeat::Plain))
    }

    pub(super) fn count_refused(&self) {
        if let Some(session) = &self.session {
            session.meter().refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Ends the login and what the client alone holds.
    pub(super) async fn leave(&mut self) {
        if let Some(tenancy) = self.tenancy.take() {
            let server = Arc::clone(&self.server);
            for (session, open) in tenancy.take_transactions_of(self.id) {
                super::tenancy::abort(&server.upstream, &session, open).await;
            }
            self.session = None;
            server.registry.leave(&server.upstream, &tenancy).await;
        }
        self.session = None;
        self.expired = None;
    }
}
