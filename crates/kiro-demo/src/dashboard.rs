//! What does a person see? Dashboard puts together what Profile and Auth say, and has the page to try it on.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State};
use axum::routing::get;
use axum::{Json, Router};
use http::{Method, StatusCode};
use serde::Serialize;

use crate::Service;
use crate::answer::Refusal;
use crate::app::{App, user_in_path};
use crate::auth::Sessions;
use crate::observe::Trace;
use crate::page::Page;
use crate::profile::Profile;
use crate::upstream::Call;
use crate::user::UserName;

const ME: Service = Service::Dashboard;

/// The answer of `GET /dashboard/{user}`.
#[derive(Serialize)]
struct Dashboard {
    user: UserName,
    profile: Profile,
    sessions: Sessions,
}

/// A call that the mesh is to refuse, so that a person can see how that looks.
pub(crate) struct Try {
    /// Its name in `GET /try/{name}`.
    pub(crate) name: &'static str,
    method: Method,
    service: &'static str,
    path: &'static str,
    /// What stands on the page.
    pub(crate) what: &'static str,
}

/// Each breaks another rule of the mesh file.
pub(crate) const TRIES: &[Try] = &[
    Try {
        name: "denied",
        method: Method::GET,
        service: "profile",
        path: "/internal/export",
        what: "Dashboard asks Profile for a path outside its allow line",
    },
    Try {
        name: "method",
        method: Method::DELETE,
        service: "profile",
        path: "/profiles/alice",
        what: "Dashboard tries to delete at Profile what it may only read",
    },
    Try {
        name: "stranger",
        method: Method::GET,
        service: "billing",
        path: "/invoices",
        what: "Dashboard calls a service that the mesh does not have",
    },
];

pub(crate) fn routes(page: Page) -> Router<Arc<App>> {
    Router::new()
        .route("/", get(async move || page.response()))
        .route("/dashboard/{user}", get(dashboard))
        .route("/try/{name}", get(try_refused))
}

async fn dashboard(
    State(app): State<Arc<App>>,
    Extension(trace): Extension<Trace>,
    user: Result<Path<String>, PathRejection>,
) -> Result<Json<Dashboard>, Refusal> {
    let user = user_in_path(ME, user)?;

    // Both are asked at once. Profile's word goes first where both refuse: it is the one that asked whether the user may.
    let profile = Call::get(Service::Profile.name(), format!("/profiles/{}", user.as_str()));
    let sessions = Call::get(Service::Auth.name(), format!("/sessions/{}", user.as_str()));
    let (profile, sessions) =
        tokio::join!(app.upstream.json(&trace, profile), app.upstream.json(&trace, sessions));

    Ok(Json(Dashboard { user, profile: profile?, sessions: sessions? }))
}

/// Makes one of [`TRIES`]. The mesh answers it; without a mesh the service does.
async fn try_refused(
    State(app): State<Arc<App>>,
    Extension(trace): Extension<Trace>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<serde_json::Value>, Refusal> {
    let name = name.map(|Path(name)| name).unwrap_or_default();
    let Some(wanted) = TRIES.iter().find(|listed| listed.name == name) else {
        return Err(Refusal::own(ME, StatusCode::NOT_FOUND, "there is no such try"));
    };
    let call = Call::bare(wanted.method.clone(), wanted.service, wanted.path);
    app.upstream.json(&trace, call).await.map(Json)
}
