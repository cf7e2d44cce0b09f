//! `/neon/branches`: a tenant's own branches, with its token as bearer.

use std::{sync::Arc, time::Duration};

use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
};
use serde::Deserialize;
use serde_json::json;

use super::{Server, refuse};
use crate::{
    front::http::{Body, Client, body, host},
    refusal::{Refusal, TokenFault},
    session::Session,
    tenant::Protocol,
    upstream::neon::{BranchError, Branches},
};

/// Longest body: a name.
const BODY_MAX: usize = 4 * 1024;

/// How long a body may take to come.
const BODY_WITHIN: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    name: String,
}

/// Answers one request below `/neon/branches`; `name` is what follows, if anything does.
pub async fn answer(
    server: &Arc<Server>,
    branches: &Arc<Branches>,
    request: Request<Incoming>,
    client: &Client,
    name: Option<String>,
) -> Response<Body> {
    let host_org = match host(&request) {
        Ok(host) => host.and_then(|host| server.host_org(host)),
        Err(refusal) => return refuse::rest(&refusal),
    };
    let (parts, incoming) = request.into_parts();
    let token = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let Some(token) = token else {
        return body::error(StatusCode::UNAUTHORIZED, "unauthorized", "send your token: Authorization: Bearer TOKEN");
    };
    let session = match admit(server, token.trim_ascii(), client).await {
        Ok(session) if host_org.as_ref().is_none_or(|org| org == session.slot().org()) => session,
        Ok(_) => return refuse::rest(&Refusal::BadToken(TokenFault::BadOrg)),
        Err(refusal) => return refuse::rest(&refusal),
    };
    client.admitted();
    let slot = Arc::clone(session.slot());
    let done = match (&parts.method, name) {
        (&Method::GET, None) => branches.list(slot.org()).await.map(|list| {
            let max = slot.policy().limits.neon.branches;
            let list: Vec<_> = list.iter().map(Branches::described).collect();
            body::json(StatusCode::OK, json!({"branches": list, "max": max}).to_string())
        }),
        (&Method::POST, None) => {
            let wanted = body::read(incoming, BODY_MAX, BODY_WITHIN).await;
            let Some(wanted) = wanted.ok().and_then(|bytes| serde_json::from_slice::<Wanted>(&bytes).ok()) else {
                return body::error(StatusCode::BAD_REQUEST, "bad_request", "the body has to be {\"name\": \"…\"}");
            };
            match branches.make(&slot, wanted.name).await {
                Ok(made) => {
                    made.map(|branch| body::json(StatusCode::CREATED, Branches::described(&branch).to_string()))
                }
                Err(_) => return refuse::rest(&Refusal::Internal),
            }
        }
        (&Method::DELETE, Some(name)) => match branches.remove(&slot, name).await {
            Ok(removed) => removed.map(|()| {
                let mut response = Response::new(body::empty());
                *response.status_mut() = StatusCode::NO_CONTENT;
                response
            }),
            Err(_) => return refuse::rest(&Refusal::Internal),
        },
        (_, name) => {
            let mut response =
                body::error(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path takes other methods");
            let allow = if name.is_some() { "DELETE" } else { "GET, POST" };
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
            return response;
        }
    };
    done.unwrap_or_else(|error| failed(&error))
}

async fn admit(server: &Arc<Server>, token: &[u8], client: &Client) -> Result<Session, Refusal> {
    server.postgres.may_carry(client.transport)?;
    let session = server.postgres.admit(token, Protocol::Neon).await?;
    session.take(1).map_err(Refusal::OverLimit)?;
    Ok(session)
}

fn failed(error: &BranchError) -> Response<Body> {
    let (status, code) = error.answer();
    let words = match error {
        BranchError::BadName
        | BranchError::Exists
        | BranchError::Unknown
        | BranchError::Over(_)
        | BranchError::Elsewhere
        | BranchError::InUse => error.to_string(),
        // What is wrong inside is for operators.
        BranchError::Catalog(_) | BranchError::Home(_) => {
            tracing::error!(%error, "a branch could not be made or removed");
            "it can't be done at the moment: try again".to_owned()
        }
    };
    body::error(status, code, &words)
}
