//! What the server must not be asked, or not in this form: answered here.
//!
//! Figures of the server's own would be other tenants' as well; `shared.rs` answers what concerns a whole database or
//! collection under `filter` isolation, from the tenant's own documents.

pub(super) mod shared;

use std::sync::Arc;

use super::{
    client::Client,
    commands::{self, Emulate},
    refuse::{self, Answer, Repeat},
    rewrite::Local,
    tenancy::{Tenancy, Way},
};
use crate::{
    quota::clock,
    refusal::Refusal,
    tenant::{DEFAULT_NAME, Isolation, Protocol},
    upstream::mongo::Error,
    wire::mongo::bson::{self, Document, Index},
};

/// `{ok: 1}`.
pub fn put_ok(out: &mut Vec<u8>) {
    let reply = bson::open(out);
    bson::put_f64(out, "ok", 1.0);
    bson::close(out, reply);
}

/// The answers to who has not logged in; `login::is_open` says which there are.
pub fn put_open(client: &Client, emulate: Emulate, out: &mut Vec<u8>) {
    let reply = bson::open(out);
    match emulate {
        Emulate::BuildInfo => put_build(client, out),
        Emulate::ConnectionStatus => put_status(client, out),
        _ => {}
    }
    bson::put_f64(out, "ok", 1.0);
    bson::close(out, reply);
}

/// Answers a command of who is logged in.
///
/// # Errors
/// What the client gets instead.
pub async fn put(
    client: &mut Client,
    tenancy: &Arc<Tenancy>,
    way: &Arc<Way>,
    local: &Local<'_>,
    body: Document<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Answer> {
    match local.emulate {
        Emulate::ListDatabases
        | Emulate::ListCollections
        | Emulate::Drop
        | Emulate::DropDatabase
        | Emulate::DropIndexes
        | Emulate::CollStats
        | Emulate::DbStats => {
            let Some(session) = &client.session else { return Err(internal()) };
            // These work at the server as others do.
            let turn = tenancy.turns.take(session.meter()).await.map_err(|over| {
                client.count_refused();
                refuse::render(&Refusal::OverLimit(over), Repeat::Plain)
            })?;
            let ask = shared::Ask { upstream: &client.server.upstream, way, org: session.slot().org(), local, body };
            let limit = session.slot().policy().limits.mongodb.timeout;
            let done = tokio::time::timeout(limit, ask.put(out)).await;
            drop(turn);
            return match done {
                Ok(done) => done,
                Err(_) => Err(refuse::render(&Refusal::UpstreamSlow, Repeat::Plain)),
            };
        }
        Emulate::Parameter => return put_parameter(body, out),
        Emulate::Log => return put_log(body, out),
        _ => {}
    }
    let reply = bson::open(out);
    match local.emulate {
        Emulate::BuildInfo => put_build(client, out),
        Emulate::ConnectionStatus => put_status(client, out),
        Emulate::WhatsMyUri => bson::put_str(out, "you", &client.peer.to_string()),
        Emulate::ListCommands => put_commands(out),
        Emulate::DefaultConcern => {
            let read = bson::open_document(out, "defaultReadConcern");
            bson::put_str(out, "level", "local");
            bson::close(out, read);
            let write = bson::open_document(out, "defaultWriteConcern");
            bson::put_str(out, "w", "majority");
            bson::put_i32(out, "wtimeout", 0);
            bson::close(out, write);
            bson::put_str(out, "defaultReadConcernSource", "implicit");
            bson::put_str(out, "defaultWriteConcernSource", "implicit");
        }
        Emulate::CommandLine => {
            let list = bson::open_array(out, "argv");
            bson::put_str(out, "0", "dynabase");
            bson::close(out, list);
            let parsed = bson::open_document(out, "parsed");
            bson::close(out, parsed);
        }
        Emulate::HostInfo => {
            let system = bson::open_document(out, "system");
            bson::put_date(out, "currentTime", super::now_ms());
            bson::put_str(out, "hostname", "dynabase");
            bson::close(out, system);
            let os = bson::open_document(out, "os");
            bson::close(out, os);
            let extra = bson::open_document(out, "extra");
            bson::close(out, extra);
        }
        Emulate::ServerStatus => put_server_status(client, out),
        Emulate::UsersInfo => {
            let list = bson::open_array(out, "users");
            let user = bson::open_document(out, "0");
            bson::put_str(out, "_id", &format!("$external.{DEFAULT_NAME}"));
            bson::put_str(out, "user", DEFAULT_NAME);
            bson::put_str(out, "db", "$external");
            let roles = bson::open_array(out, "roles");
            bson::close(out, roles);
            bson::close(out, user);
            bson::close(out, list);
        }
        // The rest is the handshake's, which never comes here, and `ping`, which is only ok.
        _ => {}
    }
    bson::put_f64(out, "ok", 1.0);
    bson::close(out, reply);
    Ok(())
}

fn internal() -> Answer {
    refuse::render(&Refusal::Internal, Repeat::Plain)
}

/// The server's version, by its protocol's.
fn version(client: &Client) -> [i32; 3] {
    match client.server.upstream.wire_version() {
        27.. => [8, 2, 0],
        26 => [8, 1, 0],
        22..=25 => [8, 0, 0],
        18..=21 => [7, 0, 0],
        14..=17 => [6, 0, 0],
        10..=13 => [5, 0, 0],
        _ => [4, 4, 0],
    }
}

fn put_build(client: &Client, out: &mut Vec<u8>) {
    let [major, minor, patch] = version(client);
    bson::put_str(out, "version", &format!("{major}.{minor}.{patch}"));
    bson::put_str(out, "gitVersion", "0000000000000000000000000000000000000000");
    let modules = bson::open_array(out, "modules");
    bson::close(out, modules);
    let list = bson::open_array(out, "versionArray");
    for (at, part) in [major, minor, patch, 0].into_iter().enumerate() {
        bson::put_i32(out, Index::new(at).as_str(), part);
    }
    bson::close(out, list);
    bson::put_i32(out, "bits", 64);
    bson::put_bool(out, "debug", false);
    bson::put_i32(out, "maxBsonObjectSize", 16_777_216);
}

fn put_status(client: &Client, out: &mut Vec<u8>) {
    let info = bson::open_document(out, "authInfo");
    let users = bson::open_array(out, "authenticatedUsers");
    if client.session.is_some() {
        let user = bson::open_document(out, "0");
        bson::put_str(out, "user", DEFAULT_NAME);
        bson::put_str(out, "db", "$external");
        bson::close(out, user);
    }
    bson::close(out, users);
    let roles = bson::open_array(out, "authenticatedUserRoles");
    if client.session.is_some() {
        let role = bson::open_document(out, "0");
        bson::put_str(out, "role", "readWriteAnyDatabase");
        bson::put_str(out, "db", "admin");
        bson::close(out, role);
    }
    bson::close(out, roles);
    bson::close(out, info);
}

fn put_commands(out: &mut Vec<u8>) {
    let list = bson::open_document(out, "commands");
    for row in commands::ROWS {
        let entry = bson::open_document(out, row.name);
        bson::put_str(out, "help", "");
        bson::put_bool(out, "requiresAuth", true);
        bson::put_bool(out, "secondaryOk", false);
        bson::put_bool(out, "adminOnly", row.home == commands::Home::Admin);
        bson::close(out, entry);
    }
    bson::close(out, list);
}

/// The few parameters that tools look at.
fn put_parameter(body: Document<'_>, out: &mut Vec<u8>) -> Result<(), Answer> {
    let start = out.len();
    let reply = bson::open(out);
    let all = text(body, "getParameter") == Some("*");
    let wants = |name: &str| all || body.get(name).ok().flatten().is_some_and(|it| it.truthy());
    let mut found = 0;
    if wants("enableTestCommands") {
        bson::put_bool(out, "enableTestCommands", false);
        found += 1;
    }
    if wants("featureCompatibilityVersion") {
        let version = bson::open_document(out, "featureCompatibilityVersion");
        bson::put_str(out, "version", "8.0");
        bson::close(out, version);
        found += 1;
    }
    if wants("authenticationMechanisms") {
        let list = bson::open_array(out, "authenticationMechanisms");
        bson::put_str(out, "0", "PLAIN");
        bson::put_str(out, "1", "MONGODB-OIDC");
        bson::close(out, list);
        found += 1;
    }
    bson::put_f64(out, "ok", 1.0);
    bson::close(out, reply);
    if found == 0 {
        out.truncate(start);
        return Err(Answer::new(72, "InvalidOptions", "no option found to get"));
    }
    Ok(())
}

fn put_log(body: Document<'_>, out: &mut Vec<u8>) -> Result<(), Answer> {
    match text(body, "getLog") {
        Some("startupWarnings") => {
            let reply = bson::open(out);
            bson::put_i32(out, "totalLinesWritten", 0);
            let list = bson::open_array(out, "log");
            bson::close(out, list);
            bson::put_f64(out, "ok", 1.0);
            bson::close(out, reply);
            Ok(())
        }
        _ => Err(Answer::new(13, "Unauthorized", "not authorized on admin to execute command getLog")),
    }
}

fn put_server_status(client: &Client, out: &mut Vec<u8>) {
    let [major, minor, patch] = version(client);
    bson::put_str(out, "host", "dynabase");
    bson::put_str(out, "version", &format!("{major}.{minor}.{patch}"));
    bson::put_str(out, "process", if client.member(false).is_some() { "mongod" } else { "mongos" });
    bson::put_i64(out, "pid", 0);
    let uptime_ms = clock::now_ms().saturating_sub(client.server.since_ms);
    bson::put_f64(out, "uptime", f64::from(u32::try_from(uptime_ms / 1000).unwrap_or(u32::MAX)));
    bson::put_date(out, "localTime", super::now_ms());
    let Some(session) = &client.session else { return };
    let slot = session.slot();
    let (open, max) = (slot.clients(Protocol::Mongodb), slot.policy().limits.mongodb.client_sockets);
    let connections = bson::open_document(out, "connections");
    bson::put_i32(out, "current", i32::try_from(open).unwrap_or(i32::MAX));
    bson::put_i32(out, "available", i32::try_from(max.saturating_sub(open)).unwrap_or(i32::MAX));
    bson::put_i32(out, "active", i32::try_from(slot.connections(Protocol::Mongodb)).unwrap_or(i32::MAX));
    bson::close(out, connections);
}

/// What a client is told when an errand of ours failed.
fn failed(error: &Error, isolation: Isolation) -> Answer {
    tracing::warn!(%error, ?isolation, "an errand for a client failed");
    refuse::render(&Refusal::UpstreamDown, Repeat::Plain)
}

/// The first element's text, for logs and answers.
fn text<'a>(body: Document<'a>, key: &str) -> Option<&'a str> {
    body.get(key).ok().flatten().and_then(|it: bson::Element<'a>| it.str())
}
