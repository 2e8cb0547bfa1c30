//! How does a request's body travel to a peer: held and signed with the head, or streamed and signed at its end?

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use h2::{Reason, SendStream};
use http::header::EXPECT;
use http::{HeaderMap, HeaderName, HeaderValue, Version};
use http_body::Body;
use http_body_util::BodyExt;
use kiro_core::fields;
use kiro_core::mesh::Signatures;
use kiro_core::signature::{Nonce, content_digest_value};
use sha2::{Digest, Sha256};
use tokio::task::{AbortHandle, spawn_local};

use crate::body::BodyError;
use crate::client::RequestBody;
use crate::exchange::{Exchange, Progress};
use crate::headers::Kind;
use crate::limits;
use crate::reject::{Refused, Reject};
use crate::route::Plan;
use crate::send::{Pace, Watcher, send};
use crate::upstream::Upstream;

static CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");

/// A request's body.
pub(crate) enum Payload {
    /// None, or a stream that becomes a tunnel.
    Empty,
    /// Known whole, so that it can be sent again.
    Held(Bytes),
    /// Moved as it comes; `None` once it is on its way.
    Stream(Option<RequestBody>, Rc<RefCell<Option<Refused>>>),
}

impl Payload {
    /// Decides how a body travels, and reads it where it is to be held. The digest of a held body goes into the head.
    pub(crate) async fn of(
        plan: &mut Plan,
        mut body: RequestBody,
        exchange: &mut Exchange,
    ) -> Result<Self, Refused> {
        if plan.kind != Kind::Plain || body.is_end_stream() {
            return Ok(Payload::Empty);
        }
        let signed = exchange.state().signatures == Signatures::Required;
        let own_way = [&EXPECT, &CONTENT_DIGEST].iter().any(|name| plan.head.headers.contains_key(*name));
        let whole = if own_way { None } else { poll_fn(|cx| Poll::Ready(body.already_whole(cx))).await };
        // In HTTP/1 a body of known length has no trailers; in HTTP/2 it may, and they would be lost here.
        let small = plan.head.version < Version::HTTP_2
            && body.size_hint().exact().is_some_and(|length| length <= limits::DIGEST_BODY_BYTES as u64);
        let headers = &mut plan.head.headers;
        // An application's own digest stays as it is; the head signs it, and the body is signed at its end.
        if own_way || !small && whole.is_none() {
            if signed {
                headers.insert(fields::BODY, HeaderValue::from_static(fields::BODY_STREAM));
            }
            return Ok(Payload::Stream(Some(body), Rc::default()));
        }
        let bytes = match whole {
            Some(bytes) => bytes,
            None => hold(body).await?,
        };
        exchange.request_bytes(bytes.len());
        if signed {
            let digest: [u8; 32] = Sha256::digest(&bytes).into();
            plan.head.headers.insert(CONTENT_DIGEST.clone(), content_digest_value(&digest));
        }
        Ok(Payload::Held(bytes))
    }

    /// The same once more, for a copy, if it is known whole.
    pub(crate) fn again(&self) -> Option<Self> {
        match self {
            Payload::Empty => Some(Payload::Empty),
            Payload::Held(bytes) => Some(Payload::Held(bytes.clone())),
            Payload::Stream(..) => None,
        }
    }

    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Payload::Empty)
    }

    /// Whether it can be sent (again) from its beginning.
    pub(crate) fn is_whole(&self) -> bool {
        match self {
            Payload::Empty | Payload::Held(_) => true,
            Payload::Stream(body, _) => body.is_some(),
        }
    }

    /// Why a streamed body broke off, where that was the client's doing.
    pub(crate) fn failure(&self) -> Option<Refused> {
        match self {
            Payload::Stream(_, failure) => failure.borrow_mut().take(),
            Payload::Empty | Payload::Held(_) => None,
        }
    }

    /// Puts the body on its way. A streamed one goes on by itself, since an answer may come before its end.
    pub(crate) fn send(
        &mut self,
        upstream: &Rc<Upstream>,
        nonce: Option<Nonce>,
        mut stream: SendStream<Bytes>,
        exchange: &mut Exchange,
    ) -> Option<Upload> {
        match self {
            Payload::Empty => None,
            Payload::Held(bytes) => {
                // h2 keeps what the peer's window does not take yet: no more than `DIGEST_BODY_BYTES`. What breaks here breaks the
                // answer as well, which is where it is looked at.
                let _ = stream.send_data(bytes.clone(), true);
                None
            }
            Payload::Stream(body, failure) => {
                let body = body.take()?;
                let progress = Progress::new();
                exchange.request_body(Rc::clone(&progress));
                let watcher = Streamed::new(Rc::clone(upstream), nonce, Rc::clone(&progress));
                let task = spawn_local(stream_body(
                    body,
                    stream,
                    watcher,
                    Rc::clone(failure),
                    exchange.request_pace(),
                ));
                Some(Upload { progress, task: task.abort_handle() })
            }
        }
    }
}

/// A body on its way to a peer. It ends, at the latest, with the exchange that it belongs to: dropping this ends it.
pub(crate) struct Upload {
    progress: Rc<Progress>,
    task: AbortHandle,
}

impl Upload {
    /// Whether it has come to its end.
    pub(crate) fn is_done(&self) -> bool {
        self.task.is_finished()
    }

    /// How far it has come.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn hold(
    body: impl Body<Data = Bytes, Error: std::error::Error + 'static> + Unpin,
) -> Result<Bytes, Refused> {
    let whole = async {
        let mut body = body;
        let mut whole = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame
                .map_err(|error| Refused::new(Reject::MessageInvalid, crate::app::error_chain(&error)))?;
            if let Ok(data) = frame.into_data() {
                // The common body comes in one piece and is not copied.
                if whole.is_empty() && body.is_end_stream() {
                    return Ok(data);
                }
                whole.extend_from_slice(&data);
            }
        }
        Ok(whole.freeze())
    };
    match tokio::time::timeout(limits::BODY_IDLE, whole).await {
        Ok(bytes) => bytes,
        Err(_) => Err(Refused::new(Reject::RequestTimeout, "the body did not come whole in time")),
    }
}

async fn stream_body(
    body: RequestBody,
    mut stream: SendStream<Bytes>,
    mut watcher: Streamed,
    failure: Rc<RefCell<Option<Refused>>>,
    pace: Pace,
) {
    let Err(error) = send(body, &mut stream, &mut watcher, pace).await else { return };
    if let BodyError::Stream(error) = &error
        && (error.reason().is_some() || error.is_io())
    {
        // The peer's doing: its answer, or its reset, says what there is to say.
        return;
    }
    *failure.borrow_mut() = Some(error.by_sender());
    stream.send_reset(Reason::CANCEL);
}

/// Hashes a streamed body and signs its end.
struct Streamed {
    upstream: Rc<Upstream>,
    nonce: Option<Nonce>,
    progress: Rc<Progress>,
    hash: Sha256,
}

impl Streamed {
    fn new(upstream: Rc<Upstream>, nonce: Option<Nonce>, progress: Rc<Progress>) -> Self {
        Self { upstream, nonce, progress, hash: Sha256::new() }
    }
}

impl Watcher for Streamed {
    fn data(&mut self, bytes: &Bytes) {
        self.progress.moved(bytes.len());
        if self.nonce.is_some() {
            self.hash.update(bytes);
        }
    }

    fn trailers(&mut self, own: Option<HeaderMap>) -> Result<Option<HeaderMap>, BodyError> {
        let mut own = own;
        if let Some(trailers) = &mut own {
            crate::trailers::clean(trailers);
            crate::header_size::check(trailers, limits::HEADER_BYTES).map_err(|_| BodyError::TooLarge)?;
        }
        let (Some(nonce), Some(signer)) = (self.nonce.take(), self.upstream.signer()) else {
            return Ok(own.filter(|trailers| !trailers.is_empty()));
        };
        let digest: [u8; 32] = std::mem::take(&mut self.hash).finalize().into();
        let mut trailers = own.unwrap_or_default();
        signer
            .borrow()
            .sign_trailers(nonce, &digest, &mut trailers)
            .map_err(|_| BodyError::Signature("the trailers can't be signed"))?;
        Ok(Some(trailers))
    }

    fn always_trailers(&self) -> bool {
        self.nonce.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use http::Response;
    use http_body_util::Full;
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// What holding a body comes to, whose bytes come one a second for `seconds` and then no more.
    async fn held(seconds: u64) -> (Result<Bytes, Reject>, Duration) {
        let (mut client, server) = tokio::io::duplex(4096);
        client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n").await.unwrap();
        let (outcome, outcomes) = tokio::sync::mpsc::channel(1);
        let mut outcomes = outcomes;
        let serving = tokio::spawn(async move {
            let service = service_fn(move |request: http::Request<Incoming>| {
                let outcome = outcome.clone();
                async move {
                    let held = hold(request.into_body()).await;
                    outcome.send(held.map_err(|refused| refused.reject)).await.unwrap();
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
                }
            });
            let _ = http1::Builder::new().serve_connection(TokioIo::new(server), service).await;
        });
        let begin = tokio::time::Instant::now();
        for _ in 0..seconds {
            let _ = client.write_all(b"a").await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let held = outcomes.recv().await.unwrap();
        let took = begin.elapsed();
        drop(client);
        serving.await.unwrap();
        (held, took)
    }

    #[tokio::test(start_paused = true)]
    async fn a_held_body_that_never_ends_is_given_up() {
        // Standing still from the start, or trickling: a held body is small, so its whole has to come in time.
        for seconds in [0, 30] {
            let (held, took) = held(seconds).await;
            assert_eq!(held, Err(Reject::RequestTimeout), "{seconds}");
            assert_eq!(took.as_secs(), limits::BODY_IDLE.as_secs(), "{seconds}");
        }
    }
}
