//! How is a service's application checked?

use std::fmt;

use crate::health::HealthSettings;

/// `health:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// What its sidecar asks it.
    pub question: Question,
    /// How often, and what makes of answers a state.
    pub settings: HealthSettings,
}

/// What an application is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// A GET for this path, with its query. 2xx and 3xx are well.
    Http(String),
    /// A call of `grpc.health.v1.Health/Check` for this service; for the empty one, of the server as a whole.
    Grpc(String),
    /// Whether it accepts connections.
    Tcp,
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Question::Http(path) => write!(f, "http {path}"),
            Question::Grpc(service) if service.is_empty() => f.write_str("grpc"),
            Question::Grpc(service) => write!(f, "grpc {service}"),
            Question::Tcp => f.write_str("tcp"),
        }
    }
}
