//! What do the three services have in common? Their router: health, the answers of unknown paths, bounds, observation.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use serde_json::json;

use crate::answer::Refusal;
use crate::observe::{Observer, observe};
use crate::page::Page;
use crate::upstream::Upstream;
use crate::user::{BadUserName, UserName};
use crate::{Service, auth, dashboard, profile};

/// Longest request body: the one body there is holds a user name.
const BODY_BYTES_MAX: usize = 4 * 1024;

/// How long a request may take. Calls to other services give up sooner, so what runs into this is a body that does not end.
const REQUEST: Duration = Duration::from_secs(15);

/// What a handler works with.
pub(crate) struct App {
    pub(crate) service: Service,
    pub(crate) upstream: Upstream,
    /// Its name among several of the same service.
    pub(crate) replica: Option<String>,
}

/// The service's whole router.
pub(crate) fn router(app: App, page: Page, observer: Observer) -> Router {
    let routes = match app.service {
        Service::Dashboard => dashboard::routes(page),
        Service::Profile => profile::routes(),
        Service::Auth => auth::routes(),
    };
    let app = Arc::new(app);
    routes
        .route("/healthz", get(healthz))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn_with_state(app.service, limit_time))
        .layer(from_fn_with_state(observer, observe))
        .with_state(app)
}

async fn healthz(State(app): State<Arc<App>>) -> Json<serde_json::Value> {
    Json(json!({ "status": "ok", "service": app.service.name() }))
}

async fn unknown_path(State(app): State<Arc<App>>) -> Refusal {
    Refusal::own(app.service, StatusCode::NOT_FOUND, "no such path")
}

async fn unknown_method(State(app): State<Arc<App>>) -> Refusal {
    Refusal::own(app.service, StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
}

async fn limit_time(State(service): State<Service>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let error = format!("the request was not complete within {} s", REQUEST.as_secs());
            Refusal::own(service, StatusCode::REQUEST_TIMEOUT, error).into_response()
        }
    }
}

/// The user name of a path. Escapes that are no UTF-8 can't be a name either.
pub(crate) fn user_in_path(
    service: Service,
    path: Result<Path<String>, PathRejection>,
) -> Result<UserName, Refusal> {
    path.map_err(|_| BadUserName)
        .and_then(|Path(name)| UserName::parse(&name))
        .map_err(|error| Refusal::bad_user_name(service, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, Bytes};
    use hyper::body::Frame;
    use kiro_telemetry::trace::Tracing;
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use tower::ServiceExt;

    struct Endless;

    impl hyper::body::Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_end_is_given_up() {
        let service = Service::Auth;
        let proxy = "http://127.0.0.1:15001".parse().unwrap();
        let (links, _) = crate::links::start(service, None, proxy).unwrap();
        let upstream = Upstream { service, links, timeout: REQUEST };
        let observer = Observer { service, tracing: Tracing::off(), scheme: "http" };
        let page = Page::new(&"http://localhost:16686".parse().unwrap());
        let router = router(App { service, upstream, replica: None }, page, observer);

        let request = Request::post("/verify")
            .header("content-type", "application/json")
            .body(Body::new(Endless))
            .unwrap();
        let response = tokio::time::timeout(REQUEST * 2, router.oneshot(request)).await.unwrap().unwrap();
        assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
    }
}
