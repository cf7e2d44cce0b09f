//! Where key sets come from: an address or a file. Every wait and every size has a bound; redirects are not
//! followed, since only the configured address is trusted.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::io::AsyncReadExt;

use super::{config::Config, keys::KeySet};

/// Longest wait for a connection to the issuer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest wait for the whole answer.
pub(super) const LOAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest key set in bytes; real ones are below 4 KiB.
const BODY_MAX_BYTES: usize = 64 * 1024;

/// Where the keys are.
pub(super) enum Source {
    /// Nowhere: HS256 only.
    None,
    /// A file.
    File(PathBuf),
    /// An address; always https except on loopback.
    Url(Uri, Box<Client<HttpsConnector<HttpConnector>, Empty<Bytes>>>),
}

/// When a file was written, how large it was and its inode: whether it may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(SystemTime, u64, u64);

impl Source {
    pub(super) fn new(config: &Config) -> Result<Self, String> {
        if let Some(path) = &config.jwks_file {
            return Ok(Self::File(path.clone()));
        }
        let Some(uri) = config.key_url()? else { return Ok(Self::None) };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let tls = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?
            .with_root_certificates(roots(&uri)?)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        // A connection every five minutes is not worth keeping.
        let client =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector.wrap_connector(tcp));
        Ok(Self::Url(uri, Box::new(client)))
    }

    /// Reads the key set.
    ///
    /// # Errors
    /// What went wrong, without the address (which may hold a key of its own).
    pub(super) async fn load(&self) -> Result<KeySet, String> {
        let loading = async {
            match self {
                Self::None => Ok(KeySet::default()),
                Self::File(path) => KeySet::parse(&read(path).await?).map_err(str::to_owned),
                Self::Url(uri, client) => KeySet::parse(&fetch(uri, client).await?).map_err(str::to_owned),
            }
        };
        tokio::time::timeout(LOAD_TIMEOUT, loading).await.unwrap_or_else(|_| Err("no answer in 5 s".to_owned()))
    }

    /// The file's stamp; `None` for other sources and when it can't be read.
    pub(super) async fn stamp(&self) -> Option<Stamp> {
        let Self::File(path) = self else { return None };
        let about = tokio::fs::metadata(path).await.ok()?;
        Some(Stamp(about.modified().ok()?, about.len(), about.ino()))
    }
}

/// The system's certificate authorities; none are needed for loopback.
fn roots(uri: &Uri) -> Result<rustls::RootCertStore, String> {
    let mut roots = rustls::RootCertStore::empty();
    if uri.scheme_str() == Some("https") {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err("identity.jwks_url is https, and this system has no certificate authorities".to_owned());
        }
    }
    Ok(roots)
}

async fn read(path: &Path) -> Result<Vec<u8>, String> {
    let file = tokio::fs::File::open(path).await.map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let limit = BODY_MAX_BYTES as u64 + 1;
    file.take(limit).read_to_end(&mut bytes).await.map_err(|error| error.to_string())?;
    if bytes.len() > BODY_MAX_BYTES { Err("larger than 64 KiB".to_owned()) } else { Ok(bytes) }
}

async fn fetch(uri: &Uri, client: &Client<HttpsConnector<HttpConnector>, Empty<Bytes>>) -> Result<Bytes, String> {
    // The client's own error text names no address; its cause says what happened.
    let response = client.get(uri.clone()).await.map_err(|error| cause(&error))?;
    if response.status() != StatusCode::OK {
        return Err(format!("the issuer answered {}", response.status().as_u16()));
    }
    let body = Limited::new(response.into_body(), BODY_MAX_BYTES);
    let body = body.collect().await.map_err(|_| "the answer broke off or is larger than 64 KiB".to_owned())?;
    Ok(body.to_bytes())
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}
