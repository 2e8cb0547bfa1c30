//! What did the bytes of a request's head look like, before the HTTP library made sense of them?
//!
//! hyper reads some heads leniently and without a word: lines that end in a bare LF, the same Content-Length twice. RFC 9112
//! allows that, but a second reader on the way might have understood something else, so the connection must not be used for
//! another request. `HeadTap` looks at the bytes of each head as they are read, and [`guess`] at the first bytes of a
//! connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::admission::{HalfHead, HalfHeads};
use crate::limits;

/// What a connection speaks, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guess {
    /// Too few bytes to tell.
    NeedMore,
    /// A TLS record.
    Tls,
    /// The preface of HTTP/2 with prior knowledge.
    Http2,
    /// Anything else is given to HTTP/1, which refuses what it can't read.
    Http1,
}

const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const TLS_HANDSHAKE: u8 = 0x16;

/// Tells the protocol by its first bytes, as few as it takes: no HTTP/1 method begins like the preface for longer than two.
#[must_use]
pub fn guess(first: &[u8]) -> Guess {
    match first {
        [] => Guess::NeedMore,
        [TLS_HANDSHAKE, ..] => Guess::Tls,
        _ if first.starts_with(HTTP2_PREFACE) => Guess::Http2,
        _ if HTTP2_PREFACE.starts_with(first) => Guess::NeedMore,
        _ => Guess::Http1,
    }
}

/// What stood out in one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Oddities {
    /// A line ended in LF without CR.
    pub bare_lf: bool,
    /// Several Content-Length fields, or one beside Transfer-Encoding.
    pub lengths: bool,
    /// The head came together with an earlier one, so its bytes were not looked at.
    pub unseen: bool,
}

impl Oddities {
    /// Whether the connection may carry another request.
    #[must_use]
    pub fn keep_alive(self) -> bool {
        self == Self::default()
    }
}

/// As much of a line as is needed to know its field.
const NAME_BYTES: usize = 18;

/// Reads one head's bytes in pieces.
#[derive(Debug, Default)]
pub struct HeadScan {
    line: [u8; NAME_BYTES],
    line_bytes: usize,
    last: u8,
    content_lengths: u32,
    transfer_encodings: u32,
    bare_lf: bool,
    bytes: usize,
    ended: bool,
}

impl HeadScan {
    /// Looks at the next piece, up to the head's end.
    pub fn read(&mut self, mut piece: &[u8]) {
        while !self.ended
            && let Some(end) = memchr::memchr(b'\n', piece)
        {
            let (line, rest) = piece.split_at(end);
            self.take(line);
            self.end_line();
            piece = rest.get(1..).unwrap_or_default();
        }
        if !self.ended {
            self.take(piece);
        }
    }

    /// What stood out.
    #[must_use]
    pub fn oddities(&self) -> Oddities {
        Oddities {
            bare_lf: self.bare_lf,
            lengths: self.content_lengths > 1 || (self.content_lengths > 0 && self.transfer_encodings > 0),
            unseen: self.bytes == 0,
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        if let Some(&last) = bytes.last() {
            self.last = last;
        }
        let room = self.line.get_mut(self.line_bytes.min(NAME_BYTES)..).unwrap_or_default();
        for (to, from) in room.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.line_bytes += bytes.len();
    }

    fn end_line(&mut self) {
        self.bytes += 1;
        let crlf = self.line_bytes > 0 && self.last == b'\r';
        self.bare_lf |= !crlf;
        // An empty line before the request line is skipped by the library (RFC 9112 2.2); it ends no head.
        let empty = self.line_bytes <= usize::from(crlf);
        self.ended = empty && self.bytes > 2;
        let line = self.line.get(..self.line_bytes.min(NAME_BYTES)).unwrap_or_default();
        let is = |name: &[u8]| {
            line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
                && line.get(name.len()).is_none_or(|byte| !is_token(*byte))
        };
        self.content_lengths += u32::from(is(b"content-length"));
        self.transfer_encodings += u32::from(is(b"transfer-encoding"));
        self.line_bytes = 0;
        self.last = 0;
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// What the stream that is read and the service that answers tell each other about the heads of a connection. Both are on one
/// thread; they are atomics because hyper's upgrades ask for a stream that could move to another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heads {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Grows when a turn ends: what is read from then on is a new head.
    turn: AtomicU32,
    /// Set while what is read is a body.
    in_body: AtomicBool,
    /// The oddities of the head so far; absent before its first byte.
    seen: AtomicU8,
    /// Set once the connection carries something else than HTTP.
    upgraded: AtomicBool,
    /// Set while a write waits for the client.
    stalled: AtomicBool,
    /// Set when the connection is cut for the head that it does not end.
    cut: AtomicBool,
    /// Where large heads note what they hold.
    half: Arc<HalfHeads>,
}

const SEEN: u8 = 1;
const BARE_LF: u8 = 2;
const LENGTHS: u8 = 4;

impl Heads {
    /// Of a connection whose large heads are noted with those of others.
    pub(crate) fn among(half: &Arc<HalfHeads>) -> Self {
        Self { shared: Arc::new(Shared { half: Arc::clone(half), ..Shared::default() }) }
    }

    /// Whether the connection was cut for the head that it did not end.
    pub(crate) fn cut(&self) -> bool {
        self.shared.cut.load(Ordering::Relaxed)
    }

    /// The library has read a head: what was odd about it? What is read from now on is a body, until the turn ends.
    pub(crate) fn read(&self) -> (Oddities, Turn) {
        self.shared.in_body.store(true, Ordering::Relaxed);
        let seen = self.shared.seen.swap(0, Ordering::Relaxed);
        let oddities =
            Oddities { bare_lf: seen & BARE_LF != 0, lengths: seen & LENGTHS != 0, unseen: seen & SEEN == 0 };
        (oddities, Turn(self.clone()))
    }

    /// The connection carries something else than HTTP from here on.
    pub(crate) fn upgraded(&self) {
        self.shared.upgraded.store(true, Ordering::Relaxed);
    }

    /// Whether a head has begun and not ended.
    pub(crate) fn begun(&self) -> bool {
        !self.shared.in_body.load(Ordering::Relaxed) && self.shared.seen.load(Ordering::Relaxed) & SEEN != 0
    }

    /// Whether no request is under way, no head has begun, and no write waits for the client.
    pub(crate) fn quiet(&self) -> bool {
        let shared = &self.shared;
        !shared.in_body.load(Ordering::Relaxed)
            && shared.seen.load(Ordering::Relaxed) & SEEN == 0
            && !shared.stalled.load(Ordering::Relaxed)
    }
}

/// One request's turn on a connection; the next head comes when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(Heads);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.shared.turn.fetch_add(1, Ordering::Relaxed);
        self.0.shared.in_body.store(false, Ordering::Relaxed);
    }
}

/// A stream whose heads are looked at as they are read.
#[derive(Debug)]
pub(crate) struct HeadTap<S> {
    inner: S,
    heads: Heads,
    scan: HeadScan,
    /// Kept while a large head has not ended.
    half: Option<HalfHead>,
    turn: u32,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Has been read, and looked at, and is read again.
    given_back: Bytes,
}

impl<S> HeadTap<S> {
    /// Taps a stream.
    pub(crate) fn new(inner: S, heads: Heads) -> Self {
        Self {
            inner,
            heads,
            scan: HeadScan::default(),
            half: None,
            turn: 0,
            stalled: None,
            given_back: Bytes::new(),
        }
    }

    /// Lets bytes be read again that were read before, ahead of all others.
    pub(crate) fn give_back(&mut self, bytes: Bytes) {
        self.given_back = bytes;
    }

    fn look(&mut self, piece: &[u8], reader: &Waker) {
        let shared = &self.heads.shared;
        if piece.is_empty() || shared.in_body.load(Ordering::Relaxed) {
            return;
        }
        let turn = shared.turn.load(Ordering::Relaxed);
        if turn != self.turn {
            (self.turn, self.scan) = (turn, HeadScan::default());
        }
        self.scan.read(piece);
        let oddities = self.scan.oddities();
        let bits =
            SEEN | if oddities.bare_lf { BARE_LF } else { 0 } | if oddities.lengths { LENGTHS } else { 0 };
        shared.seen.store(bits, Ordering::Relaxed);
        let bytes = self.scan.bytes;
        if self.scan.ended || bytes <= limits::SMALL_HEAD_BYTES || shared.upgraded.load(Ordering::Relaxed) {
            self.half = None;
        } else {
            match &self.half {
                Some(half) => half.holds(bytes, reader),
                None => self.half = Some(shared.half.begin(bytes, reader)),
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HeadTap<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.given_back.is_empty() {
            let count = self.given_back.len().min(buf.remaining());
            buf.put_slice(&self.given_back.split_to(count));
            return Poll::Ready(Ok(()));
        }
        if self.half.as_ref().is_some_and(HalfHead::is_cut) {
            self.heads.shared.cut.store(true, Ordering::Relaxed);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the head does not end")));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.look(buf.filled().get(before..).unwrap_or_default(), cx.waker());
        read
    }
}

impl<S> HeadTap<S> {
    /// Gives up on a client that does not read: nothing else would notice, since the HTTP library asks a body for more only when it
    /// has got rid of what it has. After an upgrade a stream may stand still for as long as its ends like.
    fn patience<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() || self.heads.shared.upgraded.load(Ordering::Relaxed) {
            if self.stalled.take().is_some() {
                self.heads.shared.stalled.store(false, Ordering::Relaxed);
            }
            return polled;
        }
        self.heads.shared.stalled.store(true, Ordering::Relaxed);
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(limits::BODY_IDLE)));
        stalled
            .as_mut()
            .poll(cx)
            .map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HeadTap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.patience(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.patience(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.patience(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.patience(cx, polled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(head: &[u8], piece: usize) -> Oddities {
        let mut scan = HeadScan::default();
        for piece in head.chunks(piece) {
            scan.read(piece);
        }
        scan.oddities()
    }

    #[track_caller]
    fn check(head: &str, bare_lf: bool, lengths: bool) {
        for piece in [1, 2, 3, 7, 4096] {
            let expected = Oddities { bare_lf, lengths, unseen: false };
            assert_eq!(scan(head.as_bytes(), piece), expected, "{head:?} in pieces of {piece}");
        }
    }

    #[test]
    fn heads_are_looked_at_in_pieces_of_any_size() {
        check("GET / HTTP/1.1\r\nHost: a\r\n\r\n", false, false);
        check("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", false, false);
        check("GET / HTTP/1.1\nHost: a\r\n\r\n", true, false);
        check("GET / HTTP/1.1\r\nHost: a\n\n", true, false);
        check("POST / HTTP/1.1\r\ncontent-length: 1\r\nContent-Length: 1\r\n\r\n", false, true);
        check("POST / HTTP/1.1\r\nContent-Length:1\r\nTransfer-Encoding: chunked\r\n\r\n", false, true);
        check("POST / HTTP/1.1\r\nContent-Length-X: 1\r\nContent-Length: 1\r\n\r\n", false, false);
    }

    #[test]
    fn a_body_is_not_part_of_the_head() {
        check("POST / HTTP/1.1\r\nContent-Length: 20\r\n\r\nline\nContent-Length: 5\n", false, false);
    }

    #[test]
    fn a_head_that_came_with_an_earlier_one_is_unseen() {
        let heads = Heads::default();
        let mut tap = HeadTap::new((), heads.clone());
        tap.look(b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\n\n", Waker::noop());
        let (first, turn) = heads.read();
        assert!(first.keep_alive());
        drop(turn);
        let (second, turn) = heads.read();
        assert!(second.unseen);
        tap.look(b"a body\n", Waker::noop());
        drop(turn);
        tap.look(b"GET / HTTP/1.1\r\n\r\n", Waker::noop());
        assert!(heads.read().0.keep_alive());
    }

    #[test]
    fn the_protocol_is_told_by_as_few_bytes_as_possible() {
        assert_eq!(guess(b""), Guess::NeedMore);
        assert_eq!(guess(b"P"), Guess::NeedMore);
        assert_eq!(guess(b"PRI"), Guess::NeedMore);
        assert_eq!(guess(b"PRO"), Guess::Http1);
        assert_eq!(guess(b"PUT / HTTP/1.1"), Guess::Http1);
        assert_eq!(guess(HTTP2_PREFACE), Guess::Http2);
        assert_eq!(guess(&[0x16, 3, 1]), Guess::Tls);
        assert_eq!(guess(b"\0"), Guess::Http1);
    }
}
