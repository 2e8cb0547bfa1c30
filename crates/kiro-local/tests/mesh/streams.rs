//! Is a body the one that was signed? An application that counts bytes never sees the end of another.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use kiro_core::signature::{Nonce, Signer, content_digest_value};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::hostile::{Body, Draft};
use crate::signatures::{TEXT, caller, edit, post, sha256, text, three};
use crate::support::{World, eventually};

/// An application that keeps each byte, and answers once a request has come whole by its own framing.
struct Counting {
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

/// What one connection brought.
#[derive(Debug, Clone, Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Seen {
    /// The bytes behind the head; none before that has come.
    fn body(&self) -> &[u8] {
        let end = self.bytes.windows(4).position(|window| window == b"\r\n\r\n");
        end.map_or(&[], |end| &self.bytes[end + 4..])
    }

    /// Whether an application would take the request for whole.
    fn is_whole(&self) -> bool {
        let body = self.body();
        let head = String::from_utf8_lossy(&self.bytes[..self.bytes.len() - body.len()]);
        if !head.ends_with("\r\n\r\n") {
            return false;
        }
        if head.contains("transfer-encoding: chunked") {
            return body.windows(3).any(|window| window == b"0\r\n") && body.ends_with(b"\r\n\r\n");
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        length.is_none_or(|length| body.len() >= length.parse().unwrap())
    }
}

impl Counting {
    async fn start(world: &World) -> Self {
        let listener = world.listen("callee").await;
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let all = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(count(stream, Arc::clone(&all)));
            }
        });
        Self { seen, task }
    }

    /// What the last request brought, once its connection has ended.
    async fn last(&self) -> Seen {
        let ended = || async {
            let seen = self.seen.lock().unwrap();
            !seen.is_empty() && seen.iter().all(|seen| seen.ended)
        };
        eventually("a connection has come and ended", ended).await;
        std::mem::take(&mut *self.seen.lock().unwrap()).pop().unwrap()
    }
}

async fn count(mut stream: TcpStream, all: Arc<Mutex<Vec<Seen>>>) {
    let place = {
        let mut all = all.lock().unwrap();
        all.push(Seen::default());
        all.len() - 1
    };
    let mut buffer = [0; 4096];
    while let Ok(count) = stream.read(&mut buffer).await {
        let whole = {
            let seen = &mut all.lock().unwrap()[place];
            seen.bytes.extend_from_slice(&buffer[..count]);
            seen.is_whole()
        };
        if whole {
            let _ =
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        }
        if count == 0 || whole {
            break;
        }
    }
    all.lock().unwrap()[place].ended = true;
}

/// A streamed body as a test sends it: frames, trailers of the application's, and how both were changed after signing.
struct Stream {
    frames: &'static [&'static [u8]],
    signed_as: &'static [u8],
    length: bool,
    own: &'static [(&'static str, &'static str)],
}

const WHOLE: Stream = Stream {
    frames: &[b"first ", b"second ", b"last"],
    signed_as: b"first second last",
    length: true,
    own: &[],
};

impl Stream {
    fn length(&self) -> usize {
        self.frames.iter().map(|frame| frame.len()).sum()
    }

    fn draft(&self, signer: &mut Signer) -> (Draft, Nonce) {
        let mut draft = Draft::new(Method::POST, "callee", "/a");
        draft.set("x-kiro-body", "stream");
        if self.length {
            draft.set("content-length", &self.length().to_string());
        }
        if !self.own.is_empty() {
            let names: Vec<&str> = self.own.iter().map(|(name, _)| *name).collect();
            draft.set("trailer", &names.join(", "));
        }
        let nonce = draft.sign(signer);
        (draft, nonce)
    }

    fn frames(&self) -> Vec<Bytes> {
        self.frames.iter().map(|frame| Bytes::from_static(frame)).collect()
    }

    fn trailers(&self, signer: &Signer, nonce: Nonce) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        for (name, value) in self.own {
            trailers.append(*name, HeaderValue::from_static(value));
        }
        signer.sign_trailers(nonce, &sha256(self.signed_as), &mut trailers).unwrap();
        trailers
    }
}

#[tokio::test]
async fn an_application_never_sees_the_end_of_a_streamed_body_that_was_changed() {
    type Change = fn(&mut HeaderMap);
    let with_own = Stream { own: &[("x-sum", "7"), ("x-other", "1")], ..WHOLE };
    let unchanged: Change = |_| {};
    let cases: Vec<(&str, Stream, Change, &str)> = vec![
        (
            "a body changed",
            Stream { signed_as: b"first second lost", ..WHOLE },
            unchanged,
            "signature_digest",
        ),
        (
            "a body cut",
            Stream { signed_as: b"first second last and more", ..WHOLE },
            unchanged,
            "signature_digest",
        ),
        (
            "one frame",
            Stream { frames: &[b"all"], signed_as: b"any", ..WHOLE },
            unchanged,
            "signature_digest",
        ),
        (
            "no trailer signature",
            WHOLE,
            |trailers| {
                trailers.clear();
                trailers.insert("x-any", HeaderValue::from_static("1"));
            },
            "signature_trailers",
        ),
        ("no mac", WHOLE, |trailers| drop(trailers.remove("signature")), "signature_trailers"),
        (
            "the digest changed",
            WHOLE,
            |trailers| drop(trailers.insert("content-digest", content_digest_value(&sha256(b"x")))),
            "signature_mismatch",
        ),
        ("no digest", WHOLE, |trailers| drop(trailers.remove("content-digest")), "signature_component"),
        (
            "a trailer changed",
            Stream { own: with_own.own, ..WHOLE },
            |trailers| drop(trailers.insert("x-sum", HeaderValue::from_static("8"))),
            "signature_mismatch",
        ),
        (
            "a trailer gone",
            Stream { own: with_own.own, ..WHOLE },
            |trailers| drop(trailers.remove("x-sum")),
            "signature_component",
        ),
        (
            "a trailer added",
            Stream { own: with_own.own, ..WHOLE },
            |trailers| drop(trailers.insert("x-more", HeaderValue::from_static("1"))),
            "signature_component",
        ),
        (
            "two of ours",
            WHOLE,
            |trailers| {
                for name in ["signature-input", "signature"] {
                    let value = trailers[name].clone();
                    trailers.append(name, value);
                }
            },
            "signature_duplicate",
        ),
        (
            "a component twice",
            WHOLE,
            |trailers| {
                edit(
                    trailers,
                    "signature-input",
                    "\"content-digest\";tr",
                    "\"content-digest\";tr \"content-digest\";tr",
                );
            },
            "signature_component",
        ),
        (
            "a component of the head",
            WHOLE,
            |trailers| edit(trailers, "signature-input", "\"content-digest\";tr", "\"content-digest\""),
            "signature_component",
        ),
    ];
    let world = World::start(three()).await;
    let app = Counting::start(&world).await;
    let (peer, mut signer) = caller(&world).await;
    for length in [true, false] {
        for (what, stream, change, code) in &cases {
            let stream = Stream { length, ..*stream };
            let (draft, nonce) = stream.draft(&mut signer);
            let mut trailers = stream.trailers(&signer, nonce);
            change(&mut trailers);
            let body = Body::Trailed(stream.frames(), trailers);
            let reply = peer.send(draft.request(), body).await.unwrap();
            assert_eq!(reply.verdict(), (401, Some(*code)), "{what}");
            let seen = app.last().await;
            assert!(!seen.is_whole(), "{what}: {:?}", String::from_utf8_lossy(&seen.bytes));
            // Without a length the stream's end alone can be held back, and that is what `is_whole` looks for.
            let last = stream.frames.last().unwrap();
            assert!(
                !length || !seen.body().windows(last.len()).any(|window| window == *last),
                "{what}: the end was held back: {:?}",
                String::from_utf8_lossy(&seen.bytes)
            );
        }
    }

    // A stream that ends without any trailers.
    let (draft, _) = WHOLE.draft(&mut signer);
    let reply = peer.send(draft.request(), Body::Data(WHOLE.frames())).await.unwrap();
    assert_eq!(reply.verdict(), (401, Some("signature_trailers")));
    assert!(!app.last().await.is_whole());

    // The trailers of another request of the same connection, whose body was the same.
    let (_, earlier) = WHOLE.draft(&mut signer);
    let (draft, _) = WHOLE.draft(&mut signer);
    let body = Body::Trailed(WHOLE.frames(), WHOLE.trailers(&signer, earlier));
    let reply = peer.send(draft.request(), body).await.unwrap();
    assert_eq!(reply.verdict(), (401, Some("signature_trailers")));
    assert!(!app.last().await.is_whole());

    for stream in [WHOLE, with_own, Stream { length: false, own: &[("x-sum", "7")], ..WHOLE }] {
        let (draft, nonce) = stream.draft(&mut signer);
        let body = Body::Trailed(stream.frames(), stream.trailers(&signer, nonce));
        let reply = peer.send(draft.request(), body).await.unwrap();
        assert_eq!(reply.verdict(), (200, None), "unchanged");
        let seen = app.last().await;
        assert!(seen.is_whole());
        let text = String::from_utf8(seen.bytes.clone()).unwrap();
        assert!(text.contains("last") && !text.contains("signature"), "{text}");
        if !stream.length {
            assert!(text.contains("x-sum: 7"), "the application's own trailers arrive: {text}");
        }
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn nothing_of_a_body_with_another_digest_reaches_the_application() {
    let mut world = World::start(three()).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    let big = vec![b'x'; 64 * 1024 + 1];
    let mut of_big = Draft::new(Method::POST, "callee", "/a");
    of_big.headers.insert("content-digest", content_digest_value(&sha256(&big)));
    let cases = [
        ("changed", post(), Body::Data(vec![Bytes::from_static(b"what was SIGNED")])),
        ("cut", post(), Body::Data(vec![Bytes::from_static(b"what was")])),
        ("longer", post(), Body::Data(vec![Bytes::from_static(TEXT), Bytes::from_static(b"!")])),
        ("gone", post(), Body::None),
        ("not spoken of", Draft::new(Method::POST, "callee", "/a"), text()),
        (
            "too long to be held",
            of_big,
            Body::Data(big.chunks(16 * 1024).map(Bytes::copy_from_slice).collect()),
        ),
    ];
    for (what, mut draft, body) in cases {
        draft.sign(&mut signer);
        let reply = peer.send(draft.request(), body).await.unwrap();
        assert_eq!(reply.verdict(), (401, Some("signature_digest")), "{what}");
    }
    assert_eq!(recorder.seen().len(), 0);
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_has_come_of_a_body_without_a_length_is_not_held_back() {
    let world = World::start(three()).await;
    let listener = world.listen("callee").await;
    let mut client = Client::app_of(&world, "caller").await;
    client
        .send("POST http://callee/talk HTTP/1.1\r\nHost: callee\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    client.send("4\r\nask?\r\n").await;
    let mut app = Client::on(listener.accept().await.unwrap().0);
    // The caller waits for an answer to this before it sends more, as gRPC's callers do.
    app.until("ask?").await;
    app.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nanswer\r\n").await;
    client.until("answer").await;
    client.send("5\r\nagain\r\n0\r\n\r\n").await;
    app.until("again").await;
    app.until("0\r\n\r\n").await;
    app.send("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
    assert!(world.stop().await);
}
