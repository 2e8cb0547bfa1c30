//! What happens to the answers that come before the answer (1xx, RFC 9110 15.2)?
//!
//! 100 (Continue) sets a body free that waits for it, end to end; 103 (Early Hints) passes on to clients that speak HTTP/2. Clients that
//! speak HTTP/1 get their 100 from hyper, when the body is first read, and nothing else: hyper has no way to send it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::RecvStream;
use h2::client::ResponseFuture;
use h2::server::SendResponse;
use http::{HeaderMap, Response, StatusCode};

use crate::headers;
use crate::limits;

/// The way back for interim answers.
pub(crate) struct Interim<'a> {
    respond: Option<&'a RefCell<SendResponse<Bytes>>>,
    passed: Cell<usize>,
}

impl<'a> Interim<'a> {
    /// There is nobody who could be told.
    pub(crate) fn unwanted() -> Self {
        Self { respond: None, passed: Cell::new(0) }
    }

    /// Whoever asked on this stream is told.
    pub(crate) fn to(respond: &'a RefCell<SendResponse<Bytes>>) -> Self {
        Self { respond: Some(respond), passed: Cell::new(0) }
    }

    /// Whether there is anybody to tell.
    pub(crate) fn is_wanted(&self) -> bool {
        self.respond.is_some()
    }

    /// Passes an interim answer on. What comes past the bound is dropped, as interim answers may be.
    pub(crate) fn pass(&self, status: StatusCode, mut headers: HeaderMap) {
        let Some(respond) = self.respond else { return };
        // A protocol is switched by an answer that ends the exchange; it never comes before one.
        if status == StatusCode::SWITCHING_PROTOCOLS || self.passed.get() >= limits::INTERIM_ANSWERS {
            return;
        }
        self.passed.set(self.passed.get() + 1);
        headers::response(&mut headers, false);
        let mut answer = Response::new(());
        *answer.status_mut() = status;
        *answer.headers_mut() = headers;
        // What breaks here breaks the answer as well, which is where it is looked at.
        let _ = respond.borrow_mut().send_informational(answer);
    }
}

/// An answer that is to come on an HTTP/2 stream.
pub(crate) struct Answering(ResponseFuture);

type Answer = Result<Response<RecvStream>, h2::Error>;

impl Answering {
    /// Wraps what h2 promised.
    pub(crate) fn new(promised: ResponseFuture) -> Self {
        Self(promised)
    }

    /// Waits for the answer; interim ones are passed on.
    pub(crate) async fn answer(mut self, interim: &Interim<'_>) -> Answer {
        if interim.is_wanted() {
            poll_fn(|cx| {
                loop {
                    match self.poll_interim(cx) {
                        Poll::Ready(Some(answer)) => pass(answer, interim),
                        Poll::Ready(None) => return Poll::Ready(()),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            })
            .await;
        }
        // By itself the library skips interim answers.
        self.0.await
    }

    /// Waits until the body may be sent: the other side asked for it, or did not in time, as not everybody knows of the expectation
    /// (RFC 9110 10.1.1). The answer itself, where that comes first.
    pub(crate) async fn leave_to_send(&mut self, interim: &Interim<'_>) -> Option<Answer> {
        let word = poll_fn(|cx| {
            loop {
                match self.poll_interim(cx) {
                    Poll::Ready(Some(answer)) => {
                        let leave = answer.status() == StatusCode::CONTINUE;
                        pass(answer, interim);
                        if leave {
                            return Poll::Ready(None);
                        }
                    }
                    Poll::Ready(None) => return Pin::new(&mut self.0).poll(cx).map(Some),
                    Poll::Pending => return Poll::Pending,
                }
            }
        });
        tokio::time::timeout(limits::CONTINUE, word).await.unwrap_or(None)
    }

    /// The next interim answer; none where the answer itself, or an error, is next.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<Option<Response<()>>> {
        self.0.poll_informational(cx).map(|answer| answer.and_then(Result::ok))
    }
}

fn pass(answer: Response<()>, interim: &Interim<'_>) {
    let (head, ()) = answer.into_parts();
    interim.pass(head.status, head.headers);
}
