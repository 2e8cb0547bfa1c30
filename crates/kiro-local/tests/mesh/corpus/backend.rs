//! An application that reads as strictly as RFC 9112 is written and keeps what it has read: whatever it can't read whole was not
//! framed by its sidecar, or was framed wrongly.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::fixture::{AppScript, show};
use crate::support::PATIENCE;

/// One request as it came.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Method and target.
    pub(crate) line: String,
    /// Names in lower case, sorted, but for those of [`checked`].
    fields: Vec<(String, String)>,
    /// `length 5` or `chunked`.
    framing: Option<String>,
    body: Vec<u8>,
    trailers: Vec<(String, String)>,
    /// Whether the body's end was seen.
    pub(crate) whole: bool,
    /// What came after an answer of 101.
    switched: Option<Vec<u8>>,
    /// Who called, and what the ingress says of the way.
    proven: Vec<(String, String)>,
}

/// Fields that each request has, and that [`Seen::check`] looks at.
fn checked(name: &str) -> bool {
    matches!(
        name,
        "x-kiro-caller"
            | "x-forwarded-for"
            | "x-forwarded-proto"
            | "x-forwarded-host"
            | "traceparent"
            | "content-digest"
    )
}

impl Seen {
    /// One line of the corpus. Of a client's body that came by a stream (`by_stream`), what has come by the time that its head is looked
    /// at decides whether a length is known: both are right.
    pub(crate) fn show(&self, by_stream: bool) -> String {
        let mut parts = vec![self.line.split(' ').map(short).collect::<Vec<_>>().join(" ")];
        for field in self.fields.chunk_by(|one, other| one == other) {
            let plain = field[0] == ("host".to_owned(), "callee".to_owned());
            let times = if field.len() > 1 { format!(" ({} times)", field.len()) } else { String::new() };
            // A sidecar makes one up where an HTTP/2 client has none.
            let made = field[0].0 == "sec-websocket-key";
            let shown = if made { field[0].0.clone() } else { pair(&field[0]) };
            parts.extend((!plain).then(|| shown + &times));
        }
        match (&self.framing, self.whole) {
            (Some(_), true) if by_stream => parts.push(format!("body: {}", show(&self.body))),
            (Some(framing), true) => parts.push(format!("{framing}: {}", show(&self.body))),
            // How much of it has come is the kernel's business.
            (Some(framing), false) => parts.push(format!("{framing}, no end")),
            (None, _) => {}
        }
        parts.extend(self.trailers.iter().map(|trailer| format!("trailer {}", pair(trailer))));
        parts.extend(self.switched.iter().map(|bytes| format!("then {}", show(bytes))));
        parts.join(" | ")
    }

    /// What no request may be without, whatever its case.
    pub(crate) fn check(&self, caller: &str) -> Result<(), String> {
        let values = |name: &str| -> Vec<&str> {
            self.proven.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect()
        };
        if values("x-kiro-caller") != [caller] {
            return Err(format!("the caller is said to be {:?}, not {caller}", values("x-kiro-caller")));
        }
        if caller == "ingress"
            && (values("x-forwarded-for") != ["127.0.0.1"] || values("x-forwarded-proto") != ["http"])
        {
            return Err(format!("the way is said to be {:?}", self.proven));
        }
        let hosts = self.fields.iter().filter(|(name, _)| name == "host").count();
        if hosts != 1 {
            return Err(format!("{hosts} Host fields"));
        }
        Ok(())
    }
}

fn pair((name, value): &(String, String)) -> String {
    format!("{}: {}", short(name), short(value))
}

/// The bytes of a field, each of which is kept as one character.
fn latin1(text: &str) -> Vec<u8> {
    text.chars().map(|character| u8::try_from(u32::from(character)).unwrap_or(b'?')).collect()
}

/// What is long is told by its length.
fn short(text: &str) -> String {
    if text.len() > 100 { format!("({} bytes)", text.len()) } else { latin1(text).escape_ascii().to_string() }
}

/// The application.
#[derive(Clone, Default)]
pub(crate) struct Backend(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    seen: Vec<Seen>,
    /// Bytes that are no request, and why.
    unframed: Vec<String>,
    script: AppScript,
    /// Which case it is: a request of an earlier one may still be under way.
    case: usize,
}

/// A request's place: its case, and its number.
type Place = (usize, usize);

impl Backend {
    /// Serves from now on.
    pub(crate) fn start(listener: TcpListener) -> Self {
        let backend = Self::default();
        let served = backend.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let backend = served.clone();
                tokio::spawn(async move {
                    let mut connection = Connection { stream, read: Vec::new(), backend };
                    if let Err(error) = connection.serve().await {
                        connection.backend.0.lock().unwrap().unframed.push(error);
                    }
                });
            }
        });
        backend
    }

    /// Forgets what it has seen and answers as told from now on.
    pub(crate) fn begin(&self, script: &AppScript) {
        let mut state = self.0.lock().unwrap();
        *state = State { script: script.clone(), case: state.case + 1, ..State::default() };
    }

    /// What it has seen: requests, and bytes that are none.
    pub(crate) fn seen(&self) -> (Vec<Seen>, Vec<String>) {
        let state = self.0.lock().unwrap();
        (state.seen.clone(), state.unframed.clone())
    }

    /// Waits until it has seen a number of heads.
    pub(crate) async fn await_heads(&self, count: usize) {
        let begin = Instant::now();
        while self.0.lock().unwrap().seen.len() < count {
            assert!(begin.elapsed() < PATIENCE, "no request came");
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    fn update(&self, (case, place): Place, change: impl FnOnce(&mut Seen)) {
        let mut state = self.0.lock().unwrap();
        if state.case == case {
            change(&mut state.seen[place]);
        }
    }
}

struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
    backend: Backend,
}

/// How a body is framed.
#[derive(Debug, Clone, Copy)]
enum Framing {
    None,
    Length(usize),
    Chunked,
}

impl Connection {
    async fn serve(&mut self) -> Result<(), String> {
        loop {
            if self.read.is_empty() && !self.more().await {
                return Ok(());
            }
            let head =
                self.until(b"\r\n\r\n").await.ok_or_else(|| format!("half a head: {}", show(&self.read)))?;
            let (seen, framing) = parse_head(&head)?;
            let script = self.script_for(&seen.line);
            let path = seen.line.split(' ').nth(1).unwrap_or_default().to_owned();
            let place = {
                let mut state = self.backend.0.lock().unwrap();
                state.seen.push(seen);
                (state.case, state.seen.len() - 1)
            };
            if script.early {
                self.answer(&script, &path).await;
            }
            if !self.body(framing, place).await? {
                return Ok(());
            }
            if !script.early {
                self.answer(&script, &path).await;
            }
            if script.closes {
                let _ = self.stream.shutdown().await;
                return Ok(());
            }
            if script.answer.as_ref().is_some_and(|answer| answer.starts_with(b"HTTP/1.1 101")) {
                self.backend.update(place, |seen| seen.switched = Some(Vec::new()));
                while self.more().await {
                    let bytes = std::mem::take(&mut self.read);
                    self.backend.update(place, |seen| seen.switched.get_or_insert_default().extend(bytes));
                }
                return Ok(());
            }
        }
    }

    /// Probes and fences are answered well in any case, and told apart by their answers.
    fn script_for(&self, line: &str) -> AppScript {
        if line.starts_with("GET /probe/") || line.starts_with("GET /fence/") {
            return AppScript::default();
        }
        self.backend.0.lock().unwrap().script.clone()
    }

    async fn answer(&mut self, script: &AppScript, path: &str) {
        let body = if path.starts_with("/probe/") || path.starts_with("/fence/") { path } else { "ok" };
        let plain = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let answer = script.answer.as_deref().unwrap_or(plain.as_bytes());
        let _ = self.stream.write_all(answer).await;
    }

    /// Reads a body; false where it has no end.
    async fn body(&mut self, framing: Framing, place: Place) -> Result<bool, String> {
        let mut body = Vec::new();
        let mut trailers = Vec::new();
        match framing {
            Framing::None => {}
            Framing::Length(length) => match self.take(length).await {
                Some(bytes) => body = bytes,
                None => return Ok(false),
            },
            Framing::Chunked => loop {
                let Some(line) = self.until(b"\r\n").await else { return Ok(false) };
                let size = std::str::from_utf8(&line[..line.len() - 2]).unwrap_or_default();
                let digits = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_hexdigit());
                let count = usize::from_str_radix(size, 16).ok().filter(|_| digits);
                let count = count.ok_or_else(|| format!("{} is no chunk's size", show(&line)))?;
                if count == 0 {
                    loop {
                        let Some(line) = self.until(b"\r\n").await else { return Ok(false) };
                        if line == b"\r\n" {
                            break;
                        }
                        trailers.push(parse_field(&line[..line.len() - 2])?);
                    }
                    break;
                }
                let Some(chunk) = self.take(count + 2).await else { return Ok(false) };
                if !chunk.ends_with(b"\r\n") {
                    return Err(format!("a chunk that does not end: {}", show(&chunk)));
                }
                body.extend_from_slice(&chunk[..count]);
            },
        }
        self.backend.update(place, |seen| {
            (seen.body, seen.trailers, seen.whole) = (body, trailers, true);
        });
        Ok(true)
    }

    async fn more(&mut self) -> bool {
        self.stream.read_buf(&mut self.read).await.is_ok_and(|count| count > 0)
    }

    async fn take(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.read.len() < count {
            if !self.more().await {
                self.read.clear();
                return None;
            }
        }
        Some(self.read.drain(..count).collect())
    }

    async fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(start) = self.read.windows(end.len()).position(|window| window == end) {
                return Some(self.read.drain(..start + end.len()).collect());
            }
            if !self.more().await {
                return None;
            }
        }
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn parse_field(line: &[u8]) -> Result<(String, String), String> {
    let wrong = |what: &str| format!("{what} in the field {}", show(line));
    let colon = line.iter().position(|byte| *byte == b':').ok_or_else(|| wrong("no colon"))?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
        return Err(wrong("no token for a name"));
    }
    if value.iter().any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f) {
        return Err(wrong("a control byte"));
    }
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    let value: String = value.trim_ascii().iter().map(|byte| char::from(*byte)).collect();
    Ok((name, value))
}

fn parse_head(head: &[u8]) -> Result<(Seen, Framing), String> {
    let wrong = |what: &str| format!("{what}: {}", show(head));
    let mut lines = head[..head.len() - 4].split(|byte| *byte == b'\n');
    let mut strict = || {
        lines
            .next()
            .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
            .map(|line| if line.contains(&b'\r') { Err(wrong("a bare CR")) } else { Ok(line) })
    };
    if head.windows(2).any(|pair| pair[1] == b'\n' && pair[0] != b'\r') {
        return Err(wrong("a bare LF"));
    }
    let first = strict().ok_or_else(|| wrong("no line"))??;
    let words: Vec<&[u8]> = first.split(|byte| *byte == b' ').collect();
    let [method, target, b"HTTP/1.1"] = words[..] else { return Err(wrong("no request line")) };
    if !method.iter().all(|byte| is_token(*byte)) || !target.iter().all(u8::is_ascii_graphic) {
        return Err(wrong("no method or no target"));
    }
    let mut seen = Seen {
        line: format!("{} {}", String::from_utf8_lossy(method), String::from_utf8_lossy(target)),
        ..Seen::default()
    };
    let mut fields = Vec::new();
    while let Some(line) = strict() {
        fields.push(parse_field(line?)?);
    }
    let framing = framing(&fields).map_err(|what| wrong(&what))?;
    fields.retain(|(name, _)| name != "content-length" && name != "transfer-encoding");
    fields.sort();
    (seen.proven, seen.fields) = fields.into_iter().partition(|(name, _)| checked(name));
    seen.framing = match framing {
        Framing::None => None,
        Framing::Length(length) => Some(format!("length {length}")),
        Framing::Chunked => Some("chunked".to_owned()),
    };
    seen.whole = false;
    Ok((seen, framing))
}

fn framing(fields: &[(String, String)]) -> Result<Framing, String> {
    let values = |wanted: &str| -> Vec<&str> {
        fields.iter().filter(|(name, _)| name == wanted).map(|(_, value)| value.as_str()).collect()
    };
    match (&values("content-length")[..], &values("transfer-encoding")[..]) {
        ([], []) => Ok(Framing::None),
        ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
            length.parse().map(Framing::Length).map_err(|_| format!("the length {length}"))
        }
        ([], ["chunked"]) => Ok(Framing::Chunked),
        (lengths, codings) => Err(format!("framed by lengths {lengths:?} and codings {codings:?}")),
    }
}
