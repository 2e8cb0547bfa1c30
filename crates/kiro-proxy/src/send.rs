//! How does a body get into an HTTP/2 stream, as fast as the other side takes it and no faster?

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::HeaderMap;
use http_body::{Body, Frame};

use crate::answer;
use crate::body::BodyError;
use crate::limits;
use crate::trailers;

/// What a sender does with a body beside moving it.
pub(crate) trait Watcher {
    /// Sees each piece of data.
    fn data(&mut self, bytes: &Bytes);
    /// Gives the trailers that end the stream; `own` are the body's.
    fn trailers(&mut self, own: Option<HeaderMap>) -> Result<Option<HeaderMap>, BodyError>;
    /// Whether trailers follow in any case, so that the last data can't end the stream.
    fn always_trailers(&self) -> bool;
}

/// Moves what comes, and no more: the body itself counts it.
pub(crate) struct Passing {
    /// How large trailers may be, where the body has not seen to that.
    pub(crate) trailers_bytes: Option<usize>,
}

impl Watcher for Passing {
    fn data(&mut self, _: &Bytes) {}

    fn trailers(&mut self, own: Option<HeaderMap>) -> Result<Option<HeaderMap>, BodyError> {
        let own = own.filter(|trailers| !trailers.is_empty());
        match self.trailers_bytes {
            Some(limit) => own.map(|trailers| trailers::carried(trailers, limit)).transpose(),
            None => Ok(own),
        }
    }

    fn always_trailers(&self) -> bool {
        false
    }
}

/// How long a body may stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// A request's: whoever sends it has to go on, and whoever receives it.
    Request,
    /// An answer's: its sender may be silent for as long as it likes (server-sent events are), its receiver has to read.
    Answer,
    /// Either way of a gRPC call: a conversation that pauses as its two ends like, and ends by its caller's deadline.
    Call,
}

impl Pace {
    /// How long its sender may be silent.
    pub(crate) fn of_sender(self) -> Option<Duration> {
        match self {
            Pace::Request => Some(limits::BODY_IDLE),
            Pace::Answer | Pace::Call => None,
        }
    }

    /// How long its receiver may take nothing.
    fn of_receiver(self) -> Option<Duration> {
        match self {
            Pace::Request | Pace::Answer => Some(limits::BODY_IDLE),
            Pace::Call => None,
        }
    }
}

/// Moves a body into a stream, as fast as the peer's window allows. Ends early where the peer resets the stream, or where one of the
/// two ends stands still for longer than `pace` allows.
pub(crate) async fn send<B>(
    mut body: B,
    stream: &mut SendStream<Bytes>,
    watcher: &mut impl Watcher,
    pace: Pace,
) -> Result<(), BodyError>
where
    B: Body<Data = Bytes> + Unpin,
    BodyError: From<B::Error>,
{
    let mut trailers = None;
    while let Some(frame) = next_frame(&mut body, stream, pace.of_sender()).await? {
        match frame.into_data() {
            Ok(data) => {
                watcher.data(&data);
                let last = body.is_end_stream() && !watcher.always_trailers();
                if data.is_empty() && !last {
                    // An empty frame says nothing, and the peer's library ends a connection that has brought a hundred of them.
                    continue;
                }
                send_data(stream, data, last, pace.of_receiver()).await?;
                if last {
                    return Ok(());
                }
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    match watcher.trailers(trailers)? {
        Some(trailers) => stream.send_trailers(trailers)?,
        None => stream.send_data(Bytes::new(), true)?,
    }
    Ok(())
}

async fn next_frame<B>(
    body: &mut B,
    stream: &mut SendStream<Bytes>,
    idle: Option<Duration>,
) -> Result<Option<Frame<Bytes>>, BodyError>
where
    B: Body<Data = Bytes> + Unpin,
    BodyError: From<B::Error>,
{
    // The common case is that the frame is there: no timer is made for it.
    if let Some(ready) = poll_fn(|cx| match Pin::new(&mut *body).poll_frame(cx) {
        Poll::Ready(frame) => Poll::Ready(Some(frame)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
    {
        return Ok(ready.transpose()?);
    }
    let next = poll_fn(|cx| {
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
            return Poll::Ready(frame.transpose().map_err(BodyError::from));
        }
        match stream.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => Poll::Ready(Err(BodyError::Stream(reason.into()))),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
            Poll::Pending => Poll::Pending,
        }
    });
    match idle {
        None => next.await,
        Some(idle) => tokio::time::timeout(idle, next).await.unwrap_or(Err(BodyError::Idle)),
    }
}

/// Ends a stream whose answer broke off: by the reason that the other side gave, where it gave one. Where its connection was lost, a
/// caller that speaks gRPC sees what it would have seen of the lost connection, which is the status that it may try again on.
pub(crate) fn break_off(stream: &mut SendStream<Bytes>, error: &BodyError, grpc: bool) {
    let word = error.word();
    if grpc && word.is_none() && stream.send_trailers(answer::grpc_broken()).is_ok() {
        return;
    }
    stream.send_reset(word.unwrap_or(Reason::INTERNAL_ERROR));
}

/// Sends data within the peer's window, waiting no longer than `idle` for it to open.
pub(crate) async fn send_data(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    last: bool,
    idle: Option<Duration>,
) -> Result<(), BodyError> {
    if data.is_empty() {
        return Ok(stream.send_data(data, last)?);
    }
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let mut capacity = stream.capacity();
        if capacity == 0 {
            let granted = poll_fn(|cx| stream.poll_capacity(cx));
            let granted = match idle {
                None => granted.await,
                Some(idle) => tokio::time::timeout(idle, granted).await.map_err(|_| BodyError::Idle)?,
            };
            capacity = granted.ok_or(BodyError::Stream(Reason::CANCEL.into()))??;
        }
        let piece = data.split_to(capacity.min(data.len()));
        let ends = last && data.is_empty();
        stream.send_data(piece, ends)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};

    use super::*;
    use crate::h2_io::tests::ends;

    /// What the client of a stream sees after its answer broke off: trailers, or the reason of a reset.
    async fn seen(error: BodyError, grpc: bool) -> Result<HeaderMap, Reason> {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let serving = tokio::spawn(async move {
            let mut connection = h2::server::handshake(server).await.unwrap();
            let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut stream = respond.send_response(Response::new(()), false).unwrap();
            stream.send_data(Bytes::from_static(b"half"), false).unwrap();
            break_off(&mut stream, &error, grpc);
            while connection.accept().await.is_some() {}
        });
        let (send, connection) = h2::client::handshake(client).await.unwrap();
        let driving = tokio::spawn(connection);
        let (answer, _) = send.ready().await.unwrap().send_request(Request::new(()), true).unwrap();
        let mut body = match answer.await {
            Ok(answer) => answer.into_body(),
            Err(error) => return Err(error.reason().unwrap()),
        };
        let told = loop {
            match body.data().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => break Err(error.reason().unwrap()),
                None => break Ok(body.trailers().await.unwrap().unwrap()),
            }
        };
        driving.abort();
        serving.abort();
        told
    }

    /// A body that never comes.
    struct Silent;

    impl Body for Silent {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            Poll::Pending
        }
    }

    /// How long it takes until sending is given up; none where it never is.
    async fn given_up(body: impl Body<Data = Bytes, Error = BodyError> + Unpin, pace: Pace) -> Option<u64> {
        let mut ends = ends().await;
        let begin = tokio::time::Instant::now();
        let mut passing = Passing { trailers_bytes: None };
        let sending = send(body, &mut ends.client, &mut passing, pace);
        let sent = tokio::time::timeout(limits::BODY_IDLE * 10, sending).await.ok()?;
        assert!(matches!(sent, Err(BodyError::Idle)), "{sent:?}");
        Some(begin.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stands_still_is_given_up_but_for_those_that_may() {
        // More than the window of a stream, of which nobody takes anything.
        let unread = || {
            let whole = http_body_util::Full::new(Bytes::from(vec![0; 1 << 20]));
            http_body_util::BodyExt::map_err(whole, |never| match never {})
        };
        let idle = Some(limits::BODY_IDLE.as_secs());
        for (pace, silent, taken) in
            [(Pace::Request, idle, idle), (Pace::Answer, None, idle), (Pace::Call, None, None)]
        {
            assert_eq!(given_up(Silent, pace).await, silent, "{pace:?}, by its sender");
            assert_eq!(given_up(unread(), pace).await, taken, "{pace:?}, by its receiver");
        }
    }

    #[tokio::test]
    async fn a_caller_of_grpc_learns_of_a_lost_connection_by_a_status_and_of_a_reset_by_its_reason() {
        // Nobody's word, as it is with a lost connection.
        let trailers = seen(BodyError::Idle, true).await.unwrap();
        assert_eq!(trailers["grpc-status"], "14");
        assert_eq!(trailers["grpc-message"], "upstream_reset");
        assert_eq!(seen(BodyError::Idle, false).await.unwrap_err(), Reason::INTERNAL_ERROR);
        for grpc in [true, false] {
            let reset = BodyError::Stream(Reason::CANCEL.into());
            assert_eq!(seen(reset, grpc).await.unwrap_err(), Reason::CANCEL);
        }
    }
}
