//! Tier transitions and the steps of tenants' lives over HTTP: begin one, look at one, hear of every change.

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    Response, StatusCode,
    body::{Bytes, Frame},
    header::{self, HeaderValue},
};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::{Receiver, error::RecvError};

use super::{
    State,
    route::Endpoint,
    server::{Answer, fault, json_of},
};
use crate::{
    catalog::{Entry, Fault},
    tenant::{OrgId, Tier},
    transition::{Act, Errand, Refused, Request, described, holdings_json, participant::Trouble},
};

/// A comment line for who listens, so that both ends see that the other one is there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The body of a request for another tier.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    tier: Tier,
    #[serde(default)]
    force: bool,
}

fn away() -> Answer {
    fault(StatusCode::SERVICE_UNAVAILABLE, "not_ready", "the process is starting")
}

/// The body of a request for a new tenant, and of one for a deletion.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Made {
    tier: Option<Tier>,
    /// Seconds.
    grace: Option<u64>,
}

/// Begins a step of a tenant's life: `PUT` and `DELETE /v1/tenants/{org}`, `POST /v1/tenants/{org}/…`.
pub(super) async fn live(state: &State, endpoint: Endpoint, org: &str, body: &[u8]) -> Answer {
    let Some(coordinator) = state.transitions.get() else { return away() };
    let Some(org) = OrgId::parse(org) else {
        return fault(StatusCode::BAD_REQUEST, "bad_org", "not an organisation id");
    };
    let said = if body.is_empty() { Ok(Made::default()) } else { serde_json::from_slice(body) };
    let act = match (endpoint, said) {
        (Endpoint::Create, Ok(Made { tier: Some(tier), grace: None })) => Act::Create(tier),
        (Endpoint::Delete, Ok(Made { tier: None, grace })) => {
            Act::Delete(grace.map_or_else(|| coordinator.grace(), Duration::from_secs))
        }
        (Endpoint::Suspend, Ok(Made { tier: None, grace: None })) => Act::Suspend,
        (Endpoint::Resume, Ok(Made { tier: None, grace: None })) => Act::Resume,
        (Endpoint::Restore, Ok(Made { tier: None, grace: None })) => Act::Restore,
        (Endpoint::Purge, Ok(Made { tier: None, grace: None })) => Act::Purge,
        (Endpoint::Rotate, Ok(Made { tier: None, grace: None })) => Act::Rotate,
        _ => {
            let message = "to make one send {\"tier\": \"FREE|STARTER|PRO|ENTERPRISE\"}, to delete one perhaps \
                           {\"grace\": SECONDS}, else nothing";
            return fault(StatusCode::BAD_REQUEST, "bad_body", message);
        }
    };
    match coordinator.submit_errand(Errand { org: org.clone(), act, by: "admin" }).await {
        Ok(entry) => accepted(&entry),
        Err(Refused::Same) => json_of(StatusCode::OK, &json!({ "org_id": org, "state": "done", "id": null })),
        Err(refused) => refusal(&refused),
    }
}

/// `GET /v1/tenants/{org}/holdings`: what a purge would take away.
pub(super) async fn holdings(state: &State, org: &str) -> Answer {
    let Some(coordinator) = state.transitions.get() else { return away() };
    let Some(org) = OrgId::parse(org) else {
        return fault(StatusCode::BAD_REQUEST, "bad_org", "not an organisation id");
    };
    match coordinator.holdings(&org).await {
        Ok((record, held)) => json_of(StatusCode::OK, &holdings_json(&record, &held)),
        Err(Fault::Unknown) => refusal(&Refused::Unknown),
        Err(fault) => refusal(&Refused::Catalog(fault)),
    }
}

/// `PUT /v1/tenants/{org}/tier`.
pub(super) async fn begin(state: &State, org: &str, body: &[u8]) -> Answer {
    let Some(coordinator) = state.transitions.get() else { return away() };
    let Some(org) = OrgId::parse(org) else {
        return fault(StatusCode::BAD_REQUEST, "bad_org", "not an organisation id");
    };
    let Ok(Wanted { tier, force }) = serde_json::from_slice(body) else {
        let message =
            "send {\"tier\": \"FREE|STARTER|PRO|ENTERPRISE\"}, and \"force\": true if it may only shrink then";
        return fault(StatusCode::BAD_REQUEST, "bad_body", message);
    };
    match coordinator.submit(Request { org: org.clone(), to: tier, force, by: "admin" }).await {
        Ok(entry) => accepted(&entry),
        Err(Refused::Same) => {
            json_of(StatusCode::OK, &json!({ "org_id": org, "to": tier, "state": "done", "id": null }))
        }
        Err(refused) => refusal(&refused),
    }
}

/// It has begun; where to look.
fn accepted(entry: &Entry) -> Answer {
    let mut said = described(entry);
    said["transition_id"] = said["id"].clone();
    let mut answer = json_of(StatusCode::ACCEPTED, &said);
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/transitions/{}", entry.id)) {
        answer.headers_mut().insert(header::LOCATION, place);
    }
    answer
}

fn refusal(refused: &Refused) -> Answer {
    let (status, code) = match refused {
        Refused::Unknown => (StatusCode::NOT_FOUND, "unknown_org"),
        Refused::Same => (StatusCode::OK, "same"),
        Refused::Deleting => (StatusCode::CONFLICT, "deleting"),
        Refused::Exists | Refused::OtherTier { .. } => (StatusCode::CONFLICT, "exists"),
        Refused::Unmade => (StatusCode::CONFLICT, "unmade"),
        Refused::NotDeleted => (StatusCode::CONFLICT, "not_deleted"),
        Refused::Busy { .. } => (StatusCode::CONFLICT, "busy"),
        Refused::Over(_) => (StatusCode::CONFLICT, "over_limits"),
        Refused::Outdated => (StatusCode::CONFLICT, "outdated"),
        Refused::Participant { why: Trouble::No(_), .. } => (StatusCode::CONFLICT, "refused"),
        Refused::Participant { .. } => (StatusCode::SERVICE_UNAVAILABLE, "database_down"),
        Refused::Catalog(_) => (StatusCode::SERVICE_UNAVAILABLE, "catalog_down"),
    };
    let mut error = json!({ "code": code, "message": refused.to_string() });
    match refused {
        Refused::Over(over) => error["over"] = json!(over),
        Refused::Busy { id } => error["transition_id"] = json!(id),
        Refused::Participant { database, .. } => error["database"] = json!(database.label()),
        _ => {}
    }
    json_of(status, &json!({ "error": error }))
}

/// `GET /v1/transitions/{id}`.
pub(super) async fn show(state: &State, id: &str) -> Answer {
    let Some(coordinator) = state.transitions.get() else { return away() };
    match coordinator.catalog().transition(id).await {
        Ok(entry) => json_of(StatusCode::OK, &described(&entry)),
        Err(Fault::Unknown) => fault(StatusCode::NOT_FOUND, "unknown_transition", "there is no such transition"),
        Err(Fault::Damaged(what)) => fault(StatusCode::INTERNAL_SERVER_ERROR, "damaged", &what),
        Err(_) => fault(StatusCode::SERVICE_UNAVAILABLE, "catalog_down", "the catalog can't be asked right now"),
    }
}

/// `GET /v1/events`. Whoever reads too slowly loses the oldest ones, and is told so.
pub(super) fn events(state: &State) -> Answer {
    let Some(coordinator) = state.transitions.get() else { return away() };
    let frames = stream::unfold(coordinator.news(), |mut news| async move {
        let text = next(&mut news).await?;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(text))), news))
    });
    // The first bytes at once, so that a client knows that it listens.
    let hello = stream::once(async { Ok(Frame::data(Bytes::from_static(b": listening\n\n"))) });
    let body = StreamBody::new(futures_util::StreamExt::chain(hello, frames));
    let mut answer = Response::new(BodyExt::boxed(body));
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

async fn next(news: &mut Receiver<Arc<Entry>>) -> Option<String> {
    match tokio::time::timeout(KEEP_ALIVE, news.recv()).await {
        Err(_) => Some(": still here\n\n".to_owned()),
        Ok(Ok(entry)) => Some(format!("event: transition\nid: {}\ndata: {}\n\n", entry.id, described(&entry))),
        Ok(Err(RecvError::Lagged(lost))) => Some(format!("event: lost\ndata: {{\"events\":{lost}}}\n\n")),
        Ok(Err(RecvError::Closed)) => None,
    }
}
