//! The calling side: gives each request of a connection its signature.

use hmac::Mac as _;
use http::{HeaderMap, HeaderValue};

use super::base::{self, Line};
use super::covered::{Covered, by_trailers};
use super::digest::{content_digest_value, labelled};
use super::key::{ConnectionKey, KeyId, Mac};
use super::{
    CONTENT_DIGEST, Form, Head, LABEL_PREFIX, LIFETIME_SECONDS, Nonce, SIGNATURE, SIGNATURE_INPUT, SignError,
    dictionary, member, strip,
};

/// Signs what goes out on one connection.
#[derive(Debug)]
pub struct Signer {
    key: ConnectionKey,
    next: u64,
    head_ending: String,
    trailers_ending: String,
    /// Our member of `signature-input` as it is written, kept for its room. Its length is bounded by our own fields' names.
    input: Vec<u8>,
}

impl Signer {
    /// A signer whose first nonce is 0.
    #[must_use]
    pub fn new(key: ConnectionKey, keyid: KeyId) -> Self {
        let keyid = keyid.to_string();
        Self {
            key,
            next: 0,
            head_ending: member::ending(&keyid, Form::Head),
            trailers_ending: member::ending(&keyid, Form::Trailers),
            input: Vec::new(),
        }
    }

    /// Adds the signature of a head. One of ours that is there already (from an attempt on another connection) is replaced.
    ///
    /// # Errors
    /// If the verifier would refuse the message whatever signed it. No nonce is used up then.
    pub fn sign(
        &mut self,
        head: &Head<'_>,
        headers: &mut HeaderMap,
        now_unix: u64,
    ) -> Result<Nonce, SignError> {
        make_room(headers)?;
        let covered = Covered::by_head(head, headers).map_err(SignError::Component)?;
        covered.body().map_err(SignError::Body)?;
        let nonce = Nonce(self.next);
        let input = &mut self.input;
        input.clear();
        input.extend_from_slice(LABEL_PREFIX);
        member::write_list(input, Form::Head, covered.lines());
        input.extend_from_slice(b";created=");
        member::write_number(input, now_unix);
        input.extend_from_slice(b";expires=");
        member::write_number(input, now_unix + LIFETIME_SECONDS);
        write_key_parameters(input, nonce, &self.head_ending);
        let mac = base::mac(&self.key, Form::Head, covered.lines(), without_label(input));
        append(headers, input, mac)?;
        self.next += 1;
        Ok(nonce)
    }

    /// Adds the digest of a streamed body and the signature over it and all other trailers; `nonce` is that of the head.
    ///
    /// # Errors
    /// If the verifier would refuse the trailers whatever signed them; they have our digest then, but no signature.
    pub fn sign_trailers(
        &self,
        nonce: Nonce,
        digest: &[u8; 32],
        trailers: &mut HeaderMap,
    ) -> Result<(), SignError> {
        make_room(trailers)?;
        trailers.append(&CONTENT_DIGEST, content_digest_value(digest));
        let lines: Vec<Line<'_>> = by_trailers(trailers).map_err(SignError::Component)?;
        let mut input = LABEL_PREFIX.to_vec();
        member::write_list(&mut input, Form::Trailers, lines.iter());
        write_key_parameters(&mut input, nonce, &self.trailers_ending);
        let mac = base::mac(&self.key, Form::Trailers, lines.iter(), without_label(&input));
        append(trailers, &input, mac)
    }
}

/// Sees to it that our signature will be the only one that is ours.
fn make_room(headers: &mut HeaderMap) -> Result<(), SignError> {
    if !headers.contains_key(&SIGNATURE_INPUT) && !headers.contains_key(&SIGNATURE) {
        return Ok(());
    }
    strip(headers);
    if dictionary::is_used(headers) { Err(SignError::Reserved) } else { Ok(()) }
}

fn write_key_parameters(input: &mut Vec<u8>, nonce: Nonce, ending: &str) {
    input.extend_from_slice(b";nonce=\"");
    member::write_number(input, nonce.0);
    input.extend_from_slice(ending.as_bytes());
}

fn without_label(input: &[u8]) -> &[u8] {
    input.strip_prefix(LABEL_PREFIX).unwrap_or(input)
}

fn append(headers: &mut HeaderMap, input: &[u8], mac: Mac) -> Result<(), SignError> {
    let mut input =
        HeaderValue::from_bytes(input).map_err(|_| SignError::Component("a name is not plain ASCII"))?;
    let mut signature = labelled(LABEL_PREFIX, &mac.finalize().into_bytes().into());
    // HTTP/2 would keep each in its compression table, where neither is ever met again and both push out what is.
    input.set_sensitive(true);
    signature.set_sensitive(true);
    headers.append(&SIGNATURE_INPUT, input);
    headers.append(&SIGNATURE, signature);
    Ok(())
}
