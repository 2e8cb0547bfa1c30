//! How does an application's answer reach whoever asked?

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::http1::AppConnection;
use super::http2::Upload;
use crate::body::BodyError;
use crate::client::StreamBody;
use crate::upstream::pool::Slot;

/// The body of an application's answer, with the connection or stream that it comes on.
pub(crate) enum AppAnswer {
    /// The connection goes back to the pool when the body has ended.
    Http1 {
        /// What comes.
        incoming: Incoming,
        /// Where it comes from, until it has ended.
        connection: Option<AppConnection>,
    },
    /// A stream of many.
    Http2 {
        /// What comes.
        body: StreamBody,
        /// Its place among the streams.
        _slot: Slot,
        /// What is left of the request's body, which ends with the answer.
        _upload: Option<Upload>,
    },
}

impl AppAnswer {
    /// An answer on a connection of its own.
    pub(super) fn http1(incoming: Incoming, connection: AppConnection) -> Self {
        // A body without bytes is never polled, so its connection is free at once.
        let connection = if incoming.is_end_stream() {
            connection.reuse();
            None
        } else {
            Some(connection)
        };
        Self::Http1 { incoming, connection }
    }

    /// An answer on a stream.
    pub(super) fn http2(recv: RecvStream, slot: Slot, upload: Option<Upload>) -> Self {
        Self::Http2 { body: StreamBody::new(recv), _slot: slot, _upload: upload }
    }
}

impl Body for AppAnswer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            AppAnswer::Http1 { incoming, connection } => {
                let frame = std::task::ready!(Pin::new(&mut *incoming).poll_frame(cx))
                    .map(|frame| frame.map_err(BodyError::from));
                if (frame.is_none() || incoming.is_end_stream())
                    && let Some(connection) = connection.take()
                {
                    connection.reuse();
                }
                Poll::Ready(frame)
            }
            AppAnswer::Http2 { body, .. } => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            AppAnswer::Http1 { incoming, .. } => incoming.is_end_stream(),
            AppAnswer::Http2 { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            AppAnswer::Http1 { incoming, .. } => incoming.size_hint(),
            AppAnswer::Http2 { body, .. } if body.is_end_stream() => SizeHint::with_exact(0),
            AppAnswer::Http2 { .. } => SizeHint::default(),
        }
    }
}
