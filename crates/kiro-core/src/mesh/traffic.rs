//! How are calls to a service made?

use std::time::Duration;

use crate::breaker::BreakerSettings;
use crate::concurrency::ConcurrencySettings;
use crate::path::PathPattern;
use crate::retry::RetryPolicy;

/// `traffic:`
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Traffic {
    /// How long a caller waits for the answer's head, with all attempts.
    pub timeout: Timeout,
    /// What is tried again though the service may have processed it; nothing by default, since only the service's owner knows
    /// what may be done twice.
    pub retries: Option<RetryPolicy>,
    /// Whether a service that fails is left alone for a while.
    pub breaker: Option<BreakerSettings>,
    /// How many requests its application has under way at a time; without it, as many as come.
    pub concurrency: Option<ConcurrencySettings>,
    /// What holds for some requests alone; the first route that fits counts.
    pub routes: Vec<Route>,
}

/// What holds for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms<'t> {
    /// How long its caller waits for the answer's head, with all attempts.
    pub timeout: Timeout,
    /// What is tried again though the service may have processed it.
    pub retries: Option<&'t RetryPolicy>,
}

impl Traffic {
    /// The terms of a request with this method on this raw path.
    #[must_use]
    pub fn terms(&self, method: &str, raw_path: &str) -> Terms<'_> {
        let route = self.routes.iter().find(|route| route.fits(method, raw_path));
        let retries = route.and_then(|route| route.retries.as_ref()).or(self.retries.as_ref());
        Terms {
            timeout: route.and_then(|route| route.timeout).unwrap_or(self.timeout),
            retries: retries.filter(|retries| retries.is_declared()),
        }
    }
}

impl Route {
    fn fits(&self, method: &str, raw_path: &str) -> bool {
        let named = |methods: &Vec<String>| names(methods, method);
        let on = |paths: &Vec<PathPattern>| paths.iter().any(|pattern| pattern.matches(raw_path));
        self.methods.as_ref().is_none_or(named) && self.paths.as_ref().is_none_or(on)
    }
}

/// Whether a list of methods names one; GET means HEAD too, as in `allow`.
pub(super) fn names(methods: &[String], method: &str) -> bool {
    methods.iter().any(|named| named == method || (named == "GET" && method == "HEAD"))
}

/// `traffic.timeout:`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// For ever.
    Off,
    /// So long.
    After(Duration),
}

impl Default for Timeout {
    /// 15 seconds, as Envoy and Kuma have it: longer than any call that a person waits for, shorter than a client's patience.
    fn default() -> Self {
        Self::After(Duration::from_secs(15))
    }
}

/// One of `traffic.routes:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Requests with these methods; none: with every one.
    pub methods: Option<Vec<String>>,
    /// On these paths; none: on every one.
    pub paths: Option<Vec<PathPattern>>,
    /// Instead of the service's own.
    pub timeout: Option<Timeout>,
    /// Instead of the service's own; undeclared where the route takes that back.
    pub retries: Option<RetryPolicy>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retry::RetrySettings;

    fn after(seconds: u64) -> Timeout {
        Timeout::After(Duration::from_secs(seconds))
    }

    fn policy(retries: u32) -> RetryPolicy {
        RetryPolicy::new(RetrySettings { retries, ..RetrySettings::default() }).unwrap()
    }

    #[test]
    fn the_first_route_that_fits_counts() {
        let route = |methods: Option<&str>, path: Option<&str>, timeout, retries: Option<u32>| Route {
            methods: methods.map(|method| vec![method.to_owned()]),
            paths: path.map(|path| vec![PathPattern::parse(path).unwrap()]),
            timeout,
            retries: retries.map(|count| match count {
                0 => RetryPolicy::undeclared(),
                retries => policy(retries),
            }),
        };
        let traffic = Traffic {
            timeout: after(2),
            retries: Some(policy(3)),
            routes: vec![
                route(Some("GET"), Some("/reports/**"), Some(after(30)), None),
                route(None, Some("/reports/**"), Some(Timeout::Off), Some(0)),
                route(Some("PUT"), None, None, Some(1)),
            ],
            ..Traffic::default()
        };
        let terms = |method, path| {
            let terms = traffic.terms(method, path);
            (terms.timeout, terms.retries.map(|policy| policy.settings().retries))
        };
        assert_eq!(terms("GET", "/reports/1"), (after(30), Some(3)));
        assert_eq!(terms("HEAD", "/reports/1"), (after(30), Some(3)));
        assert_eq!(terms("POST", "/reports/1"), (Timeout::Off, None));
        assert_eq!(terms("PUT", "/x"), (after(2), Some(1)));
        assert_eq!(terms("GET", "/x"), (after(2), Some(3)));
    }
}
