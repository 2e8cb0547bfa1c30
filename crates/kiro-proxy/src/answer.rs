//! What does a caller see of a refusal?
//!
//! The status, the code as `x-kiro-reject`, and the code again in a small JSON body. Never a cause: that would tell a stranger
//! what the policy holds or how the mesh is built.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Response};
use kiro_core::fields;

use crate::reject::Reject;

/// The answer to a refused request.
pub(crate) fn refusal(reject: Reject) -> Response<Bytes> {
    let code = reject.code();
    let mut response = Response::new(Bytes::from(format!("{{\"reject\":\"{code}\"}}\n")));
    *response.status_mut() = reject.status();
    let headers = response.headers_mut();
    headers.insert(fields::REJECT.clone(), HeaderValue::from_static(code));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
