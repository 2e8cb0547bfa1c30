//! What goes over an HTTP/2 connection beside what the library tells?
//!
//! h2 bounds what a client can make it hold, and ends a connection that goes too far; why, stands in the GOAWAY that it sends and
//! nowhere else. What costs work and holds nothing (PING, SETTINGS, WINDOW_UPDATE, resets of streams that were served) it does not
//! bound, nor does it bound interim answers at the client's end. A [`FrameTap`] reads the head of each frame in both directions: it
//! counts such frames against an allowance that grows with what they are needed for, and keeps the reason with which the library ends
//! a connection. Where this sidecar is the server, it also sees the requests that the library answers by itself.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::abuse::Reason;
use crate::admission::{Block, HalfHeads};
use crate::limits::{self, FrameAllowance, STREAMS_A_TURN};

const PREFACE_BYTES: usize = 24;
const HEAD_BYTES: usize = 9;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A frame's head, as far as it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Head {
    fn parse(bytes: [u8; HEAD_BYTES]) -> Self {
        let [a, b, c, kind, flags, w, x, y, z] = bytes;
        Self {
            length: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes([w & 0x7f, x, y, z]),
        }
    }
}

/// Finds the heads of frames in pieces of any size, and keeps the beginning of what follows one.
#[derive(Debug)]
struct Walker {
    head: [u8; HEAD_BYTES],
    have: usize,
    /// Bytes to pass over: the preface, or what is left of a payload.
    left: usize,
    payload: Vec<u8>,
    /// The frame whose payload is kept; its end is an event of its own.
    kept: Option<Head>,
}

/// As much of a payload as is kept: a GOAWAY with the library's longest reason.
const KEPT_BYTES: usize = 48;

impl Walker {
    fn new(skip: usize) -> Self {
        Self { head: [0; HEAD_BYTES], have: 0, left: skip, payload: Vec::new(), kept: None }
    }

    /// The next head in `bytes`, which are used up to it.
    fn head(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        if !self.pass(bytes) {
            return None;
        }
        let room = self.head.get_mut(self.have..).unwrap_or_default();
        let count = room.len().min(bytes.len());
        let (now, rest) = bytes.split_at(count);
        for (to, from) in room.iter_mut().zip(now) {
            *to = *from;
        }
        self.have += count;
        *bytes = rest;
        if self.have < HEAD_BYTES {
            return None;
        }
        self.have = 0;
        let head = Head::parse(self.head);
        self.left = head.length;
        Some(head)
    }

    /// Passes over what is left of a payload; whether its end was reached.
    fn pass(&mut self, bytes: &mut &[u8]) -> bool {
        let (now, rest) = bytes.split_at(self.left.min(bytes.len()));
        if self.kept.is_some() {
            let room = KEPT_BYTES.saturating_sub(self.payload.len());
            self.payload.extend_from_slice(now.get(..room.min(now.len())).unwrap_or_default());
        }
        self.left -= now.len();
        *bytes = rest;
        self.left == 0
    }

    /// Keeps the payload of the frame whose head was just found.
    fn keep(&mut self, head: Head) {
        self.payload.clear();
        self.kept = Some(head);
    }

    /// A kept payload that is whole.
    fn kept(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        self.kept?;
        if self.pass(bytes) { self.kept.take() } else { None }
    }
}

/// So many at once, and so many more a second.
#[derive(Debug)]
struct Allowance {
    left: u32,
    most: u32,
    per_second: u32,
    since: Instant,
}

impl Allowance {
    fn new((most, per_second): (u32, u32)) -> Self {
        Self { left: most, most, per_second, since: Instant::now() }
    }

    /// Uses one up; false where none is left. The clock is only asked then.
    fn take(&mut self) -> bool {
        if self.left == 0 {
            let passed = self.since.elapsed();
            let grown = passed.as_millis().saturating_mul(u128::from(self.per_second)) / 1000;
            if grown == 0 {
                return false;
            }
            self.since = Instant::now();
            self.left = u32::try_from(grown).unwrap_or(u32::MAX).min(self.most);
        }
        self.left -= 1;
        true
    }

    fn give(&mut self, count: u32) {
        self.left = self.left.saturating_add(count).min(self.most);
    }
}

/// What the tap tells whoever serves the connection.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Requests whose heads have come; where this side is the client, heads of answers.
    opened: Cell<u64>,
    served: Cell<u64>,
    refused: Cell<u64>,
    malformed: Cell<u64>,
    settings: Cell<bool>,
    reason: Cell<Option<Reason>>,
}

/// Requests that the library answered by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Unread {
    /// Streams beyond those that the client may have open.
    pub(crate) refused: u64,
    /// Heads that are no HTTP.
    pub(crate) malformed: u64,
    /// Heads that were too large to be handed over.
    pub(crate) too_large: u64,
}

impl Seen {
    /// A request was handed over by the library.
    pub(crate) fn serve(&self) {
        self.served.set(self.served.get() + 1);
    }

    /// Whether the client has got through its preface.
    pub(crate) fn settings(&self) -> bool {
        self.settings.get()
    }

    /// Why the connection was ended, by the tap or by the library.
    pub(crate) fn reason(&self) -> Option<Reason> {
        self.reason.get()
    }

    /// What the library has answered by itself since the last look. Only true once it has handed over all that it has read.
    pub(crate) fn unread(&self) -> Option<Unread> {
        let missing = self.opened.get().saturating_sub(self.served.get());
        if missing == 0 {
            return None;
        }
        // What follows a GOAWAY of ours is neither served nor answered.
        if self.reason.get().is_some() {
            return None;
        }
        let refused = self.refused.replace(0).min(missing);
        let malformed = self.malformed.replace(0).min(missing - refused);
        self.served.set(self.opened.get());
        Some(Unread { refused, malformed, too_large: missing - refused - malformed })
    }

    fn end(&self, reason: Reason) {
        if self.reason.get().is_none() {
            self.reason.set(Some(reason));
        }
    }
}

/// A stream whose frames are looked at as they pass.
#[derive(Debug)]
pub(crate) struct FrameTap<S> {
    inner: S,
    watch: Watch,
    /// Streams that were opened when it was last the others' turn.
    turn: u64,
}

/// What is known of a connection's frames.
#[derive(Debug)]
struct Watch {
    seen: Rc<Seen>,
    incoming: Walker,
    outgoing: Walker,
    last_stream: u32,
    /// A request's head has begun, and its last frame has not.
    head_goes_on: bool,
    /// The last frame of a request's head has begun, and is not whole.
    opening: bool,
    /// The stream of the last answer that was a head alone.
    answered: u32,
    control: Allowance,
    resets: Allowance,
    /// Heads of answers, their interim ones, and trailers, where this side is the client.
    answers: Option<Allowance>,
    /// Where this side is the server: heads that clients do not end.
    block: Option<Block>,
}

impl<S> FrameTap<S> {
    /// Taps a server's stream before its preface is read.
    pub(crate) fn new(inner: S, allowance: &FrameAllowance, heads: &Arc<HalfHeads>) -> (Self, Rc<Seen>) {
        Self::tap(inner, allowance, (PREFACE_BYTES, 0), None, Some(Block::new(heads)))
    }

    /// Taps a client's stream before its preface is written.
    pub(crate) fn client(inner: S, allowance: &FrameAllowance) -> (Self, Rc<Seen>) {
        let answers = Allowance::new(limits::ANSWER_HEADS);
        Self::tap(inner, allowance, (0, PREFACE_BYTES), Some(answers), None)
    }

    fn tap(
        inner: S,
        allowance: &FrameAllowance,
        (skip_in, skip_out): (usize, usize),
        answers: Option<Allowance>,
        block: Option<Block>,
    ) -> (Self, Rc<Seen>) {
        let seen = Rc::new(Seen::default());
        let watch = Watch {
            seen: Rc::clone(&seen),
            incoming: Walker::new(skip_in),
            outgoing: Walker::new(skip_out),
            last_stream: 0,
            head_goes_on: false,
            opening: false,
            answered: 0,
            control: Allowance::new(allowance.control),
            resets: Allowance::new(allowance.resets),
            block,
            answers,
        };
        (Self { inner, watch, turn: 0 }, seen)
    }
}

/// Control frames that a request, an answer or a piece of either may need: PRIORITY, PING, and WINDOW_UPDATE of stream and
/// connection.
const CONTROL_PER_FRAME: u32 = 4;

/// So many bytes of a piece that is sent may each be worth a WINDOW_UPDATE of stream or connection: some libraries send both after
/// each read of their application, which may read little at a time.
const BYTES_PER_UPDATE: usize = 256;

/// Below this, a piece of a header block that goes on is no more than an empty one.
const CONTINUATION_BYTES: usize = 64;

impl Watch {
    fn read(&mut self, mut bytes: &[u8], reader: &Waker) -> Result<(), Reason> {
        while let Some(head) = self.incoming.head(&mut bytes) {
            // The frame before it was whole.
            self.opened();
            if let Some(block) = &mut self.block {
                block.whole(reader);
            }
            self.came(head)?;
        }
        if self.incoming.left == 0 {
            self.opened();
            if let Some(block) = &mut self.block {
                block.whole(reader);
            }
        }
        Ok(())
    }

    /// A frame is whole; if it was the last of a request's head, the library knows of the request from now on.
    fn opened(&mut self) {
        if std::mem::take(&mut self.opening) {
            self.seen.opened.set(self.seen.opened.get() + 1);
        }
    }

    fn came(&mut self, head: Head) -> Result<(), Reason> {
        let in_order = match head.kind {
            HEADERS if let Some(answers) = &mut self.answers => {
                // Others get their turn as they do among requests.
                self.seen.opened.set(self.seen.opened.get() + 1);
                answers.take()
            }
            HEADERS => {
                if let Some(block) = &mut self.block {
                    block.came(head.flags & END_HEADERS != 0);
                }
                if head.stream > self.last_stream {
                    self.last_stream = head.stream;
                    self.head_goes_on = true;
                    self.control.give(CONTROL_PER_FRAME);
                }
                self.head_ends(head);
                true
            }
            // The library bounds tiny pieces by what it holds of them.
            DATA => head.length > 0 || head.flags & END_STREAM != 0 || self.control.take(),
            CONTINUATION => {
                if let Some(block) = &mut self.block {
                    block.came(head.flags & END_HEADERS != 0);
                }
                self.head_ends(head);
                head.length >= CONTINUATION_BYTES || self.control.take()
            }
            RST_STREAM => {
                return if self.resets.take() { Ok(()) } else { Err(Reason::RapidReset) };
            }
            kind => {
                if kind == SETTINGS {
                    self.seen.settings.set(true);
                }
                self.control.take()
            }
        };
        if in_order { Ok(()) } else { Err(Reason::ControlFlood) }
    }

    /// Notes the last frame of a request's head.
    fn head_ends(&mut self, head: Head) {
        if self.head_goes_on && head.flags & END_HEADERS != 0 {
            self.head_goes_on = false;
            self.opening = true;
        }
    }

    fn written(&mut self, mut bytes: &[u8]) {
        loop {
            if let Some(head) = self.outgoing.kept(&mut bytes) {
                self.went(head);
            }
            let Some(head) = self.outgoing.head(&mut bytes) else { return };
            match head.kind {
                DATA => {
                    let updates = u32::try_from(head.length / BYTES_PER_UPDATE).unwrap_or(u32::MAX);
                    self.control.give(updates.saturating_add(CONTROL_PER_FRAME));
                }
                HEADERS => self.head_went(head),
                RST_STREAM | GOAWAY => self.outgoing.keep(head),
                _ => {}
            }
        }
    }

    /// A head or trailers went out.
    fn head_went(&mut self, head: Head) {
        self.control.give(CONTROL_PER_FRAME);
        if head.flags & END_STREAM != 0 {
            self.answered = head.stream;
        }
        if let Some(answers) = &mut self.answers
            && head.stream > self.last_stream
        {
            self.last_stream = head.stream;
            answers.give(limits::HEADS_PER_ANSWER);
            // Any request may be refused, and any answer broken off.
            self.resets.give(1);
        }
    }

    /// A whole RST_STREAM or GOAWAY went out.
    fn went(&mut self, head: Head) {
        let payload = self.outgoing.payload.as_slice();
        let code = |from: usize| {
            let bytes = payload.get(from..from + 4)?;
            Some(u32::from_be_bytes(bytes.try_into().ok()?))
        };
        if head.kind == GOAWAY {
            let debug = payload.get(8..).unwrap_or_default();
            if let Some(reason) = code(4).and_then(|code| ended(code, debug)) {
                self.seen.end(reason);
            }
            return;
        }
        let counted = match code(0).map(h2::Reason::from) {
            Some(h2::Reason::REFUSED_STREAM) => &self.seen.refused,
            // After its 431 the library resets the stream as well.
            Some(h2::Reason::PROTOCOL_ERROR) if head.stream != self.answered => &self.seen.malformed,
            _ => return,
        };
        counted.set(counted.get() + 1);
    }
}

/// What the library's reason for a GOAWAY means.
fn ended(code: u32, debug: &[u8]) -> Option<Reason> {
    match (h2::Reason::from(code), debug) {
        (h2::Reason::NO_ERROR, _) => None,
        (_, b"too_many_resets") => Some(Reason::RapidReset),
        (_, b"too_many_internal_resets") => Some(Reason::StreamErrors),
        (_, b"too_many_continuations") => Some(Reason::ContinuationFlood),
        (_, b"header_list_way_too_large") => Some(Reason::HeaderBomb),
        (_, b"too_many_data_frames") => Some(Reason::TinyData),
        (h2::Reason::COMPRESSION_ERROR, _) => Some(Reason::HeaderBomb),
        _ => Some(Reason::Protocol),
    }
}

/// Lets everybody else have a turn, sockets and timers included: a task that only wakes itself is polled many times before those are
/// looked at.
pub(crate) fn others_first<T>(cx: &mut Context<'_>) -> Poll<T> {
    // Its first poll is pending, and has the task woken once the others have had their turn.
    let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
    Poll::Pending
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameTap<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let opened = this.watch.seen.opened.get();
        if opened - this.turn >= STREAMS_A_TURN {
            this.turn = opened;
            return others_first(cx);
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut this.inner).poll_read(cx, buf);
        let piece = buf.filled().get(before..).unwrap_or_default();
        let mut looked = this.watch.read(piece, cx.waker());
        if this.watch.block.as_ref().is_some_and(Block::is_cut) {
            looked = Err(Reason::HalfHead);
        }
        if let Err(reason) = looked {
            this.watch.seen.end(reason);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason.as_str())));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FrameTap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(count)) = &written {
            self.watch.written(buf.get(..*count).unwrap_or_default());
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        if let Poll::Ready(Ok(count)) = &written {
            let mut left = *count;
            for buf in bufs {
                let part = left.min(buf.len());
                self.watch.written(buf.get(..part).unwrap_or_default());
                left -= part;
            }
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: FrameAllowance = FrameAllowance { control: (10, 0), resets: (3, 0) };

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn tap() -> (FrameTap<()>, Rc<Seen>) {
        let (mut tap, seen) = FrameTap::new((), &SMALL, &Arc::default());
        assert_eq!(tap.watch.read(&[0; PREFACE_BYTES], Waker::noop()), Ok(()));
        (tap, seen)
    }

    fn read(tap: &mut FrameTap<()>, bytes: &[u8], piece: usize) -> Result<(), Reason> {
        bytes.chunks(piece).try_for_each(|piece| tap.watch.read(piece, Waker::noop()))
    }

    #[test]
    fn heads_are_found_in_pieces_of_any_size() {
        for piece in [1, 2, 8, 9, 10, 4096] {
            let (mut tap, seen) = tap();
            let mut bytes = frame(SETTINGS, 0, 0, &[0; 12]);
            bytes.extend(frame(HEADERS, 4, 1, &[0; 100]));
            bytes.extend(frame(DATA, 1, 1, &[0; 20_000]));
            bytes.extend(frame(HEADERS, 0, 3, &[0; 7]));
            bytes.extend(frame(CONTINUATION, 0, 3, &[0; 70]));
            bytes.extend(frame(CONTINUATION, 4, 3, &[0; 70]));
            // Trailers open no stream.
            bytes.extend(frame(HEADERS, 5, 3, &[0; 7]));
            assert_eq!(read(&mut tap, &bytes, piece), Ok(()));
            assert!(seen.settings());
            assert_eq!(seen.opened.get(), 2, "in pieces of {piece}");
        }
    }

    #[test]
    fn a_request_counts_once_its_head_is_whole() {
        let (mut tap, seen) = tap();
        let mut bytes = frame(HEADERS, 1, 1, &[0; 100]);
        bytes.extend(frame(CONTINUATION, 4, 1, &[0; 100]));
        let (last, before) = bytes.split_last().unwrap();
        for byte in before {
            tap.watch.read(&[*byte], Waker::noop()).unwrap();
            assert_eq!(seen.unread(), None);
        }
        tap.watch.read(&[*last], Waker::noop()).unwrap();
        assert_eq!(seen.unread(), Some(Unread { too_large: 1, ..Unread::default() }));
    }

    #[track_caller]
    fn check_flood(what: &[u8], most: usize, reason: Reason) {
        let (mut tap, _) = tap();
        for _ in 0..most {
            assert_eq!(read(&mut tap, what, 5), Ok(()));
        }
        assert_eq!(read(&mut tap, what, 5), Err(reason));
    }

    #[test]
    fn frames_that_carry_nothing_are_counted() {
        for kind in [2, 4, 6, 8, 10, 200] {
            check_flood(&frame(kind, 0, 0, &[0; 8]), 10, Reason::ControlFlood);
        }
        check_flood(&frame(DATA, 0, 1, &[]), 10, Reason::ControlFlood);
        check_flood(&frame(CONTINUATION, 0, 1, &[]), 10, Reason::ControlFlood);
        check_flood(&frame(CONTINUATION, 0, 1, &[0; 8]), 10, Reason::ControlFlood);
        check_flood(&frame(RST_STREAM, 0, 1, &[0; 4]), 3, Reason::RapidReset);
    }

    #[test]
    fn what_requests_and_answers_need_is_not_abuse() {
        let (mut tap, _) = tap();
        for stream in (1..2001).step_by(2) {
            let mut bytes = frame(HEADERS, 4, stream, &[0; 30]);
            bytes.extend(frame(2, 0, stream, &[0; 5]));
            bytes.extend(frame(DATA, 0, stream, &[0; 5]));
            bytes.extend(frame(DATA, 1, stream, &[]));
            read(&mut tap, &bytes, 4096).unwrap();
            tap.watch.written(&frame(HEADERS, 4, stream, &[0; 30]));
            for _ in 0..20 {
                tap.watch.written(&frame(DATA, 0, stream, &[0; 1]));
                let mut updates = frame(8, 0, 0, &[0; 4]);
                updates.extend(frame(8, 0, stream, &[0; 4]));
                read(&mut tap, &updates, 4096).unwrap();
            }
        }
    }

    #[test]
    fn what_is_sent_may_be_acknowledged_in_pieces_that_are_small() {
        let (mut tap, _) = tap();
        for _ in 0..100 {
            tap.watch.written(&frame(DATA, 0, 1, &[0; 16_384]));
            // A reader of 4 KiB at a time, with an update of stream and connection each.
            for _ in 0..8 {
                read(&mut tap, &frame(8, 0, 1, &[0; 4]), 4096).unwrap();
            }
        }
    }

    fn client() -> FrameTap<()> {
        let (mut tap, _) = FrameTap::client((), &SMALL);
        tap.watch.written(&[0; PREFACE_BYTES]);
        tap
    }

    #[test]
    fn answers_have_as_many_heads_as_they_may() {
        let mut tap = client();
        let most = limits::ANSWER_HEADS.0;
        let interim = frame(HEADERS, END_HEADERS, 1, b"103");
        for round in 0..10 {
            for stream in 0..limits::STREAMS_PER_CONNECTION {
                let stream = (round * limits::STREAMS_PER_CONNECTION + stream) * 2 + 1;
                tap.watch.written(&frame(HEADERS, END_HEADERS | END_STREAM, stream, b"GET"));
            }
            for _ in 0..most {
                read(&mut tap, &interim, 4096).unwrap();
            }
        }
        // A few more come with the time that this takes.
        let more = (0..most).map(|_| read(&mut tap, &interim, 4096)).find(Result::is_err);
        assert_eq!(more, Some(Err(Reason::ControlFlood)));
    }

    #[test]
    fn every_request_may_be_refused() {
        let mut tap = client();
        for stream in (1..201).step_by(2) {
            tap.watch.written(&frame(HEADERS, END_HEADERS | END_STREAM, stream, b"GET"));
            read(&mut tap, &frame(RST_STREAM, 0, stream, &[0; 4]), 4096).unwrap();
        }
        for _ in 0..2 {
            read(&mut tap, &frame(RST_STREAM, 0, 199, &[0; 4]), 4096).unwrap();
        }
        assert_eq!(read(&mut tap, &frame(RST_STREAM, 0, 199, &[0; 4]), 4096), Err(Reason::RapidReset));
    }

    #[test]
    fn what_a_callee_sends_beside_answers_is_counted() {
        for kind in [2, 4, 6, 7, 8, 200] {
            let mut tap = client();
            for _ in 0..10 {
                read(&mut tap, &frame(kind, 0, 0, &[0; 8]), 5).unwrap();
            }
            assert_eq!(read(&mut tap, &frame(kind, 0, 0, &[0; 8]), 5), Err(Reason::ControlFlood));
        }
    }

    #[test]
    fn the_reason_of_a_goaway_is_kept() {
        for piece in [1, 7, 100] {
            let (mut tap, seen) = tap();
            let mut payload = vec![0, 0, 0, 9, 0, 0, 0, 11];
            payload.extend(b"too_many_resets");
            let mut bytes = frame(HEADERS, 4, 1, b"x");
            bytes.extend(frame(GOAWAY, 0, 0, &payload));
            for piece in bytes.chunks(piece) {
                tap.watch.written(piece);
            }
            assert_eq!(seen.reason(), Some(Reason::RapidReset), "in pieces of {piece}");
        }
        assert_eq!(ended(0, b""), None);
        assert_eq!(ended(1, b""), Some(Reason::Protocol));
    }

    #[test]
    fn requests_that_the_library_answers_are_told_apart() {
        let (mut tap, seen) = tap();
        for stream in [1, 3, 5, 7] {
            read(&mut tap, &frame(HEADERS, 4, stream, b"head"), 4096).unwrap();
        }
        seen.serve();
        tap.watch.written(&frame(RST_STREAM, 0, 3, &7_u32.to_be_bytes()));
        tap.watch.written(&frame(RST_STREAM, 0, 5, &1_u32.to_be_bytes()));
        tap.watch.written(&frame(HEADERS, 5, 7, b"431"));
        tap.watch.written(&frame(RST_STREAM, 0, 7, &1_u32.to_be_bytes()));
        assert_eq!(seen.unread(), Some(Unread { refused: 1, malformed: 1, too_large: 1 }));
        assert_eq!(seen.unread(), None);
    }
}
