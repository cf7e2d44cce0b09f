//! Refusals in Convex's language. One form for programs (`errorData` of a call, the body of an HTTP answer), one for
//! people, a status, and the code of a closing socket.
//!
//! What clients do with them was seen with the npm, PyPI and crates.io clients: a failed call with `errorData` rejects
//! that call and leaves the socket; a close makes them reconnect, those of 1013 in no hurry where the reason begins
//! with `TooManyConcurrentRequests`; a `FatalError` ends a Node process, so none is ever sent.

use bytes::Bytes;
use hyper::{
    HeaderMap, Response, StatusCode,
    header::{self, HeaderValue},
};
use serde_json::{Value, json};

use super::{super::http::Body, super::http::body, cors};
use crate::refusal::{Limit, Over, Refusal};

/// The service restarts or moves: come back at once. RFC 6455's registry.
pub const RESTART: u16 = 1012;
/// Try again later.
pub const LATER: u16 = 1013;
/// The peer broke the protocol.
pub const PROTOCOL: u16 = 1002;

/// A refusal, said in every way that Convex' clients may need.
#[derive(Clone, Debug, PartialEq)]
pub struct Words {
    /// Of an HTTP answer.
    pub status: StatusCode,
    /// A close code.
    pub close: u16,
    /// As Convex writes its own: `TooManyConcurrentRequests`.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// For programs.
    data: Value,
}

impl Words {
    /// `errorData`: JSON.
    pub fn data(&self) -> String {
        self.data.to_string()
    }

    /// The reason of a close frame, which has at most 123 bytes.
    pub fn reason(&self) -> String {
        let mut reason = format!("{}: {}", self.code, self.message);
        let mut end = reason.len().min(123);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
        reason
    }
}

/// What a refusal is called here.
pub fn words(refusal: &Refusal) -> Words {
    let plain = |status, close, code, name: &str, message: &str| Words {
        status,
        close,
        code,
        message: message.to_owned(),
        data: json!({"code": name, "message": message}),
    };
    match refusal {
        // One text for all: it does not say what is wrong with a credential.
        Refusal::BadToken(_) | Refusal::UnknownOrg => plain(
            StatusCode::UNAUTHORIZED,
            LATER,
            "Unauthenticated",
            "unauthenticated",
            "a valid token of your organization is needed",
        ),
        Refusal::Revoked => plain(
            StatusCode::UNAUTHORIZED,
            RESTART,
            "Unauthenticated",
            "token_expired",
            "the token has expired or was revoked",
        ),
        Refusal::Suspended => plain(
            StatusCode::FORBIDDEN,
            RESTART,
            "TenantSuspended",
            "suspended",
            "this organization is suspended: ask your provider",
        ),
        Refusal::PlaintextToken => plain(
            StatusCode::FORBIDDEN,
            LATER,
            "TlsRequired",
            "tls_required",
            "a token may not travel over plaintext: use https://",
        ),
        Refusal::Forbidden { what } => plain(StatusCode::FORBIDDEN, LATER, "Forbidden", "forbidden", what),
        Refusal::Malformed { what } => plain(StatusCode::BAD_REQUEST, PROTOCOL, "BadRequest", "bad_request", what),
        Refusal::TooLarge { max_bytes } => {
            let message = format!("larger than the {} that your tier allows", size(*max_bytes));
            Words {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                close: 1009,
                code: "PayloadTooLarge",
                data: json!({"code": "payload_too_large", "message": message, "maxBytes": max_bytes}),
                message,
            }
        }
        Refusal::OverLimit(over) => over_limit(over),
        Refusal::Full => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            LATER,
            "TooManyConcurrentRequests",
            "overloaded",
            "the service is full: try again in some seconds",
        ),
        Refusal::UpstreamDown => plain(
            StatusCode::BAD_GATEWAY,
            LATER,
            "DeploymentUnreachable",
            "upstream_down",
            "the Convex deployment can't be reached: try again",
        ),
        Refusal::UpstreamSlow => plain(
            StatusCode::GATEWAY_TIMEOUT,
            LATER,
            "SystemTimeoutError",
            "upstream_slow",
            "the Convex deployment did not answer in time",
        ),
        Refusal::CatalogDown => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            LATER,
            "ServiceUnavailable",
            "unavailable",
            "it can't be found out right now who you are: try again",
        ),
        Refusal::Draining => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            RESTART,
            "ServerRestart",
            "restarting",
            "this process is going down: connect again",
        ),
        Refusal::Internal => {
            plain(StatusCode::INTERNAL_SERVER_ERROR, 1011, "InternalServerError", "internal", "an internal error")
        }
    }
}

fn over_limit(over: &Over) -> Words {
    let Over { tier, max, in_use, limit, retry_after } = over;
    let (status, code, what) = match limit {
        Limit::Rate => (StatusCode::TOO_MANY_REQUESTS, "QuotaExceeded", "function calls per minute"),
        Limit::Subscriptions => (StatusCode::TOO_MANY_REQUESTS, "QuotaExceeded", "subscribed queries"),
        Limit::InFlight => {
            (StatusCode::TOO_MANY_REQUESTS, "TooManyConcurrentRequests", "mutations and actions at a time")
        }
        Limit::ClientSockets => (StatusCode::TOO_MANY_REQUESTS, "TooManyConcurrentRequests", "connections"),
        // Limits of other databases; nothing here meets them.
        Limit::Connections
        | Limit::Storage
        | Limit::StatementTimeout
        | Limit::IdleInTransaction
        | Limit::Keys
        | Limit::Memory
        | Limit::Cursors
        | Limit::Collections
        | Limit::Indexes
        | Limit::Branches => (StatusCode::TOO_MANY_REQUESTS, "QuotaExceeded", limit.label()),
    };
    let retry_ms = retry_after.map(|wait| wait.as_millis().max(1));
    let hint = match (limit, retry_ms) {
        (_, Some(ms)) => format!("retry in {ms} ms"),
        (Limit::Subscriptions, None) => "end one that you no longer need, or raise the tier".into(),
        (_, None) => "wait for one to end, or raise the tier".into(),
    };
    let message = format!("tier {tier} allows {max} {what}: {hint}");
    let data = json!({
        "code": "quota_exceeded", "limit": limit.label(), "tier": tier.name(), "max": max, "inUse": in_use,
        "retryAfterMs": retry_ms.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX)), "message": message,
    });
    Words { status, close: LATER, code, message, data }
}

fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 && b % (1 << 30) == 0 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{} MiB", b >> 20),
        b => format!("{b} bytes"),
    }
}

/// A refusal as an HTTP answer, readable by the page that asked.
pub fn response(refusal: &Refusal, request: &HeaderMap) -> Response<Body> {
    let words = words(refusal);
    let json = json!({"code": words.code, "message": words.message, "data": words.data});
    let mut response = body::json(words.status, Bytes::from(json.to_string()));
    if let Some(wait) = refusal.retry_after() {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    cors::allow(response.headers_mut(), request);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{refusal::TokenFault, tenant::Tier};

    #[test]
    fn a_limit_says_which_how_much_and_what_to_do() {
        let over = Over { limit: Limit::Subscriptions, tier: Tier::Free, max: 50, in_use: 50, retry_after: None };
        let words = words(&Refusal::OverLimit(over));
        assert_eq!((words.status.as_u16(), words.code), (429, "QuotaExceeded"));
        assert!(words.message.contains("FREE") && words.message.contains("50"), "{}", words.message);
        let data: Value = serde_json::from_str(&words.data()).expect("JSON");
        assert_eq!((&data["code"], &data["limit"]), (&"quota_exceeded".into(), &"subscriptions".into()));
    }

    #[test]
    fn what_is_wrong_with_a_credential_is_not_told() {
        let one = words(&Refusal::BadToken(TokenFault::Expired));
        assert_eq!(one, words(&Refusal::UnknownOrg));
        assert_eq!(one, words(&Refusal::BadToken(TokenFault::Signature)));
    }

    #[test]
    fn a_reason_fits_a_close_frame() {
        let over = Over { limit: Limit::Rate, tier: Tier::Enterprise, max: 1 << 40, in_use: 1, retry_after: None };
        for refusal in [Refusal::OverLimit(over), Refusal::CatalogDown, Refusal::TooLarge { max_bytes: 1 << 30 }] {
            assert!(words(&refusal).reason().len() <= 123);
        }
    }
}
