//! Which version of a service gets this request?
//!
//! The rules are `kiro-core`'s; here the services are places among the peers. A header decides before the weights, and a sticky header
//! before chance.

use std::collections::HashMap;

use http::{HeaderMap, HeaderName};
use kiro_core::identity::ServiceName;
use kiro_core::mesh::SplitLine;
use kiro_core::shaping::{self, HeaderRoute, Split};

/// The versions behind a name, as places among the peers.
#[derive(Debug)]
pub(crate) struct Versions {
    name: ServiceName,
    weighed: Split<usize>,
    headers: Box<[HeaderRoute<usize>]>,
    sticky: Option<HeaderName>,
}

impl Versions {
    /// Takes a line of the mesh file over; nothing if this sidecar is one of the versions, which must not call itself.
    pub(crate) fn of(line: &SplitLine, places: &HashMap<ServiceName, usize>) -> Option<Self> {
        let place = |name: &ServiceName| places.get(name).copied();
        let routed = |route: &HeaderRoute<ServiceName>| {
            Some(HeaderRoute { name: route.name.clone(), test: route.test.clone(), to: place(&route.to)? })
        };
        Some(Self {
            name: line.to.clone(),
            weighed: line.versions.map(place)?,
            headers: line.headers.iter().map(routed).collect::<Option<_>>()?,
            sticky: line.sticky.clone(),
        })
    }

    /// The version for a request.
    pub(crate) fn choose(&self, headers: &HeaderMap, random: u64) -> Option<usize> {
        if let Some(version) = shaping::route(&self.headers, headers) {
            return Some(*version);
        }
        let key = self.sticky.as_ref().and_then(|name| headers.get(name));
        let number = key.map_or(random, |key| shaping::sticky_number(self.name.as_str(), key.as_bytes()));
        self.weighed.choose(number).copied()
    }
}
