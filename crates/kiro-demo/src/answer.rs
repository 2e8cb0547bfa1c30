//! What does a caller get when the answer is not 200, and whose word was it?
//!
//! Three can say no: a service that decided, the mesh between two services, and the service that could not find out.
//! [`Refusal`] keeps them apart in `said_by`, and is handed on unchanged by every service it passes.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};

use crate::Service;
use crate::user::{BadUserName, UserName};

/// The response field by which the mesh says that it, and no service, refused a call. It is the one thing that the
/// services know of the mesh beside their proxy's address: with it they can tell their callers whose word it was.
const MESH_REJECT: &str = "x-kiro-reject";

/// Longest reject code that is handed on. Codes are short words; anything else in the field is not ours.
const REJECT_BYTES_MAX: usize = 64;

/// Who refused, as it stands in JSON when it was not a service.
const MESH: &str = "mesh";

/// An answer other than success, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// What is the matter, for a person.
    pub(crate) error: String,
    /// `dashboard`, `profile`, `auth` or `mesh`.
    pub(crate) said_by: String,
    /// The response's status.
    pub(crate) status: u16,
    /// The user in question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<UserName>,
    /// The mesh's code, where the mesh said no.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reject: Option<Box<str>>,
    /// Which call the mesh did not carry, as `caller > callee`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) call: Option<Box<str>>,
}

impl Refusal {
    /// `service`'s own word.
    pub(crate) fn own(service: Service, status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            said_by: service.name().to_owned(),
            status: status.as_u16(),
            user: None,
            reject: None,
            call: None,
        }
    }

    /// `service`'s own word about a user.
    pub(crate) fn about(service: Service, status: StatusCode, user: &UserName, error: &str) -> Self {
        Self { user: Some(user.clone()), ..Self::own(service, status, error) }
    }

    /// A name that no user can have.
    pub(crate) fn bad_user_name(service: Service, error: BadUserName) -> Self {
        Self::own(service, StatusCode::BAD_REQUEST, error.to_string())
    }

    /// Reads a response that `caller` got from `callee` and that is not a success: the mesh's word, the word of a
    /// service, or something that nobody agreed on.
    pub(crate) fn received(
        caller: Service,
        callee: &str,
        status: StatusCode,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Self {
        if let Some(code) = mesh_reject(headers) {
            return Self {
                error: format!("the mesh did not carry the call from {caller} to {callee}"),
                said_by: MESH.to_owned(),
                status: status.as_u16(),
                user: None,
                reject: Some(code.into()),
                call: Some(format!("{caller} > {callee}").into()),
            };
        }
        match serde_json::from_slice::<Self>(body) {
            // The status on the wire is what the peer's sidecar saw; a body that tells another is not believed.
            Ok(refusal) if !status.is_success() && refusal.status == status.as_u16() => refusal,
            Ok(_) | Err(_) => Self::misunderstood(caller, callee, status),
        }
    }

    /// `callee` answered with something that `caller` does not understand.
    pub(crate) fn misunderstood(caller: Service, callee: &str, status: StatusCode) -> Self {
        let error = format!("{callee} answered {} in a form that was not agreed", status.as_u16());
        Self::own(caller, StatusCode::BAD_GATEWAY, error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_GATEWAY);
        (status, Json(self)).into_response()
    }
}

/// The mesh's code, if the mesh wrote this response.
fn mesh_reject(headers: &HeaderMap) -> Option<&str> {
    let code = headers.get(MESH_REJECT)?.to_str().ok()?;
    (!code.is_empty() && code.len() <= REJECT_BYTES_MAX).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn received(status: u16, reject: Option<&'static str>, body: &str) -> Refusal {
        let mut headers = HeaderMap::new();
        if let Some(code) = reject {
            headers.insert(MESH_REJECT, HeaderValue::from_static(code));
        }
        let status = StatusCode::from_u16(status).unwrap();
        Refusal::received(Service::Dashboard, "profile", status, &headers, body.as_bytes())
    }

    #[test]
    fn a_service_keeps_its_word_on_the_way() {
        let word = r#"{"error":"user is disabled","said_by":"auth","status":403,"user":"mallory"}"#;
        let refusal = received(403, None, word);
        assert_eq!(serde_json::to_string(&refusal).unwrap(), word);
        assert_eq!(refusal.into_response().status(), StatusCode::FORBIDDEN);
    }

    #[test]
    fn the_field_of_the_mesh_outweighs_the_body() {
        let refusal = received(403, Some("policy_path"), r#"{"error":"no","said_by":"auth","status":403}"#);
        assert_eq!(refusal.said_by, "mesh");
        assert_eq!(refusal.reject.as_deref(), Some("policy_path"));
        assert_eq!(refusal.status, 403);
        assert_eq!(refusal.call.as_deref(), Some("dashboard > profile"));
    }

    #[test]
    fn what_nobody_agreed_on_is_the_callers_502() {
        let cases = [
            (500, "", "empty"),
            (503, "<html>", "no JSON"),
            (404, "[]", "another shape"),
            (404, r#"{"error":"no","said_by":"auth","status":200}"#, "another status than on the wire"),
            (302, r#"{"error":"no"}"#, "fields missing"),
            (403, r#"{"error":"no","said_by":"auth","status":403,"user":"../x"}"#, "a name that can't be"),
        ];
        for (status, body, why) in cases {
            let refusal = received(status, None, body);
            assert_eq!((refusal.status, refusal.said_by.as_str()), (502, "dashboard"), "{why}");
            assert!(refusal.error.contains(&status.to_string()), "{why}: {}", refusal.error);
        }
    }

    #[test]
    fn an_overlong_reject_field_is_not_the_mesh() {
        let mut headers = HeaderMap::new();
        let long = "x".repeat(REJECT_BYTES_MAX + 1);
        headers.insert(MESH_REJECT, HeaderValue::from_str(&long).unwrap());
        assert_eq!(mesh_reject(&headers), None);
        headers.insert(MESH_REJECT, HeaderValue::from_static(""));
        assert_eq!(mesh_reject(&headers), None);
    }
}
