//! Which version of a service gets a call?

use http::HeaderName;

use crate::identity::ServiceName;
use crate::shaping::{HeaderRoute, Split};

/// One line of `splits:`. Each version is a service of the mesh file, with its own identity and pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitLine {
    /// The name that callers use.
    pub to: ServiceName,
    /// The versions with their weights.
    pub versions: Split<ServiceName>,
    /// Requests that go to one version because of a header, whatever the weights say; the first that fits counts.
    pub headers: Vec<HeaderRoute<ServiceName>>,
    /// Requests with the same value of this header stay with the same version.
    pub sticky: Option<HeaderName>,
}
