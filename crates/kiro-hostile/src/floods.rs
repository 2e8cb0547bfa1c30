//! Which floods of frames are there, and why is each of them cut off? One table for the tests and for what measures.

use crate::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PRIORITY, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, field, frame, request, string,
};

/// What is sent, piece by piece, after the preface. It ends: no sidecar is meant to take as much.
pub type Pieces = Box<dyn Iterator<Item = Vec<u8>> + Send>;

/// One of them.
#[derive(Debug, Clone, Copy)]
pub struct Flood {
    /// What it is called.
    pub name: &'static str,
    /// The reason that the sidecar cuts it off with, as log and metrics have it.
    pub reason: &'static str,
    /// Its pieces, for the service that is asked for.
    pub pieces: fn(authority: &str) -> Pieces,
}

/// All of them.
pub const FLOODS: &[Flood] = &[
    Flood { name: "rapid reset", reason: "rapid_reset", pieces: rapid_reset },
    Flood { name: "made to reset", reason: "stream_errors", pieces: made_to_reset },
    Flood { name: "CONTINUATION", reason: "continuation_flood", pieces: continuation },
    Flood { name: "empty CONTINUATION", reason: "continuation_flood", pieces: empty_continuation },
    Flood { name: "HPACK bomb", reason: "header_bomb", pieces: hpack_bomb },
    Flood { name: "PING", reason: "control_flood", pieces: |_| repeated(&frame(PING, 0, 0, &[0; 8])) },
    Flood {
        name: "SETTINGS",
        reason: "control_flood",
        pieces: |_| repeated(&frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0xff, 0xff])),
    },
    Flood {
        name: "WINDOW_UPDATE",
        reason: "control_flood",
        pieces: |_| repeated(&frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes())),
    },
    Flood {
        name: "PRIORITY",
        reason: "control_flood",
        pieces: |_| repeated(&frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1])),
    },
    Flood { name: "unknown frames", reason: "control_flood", pieces: |_| repeated(&frame(0xfa, 0, 0, &[])) },
    Flood { name: "empty DATA", reason: "tiny_data", pieces: empty_data },
    Flood {
        name: "window overflow",
        reason: "protocol",
        pieces: |_| repeated(&frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes())),
    },
    Flood {
        name: "no HTTP/2",
        reason: "protocol",
        pieces: |_| repeated(&frame(DATA, 0, 0, b"DATA of no stream")),
    },
];

impl Flood {
    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        FLOODS.iter().find(|flood| flood.name == name)
    }
}

fn streams() -> impl Iterator<Item = u32> {
    (1..1_000_000).step_by(2)
}

/// Several in one write.
fn repeated(frame: &[u8]) -> Pieces {
    Box::new(std::iter::repeat_n(frame.repeat(50), 2000))
}

fn rapid_reset(authority: &str) -> Pieces {
    let head = request("GET", authority);
    Box::new(streams().take(100_000).map(move |stream| {
        let mut both = frame(HEADERS, END_HEADERS | END_STREAM, stream, &head);
        both.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
        both
    }))
}

fn made_to_reset(authority: &str) -> Pieces {
    let head = request("POST", authority);
    Box::new(streams().take(100_000).map(move |stream| {
        let mut both = frame(HEADERS, END_HEADERS, stream, &head);
        both.extend(frame(WINDOW_UPDATE, 0, stream, &0x7fff_ffff_u32.to_be_bytes()));
        both
    }))
}

fn continuation(authority: &str) -> Pieces {
    let first = frame(HEADERS, END_STREAM, 1, &request("GET", authority));
    let more = frame(CONTINUATION, 0, 1, &field("x", &[b'a'; 100]));
    Box::new(std::iter::once(first).chain(std::iter::repeat_n(more, 10_000)))
}

fn empty_continuation(authority: &str) -> Pieces {
    let first = frame(HEADERS, END_STREAM, 1, &request("GET", authority));
    let more = frame(CONTINUATION, 0, 1, &[]);
    Box::new(std::iter::once(first).chain(std::iter::repeat_n(more, 10_000)))
}

fn hpack_bomb(authority: &str) -> Pieces {
    let mut block = request("GET", authority);
    // One entry of the table, named thousands of times.
    block.extend([&[0x40][..], &string(b"x"), &string(&[b'a'; 3900])].concat());
    block.extend(std::iter::repeat_n(0xbe, 12_000));
    Box::new(std::iter::once(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)))
}

fn empty_data(authority: &str) -> Pieces {
    let first = frame(HEADERS, END_HEADERS, 1, &request("POST", authority));
    let more = frame(DATA, 0, 1, &[]);
    Box::new(std::iter::once(first).chain(std::iter::repeat_n(more, 10_000)))
}
