//! How does one service ask another? By its bare name, through the outbound proxy, within a time and a size.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use kiro_telemetry::app::{ClientSpan, client_span};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tracing::warn;

use crate::Service;
use crate::answer::Refusal;
use crate::links::Links;
use crate::observe::Trace;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// One call to another service.
pub(crate) struct Call {
    method: Method,
    service: &'static str,
    path: String,
    /// JSON.
    body: Option<Vec<u8>>,
}

impl Call {
    pub(crate) fn get(service: &'static str, path: String) -> Self {
        Self { method: Method::GET, service, path, body: None }
    }

    pub(crate) fn bare(method: Method, service: &'static str, path: &str) -> Self {
        Self { method, service, path: path.to_owned(), body: None }
    }

    pub(crate) fn post(service: &'static str, path: &str, body: &impl Serialize) -> Self {
        #[expect(clippy::expect_used, reason = "our own types, whose keys are all strings")]
        let body = serde_json::to_vec(body).expect("serializable");
        Self { method: Method::POST, service, path: path.to_owned(), body: Some(body) }
    }
}

/// The other services, as one of them sees them.
pub(crate) struct Upstream {
    pub(crate) service: Service,
    pub(crate) links: watch::Receiver<Arc<Links>>,
    /// How long a call may take, its answer's body included.
    pub(crate) timeout: Duration,
}

/// What came back.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

/// Why nothing came back. The first field is for the span, the second for the caller; causes go to the log.
struct NoAnswer {
    error_type: &'static str,
    status: StatusCode,
    error: String,
    cause: String,
}

impl Upstream {
    /// Asks, and reads a successful answer as JSON. Whatever else comes back is a refusal that says whose word it is.
    pub(crate) async fn json<T: DeserializeOwned>(&self, trace: &Trace, call: Call) -> Result<T, Refusal> {
        let callee = call.service;
        let Answer { status, headers, body } = self.answer(trace, call).await?;
        if status.is_success() {
            serde_json::from_slice(&body).map_err(|_| Refusal::misunderstood(self.service, callee, status))
        } else {
            Err(Refusal::received(self.service, callee, status, &headers, &body))
        }
    }

    async fn answer(&self, trace: &Trace, call: Call) -> Result<Answer, Refusal> {
        let callee = call.service;
        let (request, span) = self.request(trace, call)?;
        let client = self.links.borrow().client.clone();
        let exchange = async {
            let response = client.request(request).await.map_err(|error| self.no_answer(&error))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| self.cut_short(callee, error.as_ref()))?
                .to_bytes();
            Ok(Answer { status: head.status, headers: head.headers, body })
        };
        let outcome =
            tokio::time::timeout(self.timeout, exchange).await.unwrap_or_else(|_| Err(self.late(callee)));
        match outcome {
            Ok(answer) => {
                span.finish(answer.status);
                Ok(answer)
            }
            Err(nothing) => {
                span.fail(nothing.error_type);
                let service = self.service.name();
                warn!(service, callee, cause = nothing.cause, "call without an answer: {}", nothing.error);
                Err(Refusal::own(self.service, nothing.status, nothing.error))
            }
        }
    }

    /// The request in absolute form, its span, and the span's context in its head.
    fn request(&self, trace: &Trace, call: Call) -> Result<(Request<Full<Bytes>>, ClientSpan), Refusal> {
        let Call { method, service: callee, path, body } = call;
        let uri: Uri = format!("http://{callee}{path}")
            .parse()
            .map_err(|_| Refusal::own(self.service, StatusCode::BAD_REQUEST, "this is not a path"))?;
        let mut request = Request::new(Full::new(Bytes::new()));
        let span = client_span(trace.span(), &method, &uri, request.headers_mut(), 0);
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        if let Some(json) = body {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            *request.body_mut() = Full::new(json.into());
        }
        Ok((request, span))
    }

    fn no_answer(&self, error: &hyper_util::client::legacy::Error) -> NoAnswer {
        let (error_type, what) = if error.is_connect() {
            ("connect", "could not reach its outbound proxy")
        } else {
            ("connection", "lost the connection to its outbound proxy")
        };
        NoAnswer {
            error_type,
            status: StatusCode::BAD_GATEWAY,
            error: format!("{} {what}", self.service),
            cause: causes(error),
        }
    }

    fn cut_short(&self, callee: &str, error: &(dyn Error + 'static)) -> NoAnswer {
        NoAnswer {
            error_type: "body",
            status: StatusCode::BAD_GATEWAY,
            error: format!("{callee}'s answer broke off, or is longer than {ANSWER_BYTES_MAX} bytes"),
            cause: causes(error),
        }
    }

    fn late(&self, callee: &str) -> NoAnswer {
        NoAnswer {
            error_type: "timeout",
            status: StatusCode::GATEWAY_TIMEOUT,
            error: format!("{callee} did not answer within {} ms", self.timeout.as_millis()),
            cause: "timeout".to_owned(),
        }
    }
}

/// An error and what is behind it: libraries say "connection error" and mean the alert inside.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
