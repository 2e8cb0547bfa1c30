//! What takes the sidecar's place in a control? Something that reads, and does nothing with it.
//!
//! A control says what the attacker and the kernel cost the others by themselves. Before the door of sidecars it speaks TLS, since the
//! attacker does; it never ends a connection.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context as _;
use rustls::ServerConfig;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

/// It reads until this is dropped.
#[derive(Debug)]
pub(crate) struct Sink {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    /// Starts one, behind TLS if a configuration for that is given.
    pub(crate) fn start(tls: Option<Arc<ServerConfig>>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("no runtime for the sink")?;
        let listener = runtime
            .block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .context("the sink can't listen on 127.0.0.1")?;
        let address = listener.local_addr().context("where does the sink listen?")?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("sink".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! { () = accept(listener, tls) => {}, _ = stopped => {} }
                });
            })
            .context("no thread for the sink")?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, tls: Option<Arc<ServerConfig>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let acceptor = tls.clone().map(TlsAcceptor::from);
        tokio::spawn(read(stream, acceptor));
    }
}

async fn read(mut stream: TcpStream, acceptor: Option<TlsAcceptor>) {
    let mut buffer = vec![0; 64 * 1024];
    match acceptor {
        None => while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {},
        Some(acceptor) => {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
        }
    }
}
