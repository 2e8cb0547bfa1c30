//! Which header fields are Kiro's own, and who may set each of them?
//!
//! One table answers, and everything else that needs to know is derived from it: what a sidecar strips from applications and
//! from outside, and what the signature between sidecars covers.

use http::HeaderName;

/// The prefix that is ours alone; a field with it that is not in [`OWN_FIELDS`] may be set by nobody.
pub const PREFIX: &str = "x-kiro-";

/// The Host that the application asked for, where it differs from the service's name.
pub const HOST: HeaderName = HeaderName::from_static("x-kiro-host");
/// `stream`: a body follows, and ends with a trailer signature.
pub const BODY: HeaderName = HeaderName::from_static("x-kiro-body");
/// `websocket`: the request is the handshake of an upgrade.
pub const UPGRADE: HeaderName = HeaderName::from_static("x-kiro-upgrade");
/// `103`: the caller takes interim answers.
pub const INTERIM: HeaderName = HeaderName::from_static("x-kiro-interim");
/// How many milliseconds are left until the caller gives up; between sidecars, and both ways between a sidecar and its application, which
/// passes on what it was given, or wishes for less.
pub const DEADLINE: HeaderName = HeaderName::from_static("x-kiro-deadline");
/// The service that called, as its sidecar proved it.
pub const CALLER: HeaderName = HeaderName::from_static("x-kiro-caller");
/// The code of a refusal.
pub const REJECT: HeaderName = HeaderName::from_static("x-kiro-reject");

/// The one value of [`BODY`].
pub const BODY_STREAM: &str = "stream";

/// Who may set a field; from anybody else it is stripped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetBy {
    /// The caller's sidecar, in a request to the callee's; the signature covers it.
    CallerSidecar,
    /// The same, and an application in a request to its own sidecar, which takes it for a wish.
    AppAndCallerSidecar,
    /// The callee's sidecar, in a request to its application.
    CalleeSidecarToApp,
    /// A sidecar, in a response.
    SidecarInResponse,
}

/// A field of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnField {
    /// In lower case.
    pub name: &'static str,
    /// Who may set it.
    pub set_by: SetBy,
}

/// Every field of our own.
pub const OWN_FIELDS: &[OwnField] = &[
    OwnField { name: "x-kiro-host", set_by: SetBy::CallerSidecar },
    OwnField { name: "x-kiro-body", set_by: SetBy::CallerSidecar },
    OwnField { name: "x-kiro-upgrade", set_by: SetBy::CallerSidecar },
    OwnField { name: "x-kiro-interim", set_by: SetBy::CallerSidecar },
    OwnField { name: "x-kiro-deadline", set_by: SetBy::AppAndCallerSidecar },
    OwnField { name: "x-kiro-caller", set_by: SetBy::CalleeSidecarToApp },
    OwnField { name: "x-kiro-reject", set_by: SetBy::SidecarInResponse },
];

/// How many fields a signature may cover beside what every request has.
pub const COVERED_FIELDS_COUNT: usize = 5;

/// The fields that a signature covers where they are present, in the order in which it lists them. A `static`, so that
/// lookups borrow the names instead of making them anew.
pub static COVERED_FIELDS: [HeaderName; COVERED_FIELDS_COUNT] = [HOST, BODY, UPGRADE, INTERIM, DEADLINE];

/// Whether a field is ours, known or not. A spelling with `_` counts as well: CGI, and all that took its variables over, knows no
/// difference between `x_kiro_caller` and `x-kiro-caller`.
#[must_use]
pub fn is_own(name: &HeaderName) -> bool {
    has_prefix(name, PREFIX)
}

/// Whether a field's name begins with `prefix`, `_` read as `-`.
#[must_use]
pub fn has_prefix(name: &HeaderName, prefix: &str) -> bool {
    let (name, prefix) = (name.as_str().as_bytes(), prefix.as_bytes());
    name.len() >= prefix.len()
        && name.iter().zip(prefix).all(|(have, want)| have == want || (*have == b'_' && *want == b'-'))
}

/// Whether the caller's sidecar may set a field, and then signs it.
#[must_use]
pub fn is_covered(name: &HeaderName) -> bool {
    COVERED_FIELDS.contains(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covered_fields_are_those_that_the_callers_sidecar_sets() {
        let in_table: Vec<&str> = OWN_FIELDS
            .iter()
            .filter(|field| matches!(field.set_by, SetBy::CallerSidecar | SetBy::AppAndCallerSidecar))
            .map(|field| field.name)
            .collect();
        let covered: Vec<&str> = COVERED_FIELDS.iter().map(HeaderName::as_str).collect();
        assert_eq!(covered, in_table);
    }

    #[test]
    fn every_constant_stands_in_the_table() {
        let constants = [HOST, BODY, UPGRADE, INTERIM, DEADLINE, CALLER, REJECT];
        let in_table: Vec<&str> = OWN_FIELDS.iter().map(|field| field.name).collect();
        assert_eq!(constants.each_ref().map(HeaderName::as_str).as_slice(), in_table);
    }

    #[test]
    fn ours_is_whatever_has_the_prefix() {
        for (name, own, covered) in [
            ("x-kiro-host", true, true),
            ("X-Kiro-Body", true, true),
            ("x-kiro-caller", true, false),
            ("x-kiro-future", true, false),
            ("X_Kiro_Caller", true, false),
            ("x-kiro_host", true, false),
            ("x-kiro", false, false),
            ("x-kirosene", false, false),
            ("host", false, false),
        ] {
            let name: HeaderName = name.parse().unwrap();
            assert_eq!((is_own(&name), is_covered(&name)), (own, covered), "{name}");
        }
    }
}
