//! `[upstream.convex]`.

use std::path::PathBuf;

use serde::Deserialize;

use super::Origin;
use crate::{
    net::{ClientTls, TlsMode},
    tenant::{Sharing, namespace::is_domain},
};

/// Where deployments are and what they are told.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How deployments reach this dynabase over HTTP, and the issuer of the tokens they get. Without it there is no
    /// Convex front.
    pub public_url: Option<String>,
    /// The deployment of tenants whose record names none.
    pub url: Option<String>,
    /// Whether `url` is one deployment for all, or (with `{org}` in it) one for each.
    pub isolation: Sharing,
    /// The argument that carries the verified organisation to functions of a shared deployment.
    pub org_argument: String,
    /// Hosts of tenants are `<org>.<domain>`.
    pub domain: Option<String>,
    /// Claims of the caller's token that are passed on, beside `sub` and the organisation.
    pub claims: Vec<String>,
    /// Authorities to trust with https, PEM. Unset: the system's.
    pub ca_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            public_url: None,
            url: None,
            isolation: Sharing::Shared,
            org_argument: "orgId".into(),
            domain: None,
            claims: ["email", "phone", "role", "app_metadata"].map(str::to_owned).into(),
            ca_file: None,
        }
    }
}

/// Claims that are dynabase's own to say.
const OWN_CLAIMS: [&str; 8] = ["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "org_id"];

impl Config {
    /// What the types can't say: the key, and what is wrong with it.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        if let Some(Err(what)) = self.public_url.as_ref().map(|url| Origin::parse(url)) {
            faults.push(("public_url", what));
        }
        if let Some(url) = &self.url {
            let holds = url.contains("{org}");
            match self.isolation {
                Sharing::Own if !holds => {
                    faults.push(("url", "needs {org} in it with isolation = \"deployment\"".into()))
                }
                Sharing::Shared if holds => {
                    faults.push(("url", "names {org}, which needs isolation = \"deployment\"".into()));
                }
                _ => {}
            }
            if let Err(what) = Origin::parse(&url.replace("{org}", "acme")) {
                faults.push(("url", what));
            }
            if self.public_url.is_none() {
                faults.push(("public_url", "is required with url: the issuer of deployments' tokens".into()));
            }
        }
        let identifier = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_alphabetic())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        if !identifier(&self.org_argument) {
            faults.push(("org_argument", "must be the name of an argument, such as \"orgId\"".into()));
        }
        if !self.domain.as_deref().is_none_or(is_domain) {
            faults.push(("domain", "must be a host name in lower case, such as \"convex.example.com\"".into()));
        }
        if let Some(own) = self.claims.iter().find(|claim| OWN_CLAIMS.contains(&claim.as_str())) {
            faults.push(("claims", format!("can't hold {own:?}: dynabase sets it itself")));
        }
        faults
    }

    /// TLS towards deployments; certificates are always checked.
    pub(super) fn tls(&self) -> Result<ClientTls, String> {
        let https = [&self.url].into_iter().flatten().any(|url| url.starts_with("https:"));
        match ClientTls::new(TlsMode::VerifyFull, self.ca_file.clone()) {
            Ok(tls) => Ok(tls),
            // A machine without authorities can still reach deployments over http.
            Err(_) if !https && self.ca_file.is_none() => {
                ClientTls::new(TlsMode::Disable, None).map_err(|error| error.to_string())
            }
            Err(error) => Err(format!("upstream.convex.ca_file: {error}")),
        }
    }
}
