//! Who may use the services, and who is logged in? Auth decides, and asks nobody.

use std::sync::Arc;

use axum::extract::Path;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::Service;
use crate::answer::Refusal;
use crate::app::{App, user_in_path};
use crate::user::UserName;

const ME: Service = Service::Auth;

/// What Auth knows of a user.
struct Account {
    user: &'static str,
    enabled: bool,
    sessions: u32,
    last_login: &'static str,
}

/// All users there are. Anybody else is unknown.
const ACCOUNTS: &[Account] = &[
    Account { user: "alice", enabled: true, sessions: 2, last_login: "2026-03-02T08:14:09Z" },
    Account { user: "bob", enabled: true, sessions: 1, last_login: "2026-02-27T17:40:51Z" },
    Account { user: "mallory", enabled: false, sessions: 0, last_login: "2025-11-05T03:33:33Z" },
];

/// The question that `POST /verify` takes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Question {
    pub(crate) user: UserName,
}

/// The answer of `POST /verify` for a user who may go on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verified {
    pub(crate) user: UserName,
    pub(crate) verified: bool,
}

/// The answer of `GET /sessions/{user}`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sessions {
    pub(crate) user: UserName,
    pub(crate) sessions: u32,
    pub(crate) last_login: String,
}

pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new().route("/verify", post(verify)).route("/sessions/{user}", get(sessions))
}

async fn verify(question: Result<Json<Question>, JsonRejection>) -> Result<Json<Verified>, Refusal> {
    // 413 and 415 are told apart for the caller; whatever else is wrong with a body is a bad request.
    let Json(Question { user }) = question.map_err(|rejection| {
        let status = match rejection.status() {
            kept @ (StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNSUPPORTED_MEDIA_TYPE) => kept,
            _ => StatusCode::BAD_REQUEST,
        };
        Refusal::own(ME, status, rejection.body_text())
    })?;
    let account = account(&user)?;
    if !account.enabled {
        return Err(Refusal::about(ME, StatusCode::FORBIDDEN, &user, "user is disabled"));
    }
    Ok(Json(Verified { user, verified: true }))
}

async fn sessions(user: Result<Path<String>, PathRejection>) -> Result<Json<Sessions>, Refusal> {
    let user = user_in_path(ME, user)?;
    let account = account(&user)?;
    Ok(Json(Sessions { user, sessions: account.sessions, last_login: account.last_login.to_owned() }))
}

fn account(user: &UserName) -> Result<&'static Account, Refusal> {
    ACCOUNTS
        .iter()
        .find(|account| account.user == user.as_str())
        .ok_or_else(|| Refusal::about(ME, StatusCode::NOT_FOUND, user, "no such user"))
}
