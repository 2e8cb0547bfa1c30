//! What can a person try, and where is its trace? The page at `GET /` of Dashboard.
//!
//! One document with nothing outside it. Style and script stand in it, and its content security policy names them by hash,
//! so that nothing else runs or loads on the page, and what a service answers is shown as text alone.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderName, HeaderValue, Uri};
use sha2::{Digest, Sha256};

use crate::dashboard::TRIES;

const PAGE: &str = include_str!("page/page.html");
const ROW: &str = include_str!("page/row.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// Calls that the services themselves answer: path, and what to expect.
const USERS: &[(&str, &str)] = &[
    ("/dashboard/alice", "Alice is fine: every service answers"),
    ("/dashboard/bob", "Bob is fine too"),
    ("/dashboard/mallory", "Mallory is disabled: Auth says no"),
    ("/dashboard/nobody", "Auth does not know this one"),
    ("/dashboard/Not%20a%20name", "Dashboard asks nobody about a malformed name"),
];

/// Where Jaeger's pages are, for a person's browser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JaegerUi(String);

/// Why an address of Jaeger's pages was not taken.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not the address of a web page: write http://HOST:PORT or https://HOST")]
pub struct BadJaegerUi(String);

impl FromStr for JaegerUi {
    type Err = BadJaegerUi;

    fn from_str(text: &str) -> Result<Self, BadJaegerUi> {
        let uri: Uri = text.parse().map_err(|_| BadJaegerUi(text.to_owned()))?;
        // No other scheme: it becomes a link.
        match uri.scheme_str() {
            Some("http" | "https") if uri.query().is_none() => {
                Ok(Self(text.trim_end_matches('/').to_owned()))
            }
            _ => Err(BadJaegerUi(text.to_owned())),
        }
    }
}

impl fmt::Display for JaegerUi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The page, made once: it is the same for everybody.
#[derive(Clone)]
pub(crate) struct Page {
    html: Bytes,
    policy: HeaderValue,
}

impl Page {
    pub(crate) fn new(jaeger: &JaegerUi) -> Self {
        let refused = TRIES.iter().map(|wanted| (format!("/try/{}", wanted.name), wanted.what));
        let users = USERS.iter().map(|(path, title)| ((*path).to_owned(), *title));
        let rows: String = users.chain(refused).map(|(path, title)| row(&path, title)).collect();
        let html = PAGE
            .replace("{{style}}", STYLE)
            .replace("{{script}}", SCRIPT)
            .replace("{{rows}}", &rows)
            .replace("{{jaeger}}", &escape(&jaeger.0));
        let policy = format!(
            "default-src 'none'; style-src {}; script-src {}; img-src data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hash_source(STYLE),
            hash_source(SCRIPT),
        );
        #[expect(clippy::expect_used, reason = "made of constants and base64 alone, and a test makes one")]
        let policy = HeaderValue::try_from(policy).expect("a policy is ASCII");
        Self { html: html.into(), policy }
    }

    pub(crate) fn response(&self) -> ([(HeaderName, HeaderValue); 5], Bytes) {
        let fields = [
            (CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
            (CONTENT_SECURITY_POLICY, self.policy.clone()),
            (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        ];
        (fields, self.html.clone())
    }
}

fn row(path: &str, title: &str) -> String {
    ROW.replace("{{path}}", &escape(path)).replace("{{title}}", &escape(title))
}

/// What the policy calls an inline element: the hash of exactly what stands between its tags.
fn hash_source(content: &str) -> String {
    format!("'sha256-{}'", STANDARD.encode(Sha256::digest(content)))
}

/// Text for an element or a quoted attribute.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' | '<' | '>' | '"' | '\'' => {
                // Writing to a String does not fail.
                let _ = write!(escaped, "&#{};", u32::from(character));
            }
            plain => escaped.push(plain),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn html(jaeger: &str) -> (String, String) {
        let page = Page::new(&jaeger.parse().unwrap());
        let (_, html) = page.response();
        (String::from_utf8(html.to_vec()).unwrap(), page.policy.to_str().unwrap().to_owned())
    }

    /// What stands between the one pair of these tags.
    fn between<'a>(html: &'a str, open: &str, close: &str) -> &'a str {
        let (_, rest) = html.split_once(open).unwrap();
        rest.split_once(close).unwrap().0
    }

    #[test]
    fn the_policy_names_the_style_and_script_that_stand_in_the_page() {
        let (html, policy) = html("http://localhost:16686");
        for (directive, open, close) in
            [("style-src", "<style>", "</style>"), ("script-src", "<script>", "</script>")]
        {
            let content = between(&html, open, close);
            assert!(policy.contains(&format!("{directive} {}", hash_source(content))), "{policy}");
        }
        assert!(policy.starts_with("default-src 'none'"));
    }

    #[test]
    fn every_try_has_a_row() {
        let (html, _) = html("http://localhost:16686");
        for (path, _) in USERS {
            assert!(html.contains(&format!("data-path=\"{path}\"")), "{path}");
        }
        for wanted in TRIES {
            assert!(html.contains(&format!("data-path=\"/try/{}\"", wanted.name)), "{}", wanted.name);
        }
        assert!(!html.contains("{{"), "a placeholder was left");
    }

    #[test]
    fn links_go_to_jaeger_and_nowhere_else() {
        let (html, _) = html("https://traces.example/jaeger/");
        assert!(html.contains("data-jaeger=\"https://traces.example/jaeger\""));
        for address in html.split("http").skip(1) {
            assert!(address.starts_with("s://traces.example/jaeger\""), "another address: http{address:.40}");
        }
    }

    #[test]
    fn only_the_address_of_a_web_page_becomes_a_link() {
        for text in ["", "javascript:alert(1)", "localhost:16686", "ftp://x", "http://x/?q", "http://a b"] {
            assert!(text.parse::<JaegerUi>().is_err(), "{text}");
        }
        assert_eq!(escape("\"><script>&'"), "&#34;&#62;&#60;script&#62;&#38;&#39;");
    }
}
