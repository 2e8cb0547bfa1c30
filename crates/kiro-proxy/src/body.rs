//! How do bodies move between HTTP/1 and HTTP/2, and where are they counted, hashed and held back?
//!
//! [`AppBody`] is what the application receives, [`AnswerBody`] what a client of this sidecar receives; [`crate::send`] moves any
//! body into an HTTP/2 stream. All of them hold at most a frame or two.

mod answer;

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use kiro_core::signature::Verified;
use sha2::{Digest, Sha256};
use tokio::time::Sleep;

pub(crate) use self::answer::AnswerBody;
use crate::app::http1::Gate;
use crate::app::{self, Broken};
use crate::client::RequestBody;
use crate::exchange::Progress;
use crate::inbound::PeerConnection;
use crate::limits;
use crate::metrics::Metrics;
use crate::reject::{Refused, Reject};
use crate::send::Pace;
use crate::trailers::{self, Named};

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The HTTP/2 stream was reset or its connection was lost.
    #[error("the stream was reset: {0}")]
    Stream(#[from] h2::Error),
    /// A client that speaks HTTP/2 did not send it whole.
    #[error("the client's stream broke off: {0}")]
    Client(h2::Error),
    /// The HTTP/1 side failed.
    #[error("the message broke off: {0}")]
    Message(#[from] hyper::Error),
    /// The trailer signature does not hold.
    #[error("the body's signature does not hold: {0}")]
    Signature(&'static str),
    /// The client has not read it, and what it held was needed.
    #[error("the client did not read, and others needed the room")]
    Unread,
    /// Its trailers would end a connection that others share.
    #[error("trailers that are too large")]
    TooLarge,
    /// It stood still for too long.
    #[error("the body stood still for {} s", limits::BODY_IDLE.as_secs())]
    Idle,
}

impl BodyError {
    /// An error of a client's stream, which else would be taken for a peer's.
    pub(crate) fn of_client(self) -> Self {
        if let BodyError::Stream(error) = self { BodyError::Client(error) } else { self }
    }

    /// What a body that its sender broke off like this is refused for.
    pub(crate) fn by_sender(&self) -> Refused {
        let reject = match self {
            BodyError::Idle => Reject::RequestTimeout,
            BodyError::TooLarge => Reject::HeadersTooLarge,
            BodyError::Stream(_)
            | BodyError::Client(_)
            | BodyError::Message(_)
            | BodyError::Unread
            | BodyError::Signature(_) => Reject::MessageInvalid,
        };
        Refused::new(reject, app::error_chain(self))
    }

    /// The word of whoever broke a stream off. NO_ERROR would make it a whole one.
    pub(crate) fn word(&self) -> Option<Reason> {
        match self {
            BodyError::Stream(error) | BodyError::Client(error) => {
                // A request whose answer has begun was processed, whatever its end is called.
                let of_the_end =
                    |reason: &Reason| !matches!(*reason, Reason::NO_ERROR | Reason::REFUSED_STREAM);
                error.reason().filter(of_the_end)
            }
            BodyError::Message(_)
            | BodyError::Signature(_)
            | BodyError::Unread
            | BodyError::TooLarge
            | BodyError::Idle => None,
        }
    }
}

/// A request's body on its way to the application.
pub(crate) enum AppBody {
    /// None.
    Empty,
    /// Read and checked whole.
    Full(Option<Bytes>),
    /// From a peer, without a signature to wait for (`signatures: off`).
    Plain(PeerBody),
    /// From a peer, its end held back until the trailer signature has been verified.
    Verified(Box<VerifiedBody>),
    /// From an ingress client.
    Client(ClientBody),
    /// Any of the others, until the application asks for it.
    Gated(Box<AppBody>, Rc<Gate>),
    /// Any of the others, towards an application that takes few trailers.
    Http1(Box<AppBody>, Named, Arc<Metrics>),
}

impl AppBody {
    /// The same body again, where it is known whole.
    pub(crate) fn whole_copy(&self) -> Option<AppBody> {
        match self {
            AppBody::Empty => Some(AppBody::Empty),
            AppBody::Full(bytes) => Some(AppBody::Full(bytes.clone())),
            AppBody::Plain(_)
            | AppBody::Verified(_)
            | AppBody::Client(_)
            | AppBody::Gated(..)
            | AppBody::Http1(..) => None,
        }
    }
}

impl Body for AppBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            AppBody::Empty => Poll::Ready(None),
            AppBody::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            AppBody::Plain(body) => body.poll(cx).map(cleaned),
            AppBody::Verified(body) => body.poll(cx).map(cleaned),
            AppBody::Client(body) => Pin::new(body).poll_frame(cx).map(cleaned),
            AppBody::Gated(body, gate) => {
                ready!(gate.poll(cx));
                Pin::new(&mut **body).poll_frame(cx)
            }
            AppBody::Http1(body, named, metrics) => {
                Pin::new(&mut **body).poll_frame(cx).map(|frame| in_http1(frame, named, metrics))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            AppBody::Empty => true,
            AppBody::Full(bytes) => bytes.is_none(),
            AppBody::Plain(body) => body.recv.is_end_stream(),
            AppBody::Verified(_) => false,
            AppBody::Client(body) => body.incoming.is_end_stream(),
            AppBody::Gated(body, _) | AppBody::Http1(body, _, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            AppBody::Empty => SizeHint::with_exact(0),
            AppBody::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            AppBody::Client(body) => body.incoming.size_hint(),
            AppBody::Gated(body, _) | AppBody::Http1(body, _, _) => body.size_hint(),
            AppBody::Plain(_) | AppBody::Verified(_) => SizeHint::default(),
        }
    }
}

/// Takes out of trailers what can't be carried on in HTTP/1.1. The library writes none where none are left.
fn in_http1(frame: NextFrame, named: &Named, metrics: &Metrics) -> NextFrame {
    with_trailers(frame, |trailers| named.keep(trailers, metrics))
}

/// Takes out of trailers what none may say.
fn cleaned(frame: NextFrame) -> NextFrame {
    with_trailers(frame, trailers::clean)
}

type NextFrame = Option<Result<Frame<Bytes>, BodyError>>;

fn with_trailers(frame: NextFrame, change: impl FnOnce(&mut HeaderMap)) -> NextFrame {
    match frame {
        Some(Ok(frame)) if frame.is_trailers() => {
            let mut trailers = frame.into_trailers().unwrap_or_default();
            change(&mut trailers);
            Some(Ok(Frame::trailers(trailers)))
        }
        other => other,
    }
}

/// Gives up on a body that stands still. The timer is made when there is something to wait for.
struct Patience {
    /// None where it may.
    limit: Option<Duration>,
    sleep: Option<Pin<Box<Sleep>>>,
    waiting: bool,
}

impl Patience {
    fn new(pace: Pace) -> Self {
        Self { limit: pace.of_sender(), sleep: None, waiting: false }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, polled: Poll<T>) -> Poll<Result<T, BodyError>> {
        let Poll::Pending = polled else {
            self.waiting = false;
            return polled.map(Ok);
        };
        let Some(limit) = self.limit else { return Poll::Pending };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        if !self.waiting {
            self.waiting = true;
            sleep.as_mut().reset(tokio::time::Instant::now() + limit);
        }
        sleep.as_mut().poll(cx).map(|()| Err(BodyError::Idle))
    }
}

/// A peer's body as it comes.
pub(crate) struct PeerBody {
    recv: RecvStream,
    progress: Rc<Progress>,
    data_ended: bool,
    patience: Patience,
}

impl PeerBody {
    /// Wraps a stream.
    pub(crate) fn new(recv: RecvStream, progress: Rc<Progress>, pace: Pace) -> Self {
        Self { recv, progress, data_ended: false, patience: Patience::new(pace) }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        let polled = self.recv.poll_data(cx);
        let data = match ready!(self.patience.watch(cx, polled)) {
            Ok(data) => data,
            Err(idle) => return Poll::Ready(Some(Err(idle))),
        };
        match data {
            Some(Ok(bytes)) => {
                // The receiver passes it on at once, so the window opens again at once.
                let released = self.recv.flow_control().release_capacity(bytes.len());
                self.progress.moved(bytes.len());
                Poll::Ready(Some(released.map(|()| bytes).map_err(BodyError::from)))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(error.into()))),
            None => Poll::Ready(None),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.data_ended {
            if let Some(data) = ready!(self.poll_data(cx)) {
                return Poll::Ready(Some(data.map(Frame::data)));
            }
            self.data_ended = true;
        }
        let trailers = ready!(self.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn poll_trailers(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<HeaderMap>, BodyError>> {
        let polled = self.recv.poll_trailers(cx);
        self.patience
            .watch(cx, polled)
            .map(|polled| polled.and_then(|trailers| trailers.map_err(BodyError::from)))
    }
}

/// A peer's body whose trailer signature is verified before its end is let through, so that an application never sees the end of
/// a body that was changed: the bytes that complete a length which the head told, and else the end of the stream. Without a length
/// nothing else can be held back: a caller may send a message and wait for the answer to it, as gRPC's callers do, and only what
/// comes after that would tell that the message was not the last.
pub(crate) struct VerifiedBody {
    body: PeerBody,
    connection: Rc<PeerConnection>,
    verified: Verified,
    hash: Sha256,
    /// What is still to come of the length that the head told.
    left: Option<u64>,
    held: Option<Bytes>,
    trailers: Option<HeaderMap>,
    ended: bool,
    broken: Broken,
}

impl VerifiedBody {
    /// Wraps a body whose head told this length; `broken` gets the code of a signature that does not hold.
    pub(crate) fn new(
        body: PeerBody,
        length: Option<u64>,
        connection: Rc<PeerConnection>,
        verified: Verified,
        broken: Broken,
    ) -> Self {
        let hash = Sha256::new();
        Self {
            body,
            connection,
            verified,
            hash,
            left: length,
            held: None,
            trailers: None,
            ended: false,
            broken,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        while !self.body.data_ended {
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(bytes)) if bytes.is_empty() => {}
                Some(Ok(bytes)) => {
                    self.hash.update(&bytes);
                    if !self.completes(bytes.len()) {
                        return Poll::Ready(Some(Ok(Frame::data(bytes))));
                    }
                    // h2 lets no more come than was told, so nothing is held already.
                    self.held = Some(bytes);
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.body.data_ended = true,
            }
        }
        if !self.ended {
            let trailers = ready!(self.body.poll_trailers(cx))?.unwrap_or_default();
            self.ended = true;
            self.verify(trailers)?;
        }
        if let Some(last) = self.held.take() {
            return Poll::Ready(Some(Ok(Frame::data(last))));
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    /// Whether so many further bytes make the told length whole.
    fn completes(&mut self, count: usize) -> bool {
        let Some(left) = self.left.as_mut() else { return false };
        *left = left.saturating_sub(count as u64);
        *left == 0
    }

    fn verify(&mut self, mut trailers: HeaderMap) -> Result<(), BodyError> {
        let digest: [u8; 32] = std::mem::take(&mut self.hash).finalize().into();
        if let Err(error) = self.connection.verify_trailers(&self.verified, &digest, &trailers) {
            self.broken.replace(Some(Refused::new(
                Reject::Signature(error.code()),
                "the body's trailer signature does not hold",
            )));
            self.held = None;
            return Err(BodyError::Signature(error.code()));
        }
        kiro_core::signature::strip_trailers(&mut trailers);
        self.trailers = (!trailers.is_empty()).then_some(trailers);
        Ok(())
    }
}

/// An ingress client's body, counted.
pub(crate) struct ClientBody {
    incoming: RequestBody,
    progress: Rc<Progress>,
    patience: Patience,
    broken: Broken,
}

impl ClientBody {
    /// Wraps a body; `broken` learns why it broke off.
    pub(crate) fn new(incoming: RequestBody, progress: Rc<Progress>, pace: Pace, broken: Broken) -> Self {
        Self { incoming, progress, patience: Patience::new(pace), broken }
    }

    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.incoming).poll_frame(cx);
        self.patience.watch(cx, polled).map(|watched| match watched {
            Ok(frame) => frame,
            Err(idle) => Some(Err(idle)),
        })
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(self.poll_incoming(cx));
        match &frame {
            Some(Ok(frame)) => self.progress.moved(frame.data_ref().map_or(0, Bytes::len)),
            Some(Err(error)) => {
                self.broken.replace(Some(error.by_sender()));
            }
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body_util::BodyExt;
    use tokio::time::Instant;

    use super::*;
    use crate::client::StreamBody;
    use crate::h2_io::tests::ends;

    /// How long a peer's body that does not come is waited for.
    async fn waited(pace: Pace) -> Option<u64> {
        let ends = ends().await;
        let mut body = PeerBody::new(ends.server.into_body(), Progress::new(), pace);
        let begin = Instant::now();
        let frame = poll_fn(|cx| body.poll(cx));
        let frame = tokio::time::timeout(limits::BODY_IDLE * 10, frame).await.ok()?;
        assert!(matches!(frame, Some(Err(BodyError::Idle))), "{frame:?}");
        Some(begin.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_s_body_that_stands_still_is_given_up_but_for_a_call_s() {
        assert_eq!(waited(Pace::Request).await, Some(limits::BODY_IDLE.as_secs()));
        assert_eq!(waited(Pace::Call).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_s_body_that_stands_still_is_why_its_request_fails() {
        let ends = ends().await;
        let incoming = RequestBody::Http2(StreamBody::new(ends.server.into_body()));
        let broken = Broken::default();
        let mut body = ClientBody::new(incoming, Progress::new(), Pace::Request, Rc::clone(&broken));
        let begin = Instant::now();
        let frame = tokio::time::timeout(limits::BODY_IDLE * 10, body.frame()).await.expect("given up");
        assert!(matches!(frame, Some(Err(BodyError::Idle))), "{frame:?}");
        assert_eq!(begin.elapsed().as_secs(), limits::BODY_IDLE.as_secs());
        assert_eq!(broken.take().map(|refused| refused.reject), Some(Reject::RequestTimeout));
    }
}
