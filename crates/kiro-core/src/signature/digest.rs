//! What digest does a `content-digest` field give? (RFC 9530)

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue};

use super::CONTENT_DIGEST;
use super::dictionary::Dictionary;

/// 32 bytes in base64.
const BASE64_LENGTH: usize = 44;

/// A `content-digest` of one SHA-256.
#[must_use]
pub fn content_digest_value(sha256: &[u8; 32]) -> HeaderValue {
    labelled(b"sha-256=", sha256)
}

/// A dictionary of one byte sequence: `label=:…:`.
pub(super) fn labelled(label: &[u8], bytes: &[u8; 32]) -> HeaderValue {
    let mut base64 = [0; BASE64_LENGTH];
    #[expect(clippy::expect_used, reason = "the length is that of 32 bytes in base64")]
    STANDARD.encode_slice(bytes, &mut base64).expect("fits");
    let mut text = Vec::with_capacity(label.len() + BASE64_LENGTH + 2);
    text.extend_from_slice(label);
    text.push(b':');
    text.extend_from_slice(&base64);
    text.push(b':');
    #[expect(clippy::expect_used, reason = "labels are constants of ours, the rest is base64")]
    HeaderValue::try_from(text).expect("visible ASCII")
}

/// 32 bytes from `:…:`, in the one spelling that base64 has for them.
pub(super) fn bytes_of(value: &[u8]) -> Option<[u8; 32]> {
    let base64: &[u8; BASE64_LENGTH] = value.strip_prefix(b":")?.strip_suffix(b":")?.try_into().ok()?;
    let mut bytes = [0; 32];
    let length = STANDARD.decode_slice(base64, &mut bytes).ok()?;
    (length == bytes.len()).then_some(bytes)
}

/// The SHA-256 in a message's `content-digest`. Other algorithms are stepped over; a second SHA-256 would leave it to the
/// reader which one holds, so it is refused.
pub(super) fn sha256_of(headers: &HeaderMap) -> Result<[u8; 32], &'static str> {
    let mut found = None;
    for line in headers.get_all(&CONTENT_DIGEST) {
        let mut dictionary = Dictionary::new(line.as_bytes());
        while let Some(member) =
            dictionary.next_member().map_err(|_| "content-digest is not a dictionary of byte sequences")?
        {
            if !member.value.starts_with(b":") {
                return Err("content-digest is not a dictionary of byte sequences");
            }
            if member.key == b"sha-256" {
                let sha256 =
                    bytes_of(member.value).ok_or("content-digest has a sha-256 that is not 32 bytes")?;
                if found.replace(sha256).is_some() {
                    return Err("content-digest has two sha-256");
                }
            }
        }
    }
    found.ok_or("content-digest has no sha-256")
}

/// The SHA-256 that our signer added to trailers: the last line, and nothing else in it.
pub(super) fn sha256_of_last(trailers: &HeaderMap) -> Option<[u8; 32]> {
    let last = trailers.get_all(&CONTENT_DIGEST).iter().next_back()?;
    bytes_of(last.as_bytes().strip_prefix(b"sha-256=")?)
}

/// Removes the line that our signer added to trailers.
pub(super) fn remove_last(trailers: &mut HeaderMap) {
    let mut lines: Vec<HeaderValue> = trailers.get_all(&CONTENT_DIGEST).iter().cloned().collect();
    lines.pop();
    trailers.remove(&CONTENT_DIGEST);
    for line in lines {
        trailers.append(&CONTENT_DIGEST, line);
    }
}
