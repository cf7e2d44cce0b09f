//! TLS towards upstreams: how strictly, and the handshake.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use serde::Deserialize;

use super::stream::{Raw, Stream};

/// How strictly TLS is asked of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// No TLS.
    Disable,
    /// TLS, whoever answers.
    Require,
    /// TLS, and the certificate must be good for the host's name.
    VerifyFull,
}

/// Why TLS can't be set up.
#[derive(Debug)]
pub struct TlsError(String);

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TlsError {}

/// TLS as a client.
#[derive(Clone, Debug)]
pub struct ClientTls(Arc<ClientConfig>);

impl ClientTls {
    /// Trusts `ca_file` (PEM), or the system's authorities without one.
    ///
    /// # Errors
    /// A file that can't be read or holds no certificate.
    pub fn new(mode: TlsMode, ca_file: Option<PathBuf>) -> Result<ClientTls, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError(error.to_string()))?;
        let config = match mode {
            TlsMode::VerifyFull => builder.with_root_certificates(roots(ca_file.as_deref())?).with_no_client_auth(),
            TlsMode::Require | TlsMode::Disable => {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(algorithms))).with_no_client_auth()
            }
        };
        Ok(Self(Arc::new(config)))
    }

    /// Handshakes over `raw`, offering the protocols `alpn`.
    ///
    /// # Errors
    /// Of the socket, of the protocol, of the certificate.
    pub async fn connect(&self, raw: Raw, host: &str, alpn: &[&str]) -> io::Result<Stream> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "not a host name"))?;
        let mut config = ClientConfig::clone(&self.0);
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, raw).await?;
        Ok(Stream::Tls(Box::new(tls.into())))
    }
}

fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let fault = |error: &dyn fmt::Display| TlsError(format!("{}: {error}", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| fault(&error))? {
                store.add(certificate.map_err(|error| fault(&error))?).map_err(|error| fault(&error))?;
            }
        }
        None => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if store.is_empty() { Err(TlsError("no certificate authority to trust".into())) } else { Ok(store) }
}

/// Accepts every certificate, but still checks that the peer holds its key.
#[derive(Debug)]
struct Anyone(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
