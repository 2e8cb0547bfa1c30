//! What does a hostile sidecar hold? A good leaf and the secret of its edge: it is who it says it is, and misbehaves.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue};
use kiro_core::identity::ServiceName;
use kiro_core::signature::{ConnectionKey, EXPORTER_LABEL, EdgeSecret, Head, KeyId, Signer};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};
use serde::Deserialize;

use crate::identity::{CALLEE, CALLER, Identities};

/// Everything that an attacker shows and signs with.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    /// TLS with the caller's leaf.
    pub(crate) with_leaf: Arc<ClientConfig>,
    /// TLS without one.
    pub(crate) without_leaf: Arc<ClientConfig>,
    /// The other end of TLS, for what takes the sidecar's place in a control.
    pub(crate) server: Arc<ServerConfig>,
    edge: Arc<Edge>,
}

#[derive(Debug)]
struct Edge {
    keyid: KeyId,
    secret: EdgeSecret,
}

#[derive(Deserialize)]
struct EdgesFile {
    edges: Vec<EdgeEntry>,
}

#[derive(Deserialize)]
struct EdgeEntry {
    source: String,
    target: String,
    epoch: u32,
    secret: String,
}

impl Keys {
    /// Reads what the caller holds, and for controls what the callee shows.
    pub(crate) fn read(identities: &Identities) -> anyhow::Result<Self> {
        let roots = roots(&identities.caller)?;
        let builder = || {
            ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
                .with_root_certificates(roots.clone())
        };
        let (chain, key) = leaf(&identities.caller)?;
        let mut with_leaf = builder().with_client_auth_cert(chain, key).context("the caller's leaf")?;
        let mut without_leaf = builder().with_no_client_auth();
        let (chain, key) = leaf(&identities.callee)?;
        let mut server = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .context("the callee's leaf")?;
        server.send_tls13_tickets = 0;
        for protocols in
            [&mut with_leaf.alpn_protocols, &mut without_leaf.alpn_protocols, &mut server.alpn_protocols]
        {
            protocols.push(b"h2".to_vec());
        }
        Ok(Self {
            with_leaf: Arc::new(with_leaf),
            without_leaf: Arc::new(without_leaf),
            server: Arc::new(server),
            edge: Arc::new(edge(&identities.caller)?),
        })
    }

    /// What signs on one connection.
    pub(crate) fn signer(&self, connection: &ClientConnection) -> anyhow::Result<Signer> {
        let exporter = connection
            .export_keying_material([0; 32], EXPORTER_LABEL, None)
            .context("the handshake is not complete")?;
        let Edge { keyid, secret } = self.edge.as_ref();
        Ok(Signer::new(ConnectionKey::derive(secret, &exporter, keyid), keyid.clone()))
    }
}

/// What the head of a request carries, signed; with a body, its digest is promised for the trailers.
pub(crate) fn signed(signer: &mut Signer, method: &str, path: &str) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    if method == "POST" {
        headers.insert("trailer", HeaderValue::from_static("content-digest"));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let head = Head { method, authority: CALLEE, path, query: None };
    signer.sign(&head, &mut headers, now.as_secs())?;
    Ok(headers)
}

fn roots(dir: &Path) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(&read(dir, "ca.pem")?).context("ca.pem is none")?;
    roots.add(ca).context("ca.pem is no authority's")?;
    Ok(roots)
}

fn leaf(dir: &Path) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_slice_iter(&read(dir, "leaf.pem")?).collect::<Result<Vec<_>, _>>();
    let key = PrivateKeyDer::from_pem_slice(&read(dir, "leaf.key")?).context("leaf.key is none")?;
    Ok((chain.context("leaf.pem is none")?, key))
}

fn edge(dir: &Path) -> anyhow::Result<Edge> {
    let file: EdgesFile = serde_json::from_slice(&read(dir, "edges.json")?).context("edges.json")?;
    let entry = file.edges.into_iter().find(|edge| edge.source == CALLER && edge.target == CALLEE);
    let entry = entry.context("the caller has no secret for the callee")?;
    let bytes = STANDARD.decode(&entry.secret).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let secret = EdgeSecret::from_bytes(bytes.context("the secret is not 32 bytes in base64")?);
    let keyid = KeyId {
        source: ServiceName::parse(CALLER)?,
        target: ServiceName::parse(CALLEE)?,
        epoch: entry.epoch,
    };
    Ok(Edge { keyid, secret })
}

fn read(dir: &Path, name: &str) -> anyhow::Result<Vec<u8>> {
    let file = dir.join(name);
    fs::read(&file).with_context(|| format!("cannot read {}", file.display()))
}
