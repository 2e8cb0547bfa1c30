//! What is set beside what, and at which work?

use serde::{Deserialize, Serialize};

use crate::stats::Figure;

/// The text of a name that is also a word of the command line.
macro_rules! named {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
        pub(crate) enum $type {
            $($(#[$variant_doc])* #[serde(rename = $name)] #[value(name = $name)] $variant,)+
        }
        impl $type {
            /// All, in the order in which they run and are shown.
            pub(crate) const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name on the command line and in the results.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

pub(crate) use named;

named! {
    /// Two proxies of one kind, one beside the client and one beside the application, or none.
    Pair {
        /// Kiro as a user gets it.
        KiroEverything = "kiro-everything",
        /// Kiro with mutual TLS and identity alone.
        KiroBare = "kiro-bare",
        /// Envoy, HTTP/2 between the two.
        EnvoyH2 = "envoy-h2",
        /// HAProxy, HTTP/2 between the two.
        HaproxyH2 = "haproxy-h2",
        /// HAProxy, HTTP/1.1 between the two.
        HaproxyH1 = "haproxy-h1",
        /// nginx, which speaks HTTP/1.1 to upstreams.
        NginxH1 = "nginx-h1",
        /// No proxy: what client, application and machine cost by themselves.
        Direct = "direct",
    }
}

named! {
    /// The work.
    Scenario {
        /// A GET that is answered by twelve bytes.
        Small = "small",
        /// A POST of 1 KiB.
        Post1k = "post-1k",
        /// A GET that is answered by 16 KiB.
        Get16k = "16k",
        /// A GET that is answered by 1 MiB.
        Down1m = "1m-down",
        /// A POST of 1 MiB.
        Up1m = "1m-up",
        /// gRPC calls of one small message each way.
        GrpcUnary = "grpc-unary",
        /// Bytes of a TCP service.
        TcpStream = "tcp-stream",
        /// A new connection between the proxies for each request, X25519.
        Handshake = "handshake",
        /// The same with the post-quantum hybrid X25519MLKEM768.
        HandshakePq = "handshake-pq",
        /// Ten thousand client connections that each made one request and are kept.
        Idle = "idle",
        /// Requests at a fixed rate, whatever the answers do.
        OpenLoop = "open-loop",
        /// Kiro with a small mesh file and with a large one.
        Growth = "growth",
        /// From a sidecar's start until it says that it is ready.
        Start = "start",
    }
}

/// What an application speaks, which decides how a pair is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// HTTP/1.1 from the client and to the application.
    Http,
    /// HTTP/2 by prior knowledge from the client and to the application.
    Grpc,
    /// Bytes.
    Tcp,
}

/// Connections that are kept in `idle`.
pub(crate) const IDLE_CONNECTIONS: usize = 10_000;
/// Client connections of the open loop; each has its own schedule.
pub(crate) const OPEN_LOOP_CONNECTIONS: usize = 64;
/// Streams of the one connection of a gRPC client.
pub(crate) const GRPC_STREAMS: usize = 32;
/// Connections of the TCP service's client.
pub(crate) const TCP_CONNECTIONS: usize = 4;

impl Pair {
    /// Whether it is one of Kiro's.
    pub(crate) const fn is_kiro(self) -> bool {
        matches!(self, Self::KiroEverything | Self::KiroBare)
    }

    /// The numbers of workers that it runs with; none where there is no proxy.
    pub(crate) const fn workers(self) -> &'static [usize] {
        match self {
            Self::Direct => &[0],
            Self::KiroEverything
            | Self::KiroBare
            | Self::EnvoyH2
            | Self::HaproxyH2
            | Self::HaproxyH1
            | Self::NginxH1 => &[1, 2],
        }
    }
}

impl Scenario {
    /// The concurrencies at which it runs.
    pub(crate) const fn connections(self) -> &'static [usize] {
        match self {
            Self::Small => &[1, 32, 256],
            Self::Post1k | Self::Get16k | Self::Growth => &[32],
            Self::Down1m | Self::Up1m => &[8],
            Self::GrpcUnary => &[GRPC_STREAMS],
            Self::TcpStream => &[TCP_CONNECTIONS],
            Self::Handshake | Self::HandshakePq | Self::Start => &[1],
            Self::Idle => &[IDLE_CONNECTIONS],
            Self::OpenLoop => &[OPEN_LOOP_CONNECTIONS],
        }
    }

    /// What the application behind speaks.
    pub(crate) const fn mode(self) -> Mode {
        match self {
            Self::GrpcUnary => Mode::Grpc,
            Self::TcpStream => Mode::Tcp,
            Self::Small
            | Self::Post1k
            | Self::Get16k
            | Self::Down1m
            | Self::Up1m
            | Self::Handshake
            | Self::HandshakePq
            | Self::Idle
            | Self::OpenLoop
            | Self::Growth
            | Self::Start => Mode::Http,
        }
    }

    /// The figure by which one of the two numbers of workers is the better one.
    pub(crate) const fn decides(self) -> Figure {
        match self {
            Self::Idle => Figure::RssMb,
            Self::OpenLoop => Figure::P99Ms,
            Self::Start => Figure::P50Ms,
            Self::Small
            | Self::Post1k
            | Self::Get16k
            | Self::Down1m
            | Self::Up1m
            | Self::GrpcUnary
            | Self::TcpStream
            | Self::Handshake
            | Self::HandshakePq
            | Self::Growth => Figure::CpuUs,
        }
    }

    /// Why a pair has no place in it, if it has none.
    pub(crate) const fn left_out(self, pair: Pair) -> Option<&'static str> {
        match (self, pair) {
            (Self::GrpcUnary, Pair::NginxH1 | Pair::HaproxyH1) => {
                Some("gRPC needs HTTP/2 between the proxies, and this pair speaks HTTP/1.1 there")
            }
            (Self::TcpStream, Pair::HaproxyH1) => {
                Some("HAProxy has one TCP mode, which is measured as haproxy-h2")
            }
            (Self::Handshake | Self::HandshakePq | Self::Idle | Self::Growth | Self::Start, Pair::Direct) => {
                Some("there is no proxy to measure")
            }
            (Self::Handshake, Pair::KiroEverything | Pair::KiroBare) => {
                Some("Kiro's group can't be set: it is measured with its own, in handshake-pq")
            }
            (Self::HandshakePq, Pair::HaproxyH2 | Pair::HaproxyH1 | Pair::NginxH1) => {
                Some("the OpenSSL that it is built with has no X25519MLKEM768")
            }
            (
                Self::Growth | Self::Start,
                Pair::KiroBare | Pair::EnvoyH2 | Pair::HaproxyH2 | Pair::HaproxyH1 | Pair::NginxH1,
            ) => Some("a question about Kiro as it comes"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_has_somebody_in_it() {
        for scenario in Scenario::ALL {
            assert!(Pair::ALL.iter().any(|pair| scenario.left_out(*pair).is_none()), "{scenario}");
            assert!(!scenario.connections().is_empty(), "{scenario}");
        }
    }
}
