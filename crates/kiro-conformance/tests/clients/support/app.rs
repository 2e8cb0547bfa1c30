//! An application that does exactly what a test says, byte by byte, and tells what it saw.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::process::PATIENCE;
use super::world::at;

/// The head of a request, as it came from the sidecar.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) fields: Vec<(String, String)>,
}

impl Head {
    /// A field's values, in order.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        let same = |field: &&(String, String)| field.0.eq_ignore_ascii_case(name);
        self.fields.iter().filter(same).map(|(_, value)| value.as_str()).collect()
    }

    /// Whether it has a field with this text.
    pub(crate) fn has(&self, name: &str, text: &str) -> bool {
        self.values(name).iter().any(|value| value.to_lowercase().contains(text))
    }
}

/// A connection from the sidecar.
pub(crate) struct Wire {
    stream: BufReader<TcpStream>,
}

impl Wire {
    /// Sends bytes.
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // Whether anybody still reads is the client's business.
        let _ = self.stream.get_mut().write_all(bytes.as_ref());
    }

    /// A whole answer with a length.
    pub(crate) fn answer(&mut self, status: &str, fields: &str, body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        self.send(format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{fields}\r\n", body.len()));
        self.send(body);
    }

    /// A piece of a chunked answer; an empty one ends it, but for the trailers.
    pub(crate) fn chunk(&mut self, piece: impl AsRef<[u8]>) {
        let piece = piece.as_ref();
        let mut bytes = format!("{:x}\r\n", piece.len()).into_bytes();
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(if piece.is_empty() { b"" } else { b"\r\n" });
        self.send(bytes);
    }

    /// The request's body, and its trailers.
    pub(crate) fn body(&mut self, head: &Head) -> (Vec<u8>, Vec<(String, String)>) {
        let mut body = Vec::new();
        if !head.has("transfer-encoding", "chunked") {
            let length = head.values("content-length").first().map_or(0, |length| length.parse().unwrap());
            self.stream.by_ref().take(length).read_to_end(&mut body).unwrap();
            return (body, Vec::new());
        }
        let trailers = self.pieces(|piece| body.extend_from_slice(piece));
        (body, trailers)
    }

    /// The pieces of a chunked body, each as it comes, and its trailers.
    pub(crate) fn pieces(&mut self, mut seen: impl FnMut(&[u8])) -> Vec<(String, String)> {
        loop {
            let size = u64::from_str_radix(self.line().unwrap().trim(), 16).unwrap();
            if size == 0 {
                return self.fields();
            }
            let mut piece = Vec::new();
            self.stream.by_ref().take(size).read_to_end(&mut piece).unwrap();
            seen(&piece);
            self.line();
        }
    }

    /// What comes until the connection ends or is silent for so long.
    pub(crate) fn rest_within(&mut self, silence: std::time::Duration) -> Vec<u8> {
        let _ = self.stream.get_ref().set_read_timeout(Some(silence));
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest);
        let _ = self.stream.get_ref().set_read_timeout(Some(PATIENCE));
        rest
    }

    /// Waits until the sidecar ends the connection; false where it never does.
    pub(crate) fn gone(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).ok().filter(|length| *length > 0).map(|_| line)
    }

    fn head(&mut self) -> Option<Head> {
        let line = self.line()?;
        let mut words = line.split_whitespace();
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        Some(Head { method, target, fields: self.fields() })
    }

    fn fields(&mut self) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while let Some(line) = self.line() {
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            fields.push((name.to_owned(), value.trim().to_owned()));
        }
        fields
    }
}

/// Whether a connection carries a further request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Keep,
    Close,
}

/// An application that listens.
pub(crate) struct App {
    port: u16,
    ends: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl App {
    /// Answers each request on a port; connections are numbered from 0.
    pub(crate) fn start(
        port: u16,
        answer: impl Fn(usize, &Head, &mut Wire) -> Then + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(at(port)).unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let (over, answer) = (Arc::clone(&ends), Arc::new(answer));
        let accepting = std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), answer) = (stream, Arc::clone(&answer)) else { continue };
                std::thread::spawn(move || {
                    let _ = stream.set_nodelay(true);
                    let _ = stream.set_read_timeout(Some(PATIENCE));
                    let mut wire = Wire { stream: BufReader::new(stream) };
                    while let Some(head) = wire.head() {
                        if answer(number, &head, &mut wire) == Then::Close {
                            return;
                        }
                    }
                });
            }
        });
        Self { port, ends, accepting: Some(accepting) }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        // Wakes it up.
        let _ = TcpStream::connect(at(self.port));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}
