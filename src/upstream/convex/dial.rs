//! The ways to a deployment: pooled HTTP/1.1 requests, and WebSockets.

use std::{fmt, io, path::PathBuf, time::Duration};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::{HeaderMap, Request, Response, body::Incoming, header, http::uri::PathAndQuery};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, handshake::client::generate_key, protocol::WebSocketConfig},
};

use super::Origin;
use crate::net::{ClientTls, Raw, Stream};

/// Longest time to connect, TLS and upgrade included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for the head of an answer: a function may run for ten minutes as an action, and Convex's own HTTP
/// timeout is 300 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(305);

/// How long an idle connection is kept: less than what load balancers usually do.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// Idle connections kept to one deployment: fewer than requests under way means a new connection for each of the rest.
const IDLE_MAX: usize = 512;

/// What is sent to a deployment.
pub type Sending = UnsyncBoxBody<Bytes, io::Error>;

/// What comes back.
pub type Answer = Response<Incoming>;

/// A sync socket to a deployment.
pub type Socket = WebSocketStream<Stream>;

/// Why there is no answer.
#[derive(Debug)]
pub enum DialError {
    /// It can't be reached; nothing ran.
    Unreachable(String),
    /// The request was sent, and then the connection broke: it may have run.
    Broken(String),
    /// It did not answer in time.
    Slow,
    /// It refused the socket with this status.
    Refused(u16),
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DialError::Unreachable(error) => write!(f, "unreachable: {error}"),
            DialError::Broken(error) => write!(f, "broken off: {error}"),
            DialError::Slow => f.write_str("no answer in time"),
            DialError::Refused(status) => write!(f, "refused with status {status}"),
        }
    }
}

impl std::error::Error for DialError {}

/// Pooled requests.
pub(super) struct Client(legacy::Client<HttpsConnector<HttpConnector>, Sending>);

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    pub(super) fn new(ca_file: Option<PathBuf>) -> Result<Self, String> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let tls = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS: {error}"))?
            .with_root_certificates(roots(ca_file)?)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_MAX)
            .build(connector.wrap_connector(tcp));
        Ok(Self(client))
    }

    pub(super) async fn request(&self, request: Request<Sending>) -> Result<Answer, DialError> {
        match tokio::time::timeout(ANSWER_TIMEOUT, self.0.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) if error.is_connect() => Err(DialError::Unreachable(cause(&error))),
            Ok(Err(error)) => Err(DialError::Broken(cause(&error))),
            Err(_) => Err(DialError::Slow),
        }
    }
}

fn roots(ca_file: Option<PathBuf>) -> Result<rustls::RootCertStore, String> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    match ca_file {
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
        Some(path) => {
            let fault = |error: &dyn fmt::Display| format!("upstream.convex.ca_file {}: {error}", path.display());
            for certificate in CertificateDer::pem_file_iter(&path).map_err(|error| fault(&error))? {
                roots.add(certificate.map_err(|error| fault(&error))?).map_err(|error| fault(&error))?;
            }
        }
    }
    Ok(roots)
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// Opens a WebSocket.
pub(super) async fn socket(
    tls: &ClientTls,
    origin: &Origin,
    path: PathAndQuery,
    headers: HeaderMap,
    settings: WebSocketConfig,
) -> Result<Socket, DialError> {
    tokio::time::timeout(CONNECT_TIMEOUT, open(tls, origin, path, headers, settings))
        .await
        .unwrap_or(Err(DialError::Slow))
}

async fn open(
    tls: &ClientTls,
    origin: &Origin,
    path: PathAndQuery,
    headers: HeaderMap,
    settings: WebSocketConfig,
) -> Result<Socket, DialError> {
    let unreachable = |error: io::Error| DialError::Unreachable(error.to_string());
    let host = origin.authority.host().trim_matches(['[', ']']);
    let tcp = TcpStream::connect((host, origin.port())).await.map_err(unreachable)?;
    tcp.set_nodelay(true).map_err(unreachable)?;
    let stream = match (origin.is_tls(), tls.is_on()) {
        (false, _) => Stream::Plain(Raw::Tcp(tcp)),
        (true, true) => tls.connect(Raw::Tcp(tcp), host, &["http/1.1"]).await.map_err(unreachable)?,
        (true, false) => return Err(DialError::Unreachable("this system has no certificate authorities".into())),
    };
    let mut request = Request::new(());
    *request.uri_mut() = origin.socket_uri(path);
    *request.headers_mut() = headers;
    let unnamed = |_| DialError::Unreachable("a host that can't be named".into());
    let named = header::HeaderValue::try_from(origin.authority.as_str()).map_err(unnamed)?;
    let key = generate_key().parse().map_err(|_| DialError::Unreachable("no randomness".into()))?;
    for (name, value) in [
        (header::HOST, named),
        (header::CONNECTION, header::HeaderValue::from_static("Upgrade")),
        (header::UPGRADE, header::HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_VERSION, header::HeaderValue::from_static("13")),
        (header::SEC_WEBSOCKET_KEY, key),
    ] {
        request.headers_mut().insert(name, value);
    }
    match client_async_with_config(request, stream, Some(settings)).await {
        Ok((socket, _)) => Ok(socket),
        Err(tungstenite::Error::Http(response)) => Err(DialError::Refused(response.status().as_u16())),
        Err(error) => Err(DialError::Unreachable(error.to_string())),
    }
}
