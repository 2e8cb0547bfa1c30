//! Of which calls does another service get a copy?

use crate::identity::ServiceName;
use crate::shaping::Mirror;

/// One line of `mirrors:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorLine {
    /// The service whose calls are copied.
    pub to: ServiceName,
    /// Where the copies go.
    pub mirror: Mirror<ServiceName>,
}
