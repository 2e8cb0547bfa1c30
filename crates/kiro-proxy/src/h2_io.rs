//! How is an HTTP/2 stream read and written as bytes?
//!
//! What follows CONNECT, and extended CONNECT (RFC 8441), is bytes both ways in DATA frames; their flow control becomes the waiting of
//! reads and writes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::limits;

/// The two halves of a stream as one connection. Dropped before both have ended, it resets the stream (CANCEL).
pub(crate) struct H2Io {
    recv: RecvStream,
    send: SendStream<Bytes>,
    unread: Bytes,
    ends: bool,
}

impl Drop for H2Io {
    fn drop(&mut self) {
        if self.ends {
            // Where the end was sent already, this fails, and nothing is lost.
            let _ = self.send.send_data(Bytes::new(), true);
        }
    }
}

impl H2Io {
    /// Joins the halves.
    pub(crate) fn new(recv: RecvStream, send: SendStream<Bytes>) -> Self {
        Self { recv, send, unread: Bytes::new(), ends: false }
    }

    /// Lets what was written arrive even where this is dropped without having been shut down, as a TCP connection does: a reset
    /// throws away what the other side has not taken yet. For what has ends of its own inside.
    pub(crate) fn end_when_dropped(&mut self) {
        self.ends = true;
    }
}

impl AsyncRead for H2Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.unread.is_empty() {
            match ready!(this.recv.poll_data(cx)) {
                Some(Ok(bytes)) => this.unread = bytes,
                Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = this.unread.len().min(buf.remaining());
        buf.put_slice(this.unread.get(..count).unwrap_or_default());
        this.unread.advance(count);
        Poll::Ready(this.recv.flow_control().release_capacity(count).map_err(into_io))
    }
}

impl AsyncWrite for H2Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let wanted = buf.len().min(limits::SEND_BUFFER);
        self.send.reserve_capacity(wanted);
        let mut capacity = self.send.capacity();
        while capacity == 0 {
            capacity = match ready!(self.send.poll_capacity(cx)) {
                Some(granted) => granted.map_err(into_io)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let piece = buf.get(..capacity.min(wanted)).unwrap_or_default();
        self.send.send_data(Bytes::copy_from_slice(piece), false).map_err(into_io)?;
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was given to the library is on its way.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(into_io))
    }
}

fn into_io(error: h2::Error) -> io::Error {
    match error.reason() {
        Some(Reason::CANCEL | Reason::NO_ERROR) => io::Error::new(io::ErrorKind::ConnectionReset, error),
        _ => io::Error::other(error),
    }
}
