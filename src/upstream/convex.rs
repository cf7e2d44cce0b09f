//! Convex deployments: where a tenant's is, what it is told about a caller, how it is reached.
//!
//! Two ways to keep tenants apart. A deployment *of its own* (a route in the tenant's record, or an address with
//! `{org}` in it): every token that reaches it names it as its audience, so that a token of one tenant is worth nothing
//! at another's. A *shared* deployment: the verified organisation is written into the arguments of every call, over
//! whatever the client wrote there.
//!
//! [`Upstream::deployment`] says which; [`Upstream::token`] is the token that is passed on instead of the caller's;
//! [`Upstream::request`] and [`Upstream::socket`] are the ways there.

mod config;
mod dial;
mod issuer;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

pub use config::Config;
pub use dial::{Answer, DialError, Sending, Socket};
use hyper::{Uri, http::uri};
pub use issuer::Claims;
use issuer::Issuer;

use crate::{
    net::ClientTls,
    tenant::{Names, OrgId, Sharing, Tenant, namespace::org_of_host},
};

/// Where dynabase publishes the key that its own tokens are verified with.
pub const JWKS_PATH: &str = "/.well-known/jwks.json";

/// How long a token is good that is sent on with one HTTP request: longer than any request may take.
pub const REQUEST_TOKEN_TTL: Duration = Duration::from_secs(600);

/// How long a token is good on a socket whose caller's own never ends.
pub const SOCKET_TOKEN_TTL: Duration = Duration::from_secs(24 * 3600);

/// One deployment, as one tenant meets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deployment {
    /// `http` or `https`, host, port.
    pub origin: Origin,
    /// What its tokens name as their audience.
    pub audience: String,
    /// The argument that carries the organisation, on a shared deployment.
    pub org_argument: Option<String>,
}

/// Scheme, host and port of a deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    scheme: uri::Scheme,
    authority: uri::Authority,
}

impl Origin {
    /// Parses `https://host` or `http://host:port`, with nothing behind it.
    ///
    /// # Errors
    /// What is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = text.parse::<Uri>().map_err(|error| format!("{error}"))?.into_parts();
        match (parts.scheme, parts.authority, parts.path_and_query) {
            (Some(scheme), Some(authority), path)
                if matches!(scheme.as_str(), "http" | "https")
                    && !authority.as_str().contains('@')
                    && path.as_ref().is_none_or(|path| path.as_str() == "/") =>
            {
                Ok(Self { scheme, authority })
            }
            _ => Err("must be http://HOST[:PORT] or https://HOST[:PORT]".into()),
        }
    }

    /// A path there.
    pub fn uri(&self, path: uri::PathAndQuery) -> Uri {
        self.with_scheme(self.scheme.clone(), path)
    }

    /// The same for a WebSocket.
    fn socket_uri(&self, path: uri::PathAndQuery) -> Uri {
        let scheme = if self.is_tls() { "wss" } else { "ws" };
        self.with_scheme(uri::Scheme::try_from(scheme).unwrap_or(uri::Scheme::HTTP), path)
    }

    fn with_scheme(&self, scheme: uri::Scheme, path: uri::PathAndQuery) -> Uri {
        let mut parts = uri::Parts::default();
        parts.scheme = Some(scheme);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path);
        // All three are there.
        Uri::from_parts(parts).unwrap_or_default()
    }

    fn is_tls(&self) -> bool {
        self.scheme == uri::Scheme::HTTPS
    }

    fn port(&self) -> u16 {
        self.authority.port_u16().unwrap_or(if self.is_tls() { 443 } else { 80 })
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

/// The way to the deployments. One per process.
#[derive(Debug)]
pub struct Upstream {
    config: Config,
    names: Names,
    issuer: Issuer,
    tls: ClientTls,
    client: dial::Client,
}

impl Upstream {
    /// The way to what `config` describes; `None` if it describes nothing.
    ///
    /// # Errors
    /// In words.
    pub fn new(config: &Config, names: Names) -> Result<Option<Arc<Self>>, String> {
        let Some(public_url) = &config.public_url else { return Ok(None) };
        if let Some((key, what)) = config.faults().into_iter().next() {
            return Err(format!("upstream.convex.{key} {what}"));
        }
        let issuer = Issuer::new(public_url.trim_end_matches('/'), &names)?;
        let tls = config.tls()?;
        let client = dial::Client::new(config.ca_file.clone())?;
        Ok(Some(Arc::new(Self { config: config.clone(), names, issuer, tls, client })))
    }

    /// Where the tenant's functions are; `None` if it has none.
    pub fn deployment(&self, tenant: &Tenant) -> Option<Deployment> {
        let org = &tenant.org;
        if let Some(route) = &tenant.routes.convex {
            let origin = Origin::parse(&route.url).ok()?;
            return Some(match route.isolation {
                Sharing::Own => self.own(org, origin),
                Sharing::Shared => self.shared(origin),
            });
        }
        let url = self.config.url.as_ref()?;
        match self.config.isolation {
            Sharing::Shared => Some(self.shared(Origin::parse(url).ok()?)),
            Sharing::Own => Some(self.own(org, Origin::parse(&url.replace("{org}", org.as_str())).ok()?)),
        }
    }

    fn own(&self, org: &OrgId, origin: Origin) -> Deployment {
        Deployment { origin, audience: format!("convex-{}", self.names.base(org)), org_argument: None }
    }

    fn shared(&self, origin: Origin) -> Deployment {
        let audience = format!("convex-shared-{}", origin.authority);
        Deployment { origin, audience, org_argument: Some(self.config.org_argument.clone()) }
    }

    /// The organisation that a host name stands for: `<org>.<domain>`, with or without a port.
    pub fn host_org(&self, host: &str) -> Option<OrgId> {
        org_of_host(host, self.config.domain.as_ref()?)
    }

    /// The token that `deployment` gets to see: of the same subject and organisation, good until `expires_at`.
    pub fn token(&self, deployment: &Deployment, claims: &Claims<'_>, expires_at: SystemTime) -> String {
        self.issuer.token(&deployment.audience, claims, &self.config.claims, expires_at)
    }

    /// The public half of the key that signs [`Self::token`], as the issuer's key set.
    pub fn jwks(&self) -> &str {
        self.issuer.jwks()
    }

    /// What the deployment's `convex/auth.config.ts` has to say.
    pub fn auth_config(&self, deployment: &Deployment) -> String {
        let issuer = self.issuer.url();
        format!(
            "export default {{\n  providers: [\n    {{\n      type: \"customJwt\",\n      issuer: {issuer:?},\n      \
             jwks: \"{issuer}{JWKS_PATH}\",\n      applicationID: {:?},\n      algorithm: \"ES256\",\n    }},\n  ],\n}};",
            deployment.audience
        )
    }

    /// What of a verified token is passed on.
    pub fn claims(&self) -> &[String] {
        &self.config.claims
    }

    /// Sends a request and waits for the head of its answer.
    ///
    /// # Errors
    /// The deployment can't be reached, or took too long.
    pub async fn request(&self, request: hyper::Request<Sending>) -> Result<Answer, DialError> {
        self.client.request(request).await
    }

    /// Opens a sync socket at `path`.
    ///
    /// # Errors
    /// The deployment can't be reached, or refuses.
    ///
    /// # Cancel safety
    /// Dropping it closes what was opened.
    pub async fn socket(
        &self,
        deployment: &Deployment,
        path: uri::PathAndQuery,
        headers: hyper::HeaderMap,
        settings: tokio_tungstenite::tungstenite::protocol::WebSocketConfig,
    ) -> Result<Socket, DialError> {
        dial::socket(&self.tls, &deployment.origin, path, headers, settings).await
    }
}

#[cfg(test)]
mod tests;
