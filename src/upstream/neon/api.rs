//! Neon's management API: projects, endpoints, roles, quotas, branches, operations.
//!
//! # What may be repeated
//! 423 (another operation holds the project), 429 and 503 mean that nothing was done: every request is sent again after
//! a pause, within its deadline. A reply that never comes means that nobody knows: what sets absolute values or removes
//! is sent again; what creates is looked for first ([`Api::ensure_project`], [`Api::ensure_branch`]), since names there
//! are not unique and a second create would make a second one.
//!
//! Nothing here is on a client's path, and nothing here knows what a tenant is.
//!
//! Entry point: [`Api::new`].

mod wire;

use std::{
    fmt,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub use wire::{Branch, Compute, Endpoint, Made, NewProject, Operation, Project, Quota, Usage};

use crate::tenant::namespace::Password;

/// Where the API is.
pub const ADDRESS: &str = "https://console.neon.tech/api/v2";

/// Longest wait for a connection, and for one whole reply.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest reply in bytes: a page of 400 projects is some 600 KB.
const REPLY_MAX: usize = 4 << 20;

/// First pause before a request is sent again; doubles up to the second.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Times that one request is sent at most.
const ATTEMPTS: u32 = 8;

/// Projects on one page, and pages looked at for one name.
const PAGE: u32 = 400;
const PAGES_MAX: u32 = 100;

/// Why the API did not do what it was asked.
#[derive(Debug)]
pub enum ApiError {
    /// The key is not valid, or may not do that.
    Unauthorized,
    /// There is no such thing.
    NotFound,
    /// It said no: status, its code and words.
    Refused {
        /// The HTTP status.
        status: u16,
        /// Its code, such as `BRANCHES_LIMIT_EXCEEDED`.
        code: String,
        /// Its words.
        message: String,
    },
    /// It stayed busy (423, 429, 503) until the deadline; nothing was done.
    Busy {
        /// The last status.
        status: u16,
    },
    /// No reply came: it may have been done or not.
    Unknown(String),
    /// An operation failed, or did not end before the deadline.
    Operation {
        /// Its id.
        id: String,
        /// What it was doing.
        action: String,
        /// The state it was last seen in.
        status: String,
    },
    /// A reply that is not what the API's description says.
    Reply(&'static str),
    /// Two projects have the name; an operator has to remove one.
    Ambiguous(String),
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ApiError::Unauthorized => f.write_str("Neon's API does not take this key for that"),
            ApiError::NotFound => f.write_str("Neon knows nothing of the kind"),
            ApiError::Refused { status, code, message } => write!(f, "Neon's API said {status} {code}: {message}"),
            ApiError::Busy { status } => write!(f, "Neon's API stayed busy ({status})"),
            ApiError::Unknown(what) => write!(f, "Neon's API did not reply ({what}): it may have been done or not"),
            ApiError::Operation { id, action, status } => write!(f, "Neon's operation {id} ({action}) is {status}"),
            ApiError::Reply(what) => write!(f, "Neon's API answered what it does not describe: {what}"),
            ApiError::Ambiguous(name) => write!(f, "there are two Neon projects named {name}: remove one"),
        }
    }
}

impl std::error::Error for ApiError {}

/// Whether a request whose reply never came may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repeat {
    /// It reads, sets absolute values, or removes.
    Safe,
    /// It creates.
    LookFirst,
}

/// The API, with one account's key. Its `Debug` prints no key.
pub struct Api {
    base: String,
    key: Password,
    /// How long one call may take, pauses included.
    patience: Duration,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Api {
    /// The API at `address` ([`ADDRESS`]), asked with `key`; one call may take `patience`, pauses included.
    ///
    /// # Errors
    /// An address that is not https (or loopback), or no certificate authorities.
    pub fn new(address: &str, key: Password, patience: Duration) -> Result<Self, String> {
        let base = address.trim_end_matches('/').to_owned();
        let uri: Uri = base.parse().map_err(|_| "is not an address".to_owned())?;
        let is_local = matches!(uri.host(), Some("127.0.0.1" | "localhost" | "[::1]"));
        let mut roots = rustls::RootCertStore::empty();
        match uri.scheme_str() {
            Some("https") => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if roots.is_empty() {
                    return Err("is https, and this system has no certificate authorities".to_owned());
                }
            }
            // The key would travel in clear text.
            Some("http") if is_local => {}
            _ => return Err("has to be https".to_owned()),
        }
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let tls = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(30))
            // A request on a kept connection that turns out dead is ours to decide about, by what it does.
            .retry_canceled_requests(false)
            .build(connector);
        Ok(Self { base, key, patience, client })
    }

    /// The project with this name, if there is one.
    ///
    /// # Errors
    /// [`ApiError::Ambiguous`], and what all calls may meet.
    pub async fn find_project(&self, name: &str) -> Result<Option<Project>, ApiError> {
        let mut found: Vec<Project> = Vec::new();
        let mut cursor = String::new();
        for _ in 0..PAGES_MAX {
            let path = format!("/projects?search={}&limit={PAGE}{cursor}", escaped(name));
            let page: wire::Projects = self.get(&path).await?;
            let count = page.projects.len();
            // `search` also finds names that only contain it.
            found.extend(page.projects.into_iter().filter(|project| project.name == name));
            match page.pagination.and_then(|it| it.cursor) {
                Some(next) if count == PAGE as usize => cursor = format!("&cursor={}", escaped(&next)),
                _ => break,
            }
        }
        if found.len() > 1 {
            return Err(ApiError::Ambiguous(name.to_owned()));
        }
        Ok(found.pop())
    }

    /// Makes a project unless one with this name is there; gives where it is, with its computes ready.
    ///
    /// # Errors
    /// Calling again continues.
    pub async fn ensure_project(&self, wanted: &NewProject) -> Result<Made, ApiError> {
        let made = match self.find_project(&wanted.name).await? {
            Some(project) => self.made(project).await?,
            None => match self
                .ask::<wire::CreatedProject>(Method::POST, "/projects", Some(wanted.body()), Repeat::LookFirst)
                .await
            {
                Ok(created) => {
                    self.wait(&created.project.id, &created.operations).await?;
                    let endpoint = created.endpoints.into_iter().next().ok_or(ApiError::Reply("no endpoint"))?;
                    Made { project: created.project, branch: created.branch.id, endpoint }
                }
                Err(ApiError::Unknown(what)) => {
                    // It may be there; if it is not yet, the caller hears that nobody knows and asks again later.
                    let found = self.find_project(&wanted.name).await?.ok_or(ApiError::Unknown(what))?;
                    self.made(found).await?
                }
                Err(error) => return Err(error),
            },
        };
        Ok(made)
    }

    /// What a project that is there consists of.
    async fn made(&self, project: Project) -> Result<Made, ApiError> {
        let running: wire::Operations = self.get(&format!("/projects/{}/operations?limit=100", project.id)).await?;
        let open: Vec<Operation> = running.operations.into_iter().filter(|it| !it.is_over()).collect();
        self.wait(&project.id, &open).await?;
        let endpoints = self.endpoints(&project.id).await?;
        let endpoint =
            endpoints.into_iter().find(|it| it.kind == "read_write").ok_or(ApiError::Reply("no endpoint"))?;
        Ok(Made { branch: endpoint.branch_id.clone(), project, endpoint })
    }

    /// A project with its quota and present use.
    ///
    /// # Errors
    /// [`ApiError::NotFound`], and what all calls may meet.
    pub async fn project(&self, id: &str) -> Result<Project, ApiError> {
        let found: wire::OneProject = self.get(&format!("/projects/{}", escaped(id))).await?;
        Ok(found.project)
    }

    /// Sets a project's quota, and what computes made from now on are like.
    ///
    /// # Errors
    /// Values are absolute: calling again is safe.
    pub async fn set_quota(&self, id: &str, quota: Quota, compute: Compute) -> Result<(), ApiError> {
        let body = json!({"project": {"settings": {"quota": quota}, "default_endpoint_settings": compute}});
        let path = format!("/projects/{}", escaped(id));
        let done: wire::Done = self.ask(Method::PATCH, &path, Some(body), Repeat::Safe).await?;
        self.wait(id, &done.operations).await
    }

    /// Removes a project. One that is gone already is removed.
    ///
    /// # Errors
    /// What all calls may meet.
    pub async fn delete_project(&self, id: &str) -> Result<(), ApiError> {
        self.remove(&format!("/projects/{}", escaped(id)), id).await
    }

    /// A project's endpoints.
    ///
    /// # Errors
    /// What all calls may meet.
    pub async fn endpoints(&self, project: &str) -> Result<Vec<Endpoint>, ApiError> {
        let found: wire::Endpoints = self.get(&format!("/projects/{}/endpoints", escaped(project))).await?;
        Ok(found.endpoints)
    }

    /// Sets an endpoint's size and rest. A compute that runs restarts when its size changes.
    ///
    /// # Errors
    /// Values are absolute: calling again is safe.
    pub async fn set_compute(&self, project: &str, endpoint: &str, compute: Compute) -> Result<(), ApiError> {
        let path = format!("/projects/{}/endpoints/{}", escaped(project), escaped(endpoint));
        let body = json!({ "endpoint": compute });
        let done: wire::Done = self.ask(Method::PATCH, &path, Some(body), Repeat::Safe).await?;
        self.wait(project, &done.operations).await
    }

    /// Wakes an endpoint's compute. One that runs stays as it is.
    ///
    /// # Errors
    /// What all calls may meet.
    pub async fn start(&self, project: &str, endpoint: &str) -> Result<(), ApiError> {
        let path = format!("/projects/{}/endpoints/{}/start", escaped(project), escaped(endpoint));
        let done: wire::Done = self.ask(Method::POST, &path, Some(json!({})), Repeat::Safe).await?;
        self.wait(project, &done.operations).await
    }

    /// A project's branches.
    ///
    /// # Errors
    /// What all calls may meet.
    pub async fn branches(&self, project: &str) -> Result<Vec<Branch>, ApiError> {
        let found: wire::Branches = self.get(&format!("/projects/{}/branches", escaped(project))).await?;
        Ok(found.branches)
    }

    /// Makes a branch of `parent` with a compute of its own, unless one with this name is there; gives both.
    ///
    /// # Errors
    /// [`ApiError::Refused`] where the account has no more; calling again continues.
    pub async fn ensure_branch(
        &self,
        project: &str,
        parent: &str,
        name: &str,
        compute: Compute,
    ) -> Result<(Branch, Endpoint), ApiError> {
        let there = async || -> Result<Option<(Branch, Endpoint)>, ApiError> {
            let Some(branch) = self.branches(project).await?.into_iter().find(|it| it.name == name) else {
                return Ok(None);
            };
            let endpoints = self.endpoints(project).await?;
            let endpoint = endpoints.into_iter().find(|it| it.branch_id == branch.id);
            Ok(Some((branch, endpoint.ok_or(ApiError::Reply("a branch without an endpoint"))?)))
        };
        if let Some(found) = there().await? {
            return Ok(found);
        }
        let mut endpoint = json!(compute);
        endpoint["type"] = json!("read_write");
        let body = json!({"branch": {"name": name, "parent_id": parent}, "endpoints": [endpoint]});
        let path = format!("/projects/{}/branches", escaped(project));
        match self.ask::<wire::CreatedBranch>(Method::POST, &path, Some(body), Repeat::LookFirst).await {
            Ok(created) => {
                self.wait(project, &created.operations).await?;
                let endpoint = created.endpoints.into_iter().next().ok_or(ApiError::Reply("no endpoint"))?;
                Ok((created.branch, endpoint))
            }
            Err(ApiError::Unknown(what)) => there().await?.ok_or(ApiError::Unknown(what)),
            Err(error) => Err(error),
        }
    }

    /// Removes a branch with its compute. One that is gone already is removed.
    ///
    /// # Errors
    /// [`ApiError::Refused`] for a root or a branch with children.
    pub async fn delete_branch(&self, project: &str, branch: &str) -> Result<(), ApiError> {
        self.remove(&format!("/projects/{}/branches/{}", escaped(project), escaped(branch)), project).await
    }

    /// A role's password, as it is.
    ///
    /// # Errors
    /// What all calls may meet.
    pub async fn password(&self, project: &str, branch: &str, role: &str) -> Result<Password, ApiError> {
        let path = format!(
            "/projects/{}/branches/{}/roles/{}/reveal_password",
            escaped(project),
            escaped(branch),
            escaped(role)
        );
        let said: wire::RolePassword = self.get(&path).await?;
        Ok(Password::new(said.password))
    }

    /// Waits until operations are over.
    ///
    /// # Errors
    /// [`ApiError::Operation`] for one that failed for good, or that is not over when the call's time is.
    pub async fn wait(&self, project: &str, operations: &[Operation]) -> Result<(), ApiError> {
        let deadline = Instant::now() + self.patience;
        for operation in operations {
            let path = format!("/projects/{}/operations/{}", escaped(project), escaped(&operation.id));
            let mut present = operation.clone();
            let mut pause = PAUSE_MIN;
            while !present.is_done() {
                // `failed` is tried again by Neon itself; `error` is the end.
                if present.status == "error" || Instant::now() + pause >= deadline {
                    let Operation { id, action, status } = present;
                    return Err(ApiError::Operation { id, action, status });
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
                let said: wire::OneOperation = self.get(&path).await?;
                present = said.operation;
            }
        }
        Ok(())
    }

    async fn remove(&self, path: &str, project: &str) -> Result<(), ApiError> {
        match self.ask::<wire::Done>(Method::DELETE, path, None, Repeat::Safe).await {
            Ok(done) => match self.wait(project, &done.operations).await {
                // With the project its operations go.
                Err(ApiError::NotFound) => Ok(()),
                other => other,
            },
            Err(ApiError::NotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.ask(Method::GET, path, None, Repeat::Safe).await
    }

    /// Sends a request until it is answered, as often as that is safe.
    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        repeat: Repeat,
    ) -> Result<T, ApiError> {
        let deadline = Instant::now() + self.patience;
        let text = body.map_or_else(Bytes::new, |body| body.to_string().into());
        let mut pause = PAUSE_MIN;
        let mut attempt = 1;
        loop {
            let (error, wait) = match self.send(method.clone(), path, text.clone()).await {
                Ok((status, _, bytes)) if status.is_success() => {
                    // A removal of what is gone has no body.
                    let bytes = if bytes.is_empty() { Bytes::from_static(b"{}") } else { bytes };
                    return serde_json::from_slice(&bytes).map_err(|_| ApiError::Reply("not the shape"));
                }
                Ok((status, wait, bytes)) => match status.as_u16() {
                    401 | 403 => return Err(ApiError::Unauthorized),
                    404 => return Err(ApiError::NotFound),
                    423 | 429 | 503 => (ApiError::Busy { status: status.as_u16() }, wait),
                    500.. => (ApiError::Unknown(format!("status {}", status.as_u16())), None),
                    _ => {
                        let said: wire::Fault = serde_json::from_slice(&bytes).unwrap_or_default();
                        let (status, code, message) = (status.as_u16(), said.code, said.message);
                        return Err(ApiError::Refused { status, code, message });
                    }
                },
                Err(what) => (ApiError::Unknown(what), None),
            };
            let may_repeat = repeat == Repeat::Safe || matches!(error, ApiError::Busy { .. });
            let wait = wait.unwrap_or(pause).max(pause);
            if !may_repeat || attempt >= ATTEMPTS || Instant::now() + wait >= deadline {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(PAUSE_MAX);
            attempt += 1;
        }
    }

    /// Sends a request once: status, how long to wait, body.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Option<Duration>, Bytes), String> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.key.expose()))
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| error.to_string())?;
        let sending = async {
            let response = self.client.request(request).await.map_err(|error| {
                use std::error::Error;
                error.source().map_or_else(|| error.to_string(), ToString::to_string)
            })?;
            let status = response.status();
            let seconds = response.headers().get(header::RETRY_AFTER).and_then(|it| it.to_str().ok()?.parse().ok());
            let body = Limited::new(response.into_body(), REPLY_MAX).collect().await;
            let body = body.map_err(|_| "the reply broke off or is too long".to_owned())?;
            Ok((status, seconds.map(Duration::from_secs), body.to_bytes()))
        };
        tokio::time::timeout(REPLY_TIMEOUT, sending).await.unwrap_or_else(|_| Err("no reply in time".to_owned()))
    }
}

/// A part of a path or a query's value.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
