//! From the first byte to an admitted session: TLS as the protocol asks for it, the startup packet, the token.
//!
//! A read takes what has come, in as few system calls as that takes. What came behind a request for TLS goes to the
//! TLS handshake and nowhere else, so that bytes slipped in before TLS never reach the conversation behind it.

use std::{io, sync::Arc};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Server,
    options::{Auth, Options},
    refuse,
};
use crate::{
    net::{Stream, tls::accept_tls},
    refusal::{Refusal, TokenFault},
    session::{Session, Transport},
    tenant::{Home, OrgId, Protocol},
    upstream::postgres::Upstream,
    wire::postgres::{
        self as wire, HEAD,
        backend::{self, Report, Severity},
        frontend,
        startup::{self, STARTUP_MAX, Startup},
    },
};

/// Longest PasswordMessage: what PostgreSQL and PgBouncer accept.
const PASSWORD_MAX: usize = 65_535;

/// The newest minor version of protocol 3 that we speak.
const MINOR: u16 = 2;

/// The first byte of a TLS record that carries a handshake; no startup packet begins so.
const TLS_HANDSHAKE: u8 = 0x16;

/// How a connection ended before it became a session.
#[derive(Debug)]
pub enum Early {
    /// It was a cancel request, or went away: nothing to say.
    Gone(&'static str),
    /// It gets a report.
    Refused(Report, &'static str),
}

impl From<io::Error> for Early {
    fn from(_: io::Error) -> Self {
        Early::Gone("client_gone")
    }
}

impl From<crate::wire::Error> for Early {
    fn from(error: crate::wire::Error) -> Self {
        Early::Refused(refuse::plain(Severity::Fatal, "08P01", error.what), "protocol")
    }
}

/// An admitted client.
#[derive(Debug)]
pub struct Admitted {
    /// Its session.
    pub session: Session,
    /// Where its tenant's databases are.
    pub upstream: Arc<Upstream>,
    /// What it asked for.
    pub options: Options,
    /// The minor protocol version that both speak.
    pub minor: u16,
    /// What it sent before it was told that it is in: some pipeline their first query behind the password.
    pub early: Vec<u8>,
}

/// A startup packet and a usual token fit in one read each.
const INTAKE: usize = 1024;

/// What was read from a client and not yet used.
#[derive(Debug)]
struct Intake(Vec<u8>);

impl Intake {
    /// Reads until there are `bytes` of it, or more; says whether the client sent that many.
    async fn fill(&mut self, stream: &mut Stream, bytes: usize) -> io::Result<bool> {
        while self.0.len() < bytes {
            // Room for the whole of it and a little more: what has come is read at once.
            self.0.reserve((bytes - self.0.len()).max(INTAKE));
            if stream.read_buf(&mut self.0).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes the first `bytes`; what came behind them stays.
    fn take(&mut self, bytes: usize) -> Vec<u8> {
        let rest = self.0.split_off(bytes.min(self.0.len()));
        std::mem::replace(&mut self.0, rest)
    }
}

/// Brings a connection to an admitted session. `stream` is the plain socket at first and the TLS stream afterwards.
pub async fn admit(
    server: &Server,
    stream: &mut Option<Stream>,
    local: bool,
    protocol: Protocol,
    host_org: Option<OrgId>,
) -> Result<Admitted, Early> {
    let mut intake = Intake(Vec::new());
    let login = loop {
        let startup = match read_startup(server, stream, &mut intake).await? {
            Some(startup) => startup,
            None => continue,
        };
        match startup {
            Startup::Ssl => ask_tls(server, stream, &mut intake).await?,
            Startup::Gss => {
                open(stream)?.write_all(b"N").await?;
                open(stream)?.flush().await?;
            }
            Startup::Cancel { pid, secret } => {
                server.keys.cancel(pid, &secret);
                return Err(Early::Gone("cancel_request"));
            }
            Startup::Login(login) => break login,
        }
    };
    let stream = open(stream)?;
    if server.drain.is_draining() {
        return Err(refused(Refusal::Draining));
    }
    let minor = if login.minor >= MINOR { MINOR } else { 0 };
    if login.minor != minor || !login.extensions.is_empty() {
        let mut out = Vec::new();
        backend::put_negotiate(&mut out, minor, &login.extensions);
        stream.write_all(&out).await?;
    }
    let options = Options::read(&login).map_err(|report| Early::Refused(report, "startup"))?;
    let options = Options { host_org, ..options };
    let transport = if stream.is_tls() || local { Transport::Private } else { Transport::Open };
    server.gate.may_carry(transport).map_err(refused)?;
    let token = match options.auth {
        Auth::Password => password(stream, &mut intake).await?,
        Auth::Bearer => bearer(stream, &mut intake, &server.config.openid_configuration).await?,
    };
    let (session, upstream) = enter(server, &token, protocol, &options)
        .await
        .map_err(|denied| Early::Refused(denied.report(&options), denied.reason()))?;
    Ok(Admitted { session, upstream, options, minor, early: intake.0 })
}

/// Why a caller was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// The gate, or what stands behind it, said no.
    Refusal(Refusal),
    /// The credential is good and does not stand for that user.
    UnknownUser,
    /// The tenant has no such database.
    UnknownDatabase,
}

impl Denied {
    /// What the client is told.
    pub fn report(&self, options: &Options) -> Report {
        match self {
            Denied::Refusal(Refusal::BadToken(_)) | Denied::UnknownUser => refuse::wrong_password(&options.user),
            Denied::Refusal(Refusal::Suspended) => refuse::suspended_login(),
            Denied::Refusal(refusal) => refuse::fatal(refusal),
            Denied::UnknownDatabase => refuse::unknown_database(&options.database),
        }
    }

    /// The metric label.
    pub fn reason(&self) -> &'static str {
        match self {
            Denied::Refusal(refusal) => refusal.kind(),
            Denied::UnknownUser => "unknown_user",
            Denied::UnknownDatabase => "unknown_database",
        }
    }
}

impl From<Refusal> for Denied {
    fn from(refusal: Refusal) -> Self {
        Denied::Refusal(refusal)
    }
}

/// From a credential to a session that may use the user and database that it asks for, and where those are.
pub async fn enter(
    server: &Server,
    token: &[u8],
    protocol: Protocol,
    options: &Options,
) -> Result<(Session, Arc<Upstream>), Denied> {
    let session = server.gate.admit(token, protocol).await?;
    if options.host_org.as_ref().is_some_and(|org| org != session.slot().org()) {
        return Err(Refusal::BadToken(TokenFault::BadOrg).into());
    }
    // A drain that began meanwhile has told every session that was there; this one was not.
    if server.drain.is_draining() {
        return Err(Refusal::Draining.into());
    }
    let policy = session.slot().policy();
    let home = policy.tenant.home_of(protocol, &options.database);
    let allowed = session.identity().user.as_deref().is_none_or(|user| user == options.user);
    if !allowed || !policy.tenant.has_user(&options.user) {
        return Err(Denied::UnknownUser);
    }
    if !policy.tenant.has_database_in(home.protocol(), &options.database) {
        return Err(Denied::UnknownDatabase);
    }
    drop(policy);
    let upstream = match home {
        Home::Main => Arc::clone(&server.upstream),
        Home::Neon => match &server.neon {
            Some(neon) => Arc::clone(neon),
            None => {
                tracing::error!(org = %session.slot().org(), "its home is neon, and there is no [upstream.neon]");
                return Err(Refusal::UpstreamDown.into());
            }
        },
    };
    Ok((session, upstream))
}

fn refused(refusal: Refusal) -> Early {
    Early::Refused(refuse::fatal(&refusal), refusal.kind())
}

fn open(stream: &mut Option<Stream>) -> Result<&mut Stream, Early> {
    stream.as_mut().ok_or(Early::Gone("tls_failed"))
}

/// Reads one startup packet; `None` when the client began with TLS instead, which is on now.
async fn read_startup(
    server: &Server,
    stream: &mut Option<Stream>,
    intake: &mut Intake,
) -> Result<Option<Startup>, Early> {
    let plain = open(stream)?;
    if !intake.fill(plain, 1).await? {
        return Err(Early::Gone("probe"));
    }
    if intake.0[0] == TLS_HANDSHAKE && !plain.is_tls() {
        let first = intake.take(usize::MAX);
        return direct_tls(server, stream, first).await.map(|()| None);
    }
    if !intake.fill(plain, 8).await? {
        return Err(Early::Gone("client_gone"));
    }
    let len = u32::from_be_bytes([intake.0[0], intake.0[1], intake.0[2], intake.0[3]]) as usize;
    let len = if (8..=STARTUP_MAX).contains(&len) { len } else { 8 };
    if !intake.fill(plain, len).await? {
        return Err(Early::Gone("client_gone"));
    }
    match startup::decode(&intake.take(len)) {
        Ok(Some((_, startup))) => Ok(Some(startup)),
        Ok(None) => Err(Early::Gone("client_gone")),
        Err(error) if error.what == "unsupported frontend protocol" => {
            Err(Early::Refused(refuse::plain(Severity::Fatal, "0A000", error.what), "protocol"))
        }
        Err(error) => Err(error.into()),
    }
}

async fn ask_tls(server: &Server, stream: &mut Option<Stream>, intake: &mut Intake) -> Result<(), Early> {
    let plain = open(stream)?;
    if matches!(plain, Stream::Tls(_)) {
        return Err(Early::Refused(refuse::plain(Severity::Fatal, "08P01", "TLS is on already"), "protocol"));
    }
    // A WebSocket has its TLS outside.
    let Some(tls) = server.tls.as_ref().filter(|_| matches!(plain, Stream::Plain(_))) else {
        plain.write_all(b"N").await?;
        plain.flush().await?;
        return Ok(());
    };
    plain.write_all(b"S").await?;
    let Some(plain) = stream.take() else { return Err(Early::Gone("tls_failed")) };
    let secured = accept_tls(plain.replaying(intake.take(usize::MAX))?, tls.acceptor())
        .await
        .map_err(|_| Early::Gone("tls_failed"))?;
    *stream = Some(secured);
    Ok(())
}

/// TLS from the first byte, as PostgreSQL 17 clients can ask for; ALPN is mandatory then.
async fn direct_tls(server: &Server, stream: &mut Option<Stream>, first: Vec<u8>) -> Result<(), Early> {
    let (Some(tls), Some(plain)) = (&server.tls, stream.take()) else { return Err(Early::Gone("tls_off")) };
    let secured = accept_tls(plain.replaying(first)?, tls.acceptor()).await.map_err(|_| Early::Gone("tls_failed"))?;
    if let Stream::Tls(inner) = &secured
        && inner.get_ref().1.alpn_protocol() != Some(super::ALPN.as_bytes())
    {
        return Err(Early::Gone("tls_without_alpn"));
    }
    *stream = Some(secured);
    Ok(())
}

async fn password(stream: &mut Stream, intake: &mut Intake) -> Result<Vec<u8>, Early> {
    stream.write_all(&backend::AUTHENTICATION_CLEARTEXT).await?;
    stream.flush().await?;
    let message = read_secret(stream, intake).await?;
    Ok(frontend::password(&message)?.to_vec())
}

/// SASL OAUTHBEARER (RFC 7628): the token in the initial response; without one the client asks where to get it.
async fn bearer(stream: &mut Stream, intake: &mut Intake, openid_configuration: &str) -> Result<Vec<u8>, Early> {
    let mut out = Vec::new();
    backend::put_sasl(&mut out, &["OAUTHBEARER"]);
    stream.write_all(&out).await?;
    stream.flush().await?;
    let message = read_secret(stream, intake).await?;
    let (mechanism, response) = frontend::sasl_initial(&message)?;
    if mechanism != b"OAUTHBEARER" {
        return Err(crate::wire::Error {
            at: "SASL",
            what: "client selected an invalid SASL authentication mechanism",
        }
        .into());
    }
    match response.and_then(bearer_token) {
        Some(token) if !token.is_empty() => Ok(token.to_vec()),
        // Discovery: the client has no token yet and asks where to get one.
        Some(_) => {
            let mut out = Vec::new();
            let body = serde_json::json!({
                "status": "invalid_token", "openid-configuration": openid_configuration, "scope": ""
            });
            backend::put_sasl_continue(&mut out, body.to_string().as_bytes());
            stream.write_all(&out).await?;
            stream.flush().await?;
            // The client has to answer with a lone 0x01 before it is refused; what it says decides nothing.
            read_secret(stream, intake).await?;
            Err(refused(Refusal::BadToken(TokenFault::Malformed)))
        }
        None => Err(crate::wire::Error { at: "SASL", what: "malformed OAUTHBEARER message" }.into()),
    }
}

/// The token in `n,,^Aauth=Bearer <token>^A^A`; an authzid and other keys may stand there too and mean nothing.
fn bearer_token(response: &[u8]) -> Option<&[u8]> {
    let (header, rest) = response.split_at(memchr::memchr(1, response)?);
    if !(header.starts_with(b"n,") || header.starts_with(b"y,")) || !rest.ends_with(b"\x01\x01") {
        return None;
    }
    let value = rest.split(|&b| b == 1).find_map(|pair| pair.strip_prefix(b"auth="))?;
    if value.is_empty() {
        return Some(value);
    }
    let (scheme, token) = value.split_first_chunk::<7>()?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token.trim_ascii())
}

/// Reads one whole message of kind `p`.
async fn read_secret(stream: &mut Stream, intake: &mut Intake) -> Result<Vec<u8>, Early> {
    if !intake.fill(stream, HEAD).await? {
        return Err(Early::Gone("client_gone"));
    }
    let head = wire::head(&intake.0)?.ok_or(Early::Gone("client_gone"))?;
    if head.kind != b'p' {
        return Err(crate::wire::Error { at: "authentication", what: "expected password response" }.into());
    }
    if head.len > PASSWORD_MAX + HEAD {
        return Err(crate::wire::Error { at: "authentication", what: "password is too long" }.into());
    }
    if !intake.fill(stream, head.len).await? {
        return Err(Early::Gone("client_gone"));
    }
    Ok(intake.take(head.len))
}

#[cfg(test)]
mod tests {
    use super::bearer_token;

    #[test]
    fn a_bearer_token_is_found_among_the_keys() {
        assert_eq!(bearer_token(b"n,,\x01auth=Bearer abc\x01\x01"), Some(&b"abc"[..]));
        assert_eq!(bearer_token(b"n,a=u,\x01host=h\x01port=1\x01auth=bearer abc\x01\x01"), Some(&b"abc"[..]));
        assert_eq!(bearer_token(b"n,,\x01auth=\x01\x01"), Some(&b""[..]), "discovery");
        for bad in [
            &b""[..],
            b"n,,",
            b"n,,\x01\x01",
            b"p=x,,\x01auth=Bearer a\x01\x01",
            b"n,,\x01auth=Basic abcd\x01\x01",
            b"n,,\x01auth=Bearer a",
        ] {
            assert_eq!(bearer_token(bad), None, "{bad:?}");
        }
    }
}
