//! Which calls are to go wrong on purpose?

use super::traffic::names;
use crate::identity::ServiceName;
use crate::path::PathPattern;
use crate::shaping::Fault;

/// One line of `faults:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultLine {
    /// Whose calls; none: everybody's.
    pub from: Option<ServiceName>,
    /// To whom.
    pub to: ServiceName,
    /// With these methods; none: with every one.
    pub methods: Option<Vec<String>>,
    /// On these paths; none: on every one.
    pub paths: Option<Vec<PathPattern>>,
    /// What goes wrong.
    pub fault: Fault,
}

impl FaultLine {
    /// Whether it is about calls of this service.
    #[must_use]
    pub fn is_about(&self, caller: &ServiceName) -> bool {
        self.to != *caller && self.from.as_ref().is_none_or(|from| from == caller)
    }

    /// Whether it is about a request with this method on this raw path.
    #[must_use]
    pub fn fits(&self, method: &str, raw_path: &str) -> bool {
        self.methods.as_ref().is_none_or(|methods| names(methods, method))
            && self.paths.as_ref().is_none_or(|paths| paths.iter().any(|path| path.matches(raw_path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_about_the_calls_that_it_names() {
        let name = |text: &str| ServiceName::parse(text).unwrap();
        let line = |from: Option<&str>, methods: Option<&str>, path: Option<&str>| FaultLine {
            from: from.map(name),
            to: name("profile"),
            methods: methods.map(|method| vec![method.to_owned()]),
            paths: path.map(|path| vec![PathPattern::parse(path).unwrap()]),
            fault: Fault::default(),
        };
        let of_one = line(Some("dashboard"), None, None);
        assert_eq!(
            ["dashboard", "auth", "profile"].map(|who| of_one.is_about(&name(who))),
            [true, false, false]
        );
        let of_all = line(None, Some("GET"), Some("/a/*"));
        assert_eq!(
            ["dashboard", "auth", "profile"].map(|who| of_all.is_about(&name(who))),
            [true, true, false]
        );
        let calls = [("GET", "/a/b"), ("HEAD", "/a/b"), ("POST", "/a/b"), ("GET", "/b")];
        assert_eq!(calls.map(|(method, path)| of_all.fits(method, path)), [true, true, false, false]);
        assert!(of_one.fits("POST", "/b"));
    }
}
