//! How does an application look that lives in a mesh? Like any other: these three know a proxy's address and their own
//! certificate, and nothing else.
//!
//! Dashboard asks Profile and Auth about a user, Profile asks Auth, and Auth decides. A person sees on Dashboard's page
//! which service, or the mesh between them, had the last word on a call.
//!
//! - [`serve`] runs one [`Service`]; the program `kiro-demo` is a thin layer over it.
//! - `dashboard`, `profile`, `auth`: what each service does. `page`: what a person sees.
//! - `upstream`, `connect`: calls to other services. `listen`: the server's side. `tls`, `links`: certificates, both ways.
//! - `observe`: span and log line of each request. `answer`: who says no, and how that is passed on.
//!
//! **Invariant.** No crate of the mesh is used here but `kiro-telemetry`. What an application needs of the mesh is what
//! this crate shows, and nothing more.

mod answer;
mod app;
mod auth;
mod connect;
mod dashboard;
mod links;
mod listen;
mod observe;
mod page;
mod profile;
mod tls;
mod upstream;
mod user;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use kiro_telemetry::trace::Tracing;
use tokio::net::TcpListener;
use tracing::info;

pub use connect::{BadProxyAddress, ProxyAddress};
pub use links::StartError;
pub use page::{BadJaegerUi, JaegerUi};
pub use tls::{TlsError, TlsMaterial, TlsSource};

/// One of the three services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Service {
    /// What a person asks.
    Dashboard,
    /// Who users are.
    Profile,
    /// What users may.
    Auth,
}

impl Service {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Dashboard, Self::Profile, Self::Auth];

    /// Its name in the mesh, which is also the DNS name of its sidecar's leaf.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dashboard => "dashboard",
            Self::Profile => "profile",
            Self::Auth => "auth",
        }
    }

    /// The DNS name of its own leaf.
    pub const fn app_dns_name(self) -> &'static str {
        match self {
            Self::Dashboard => "app.dashboard",
            Self::Profile => "app.profile",
            Self::Auth => "app.auth",
        }
    }

    /// The port that it has in the mesh file.
    pub const fn default_port(self) -> u16 {
        match self {
            Self::Dashboard => 8001,
            Self::Profile => 8002,
            Self::Auth => 8003,
        }
    }

    /// How long it waits for another service. The inner of two calls gives up first, so that its word still gets out, and
    /// both do so before the mesh's default timeout of 15 s.
    pub const fn call_timeout(self) -> Duration {
        match self {
            Self::Dashboard => Duration::from_secs(10),
            Self::Profile | Self::Auth => Duration::from_secs(5),
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a service runs with.
#[derive(Debug)]
pub struct Options {
    /// Where it is asked, bound by the caller.
    pub listener: TcpListener,
    /// Its certificates. With them the listener takes its own sidecar alone, over mutual TLS; without, anybody over plain
    /// HTTP.
    pub tls: Option<TlsSource>,
    /// Where it asks others.
    pub proxy: ProxyAddress,
    /// Where the links of Dashboard's page lead.
    pub jaeger_ui: JaegerUi,
    /// Where its spans go.
    pub tracing: Tracing,
    /// How long it waits for another service; [`Service::call_timeout`] unless there is a reason.
    pub call_timeout: Duration,
    /// Its name among several of the same service; Profile's answers say it, so that a person sees how calls are spread.
    pub replica: Option<String>,
}

/// Runs `service` until `shutdown` ends, then lets the requests under way finish (for at most ten seconds). Fails only
/// before it serves.
pub async fn serve(
    service: Service,
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), StartError> {
    let Options { listener, tls, proxy, jaeger_ui, tracing, call_timeout, replica } = options;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let proxy_text = proxy.to_string();
    let (links, keep_current) = links::start(service, tls, proxy)?;

    let upstream = upstream::Upstream { service, links: links.clone(), timeout: call_timeout };
    let observer = observe::Observer { service, tracing, scheme };
    let router = app::router(app::App { service, upstream, replica }, page::Page::new(&jaeger_ui), observer);
    let address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
    info!(service = service.name(), address, scheme, proxy = proxy_text, "serving");

    let serving = listen::serve(service, listener, links, router, shutdown);
    tokio::select! {
        () = serving => {}
        // Ends only when nobody holds the links any more, which `serving` does.
        () = keep_current => {}
    }
    Ok(())
}
