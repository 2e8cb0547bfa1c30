//! A client that sends bytes as they are and reads answers as they come, since no HTTP library sends what tests have to send.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{Answer, PATIENCE, World};

/// A connection, and what was read and not yet looked at.
pub(crate) struct Client<S = TcpStream> {
    stream: S,
    read: Vec<u8>,
}

impl Client {
    /// Connects.
    pub(crate) async fn open(address: SocketAddr) -> Self {
        Self::on(TcpStream::connect(address).await.unwrap())
    }

    /// Connects to a service's outbound proxy, as its application does.
    pub(crate) async fn app_of(world: &World, service: &str) -> Self {
        Self::open(world.addresses(service).outbound).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// Speaks on a connection that stands.
    pub(crate) fn on(stream: S) -> Self {
        Self { stream, read: Vec::new() }
    }

    /// The connection, where nothing was read ahead.
    pub(crate) fn into_stream(self) -> S {
        assert_eq!(self.text(), "", "nothing is lost");
        self.stream
    }

    /// Writes bytes; a connection that is closed already is not the writer's concern.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref()).await;
        let _ = self.stream.flush().await;
    }

    /// Ends this side's half.
    pub(crate) async fn end(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// An answer's head.
    pub(crate) async fn head(&mut self) -> Answer {
        let head = self.until(b"\r\n\r\n").await;
        Answer::parse(&head)
    }

    /// The head of a request, where this is an application.
    pub(crate) async fn request_head(&mut self) -> String {
        self.until(b"\r\n\r\n").await
    }

    /// Whether nothing comes for a moment.
    pub(crate) async fn is_silent(&mut self) -> bool {
        let moment = std::time::Duration::from_millis(50);
        self.read.is_empty() && timeout(moment, self.stream.read_buf(&mut self.read)).await.is_err()
    }

    /// An answer with its body, which has a length or is chunked.
    pub(crate) async fn answer(&mut self) -> Answer {
        let mut answer = self.head().await;
        if let Some(length) = answer.header("content-length") {
            let length = length.parse().unwrap();
            answer.body = String::from_utf8(self.bytes(length).await).unwrap();
        } else if answer.header("transfer-encoding") == Some("chunked") {
            answer.body = self.until(b"0\r\n\r\n").await;
        }
        answer
    }

    /// Sends a request and reads its answer.
    pub(crate) async fn exchange(&mut self, request: impl AsRef<[u8]>) -> Answer {
        self.send(request).await;
        self.answer().await
    }

    /// The next bytes, as many as asked for.
    pub(crate) async fn bytes(&mut self, count: usize) -> Vec<u8> {
        while self.read.len() < count {
            assert!(self.more().await, "ended after {:?}", self.text());
        }
        self.read.drain(..count).collect()
    }

    /// Waits for the end of the connection, clean or not, and gives what came before it.
    pub(crate) async fn rest(&mut self) -> String {
        while self.more().await {}
        String::from_utf8_lossy(&std::mem::take(&mut self.read)).into_owned()
    }

    /// What comes up to this text, and the text.
    pub(crate) async fn until(&mut self, end: impl AsRef<[u8]>) -> String {
        let end = end.as_ref();
        loop {
            if let Some(start) = self.read.windows(end.len()).position(|window| window == end) {
                return String::from_utf8(self.read.drain(..start + end.len()).collect()).unwrap();
            }
            assert!(self.more().await, "ended after {:?}", self.text());
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.read).into_owned()
    }

    /// Reads more; false at the end.
    async fn more(&mut self) -> bool {
        let reading = timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await;
        let Ok(count) = reading else { panic!("no more after {:?}, and no end", self.text()) };
        count.is_ok_and(|count| count > 0)
    }
}

/// What a refusal has to look like, to the client and in the log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Refusal<'a> {
    pub(crate) status: u16,
    pub(crate) code: &'a str,
    /// A part of the log's `reject_cause`; empty where there is to be none.
    pub(crate) cause: &'a str,
}

/// Sends one request to a service's outbound proxy and checks the refusal, whose line it gives.
pub(crate) async fn check_refused(
    world: &World,
    service: &str,
    request: impl AsRef<[u8]>,
    expected: Refusal<'_>,
) -> serde_json::Value {
    let request = request.as_ref();
    let what = String::from_utf8_lossy(request).into_owned();
    let before = world.logs.lines().len();
    let mut client = Client::app_of(world, service).await;
    let answer = client.exchange(request).await;
    assert_eq!(answer.verdict(), (expected.status, Some(expected.code)), "{what}");
    assert!(!answer.body.contains(' '), "the caller learns the code alone: {}", answer.body);
    drop(client);
    check_line(world, service, before, &what, expected).await
}

/// Checks the line of a refusal, which came after the first `before` ones, and gives it.
pub(crate) async fn check_line(
    world: &World,
    service: &str,
    before: usize,
    what: &str,
    expected: Refusal<'_>,
) -> serde_json::Value {
    let refused = |line: &serde_json::Value| {
        line["service"] == service && line["direction"] != "inbound" && line.get("reject").is_some()
    };
    let line = world.logs.wait_for_after(before, what, refused).await;
    assert_eq!(line["status"], expected.status, "{what}: {line}");
    assert_eq!(line["reject"], expected.code, "{what}: {line}");
    let cause = line["reject_cause"].as_str().unwrap_or_default();
    assert!(cause.contains(expected.cause), "{what}: {line}");
    assert_eq!(cause.is_empty(), expected.cause.is_empty(), "{what}: {line}");
    line
}
