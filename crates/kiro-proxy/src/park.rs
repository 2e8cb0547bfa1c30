//! What does a client's HTTP/1 connection cost while it waits for its next request?
//!
//! The HTTP library keeps ten kilobytes for a connection, used or not: a read buffer, a parser, room for an answer. Clients keep
//! connections for minutes to send a request now and then, so one that has been idle for a moment is parked: the library is taken
//! away from the stream, one byte is waited for, and when it comes the library is put back as if it had read that byte itself.
//!
//! ```text
//! active ──(waits for a head, nothing read, all written, PARK_AFTER over)──► parked
//!    ▲                                                                        │
//!    └──────────────────────────── a byte ────────────────────────────────────┘
//! ```
//!
//! **Invariant.** A connection is parked only while the library waits for a head of which it has nothing. When that is the case, the
//! library says: it has a timer for heads, which runs from the moment when it begins to wait until a head has been read, and
//! [`HeadClock`] is that timer. A body that is still read, an answer that is still written, never look like it.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::rt::Timer;
use hyper::server::conn::http1::{Builder, UpgradeableConnection};
use hyper::service::HttpService;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::framing::{HeadTap, Heads};
use crate::limits;

/// The HTTP library's timer for heads: says whether it waits for one, and lets it know when the time is over. The one alarm of a
/// connection looks here now and then, so a request sets no timer of the runtime.
#[derive(Debug, Clone)]
struct HeadClock(Arc<Clock>);

#[derive(Debug)]
struct Clock {
    /// What the times below count from.
    epoch: Instant,
    /// When the head that is waited for is late, in microseconds; 0 while none is.
    deadline: AtomicU64,
    /// The same for a head that has begun on a connection of the library's that is no more: a new one gives it no new time.
    begun: AtomicU64,
    /// The time is over.
    late: AtomicBool,
}

impl HeadClock {
    /// Of a connection whose head, where it has begun already, is late at `begun`.
    fn new(begun: Option<Instant>) -> Self {
        let epoch = Instant::now();
        let begun = begun.map_or(0, |begun| micros(epoch, begun));
        Self(Arc::new(Clock {
            epoch,
            deadline: AtomicU64::new(0),
            begun: AtomicU64::new(begun),
            late: AtomicBool::new(false),
        }))
    }

    /// Until when the library waits for a head, where it does.
    fn deadline(&self) -> Option<Instant> {
        let micros = self.0.deadline.load(Ordering::Relaxed);
        (micros > 0).then(|| self.0.epoch + Duration::from_micros(micros))
    }

    fn has_begun(&self) -> bool {
        self.0.begun.load(Ordering::Relaxed) > 0
    }

    fn ring(&self) {
        self.0.late.store(true, Ordering::Relaxed);
    }

    fn set(&self, deadline: std::time::Instant) {
        let deadline = match self.0.begun.load(Ordering::Relaxed) {
            0 => micros(self.0.epoch, deadline.into()),
            begun => begun,
        };
        self.0.deadline.store(deadline, Ordering::Relaxed);
        // A head that came when the time was just over was not late after all, and is no reason to hurry the next one.
        self.0.late.store(false, Ordering::Relaxed);
    }
}

/// Never 0.
fn micros(epoch: Instant, at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(epoch).as_micros()).unwrap_or(u64::MAX).max(1)
}

impl Timer for HeadClock {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.set(deadline);
        Box::pin(HeadWait(self.clone()))
    }

    fn now(&self) -> std::time::Instant {
        Instant::now().into()
    }

    fn reset(&self, _sleep: &mut Pin<Box<dyn hyper::rt::Sleep>>, deadline: std::time::Instant) {
        self.set(deadline);
    }
}

/// The library's wait for one head; it drops it when the head has been read.
struct HeadWait(HeadClock);

impl Future for HeadWait {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<()> {
        // Nobody has to be woken: whoever rings polls the connection.
        if self.0.0.late.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl hyper::rt::Sleep for HeadWait {}

impl Drop for HeadWait {
    fn drop(&mut self) {
        self.0.0.deadline.store(0, Ordering::Relaxed);
        self.0.0.begun.store(0, Ordering::Relaxed);
    }
}

/// A client's connection outside of the library's hands: the stream and who answers. One place for both, lent to [`serve`], since an
/// asynchronous function has room for its arguments twice.
pub(crate) struct Client<S, V>(Option<(HeadTap<S>, V)>);

impl<S, V> Client<S, V> {
    /// Of a stream and its service.
    pub(crate) fn new(tap: HeadTap<S>, service: V) -> Self {
        Self(Some((tap, service)))
    }
}

/// Serves a connection to its end, which it is asked for when `drained` is over.
pub(crate) async fn serve<S, V, B>(
    client: &mut Client<S, V>,
    heads: &Heads,
    library: fn() -> Builder,
    mut drained: Pin<&mut impl Future<Output = ()>>,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: HttpService<Incoming, ResBody = B, Error = Infallible>,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut alarm = std::pin::pin!(tokio::time::sleep(limits::PARK_AFTER));
    let mut begun = None;
    while let Some(mut active) = Active::begin(client, heads, library, begun.take()) {
        let turned = poll_fn(|cx| active.poll(cx, alarm.as_mut(), drained.as_mut())).await;
        let deadline = match turned {
            Turned::Ended(outcome) => return outcome,
            Turned::Idle(deadline) => deadline,
        };
        if active.end(client) {
            begun = Some(deadline);
            continue;
        }
        alarm.as_mut().reset(deadline);
        if !poll_fn(|cx| parked(cx, client, alarm.as_mut(), drained.as_mut())).await {
            if let Some((tap, _)) = &mut client.0 {
                // The client is gone, or is told that nobody reads any longer.
                let _ = tap.shutdown().await;
            }
            return Ok(());
        }
        alarm.as_mut().reset(Instant::now() + limits::PARK_AFTER);
    }
    Ok(())
}

/// What became of an active connection.
enum Turned {
    /// It is over.
    Ended(hyper::Result<()>),
    /// It is idle; a head is late at this time.
    Idle(Instant),
}

/// A connection in the HTTP library's hands.
struct Active<'a, S, V: HttpService<Incoming>> {
    connection: UpgradeableConnection<TokioIo<HeadTap<S>>, V>,
    heads: &'a Heads,
    clock: HeadClock,
    draining: bool,
}

impl<'a, S, V, B> Active<'a, S, V>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: HttpService<Incoming, ResBody = B, Error = Infallible>,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Gives a connection to the library; `begun` is when its head is late, where it had begun before. Boxed, since a parked connection
    /// does without it.
    fn begin(
        client: &mut Client<S, V>,
        heads: &'a Heads,
        library: fn() -> Builder,
        begun: Option<Instant>,
    ) -> Option<Box<Self>> {
        let (tap, service) = client.0.take()?;
        let clock = HeadClock::new(begun);
        let mut library = library();
        let connection = library.timer(clock.clone()).serve_connection(TokioIo::new(tap), service);
        Some(Box::new(Self { connection: connection.with_upgrades(), heads, clock, draining: false }))
    }

    /// Takes an idle connection back from the library. True where a piece of a head had come together with the request before it,
    /// which nobody has seen: then it is not idle after all.
    #[allow(
        clippy::boxed_local,
        reason = "taken out of its box, it would leave that until the connection ends"
    )]
    fn end(self: Box<Self>, client: &mut Client<S, V>) -> bool {
        let Some(parts) = self.connection.into_parts() else { return false };
        let mut tap = parts.io.into_inner();
        let begun = !parts.read_buf.is_empty();
        if begun {
            tap.give_back(parts.read_buf);
        }
        client.0 = Some((tap, parts.service));
        begun
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut alarm: Pin<&mut Sleep>,
        drained: Pin<&mut impl Future<Output = ()>>,
    ) -> Poll<Turned> {
        if let Poll::Ready(outcome) = Pin::new(&mut self.connection).poll(cx) {
            return Poll::Ready(Turned::Ended(outcome));
        }
        if !self.draining && drained.poll(cx).is_ready() {
            self.draining = true;
            Pin::new(&mut self.connection).graceful_shutdown();
            if let Poll::Ready(outcome) = Pin::new(&mut self.connection).poll(cx) {
                return Poll::Ready(Turned::Ended(outcome));
            }
        }
        while alarm.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let next = match self.clock.deadline() {
                None => now + limits::PARK_AFTER,
                Some(deadline) if now >= deadline => {
                    self.clock.ring();
                    if let Poll::Ready(outcome) = Pin::new(&mut self.connection).poll(cx) {
                        return Poll::Ready(Turned::Ended(outcome));
                    }
                    now + limits::PARK_AFTER
                }
                Some(deadline) => {
                    let parks_at = deadline - limits::HEAD + limits::PARK_AFTER;
                    if now < parks_at {
                        parks_at
                    } else if self.may_park() {
                        return Poll::Ready(Turned::Idle(deadline));
                    } else {
                        deadline.min(now + limits::PARK_AFTER)
                    }
                }
            };
            alarm.as_mut().reset(next);
        }
        Poll::Pending
    }

    /// Whether the library, which waits for a head, has nothing of one and nothing to write.
    fn may_park(&self) -> bool {
        !self.draining && !self.clock.has_begun() && self.heads.quiet()
    }
}

/// Waits for the first byte of the next head. False where none comes, since the client has closed, or the time is over, or the sidecar
/// drains.
fn parked<S: AsyncRead + Unpin, V>(
    cx: &mut Context<'_>,
    client: &mut Client<S, V>,
    alarm: Pin<&mut Sleep>,
    drained: Pin<&mut impl Future<Output = ()>>,
) -> Poll<bool> {
    let Some((tap, _)) = &mut client.0 else { return Poll::Ready(false) };
    let mut byte = [0];
    let mut buf = ReadBuf::new(&mut byte);
    // First, so that a request that is there when the time is over is served.
    match Pin::new(&mut *tap).poll_read(cx, &mut buf) {
        Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
            tap.give_back(Bytes::copy_from_slice(buf.filled()));
            return Poll::Ready(true);
        }
        Poll::Ready(_) => return Poll::Ready(false),
        Poll::Pending => {}
    }
    if drained.poll(cx).is_pending() {
        ready!(alarm.poll(cx));
    }
    Poll::Ready(false)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use http::{Request, Response};
    use http_body_util::{BodyExt, Full};
    use hyper::service::service_fn;
    use tokio::io::{AsyncReadExt, DuplexStream};
    use tokio::sync::watch;

    use super::*;

    thread_local! {
        /// How often the library was put on a stream; tests run on a thread each.
        static ACTIVE: Cell<u32> = const { Cell::new(0) };
    }

    fn library() -> Builder {
        ACTIVE.set(ACTIVE.get() + 1);
        let mut builder = Builder::new();
        builder.header_read_timeout(limits::HEAD);
        builder
    }

    /// Serves a stream: each request is answered with its path, the length of its body, its number, and whether its head was seen.
    async fn echo(stream: DuplexStream, mut drain: watch::Receiver<bool>) -> (hyper::Result<()>, Duration) {
        let begin = Instant::now();
        let heads = Heads::default();
        let of_service = heads.clone();
        let count = Cell::new(0);
        let service = service_fn(|request: Request<Incoming>| {
            let (oddities, turn) = of_service.read();
            count.set(count.get() + 1);
            let number = count.get();
            async move {
                let path = request.uri().path().to_owned();
                if path == "/early" || path == "/later" {
                    tokio::spawn(async move {
                        if path == "/later" {
                            pause(limits::PARK_AFTER / 2).await;
                        }
                        request.into_body().collect().await
                    });
                    drop(turn);
                    return Ok(Response::new(Full::new(Bytes::from(format!("{:20000}\n", "early")))));
                }
                let body = request.into_body().collect().await.map(|body| body.to_bytes().len());
                drop(turn);
                let fill = if path == "/big" { 20_000 } else { 0 };
                let text = format!("{path} {body:?} {number} {}{:fill$}\n", !oddities.unseen, "");
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text))))
            }
        });
        let drained = async move {
            let _ = drain.wait_for(|drain| *drain).await;
        };
        let mut client = Client::new(HeadTap::new(stream, heads.clone()), service);
        let ended = serve(&mut client, &heads, library, std::pin::pin!(drained)).await;
        (ended, begin.elapsed())
    }

    /// Reads one answer's text.
    async fn answer(client: &mut DuplexStream) -> String {
        let mut answer = Vec::new();
        loop {
            answer.push(client.read_u8().await.unwrap());
            let text = std::str::from_utf8(&answer).unwrap();
            if let Some((_, body)) = text.split_once("\r\n\r\n")
                && body.ends_with('\n')
            {
                return body.trim_end().to_owned();
            }
        }
    }

    const GET: &[u8] = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n";

    async fn pause(duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_parked_and_serves_the_next_request() {
        let (mut client, server) = tokio::io::duplex(4096);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            for number in 1..=5 {
                client
                    .write_all(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12345")
                    .await
                    .unwrap();
                assert_eq!(answer(&mut client).await, format!("/a Ok(5) {number} true"));
                pause(limits::PARK_AFTER * 3).await;
            }
            drop(client);
        };
        let ((ended, took), ()) = tokio::join!(echo(server, drained), check);
        ended.unwrap();
        assert_eq!(ACTIVE.get(), 5);
        // A client that goes away is noticed at once.
        assert_eq!(took, limits::PARK_AFTER * 15);
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_connection_is_never_parked() {
        let (mut client, server) = tokio::io::duplex(4096);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            for number in 1..=50 {
                client.write_all(GET).await.unwrap();
                assert_eq!(answer(&mut client).await, format!("/a Ok(0) {number} true"));
                pause(limits::PARK_AFTER * 9 / 10).await;
            }
            drop(client);
        };
        tokio::join!(echo(server, drained), check).0.0.unwrap();
        assert_eq!(ACTIVE.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_parked_connection_is_closed_when_its_time_is_over() {
        let (mut client, server) = tokio::io::duplex(4096);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            client.write_all(GET).await.unwrap();
            answer(&mut client).await;
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        };
        let ((ended, took), ()) = tokio::join!(echo(server, drained), check);
        ended.unwrap();
        assert_eq!(took.as_secs(), limits::HEAD.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_parked_connection_is_closed_when_the_sidecar_drains() {
        let (mut client, server) = tokio::io::duplex(4096);
        let (drain, drained) = watch::channel(false);
        let check = async {
            client.write_all(GET).await.unwrap();
            answer(&mut client).await;
            pause(limits::PARK_AFTER * 3).await;
            drain.send_replace(true);
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        };
        let ((ended, took), ()) = tokio::join!(echo(server, drained), check);
        ended.unwrap();
        assert_eq!(took, limits::PARK_AFTER * 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_answered_although_the_sidecar_drains() {
        let (mut client, server) = tokio::io::duplex(4096);
        let (drain, drained) = watch::channel(false);
        let check = async {
            client.write_all(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12").await.unwrap();
            pause(limits::PARK_AFTER).await;
            drain.send_replace(true);
            pause(limits::PARK_AFTER * 3).await;
            client.write_all(b"345").await.unwrap();
            assert_eq!(answer(&mut client).await, "/a Ok(5) 1 true");
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        };
        tokio::join!(echo(server, drained), check).0.0.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time_from_the_first_byte_after_parking() {
        let (mut client, server) = tokio::io::duplex(4096);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            pause(limits::PARK_AFTER * 10).await;
            client.write_all(b"G").await.unwrap();
            assert_eq!(client.read(&mut [0; 1024]).await.unwrap(), 0);
        };
        let ((ended, took), ()) = tokio::join!(echo(server, drained), check);
        assert!(ended.unwrap_err().is_timeout());
        assert_eq!(took.as_secs(), (limits::PARK_AFTER * 10 + limits::HEAD).as_secs());
        assert_eq!(ACTIVE.get(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_piece_of_a_head_behind_a_request_is_kept_and_wins_no_time() {
        let (mut client, server) = tokio::io::duplex(4096);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            client.write_all(&[GET, b"GET /b HT"].concat()).await.unwrap();
            assert_eq!(answer(&mut client).await, "/a Ok(0) 1 true");
            pause(limits::HEAD - Duration::from_secs(1)).await;
            client.write_all(b"TP/1.1\r\nHost: a\r\n\r\nGET /c ").await.unwrap();
            assert!(answer(&mut client).await.starts_with("/b Ok(0) 2"));
            assert_eq!(client.read(&mut [0; 1024]).await.unwrap(), 0);
        };
        let ((ended, took), ()) = tokio::join!(echo(server, drained), check);
        assert!(ended.unwrap_err().is_timeout());
        assert_eq!(took.as_secs(), limits::HEAD.as_secs() * 2 - 1);
        // Once for each of the pieces: one that was given back is not taken away again.
        assert_eq!(ACTIVE.get(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_waits_for_its_reader_is_written_to_its_end() {
        let (mut client, server) = tokio::io::duplex(64);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            client.write_all(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
            pause(limits::PARK_AFTER * 5).await;
            assert!(answer(&mut client).await.starts_with("/big Ok(0) 1 true"));
            drop(client);
        };
        tokio::join!(echo(server, drained), check).0.0.unwrap();
        assert_eq!(ACTIVE.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn so_is_one_that_came_before_its_request_was_read() {
        let (mut client, server) = tokio::io::duplex(64);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            client
                .write_all(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12")
                .await
                .unwrap();
            pause(limits::PARK_AFTER).await;
            client.write_all(b"345").await.unwrap();
            pause(limits::PARK_AFTER * 5).await;
            assert_eq!(answer(&mut client).await, "early");
            client.write_all(GET).await.unwrap();
            assert_eq!(answer(&mut client).await, "/a Ok(0) 2 true");
            drop(client);
        };
        tokio::join!(echo(server, drained), check).0.0.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn so_is_one_whose_request_had_come_and_was_looked_at_later() {
        let (mut client, server) = tokio::io::duplex(256);
        let (_drain, drained) = watch::channel(false);
        let check = async {
            // More pieces than wait for their reader; when they are read, nothing comes from the client that tells so.
            let request = b"POST /later HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
                1\r\na\r\n1\r\nb\r\n1\r\nc\r\n1\r\nd\r\n0\r\n\r\n";
            client.write_all(request).await.unwrap();
            pause(limits::PARK_AFTER * 5).await;
            assert_eq!(answer(&mut client).await, "early");
            client.write_all(GET).await.unwrap();
            assert_eq!(answer(&mut client).await, "/a Ok(0) 2 true");
            drop(client);
        };
        tokio::join!(echo(server, drained), check).0.0.unwrap();
    }

    /// Requests in pieces of any size, with pauses of any length between them and just where a connection is parked.
    async fn talk(seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut client, server) = tokio::io::duplex(random.usize(16..4096));
        let (_drain, drained) = watch::channel(false);
        let check = async {
            for number in 1..=20 {
                let body = "x".repeat(random.usize(0..40));
                let request = match random.u8(0..3) {
                    0 => "GET /a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
                    1 => {
                        format!("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                    }
                    _ => format!(
                        "POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}y\r\n0\r\n\r\n",
                        body.len() + 1
                    ),
                };
                let sent = if request.starts_with("GET") {
                    0
                } else {
                    body.len() + usize::from(request.contains("chunked"))
                };
                let mut rest = request.as_bytes();
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(random.usize(1..=rest.len()));
                    rest = after;
                    client.write_all(piece).await.unwrap();
                    if random.bool() {
                        pause(moment(&mut random)).await;
                    }
                }
                assert_eq!(answer(&mut client).await, format!("/a Ok({sent}) {number} true"), "seed {seed}");
                if random.bool() {
                    pause(moment(&mut random)).await;
                }
            }
            drop(client);
        };
        tokio::join!(echo(server, drained), check).0.0.unwrap();
    }

    fn moment(random: &mut fastrand::Rng) -> Duration {
        let around = limits::PARK_AFTER * random.u32(0..3);
        match random.u8(0..3) {
            0 => around,
            1 => around + Duration::from_millis(1),
            _ => around.saturating_sub(Duration::from_millis(1)),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost_or_answered_twice_whenever_a_request_comes() {
        for seed in 0..300 {
            talk(seed).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_can_be_upgraded_after_it_was_parked() {
        let (mut client, server) = tokio::io::duplex(4096);
        let heads = Heads::default();
        let of_service = heads.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            drop(of_service.read());
            of_service.upgraded();
            tokio::spawn(async move {
                let mut stream = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
                let mut bytes = [0; 3];
                stream.read_exact(&mut bytes).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            });
            let answer =
                Response::builder().status(101).header("upgrade", "x").header("connection", "upgrade");
            async { Ok::<_, Infallible>(answer.body(Full::new(Bytes::new())).unwrap()) }
        });
        let served = async move {
            let mut client = Client::new(HeadTap::new(server, heads.clone()), service);
            serve(&mut client, &heads, library, std::pin::pin!(std::future::pending())).await.unwrap();
        };
        let check = async {
            pause(limits::PARK_AFTER * 3).await;
            client
                .write_all(b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc")
                .await
                .unwrap();
            let mut all = Vec::new();
            client.read_to_end(&mut all).await.unwrap();
            assert!(all.starts_with(b"HTTP/1.1 101") && all.ends_with(b"\r\n\r\nabc"));
        };
        tokio::join!(served, check);
        assert_eq!(ACTIVE.get(), 2);
    }

    #[test]
    fn a_parked_connection_is_small() {
        // What a connection without TLS holds beside its socket and its task.
        let (drain, _) = watch::channel(crate::drain::Phase::Serving);
        let phase = crate::drain::PhaseWatch(drain.subscribe());
        let drained = std::pin::pin!(phase.reached(crate::drain::Phase::Draining));
        let heads = Heads::default();
        let service = service_fn(|_: Request<Incoming>| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
        });
        let (stream, _) = tokio::io::duplex(16);
        let mut client = Client::new(HeadTap::new(stream, heads.clone()), service);
        let size = size_of_val(&client);
        let serve = serve(&mut client, &heads, library, drained);
        assert!(size + size_of_val(&serve) <= 512, "{size} + {}", size_of_val(&serve));
    }
}
