//! How do a tunnel's bytes move between a socket and an HTTP/2 stream, as fast as the slower end takes them and no faster?
//!
//! Each way is a loop of its own, and each half ends by itself. A connection that stands idle holds no buffer: sockets are read into
//! one that the worker lends for the time of a system call.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use kiro_core::mesh::Timeout;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::app;
use crate::exchange::Progress;
use crate::limits;
use crate::send::send_data;

/// Which end of a tunnel failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broke {
    /// The byte stream: the client's or the application's connection.
    Io,
    /// The HTTP/2 stream: the peer's sidecar reset it, or its connection was lost.
    Stream,
    /// Neither, but one half had ended and nothing moved in the other one.
    Idle,
}

/// Runs both halves of a tunnel. Once one has ended, the other must move something now and then: with nobody left who would end it,
/// it would stay for good.
pub(crate) async fn both_halves(
    one: impl Future<Output = Result<(), Broke>>,
    one_moved: &Progress,
    other: impl Future<Output = Result<(), Broke>>,
    other_moved: &Progress,
) -> Result<(), Broke> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let bound = Timeout::After(limits::HALF_CLOSED_IDLE);
    let rest = tokio::select! {
        ended = &mut one => {
            ended?;
            app::within(bound, Some(other_moved), other).await
        }
        ended = &mut other => {
            ended?;
            app::within(bound, Some(one_moved), one).await
        }
    };
    rest.unwrap_or(Err(Broke::Idle))
}

/// Moves a stream's data into a socket. The stream's window opens again for what the socket has taken.
pub(crate) async fn stream_to_io<W>(
    mut recv: RecvStream,
    mut write: W,
    progress: &Progress,
) -> Result<(), Broke>
where
    W: AsyncWrite + Unpin,
{
    let mut pieces = VecDeque::with_capacity(limits::TUNNEL_PIECES);
    let mut ended = None;
    while ended.is_none() {
        let taken = poll_fn(|cx| take_pieces(&mut recv, cx, &mut pieces, &mut ended)).await;
        write_pieces(&mut write, &mut pieces).await.map_err(|_| Broke::Io)?;
        write.flush().await.map_err(|_| Broke::Io)?;
        recv.flow_control().release_capacity(taken).map_err(|_| Broke::Stream)?;
        progress.moved(taken);
    }
    if ended == Some(Err(Broke::Stream)) {
        return Err(Broke::Stream);
    }
    // The other side has ended its half; ours goes on.
    write.shutdown().await.map_err(|_| Broke::Io)
}

/// Takes what has come of a stream, waiting until that is something, or its end.
fn take_pieces(
    recv: &mut RecvStream,
    cx: &mut Context<'_>,
    pieces: &mut VecDeque<Bytes>,
    ended: &mut Option<Result<(), Broke>>,
) -> Poll<usize> {
    let mut taken = 0;
    while pieces.len() < limits::TUNNEL_PIECES {
        match recv.poll_data(cx) {
            Poll::Ready(Some(Ok(piece))) if piece.is_empty() => {}
            Poll::Ready(Some(Ok(piece))) => {
                taken += piece.len();
                pieces.push_back(piece);
            }
            Poll::Ready(Some(Err(_))) => {
                *ended = Some(Err(Broke::Stream));
                break;
            }
            Poll::Ready(None) => {
                *ended = Some(Ok(()));
                break;
            }
            Poll::Pending if taken == 0 => return Poll::Pending,
            Poll::Pending => break,
        }
    }
    Poll::Ready(taken)
}

/// Writes all pieces, with as few system calls as the socket allows.
async fn write_pieces<W>(write: &mut W, pieces: &mut VecDeque<Bytes>) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    while !pieces.is_empty() {
        let mut written = {
            let mut slices = [io::IoSlice::new(&[]); limits::TUNNEL_PIECES];
            for (slice, piece) in slices.iter_mut().zip(&*pieces) {
                *slice = io::IoSlice::new(piece);
            }
            let filled = pieces.len().min(limits::TUNNEL_PIECES);
            write.write_vectored(slices.get(..filled).unwrap_or(&slices)).await?
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(piece) = pieces.front_mut() {
            if written < piece.len() {
                piece.advance(written);
                break;
            }
            written -= piece.len();
            pieces.pop_front();
        }
    }
    Ok(())
}

/// Moves a socket's bytes into a stream, within the peer's window. `lent` is the worker's buffer, empty between system calls.
pub(crate) async fn io_to_stream<R>(
    mut read: R,
    send: &mut SendStream<Bytes>,
    lent: &RefCell<BytesMut>,
    progress: &Progress,
) -> Result<(), Broke>
where
    R: AsyncRead + Unpin,
{
    loop {
        let piece = poll_fn(|cx| {
            if let Poll::Ready(piece) = poll_piece(&mut read, cx, lent) {
                return Poll::Ready(piece.map_err(|_| Broke::Io));
            }
            // A peer that resets the stream is noticed while this end is silent.
            send.poll_reset(cx).map(|_| Err(Broke::Stream))
        })
        .await?;
        if piece.is_empty() {
            return send.send_data(Bytes::new(), true).map_err(|_| Broke::Stream);
        }
        progress.moved(piece.len());
        // A tunnel may stand still for as long as its ends like, a full window included.
        send_data(send, piece, false, None).await.map_err(|_| Broke::Stream)?;
    }
}

/// Reads once; nothing is an end. Small pieces get memory of their own, since one that waits for its window would else keep a buffer
/// that is many times its size.
fn poll_piece<R>(read: &mut R, cx: &mut Context<'_>, lent: &RefCell<BytesMut>) -> Poll<io::Result<Bytes>>
where
    R: AsyncRead + Unpin,
{
    let mut buffer = lent.borrow_mut();
    if buffer.capacity() < limits::TUNNEL_COPY {
        buffer.reserve(limits::TUNNEL_READ);
    }
    let count = ready!(pin!(read.read_buf(&mut *buffer)).poll(cx))?;
    Poll::Ready(Ok(if count < limits::TUNNEL_COPY {
        let piece = Bytes::copy_from_slice(&buffer);
        buffer.clear();
        piece
    } else {
        buffer.split().freeze()
    }))
}

/// Moves bytes from one socket into another: an ingress client and the application.
pub(crate) async fn io_to_io<R, W>(mut read: R, mut write: W, progress: &Progress) -> Result<(), Broke>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let broken = |_| Broke::Io;
    let mut buffer = BytesMut::with_capacity(limits::TUNNEL_BUFFER);
    loop {
        buffer.reserve(limits::TUNNEL_BUFFER);
        if read.read_buf(&mut buffer).await.map_err(broken)? == 0 {
            return write.shutdown().await.map_err(broken);
        }
        let piece = buffer.split();
        write.write_all(&piece).await.map_err(broken)?;
        write.flush().await.map_err(broken)?;
        progress.moved(piece.len());
    }
}
