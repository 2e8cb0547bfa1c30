//! A pair of sidecars in a few lines, and what every test of signatures is made from.

mod head;
mod other_labels;
mod tampering;
mod trailers;
mod vector;

use hmac::Mac as _;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::base::{Line, Value, mac};
use super::digest::labelled;
use super::*;

const NOW: u64 = 1_800_000_000;
const EXPORTER: [u8; 32] = [7; 32];
const KEYID: &str = "dashboard>profile#1";

/// A head that can be changed after it was signed.
#[derive(Clone, Debug)]
struct Message {
    method: &'static str,
    authority: &'static str,
    path: &'static str,
    query: Option<&'static str>,
    headers: HeaderMap,
}

impl Message {
    fn head(&self) -> Head<'_> {
        Head { method: self.method, authority: self.authority, path: self.path, query: self.query }
    }

    fn set(&mut self, name: &'static str, value: &str) {
        self.headers.insert(name, value.parse().unwrap());
    }

    fn append(&mut self, name: &'static str, value: &str) {
        self.headers.append(name, value.parse().unwrap());
    }

    fn edit(&mut self, name: &'static str, from: &str, to: &str) {
        let before = self.headers[name].to_str().unwrap();
        assert!(before.contains(from), "{name} has no {from}: {before}");
        let after = before.replacen(from, to, 1);
        self.set(name, &after);
    }
}

/// A request with each kind of covered component.
fn message() -> Message {
    let mut message = Message {
        method: "POST",
        authority: "profile",
        path: "/profiles/alice",
        query: Some("full=1"),
        headers: HeaderMap::new(),
    };
    message.set("accept", "application/json");
    message.set("x-kiro-host", "profile.example:8080");
    message.headers.insert("content-digest", content_digest_value(&[1; 32]));
    message
}

/// A request without fields of ours and without a body.
fn plain_message() -> Message {
    Message { method: "GET", authority: "profile", path: "/", query: None, headers: HeaderMap::new() }
}

fn keyid(text: &str) -> KeyId {
    KeyId::parse(text).unwrap()
}

fn secret(edge: u8) -> EdgeSecret {
    EdgeSecret::from_bytes([edge; 32])
}

fn key() -> ConnectionKey {
    ConnectionKey::derive(&secret(1), &EXPORTER, &keyid(KEYID))
}

fn signer() -> Signer {
    Signer::new(key(), keyid(KEYID))
}

fn verifier() -> Verifier {
    Verifier::new(vec![(keyid(KEYID), key())])
}

fn signed(mut message: Message) -> Message {
    signer().sign(&message.clone().head(), &mut message.headers, NOW).unwrap();
    message
}

fn verify(message: &Message) -> Result<Verified, SignatureError> {
    verifier().verify(&message.head(), &message.headers, NOW)
}

/// What becomes of a message that is changed after it was signed.
fn changed(change: impl FnOnce(&mut Message)) -> Result<Verified, SignatureError> {
    let mut message = signed(message());
    change(&mut message);
    verify(&message)
}

/// Signs whatever components and parameters with the right key, as only a peer with the key could: what is refused then is
/// refused by a check of its own and not by the MAC.
fn forge(headers: &mut HeaderMap, form: Form, components: &[(&str, &str)], parameters: &str) {
    let lines: Vec<Line<'_>> =
        components.iter().map(|(name, value)| Line { name, value: Value::Text(value.as_bytes()) }).collect();
    let mut input = Vec::new();
    member::write_list(&mut input, form, lines.iter());
    input.extend_from_slice(parameters.as_bytes());
    let mac = mac(&key(), form, lines.iter(), &input).finalize().into_bytes().into();
    input.splice(0..0, LABEL_PREFIX.iter().copied());
    headers.append(&SIGNATURE_INPUT, HeaderValue::try_from(input).unwrap());
    headers.append(&SIGNATURE, labelled(LABEL_PREFIX, &mac));
}

/// The parameters of a head as our signer writes them.
fn head_parameters() -> String {
    format!(
        ";created={NOW};expires={};nonce=\"0\";keyid=\"{KEYID}\";alg=\"hmac-sha256\";tag=\"kiro\"",
        NOW + LIFETIME_SECONDS
    )
}

const PLAIN_COMPONENTS: [(&str, &str); 4] =
    [("@method", "GET"), ("@authority", "profile"), ("@path", "/"), ("@query", "?")];

/// What becomes of a plain message that its peer signed over these components and with these parameters.
fn forged(components: &[(&str, &str)], parameters: &str) -> Result<Verified, SignatureError> {
    let mut message = plain_message();
    forge(&mut message.headers, Form::Head, components, parameters);
    verify(&message)
}

fn lines(headers: &HeaderMap, name: &str) -> Vec<String> {
    headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
}
