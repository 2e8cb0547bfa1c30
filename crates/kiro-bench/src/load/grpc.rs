//! gRPC calls of one small message each way, over one connection of the client, as gRPC libraries do it.
//!
//! By the `h2` crate at both ends: what the client and the application cost is the same for all pairs.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use h2::client::SendRequest;
use hdrhistogram::Histogram;
use http::{HeaderMap, Method, Request, Response, Version};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

use super::{Length, Loaded, Meter, latencies, note};
use crate::{ports, stop};

/// A message of eleven bytes with gRPC's prefix before it: not compressed, four bytes of length.
const MESSAGE: &[u8] = b"\0\0\0\0\x0bhello world";
/// What is called.
const PATH: &str = "/bench.Echo/Unary";
const WINDOW: u32 = 1 << 20;
/// How long a pair may take until a call comes through.
const FIRST_CALL: Duration = Duration::from_secs(20);
/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long before the end the memory is read.
const LOOK_BEFORE_END: Duration = Duration::from_millis(150);

/// Starts the application: it lives as long as this process, and works only when it is called.
pub(crate) fn start_app() -> anyhow::Result<SocketAddr> {
    let address = ports::free()?;
    let listener =
        std::net::TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true).context("the gRPC application's listener")?;
    let runtime = runtime()?;
    std::thread::Builder::new()
        .name("grpc-app".to_owned())
        .spawn(move || {
            LocalSet::new().block_on(&runtime, async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::task::spawn_local(serve(stream));
                }
            });
        })
        .context("no thread for the gRPC application")?;
    Ok(address)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime for gRPC")
}

/// A connection that fails ends; its caller counts that.
async fn serve(stream: TcpStream) -> Result<(), h2::Error> {
    // A delay of small segments would be the proxies' loss.
    let _ = stream.set_nodelay(true);
    let mut builder = h2::server::Builder::new();
    builder.initial_window_size(WINDOW).initial_connection_window_size(16 * WINDOW);
    let mut connection = builder.handshake::<_, Bytes>(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        tokio::task::spawn_local(answer(request.into_body(), respond));
    }
    Ok(())
}

async fn answer(
    mut body: h2::RecvStream,
    mut respond: h2::server::SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data?.len())?;
    }
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
    let mut stream = respond.send_response(head, false)?;
    stream.send_data(Bytes::from_static(MESSAGE), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    stream.send_trailers(trailers)
}

/// What the callers share.
struct Tally {
    latencies: RefCell<Histogram<u64>>,
    counts: Cell<bool>,
    over: Cell<bool>,
    completed: Cell<u64>,
    errors: Cell<u64>,
    first_error: RefCell<Option<String>>,
}

/// Calls from this many streams, each again when its answer is there.
pub(crate) fn load(
    to: SocketAddr,
    host: &str,
    streams: usize,
    length: Length,
    meter: &mut Meter,
    alive: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Loaded> {
    let runtime = runtime()?;
    let tally = Rc::new(Tally {
        latencies: RefCell::new(latencies()?),
        counts: Cell::new(false),
        over: Cell::new(false),
        completed: Cell::new(0),
        errors: Cell::new(0),
        first_error: RefCell::new(None),
    });
    let counted = LocalSet::new().block_on(&runtime, async {
        let (sender, tries) = first_call(to, host, alive).await?;
        let callers: Vec<_> = (0..streams)
            .map(|_| tokio::task::spawn_local(caller(sender.clone(), host.to_owned(), Rc::clone(&tally))))
            .collect();
        pause(length.warm_up).await?;
        meter.begin();
        let began = Instant::now();
        tally.counts.set(true);
        pause(length.measured.saturating_sub(LOOK_BEFORE_END)).await?;
        meter.look();
        pause(LOOK_BEFORE_END).await?;
        tally.counts.set(false);
        let seconds = began.elapsed().as_secs_f64();
        meter.end();
        tally.over.set(true);
        for caller in callers {
            caller.await.context("a caller has panicked")?;
        }
        anyhow::Ok((seconds, tries))
    });
    let (seconds, tries) = counted?;
    let latencies = tally.latencies.borrow();
    let loaded = Loaded {
        requests: latencies.len(),
        errors: tally.errors.get(),
        seconds,
        // And the first call.
        completed: tally.completed.get() + 1,
        cut_off_max: tries,
        void: tally.first_error.borrow_mut().take(),
        ..Loaded::default()
    };
    Ok(loaded.timed(&latencies))
}

async fn pause(length: Duration) -> anyhow::Result<()> {
    let end = tokio::time::Instant::now() + length;
    while tokio::time::Instant::now() < end {
        stop::check()?;
        let next = tokio::time::Instant::now() + Duration::from_millis(20);
        tokio::time::sleep_until(next.min(end)).await;
    }
    Ok(())
}

async fn caller(sender: SendRequest<Bytes>, host: String, tally: Rc<Tally>) {
    while !tally.over.get() {
        let began = Instant::now();
        let outcome = tokio::time::timeout(PATIENCE, call(sender.clone(), &host)).await;
        match outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {} s", PATIENCE.as_secs()))) {
            Ok(()) => {
                tally.completed.set(tally.completed.get() + 1);
                if tally.counts.get() {
                    note(&mut tally.latencies.borrow_mut(), began.elapsed());
                }
            }
            Err(error) => {
                tally.errors.set(tally.errors.get() + 1);
                tally.first_error.borrow_mut().get_or_insert(format!("a call failed: {error:#}"));
                return;
            }
        }
    }
}

async fn call(sender: SendRequest<Bytes>, host: &str) -> anyhow::Result<()> {
    let mut sender = sender.ready().await.context("the connection has ended")?;
    let request = Request::builder()
        .method(Method::POST)
        .version(Version::HTTP_2)
        .uri(format!("http://{host}{PATH}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .context("no request")?;
    let (response, mut stream) = sender.send_request(request, false).context("it could not be sent")?;
    stream.send_data(Bytes::from_static(MESSAGE), true).context("its message could not be sent")?;
    let response = response.await.context("no head")?;
    let status = response.status();
    let (head, mut body) = response.into_parts();
    let mut bytes = 0;
    while let Some(data) = body.data().await {
        let data = data.context("the answer broke off")?;
        bytes += data.len();
        body.flow_control().release_capacity(data.len()).context("flow control")?;
    }
    let trailers = body.trailers().await.context("no trailers")?.unwrap_or(head.headers);
    let grpc = trailers.get("grpc-status").map(http::HeaderValue::as_bytes);
    if status != 200 || grpc != Some(b"0") || bytes != MESSAGE.len() {
        let grpc = grpc.map(|status| String::from_utf8_lossy(status).into_owned());
        bail!("status {status}, grpc-status {grpc:?}, {bytes} bytes");
    }
    Ok(())
}

/// A connection that calls one at a time, for whoever counts calls and not time.
#[derive(Debug)]
pub(crate) struct Client {
    runtime: tokio::runtime::Runtime,
    tasks: LocalSet,
    sender: SendRequest<Bytes>,
    host: String,
}

impl Client {
    /// Connects.
    pub(crate) fn connect(to: SocketAddr, host: &str) -> anyhow::Result<Self> {
        let (runtime, tasks) = (runtime()?, LocalSet::new());
        let (sender, _driver) = tasks.block_on(&runtime, connect(to))?;
        Ok(Self { runtime, tasks, sender, host: host.to_owned() })
    }

    /// Calls once and waits for the end of it.
    pub(crate) fn call(&self) -> anyhow::Result<()> {
        let called = self.tasks.block_on(&self.runtime, async {
            tokio::time::timeout(FIRST_CALL, call(self.sender.clone(), &self.host)).await
        });
        called.with_context(|| format!("no answer within {} s", FIRST_CALL.as_secs()))?
    }
}

type Driver = tokio::task::JoinHandle<Result<(), h2::Error>>;

async fn connect(to: SocketAddr) -> anyhow::Result<(SendRequest<Bytes>, Driver)> {
    let stream = TcpStream::connect(to).await.context("cannot connect")?;
    stream.set_nodelay(true)?;
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(WINDOW).initial_connection_window_size(16 * WINDOW);
    let (sender, connection) = builder.handshake::<_, Bytes>(stream).await.context("no HTTP/2")?;
    // How it ends shows in the calls.
    Ok((sender, tokio::task::spawn_local(connection)))
}

/// The connection whose first call went well, and how many did not before it.
async fn first_call(
    to: SocketAddr,
    host: &str,
    alive: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<(SendRequest<Bytes>, u64)> {
    let end = Instant::now() + FIRST_CALL;
    let mut tries = 0;
    loop {
        stop::check()?;
        alive()?;
        let attempt = async {
            let (sender, driver) = connect(to).await?;
            match call(sender.clone(), host).await {
                Ok(()) => Ok(sender),
                Err(error) => {
                    driver.abort();
                    Err(error)
                }
            }
        };
        let outcome = tokio::time::timeout(Duration::from_secs(2), attempt).await;
        match outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within 2 s"))) {
            Ok(sender) => return Ok((sender, tries)),
            Err(error) if Instant::now() >= end => {
                return Err(
                    error.context(format!("no call came through {to} within {} s", FIRST_CALL.as_secs()))
                );
            }
            Err(_) => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}
