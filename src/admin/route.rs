//! Which endpoints there are: the one table that requests are matched against and that `/openapi.json` is made of.

use hyper::Method;
use serde_json::{Value, json};

use super::tenants::PAGE_MAX;

/// What answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Live,
    Ready,
    Metrics,
    Tenants,
    Tenant,
    Create,
    Delete,
    Holdings,
    Suspend,
    Resume,
    Restore,
    Purge,
    Rotate,
    Tier,
    Branches,
    MakeBranch,
    RemoveBranch,
    Transition,
    Events,
    OpenApi,
}

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Anyone,
    Token,
}

/// One row. HEAD goes where GET does.
pub(super) struct Route {
    pub(super) endpoint: Endpoint,
    pub(super) access: Access,
    /// `{org}`, `{id}` or `{name}` stands for one segment.
    pub(super) path: &'static str,
    summary: &'static str,
    /// Statuses beyond 200, and 401 where a token is needed.
    statuses: &'static [(&'static str, &'static str)],
}

const fn route(
    endpoint: Endpoint,
    access: Access,
    path: &'static str,
    summary: &'static str,
    statuses: &'static [(&'static str, &'static str)],
) -> Route {
    Route { endpoint, access, path, summary, statuses }
}

/// Of every step of a tenant's life.
const LIFE: [(&str, &str); 5] = [
    ("202", "Begun; its id leads to /v1/transitions/{id}."),
    ("400", "Not an organisation id, or a body that does not belong here."),
    ("404", "The catalog knows no such organisation."),
    ("409", "Not now: another transition is open, or the tenant is not where this begins."),
    ("503", "The catalog can't be asked; nothing was changed."),
];

pub(super) const ROUTES: [Route; 20] = [
    route(Endpoint::Live, Access::Anyone, "/livez", "Whether the process runs.", &[]),
    route(
        Endpoint::Ready,
        Access::Anyone,
        "/readyz",
        "Whether traffic should come here, and why not.",
        &[("503", "Not ready; the reasons are in the body.")],
    ),
    route(Endpoint::Metrics, Access::Token, "/metrics", "Metrics as Prometheus text.", &[]),
    route(
        Endpoint::Tenants,
        Access::Token,
        "/v1/tenants",
        "Tenants in memory: record and use, in the order of their ids.",
        &[("400", "A query parameter is wrong.")],
    ),
    route(
        Endpoint::Tenant,
        Access::Token,
        "/v1/tenants/{org}",
        "One tenant; loaded from the catalog if it is not in memory.",
        &[
            ("400", "Not an organisation id."),
            ("404", "The catalog knows no such organisation."),
            ("503", "The catalog can't be asked."),
        ],
    ),
    route(
        Endpoint::Create,
        Access::Token,
        "/v1/tenants/{org}",
        "Makes a tenant of {\"tier\": \"FREE\"}: its place on every database, then it is served.",
        &LIFE,
    ),
    route(
        Endpoint::Delete,
        Access::Token,
        "/v1/tenants/{org}",
        "Deletes a tenant: refused from now on, its data purged after the grace, which {\"grace\": SECONDS} may name.",
        &LIFE,
    ),
    route(
        Endpoint::Holdings,
        Access::Token,
        "/v1/tenants/{org}/holdings",
        "What every database holds of a tenant: what a purge would take away.",
        &[("404", "The catalog knows no such organisation."), ("503", "The catalog can't be asked.")],
    ),
    route(Endpoint::Suspend, Access::Token, "/v1/tenants/{org}/suspend", "Refuses a tenant; its data stays.", &LIFE),
    route(Endpoint::Resume, Access::Token, "/v1/tenants/{org}/resume", "Serves a suspended tenant again.", &LIFE),
    route(Endpoint::Restore, Access::Token, "/v1/tenants/{org}/restore", "Takes a deletion back.", &LIFE),
    route(Endpoint::Purge, Access::Token, "/v1/tenants/{org}/purge", "Purges a deleted tenant now.", &LIFE),
    route(
        Endpoint::Rotate,
        Access::Token,
        "/v1/tenants/{org}/rotate",
        "Gives a tenant the next generation of its derived credentials.",
        &LIFE,
    ),
    route(
        Endpoint::Tier,
        Access::Token,
        "/v1/tenants/{org}/tier",
        "Begins the transition of a tenant to another tier, in all of its databases or in none.",
        &[
            ("202", "Begun; its id leads to /v1/transitions/{id}."),
            ("400", "Not an organisation id, or not {\"tier\": \"PRO\"} with perhaps \"force\": true."),
            ("404", "The catalog knows no such organisation."),
            ("409", "Not now: another transition is open, or the tenant has more than the tier allows."),
            ("503", "The catalog or a database can't be asked; nothing was changed."),
        ],
    ),
    route(
        Endpoint::Branches,
        Access::Token,
        "/v1/tenants/{org}/branches",
        "Branches of a tenant's Neon home.",
        &[
            ("400", "Not an organisation id."),
            ("404", "The catalog knows no such organisation, or there are no Neon homes here."),
            ("503", "The catalog can't be asked."),
        ],
    ),
    route(
        Endpoint::MakeBranch,
        Access::Token,
        "/v1/tenants/{org}/branches",
        "Makes the branch {\"name\": \"…\"}: a copy of the home's databases as they are now, reached as database app@NAME \
         with the tenant's own token.",
        &[
            ("201", "Made."),
            ("400", "Not an organisation id, or not a name: 1 to 40 of a-z, 0-9, - and _, a letter or digit first."),
            ("404", "The catalog knows no such organisation, or there are no Neon homes here."),
            ("409", "There is one with this name."),
            ("422", "The tenant's tier has no more."),
            ("423", "The database is in use; try again when its sessions are idle."),
            ("502", "Neon, or the server of the homes, could not do it."),
            ("503", "The catalog can't be asked."),
        ],
    ),
    route(
        Endpoint::RemoveBranch,
        Access::Token,
        "/v1/tenants/{org}/branches/{name}",
        "Removes a branch with all that is in it; its sessions end.",
        &[
            ("400", "Not an organisation id."),
            ("404", "No such organisation or branch."),
            ("502", "Neon, or the server of the homes, could not do it; the branch's name leads nowhere any more."),
            ("503", "The catalog can't be asked."),
        ],
    ),
    route(
        Endpoint::Transition,
        Access::Token,
        "/v1/transitions/{id}",
        "One transition: how far it is in each database.",
        &[("404", "No such transition."), ("503", "The catalog can't be asked.")],
    ),
    route(Endpoint::Events, Access::Token, "/v1/events", "Server-sent events: every change of a transition.", &[]),
    route(Endpoint::OpenApi, Access::Token, "/openapi.json", "This description.", &[]),
];

impl Endpoint {
    /// Its method; HEAD beside GET.
    pub(super) fn method(self) -> Method {
        match self {
            Endpoint::Tier | Endpoint::Create => Method::PUT,
            Endpoint::Delete | Endpoint::RemoveBranch => Method::DELETE,
            Endpoint::Suspend
            | Endpoint::Resume
            | Endpoint::Restore
            | Endpoint::Purge
            | Endpoint::Rotate
            | Endpoint::MakeBranch => Method::POST,
            Endpoint::Live
            | Endpoint::Ready
            | Endpoint::Metrics
            | Endpoint::Tenants
            | Endpoint::Tenant
            | Endpoint::Holdings
            | Endpoint::Branches
            | Endpoint::Transition
            | Endpoint::Events
            | Endpoint::OpenApi => Method::GET,
        }
    }
}

/// The routes of `path`, one for each method, and the segments that stand for `{org}` or `{id}` and for `{name}`.
/// Empty: no such path.
pub(super) fn find(path: &str) -> (Vec<&'static Route>, [&str; 2]) {
    let mut found = (Vec::new(), [""; 2]);
    for route in &ROUTES {
        if let Some(segments) = fits(route.path, path) {
            found.0.push(route);
            found.1 = segments;
        }
    }
    found
}

fn fits<'p>(pattern: &str, path: &'p str) -> Option<[&'p str; 2]> {
    let (mut segments, mut at) = ([""; 2], 0);
    let mut ours = path.split('/');
    for part in pattern.split('/') {
        let segment = ours.next()?;
        if part.starts_with('{') {
            *segments.get_mut(at).filter(|_| !segment.is_empty())? = segment;
            at += 1;
        } else if part != segment {
            return None;
        }
    }
    ours.next().is_none().then_some(segments)
}

/// OpenAPI 3.1.
pub(super) fn openapi() -> Value {
    let mut paths = serde_json::Map::new();
    for route in &ROUTES {
        let methods = paths.entry(route.path).or_insert_with(|| json!({}));
        methods[route.endpoint.method().as_str().to_ascii_lowercase()] = item(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": "dynabase admin", "version": env!("CARGO_PKG_VERSION"), "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" } },
        "paths": paths,
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "schemas": schemas(),
        },
    })
}

fn item(route: &Route) -> Value {
    let (content_type, schema) = match route.endpoint {
        Endpoint::Live | Endpoint::Metrics => ("text/plain", json!({ "type": "string" })),
        Endpoint::Ready => ("application/json", reference("Readiness")),
        Endpoint::Tenants => ("application/json", reference("TenantPage")),
        Endpoint::Tenant => ("application/json", reference("Tenant")),
        Endpoint::Holdings => ("application/json", reference("Holdings")),
        Endpoint::Branches => ("application/json", reference("Branches")),
        Endpoint::Tier
        | Endpoint::Transition
        | Endpoint::Create
        | Endpoint::Delete
        | Endpoint::Suspend
        | Endpoint::Resume
        | Endpoint::Restore
        | Endpoint::Purge
        | Endpoint::Rotate => ("application/json", reference("Transition")),
        Endpoint::Events => ("text/event-stream", json!({ "type": "string" })),
        Endpoint::OpenApi | Endpoint::MakeBranch | Endpoint::RemoveBranch => {
            ("application/json", json!({ "type": "object" }))
        }
    };
    let mut responses = serde_json::Map::new();
    responses.insert("200".into(), json!({ "description": "OK", "content": { content_type: { "schema": schema } } }));
    let unauthorized = ("401", "No bearer token, or not the right one.");
    for (status, description) in route.statuses.iter().chain((route.access == Access::Token).then_some(&unauthorized)) {
        let schema = reference(if route.endpoint == Endpoint::Ready { "Readiness" } else { "Error" });
        let content = json!({ "application/json": { "schema": schema } });
        responses.insert((*status).into(), json!({ "description": description, "content": content }));
    }
    let parameter = |name: &str, place: &str, required: bool, schema: Value| json!({ "name": name, "in": place, "required": required, "schema": schema });
    let parameters = match route.endpoint {
        Endpoint::Tenants => vec![
            parameter("limit", "query", false, json!({ "type": "integer", "minimum": 1, "maximum": PAGE_MAX })),
            parameter("after", "query", false, json!({ "type": "string" })),
        ],
        Endpoint::Transition => vec![parameter("id", "path", true, json!({ "type": "string" }))],
        Endpoint::RemoveBranch => {
            ["org", "name"].map(|name| parameter(name, "path", true, json!({ "type": "string" }))).into()
        }
        _ if route.path.contains("{org}") => vec![parameter("org", "path", true, json!({ "type": "string" }))],
        _ => Vec::new(),
    };
    let security = match route.access {
        Access::Anyone => json!([]),
        Access::Token => json!([{ "token": [] }]),
    };
    json!({ "summary": route.summary, "parameters": parameters, "security": security, "responses": responses })
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

fn schemas() -> Value {
    let text = json!({ "type": "string" });
    let number = json!({ "type": "integer", "minimum": 0 });
    let object = |properties: Value| json!({ "type": "object", "properties": properties });
    let list = |items: Value| json!({ "type": "array", "items": items });
    let count = object(json!({ "used": number, "max": number }));
    json!({
        "Error": object(json!({ "error": object(json!({ "code": text, "message": text })) })),
        "Readiness": object(json!({
            "ready": { "type": "boolean" },
            "reasons": list(object(json!({ "code": text, "message": text }))),
        })),
        "Tenant": object(json!({
            "org": text,
            "tier": { "type": "string", "enum": ["FREE", "STARTER", "PRO", "ENTERPRISE"] },
            "status": { "type": "string", "enum": ["active", "suspended", "deleting"] },
            "epoch": number,
            "home": { "type": "string", "enum": ["main", "neon"] },
            "sessions": number,
            "protocols": list(object(json!({
                "protocol": text, "sessions": count, "connections": count, "stored_bytes": number,
            }))),
        })),
        "Transition": object(json!({
            "id": text, "deed": text, "org_id": text, "from": text, "to": text, "epoch": number, "reason": text,
            "state": { "type": "string", "enum": ["preparing", "committed", "aborting", "done", "aborted"] },
            "participants": list(object(json!({ "database": text, "state": text, "calls": number, "note": text }))),
            "over": list(object(json!({ "database": text, "what": text, "used": number, "max": number }))),
        })),
        "Holdings": object(json!({
            "org_id": text, "status": text, "purge_after": text,
            "databases": list(object(json!({
                "database": text, "why": text,
                "holdings": list(object(json!({ "what": text, "count": number, "bytes": number }))),
            }))),
        })),
        "Branches": object(json!({
            "branches": list(object(json!({ "name": text, "database": text }))), "max": number,
        })),
        "TenantPage": object(json!({ "tenants": list(reference("Tenant")), "next": text })),
    })
}
