//! Branches of a tenant's Neon home, for operators; tenants have the same at `/neon/branches` of the HTTP port.

use std::sync::Arc;

use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    State,
    server::{Answer, fault, json_of},
};
use crate::{
    quota::Slot,
    upstream::neon::{BranchError, Branches},
};

/// The body of a request for a branch.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    name: String,
}

/// `GET /v1/tenants/{org}/branches`.
pub(super) async fn list(state: &State, slot: &Arc<Slot>) -> Answer {
    let Some(branches) = state.branches.get() else { return none_here() };
    let max = slot.policy().limits.neon.branches;
    match branches.list(slot.org()).await {
        Ok(list) => {
            let list: Vec<Value> = list.iter().map(Branches::described).collect();
            json_of(StatusCode::OK, &json!({"branches": list, "max": max}))
        }
        Err(error) => failed(&error),
    }
}

/// `POST /v1/tenants/{org}/branches`.
pub(super) async fn make(state: &State, slot: &Arc<Slot>, body: &[u8]) -> Answer {
    let Some(branches) = state.branches.get() else { return none_here() };
    let Ok(Wanted { name }) = serde_json::from_slice(body) else {
        return fault(StatusCode::BAD_REQUEST, "bad_body", "send {\"name\": \"…\"}");
    };
    match branches.make(slot, name).await {
        Ok(Ok(branch)) => json_of(StatusCode::CREATED, &Branches::described(&branch)),
        Ok(Err(error)) => failed(&error),
        Err(_) => broken(),
    }
}

/// `DELETE /v1/tenants/{org}/branches/{name}`.
pub(super) async fn remove(state: &State, slot: &Arc<Slot>, name: &str) -> Answer {
    let Some(branches) = state.branches.get() else { return none_here() };
    match branches.remove(slot, name.to_owned()).await {
        Ok(Ok(())) => json_of(StatusCode::OK, &json!({"name": name, "removed": true})),
        Ok(Err(error)) => failed(&error),
        Err(_) => broken(),
    }
}

fn none_here() -> Answer {
    fault(StatusCode::NOT_FOUND, "no_neon", "this installation has no [upstream.neon]")
}

fn broken() -> Answer {
    fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", "internal error")
}

fn failed(error: &BranchError) -> Answer {
    let (status, code) = error.answer();
    fault(status, code, &error.to_string())
}
