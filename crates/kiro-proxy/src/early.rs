//! What if the application answers before it has read a request, and closes?
//!
//! That is what a server does with an upload that it won't take. Our next write then fails, and the HTTP library gives the
//! connection up with the answer unread behind it. [`EarlyAnswer`] drops what nobody will read any more, so that what has been
//! answered is read first; where there is no answer, the library finds the connection's end instead.
//!
//! And what if it talks without end? The library takes interim answers (1xx) for as long as there are any, so after some bytes others
//! get their turn.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::frames::others_first;
use crate::limits;
use crate::metrics::OpenConnection;

/// A connection to the application.
#[derive(Debug)]
pub(crate) struct EarlyAnswer {
    stream: TcpStream,
    /// The application no longer reads.
    deaf: bool,
    /// Bytes read since it was last the others' turn.
    turn_bytes: usize,
    /// Here, so that it counts as open for as long as it is, whatever it carries.
    _open: OpenConnection,
}

impl EarlyAnswer {
    /// Wraps a connection.
    pub(crate) fn new(stream: TcpStream, open: OpenConnection) -> Self {
        Self { stream, deaf: false, turn_bytes: 0, _open: open }
    }

    fn written(&mut self, length: usize, outcome: io::Result<usize>) -> io::Result<usize> {
        let Err(error) = outcome else { return outcome };
        self.deaf = matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
        if self.deaf { Ok(length) } else { Err(error) }
    }
}

impl AsyncRead for EarlyAnswer {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.turn_bytes >= limits::APP_BYTES_A_TURN {
            self.turn_bytes = 0;
            return others_first(cx);
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let count = buf.filled().len() - before;
        self.turn_bytes = if read.is_pending() { 0 } else { self.turn_bytes + count };
        read
    }
}

impl AsyncWrite for EarlyAnswer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.deaf {
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, buf).map(|outcome| self.written(buf.len(), outcome))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        if self.deaf {
            return Poll::Ready(Ok(length));
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs).map(|outcome| self.written(length, outcome))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::admission::{Admission, Seats};
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn what_was_answered_is_read_although_nobody_reads_the_request_any_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let metrics = Metrics::of_a_test(1, Admission::shared(1024, 1));
        let open = OpenConnection::to_app(&metrics, Seats::new(1).take().unwrap());
        let mut stream = EarlyAnswer::new(stream, open);
        stream.write_all(b"the beginning").await.unwrap();
        let (mut app, _) = listener.accept().await.unwrap();
        app.readable().await.unwrap();
        app.write_all(b"too large").await.unwrap();
        // What it has not read makes the kernel reset the connection.
        drop(app);
        while !stream.deaf {
            stream.write_all(b"more").await.unwrap();
        }
        stream.write_all(b"and more").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"too large");
    }
}
