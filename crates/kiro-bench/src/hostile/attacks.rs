//! Who attacks, through which door, how hard, and what may it make a sidecar hold?
//!
//! The rates are far above what a sidecar allows (50 frames that carry nothing a second, 1000 between sidecars) and far below what
//! would keep a core busy: attacker, sidecars, application and client share the machine, and what is asked is what the sidecar does to
//! others, not what the scheduler does.

use serde::{Deserialize, Serialize};

use crate::plan::named;

named! {
    /// A way into a sidecar.
    Door {
        /// The application's, 15001 in a pod.
        Outbound = "outbound",
        /// The one for clients from outside.
        Ingress = "ingress",
        /// Other sidecars', 15006 in a pod, with a leaf that is good.
        Inbound = "inbound",
        /// The same before TLS is through.
        Handshake = "handshake",
    }
}

named! {
    /// What is done there.
    Attack {
        /// Requests that are reset at once.
        RapidReset = "rapid-reset",
        /// Frames for which the sidecar has to reset.
        MadeToReset = "made-to-reset",
        /// A head without end.
        Continuation = "continuation",
        /// A small head that decodes to a large one.
        HpackBomb = "hpack-bomb",
        /// PING.
        Ping = "ping",
        /// SETTINGS.
        Settings = "settings",
        /// A body of empty pieces.
        EmptyData = "empty-data",
        /// A body of pieces of a byte.
        ByteBody = "1-byte-body",
        /// Trailers without end.
        EndlessTrailers = "endless-trailers",
        /// The same in HTTP/1.1.
        EndlessTrailersH1 = "endless-trailers-h1",
        /// Large answers, and no leave to send them.
        ZeroWindows = "zero-windows",
        /// Nearly a whole head, and then a byte a second.
        SlowHeads = "slow-heads",
        /// The beginning of HTTP/2's preface, and then nothing.
        SlowPrefaces = "slow-prefaces",
        /// The beginning of a ClientHello, and then nothing.
        SlowHandshakes = "slow-handshakes",
        /// What is no TLS.
        NoTls = "no-tls",
        /// Whole handshakes of somebody who has no leaf.
        NoLeaf = "no-leaf",
    }
}

/// Frames a second at the doors of clients: 200 times the allowance of frames that carry nothing, 50 times that of resets.
const CLIENT_RATE: u32 = 10_000;
/// The same between sidecars: 20 times and 5 times the allowances.
const PEER_RATE: u32 = 20_000;
/// How often an abuser that was cut off comes again in a second.
const AGAIN_RATE: u32 = 50;
/// The same where it costs him a TLS handshake.
const AGAIN_TLS_RATE: u32 = 20;

/// How it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One connection after the other, each for as long as it is let.
    Frames {
        /// Frames, chunks or lines a second.
        rate: u32,
        /// New connections a second at most.
        again: u32,
    },
    /// Connections that are opened and kept.
    Crowd {
        /// So many in all.
        connections: usize,
        /// So many a second.
        rate: u32,
    },
    /// A crowd, each with so many requests.
    Streams {
        /// So many connections.
        connections: usize,
        /// So many requests on each.
        streams: u32,
        /// Requests a second of all together.
        rate: u32,
    },
}

/// What is to come of it while it is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Cut off, with a line that has one of these reasons.
    Cut(&'static [&'static str]),
    /// Refused with an access line of one of these codes.
    Rejected(&'static [&'static str]),
    /// Refused in the handshake.
    Refused(&'static [&'static str]),
    /// Served: it breaks no rule.
    Served,
    /// Nothing yet: it is given the time that a slow client is given (see [`super::patience`]).
    Later,
}

impl Attack {
    /// The doors that it can be done at.
    pub(crate) const fn doors(self) -> &'static [Door] {
        match self {
            Self::RapidReset
            | Self::MadeToReset
            | Self::Continuation
            | Self::HpackBomb
            | Self::Ping
            | Self::Settings
            | Self::EmptyData
            | Self::ByteBody
            | Self::EndlessTrailers
            | Self::ZeroWindows => &[Door::Outbound, Door::Ingress, Door::Inbound],
            Self::EndlessTrailersH1 | Self::SlowHeads => &[Door::Outbound, Door::Ingress],
            Self::SlowPrefaces => &[Door::Inbound],
            Self::SlowHandshakes | Self::NoTls | Self::NoLeaf => &[Door::Handshake],
        }
    }

    /// How, through this door.
    pub(crate) const fn shape(self, door: Door) -> Shape {
        let (rate, again) = match door {
            Door::Outbound | Door::Ingress => (CLIENT_RATE, AGAIN_RATE),
            Door::Inbound | Door::Handshake => (PEER_RATE, AGAIN_TLS_RATE),
        };
        match self {
            Self::SlowHeads => Shape::Crowd { connections: 500, rate: 500 },
            Self::SlowPrefaces => Shape::Crowd { connections: 100, rate: 100 },
            // More than may be under way.
            Self::SlowHandshakes => Shape::Crowd { connections: 600, rate: 600 },
            Self::ZeroWindows => Shape::Streams { connections: 4, streams: 100, rate: 400 },
            // It is served, all of it: the rate is that of a client whose every key press is a chunk, times a thousand.
            Self::ByteBody => Shape::Frames { rate: 2_000, again },
            Self::NoTls => Shape::Frames { rate, again: 500 },
            Self::NoLeaf => Shape::Frames { rate, again: 2 * AGAIN_TLS_RATE },
            Self::RapidReset
            | Self::MadeToReset
            | Self::Continuation
            | Self::HpackBomb
            | Self::Ping
            | Self::Settings
            | Self::EmptyData
            | Self::EndlessTrailers
            | Self::EndlessTrailersH1 => Shape::Frames { rate, again },
        }
    }

    /// What is to come of it.
    pub(crate) const fn expected(self) -> Expected {
        match self {
            Self::RapidReset => Expected::Cut(&["rapid_reset"]),
            Self::MadeToReset => Expected::Cut(&["stream_errors"]),
            Self::Continuation | Self::EndlessTrailers => Expected::Cut(&["continuation_flood"]),
            Self::HpackBomb => Expected::Cut(&["header_bomb"]),
            Self::Ping | Self::Settings => Expected::Cut(&["control_flood"]),
            Self::EmptyData => Expected::Cut(&["tiny_data"]),
            Self::EndlessTrailersH1 => Expected::Rejected(&["message_invalid", "headers_too_large"]),
            Self::ByteBody => Expected::Served,
            Self::ZeroWindows | Self::SlowHeads | Self::SlowPrefaces | Self::SlowHandshakes => {
                Expected::Later
            }
            Self::NoTls => Expected::Refused(&["tls_plain_http"]),
            Self::NoLeaf => Expected::Refused(&["tls_no_certificate"]),
        }
    }

    /// MiB that a sidecar may hold of it, by the table "What it can make a sidecar hold": of a connection, for as many as
    /// the attacker has at a time. What is common to all of them is [`SLACK_MIB`].
    pub(crate) const fn bound_mib(self, door: Door) -> f64 {
        let peer = matches!(door, Door::Inbound | Door::Handshake);
        match self {
            // Heads that are looked at, and those of streams that were reset.
            Self::RapidReset | Self::MadeToReset => {
                if peer {
                    152.0
                } else {
                    64.0
                }
            }
            // One head: as it is written, and as it is read.
            Self::Continuation | Self::HpackBomb | Self::EndlessTrailers | Self::EndlessTrailersH1 => 0.6,
            Self::Ping | Self::Settings | Self::NoTls | Self::NoLeaf => 0.1,
            // Bodies that nobody takes.
            Self::EmptyData | Self::ByteBody => {
                if peer {
                    64.0
                } else {
                    1.0
                }
            }
            // Answers that are not read, and the window of the edge that they came on.
            Self::ZeroWindows => {
                if peer {
                    400.0 * 0.25 + 64.0
                } else {
                    400.0 * 0.0625 + 64.0
                }
            }
            // The head, what the HTTP library has read beyond it, and a connection's buffers.
            Self::SlowHeads => 500.0 * (0.0625 + 0.0625 + 0.1),
            Self::SlowPrefaces => 100.0 * 0.1,
            Self::SlowHandshakes => 600.0 * 0.1,
        }
    }
}

/// What comes on top of every bound: memory that was given back and that the allocator keeps for a moment, and log lines.
pub(crate) const SLACK_MIB: f64 = 8.0;

/// Everything that is measured, in the order of a round: doors alternate, so that none is measured in one stretch.
pub(crate) fn cells() -> Vec<(Attack, Door)> {
    let both = |attack: &Attack| Door::ALL.iter().map(|door| (*attack, *door)).collect::<Vec<_>>();
    let all = Attack::ALL.iter().flat_map(both);
    all.filter(|(attack, door)| attack.doors().contains(door)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_door_has_its_attacks() {
        for door in Door::ALL {
            assert!(cells().iter().any(|(_, at)| at == door), "{door}");
        }
        for (attack, door) in cells() {
            assert!(attack.bound_mib(door) > 0.0, "{attack} {door}");
        }
    }
}
