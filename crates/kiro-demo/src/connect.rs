//! How does a call reach the sidecar? Over a pooled connection to its outbound port, whatever host the call is for.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Uri;
use http_body_util::Full;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::tls::Tls;

/// How long connecting and the TLS handshake may take. The proxy is in the same network namespace.
const CONNECT: Duration = Duration::from_secs(5);

/// How long an idle connection is kept: less than the sidecar waits for the head of a next request (10 s), since a request
/// sent into a closing connection is lost.
const IDLE: Duration = Duration::from_secs(4);

/// Idle connections kept for each host that is called.
const IDLE_CONNECTIONS_PER_HOST: usize = 64;

/// The pool of connections to the proxy.
pub(crate) type Client = legacy::Client<Connector, Full<Bytes>>;

/// Where the sidecar takes outgoing calls, written `https://127.0.0.1:15001` or `http://127.0.0.1:15001`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyAddress {
    /// Whether it is spoken to over TLS.
    pub tls: bool,
    /// A host name or an IP address (version 6 without brackets).
    pub host: String,
    /// Its port.
    pub port: u16,
}

/// Why a proxy address was not taken.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not a proxy address: write https://HOST:PORT, or http://HOST:PORT where it takes plain HTTP"
)]
pub struct BadProxyAddress(String);

impl FromStr for ProxyAddress {
    type Err = BadProxyAddress;

    fn from_str(text: &str) -> Result<Self, BadProxyAddress> {
        let bad = || BadProxyAddress(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad()),
        };
        let authority = uri.authority().ok_or_else(bad)?;
        if uri.path() != "/" || uri.query().is_some() || authority.as_str().contains('@') {
            return Err(bad());
        }
        let port = authority.port_u16().filter(|port| *port != 0).ok_or_else(bad)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() { Err(bad()) } else { Ok(Self { tls, host, port }) }
    }
}

impl fmt::Display for ProxyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        let Self { host, port, .. } = self;
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

/// Opens connections to the proxy.
#[derive(Clone)]
pub(crate) struct Connector {
    proxy: Arc<ProxyAddress>,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl Connector {
    /// `tls` is used where the proxy's address asks for it.
    pub(crate) fn new(proxy: ProxyAddress, tls: Option<&Tls>) -> Self {
        let tls = tls
            .filter(|_| proxy.tls)
            .map(|tls| (TlsConnector::from(Arc::clone(&tls.client)), tls.sidecar.clone()));
        Self { proxy: Arc::new(proxy), tls }
    }

    pub(crate) fn into_client(self) -> Client {
        legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_PER_HOST)
            .build(self)
    }

    async fn connect(self) -> io::Result<Link> {
        let connect = async {
            let tcp = TcpStream::connect((self.proxy.host.as_str(), self.proxy.port)).await?;
            tcp.set_nodelay(true)?;
            match self.tls {
                None => Ok(Link::Plain(TokioIo::new(tcp))),
                Some((tls, sidecar)) => {
                    Ok(Link::Tls(Box::new(TokioIo::new(tls.connect(sidecar, tcp).await?))))
                }
            }
        };
        tokio::time::timeout(CONNECT, connect).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

impl tower::Service<Uri> for Connector {
    type Response = Link;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Link>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The URI names the callee, and the sidecar will see to it: every connection is to the proxy.
    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

/// A connection to the proxy.
pub(crate) enum Link {
    Plain(TokioIo<TcpStream>),
    Tls(Box<TokioIo<TlsStream<TcpStream>>>),
}

trait Io: Read + Write + Unpin {}
impl<T: Read + Write + Unpin> Io for T {}

impl Link {
    fn io(self: Pin<&mut Self>) -> Pin<&mut dyn Io> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io),
            Self::Tls(io) => Pin::new(io.as_mut()),
        }
    }
}

impl Connection for Link {
    /// Marked as a proxy's, which makes the client write the absolute form.
    fn connected(&self) -> Connected {
        Connected::new().proxy(true)
    }
}

impl Read for Link {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        self.io().poll_read(cx, buffer)
    }
}

impl Write for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.io().poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_back() {
        for text in ["https://127.0.0.1:15001", "http://sidecar:80", "https://[::1]:15001"] {
            let address: ProxyAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            assert!(!address.host.contains('['));
        }
        assert!("https://127.0.0.1:15001/".parse::<ProxyAddress>().unwrap().tls);
    }

    #[test]
    fn other_addresses_are_refused() {
        for text in [
            "",
            "127.0.0.1:15001",
            "https://127.0.0.1",
            "https://127.0.0.1:0",
            "https://:15001",
            "ftp://127.0.0.1:15001",
            "http://user@127.0.0.1:15001",
            "http://127.0.0.1:15001/path",
            "http://127.0.0.1:15001/?q",
            "http://127.0.0.1:99999",
        ] {
            let error = text.parse::<ProxyAddress>().unwrap_err();
            assert!(error.to_string().contains("https://HOST:PORT"), "{text}");
        }
    }
}
