//! What do the two versions of HTTP want of a WebSocket handshake?
//!
//! In HTTP/1.1 the client sends a key and the server proves that it has read it (RFC 6455 4.2.2); in HTTP/2 there is neither (RFC 8441 5).
//! Where the two ends differ, the sidecar in between makes up for it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};
use sha1::{Digest, Sha1};

/// What every server appends to a client's key (RFC 6455 1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Gives a handshake the key that an application speaking HTTP/1.1 wants, where its client had none. It protects nobody here: it tells
/// servers that know WebSocket from those that do not.
pub(crate) fn ensure_key(headers: &mut HeaderMap) {
    if headers.contains_key(SEC_WEBSOCKET_KEY) {
        return;
    }
    let key = STANDARD.encode(fastrand::u128(..).to_ne_bytes());
    if let Ok(key) = HeaderValue::try_from(key) {
        headers.insert(SEC_WEBSOCKET_KEY, key);
    }
}

/// The answer that opens a client's WebSocket, in the version that the client speaks; `headers` are those of the application's.
pub(crate) fn opened(mut headers: HeaderMap, version: Version, key: Option<&HeaderValue>) -> Response<()> {
    let mut response = Response::new(());
    if version == Version::HTTP_2 {
        headers.remove(SEC_WEBSOCKET_ACCEPT);
        headers.remove(SEC_WEBSOCKET_KEY);
    } else {
        if !headers.contains_key(SEC_WEBSOCKET_ACCEPT)
            && let Some(accept) = key.and_then(accept)
        {
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
        }
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    }
    *response.headers_mut() = headers;
    response
}

fn accept(key: &HeaderValue) -> Option<HeaderValue> {
    let digest = Sha1::new().chain_update(key.as_bytes()).chain_update(GUID).finalize();
    HeaderValue::try_from(STANDARD.encode(digest)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rfc_example_is_accepted() {
        // RFC 6455 1.3.
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept(&key).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn an_answer_is_in_the_clients_version() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        let made = opened(HeaderMap::new(), Version::HTTP_11, Some(&key));
        assert_eq!(made.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(made.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        // The application's own word stands.
        let mut own = HeaderMap::new();
        own.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::from_static("its own"));
        let made = opened(own.clone(), Version::HTTP_11, Some(&key));
        assert_eq!(made.headers()[SEC_WEBSOCKET_ACCEPT], "its own");
        let made = opened(own, Version::HTTP_2, None);
        assert_eq!(made.status(), StatusCode::OK);
        assert!(made.headers().is_empty());
    }

    #[test]
    fn a_key_is_made_once() {
        let mut headers = HeaderMap::new();
        ensure_key(&mut headers);
        let made = headers[SEC_WEBSOCKET_KEY].clone();
        assert_eq!(STANDARD.decode(made.as_bytes()).unwrap().len(), 16);
        ensure_key(&mut headers);
        assert_eq!(headers[SEC_WEBSOCKET_KEY], made);
    }
}
