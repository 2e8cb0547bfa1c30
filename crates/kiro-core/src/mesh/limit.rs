//! How many requests may an edge carry?

use http::HeaderName;

use super::traffic::names;
use crate::identity::ServiceName;
use crate::path::PathPattern;
use crate::rate::{PolicyName, RateSettings};

/// One line of `limits:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLine {
    /// What answers, log and metrics call it; no two lines have the same.
    pub name: PolicyName,
    /// Whose requests count.
    pub from: LimitedSource,
    /// To whom. Its sidecar counts.
    pub to: ServiceName,
    /// With these methods; none: with every one.
    pub methods: Option<Vec<String>>,
    /// On these paths; none: on every one.
    pub paths: Option<Vec<PathPattern>>,
    /// How many may pass.
    pub rate: RateSettings,
    /// What has a share of its own; none: all that the line is about share one.
    pub per: Option<Per>,
    /// Where it stands in the file, from 1.
    pub line: usize,
}

/// The caller in a line of `limits`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LimitedSource {
    /// `"*"`: everybody, outside clients too.
    Anybody,
    /// Outside the mesh.
    Ingress,
    /// A service of the mesh.
    Service(ServiceName),
}

/// `per:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Per {
    /// Each service that calls.
    Service,
    /// Each path, without its query.
    Path,
    /// Each value of a header field. Requests without it share one.
    Header(HeaderName),
}

impl RateLine {
    /// Whether a request counts; `caller` is none for outside clients.
    ///
    /// A path that can be read in two ways (`//`, `%2F`) counts on every path: else whoever writes it so would get round the limit.
    #[must_use]
    pub fn fits(&self, caller: Option<&ServiceName>, method: &str, raw_path: &str, ambiguous: bool) -> bool {
        let by = match &self.from {
            LimitedSource::Anybody => true,
            LimitedSource::Ingress => caller.is_none(),
            LimitedSource::Service(service) => caller == Some(service),
        };
        let named = |methods: &Vec<String>| names(methods, method);
        let on =
            |paths: &Vec<PathPattern>| ambiguous || paths.iter().any(|pattern| pattern.matches(raw_path));
        by && self.methods.as_ref().is_none_or(named) && self.paths.as_ref().is_none_or(on)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_counts_what_it_names() {
        let line = RateLine {
            name: PolicyName::new("a").unwrap(),
            from: LimitedSource::Anybody,
            to: ServiceName::parse("callee").unwrap(),
            methods: Some(vec!["GET".to_owned()]),
            paths: Some(vec![PathPattern::parse("/a/*").unwrap()]),
            rate: RateSettings::new(1, Duration::from_secs(1), None).unwrap(),
            per: None,
            line: 1,
        };
        let caller = ServiceName::parse("caller").unwrap();
        let other = ServiceName::parse("other").unwrap();
        let counts = |line: &RateLine, caller| line.fits(caller, "GET", "/a/1", false);
        assert!(counts(&line, None) && counts(&line, Some(&caller)));
        let ingress = RateLine { from: LimitedSource::Ingress, ..line.clone() };
        assert!(counts(&ingress, None) && !counts(&ingress, Some(&caller)));
        let service = RateLine { from: LimitedSource::Service(caller.clone()), ..line.clone() };
        assert!(
            !counts(&service, None) && counts(&service, Some(&caller)) && !counts(&service, Some(&other))
        );
        assert!(line.fits(None, "HEAD", "/%61/1", false));
        assert!(!line.fits(None, "POST", "/a/1", false));
        assert!(!line.fits(None, "GET", "/b/1", false));
        assert!(line.fits(None, "GET", "//a/1", true));
    }
}
