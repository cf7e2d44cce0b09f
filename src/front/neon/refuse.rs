//! Refusals in Neon's dialect. The driver reads the JSON of an error only where the status is 400, and then gives its
//! code to the program; any other status becomes a text. So whatever a program can act on (who it is, which limit it
//! met) is 400 with Postgres' code, and other statuses are for what balancers and operators act on.

use hyper::{
    Response, StatusCode,
    header::{self, HeaderValue},
};

use crate::{
    front::{
        http::{Body, body},
        postgres::{Denied, Options},
    },
    refusal::Refusal,
    wire::{
        neon::reply,
        postgres::backend::{Report, field},
    },
};

/// The status of a refusal at the door.
pub fn status(refusal: &Refusal) -> StatusCode {
    match refusal {
        Refusal::BadToken(_)
        | Refusal::UnknownOrg
        | Refusal::Suspended
        | Refusal::Revoked
        | Refusal::PlaintextToken
        | Refusal::Forbidden { .. }
        | Refusal::Malformed { .. }
        | Refusal::OverLimit(_) => StatusCode::BAD_REQUEST,
        Refusal::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        Refusal::Full | Refusal::CatalogDown | Refusal::Draining => StatusCode::SERVICE_UNAVAILABLE,
        Refusal::UpstreamDown => StatusCode::BAD_GATEWAY,
        Refusal::UpstreamSlow => StatusCode::GATEWAY_TIMEOUT,
        Refusal::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The answer of an ordinary interface, where a status says what a code says elsewhere.
pub fn rest(refusal: &Refusal) -> Response<Body> {
    metrics::counter!("dynabase_refusals_total", "protocol" => "neon", "reason" => refusal.kind()).increment(1);
    let (status, message) = match refusal {
        Refusal::BadToken(_) | Refusal::UnknownOrg | Refusal::Revoked => {
            (StatusCode::UNAUTHORIZED, "the token is not valid here".to_owned())
        }
        Refusal::PlaintextToken => {
            (StatusCode::FORBIDDEN, "a token may not travel in clear text: use https".to_owned())
        }
        Refusal::Suspended => (StatusCode::FORBIDDEN, "the tenant is suspended".to_owned()),
        Refusal::Forbidden { what } => (StatusCode::FORBIDDEN, format!("{what} is not available to tenants")),
        Refusal::Malformed { what } => (StatusCode::BAD_REQUEST, (*what).to_owned()),
        Refusal::TooLarge { max_bytes } => {
            (StatusCode::PAYLOAD_TOO_LARGE, format!("the request is too large (max is {max_bytes} bytes)"))
        }
        Refusal::OverLimit(over) => (
            StatusCode::TOO_MANY_REQUESTS,
            format!("too many {}: tier {} allows {}", over.limit.label(), over.tier, over.max),
        ),
        Refusal::Full | Refusal::Draining => (StatusCode::SERVICE_UNAVAILABLE, "try again".to_owned()),
        Refusal::CatalogDown => {
            (StatusCode::SERVICE_UNAVAILABLE, "the tenant catalog is not reachable at the moment".to_owned())
        }
        Refusal::UpstreamDown => (StatusCode::BAD_GATEWAY, "the database is not reachable at the moment".to_owned()),
        Refusal::UpstreamSlow => (StatusCode::GATEWAY_TIMEOUT, "the database did not answer in time".to_owned()),
        Refusal::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal error".to_owned()),
    };
    let mut response = body::error(status, refusal.kind(), &message);
    if let Some(wait) = refusal.retry_after() {
        let seconds = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).div_ceil(1000).max(1);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// The answer to a caller that was not let in.
pub fn denied(denied: &Denied, options: &Options) -> Response<Body> {
    let status = match denied {
        Denied::Refusal(refusal) => status(refusal),
        Denied::UnknownUser | Denied::UnknownDatabase => StatusCode::BAD_REQUEST,
    };
    metrics::counter!("dynabase_refusals_total", "protocol" => "neon", "reason" => denied.reason()).increment(1);
    report(status, &denied.report(options))
}

/// An error of our own.
pub fn report(status: StatusCode, report: &Report) -> Response<Body> {
    let mut message = Vec::new();
    report.put(&mut message);
    with_retry(status, &message)
}

/// An ErrorResponse of the session: the server's, or the relay's for it.
pub fn server(message: &[u8]) -> Response<Body> {
    let is_fatal = field(message, b'V') == Some(b"FATAL");
    let status = match field(message, b'C') {
        // The relay's words for a server that it can't reach or has lost, and for a session that has to end.
        Some(b"57P03" | b"08006") if is_fatal => StatusCode::BAD_GATEWAY,
        Some(b"57P01") if is_fatal => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_REQUEST,
    };
    with_retry(status, message)
}

/// An error that is not the database's.
pub fn plain(status: StatusCode, text: &str) -> Response<Body> {
    body::json(status, reply::plain_error(text))
}

fn with_retry(status: StatusCode, message: &[u8]) -> Response<Body> {
    let mut response = body::json(status, reply::error(message));
    if let Some(seconds) = retry_after(message) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// When trying again may help, in whole seconds: where a limit says so.
fn retry_after(message: &[u8]) -> Option<u64> {
    if !matches!(field(message, b'C')?, b"53300" | b"53400") {
        return None;
    }
    let detail = std::str::from_utf8(field(message, b'D')?).ok()?;
    if !detail.starts_with("limit=") {
        return None;
    }
    let ms = detail.split(' ').find_map(|pair| pair.strip_prefix("retry_after_ms=")).and_then(|ms| ms.parse().ok());
    Some(ms.map_or(1, |ms: u64| ms.div_ceil(1000).max(1)))
}
