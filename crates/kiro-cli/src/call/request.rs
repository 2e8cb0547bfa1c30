//! How does a command line become a request to the sidecar's outbound port?

use std::io::Read as _;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HOST, USER_AGENT};
use http::uri::Scheme;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::Full;

use crate::failure::{Failure, USAGE};

/// The request, in curl's words.
// clap names a group after the struct, and there may be but one `Arguments`.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Arguments {
    /// For example http://auth/verify: the host is a service's name. Plain `http`, the sidecars encrypt.
    url: String,
    /// The method [default: GET, or POST with data].
    #[arg(short = 'X', long = "request", value_name = "METHOD")]
    method: Option<Method>,
    /// A header field, `Name: value`; may stand several times.
    #[arg(short = 'H', long = "header", value_name = "FIELD")]
    headers: Vec<String>,
    /// The body; `@-` takes it from stdin. Its type is application/json unless a header says otherwise.
    #[arg(short = 'd', long, value_name = "DATA")]
    data: Option<String>,
}

/// A body from stdin: this is for looking at the mesh, not for moving files.
const STDIN_BYTES_MAX: u64 = 16 * 1024 * 1024;

impl Arguments {
    /// The request, in absolute form as proxies are asked.
    pub(crate) fn request(&self) -> Result<Request<Full<Bytes>>, Failure> {
        let uri = uri(&self.url)?;
        let body = self.body()?;
        let default = if self.data.is_some() { Method::POST } else { Method::GET };
        let method = self.method.clone().unwrap_or(default);
        if method == Method::CONNECT {
            return Err(Failure::new(
                USAGE,
                "CONNECT opens a tunnel, which this is not for",
                "leave -X CONNECT out",
            ));
        }
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let mut request = Request::new(Full::new(body));
        *request.headers_mut() = self.fields(authority)?;
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        Ok(request)
    }

    fn fields(&self, authority: &str) -> Result<HeaderMap, Failure> {
        let mut fields = HeaderMap::new();
        for field in &self.headers {
            let (name, value) = header(field).ok_or_else(|| {
                Failure::new(USAGE, format!("`{field}` is no header field"), "write it as -H 'Name: value'")
            })?;
            fields.append(name, value);
        }
        let host = HeaderValue::from_str(authority).map_err(|_| {
            Failure::new(USAGE, format!("`{authority}` is no host"), "write a service's name")
        })?;
        let agent = HeaderValue::from_static(concat!("kiro-call/", env!("CARGO_PKG_VERSION")));
        let json =
            self.data.is_some().then_some((CONTENT_TYPE, HeaderValue::from_static("application/json")));
        let defaults = [(HOST, host), (USER_AGENT, agent), (ACCEPT, HeaderValue::from_static("*/*"))];
        for (name, value) in defaults.into_iter().chain(json) {
            fields.entry(name).or_insert(value);
        }
        Ok(fields)
    }

    fn body(&self) -> Result<Bytes, Failure> {
        match self.data.as_deref() {
            None => Ok(Bytes::new()),
            Some("@-") => {
                let mut data = Vec::new();
                let read = std::io::stdin().lock().take(STDIN_BYTES_MAX + 1).read_to_end(&mut data);
                read.map_err(|error| Failure::new(USAGE, format!("stdin: {error}"), "give it a body"))?;
                if data.len() as u64 > STDIN_BYTES_MAX {
                    let what = format!("the body is over {} MiB", STDIN_BYTES_MAX >> 20);
                    return Err(Failure::new(USAGE, what, "send a smaller one"));
                }
                Ok(data.into())
            }
            Some(data) => Ok(Bytes::copy_from_slice(data.as_bytes())),
        }
    }
}

fn uri(url: &str) -> Result<Uri, Failure> {
    let wrong =
        |what: String| Err(Failure::new(USAGE, what, "write http://SERVICE/PATH, as in http://auth/verify"));
    let with_scheme = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    match with_scheme.parse::<Uri>() {
        Ok(uri) if uri.scheme() == Some(&Scheme::HTTP) && uri.authority().is_some() => Ok(uri),
        Ok(uri) if uri.scheme() == Some(&Scheme::HTTPS) => {
            wrong(format!("{url}: the sidecars encrypt, and must see the request to judge it"))
        }
        Ok(_) => wrong(format!("{url}: not a URL that a sidecar takes")),
        Err(error) => wrong(format!("{url}: {error}")),
    }
}

fn header(field: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = field.split_once(':')?;
    let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
    Some((name, HeaderValue::from_str(value.trim()).ok()?))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        what: Arguments,
    }

    fn made(line: &[&str]) -> Result<Request<Full<Bytes>>, Failure> {
        Line::try_parse_from([&["call"], line].concat()).unwrap().what.request()
    }

    #[track_caller]
    fn check(line: &[&str], method: &str, target: &str, fields: &[(&str, &str)]) {
        let request = made(line).unwrap();
        assert_eq!((request.method().as_str(), request.uri().to_string().as_str()), (method, target));
        for (name, value) in fields {
            let found: Vec<_> =
                request.headers().get_all(*name).iter().map(|v| v.to_str().unwrap()).collect();
            assert_eq!(found.join(" + "), *value, "{name}");
        }
    }

    #[test]
    fn the_url_is_sent_in_absolute_form_and_untouched() {
        check(&["http://auth/verify?a=%61&b"], "GET", "http://auth/verify?a=%61&b", &[("host", "auth")]);
        check(&["profile/a//b"], "GET", "http://profile/a//b", &[("host", "profile")]);
        check(&["http://PROFILE:81"], "GET", "http://PROFILE:81/", &[("host", "PROFILE:81")]);
        check(&["http://profile/x/../y", "-X", "PURGE"], "PURGE", "http://profile/x/../y", &[]);
    }

    #[test]
    fn data_makes_a_post_of_json_unless_told_otherwise() {
        check(
            &["auth/verify", "-d", "{}"],
            "POST",
            "http://auth/verify",
            &[("content-type", "application/json")],
        );
        check(
            &["auth/v", "-d", "a=1", "-X", "PUT", "-H", "Content-Type: text/plain"],
            "PUT",
            "http://auth/v",
            &[("content-type", "text/plain")],
        );
        check(&["auth/v"], "GET", "http://auth/v", &[("content-type", "")]);
    }

    #[test]
    fn fields_are_sent_as_often_as_they_are_given_and_may_lie_about_the_host() {
        check(
            &["auth/v", "-H", "x-a: 1", "-H", "X-A:2", "-H", "host: profile"],
            "GET",
            "http://auth/v",
            &[("x-a", "1 + 2"), ("host", "profile")],
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, what) in [
            (&["https://auth/"][..], "the sidecars encrypt"),
            (&["ftp://auth/"], "not a URL"),
            (&["http:///x"], "http:///x"),
            (&["auth/", "-H", "no colon"], "`no colon` is no header field"),
            (&["auth/", "-H", "bad name: x"], "`bad name: x` is no header field"),
            (&["auth/", "-X", "CONNECT"], "CONNECT opens a tunnel"),
        ] {
            let failure = made(line).unwrap_err();
            assert_eq!(failure.code, USAGE);
            assert!(failure.what.contains(what), "{failure:?}");
        }
    }
}
