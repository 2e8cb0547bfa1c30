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

#[cfg(test)]
pub(crate) mod tests {
    use http::{Method, Request, Response};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Two ends of one stream: the client's, and the server's with the request's head.
    pub(crate) struct Ends {
        pub(crate) client: SendStream<Bytes>,
        pub(crate) answer: h2::client::ResponseFuture,
        pub(crate) server: Request<RecvStream>,
        pub(crate) respond: h2::server::SendResponse<Bytes>,
    }

    /// Opens a stream over a connection in memory.
    pub(crate) async fn ends() -> Ends {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (client, server) = tokio::join!(h2::client::handshake(near), h2::server::handshake(far));
        let (mut sender, connection) = client.unwrap();
        tokio::spawn(connection);
        let mut server = server.unwrap();
        let request = Request::builder().method(Method::POST).uri("http://a/").body(()).unwrap();
        let (answer, client) = sender.send_request(request, false).unwrap();
        let (request, respond) = server.accept().await.unwrap().unwrap();
        tokio::spawn(async move { while server.accept().await.is_some() {} });
        Ends { client, answer, server: request, respond }
    }

    async fn pair() -> (H2Io, H2Io) {
        let mut ends = ends().await;
        let send = ends.respond.send_response(Response::new(()), false).unwrap();
        let server = H2Io::new(ends.server.into_body(), send);
        (H2Io::new(ends.answer.await.unwrap().into_body(), ends.client), server)
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_each_half_ends_by_itself() {
        let (mut client, mut server) = pair().await;
        // More than every window, in writes that fit no frame.
        let much: Vec<u8> = (0..1_000_000_u32).map(|place| (place ^ (place >> 8)) as u8).collect();
        let sent = async {
            for piece in much.chunks(77_777) {
                client.write_all(piece).await.unwrap();
            }
            client.shutdown().await.unwrap();
        };
        let mut came = Vec::new();
        let (_, read) = tokio::join!(sent, server.read_to_end(&mut came));
        read.unwrap();
        assert!(came == much);
        server.write_all(b"still").await.unwrap();
        server.shutdown().await.unwrap();
        came.clear();
        client.read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"still");
    }

    #[tokio::test]
    async fn one_that_is_dropped_is_no_end() {
        let (mut client, server) = pair().await;
        drop(server);
        let error = client.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        client.write_all(b"into the void").await.unwrap_err();
        client.shutdown().await.unwrap_err();
    }

    #[tokio::test]
    async fn one_that_ends_when_it_is_dropped_loses_nothing() {
        let (mut client, mut server) = pair().await;
        server.end_when_dropped();
        server.write_all(b"the last word").await.unwrap();
        drop(server);
        let mut came = Vec::new();
        client.read_to_end(&mut came).await.unwrap();
        assert_eq!(came, b"the last word");

        let (mut client, mut server) = pair().await;
        server.end_when_dropped();
        server.shutdown().await.unwrap();
        drop(server);
        assert_eq!(client.read_to_end(&mut Vec::new()).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn who_does_not_read_is_not_written_to_without_end() {
        let (mut client, server) = pair().await;
        let mut written = 0;
        let full = async {
            loop {
                written += client.write(&[0; 10_000]).await.unwrap();
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_millis(50), full).await;
        assert!(waited.is_err(), "neither an error nor an end");
        assert!(written <= 65_535, "{written}: the window of a stream");
        drop(server);
    }
}
