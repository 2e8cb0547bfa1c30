//! Which trailers can be carried on?
//!
//! Not those that RFC 9110 6.5.1 forbids ([`clean`]), and in HTTP/1.1 those that the head has named in `Trailer`, and towards a client only where it has asked for trailers (`TE: trailers`, RFC 9110
//! 6.5.1, 10.1.4). The HTTP library drops the others without a word; here they are dropped where they can be counted.

use http::header::{self, CONNECTION, CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName};
use kiro_core::fields;

use crate::body::BodyError;
use crate::header_size;
use crate::headers::{HTTP2_SETTINGS, KEEP_ALIVE, PROXY_CONNECTION, retain};
use crate::metrics::Metrics;

/// Takes out of trailers what no trailer may say, on any way (RFC 9110 6.5.1): our own fields, what frames or routes a message, who
/// sent it and by which way it came. A receiver that merges trailers into the head must not be told by them what the head was not
/// allowed to say, and the HTTP/2 library does not send those of one hop.
pub(crate) fn clean(trailers: &mut HeaderMap) {
    static NEVER: [HeaderName; 17] = [
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        HTTP2_SETTINGS,
        UPGRADE,
        TRANSFER_ENCODING,
        TE,
        TRAILER,
        CONTENT_LENGTH,
        HOST,
        header::AUTHORIZATION,
        header::PROXY_AUTHORIZATION,
        header::COOKIE,
        header::SET_COOKIE,
        header::FORWARDED,
        HeaderName::from_static("traceparent"),
        HeaderName::from_static("tracestate"),
    ];
    retain(trailers, |name| {
        !fields::is_own(name) && !fields::has_prefix(name, "x-forwarded-") && !NEVER.contains(name)
    });
}

/// Trailers that can travel on.
pub(crate) fn carried(trailers: HeaderMap, limit: usize) -> Result<HeaderMap, BodyError> {
    match header_size::check(&trailers, limit) {
        Ok(()) => Ok(trailers),
        Err(_) => Err(BodyError::TooLarge),
    }
}

/// The trailers that a message may end with.
#[derive(Debug, Default)]
pub(crate) struct Named(Vec<HeaderName>);

impl Named {
    /// What a head names.
    pub(crate) fn by(head: &HeaderMap) -> Self {
        if !head.contains_key(TRAILER) {
            return Self::default();
        }
        let names =
            head.get_all(TRAILER).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
        Self(names.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()).collect())
    }

    /// What an answer's head names, to a client that has asked for it.
    pub(crate) fn to_client(answer: &HeaderMap, asked: bool) -> Self {
        if asked { Self::by(answer) } else { Self::default() }
    }

    /// Takes the others out, and counts them.
    pub(crate) fn keep(&self, trailers: &mut HeaderMap, metrics: &Metrics) {
        let dropped: Vec<HeaderName> =
            trailers.keys().filter(|name| !self.0.contains(name)).cloned().collect();
        for name in dropped {
            trailers.remove(name);
            metrics.trailers_dropped();
        }
    }
}

/// Whether a client asks for trailers.
pub(crate) fn are_asked_for(request: &HeaderMap) -> bool {
    let token = |value: &[u8]| {
        let name = value.split(|&byte| byte == b';').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"trailers")
    };
    request.contains_key(TE)
        && request.get_all(TE).iter().any(|value| value.as_bytes().split(|&byte| byte == b',').any(token))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn head(name: HeaderName, values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn what_the_head_names_may_come() {
        let names = |values| Named::by(&head(TRAILER, values)).0;
        assert_eq!(names(&[]), [] as [HeaderName; 0]);
        assert_eq!(names(&["a, B ,c"]), ["a", "b", "c"]);
        assert_eq!(names(&["a", "b"]), ["a", "b"]);
        assert_eq!(names(&["a,,b c"]), ["a"]);
        let answer = head(TRAILER, &["a"]);
        assert_eq!(Named::to_client(&answer, true).0, ["a"]);
        assert_eq!(Named::to_client(&answer, false).0, [] as [HeaderName; 0]);
    }

    #[test]
    fn a_client_asks_in_te() {
        for (values, asked) in [
            (&[] as &[&'static str], false),
            (&["trailers"], true),
            (&["gzip", "Trailers"], true),
            (&["gzip, trailers;q=0.5"], true),
            (&["trailersx"], false),
        ] {
            assert_eq!(are_asked_for(&head(TE, values)), asked, "{values:?}");
        }
    }
}
