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
    Tier,
    Branches,
    Branch,
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

/// One row. Where a path is read, HEAD goes where GET does.
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

pub(super) const ROUTES: [Route; 11] = [
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
        "Branches of a tenant's Neon home. POST {\"name\": \"…\"} makes one: a copy of its databases as they are now, \
         reached as database app@NAME with the tenant's own token.",
        &[
            ("201", "POST: made."),
            ("400", "Not an organisation id, or not a name: 1 to 40 of a-z, 0-9, - and _, a letter or digit first."),
            ("404", "The catalog knows no such organisation, or there are no Neon homes here."),
            ("409", "POST: there is one with this name."),
            ("422", "POST: the tenant's tier has no more."),
            ("423", "POST: the database is in use; try again when its sessions are idle."),
            ("502", "Neon, or the server of the homes, could not do it."),
            ("503", "The catalog can't be asked."),
        ],
    ),
    route(
        Endpoint::Branch,
        Access::Token,
        "/v1/tenants/{org}/branches/{name}",
        "Removes a branch with all that is in it; its sessions end.",
        &[
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
    /// The methods, with the words for who comes with another; HEAD goes where GET does.
    pub(super) fn methods(self) -> (&'static [Method], &'static str, &'static str) {
        match self {
            Endpoint::Tier => (&[Method::PUT], "PUT", "this path is written with PUT"),
            Endpoint::Branches => {
                (&[Method::GET, Method::POST], "GET, HEAD, POST", "this path is read with GET and takes POST")
            }
            Endpoint::Branch => (&[Method::DELETE], "DELETE", "this path takes DELETE"),
            _ => (&[Method::GET], "GET, HEAD", "this path is read with GET"),
        }
    }
}

/// The route of `path`, and the segments that stand for `{org}` or `{id}` and for `{name}`.
pub(super) fn find(path: &str) -> Option<(&'static Route, [&str; 2])> {
    ROUTES.iter().find_map(|route| {
        let (mut found, mut at) = ([""; 2], 0);
        let mut ours = path.split('/');
        for part in route.path.split('/') {
            let segment = ours.next()?;
            if part.starts_with('{') {
                *found.get_mut(at).filter(|_| !segment.is_empty())? = segment;
                at += 1;
            } else if part != segment {
                return None;
            }
        }
        ours.next().is_none().then_some((route, found))
    })
}

/// OpenAPI 3.1.
pub(super) fn openapi() -> Value {
    let paths: serde_json::Map<String, Value> = ROUTES.iter().map(|route| (route.path.into(), item(route))).collect();
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
        Endpoint::Tier | Endpoint::Transition => ("application/json", reference("Transition")),
        Endpoint::Branches => ("application/json", reference("Branches")),
        Endpoint::Events => ("text/event-stream", json!({ "type": "string" })),
        Endpoint::OpenApi | Endpoint::Branch => ("application/json", json!({ "type": "object" })),
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
        Endpoint::Tenant | Endpoint::Tier | Endpoint::Branches => {
            vec![parameter("org", "path", true, json!({ "type": "string" }))]
        }
        Endpoint::Branch => {
            ["org", "name"].map(|name| parameter(name, "path", true, json!({ "type": "string" }))).into()
        }
        Endpoint::Transition => vec![parameter("id", "path", true, json!({ "type": "string" }))],
        _ => Vec::new(),
    };
    let security = match route.access {
        Access::Anyone => json!([]),
        Access::Token => json!([{ "token": [] }]),
    };
    let operation =
        json!({ "summary": route.summary, "parameters": parameters, "security": security, "responses": responses });
    let methods = route.endpoint.methods().0.iter().map(|it| (it.as_str().to_ascii_lowercase(), operation.clone()));
    Value::Object(methods.collect())
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
            "sessions": number,
            "protocols": list(object(json!({
                "protocol": text, "sessions": count, "connections": count, "stored_bytes": number,
            }))),
        })),
        "Transition": object(json!({
            "id": text, "org_id": text, "from": text, "to": text, "epoch": number, "reason": text,
            "state": { "type": "string", "enum": ["preparing", "committed", "aborting", "done", "aborted"] },
            "participants": list(object(json!({ "database": text, "state": text, "calls": number, "note": text }))),
            "over": list(object(json!({ "database": text, "what": text, "used": number, "max": number }))),
        })),
        "Branches": object(json!({
            "branches": list(object(json!({ "name": text, "database": text }))), "max": number,
        })),
        "TenantPage": object(json!({ "tenants": list(reference("Tenant")), "next": text })),
    })
}
