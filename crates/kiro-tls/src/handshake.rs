//! How does a TLS handshake run, and what comes out of it?
//!
//! Both ends in one place: run it, see to it that the verifier was asked and the protocol is ours, write the one line, and
//! give the stream with what is known of the peer. Every future here may be dropped at any await (a caller puts its own time
//! limit round it); what was under way then still makes its line.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_core::signature::EXPORTER_LABEL;
use rustls::{CommonState, ConnectionCommon, ProtocolVersion};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, client, server};

use crate::config::{ClientCore, ServerCore};
use crate::error::{HandshakeError, HandshakeErrorKind as Kind, Stage, fix};
use crate::facts::LeafFacts;
use crate::line::Line;
use crate::verify::{Leg, PeerVerifier, Refusal, Side};

/// How long a refused caller may take to hang up. Closing a socket that has unread bytes resets the connection, and the caller
/// would see the reset instead of the alert that tells it why.
const LINGER: Duration = Duration::from_millis(250);

/// What a refused caller can have under way: the rest of its handshake and the first flight of HTTP/2.
const LINGER_BYTES_MAX: usize = 64 * 1024;

/// What the log line says of the connection.
#[derive(Clone, Debug)]
pub struct HandshakeContext {
    /// Whose sidecar we are.
    pub service: ServiceName,
    /// Our address.
    pub local: Option<SocketAddr>,
    /// The peer's.
    pub remote: Option<SocketAddr>,
    /// Which way requests go: `inbound`, `outbound`, `app`, `ingress`.
    pub direction: &'static str,
}

/// A connection whose two ends have proven what they had to.
#[derive(Debug)]
pub struct Established<S> {
    /// The encrypted stream.
    pub stream: S,
    /// Who is at the other end; `None` at the ingress alone.
    pub peer: Option<SpiffeId>,
    /// What its certificate says; `None` at the ingress alone.
    pub facts: Option<LeafFacts>,
    /// What was negotiated.
    pub tls: TlsFacts,
}

/// What two ends have negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// `TLSv1.3`, at the ingress `TLSv1.2` too.
    pub version: &'static str,
    /// The key exchange, such as `X25519MLKEM768`.
    pub group: &'static str,
    /// The cipher suite.
    pub cipher: &'static str,
}

impl TlsFacts {
    fn of(state: &CommonState) -> Self {
        let version = match state.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            // No config of ours has another one, and rustls's enum is open.
            _ => "unknown",
        };
        let group = state.negotiated_key_exchange_group().and_then(|group| group.name().as_str());
        let cipher = state.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
        Self { version, group: group.unwrap_or("unknown"), cipher: cipher.unwrap_or("unknown") }
    }
}

/// What only the two ends of this very connection know (RFC 8446 7.5), for the keys of signatures. `None` before the handshake
/// is complete.
#[must_use]
pub fn exporter<Data>(connection: &ConnectionCommon<Data>) -> Option<[u8; 32]> {
    connection.export_keying_material([0; 32], EXPORTER_LABEL, None).ok()
}

pub(crate) async fn accept<IO>(
    core: &ServerCore,
    io: IO,
    context: &HandshakeContext,
) -> Result<Established<server::TlsStream<IO>>, HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut line = Line::new(context, Side::Server, core.leg, core.expected());
    line.failures.clone_from(&core.failures);
    let mut hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), io);
    let start = match (&mut hello).await {
        Ok(start) => start,
        Err(error) => {
            let error = line.failed(&error, Stage::First);
            if let Some(io) = hello.take_io() {
                linger(io).await;
            }
            return Err(error);
        }
    };
    let config = match core.config() {
        Ok((config, verifier)) => {
            line.verifier = verifier;
            config
        }
        Err(error) => return Err(line.failed(&io::Error::other(error), Stage::Later)),
    };
    match start.into_stream(Arc::new(config)).into_fallible().await {
        Ok(stream) => match settle(line, stream.get_ref().1, core.requires_h2()) {
            Ok((peer, facts, tls)) => Ok(Established { stream, peer, facts, tls }),
            Err(error) => {
                linger(stream).await;
                Err(error)
            }
        },
        Err((error, io)) => {
            let error = line.failed(&error, Stage::Later);
            linger(io).await;
            Err(error)
        }
    }
}

pub(crate) async fn connect<IO>(
    core: &ClientCore,
    io: IO,
    context: &HandshakeContext,
) -> Result<Established<client::TlsStream<IO>>, HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut line = Line::new(context, Side::Client, core.leg(), Some(core.expected()));
    line.silent = core.silent;
    let (config, verifier) = match core.config() {
        Ok(made) => made,
        Err(error) => return Err(line.failed(&io::Error::other(error), Stage::Later)),
    };
    line.verifier = Some(verifier);
    let connector = TlsConnector::from(Arc::new(config));
    match connector.connect(core.server_name(), io).into_fallible().await {
        Ok(stream) => {
            let (peer, facts, tls) = settle(line, stream.get_ref().1, core.requires_h2())?;
            Ok(Established { stream, peer, facts, tls })
        }
        // Until a certificate has come, a record that is none means that the other end does not speak TLS.
        Err((error, _io)) => {
            let stage = line.verifier.as_ref().map_or(Stage::First, |verifier| match verifier.seen() {
                None => Stage::First,
                Some(_) => Stage::Later,
            });
            Err(line.failed(&error, stage))
        }
    }
}

type Settled = (Option<SpiffeId>, Option<LeafFacts>, TlsFacts);

/// The last look at a handshake that TLS is content with.
fn settle(line: Line<'_>, state: &CommonState, requires_h2: bool) -> Result<Settled, HandshakeError> {
    let (side, leg) = (line.side, line.leg);
    let tls = TlsFacts::of(state);
    let refuse =
        |kind, cause: &str| Refusal { kind, cause: cause.to_owned(), fix: fix(kind, side, leg).to_owned() };
    if requires_h2 && state.alpn_protocol() != Some(b"h2") {
        return Err(line.refused(refuse(Kind::Alpn, "the peer did not agree on HTTP/2 (ALPN h2)"), Some(tls)));
    }
    let proven = line.verifier.as_deref().and_then(PeerVerifier::seen).and_then(|seen| {
        let peer = seen.verdict.as_ref().ok()?;
        Some((peer.clone(), seen.facts.clone()?))
    });
    match proven {
        Some((peer, facts)) => {
            line.verified(&facts, tls);
            Ok((Some(peer), Some(facts), tls))
        }
        None if leg == Leg::Ingress => {
            line.nothing_to_verify();
            Ok((None, None, tls))
        }
        None => Err(line.refused(
            refuse(Kind::NoCertificate, "the handshake ended without a certificate having been verified"),
            Some(tls),
        )),
    }
}

/// Lets a refused caller read its alert: says that we are done, and reads until it hangs up.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let drained = async {
        stream.shutdown().await?;
        let mut scratch = [0; 1024];
        let mut left = LINGER_BYTES_MAX;
        loop {
            let count = stream.read(&mut scratch).await?;
            left = left.saturating_sub(count);
            if count == 0 || left == 0 {
                return io::Result::Ok(());
            }
        }
    };
    // However it ends, the connection is dropped now.
    let _ = tokio::time::timeout(LINGER, drained).await;
}
