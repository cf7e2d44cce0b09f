//! A double of Neon's management API, built from its published description as far as dynabase uses it. It also
//! misbehaves on purpose ([`Misdeed`]): real locks, rates, lost replies and late failures can't be had on demand.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};

use super::neon_ground::{DOMAIN, Ground};

pub const KEY: &str = "napi_of_the_double";

/// Every owner's password.
const PASSWORD: &str = "p";

/// What goes wrong with the next request that fits.
#[derive(Clone, Copy, Debug)]
pub enum Misdeed {
    /// This status, and nothing is done.
    Refuse(u16),
    /// It is done, and the connection closes without a reply.
    LoseReply,
    /// It is done, and a proxy in between says 502.
    Gateway,
    /// Its operations end in `error`.
    FailLate,
    /// Its operations never end.
    Hang,
}

#[derive(Default)]
struct State {
    projects: Vec<Value>,
    branches: Vec<Value>,
    endpoints: Vec<Value>,
    /// Each with the looks at it until it is over, and how it ends.
    operations: Vec<(Value, u32, &'static str)>,
    /// Real servers behind it, if there are any.
    ground: Option<Ground>,
    /// The method whose requests all get 503.
    refused: Option<&'static str>,
    misdeeds: VecDeque<(&'static str, Misdeed)>,
    /// `METHOD path`, in order.
    log: Vec<String>,
    next: u32,
}

/// The double. It ends with the process.
#[derive(Clone)]
pub struct NeonDouble {
    pub address: String,
    state: Arc<Mutex<State>>,
}

impl NeonDouble {
    pub fn start() -> Self {
        Self::with(State::default())
    }

    /// With real servers behind it.
    pub fn on(ground: Ground) -> Self {
        Self::with(State { ground: Some(ground), ..State::default() })
    }

    fn with(state: State) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = format!("http://{}/api/v2", listener.local_addr().expect("bound"));
        let state = Arc::new(Mutex::new(state));
        let served = Arc::clone(&state);
        std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                let state = Arc::clone(&served);
                std::thread::spawn(move || serve(socket, &state));
            }
        });
        Self { address, state }
    }

    /// The next request whose method is `method` goes wrong.
    pub fn misbehave(&self, method: &'static str, misdeed: Misdeed) {
        self.state.lock().expect("no panic").misdeeds.push_back((method, misdeed));
    }

    /// From now on all requests with this method get 503; or none.
    pub fn refuse_all(&self, method: Option<&'static str>) {
        self.state.lock().expect("no panic").refused = method;
    }

    /// Somebody changes an endpoint in Neon's console.
    pub fn turn(&self, at: usize, knob: &str, value: Value) {
        self.state.lock().expect("no panic").endpoints[at][knob] = value;
    }

    /// What was asked so far.
    pub fn log(&self) -> Vec<String> {
        self.state.lock().expect("no panic").log.clone()
    }

    /// How many projects and branches there are.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state.lock().expect("no panic");
        (state.projects.len(), state.branches.len())
    }

    /// An endpoint as it is kept.
    pub fn endpoint(&self, at: usize) -> Value {
        self.state.lock().expect("no panic").endpoints[at].clone()
    }
}

fn serve(socket: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(socket);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let (mut length, mut authorized) = (0, false);
    loop {
        line.clear();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().unwrap_or(0),
            "authorization" => authorized = value.trim() == format!("Bearer {KEY}"),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let mut state = state.lock().expect("no panic");
    state.log.push(format!("{method} {path}"));
    let misdeed = match state.misdeeds.front() {
        Some((wanted, misdeed)) if *wanted == method => {
            let misdeed = *misdeed;
            state.misdeeds.pop_front();
            Some(misdeed)
        }
        _ => None,
    };
    let path = path.trim_start_matches("/api/v2");
    let (status, answer) = match misdeed {
        _ if state.refused == Some(method.as_str()) => (503, json!({"code": "", "message": "unavailable"})),
        _ if !authorized => (401, json!({"code": "", "message": "authorization failed"})),
        Some(Misdeed::Refuse(status)) => (status, json!({"code": "X", "message": "not now", "request_id": "r"})),
        Some(Misdeed::FailLate) => state.act(&method, path, &body, "error"),
        Some(Misdeed::Hang) => state.act(&method, path, &body, "running"),
        _ => state.act(&method, path, &body, "finished"),
    };
    drop(state);
    let (status, answer) = match misdeed {
        Some(Misdeed::LoseReply) => return,
        Some(Misdeed::Gateway) => (502, json!({})),
        _ => (status, answer),
    };
    let text = if status == 204 { String::new() } else { answer.to_string() };
    let retry = if status == 429 { "Retry-After: 1\r\n" } else { "" };
    let _ = write!(
        reader.into_inner(),
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n{retry}Content-Length: {}\r\n\r\n{text}",
        text.len()
    );
}

impl State {
    fn id(&mut self, kind: &str) -> String {
        self.next += 1;
        format!("{kind}-double-{:06}", self.next)
    }

    fn operation(&mut self, action: &str, ends: &'static str) -> Value {
        let id = self.id("op");
        let operation = json!({"id": id, "action": action, "status": "running"});
        self.operations.push((operation.clone(), 2, ends));
        operation
    }

    /// Endpoints go with what they serve.
    fn forget(&mut self, goes: impl Fn(&Value) -> bool) {
        if let Some(ground) = &self.ground {
            let hosts = self.endpoints.iter().filter(|it| goes(it)).filter_map(|it| it["host"].as_str());
            hosts.for_each(|host| ground.remove(host));
        }
        self.endpoints.retain(|it| !goes(it));
    }

    fn branch(&mut self, project: &str, name: &str, settings: &Value, is_root: bool) -> (Value, Value) {
        let (branch, endpoint) = (self.id("br"), self.id("ep"));
        let branch =
            json!({"id": branch, "project_id": project, "name": name, "default": is_root, "logical_size": 1024});
        let mut made = json!({
            "id": endpoint, "project_id": project, "branch_id": branch["id"], "type": "read_write",
            "host": format!("{endpoint}.{DOMAIN}"), "current_state": "active",
        });
        merge(&mut made, settings);
        self.branches.push(branch.clone());
        self.endpoints.push(made.clone());
        (branch, made)
    }

    fn act(&mut self, method: &str, path: &str, body: &Value, ends: &'static str) -> (u16, Value) {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let of = |list: &[Value], project: &str| -> Vec<Value> {
            list.iter().filter(|it| it["project_id"] == project).cloned().collect()
        };
        let missing = (404, json!({"code": "", "message": "not found"}));
        if let ["projects", project, ..] = parts[..]
            && !self.projects.iter().any(|it| it["id"] == project)
        {
            return missing;
        }
        match (method, &parts[..]) {
            ("GET", ["projects"]) => {
                let wanted = query.split('&').find_map(|it| it.strip_prefix("search=")).unwrap_or_default();
                let found: Vec<&Value> = self
                    .projects
                    .iter()
                    .filter(|it| it["name"].as_str().is_some_and(|name| name.contains(wanted)))
                    .collect();
                (200, json!({ "projects": found, "pagination": {"cursor": "x"} }))
            }
            ("POST", ["projects"]) => {
                let wanted = &body["project"];
                let id = self.id("project");
                let mut project = json!({"id": id, "name": wanted["name"], "compute_time_seconds": 0});
                project["settings"] = wanted["settings"].clone();
                self.projects.push(project.clone());
                let (branch, endpoint) = self.branch(&id, "main", &wanted["default_endpoint_settings"], true);
                if let (Some(ground), Some(host)) = (&self.ground, endpoint["host"].as_str()) {
                    let word = |key: &str| wanted["branch"][key].as_str().expect("named");
                    ground.make(host, word("role_name"), PASSWORD, word("database_name"));
                }
                let operations = [self.operation("create_timeline", ends), self.operation("start_compute", ends)];
                let connection = json!({"connection_parameters": {
                    "database": wanted["branch"]["database_name"], "role": wanted["branch"]["role_name"],
                    "password": PASSWORD, "host": endpoint["host"],
                }});
                (
                    201,
                    json!({"project": project, "branch": branch, "endpoints": [endpoint],
                    "operations": operations, "connection_uris": [connection]}),
                )
            }
            ("GET", ["projects", id]) => {
                let found = self.projects.iter().find(|it| it["id"] == *id);
                (200, json!({ "project": found }))
            }
            ("PATCH", ["projects", id]) => {
                let operation = self.operation("apply_config", ends);
                let found = self.projects.iter_mut().find(|it| it["id"] == *id).expect("looked for above");
                merge(&mut found["settings"], &body["project"]["settings"]);
                (200, json!({"project": found, "operations": [operation]}))
            }
            ("DELETE", ["projects", id]) => {
                self.projects.retain(|it| it["id"] != *id);
                self.forget(|it| it["project_id"] == *id);
                self.branches.retain(|it| it["project_id"] != *id);
                (200, json!({}))
            }
            ("GET", ["projects", id, "endpoints"]) => (200, json!({ "endpoints": of(&self.endpoints, id) })),
            ("PATCH", ["projects", _, "endpoints", id]) => {
                let operation = self.operation("apply_config", ends);
                let Some(found) = self.endpoints.iter_mut().find(|it| it["id"] == *id) else { return missing };
                merge(found, &body["endpoint"]);
                (200, json!({"endpoint": found, "operations": [operation]}))
            }
            ("POST", ["projects", _, "endpoints", _, "start"]) => {
                let operation = self.operation("start_compute", ends);
                (200, json!({ "operations": [operation] }))
            }
            ("GET", ["projects", id, "branches"]) => (200, json!({ "branches": of(&self.branches, id) })),
            ("POST", ["projects", id, "branches"]) => {
                if of(&self.branches, id).len() >= 4 {
                    return (422, json!({"code": "BRANCHES_LIMIT_EXCEEDED", "message": "branches limit exceeded"}));
                }
                let name = body["branch"]["name"].as_str().unwrap_or_default().to_owned();
                let (branch, endpoint) = self.branch(id, &name, &body["endpoints"][0], false);
                let parent = &body["branch"]["parent_id"];
                let parent = self.endpoints.iter().find(|it| it["branch_id"] == *parent);
                if let (Some(ground), Some(parent)) = (&self.ground, parent) {
                    ground.copy(endpoint["host"].as_str().expect("text"), parent["host"].as_str().expect("text"));
                }
                let operation = self.operation("create_branch", ends);
                (201, json!({"branch": branch, "endpoints": [endpoint], "operations": [operation]}))
            }
            ("DELETE", ["projects", _, "branches", id]) => {
                let Some(at) = self.branches.iter().position(|it| it["id"] == *id) else { return (204, Value::Null) };
                if self.branches[at]["default"] == true {
                    return (422, json!({"code": "", "message": "cannot delete the root branch"}));
                }
                self.branches.remove(at);
                self.forget(|it| it["branch_id"] == *id);
                let operation = self.operation("delete_timeline", ends);
                (200, json!({ "operations": [operation] }))
            }
            ("GET", ["projects", _, "branches", _, "roles", _, "reveal_password"]) => {
                (200, json!({"password": PASSWORD}))
            }
            ("GET", ["projects", _, "operations"]) => {
                let all: Vec<&Value> = self.operations.iter().map(|it| &it.0).collect();
                (200, json!({ "operations": all }))
            }
            ("GET", ["projects", _, "operations", id]) => {
                let Some(found) = self.operations.iter_mut().find(|it| it.0["id"] == *id) else { return missing };
                found.1 = found.1.saturating_sub(1);
                if found.1 == 0 {
                    found.0["status"] = json!(found.2);
                }
                (200, json!({ "operation": found.0 }))
            }
            _ => missing,
        }
    }
}

fn merge(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        match value {
            Value::Object(_) if into[key].is_object() => merge(&mut into[key], value),
            value => into[key] = value.clone(),
        }
    }
}
