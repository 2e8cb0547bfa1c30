//! What does this pod get from another service, through its own sidecar?
//!
//! `kiro call` asks as the application would: an HTTP request to the sidecar's outbound port, over mutual TLS where the mesh file
//! says so, with the sidecar's own leaf (the sidecar's log says which leaf it was). What comes back is shown with the reason of a
//! refusal in words. The images have no shell and no curl; this is what a person has there.

mod meaning;
mod request;

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderName, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use kiro_core::fields;
use kiro_core::mesh::AppTls;
use kiro_tls::{HandshakeContext, HandshakeError, Identity};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::failure::{BROKEN, CONNECT, Failure, SETUP, STATUS, TIMEOUT, TLS};
use crate::output::{note, say};
use crate::place::{Own, Place};

/// Call a service through this pod's sidecar, and say what a refusal means.
///
/// Exit codes: 0 for 2xx and 3xx, 22 for an answer of 400 or more, 7 when nobody listens, 28 when time is over, 35 when TLS fails,
/// 56 when the connection breaks, 78 when mesh file or certificates can't be used.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    what: request::Arguments,
    /// Show all headers of the answer.
    #[arg(short = 'i', long)]
    include: bool,
    /// Show the body alone.
    #[arg(short = 'q', long, conflicts_with = "include")]
    quiet: bool,
    /// How long the whole call may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    /// The sidecar's outbound port.
    #[arg(
        long,
        env = "KIRO_OUTBOUND_ADDR",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15001",
        hide_env_values = true
    )]
    outbound: SocketAddr,
    #[command(flatten)]
    place: Place,
}

/// How long connecting and a handshake may take, each: it is loopback.
const STEP: Duration = Duration::from_secs(5);

/// The fields that are shown without `-i`, beside `x-kiro-reject`.
const SHOWN: [HeaderName; 3] = [CONTENT_TYPE, LOCATION, RETRY_AFTER];

/// Calls, shows the answer and gives the exit code.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let limit = Duration::from_secs(arguments.timeout);
    let outcome = runtime.block_on(async {
        timeout(limit, call(arguments)).await.unwrap_or_else(|_| {
            let fix = "see the sidecar's access log for what it waits for, or give it longer with --timeout";
            Err(Failure::new(TIMEOUT, format!("no end of the answer within {} s", limit.as_secs()), fix))
        })
    });
    Ok(outcome.unwrap_or_else(|failure| {
        note(&format!("kiro call: {}", failure.what));
        note(&format!("  {}", failure.fix));
        failure.code
    }))
}

async fn call(arguments: &Arguments) -> Result<u8, Failure> {
    let request = arguments.what.request()?;
    let own = arguments.place.own()?;
    let stream = connect(arguments.outbound).await?;
    let response = match own.service.app.tls {
        AppTls::None => exchange(stream, request).await?,
        AppTls::Mutual => {
            let tls = handshake(stream, &own, arguments).await?;
            exchange(tls, request).await?
        }
    };
    show(response, arguments).await
}

async fn connect(outbound: SocketAddr) -> Result<TcpStream, Failure> {
    let failed = |cause: &dyn std::fmt::Display| {
        Failure::new(
            CONNECT,
            format!("no sidecar listens at {outbound}: {cause}"),
            "run this in a sidecar's container (`docker compose exec profile-1-proxy kiro call …`); if it is one, its log says why it is not up",
        )
    };
    match timeout(STEP, TcpStream::connect(outbound)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(failed(&error)),
        Err(_) => Err(failed(&format_args!("no answer within {} s", STEP.as_secs()))),
    }
}

async fn handshake(
    stream: TcpStream,
    own: &Own,
    arguments: &Arguments,
) -> Result<impl AsyncRead + AsyncWrite + Unpin + Send + 'static, Failure> {
    let unusable = |what: String| Failure::new(SETUP, what, "`kiro check` looks at all of it");
    let identity =
        Identity::load(&arguments.place.identity, &own.id).map_err(|error| unusable(error.to_string()))?;
    let client =
        kiro_tls::outbound_client(&Arc::new(identity)).map_err(|error| unusable(error.to_string()))?;
    let context = HandshakeContext {
        service: own.name.clone(),
        local: stream.local_addr().ok(),
        remote: stream.peer_addr().ok(),
        direction: "outbound",
    };
    let failed = |error: &HandshakeError| {
        let what = format!("the sidecar at {}: {} ({})", arguments.outbound, error.cause(), error.code());
        Failure::new(TLS, what, error.fix())
    };
    match timeout(STEP, client.connect(stream, &context)).await {
        Ok(Ok(established)) => Ok(established.stream),
        Ok(Err(error)) => Err(failed(&error)),
        Err(_) => {
            let what = format!("the sidecar at {} does not finish its TLS handshake", arguments.outbound);
            Err(Failure::new(TIMEOUT, what, "its log says what it is busy with"))
        }
    }
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    // Its end is seen by the request or the body, whichever it hits.
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(|error| broken(&error))
}

/// A connection that ended before its answer did. In TLS 1.3 a refused certificate shows here, not in the handshake.
fn broken(error: &hyper::Error) -> Failure {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(found) = cause {
        if let Some(kind) = found.downcast_ref::<std::io::Error>().and_then(kiro_tls::classify_io) {
            return Failure::new(
                TLS,
                format!("the sidecar refuses our certificate ({})", kind.code()),
                "its log says why, in a line `certificate refused` with the fix",
            );
        }
        cause = found.source();
    }
    Failure::new(BROKEN, format!("the sidecar broke the connection off: {error}"), "its log says why")
}

async fn show(response: Response<Incoming>, arguments: &Arguments) -> Result<u8, Failure> {
    let (head, mut body) = response.into_parts();
    if !arguments.quiet {
        say(&format!("{:?} {}", head.version, head.status));
        show_fields(&head.headers, arguments.include);
        if head.status.as_u16() >= 400 && !head.headers.contains_key(fields::REJECT) {
            say("  the application's own answer: no sidecar refused the call");
        }
        say("");
    }
    let mut last = None;
    let stdout = std::io::stdout();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(&error))?;
        if let Some(data) = frame.data_ref() {
            last = data.last().copied().or(last);
            // A reader that has gone has seen enough.
            if stdout.lock().write_all(data).is_err() {
                break;
            }
        }
    }
    if !arguments.quiet && last.is_some_and(|byte| byte != b'\n') {
        say("");
    }
    Ok(if head.status.as_u16() >= 400 { STATUS } else { 0 })
}

fn show_fields(headers: &HeaderMap, all: bool) {
    for (name, value) in headers {
        if all || SHOWN.contains(name) || *name == fields::REJECT {
            say(&format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())));
        }
        if *name == fields::REJECT {
            say(&format!("  {}", value.to_str().map_or("not a code", meaning::of)));
        }
    }
}
