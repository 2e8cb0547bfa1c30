//! What does a client of this sidecar hand over, whichever HTTP it speaks?
//!
//! A request's body ([`RequestBody`]), the bytes that its connection carries after CONNECT or a WebSocket handshake ([`Upgrade`]), and
//! the way back for interim answers ([`Interim`]).

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use crate::body::BodyError;
use crate::h2_io::H2Io;
use crate::interim::Interim;
use crate::limits;

/// The body of a client's request.
pub(crate) enum RequestBody {
    /// None, or a stream that becomes something else.
    Empty,
    /// Read by hyper. Where the client waits for a 100, which hyper sends when the reading begins: whether it has begun.
    Http1(Incoming, Option<Rc<Cell<bool>>>),
    /// Read by h2.
    Http2(StreamBody),
}

impl RequestBody {
    /// The whole body, where it is small and has come already, as it mostly has for a call of gRPC: then nothing has to be streamed.
    pub(crate) fn already_whole(&mut self, cx: &mut Context<'_>) -> Option<Bytes> {
        let RequestBody::Http2(body) = self else { return None };
        body.already_whole(cx)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            RequestBody::Empty => Poll::Ready(None),
            RequestBody::Http1(incoming, begun) => {
                if let Some(begun) = begun {
                    begun.set(true);
                }
                Pin::new(incoming).poll_frame(cx).map(|frame| frame.map(|frame| Ok(frame?)))
            }
            RequestBody::Http2(body) => {
                body.poll(cx).map(|frame| frame.map(|frame| frame.map_err(BodyError::of_client)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            RequestBody::Empty => true,
            RequestBody::Http1(incoming, _) => incoming.is_end_stream(),
            RequestBody::Http2(body) => body.first.is_none() && body.recv.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            RequestBody::Empty => SizeHint::with_exact(0),
            RequestBody::Http1(incoming, _) => incoming.size_hint(),
            // h2 itself resets a stream that does not keep to its Content-Length.
            RequestBody::Http2(_) => SizeHint::default(),
        }
    }
}

/// What comes on an HTTP/2 stream: data, then trailers. A stream that is reset before its end, for whatever reason, is no whole body.
pub(crate) struct StreamBody {
    recv: RecvStream,
    /// Data that was looked at before the body was read.
    first: Option<Bytes>,
    data_ended: bool,
}

impl StreamBody {
    /// Wraps a stream.
    pub(crate) fn new(recv: RecvStream) -> Self {
        Self { recv, first: None, data_ended: false }
    }

    /// Whether everything has been read.
    pub(crate) fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.recv.is_end_stream()
    }

    fn already_whole(&mut self, cx: &mut Context<'_>) -> Option<Bytes> {
        if self.first.is_none()
            && let Poll::Ready(Some(Ok(bytes))) = self.recv.poll_data(cx)
        {
            let _ = self.recv.flow_control().release_capacity(bytes.len());
            self.first = Some(bytes);
        }
        let whole = self.recv.is_end_stream()
            && self.first.as_ref().is_some_and(|bytes| bytes.len() <= limits::DIGEST_BODY_BYTES);
        if whole { self.first.take() } else { None }
    }

    /// The next frame. The receiver passes data on at once, so the window opens again at once.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if !self.data_ended {
            match ready!(self.recv.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    let released = self.recv.flow_control().release_capacity(bytes.len());
                    return Poll::Ready(Some(released.map(|()| Frame::data(bytes)).map_err(BodyError::from)));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => self.data_ended = true,
            }
        }
        let trailers = ready!(self.recv.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }
}

/// A client's connection, or stream, that becomes bytes both ways once its request has been answered so.
pub(crate) enum Upgrade {
    /// hyper hands the connection over after its answer.
    Http1(OnUpgrade),
    /// The front sends the half to write after its answer.
    Http2(RecvStream, oneshot::Receiver<SendStream<Bytes>>),
}

impl Upgrade {
    /// Waits for the bytes; nothing where the client went away before its answer.
    pub(crate) async fn stream(self) -> Option<ClientStream> {
        match self {
            Upgrade::Http1(upgrade) => Some(ClientStream::Http1(Box::new(TokioIo::new(upgrade.await.ok()?)))),
            Upgrade::Http2(recv, send) => Some(ClientStream::Http2(H2Io::new(recv, send.await.ok()?))),
        }
    }
}

/// Bytes from and to a client.
pub(crate) enum ClientStream {
    /// A connection of its own.
    Http1(Box<TokioIo<Upgraded>>),
    /// One stream of many.
    Http2(H2Io),
}

impl ClientStream {
    /// See [`H2Io::end_when_dropped`].
    pub(crate) fn end_when_dropped(&mut self) {
        match self {
            // A connection of its own is like that by itself.
            ClientStream::Http1(_) => {}
            ClientStream::Http2(io) => io.end_when_dropped(),
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Http1(io) => Pin::new(io).poll_read(cx, buf),
            ClientStream::Http2(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientStream::Http1(io) => Pin::new(io).poll_write(cx, buf),
            ClientStream::Http2(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Http1(io) => Pin::new(io).poll_flush(cx),
            ClientStream::Http2(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Http1(io) => Pin::new(io).poll_shutdown(cx),
            ClientStream::Http2(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

/// What a story needs of its client beside the request.
pub(crate) struct Client<'a> {
    /// Where the request's connection or stream can become bytes.
    pub(crate) upgrade: Option<Upgrade>,
    /// The way back for interim answers.
    pub(crate) interim: Interim<'a>,
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http::{HeaderMap, HeaderValue};
    use http_body_util::BodyExt;

    use super::*;
    use crate::h2_io::tests::{Ends, ends};

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum End {
        Data,
        Trailers,
        Later,
    }

    /// Whether a body of these frames is taken whole; where it is not, nothing of it is lost.
    async fn check(frames: &[&'static [u8]], end: End, whole: bool) {
        let Ends { mut client, answer: _answer, server, respond: _respond } = ends().await;
        for (place, frame) in frames.iter().enumerate() {
            let last = place + 1 == frames.len() && end == End::Data;
            client.send_data(Bytes::from_static(frame), last).unwrap();
        }
        if end == End::Trailers {
            let etag = (http::header::ETAG, HeaderValue::from_static("7"));
            client.send_trailers(HeaderMap::from_iter([etag])).unwrap();
        }
        // The connection is in memory: all of it comes while others run.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let mut body = RequestBody::Http2(StreamBody::new(server.into_body()));
        let taken = poll_fn(|cx| Poll::Ready(body.already_whole(cx))).await;
        let all = frames.concat();
        assert_eq!(taken.as_deref(), whole.then_some(&all[..]), "{} bytes, {end:?}", all.len());
        if whole {
            assert!(body.is_end_stream());
            return;
        }
        assert!(!body.is_end_stream(), "what was looked at is not lost");
        if end == End::Later {
            client.send_data(Bytes::new(), true).unwrap();
        }
        let collected = body.collect().await.unwrap();
        assert_eq!(collected.trailers().is_some(), end == End::Trailers);
        assert!(collected.to_bytes() == all);
    }

    #[tokio::test]
    async fn a_body_is_whole_where_one_frame_has_brought_all_of_it() {
        static LARGE: [u8; 16 * 1024] = [7; 16 * 1024];
        check(&[b"message"], End::Data, true).await;
        check(&[&LARGE], End::Data, true).await;
        check(&[b"first", b"second"], End::Data, false).await;
        check(&[b"message"], End::Trailers, false).await;
        check(&[b"message"], End::Later, false).await;
        check(&[], End::Later, false).await;
        check(&[&LARGE, &LARGE, &LARGE], End::Data, false).await;
    }

    #[tokio::test]
    async fn a_stream_that_is_reset_is_no_whole_body() {
        for reason in [h2::Reason::NO_ERROR, h2::Reason::CANCEL] {
            let Ends { mut client, answer: _answer, server, respond: _respond } = ends().await;
            client.send_reset(reason);
            let mut body = RequestBody::Http2(StreamBody::new(server.into_body()));
            assert_eq!(poll_fn(|cx| Poll::Ready(body.already_whole(cx))).await, None);
            let frame = body.frame().await;
            assert!(matches!(frame, Some(Err(BodyError::Client(_)))), "{frame:?}");
        }
    }
}
