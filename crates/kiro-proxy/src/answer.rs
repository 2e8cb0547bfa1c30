//! What does a caller see of a refusal?
//!
//! The status, the code as `x-kiro-reject`, and the code again in a small JSON body; a caller that speaks gRPC sees a status of gRPC.
//! Never a cause: that would tell a stranger what the policy holds or how the mesh is built.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use kiro_core::fields;

use crate::reject::{Refused, Reject};

static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
static GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Says on an HTTP/1 answer that its connection ends. The library ends it where a request's body was not read to its end, since what
/// is left of it can't be told from a request, and leaves it to us to say so (RFC 9112 9.6).
pub(crate) fn closes(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
}

/// The answer to a refused request.
pub(crate) fn refused(refused: &Refused, grpc: bool) -> Response<Bytes> {
    let mut response = refusal(refused.reject, grpc);
    if let Some(after) = refused.retry_after {
        // Whole seconds (RFC 9110 10.2.3), rounded up: earlier is too early.
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// The same, where nothing is known but the reason.
pub(crate) fn refusal(reject: Reject, grpc: bool) -> Response<Bytes> {
    let mut response = if grpc { grpc_status(reject) } else { json(reject) };
    response.headers_mut().insert(fields::REJECT.clone(), HeaderValue::from_static(reject.code()));
    response
}

fn json(reject: Reject) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(format!("{{\"reject\":\"{}\"}}\n", reject.code())));
    *response.status_mut() = reject.status();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A head alone, with the status in it ("Trailers-Only" in gRPC over HTTP/2).
fn grpc_status(reject: Reject) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS.clone(), HeaderValue::from(grpc_code(reject)));
    headers.insert(GRPC_MESSAGE.clone(), HeaderValue::from_static(reject.code()));
    response
}

/// The trailers of a call whose answer broke off with the application's connection, or a peer's.
pub(crate) fn grpc_broken() -> HeaderMap {
    let lost = Reject::UpstreamReset;
    HeaderMap::from_iter([
        (GRPC_STATUS.clone(), HeaderValue::from(grpc_code(lost))),
        (GRPC_MESSAGE.clone(), HeaderValue::from_static(lost.code())),
    ])
}

/// The code of gRPC for a refusal, by gRPC's own table ("HTTP to gRPC Status Code Mapping"), but for what took too long and for who has
/// had enough: there the table can't know, and we do.
fn grpc_code(reject: Reject) -> u16 {
    match reject.status() {
        // RESOURCE_EXHAUSTED, on which clients back off; UNAVAILABLE would have them ask again at once.
        _ if reject == Reject::RateLimited => 8,
        StatusCode::BAD_REQUEST => 13,
        StatusCode::UNAUTHORIZED => 16,
        StatusCode::FORBIDDEN => 7,
        StatusCode::NOT_FOUND => 12,
        StatusCode::GATEWAY_TIMEOUT | StatusCode::REQUEST_TIMEOUT => 4,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use kiro_core::policy::Denial;

    use super::*;

    #[test]
    fn a_grpc_caller_gets_a_status_of_grpc() {
        for (reject, code) in [
            (Reject::Denied(Denial::NoEdge), "7"),
            (Reject::Signature("signature_missing"), "16"),
            (Reject::ServiceUnknown, "12"),
            (Reject::UpstreamConnect, "14"),
            (Reject::AppTimeout, "4"),
            (Reject::PathInvalid, "13"),
            (Reject::HeadersTooLarge, "2"),
            (Reject::RateLimited, "8"),
            (Reject::Overloaded, "14"),
        ] {
            let response = refusal(reject, true);
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.headers()[&GRPC_STATUS], code, "{reject:?}");
            assert_eq!(response.headers()[&GRPC_MESSAGE], reject.code());
            assert_eq!(response.headers()[&fields::REJECT], reject.code());
            assert!(response.body().is_empty());
        }
    }
}
