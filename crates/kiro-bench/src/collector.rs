//! Where do spans go? To an OTLP collector that counts them and keeps none.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tokio::sync::oneshot;
use tonic::transport::server::{Server, TcpIncoming};

use crate::ports;

/// A collector on a thread of its own, until it is dropped.
#[derive(Debug)]
pub(crate) struct Collector {
    received: Arc<AtomicU64>,
    /// Where it listens.
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Count(Arc<AtomicU64>);

#[tonic::async_trait]
impl TraceService for Count {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let resources = &request.get_ref().resource_spans;
        let scopes = resources.iter().flat_map(|resource| &resource.scope_spans);
        let spans: usize = scopes.map(|scope| scope.spans.len()).sum();
        self.0.fetch_add(spans as u64, Ordering::Relaxed);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Starts it.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let address = ports::free()?;
        let listener = std::net::TcpListener::bind(address)
            .with_context(|| format!("the collector cannot listen on {address}"))?;
        listener.set_nonblocking(true).context("the collector's listener")?;
        let received = Arc::new(AtomicU64::new(0));
        let service = TraceServiceServer::new(Count(Arc::clone(&received)));
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("the collector has no runtime")?;
        let thread = std::thread::Builder::new()
            .name("collector".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                    let serving = Server::builder()
                        .add_service(service)
                        .serve_with_incoming(TcpIncoming::from(listener));
                    // A collector that fails shows by spans that never arrive.
                    tokio::select! { _ = serving => {}, _ = stopped => {} }
                });
            })
            .context("the collector has no thread")?;
        Ok(Self { received, address, stop: Some(stop), thread: Some(thread) })
    }

    /// Spans that have arrived so far.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It ends by itself now; a panic in it has been printed.
            let _ = thread.join();
        }
    }
}
