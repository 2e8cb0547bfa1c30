//! A client of HTTP/1 that sends a case's bytes and reads what comes as strictly as RFC 9112 is written.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Outcome;
use super::backend::Backend;
use super::fixture::{Case, Step, show, unescape};
use crate::support::PATIENCE;

/// The body of the answer to a request that the application's connection has not outlived.
const LOST: &[u8] = b"{\"reject\":\"app_reset\"}\n";

/// Plays a case. The next request on the same connection, `probe`, shows whether it stands, and that no bytes are left over on it.
pub(crate) async fn play(
    address: SocketAddr,
    case: &Case,
    probe: &str,
    backend: &Backend,
) -> Result<Outcome, String> {
    let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    let mut client = Reader { stream, read: Vec::new(), ended: false };
    let mut outcome = Outcome::default();
    let (mut ends, mut heads) = (false, 0);
    let mut asked = asks(case)?;
    for step in &case.steps {
        match step {
            Step::Send(text) => client.send(&unescape(text)?).await,
            Step::AwaitSeen => {
                heads += 1;
                backend.await_heads(heads).await;
            }
            Step::AwaitAnswer => {
                client.answer(std::mem::take(&mut asked), &mut outcome).await?;
            }
            Step::End => {
                ends = true;
                let _ = client.stream.shutdown().await;
            }
        }
    }
    if outcome.answers == 0 {
        client.answer(asked, &mut outcome).await?;
    }
    if outcome.switched {
        let _ = client.stream.shutdown().await;
        while client.more().await? {}
        outcome.lines.push(format!("< then {}", show(&client.read)));
        return Ok(outcome);
    }
    let request = format!("GET http://callee{probe} HTTP/1.1\r\nHost: callee\r\n\r\n");
    if !ends && !client.ended {
        client.send(request.as_bytes()).await;
    }
    while client.answer(Asks::Other, &mut outcome).await? {
        if outcome.last_body == probe.as_bytes() {
            outcome.lines.pop();
            outcome.lines.push("< open".to_owned());
            outcome.probed = true;
            return Ok(outcome);
        }
        if outcome.last_body == LOST && case.app.closes {
            // The probe came to the application's connection in the moment in which that was closed.
            outcome.lines.pop();
            client.send(request.as_bytes()).await;
        }
    }
    // RFC 9112 9.6: who is about to close says so in its last answer, unless that was sent before it could know.
    let unsaid = !ends && outcome.answers > 0 && !outcome.says_close;
    outcome.lines.push(if unsaid { "< closed without a word" } else { "< closed" }.to_owned());
    Ok(outcome)
}

/// What the first request asks for, as far as it decides on the body of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Asks {
    Head,
    Connect,
    #[default]
    Other,
}

fn asks(case: &Case) -> Result<Asks, String> {
    for step in &case.steps {
        if let Step::Send(text) = step {
            let bytes = unescape(text)?;
            let asks = [(Asks::Head, "HEAD "), (Asks::Connect, "CONNECT ")];
            let found = asks.into_iter().find(|(_, method)| bytes.starts_with(method.as_bytes()));
            return Ok(found.map_or(Asks::Other, |(asks, _)| asks));
        }
    }
    Ok(Asks::Other)
}

struct Reader {
    stream: TcpStream,
    read: Vec<u8>,
    ended: bool,
}

/// An answer's head.
struct Head {
    status: u16,
    fields: Vec<(String, String)>,
    old: bool,
}

impl Head {
    fn values(&self, name: &str) -> Vec<&str> {
        self.fields.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect()
    }

    /// One line of the corpus: status, code, and the fields that are not every answer's.
    fn show(&self) -> String {
        let mut line = format!("< {}", self.status);
        let reject = self.values("x-kiro-reject");
        for code in &reject {
            line.push_str(&format!(" {code}"));
        }
        for (name, value) in &self.fields {
            let usual = matches!(
                name.as_str(),
                "date" | "connection" | "content-length" | "transfer-encoding" | "x-kiro-reject"
            );
            if !usual && (reject.is_empty() || !matches!(name.as_str(), "content-type" | "cache-control")) {
                line.push_str(&format!(" {name}: {}", value.escape_default()));
            }
        }
        line
    }
}

impl Reader {
    async fn send(&mut self, bytes: &[u8]) {
        // The other end may have refused, and closed, before all is written.
        let _ = self.stream.write_all(bytes).await;
    }

    async fn more(&mut self) -> Result<bool, String> {
        match timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await {
            Ok(Ok(count)) if count > 0 => Ok(true),
            Ok(_) => {
                self.ended = true;
                Ok(false)
            }
            Err(_) => Err(format!(
                "neither an answer nor the connection's end (`then: end`?) after {}",
                show(&self.read)
            )),
        }
    }

    /// Reads an answer; false at the end of the connection.
    async fn answer(&mut self, asks: Asks, outcome: &mut Outcome) -> Result<bool, String> {
        let head = loop {
            let Some(head) = self.head(outcome).await? else { return Ok(false) };
            if head.status >= 200 || head.status == 101 {
                break head;
            }
            outcome.lines.push(head.show());
        };
        outcome.answered(head.status);
        let close = head.values("connection").iter().any(|value| value.eq_ignore_ascii_case("close"));
        outcome.says_close = close || head.old;
        outcome.switched = head.status == 101;
        let without = asks == Asks::Head
            || matches!(head.status, 101 | 204 | 304)
            || (asks == Asks::Connect && head.status < 300);
        let (body, whole) = match (&head.values("content-length")[..], &head.values("transfer-encoding")[..])
        {
            _ if without => (Vec::new(), true),
            ([length], []) => self.length(length).await?,
            ([], ["chunked"]) => self.chunks(outcome).await?,
            ([], []) => {
                while self.more().await? {}
                (std::mem::take(&mut self.read), true)
            }
            framing => return Err(format!("an answer framed by {framing:?}")),
        };
        let mut line = head.show();
        if !without && body != b"ok" && head.values("x-kiro-reject").is_empty() {
            line.push_str(&format!(" {}", show(&body)));
        }
        outcome.whole += usize::from(whole && head.status < 300);
        if !whole {
            line.push_str(" broken off");
            // Nothing could have been said in time.
            outcome.says_close = true;
        }
        outcome.lines.push(line);
        outcome.last_body = body;
        Ok(true)
    }

    async fn head(&mut self, outcome: &mut Outcome) -> Result<Option<Head>, String> {
        let end = loop {
            if let Some(end) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if !self.more().await? {
                if !self.read.is_empty() {
                    outcome.faults.push(format!("half an answer: {}", show(&self.read)));
                }
                return Ok(None);
            }
        };
        let head: Vec<u8> = self.read.drain(..end).collect();
        let text = String::from_utf8_lossy(&head).into_owned();
        let mut lines = text.trim_end().split("\r\n");
        let first = lines.next().unwrap_or_default();
        let version = first.split(' ').next().unwrap_or_default();
        let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let (Some(status), "HTTP/1.0" | "HTTP/1.1") = (status, version) else {
            return Err(format!("no answer: {}", show(&head)));
        };
        let fields = lines.map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        });
        let fields = fields.collect::<Option<_>>().ok_or_else(|| format!("no fields: {}", show(&head)))?;
        Ok(Some(Head { status, fields, old: version == "HTTP/1.0" }))
    }

    async fn length(&mut self, length: &str) -> Result<(Vec<u8>, bool), String> {
        let length: usize = length.parse().map_err(|_| format!("`{length}` is no length"))?;
        while self.read.len() < length {
            if !self.more().await? {
                return Ok((std::mem::take(&mut self.read), false));
            }
        }
        Ok((self.read.drain(..length).collect(), true))
    }

    async fn chunks(&mut self, outcome: &mut Outcome) -> Result<(Vec<u8>, bool), String> {
        let mut body = Vec::new();
        loop {
            let Some(line) = self.line().await? else { return Ok((body, false)) };
            let size =
                usize::from_str_radix(&line, 16).map_err(|_| format!("`{line}` is no chunk's size"))?;
            if size == 0 {
                break;
            }
            while self.read.len() < size + 2 {
                if !self.more().await? {
                    return Ok((body, false));
                }
            }
            body.extend(self.read.drain(..size));
            if self.line().await?.as_deref() != Some("") {
                return Err("a chunk that does not end".to_owned());
            }
        }
        loop {
            match self.line().await? {
                None => return Ok((body, false)),
                Some(line) if line.is_empty() => return Ok((body, true)),
                Some(trailer) => outcome.lines.push(format!("< trailer {trailer}")),
            }
        }
    }

    async fn line(&mut self) -> Result<Option<String>, String> {
        loop {
            if let Some(end) = self.read.windows(2).position(|window| window == b"\r\n") {
                let line: Vec<u8> = self.read.drain(..end + 2).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            if !self.more().await? {
                return Ok(None);
            }
        }
    }
}
