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
    /// Which of several replicas says so, where it has been told its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replica: Option<String>,
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
            let replica = app.replica.clone();
            Json(Profile { user: user.clone(), name: (*name).into(), team: (*team).into(), replica })
        })
        .ok_or_else(|| Refusal::about(ME, StatusCode::NOT_FOUND, &user, "user has no profile"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_was_told_its_name_says_it() {
        let mut profile = Profile {
            user: UserName::parse("alice").unwrap(),
            name: "Alice".to_owned(),
            team: "Ledgers".to_owned(),
            replica: None,
        };
        let alone = r#"{"user":"alice","name":"Alice","team":"Ledgers"}"#;
        assert_eq!(serde_json::to_string(&profile).unwrap(), alone);
        assert_eq!(serde_json::from_str::<Profile>(alone).unwrap(), profile);
        profile.replica = Some("profile-2".to_owned());
        assert!(serde_json::to_string(&profile).unwrap().ends_with(r#","replica":"profile-2"}"#));
    }
}
