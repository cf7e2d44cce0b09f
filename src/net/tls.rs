//! TLS by rustls, as server and as client. Versions 1.2 and 1.3; one crypto provider in the whole process.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::verify_server_name,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use serde::Deserialize;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{
    Raw, Stream,
    trust::{self, Unnamed},
};

/// Tickets sent after a TLS 1.3 handshake. Drivers that resume at all take a new one from each connection; a second
/// costs an encryption, a record and its place in the client.
const TICKETS: usize = 1;

/// Whether clients have to show a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientAuth {
    /// None is asked for.
    #[default]
    None,
    /// One is asked for, and has to be good if it comes.
    Optional,
    /// No connection without a good one.
    Required,
}

/// How a listener speaks TLS.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The certificate, then its issuers, as PEM.
    pub cert_file: PathBuf,
    /// The certificate's private key, as PEM (PKCS#8, PKCS#1 or SEC1).
    pub key_file: PathBuf,
    /// Who may have signed clients' certificates, as PEM.
    #[serde(default)]
    pub client_ca_file: Option<PathBuf>,
    /// Whether clients have to show a certificate; default `"none"`.
    #[serde(default)]
    pub client_auth: ClientAuth,
}

impl TlsConfig {
    /// Whether the certificate is made out for a host by whose name clients connect.
    ///
    /// # Errors
    /// It can't be read: not after [`ServerTls::load`].
    pub fn is_for(&self, host: &str) -> Result<bool, TlsError> {
        let chain = certificates("certificate", &self.cert_file)?;
        let (Some(own), Ok(name)) = (chain.first(), ServerName::try_from(host)) else { return Ok(false) };
        let parsed = ParsedCertificate::try_from(own).map_err(TlsError::Crypto)?;
        Ok(verify_server_name(&parsed, &name).is_ok())
    }
}

/// What is wrong with a certificate, a key or a list of authorities, in words that say what to mend.
#[derive(Debug)]
pub enum TlsError {
    /// A file can't be read, or is not PEM.
    File {
        /// What it should hold.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        error: pem::Error,
    },
    /// A file is PEM and has nothing of the kind in it.
    Empty {
        /// What it should hold.
        what: &'static str,
        /// Which.
        path: PathBuf,
    },
    /// Certificate and key were refused, usually because they don't belong together.
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        error: rustls::Error,
    },
    /// A list of authorities was refused.
    Authorities {
        /// Where they are from.
        path: Option<PathBuf>,
        /// Why.
        error: String,
    },
    /// Settings that contradict each other.
    Settings(&'static str),
    /// The crypto library failed.
    Crypto(rustls::Error),
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TlsError::File { what, path, error } => match error {
                pem::Error::Io(error) => write!(f, "can't read the {what} {}: {error}", path.display()),
                pem::Error::NoItemsFound => TlsError::Empty { what, path: path.clone() }.fmt(f),
                error => write!(f, "{} is not a PEM file with a {what}: {error}", path.display()),
            },
            TlsError::Empty { what, path } => {
                write!(f, "{} holds no {what}: it has to be PEM, with its -----BEGIN line", path.display())
            }
            TlsError::Pair { cert, key, error } => {
                let (cert, key) = (cert.display(), key.display());
                match error {
                    rustls::Error::InconsistentKeys(_) => {
                        write!(f, "the key {key} is not the key of the first certificate in {cert}")
                    }
                    error => write!(f, "certificate {cert} and key {key} can't be used: {error}"),
                }
            }
            TlsError::Authorities { path: Some(path), error } => {
                write!(f, "the authorities in {} can't be used: {error}", path.display())
            }
            TlsError::Authorities { path: None, error } => {
                write!(f, "the system's certificate authorities can't be used, name a ca_file: {error}")
            }
            TlsError::Settings(what) => f.write_str(what),
            TlsError::Crypto(error) => write!(f, "TLS can't be set up: {error}"),
        }
    }
}

impl std::error::Error for TlsError {}

/// A listener's TLS: the present certificate, which a reload swaps.
#[derive(Debug)]
pub struct ServerTls {
    settings: TlsConfig,
    alpn: Vec<Vec<u8>>,
    present: ArcSwap<ServerConfig>,
}

impl ServerTls {
    /// Loads certificate and key. `alpn` are the protocols offered, best first; a client that offers only others is
    /// refused, one that offers none is served.
    ///
    /// # Errors
    /// What to mend. Files are read here: not for a thread that serves.
    pub fn load(config: &TlsConfig, alpn: &[&str]) -> Result<Self, TlsError> {
        let alpn = protocols(alpn);
        let present = ArcSwap::from_pointee(server_config(config, &alpn)?);
        Ok(Self { settings: config.clone(), alpn, present })
    }

    /// What to accept the next connection with. Connections that run keep what they began with.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.present.load_full())
    }

    /// Loads the same files again. Tickets given out before are no longer taken: a client whose authority was removed
    /// must not come back with one.
    ///
    /// # Errors
    /// What to mend; the present certificate stays in use.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.present.store(Arc::new(server_config(&self.settings, &self.alpn)?));
        Ok(())
    }
}

fn server_config(config: &TlsConfig, alpn: &[Vec<u8>]) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let chain = certificates("certificate", &config.cert_file)?;
    let key = PrivateKeyDer::from_pem_file(&config.key_file).map_err(|error| TlsError::File {
        what: "private key",
        path: config.key_file.clone(),
        error,
    })?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Crypto)?;
    let builder = match client_verifier(config, provider)? {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut server = builder.with_single_cert(chain, key).map_err(|error| TlsError::Pair {
        cert: config.cert_file.clone(),
        key: config.key_file.clone(),
        error,
    })?;
    server.alpn_protocols = alpn.to_vec();
    // Sealed tickets instead of a table of sessions: nothing is kept for a client that is gone.
    server.ticketer = aws_lc_rs::Ticketer::new().map_err(TlsError::Crypto)?;
    server.send_tls13_tickets = TICKETS;
    Ok(server)
}

fn client_verifier(
    config: &TlsConfig,
    provider: Arc<CryptoProvider>,
) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
    let path = match (&config.client_ca_file, config.client_auth) {
        (None, ClientAuth::None) => return Ok(None),
        (Some(_), ClientAuth::None) => {
            return Err(TlsError::Settings(
                "client_ca_file has no effect with client_auth = \"none\": set \"optional\" or \"required\"",
            ));
        }
        (None, ClientAuth::Optional | ClientAuth::Required) => {
            return Err(TlsError::Settings("client_auth needs client_ca_file: who signs the clients' certificates"));
        }
        (Some(path), ClientAuth::Optional | ClientAuth::Required) => path,
    };
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities(path)?), provider);
    let builder = match config.client_auth {
        ClientAuth::Required => builder,
        ClientAuth::None | ClientAuth::Optional => builder.allow_unauthenticated(),
    };
    builder
        .build()
        .map(Some)
        .map_err(|error| TlsError::Authorities { path: Some(path.clone()), error: error.to_string() })
}

/// Speaks TLS as the server on a plain stream. The deadline is the caller's, one for all that comes before
/// authentication.
///
/// # Errors
/// The handshake's, or `InvalidInput` for a stream that is TLS already.
///
/// # Cancel safety
/// Dropping it closes the stream.
pub async fn accept_tls(stream: Stream, acceptor: TlsAcceptor) -> io::Result<Stream> {
    let Stream::Plain(raw) = stream else { return Err(io::ErrorKind::InvalidInput.into()) };
    match acceptor.accept(raw).await {
        Ok(tls) => Ok(Stream::Tls(Box::new(TlsStream::Server(tls)))),
        Err(error) => {
            metrics::counter!("dynabase_tls_errors_total", "reason" => reason(&error)).increment(1);
            Err(error)
        }
    }
}

/// The metric label of a failed handshake: a small closed set.
fn reason(error: &io::Error) -> &'static str {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => "client_certificate",
        Some(rustls::Error::AlertReceived(_)) => "client_alert",
        Some(rustls::Error::NoApplicationProtocol) => "alpn",
        Some(rustls::Error::InvalidMessage(_)) => "not_tls",
        Some(_) => "handshake",
        None => "io",
    }
}

/// How an upstream is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// Without TLS: same machine or a private network.
    Disable,
    /// With TLS, whoever answers. With a `ca_file`, its certificate has to be signed by it, for any name.
    Require,
    /// With TLS, its certificate signed by `ca_file` (or an authority of the system) and for this host name.
    #[default]
    VerifyFull,
}

/// TLS towards upstreams. Sessions are resumed. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls(Option<TlsConnector>);

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "ClientTls" } else { "ClientTls(Disable)" })
    }
}

impl ClientTls {
    /// Loads the authorities that `mode` needs.
    ///
    /// # Errors
    /// What to mend. Files are read here: not for a thread that serves.
    pub fn new(mode: TlsMode, ca_file: Option<PathBuf>) -> Result<Self, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Crypto)?;
        let builder = match (mode, ca_file) {
            (TlsMode::Disable, _) => return Ok(Self(None)),
            (TlsMode::Require, None) => builder.dangerous().with_custom_certificate_verifier(trust::anyone(provider)),
            (TlsMode::Require, Some(path)) => {
                let verifier = Unnamed::new(authorities(&path)?, provider)
                    .map_err(|error| TlsError::Authorities { path: Some(path), error: error.to_string() })?;
                builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
            }
            (TlsMode::VerifyFull, Some(path)) => builder.with_root_certificates(authorities(&path)?),
            (TlsMode::VerifyFull, None) => builder.with_root_certificates(system_authorities()?),
        };
        let config = builder.with_no_client_auth();
        Ok(Self(Some(TlsConnector::from(Arc::new(config)))))
    }

    /// Whether connections are made with TLS.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Speaks TLS as the client to `host` on a connected socket, offering `alpn`; gives the socket as it is when TLS is
    /// off. What the upstream's protocol says before TLS (Postgres' SSLRequest) is the caller's to say.
    ///
    /// # Errors
    /// The handshake's; `InvalidInput` for a host that is neither a name nor an address.
    ///
    /// # Cancel safety
    /// Dropping it closes the socket.
    pub async fn connect(&self, raw: Raw, host: &str, alpn: &[&str]) -> io::Result<Stream> {
        let Some(connector) = &self.0 else { return Ok(Stream::Plain(raw)) };
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("host {host:?}: {error}")))?;
        let tls = connector.with_alpn(protocols(alpn)).connect(name, raw).await?;
        Ok(Stream::Tls(Box::new(TlsStream::Client(tls))))
    }
}

fn protocols(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect()
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fault = |error| TlsError::File { what, path: path.to_owned(), error };
    let all: Vec<_> = CertificateDer::pem_file_iter(path).map_err(fault)?.collect::<Result<_, _>>().map_err(fault)?;
    if all.is_empty() { Err(TlsError::Empty { what, path: path.to_owned() }) } else { Ok(all) }
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("authority's certificate", path)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::Authorities { path: Some(path.to_owned()), error: error.to_string() })?;
    }
    Ok(roots)
}

fn system_authorities() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Systems carry some certificates that rustls can't read; the others do.
    let (good, _bad) = roots.add_parsable_certificates(found.certs);
    if good == 0 {
        let error = found.errors.first().map_or_else(|| "there are none".to_owned(), ToString::to_string);
        return Err(TlsError::Authorities { path: None, error });
    }
    Ok(roots)
}

#[cfg(test)]
mod tests;
