//! What can be asked about a sidecar, and by whom?
//!
//! Port 15000, on loopback: `/live`, `/ready`, `/metrics`, `/config`, `/mesh/health`; read only, and only for requests whose Host is
//! `127.0.0.1` or `localhost`, so that a page in somebody's browser can't read it under a name of its own. Port 15020, for
//! others: `/live` and `/ready`, and `/metrics` where the mesh file says `metrics: open`. Both run on a thread of their own, so
//! that a look never costs a request.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use kiro_core::mesh::{Metrics as MetricsAccess, Signatures};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::admission::{Limit, Listener};
use crate::drain::{Phase, PhaseWatch};
use crate::edge::Edges;
use crate::health;
use crate::limits;
use crate::listen::accept_failed;
use crate::local::ports;
use crate::metrics::Metrics;
use crate::state::State;

/// What the admin thread looks at.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) states: watch::Receiver<Arc<State>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) edges: Arc<Edges>,
    pub(crate) phase: PhaseWatch,
    pub(crate) listeners: Arc<Vec<(&'static str, SocketAddr)>>,
    pub(crate) local_ports: watch::Receiver<ports::Table>,
}

/// Whom a listener serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    /// The pod's own loopback.
    Admin,
    /// Whoever reaches the pod.
    Others,
}

impl Audience {
    fn listener(self) -> Listener {
        match self {
            Audience::Admin => Listener::Admin,
            Audience::Others => Listener::Health,
        }
    }
}

/// The connections of one of the two listeners, the oldest first.
struct Room {
    open: VecDeque<AbortHandle>,
    metrics: Arc<Metrics>,
    listener: Listener,
}

impl Room {
    /// Makes room where there is none: answers take a moment, so whoever has been there for longest only keeps others out.
    fn make(&mut self) {
        self.open.retain(|connection| !connection.is_finished());
        if self.open.len() < limits::ADMIN_CONNECTIONS {
            return;
        }
        self.metrics.limit_hit(Limit::AdminConnections);
        if let Some(oldest) = self.open.pop_front() {
            self.metrics.connections(self.listener).evicted.inc();
            oldest.abort();
        }
    }

    fn serve(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        let open = Open::new(&self.metrics, self.listener);
        let task = tokio::spawn(async move {
            let _open = open;
            connection.await;
        });
        self.open.push_back(task.abort_handle());
    }
}

/// A connection that counts as open.
struct Open {
    metrics: Arc<Metrics>,
    listener: Listener,
}

impl Open {
    fn new(metrics: &Arc<Metrics>, listener: Listener) -> Self {
        let connections = metrics.connections(listener);
        connections.accepted.inc();
        connections.open.inc();
        Self { metrics: Arc::clone(metrics), listener }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.connections(self.listener).open.dec();
    }
}

/// Serves one of the two listeners until the sidecar stops.
pub(crate) async fn serve(listener: TcpListener, audience: Audience, view: View) {
    let mut room =
        Room { open: VecDeque::new(), metrics: Arc::clone(&view.metrics), listener: audience.listener() };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = view.phase.reached(Phase::Stopped) => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                accept_failed(&view.metrics, audience.listener(), &error);
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                continue;
            }
        };
        room.make();
        let view = view.clone();
        room.serve(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let response =
                    answer(audience, &view, request.method(), request.uri().path(), request.headers());
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits::HEAD)
                // Others ask once: who keeps asking on one connection keeps those out who only want to know.
                .keep_alive(audience == Audience::Admin)
                .serve_connection(TokioIo::new(stream), service);
            // Whoever never reads must not hold one of the few places for good.
            let limit = match audience {
                Audience::Admin => limits::ADMIN_CONNECTION,
                Audience::Others => limits::HEALTH_CONNECTION,
            };
            let _ = tokio::time::timeout(limit, connection).await;
        });
    }
}

fn answer(
    audience: Audience,
    view: &View,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Response<Full<Bytes>> {
    if audience == Audience::Admin && !is_local(headers) {
        return text(StatusCode::FORBIDDEN, "admin answers to Host 127.0.0.1 and localhost alone\n");
    }
    if method != Method::GET && method != Method::HEAD {
        return text(
            StatusCode::METHOD_NOT_ALLOWED,
            "admin is read only: what changes something goes by file\n",
        );
    }
    let open = || view.states.borrow().service.metrics == MetricsAccess::Open;
    match (path, audience) {
        // Neither asks how the application is: it may wait for its sidecar to start.
        ("/live", _) => text(StatusCode::OK, "live\n"),
        ("/ready", _) if view.phase.current() == Phase::Serving => text(StatusCode::OK, "ready\n"),
        ("/ready", _) => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        ("/metrics", Audience::Admin) => metrics(view),
        ("/metrics", Audience::Others) if open() => metrics(view),
        ("/config", Audience::Admin) => config(view),
        ("/mesh/health", Audience::Admin) => mesh_health(view),
        (_, Audience::Admin) => text(StatusCode::NOT_FOUND, "/live /ready /metrics /config /mesh/health\n"),
        (_, Audience::Others) => text(StatusCode::NOT_FOUND, "/live /ready\n"),
    }
}

fn is_local(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let Ok(host) = host.to_str() else { return false };
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    name == "127.0.0.1" || name.eq_ignore_ascii_case("localhost")
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", text)
}

fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn metrics(view: &View) -> Response<Full<Bytes>> {
    typed(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", view.metrics.render())
}

/// The mesh as this sidecar sees it.
fn mesh_health(view: &View) -> Response<Full<Bytes>> {
    let state = Arc::clone(&view.states.borrow());
    let document = health::document(&state, view.metrics.app_health(), view.phase.current(), &view.edges);
    typed(StatusCode::OK, "application/json", format!("{document:#}\n"))
}

/// What the sidecar runs with. Of secrets it says that they are there, never what they are.
fn config(view: &View) -> Response<Full<Bytes>> {
    let state = Arc::clone(&view.states.borrow());
    let facts = state.identity.identity.facts();
    let listeners: serde_json::Map<String, serde_json::Value> = view
        .listeners
        .iter()
        .map(|(name, address)| ((*name).to_owned(), json!(address.to_string())))
        .collect();
    let peers: Vec<_> = state
        .peers
        .iter()
        .map(|peer| {
            json!({
                "name": peer.name.as_str(),
                "identity": peer.id.to_string(),
                "protocol": format!("{:?}", peer.protocol).to_lowercase(),
                "endpoints": peer.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "edge_secret": if state.identity.edges.signing(peer.name.as_str()).is_some() { "present" } else { "missing" },
            })
        })
        .collect();
    let document = json!({
        "service": state.me.as_str(),
        "identity": state.id.to_string(),
        "generation": state.generation,
        "signatures": match state.signatures { Signatures::Required => "required", Signatures::Off => "off" },
        "listeners": listeners,
        "local_ports": local_ports(&view.local_ports.borrow()),
        "certificate": {
            "serial": facts.serial,
            "not_before": facts.not_before.to_string(),
            "not_after": facts.not_after.to_string(),
            "fingerprint_sha256": facts.fingerprint,
            "key": "redacted",
        },
        "allow": state.policy.lines().map(|line| line.to_string()).collect::<Vec<_>>(),
        "peers": peers,
    });
    typed(StatusCode::OK, "application/json", format!("{document:#}\n"))
}

/// Where the application finds each tcp service that it may reach, or why it does not.
fn local_ports(table: &ports::Table) -> serde_json::Map<String, serde_json::Value> {
    let show = |port: &ports::Port| match &port.state {
        Ok(listening) => json!({ "port": port.declared, "address": listening.address.to_string() }),
        Err(error) => json!({ "port": port.declared, "error": &**error }),
    };
    table.iter().map(|(service, port)| (service.to_string(), show(port))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(host: &[&'static str], local: bool) {
        let mut headers = HeaderMap::new();
        for host in host {
            headers.append(HOST, HeaderValue::from_static(host));
        }
        assert_eq!(is_local(&headers), local, "{host:?}");
    }

    #[test]
    fn admin_answers_to_its_own_names() {
        check(&["127.0.0.1:15000"], true);
        check(&["localhost"], true);
        check(&["LOCALHOST:15000"], true);
        check(&["evil.example:15000"], false);
        check(&["127.0.0.1.evil.example"], false);
        check(&[], false);
        check(&["localhost", "evil.example"], false);
    }
}
