//! `POST /sql`.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::rand;
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
};
use tokio::io::{AsyncRead, AsyncWriteExt};

use super::{
    Server,
    input::{Failure, Input, types_question},
    login::{self, Begin, Login},
    refuse,
};
use crate::{
    front::{
        http::{
            Body, Client,
            body::{self, ReadError},
            host,
        },
        postgres::{Denied, Line, Options},
    },
    refusal::{Refusal, TokenFault},
    wire::{
        neon::{
            reply::{self, Columns, Shape},
            request::{self, PARAMS_MAX, Query},
            sink::Sink,
            value::Kind,
        },
        postgres::{
            backend::{self, Report, Severity, Status},
            frontend, head, put,
        },
    },
};

/// Longest body, Neon's own limit.
const BODY_MAX: usize = 10 << 20;

/// How long a body may take to come.
const BODY_WITHIN: Duration = Duration::from_secs(30);

/// The headers that a browser may send.
const ALLOWED: &str = "Authorization, Neon-Connection-String, Neon-Raw-Text-Output, Neon-Array-Mode, Neon-Pool-Opt-In, \
                       Neon-Batch-Isolation-Level, Neon-Batch-Read-Only, Neon-Batch-Deferrable";

/// Answers a browser that asks what it may ask.
pub fn preflight() -> Response<Body> {
    let mut response = Response::new(body::empty());
    let headers = response.headers_mut();
    for (name, value) in [
        (header::ALLOW, "OPTIONS, POST"),
        (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
        (header::ACCESS_CONTROL_ALLOW_METHODS, "OPTIONS, POST"),
        (header::ACCESS_CONTROL_MAX_AGE, "86400"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Answers one request.
pub async fn answer(server: &Arc<Server>, request: Request<Incoming>, client: &Client) -> Response<Body> {
    let mut response = match run(server, request, client).await {
        Ok(response) | Err(response) => response,
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    if let Some(id) = request_id() {
        headers.insert(HeaderName::from_static("neon-request-id"), id);
    }
    response
}

#[allow(clippy::result_large_err, reason = "both are the answer")]
async fn run(
    server: &Arc<Server>,
    request: Request<Incoming>,
    client: &Client,
) -> Result<Response<Body>, Response<Body>> {
    let bad = |text: &str| refuse::plain(StatusCode::BAD_REQUEST, text);
    let asked_at = host(&request).map_err(|refusal| refuse::rest(&refusal))?.and_then(|host| server.host_org(host));
    let (parts, incoming) = request.into_parts();
    let Login { options, host, credential, shape, begin } = login::read(&parts.headers).map_err(|text| bad(&text))?;
    let host_org = match (asked_at, server.host_org(&host)) {
        (Some(one), Some(other)) if one != other => {
            let refusal = Refusal::BadToken(TokenFault::BadOrg);
            return Err(refuse::denied(&Denied::Refusal(refusal), &options));
        }
        (one, other) => one.or(other),
    };
    let options = Options { host_org, ..options };
    server.postgres.may_carry(client.transport).map_err(|no| refuse::denied(&Denied::Refusal(no), &options))?;
    // Nothing of a stranger's body is read, and a tenant has no more of them here than it may have clients.
    let guest = server
        .postgres
        .enter(&credential, options.clone())
        .await
        .map_err(|denied| refuse::denied(&denied, &options))?;
    client.admitted();
    let bytes = body::read(incoming, BODY_MAX, BODY_WITHIN).await.map_err(|error| match error {
        ReadError::TooLarge => {
            refuse::plain(StatusCode::PAYLOAD_TOO_LARGE, &format!("request is too large (max is {BODY_MAX} bytes)"))
        }
        ReadError::TooSlow => refuse::plain(StatusCode::REQUEST_TIMEOUT, "the request's body did not come in time"),
        ReadError::Gone => bad("could not read the HTTP request body"),
    })?;
    let asked =
        request::parse(&bytes).map_err(|fault| bad(&format!("could not parse the HTTP request body: {fault}")))?;
    let (queries, is_batch) = match asked {
        request::Request::Single(query) => (vec![query], false),
        request::Request::Batch(queries) => (queries, true),
    };
    let messages = messages(&queries, is_batch.then_some(begin)).map_err(|report| {
        // Nothing of it could be sent: the whole request is at fault.
        refuse::report(StatusCode::BAD_REQUEST, &report)
    })?;
    let database: Arc<str> = options.database.as_str().into();
    let line = guest.begin(&server.postgres, client);
    let shapes = queries
        .iter()
        .map(|query| Shape { arrays: query.array_mode.unwrap_or(shape.arrays), ..shape })
        .collect::<Vec<_>>();
    let max = usize::try_from(line.limits.neon.response).unwrap_or(usize::MAX);
    let asked = Asked { server, database, messages: &messages, shapes: &shapes, is_batch, max };
    match asked.run(line).await {
        Ok(json) => {
            let mut response = body::json(StatusCode::OK, json);
            if is_batch {
                echo(response.headers_mut(), begin);
            }
            Ok(response)
        }
        Err(failure) => Err(match failure {
            Failure::Server(message) => refuse::server(&message),
            Failure::TooLarge => refuse::report(
                StatusCode::BAD_REQUEST,
                &error(
                    "54000",
                    format!("response is too large (max is {max} bytes)"),
                    "Ask for fewer rows or columns at a time (LIMIT, a cursor over WebSocket), or move to a larger tier.",
                ),
            ),
            Failure::Copy => refuse::report(
                StatusCode::BAD_REQUEST,
                &error("0A000", "COPY is not available over HTTP".into(), "Use the Postgres port or a WebSocket."),
            ),
            Failure::Lost => {
                let refusal = Refusal::UpstreamDown;
                refuse::denied(&Denied::Refusal(refusal), &options)
            }
        }),
    }
}

fn error(code: &'static str, message: String, hint: &str) -> Report {
    Report { severity: Severity::Error, code, message, detail: String::new(), hint: hint.into() }
}

/// Says on a batch's answer how it was run.
fn echo(headers: &mut HeaderMap, begin: Begin) {
    let mut say = |name, value| headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    if let Some((level, _)) = begin.isolation {
        say("neon-batch-isolation-level", level);
    }
    if begin.read_only {
        say("neon-batch-read-only", "true");
    }
    if begin.deferrable {
        say("neon-batch-deferrable", "true");
    }
}

/// A random UUID; none if the system has no randomness, which costs only the header.
fn request_id() -> Option<HeaderValue> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).ok()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = data_encoding::HEXLOWER.encode(&bytes);
    let text = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    HeaderValue::try_from(text).ok()
}

/// All that is sent, up to one Sync: what fails ends the rest.
fn messages(queries: &[Query<'_>], begin: Option<Begin>) -> Result<Vec<u8>, Report> {
    let mut out = Vec::new();
    if queries.is_empty() {
        return Ok(out);
    }
    if let Some(begin) = begin {
        put_query(&mut out, &begin.statement(), &[])?;
    }
    for query in queries {
        put_query(&mut out, &query.text, &query.params)?;
    }
    if begin.is_some() {
        put_query(&mut out, "COMMIT", &[])?;
    }
    put(&mut out, b'S', |_| {});
    Ok(out)
}

/// Parse without types, Bind and results as text, Describe, Execute.
fn put_query(out: &mut Vec<u8>, text: &str, params: &[&str]) -> Result<(), Report> {
    if text.contains('\0') {
        return Err(error("22021", "invalid byte sequence for encoding \"UTF8\": 0x00".into(), ""));
    }
    let count = u16::try_from(params.len().min(PARAMS_MAX)).unwrap_or(u16::MAX);
    put(out, b'P', |out| {
        out.push(0);
        out.extend_from_slice(text.as_bytes());
        out.extend_from_slice(&[0, 0, 0]);
    });
    let mut fault = None;
    put(out, b'B', |out| {
        out.extend_from_slice(&[0, 0, 0, 0]);
        out.extend_from_slice(&count.to_be_bytes());
        for value in params {
            match request::param(value) {
                Ok(None) => out.extend_from_slice(&(-1i32).to_be_bytes()),
                Ok(Some(text)) => {
                    // A body is far shorter than what fits.
                    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
                    out.extend_from_slice(text.as_bytes());
                }
                Err(found) => fault = Some(found),
            }
        }
        out.extend_from_slice(&[0, 0]);
    });
    if let Some(fault) = fault {
        return Err(error("22P02", format!("could not parse the HTTP request body: {fault}"), ""));
    }
    put(out, b'D', |out| out.extend_from_slice(b"P\0"));
    put(out, b'E', |out| out.extend_from_slice(&[0, 0, 0, 0, 0]));
    Ok(())
}

/// What is asked of a session.
struct Asked<'a> {
    server: &'a Server,
    database: Arc<str>,
    messages: &'a [u8],
    shapes: &'a [Shape],
    is_batch: bool,
    max: usize,
}

/// One query's result under way.
#[derive(Default)]
struct Part {
    columns: Columns,
    /// Rows as JSON, from `fields` on; or, where a type is not known yet, the server's messages.
    json: Vec<u8>,
    waiting: Vec<u8>,
    rows: usize,
    tag: Vec<u8>,
}

impl Part {
    /// Bytes of the answer that are known of it.
    fn len(&self) -> usize {
        self.columns.head_len() + self.json.len() + PART_BYTES
    }
}

/// What a result takes beside its columns and rows: itself, and the words around it in the answer.
const PART_BYTES: usize = size_of::<Part>() + 96;

impl Asked<'_> {
    async fn run(&self, line: Line) -> Result<Vec<u8>, Failure> {
        let org = line.org.clone();
        line.talk(async |pipe| {
            let (mut reader, mut writer) = tokio::io::split(pipe);
            let mut input = Input::new(&mut reader, self.max);
            input.until_ready().await?;
            let mut parts = Vec::with_capacity(self.shapes.len());
            if !self.messages.is_empty() {
                // Beside each other: neither side has room for all of what the other sends.
                let (sent, result) =
                    tokio::join!(writer.write_all(self.messages), self.collect(&mut input, &mut parts, &org));
                let (status, failure) = result?;
                if sent.is_err() && failure.is_none() {
                    return Err(Failure::Lost);
                }
                if status != Status::Idle {
                    // What a query began and did not end, or what failed: not the next one's.
                    let mut rollback = Vec::new();
                    frontend::put_query(&mut rollback, "ROLLBACK");
                    writer.write_all(&rollback).await.map_err(|_| Failure::Lost)?;
                    input.until_ready().await?;
                }
                if let Some(message) = failure {
                    return Err(Failure::Server(message));
                }
            }
            let mut unknown: Vec<u32> = parts.iter().flat_map(|part| part.columns.unknown()).collect();
            unknown.sort_unstable();
            unknown.dedup();
            let waiting = parts.iter().any(|part: &Part| !part.waiting.is_empty());
            if waiting && !unknown.is_empty() {
                let mut question = Vec::new();
                frontend::put_query(&mut question, &types_question(&unknown));
                writer.write_all(&question).await.map_err(|_| Failure::Lost)?;
                let answers = input.types().await?;
                for oid in unknown {
                    let kind = answers.iter().find(|(known, _)| *known == oid).map_or(Kind::Text, |(_, kind)| *kind);
                    self.server.types.insert((org.clone(), Arc::clone(&self.database), oid), kind);
                    parts.iter_mut().for_each(|part| part.columns.learn(oid, kind));
                }
            }
            self.write(parts)
        })
        .await
    }

    /// Reads results up to ReadyForQuery; gives the error, if there was one.
    async fn collect<R: AsyncRead + Unpin>(
        &self,
        input: &mut Input<'_, R>,
        parts: &mut Vec<Part>,
        org: &crate::tenant::OrgId,
    ) -> Result<(Status, Option<Vec<u8>>), Failure> {
        // A batch's first statement begins its transaction and has no result.
        let mut beginning = self.is_batch;
        let mut failure = None;
        let mut part = Part::default();
        loop {
            let message = input.message().await?;
            match message[0] {
                b'Z' => return backend::ready(&message).map(|status| (status, failure)).map_err(|_| Failure::Lost),
                b'E' => failure = Some(message.to_vec()),
                b'T' => {
                    part.columns = Columns::parse(&message).map_err(|_| Failure::Lost)?;
                    input.charge(part.columns.size())?;
                    let unknown: Vec<u32> = part.columns.unknown().collect();
                    for oid in unknown {
                        let key = (org.clone(), Arc::clone(&self.database), oid);
                        if let Some(kind) = self.server.types.get(&key) {
                            part.columns.learn(oid, kind);
                        }
                    }
                }
                b'D' => {
                    let shape = self.shapes.get(parts.len()).copied().unwrap_or_default();
                    let room = input.left();
                    input.charge(message.len())?;
                    if !shape.raw && part.columns.unknown().next().is_some() {
                        part.waiting.extend_from_slice(&message);
                        continue;
                    }
                    let before = part.json.len();
                    // The row is charged as what is longer: what the server said, or the JSON of it.
                    let mut json = Sink::new(&mut part.json, before.saturating_add(room));
                    if part.rows > 0 {
                        json.put(b",")?;
                    }
                    part.rows += 1;
                    part.columns.put_row(&mut json, shape, &message)?;
                    input.charge((part.json.len() - before).saturating_sub(message.len()))?;
                }
                b'C' | b'I' => {
                    let done = std::mem::take(&mut part);
                    if std::mem::take(&mut beginning) || parts.len() == self.shapes.len() {
                        continue;
                    }
                    let tag = if message[0] == b'C' { backend::tag(&message).map_err(|_| Failure::Lost)? } else { b"" };
                    input.charge(PART_BYTES + tag.len())?;
                    parts.push(Part { tag: tag.to_vec(), ..done });
                }
                b'G' | b'H' | b'W' => return Err(Failure::Copy),
                // ParseComplete, BindComplete, NoData; notices, notifications, parameters: nothing of the answer.
                b'1' | b'2' | b'n' | b'N' | b'A' | b'S' | b't' => {}
                _ => return Err(Failure::Lost),
            }
        }
    }

    fn write(&self, parts: Vec<Part>) -> Result<Vec<u8>, Failure> {
        if parts.len() != self.shapes.len() {
            return Err(Failure::Lost);
        }
        let mut out = Vec::with_capacity(parts.iter().map(Part::len).sum());
        if self.is_batch {
            out.extend_from_slice(b"{\"results\":[");
        }
        for (at, (part, shape)) in parts.into_iter().zip(self.shapes).enumerate() {
            if at > 0 {
                out.push(b',');
            }
            part.columns.put_head(&mut out);
            out.extend_from_slice(&part.json);
            let mut waiting = part.waiting.as_slice();
            let mut first = true;
            while let Ok(Some(found)) = head(waiting) {
                let Some((message, behind)) = waiting.split_at_checked(found.len) else { break };
                let mut json = Sink::new(&mut out, self.max);
                if !std::mem::take(&mut first) {
                    json.put(b",")?;
                }
                part.columns.put_row(&mut json, *shape, message)?;
                waiting = behind;
            }
            reply::put_tail(&mut out, &part.tag, shape.arrays);
        }
        if self.is_batch {
            out.extend_from_slice(b"]}");
        }
        // Rows that waited for their types were charged as the server said them.
        if out.len() > self.max { Err(Failure::TooLarge) } else { Ok(out) }
    }
}
