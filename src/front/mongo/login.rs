//! The handshake: hello, and SASL PLAIN and MONGODB-OIDC with a token as the password.
//!
//! The hello is ours alone. It says mongos (`isdbgrid`), the one kind of server that has sessions, retryable writes and
//! transactions and names no addresses, or the primary of a set of one where that is configured (`member`); it has no
//! `topologyVersion`, so that drivers poll instead of holding a second socket open; it leaves room for what rewriting adds
//! to messages.

use std::sync::{Arc, atomic::Ordering};

use super::{
    client::Client,
    commands::Emulate,
    member::{self, Member},
    refuse::{self, After, Answer, Repeat},
    rewrite,
    send::Asked,
};
use crate::{
    refusal::{Refusal, TokenFault},
    session::Session,
    tenant::Protocol,
    wire::mongo::{
        bson::{self, Document},
        compress::Compressor,
    },
};

/// What is advertised instead of 48 000 000: a rewritten message is longer than the client's.
const MESSAGE_ADVERTISED_BYTES: i32 = 46_000_000;

/// What is advertised instead of 16 777 216: an insert grows by `org_id`.
const DOCUMENT_ADVERTISED_BYTES: i32 = 16_777_088;

/// What is advertised instead of 100 000: each statement grows, and none more is taken.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "some thousands")]
const BATCH_ADVERTISED: i32 = rewrite::STATEMENTS_MAX as i32;

/// Minutes that the server keeps an unused session.
const SESSION_MINUTES: i32 = 30;

/// Longest SASL payload: a token and two names.
const PAYLOAD_MAX_BYTES: usize = 16 << 10;

/// Compressors that one hello may offer.
const OFFERED_MAX: usize = 8;

/// The conversation's number: there is never a second one.
const CONVERSATION: i32 = 1;

impl Client {
    /// Answers a hello, with a login inside it where there is one.
    pub(super) async fn hello(&mut self, asked: &Asked, body: Document<'_>, out: &mut Vec<u8>) -> Result<(), Answer> {
        let get = |key: &str| body.get(key).map_err(malformed);
        let legacy = body.iter().next().and_then(Result::ok).is_some_and(|first| first.key != b"hello");
        if let Some(offered) = get("compression")?.and_then(|it| it.array())
            && self.compressors.is_empty()
        {
            let names = offered.iter().take(OFFERED_MAX).map_while(Result::ok).filter_map(|it| it.str());
            self.compressors = names.filter_map(Compressor::by_name).collect();
        }
        let speculated = match get("speculativeAuthenticate")?.and_then(|it| it.document()) {
            Some(start) if self.session.is_none() => self.speculate(start).await,
            _ => None,
        };
        let reply = bson::open(out);
        if get("helloOk")?.is_some_and(|it| it.truthy()) {
            bson::put_bool(out, "helloOk", true);
        }
        if legacy {
            bson::put_bool(out, "ismaster", true);
        }
        bson::put_bool(out, "isWritablePrimary", true);
        let balanced = get("loadBalanced")?.is_some_and(|it| it.truthy());
        match self.member(balanced) {
            Some(member) => member.put(out),
            None => bson::put_str(out, "msg", "isdbgrid"),
        }
        bson::put_i32(out, "maxBsonObjectSize", DOCUMENT_ADVERTISED_BYTES);
        bson::put_i32(out, "maxMessageSizeBytes", MESSAGE_ADVERTISED_BYTES);
        bson::put_i32(out, "maxWriteBatchSize", BATCH_ADVERTISED);
        bson::put_date(out, "localTime", super::now_ms());
        bson::put_i32(out, "logicalSessionTimeoutMinutes", SESSION_MINUTES);
        bson::put_i32(out, "connectionId", self.number());
        bson::put_i32(out, "minWireVersion", 0);
        bson::put_i32(out, "maxWireVersion", self.server.upstream.wire_version());
        bson::put_bool(out, "readOnly", false);
        if !self.compressors.is_empty() {
            let list = bson::open_array(out, "compression");
            for (at, compressor) in self.compressors.iter().enumerate() {
                bson::put_str(out, bson::Index::new(at).as_str(), compressor.name());
            }
            bson::close(out, list);
        }
        if get("saslSupportedMechs")?.is_some() {
            let list = bson::open_array(out, "saslSupportedMechs");
            bson::put_str(out, "0", "PLAIN");
            bson::put_str(out, "1", "MONGODB-OIDC");
            bson::close(out, list);
        }
        if let Some(done) = speculated {
            bson::put_document(out, "speculativeAuthenticate", Document::new(&done).map_err(malformed)?);
        }
        if balanced {
            bson::put_object_id(out, "serviceId", &self.server.service_id);
        }
        bson::put_f64(out, "ok", 1.0);
        bson::close(out, reply);
        let _ = asked;
        Ok(())
    }

    /// The set's member as whom this client sees us, if not as a mongos.
    pub(super) fn member(&self, balanced: bool) -> Option<&Member> {
        member::seen(self.server.config.member.as_ref(), &self.peer, balanced)
    }

    /// A login inside a hello; what goes wrong with it is told by the field's absence.
    async fn speculate(&mut self, start: Document<'_>) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        match self.sasl_start(start, &mut out).await {
            Ok(()) if self.session.is_some() => Some(out),
            _ => {
                self.conversing = false;
                None
            }
        }
    }

    /// `saslStart` and `saslContinue`.
    pub(super) async fn sasl(&mut self, body: Document<'_>, out: &mut Vec<u8>) -> Result<(), Answer> {
        let first = body.iter().next().and_then(Result::ok);
        if first.is_some_and(|first| first.key == b"saslStart") {
            return self.sasl_start(body, out).await;
        }
        if !std::mem::take(&mut self.conversing) {
            return Err(Answer::new(17, "ProtocolError", "No SASL session state found"));
        }
        let token = jwt(payload(body)?)?.ok_or_else(failed)?;
        self.log_in(token).await.map_err(|refusal| self.refused(&refusal))?;
        put_done(out);
        Ok(())
    }

    async fn sasl_start(&mut self, body: Document<'_>, out: &mut Vec<u8>) -> Result<(), Answer> {
        let mechanism = body.get("mechanism").map_err(malformed)?.and_then(|it| it.str()).unwrap_or_default();
        // Asked before a client that would send one is invited to.
        self.server.gate.may_carry(self.transport).map_err(|refusal| self.refused(&refusal))?;
        let token = match mechanism {
            "PLAIN" => plain(payload(body)?)?,
            "MONGODB-OIDC" => match jwt(payload(body)?)? {
                Some(token) => token,
                None => {
                    self.conversing = true;
                    self.put_issuer(out);
                    return Ok(());
                }
            },
            _ => {
                return Err(closing(Answer::new(
                    18,
                    "AuthenticationFailed",
                    "this server takes a token as the password: add authMechanism=PLAIN to the connection string",
                )));
            }
        };
        self.log_in(token).await.map_err(|refusal| self.refused(&refusal))?;
        put_done(out);
        Ok(())
    }

    /// The first step of the human flow: where to get a token.
    fn put_issuer(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let inner = bson::open(&mut payload);
        bson::put_str(&mut payload, "issuer", &self.server.config.issuer);
        bson::put_str(&mut payload, "clientId", "dynabase");
        bson::close(&mut payload, inner);
        let reply = bson::open(out);
        bson::put_i32(out, "conversationId", CONVERSATION);
        bson::put_bool(out, "done", false);
        bson::put_binary(out, "payload", 0, &payload);
        bson::put_f64(out, "ok", 1.0);
        bson::close(out, reply);
    }

    /// Logs in, or renews the login with a token of the same tenant and user.
    async fn log_in(&mut self, token: &[u8]) -> Result<(), Refusal> {
        if self.server.drain.is_draining() {
            return Err(Refusal::Draining);
        }
        let server = Arc::clone(&self.server);
        if let Some(session) = &mut self.session {
            let before = session.identity().clone();
            if !server.gate.renew(session, token).await? || !is_same(&before, session) {
                return Err(Refusal::UnknownOrg);
            }
            self.expired = None;
            return Ok(());
        }
        let session = server.gate.admit(token, Protocol::Mongodb).await?;
        let tenancy = server.registry.enter(&server.upstream, session.slot()).ok_or(Refusal::Internal)?;
        session.live().set_idle(false);
        self.tenancy = Some(tenancy);
        self.session = Some(session);
        self.unauthenticated = None;
        Ok(())
    }

    /// The answer to a login that was refused. It ends the connection, as servers do.
    fn refused(&self, refusal: &Refusal) -> Answer {
        tracing::debug!(conn = self.id, peer = %self.peer, reason = refusal.kind(), "login refused");
        if let Some(session) = &self.session {
            session.meter().refused.fetch_add(1, Ordering::Relaxed);
        }
        closing(refuse::render(refusal, Repeat::Plain))
    }
}

/// Whether a renewed login is the same user's: a person's token doesn't become another's.
fn is_same(before: &crate::identity::Identity, session: &Session) -> bool {
    use crate::identity::Proof;
    let now = session.identity();
    match (&before.proof, &now.proof) {
        (Proof::Token(_), Proof::Token(_)) => before.subject == now.subject,
        _ => true,
    }
}

fn closing(mut answer: Answer) -> Answer {
    answer.after = After::Close;
    answer
}

fn failed() -> Answer {
    closing(refuse::render(&Refusal::BadToken(TokenFault::Malformed), Repeat::Plain))
}

fn malformed(fault: crate::wire::Error) -> Answer {
    refuse::render(&Refusal::Malformed { what: fault.what }, Repeat::Plain)
}

fn payload(body: Document<'_>) -> Result<&[u8], Answer> {
    let element = body.get("payload").map_err(malformed)?;
    let bytes = element.and_then(|it| it.binary()).map(|(_, bytes)| bytes).ok_or_else(failed)?;
    if bytes.len() > PAYLOAD_MAX_BYTES { Err(failed()) } else { Ok(bytes) }
}

/// The token in PLAIN's `authzid NUL authcid NUL password`. Names are no authority: the token says who it is.
fn plain(payload: &[u8]) -> Result<&[u8], Answer> {
    let mut parts = payload.split(|&byte| byte == 0);
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(authority), Some(name), Some(token), None)
            if (authority.is_empty() || authority == name) && !token.is_empty() =>
        {
            Ok(token)
        }
        _ => Err(failed()),
    }
}

/// The token in MONGODB-OIDC's document; `None` where the client asks how to get one.
fn jwt(payload: &[u8]) -> Result<Option<&[u8]>, Answer> {
    let inner = Document::new(payload).map_err(|_| failed())?;
    if inner.has_duplicate_key().map_err(|_| failed())? {
        return Err(failed());
    }
    match inner.get("jwt").map_err(|_| failed())? {
        None => Ok(None),
        Some(token) => token.str_bytes().map(Some).ok_or_else(failed),
    }
}

fn put_done(out: &mut Vec<u8>) {
    let reply = bson::open(out);
    bson::put_i32(out, "conversationId", CONVERSATION);
    bson::put_bool(out, "done", true);
    bson::put_binary(out, "payload", 0, b"");
    bson::put_f64(out, "ok", 1.0);
    bson::close(out, reply);
}

/// What may be asked before a login.
pub fn is_open(emulate: Emulate) -> bool {
    matches!(
        emulate,
        Emulate::Hello
            | Emulate::Sasl
            | Emulate::Logout
            | Emulate::Ping
            | Emulate::BuildInfo
            | Emulate::ConnectionStatus
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_payload_is_two_names_and_a_token() {
        assert_eq!(plain(b"\0app\0token").expect("good"), b"token");
        assert_eq!(plain(b"app\0app\0token").expect("good"), b"token");
        for bad in [&b""[..], b"token", b"\0app", b"\0app\0", b"other\0app\0token", b"\0app\0to\0ken", b"\0\0\0"] {
            assert!(plain(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_oidc_payload_has_one_token_or_asks_for_the_issuer() {
        let document = |keys: &[&str]| {
            let mut out = Vec::new();
            let body = bson::open(&mut out);
            keys.iter().for_each(|key| bson::put_str(&mut out, key, "x"));
            bson::close(&mut out, body);
            out
        };
        assert_eq!(jwt(&document(&["jwt"])).expect("good"), Some(&b"x"[..]));
        assert_eq!(jwt(&document(&["n"])).expect("good"), None);
        assert!(jwt(&document(&["jwt", "jwt"])).is_err());
        assert!(jwt(b"\x05\0\0\0").is_err());
    }
}
