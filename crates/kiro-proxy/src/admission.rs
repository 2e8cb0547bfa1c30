//! What does a sidecar admit at a time, who holds how much of it, and what happens at the bound?
//!
//! Each connection that a listener accepts holds a [`Place`] until the last of what was made of it is gone, upgraded streams and
//! tunnels included; each that a worker opens holds a [`Seat`]. The bounds themselves stand in [`crate::limits`], but for those that
//! follow from the descriptors that the system gives, which [`Admission`] works out; [`Limit`] names those that somebody can run
//! into, so that `/metrics` shows each with how often that happened.
//!
//! **Invariant.** Places, seats and what is kept for no connections ([`limits::DESCRIPTOR_RESERVE`], and
//! [`limits::DESCRIPTORS_PER_WORKER`]) come to no more than the descriptors of the process, so none of them is ever refused by the
//! system: whatever crowd there is, a listener can accept, and a request can be passed on.

mod gate;
mod heads;
mod places;
mod seats;

pub(crate) use self::gate::{Gate, HandshakeTurn};
pub(crate) use self::heads::{Block, HalfHead, HalfHeads};
pub(crate) use self::places::{Place, Places};
pub(crate) use self::seats::{PeerSeat, Peers, Seat, Seats};
use crate::limits;

/// A port of the sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listener {
    /// The application's proxy.
    Outbound,
    /// Mutual TLS from other sidecars.
    Inbound,
    /// The ingress without TLS.
    Ingress,
    /// The ingress with TLS.
    IngressTls,
    /// Ports of the pod's loopback that lead to tcp services.
    Local,
    /// Admin, on the pod's loopback.
    Admin,
    /// Health for others.
    Health,
}

impl Listener {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Listener; 7] = [
        Listener::Outbound,
        Listener::Inbound,
        Listener::Ingress,
        Listener::IngressTls,
        Listener::Local,
        Listener::Admin,
        Listener::Health,
    ];

    /// The word that log and metrics use.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Listener::Outbound => "outbound",
            Listener::Inbound => "inbound",
            Listener::Ingress => "ingress",
            Listener::IngressTls => "ingress_tls",
            Listener::Local => "local",
            Listener::Admin => "admin",
            Listener::Health => "health",
        }
    }
}

/// A bound that somebody can run into, and of which there is something to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// [`Admission::connections`].
    Connections,
    /// [`Admission::worker_connections`].
    WorkerConnections,
    /// [`Admission::app_connections`].
    AppConnections,
    /// [`Admission::upstreams`].
    Upstreams,
    /// [`limits::CONNECTIONS_PER_PEER`].
    PeerConnections,
    /// [`limits::ADMIN_CONNECTIONS`].
    AdminConnections,
    /// What the system gives this process (`ulimit -n`).
    Descriptors,
    /// [`limits::HANDSHAKES_PER_LISTENER`].
    Handshakes,
    /// [`limits::CLIENT_STREAMS`].
    ClientStreams,
    /// [`limits::STREAMS_PER_CONNECTION`].
    PeerStreams,
    /// [`limits::STREAM_WAITERS`].
    StreamWaiters,
    /// [`limits::HEADER_BYTES`].
    HeaderBytes,
    /// [`limits::HALF_HEADS_BYTES`].
    HalfHeads,
}

impl Limit {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Limit; 13] = [
        Limit::Connections,
        Limit::WorkerConnections,
        Limit::AppConnections,
        Limit::Upstreams,
        Limit::PeerConnections,
        Limit::AdminConnections,
        Limit::Descriptors,
        Limit::Handshakes,
        Limit::ClientStreams,
        Limit::PeerStreams,
        Limit::StreamWaiters,
        Limit::HeaderBytes,
        Limit::HalfHeads,
    ];

    /// The metric's label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Limit::Connections => "connections",
            Limit::WorkerConnections => "worker_connections",
            Limit::AppConnections => "app_connections",
            Limit::Upstreams => "upstream_connections",
            Limit::PeerConnections => "peer_connections",
            Limit::AdminConnections => "admin_connections",
            Limit::Descriptors => "descriptors",
            Limit::Handshakes => "handshakes",
            Limit::ClientStreams => "client_streams",
            Limit::PeerStreams => "peer_streams",
            Limit::StreamWaiters => "stream_waiters",
            Limit::HeaderBytes => "header_bytes",
            Limit::HalfHeads => "half_heads_bytes",
        }
    }

    /// What is bounded, what happens at the bound, and where its use is seen: for the documentation.
    #[cfg(test)]
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Limit::Connections => {
                "connections that one worker serves at one listener, upgraded ones and tunnels included, all local ports together; the next one makes one that carries no request end, and is closed where there is none. In use: `kiro_connections_open`"
            }
            Limit::WorkerConnections => {
                "connections that one worker serves at all of its listeners, of which each is sure of a 16th, at most 256; the next one makes one that carries no request end, at the listener that has most, and is closed where there is none. In use: `kiro_connections_open`"
            }
            Limit::AppConnections => {
                "connections of one worker to its application, idle ones, upgraded ones and tunnels included; a request that finds none waits a second and is then refused with `queue_full`. In use: `kiro_app_connections_open`"
            }
            Limit::Upstreams => {
                "connections of one worker to other sidecars; the next one makes one that carries no request end, and is refused with `queue_full` where there is none. In use: `kiro_upstream_connections_open`"
            }
            Limit::PeerConnections => {
                "connections that other sidecars of one identity have to one worker; the next one is closed after its handshake, with a line in the log. In use: `kiro_connections_open`"
            }
            Limit::AdminConnections => {
                "connections at each of the ports 15000 and 15020; the next one ends the oldest. In use: `kiro_connections_open`"
            }
            Limit::Descriptors => {
                "what the system gives this process (`ulimit -n`), raised to its hard limit at start; past it a connection waits in the kernel. In use: `process_open_fds`"
            }
            Limit::Handshakes => {
                "TLS handshakes that one worker runs at one listener; the next one waits for its turn, which the oldest has to give up after a second. In use: `kiro_tls_handshakes_in_progress`"
            }
            Limit::ClientStreams => {
                "streams that a client has open on one HTTP/2 connection; the next one is reset with REFUSED_STREAM. In use: `kiro_requests_in_flight`"
            }
            Limit::PeerStreams => {
                "streams that another sidecar has open on one connection; the next one is reset with REFUSED_STREAM. In use: `kiro_requests_in_flight`"
            }
            Limit::StreamWaiters => {
                "requests that wait for a free stream to one peer at one worker; the next one is refused with `queue_full`. In use: `kiro_requests_in_flight`"
            }
            Limit::HeaderBytes => {
                "bytes of a request's head or trailers; a larger head is refused with `headers_too_large`"
            }
            Limit::HalfHeads => {
                "bytes that one worker holds of clients' heads above 8 KiB that have begun and not ended; the connection whose head began first is cut"
            }
        }
    }
}

/// Raises the process's soft limit of descriptors to its hard one, as Go's runtime does; how many it may have now.
#[must_use]
pub fn process_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: now.maximum, maximum: now.maximum };
    // A system that does not let it happen leaves the limit as it was.
    let _ = setrlimit(Resource::Nofile, raised);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The listeners that share the places of a worker, in the order of their discriminants. Admin and health have their own.
pub(crate) const SHARING: [Listener; 5] =
    [Listener::Outbound, Listener::Inbound, Listener::Ingress, Listener::IngressTls, Listener::Local];

/// What this process admits, worked out at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Admission {
    /// Connections that one worker serves at a time at one listener.
    pub(crate) connections: usize,
    /// And at all of its listeners.
    pub(crate) worker_connections: usize,
    /// Those of them that each listener is sure of, whatever happens at the others.
    pub(crate) sure_connections: usize,
    /// Connections that one worker may have to the application.
    pub(crate) app_connections: usize,
    /// Connections that one worker may have to other sidecars.
    pub(crate) upstreams: usize,
    /// Descriptors that this process may have.
    pub(crate) descriptors: u64,
}

impl Admission {
    /// Shares the descriptors out, beside those that are for no connections, to each worker as many as to any other. Of a worker's, a 16th
    /// is for connections to peers, of which each carries many requests, and a third for those to the application, which over HTTP/1
    /// carry one each; with all others it serves clients.
    pub(crate) fn shared(descriptors: u64, workers: usize) -> Self {
        let reserve = limits::DESCRIPTOR_RESERVE.min(descriptors / 2);
        let share = (descriptors - reserve) / workers.max(1) as u64;
        let share =
            usize::try_from(share).unwrap_or(usize::MAX).saturating_sub(limits::DESCRIPTORS_PER_WORKER);
        let upstreams = (share / 16).clamp(1, limits::UPSTREAMS);
        let app_connections = (share / 3).clamp(1, limits::APP_CONNECTIONS);
        let worker_connections = share
            .saturating_sub(upstreams + app_connections)
            .clamp(SHARING.len(), SHARING.len() * limits::CONNECTIONS_PER_LISTENER);
        let sure_connections = (worker_connections / 16).clamp(1, limits::SURE_CONNECTIONS);
        let others = (SHARING.len() - 1) * sure_connections;
        let connections = (worker_connections - others).min(limits::CONNECTIONS_PER_LISTENER);
        Self { connections, worker_connections, sure_connections, app_connections, upstreams, descriptors }
    }

    /// The same, and says where they are few.
    pub(crate) fn of(descriptors: u64, workers: usize) -> Self {
        let admission = Self::shared(descriptors, workers);
        if admission.connections < limits::CONNECTIONS_PER_LISTENER {
            tracing::warn!(
                target: "kiro::start", descriptors, workers, connections = admission.connections,
                app_connections = admission.app_connections, wanted = limits::CONNECTIONS_PER_LISTENER,
                "few file descriptors: each worker serves fewer connections at a listener; raise the hard limit of `ulimit -n` (Compose: `ulimits: nofile`)"
            );
        }
        admission
    }

    /// The bound of a limit.
    pub(crate) fn bound(&self, limit: Limit) -> u64 {
        match limit {
            Limit::Connections => self.connections as u64,
            Limit::WorkerConnections => self.worker_connections as u64,
            Limit::AppConnections => self.app_connections as u64,
            Limit::Upstreams => self.upstreams as u64,
            Limit::PeerConnections => limits::CONNECTIONS_PER_PEER as u64,
            Limit::AdminConnections => limits::ADMIN_CONNECTIONS as u64,
            Limit::Descriptors => self.descriptors,
            Limit::Handshakes => limits::HANDSHAKES_PER_LISTENER as u64,
            Limit::ClientStreams => limits::CLIENT_STREAMS.into(),
            Limit::PeerStreams => limits::STREAMS_PER_CONNECTION.into(),
            Limit::StreamWaiters => limits::STREAM_WAITERS as u64,
            Limit::HeaderBytes => limits::HEADER_BYTES as u64,
            Limit::HalfHeads => limits::HALF_HEADS_BYTES as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_and_limits_stand_in_the_order_of_their_labels() {
        for (place, listener) in Listener::ALL.into_iter().enumerate() {
            assert_eq!(listener as usize, place, "{listener:?}");
        }
        for (place, listener) in SHARING.into_iter().enumerate() {
            assert_eq!(listener as usize, place, "{listener:?}");
        }
        for (place, limit) in Limit::ALL.into_iter().enumerate() {
            assert_eq!(limit as usize, place, "{limit:?}");
        }
    }

    /// All that the workers may have open comes to no more than the descriptors, whatever their number.
    #[test]
    fn descriptors_never_run_out() {
        for workers in [1, 2, 7, 64] {
            for descriptors in [1024, 4096, 20_000, 65_536, 1 << 20, u64::MAX] {
                let admission = Admission::shared(descriptors, workers);
                let Admission { worker_connections, app_connections, upstreams, .. } = admission;
                if workers == 64 && descriptors == 1024 {
                    // Twelve descriptors a worker; it serves one connection at each listener all the same.
                    continue;
                }
                let each = worker_connections + app_connections + upstreams + limits::DESCRIPTORS_PER_WORKER;
                let most = each * workers;
                assert!(most as u64 + limits::DESCRIPTOR_RESERVE <= descriptors, "{admission:?}");
                assert!(admission.sure_connections * SHARING.len() <= worker_connections, "{admission:?}");
            }
        }
    }

    #[test]
    fn a_listener_may_have_what_the_others_do_not_use() {
        let connections = |descriptors, workers| Admission::shared(descriptors, workers).connections;
        assert_eq!(connections(20_000, 1), limits::CONNECTIONS_PER_LISTENER);
        assert_eq!(connections(u64::MAX, 64), limits::CONNECTIONS_PER_LISTENER);
        assert_eq!(connections(1024, 2), 161);
        // However few there are, one connection at a time is served at each.
        assert_eq!((connections(16, 8), connections(0, 1)), (1, 1));
    }
}
