//! A client of HTTP/2 that sends frames as a case has them, since no library sends what is malformed.
//!
//! A frame is one `send:` line, `TYPE [@stream] [flags] | payload`:
//!
//! ```text
//! HEADERS end | :method=GET | :path=/a        fields, without indexing and without Huffman; `end` is END_STREAM
//! HEADERS more | …                            without END_HEADERS; CONTINUATION goes on
//! DATA @3 end | hello
//! RST | 8
//! RAW 0 0 @0 | \x00                           type and flags by number
//! ```

use std::collections::BTreeMap;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::Outcome;
use super::backend::Backend;
use super::fixture::{Case, Step, show, unescape};
use crate::support::PATIENCE;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// The stream of the request that shows whether the connection stands; above those of all cases.
const PROBE: u32 = 101;

/// Plays a case on a connection; `scheme` is the probe's.
pub(crate) async fn play<S>(
    stream: S,
    case: &Case,
    (probe, scheme): (&str, &str),
    backend: &Backend,
) -> Result<Outcome, String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut client =
        Client { stream, read: Vec::new(), streams: BTreeMap::new(), go_away: None, ended: false };
    let mut heads = 0;
    // What a case sends without waiting comes in one piece: what a later frame breaks is broken before anybody looks at the first.
    let mut together = Vec::new();
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    // No dynamic table for what the server sends, no pushes.
    client.send(&frame(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0])).await;
    for step in &case.steps {
        match step {
            Step::Send(text) => {
                let (stream, kind, bytes) = parse(text)?;
                if kind == HEADERS {
                    client.streams.entry(stream).or_default();
                } else if kind == RST_STREAM {
                    client.streams.entry(stream).or_default().done = true;
                }
                together.extend(bytes);
                continue;
            }
            Step::AwaitSeen | Step::AwaitAnswer | Step::End => {
                client.send(&std::mem::take(&mut together)).await
            }
        }
        match step {
            Step::AwaitSeen => {
                heads += 1;
                backend.await_heads(heads).await;
            }
            Step::AwaitAnswer => client.until_done().await?,
            Step::End => client.stream.shutdown().await.map_err(|error| error.to_string())?,
            Step::Send(_) => {}
        }
    }
    client.send(&together).await;
    client.until_done().await?;
    let fields = [(":method", "GET"), (":scheme", scheme), (":path", probe), (":authority", "callee")];
    let block: Vec<u8> =
        fields.iter().flat_map(|(name, value)| field(name.as_bytes(), value.as_bytes())).collect();
    client.streams.insert(PROBE, Stream::default());
    client.send(&frame(HEADERS, END_STREAM | END_HEADERS, PROBE, &block)).await;
    client.until_done().await?;
    Ok(client.outcome(probe))
}

/// What has come on a stream.
#[derive(Debug, Default)]
struct Stream {
    statuses: Vec<u16>,
    body: Vec<u8>,
    trailers: bool,
    reset: Option<u32>,
    done: bool,
}

struct Client<S> {
    stream: S,
    read: Vec<u8>,
    streams: BTreeMap<u32, Stream>,
    go_away: Option<u32>,
    ended: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    async fn send(&mut self, bytes: &[u8]) {
        // The other end may have closed already.
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    /// Reads until each stream has ended, or the connection.
    async fn until_done(&mut self) -> Result<(), String> {
        while !self.ended && self.streams.values().any(|stream| !stream.done) {
            let Some((kind, flags, stream, payload)) = self.frame().await? else {
                self.ended = true;
                break;
            };
            match (kind, flags & ACK) {
                (SETTINGS, 0) => self.send(&frame(SETTINGS, ACK, 0, &[])).await,
                (PING, 0) => self.send(&frame(PING, ACK, 0, &payload)).await,
                (GOAWAY, _) => self.go_away = Some(number(&payload[4..8])),
                _ => self.on_stream(kind, flags, stream, &payload)?,
            }
        }
        Ok(())
    }

    fn on_stream(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Result<(), String> {
        let Some(state) = self.streams.get_mut(&stream) else { return Ok(()) };
        match kind {
            HEADERS if state.statuses.last().is_some_and(|status| *status >= 200) => state.trailers = true,
            HEADERS => state.statuses.push(status(payload)?),
            DATA => state.body.extend_from_slice(payload),
            RST_STREAM => (state.reset, state.done) = (Some(number(payload)), true),
            _ => return Ok(()),
        }
        state.done |= matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0;
        Ok(())
    }

    async fn frame(&mut self) -> Result<Option<(u8, u8, u32, Vec<u8>)>, String> {
        const HEAD: usize = 9;
        loop {
            if let Some(head) = self.read.first_chunk::<HEAD>().copied() {
                let length = number(&[0, head[0], head[1], head[2]]) as usize;
                if self.read.len() >= HEAD + length {
                    let payload = self.read.drain(..HEAD + length).skip(HEAD).collect();
                    return Ok(Some((head[3], head[4], number(&head[5..9]), payload)));
                }
            }
            match timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await {
                Ok(Ok(count)) if count > 0 => {}
                Ok(_) => return Ok(None),
                Err(_) => return Err(format!("streams that do not end: {:?}", self.streams)),
            }
        }
    }

    fn outcome(self, probe: &str) -> Outcome {
        let mut outcome = Outcome::default();
        for (id, stream) in &self.streams {
            let last = stream.statuses.last().copied().filter(|status| *status >= 200);
            if let Some(status) = last {
                outcome.answered(status);
                outcome.whole += usize::from(stream.done && stream.reset.is_none() && status < 300);
            }
            if *id == PROBE {
                outcome.probed = stream.body == probe.as_bytes();
                continue;
            }
            let mut line = if *id == 1 { "<".to_owned() } else { format!("< @{id}") };
            for status in &stream.statuses {
                line.push_str(&format!(" {status}"));
            }
            let text = String::from_utf8_lossy(&stream.body);
            match text.strip_prefix("{\"reject\":\"").and_then(|text| text.strip_suffix("\"}\n")) {
                Some(code) => line.push_str(&format!(" {code}")),
                None if last.is_none() || text == "ok" => {}
                None => line.push_str(&format!(" {}", show(&stream.body))),
            }
            line.push_str(if stream.trailers { " with trailers" } else { "" });
            match stream.reset {
                // What follows a whole answer to a request that was not read to its end (RFC 9113 8.1).
                Some(0) if last.is_some() => {}
                Some(code) => line.push_str(&format!(" reset {}", name(code))),
                None if last.is_none() => line.push_str(" no answer"),
                None => {}
            }
            outcome.lines.push(line);
        }
        outcome.lines.push(match self.go_away {
            _ if outcome.probed => "< open".to_owned(),
            Some(code) => format!("< closed {}", name(code)),
            None => "< closed".to_owned(),
        });
        outcome
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn name(code: u32) -> String {
    format!("{:?}", h2::Reason::from(code))
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A field of HPACK, without indexing and with a new name (RFC 7541 6.2.2).
fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[0], &length(name.len())[..], name, &length(value.len()), value].concat()
}

fn length(length: usize) -> Vec<u8> {
    const PREFIX: usize = 127;
    if length < PREFIX {
        return vec![u8::try_from(length).unwrap()];
    }
    let mut bytes = vec![127];
    let mut rest = length - PREFIX;
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).unwrap());
    bytes
}

/// The status, which is an answer's first field.
fn status(block: &[u8]) -> Result<u16, String> {
    const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    let wrong = || format!("no status in {}", show(block));
    let mut block = block;
    // The table was made to hold nothing.
    while let [0x20..=0x3f, rest @ ..] = block {
        block = rest;
    }
    match block {
        [indexed @ 0x88..=0x8e, ..] => Ok(STATIC[usize::from(indexed - 0x88)]),
        [0x48 | 0x08 | 0x18, length, rest @ ..] => {
            let value = rest.get(..usize::from(length & 0x7f)).ok_or_else(wrong)?;
            let digits = if length & 0x80 == 0 { value.to_vec() } else { huffman_digits(value) };
            std::str::from_utf8(&digits).ok().and_then(|digits| digits.parse().ok()).ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

/// Digits by RFC 7541's Huffman code: 0 to 2 have five bits, the others six.
fn huffman_digits(bytes: &[u8]) -> Vec<u8> {
    let bits: Vec<u8> =
        bytes.iter().flat_map(|byte| (0..8).rev().map(move |place| byte >> place & 1)).collect();
    let mut digits = Vec::new();
    let mut rest = &bits[..];
    let value = |bits: &[u8]| bits.iter().fold(0, |value, bit| value << 1 | bit);
    loop {
        if rest.len() >= 5 && value(&rest[..5]) <= 2 {
            digits.push(b'0' + value(&rest[..5]));
            rest = &rest[5..];
        } else if rest.len() >= 6 && (0x19..=0x1f).contains(&value(&rest[..6])) {
            digits.push(b'3' + value(&rest[..6]) - 0x19);
            rest = &rest[6..];
        } else {
            return digits;
        }
    }
}

/// A frame in the corpus' words: its stream, its type and its bytes.
fn parse(text: &str) -> Result<(u32, u8, Vec<u8>), String> {
    let mut parts = text.split(" | ");
    let head = parts.next().unwrap_or_default();
    let mut words = head.split_whitespace();
    let kind = words.next().unwrap_or_default();
    let (mut stream, mut flags, mut numbers) = (1, END_HEADERS, Vec::new());
    for word in words {
        match (word, word.strip_prefix('@')) {
            ("end", _) => flags |= END_STREAM,
            ("more", _) => flags &= !END_HEADERS,
            (_, Some(id)) => stream = id.parse().map_err(|_| format!("`{word}` is no stream"))?,
            (_, None) => numbers.push(word.parse::<u8>().map_err(|_| format!("`{word}` in `{head}`"))?),
        }
    }
    let payload: Vec<&str> = parts.collect();
    let block = || -> Result<Vec<u8>, String> {
        let mut block = Vec::new();
        for part in &payload {
            let part = unescape(part)?;
            // A pseudo-header's name begins with a colon, and any name may be empty.
            let equals = part.iter().position(|byte| *byte == b'=').ok_or("a field without `=`")?;
            block.extend(field(&part[..equals], &part[equals + 1..]));
        }
        Ok(block)
    };
    let rest = || unescape(&payload.join(" | "));
    let (kind, flags, bytes) = match (kind, &numbers[..]) {
        ("HEADERS", []) => (HEADERS, flags, block()?),
        ("CONTINUATION", []) => (CONTINUATION, flags, block()?),
        ("DATA", []) => (DATA, flags & END_STREAM, rest()?),
        ("RST", []) => {
            let code: u32 = payload.concat().parse().map_err(|_| format!("no code in `{text}`"))?;
            (RST_STREAM, 0, code.to_be_bytes().to_vec())
        }
        ("RAW", [kind, flags]) => (*kind, *flags, rest()?),
        _ => return Err(format!("`{head}` is no frame")),
    };
    Ok((stream, kind, frame(kind, flags, stream, &bytes)))
}

#[test]
fn statuses_are_read() {
    assert_eq!(status(&[0x20, 0x88]), Ok(200));
    assert_eq!(status(b"\x48\x03403"), Ok(403));
    // RFC 7541 C.6.1 and C.6.3.
    assert_eq!(status(&[0x48, 0x82, 0x64, 0x02]), Ok(302));
    assert_eq!(status(&[0x48, 0x83, 0x64, 0x0e, 0xff]), Ok(307));
}
