//! What browsers need before a page may read an answer, as Convex itself says it: the page's origin and the headers
//! that it asks for, credentials allowed, nothing exposed.

use hyper::{
    HeaderMap, Response, StatusCode,
    header::{self, HeaderValue},
};

use super::super::http::{Body, body};

/// Methods of Convex' own API.
const METHODS: &str = "GET, POST, OPTIONS, PATCH, DELETE, PUT";

/// How long a browser need not ask again, in seconds: a day.
const MAX_AGE: &str = "86400";

/// Lets the page that sent `request` read the answer with these headers.
pub fn allow(answer: &mut HeaderMap, request: &HeaderMap) {
    let Some(origin) = request.get(header::ORIGIN) else { return };
    answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    answer.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    answer.append(header::VARY, HeaderValue::from_static("Origin"));
}

/// The answer to a preflight, which carries no token.
pub fn preflight(request: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    allow(headers, request);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
    if let Some(wanted) = request.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    response
}
