//! A blocking HTTP/1.1 client for one connection: small enough that what it adds to a latency is a system call.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::stop;

/// A head that is longer is none of ours.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// An answer's body that is kept.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// How long an answer may stand still.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its head, up to the empty line.
    pub head: Vec<u8>,
    /// Its body.
    pub body: Vec<u8>,
    /// Whether the connection ends with it.
    pub closes: bool,
}

impl Answer {
    /// The value of a field of its head, by its name in lower case.
    pub fn field(&self, name: &str) -> Option<&str> {
        let lines = std::str::from_utf8(&self.head).ok()?.split("\r\n");
        let fields = lines.filter_map(|line| line.split_once(':'));
        fields.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }
}

/// What an answer's head says.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    body_bytes: usize,
    closes: bool,
}

impl Client {
    /// Connects.
    pub fn connect(to: SocketAddr) -> io::Result<Self> {
        Self::connect_within(to, PATIENCE)
    }

    /// Connects; neither that nor any read or write of an answer may take longer.
    pub fn connect_within(to: SocketAddr, patience: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to, patience)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Sends a request and waits for its answer.
    pub fn call(&mut self, request: &[u8]) -> io::Result<Answer> {
        self.stream.write_all(request)?;
        loop {
            if let Some(end) = end_of_head(&self.buffer) {
                let head =
                    parse_head(self.buffer.get(..end).unwrap_or_default()).map_err(io::Error::other)?;
                return self.body(&head, end);
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("a head without end"));
            }
            self.read()?;
        }
    }

    /// Whether the other side has not ended it.
    pub fn is_open(&self) -> bool {
        let asked = self.stream.set_nonblocking(true).and_then(|()| self.stream.peek(&mut [0]));
        // Back to waiting; a socket that refuses this has ended.
        self.stream.set_nonblocking(false).is_ok()
            && matches!(asked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    fn body(&mut self, head: &Head, from: usize) -> io::Result<Answer> {
        let end = from + head.body_bytes;
        while self.buffer.len() < end {
            self.read()?;
        }
        let rest = self.buffer.split_off(end);
        let body = self.buffer.split_off(from);
        let whole = std::mem::replace(&mut self.buffer, rest);
        Ok(Answer { status: head.status, head: whole, body, closes: head.closes })
    }

    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0_u8; 16 * 1024];
        match self.stream.read(&mut chunk)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
                Ok(())
            }
        }
    }
}

/// A GET for a path of a host.
pub fn get(host: &str, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

/// Asks one question on a connection of its own.
pub fn ask(to: SocketAddr, host: &str, path: &str) -> anyhow::Result<Answer> {
    let answer = Client::connect(to).and_then(|mut client| client.call(&get(host, path)));
    answer.with_context(|| format!("no answer from http://{to}{path}"))
}

/// Asks until the answer is 200; `alive` says when it is no use any more. Gives the number of questions that were answered at all.
pub fn wait_for_answer(
    to: SocketAddr,
    host: &str,
    path: &str,
    within: Duration,
    alive: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let end = Instant::now() + within;
    let mut answered = 0;
    loop {
        stop::check()?;
        alive()?;
        let last = match ask(to, host, path) {
            Ok(Answer { status: 200, .. }) => return Ok(answered + 1),
            Ok(answer) => {
                answered += 1;
                let text: String = String::from_utf8_lossy(&answer.body).chars().take(200).collect();
                format!("status {} {}", answer.status, text.trim())
            }
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() >= end {
            bail!(
                "http://{to}{path} for {host} did not answer with 200 within {} s: {last}",
                within.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|position| position + 4)
}

fn parse_head(bytes: &[u8]) -> Result<Head, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "a head that is not text".to_owned())?;
    let mut lines = text.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
    let Some(status) = status.filter(|_| status_line.starts_with("HTTP/1.")) else {
        return Err(format!("no status line: {status_line}"));
    };
    let fields = lines.filter_map(|line| line.split_once(':'));
    let (mut length, mut closes) = (None, status_line.starts_with("HTTP/1.0"));
    for (name, value) in fields {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.parse::<usize>().map_err(|_| format!("content-length {value}"))?);
        } else if name.eq_ignore_ascii_case("connection") {
            closes = value.eq_ignore_ascii_case("close");
        }
    }
    match length {
        Some(body_bytes) if body_bytes <= BODY_BYTES_MAX => Ok(Head { status, body_bytes, closes }),
        Some(too_many) => Err(format!("a body of {too_many} bytes")),
        None if status == 204 || status == 304 => Ok(Head { status, body_bytes: 0, closes }),
        None => Err("an answer without content-length".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads() {
        let parse = |text: &str| parse_head(text.as_bytes());
        let good =
            parse("HTTP/1.1 200 OK\r\nserver: x\r\nContent-Length: 12\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(good, Ok(Head { status: 200, body_bytes: 12, closes: false }));
        let closing = parse("HTTP/1.1 503 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        assert_eq!(closing, Ok(Head { status: 503, body_bytes: 0, closes: true }));
        for bad in [
            "HTTP/2 200\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn two_answers_in_one_piece() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut seen = [0; 1];
            stream.read_exact(&mut seen).unwrap();
            let one = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab";
            stream.write_all(format!("{one}{one}").as_bytes()).unwrap();
            // To close with something unread would take the answers back.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let mut client = Client::connect(address).unwrap();
        for _ in 0..2 {
            let answer = client.call(&get("x", "/")).unwrap();
            assert_eq!(
                (answer.status, answer.body.as_slice(), answer.closes),
                (200, b"ab".as_slice(), false)
            );
            assert_eq!((answer.field("content-length"), answer.field("server")), (Some("2"), None));
        }
        assert!(client.is_open());
        drop(client);
        server.join().unwrap();
    }
}
