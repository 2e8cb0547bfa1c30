//! Who is this user? Profile knows, and tells it only of users for whom Auth vouches.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::Service;
use crate::answer::Refusal;
use crate::app::{App, user_in_path};
use crate::auth::{Question, Verified};
use crate::observe::Trace;
use crate::upstream::Call;
use crate::user::UserName;

const ME: Service = Service::Profile;

/// What Profile knows of a user, and the answer of `GET /profiles/{user}`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Profile {
    pub(crate) user: UserName,
    pub(crate) name: String,
    pub(crate) team: String,
}

/// User, name, team. Mallory has a profile too: it is Auth that keeps it from being seen.
const PROFILES: &[(&str, &str, &str)] = &[
    ("alice", "Alice Liddell", "Cartography"),
    ("bob", "Bob Cratchit", "Ledgers"),
    ("mallory", "Mallory Archer", "Field work"),
];

pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new().route("/profiles/{user}", get(profile))
}

async fn profile(
    State(app): State<Arc<App>>,
    Extension(trace): Extension<Trace>,
    user: Result<Path<String>, PathRejection>,
) -> Result<Json<Profile>, Refusal> {
    let user = user_in_path(ME, user)?;

    let call = Call::post(Service::Auth.name(), "/verify", &Question { user: user.clone() });
    let vouched: Verified = app.upstream.json(&trace, call).await?;
    if vouched.user != user || !vouched.verified {
        return Err(Refusal::about(ME, StatusCode::BAD_GATEWAY, &user, "auth answered for another user"));
    }

    PROFILES
        .iter()
        .find(|(known, ..)| *known == user.as_str())
        .map(|(_, name, team)| {
            Json(Profile { user: user.clone(), name: (*name).into(), team: (*team).into() })
        })
        .ok_or_else(|| Refusal::about(ME, StatusCode::NOT_FOUND, &user, "user has no profile"))
}
