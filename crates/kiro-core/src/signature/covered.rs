//! Which components must a signature cover, given what is there?
//!
//! Signer and verifier both ask here, so they can't differ. What is not fit to be signed (a value outside ASCII, a field of
//! ours twice) is an error at either end.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::base::{Line, Value};
use super::{BodyProof, CONTENT_DIGEST, Head, SIGNATURE, SIGNATURE_INPUT, digest};
use crate::fields::{self, BODY_STREAM, COVERED_FIELDS, COVERED_FIELDS_COUNT};

/// The derived components, always covered.
pub(super) const DERIVED: [&str; 4] = ["@method", "@authority", "@path", "@query"];

const COMPONENTS_MAX: usize = DERIVED.len() + COVERED_FIELDS_COUNT + 1;

/// What the signature of a head covers.
#[derive(Debug)]
pub(super) struct Covered<'h> {
    lines: [Option<Line<'h>>; COMPONENTS_MAX],
    headers: &'h HeaderMap,
}

impl<'h> Covered<'h> {
    /// The components of a head, or why it can't be signed.
    pub(super) fn by_head(head: &Head<'h>, headers: &'h HeaderMap) -> Result<Self, &'static str> {
        let [method, authority, path, query] = derived(head)?;
        let [host, body, upgrade, interim, deadline] = own_fields(headers)?;
        let digest = field(headers, &CONTENT_DIGEST)?;
        let lines = [method, authority, path, query, host, body, upgrade, interim, deadline, digest];
        Ok(Self { lines, headers })
    }

    pub(super) fn lines(&self) -> impl Iterator<Item = &Line<'h>> + Clone {
        self.lines.iter().flatten()
    }

    /// What the covered fields say about the body.
    pub(super) fn body(&self) -> Result<BodyProof, &'static str> {
        let [_method, _authority, _path, _query, _host, body, _upgrade, _interim, _deadline, digest] =
            &self.lines;
        match body {
            Some(Line { value: Value::Text(text), .. }) if *text == BODY_STREAM.as_bytes() => {
                Ok(BodyProof::Trailers)
            }
            Some(_) => Err("x-kiro-body has a value that is not ours"),
            None if digest.is_some() => digest::sha256_of(self.headers).map(BodyProof::Digest),
            None => Ok(BodyProof::Empty),
        }
    }
}

fn derived<'h>(head: &Head<'h>) -> Result<[Option<Line<'h>>; 4], &'static str> {
    let query = head.query.unwrap_or_default();
    if !is_graphic(head.method) || head.method.is_empty() {
        return Err("@method is empty or not plain ASCII");
    }
    let is_name =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    if !head.authority.bytes().all(is_name) || head.authority.is_empty() {
        return Err("@authority is not a bare name in lower case");
    }
    if !is_graphic(head.path) || head.path.is_empty() {
        return Err("@path is empty or not plain ASCII");
    }
    if !is_graphic(query) {
        return Err("@query is not plain ASCII");
    }
    let values = [
        Value::Text(head.method.as_bytes()),
        Value::Text(head.authority.as_bytes()),
        Value::Text(head.path.as_bytes()),
        Value::Query(query),
    ];
    let mut lines = [None; 4];
    for ((line, name), value) in lines.iter_mut().zip(DERIVED).zip(values) {
        *line = Some(Line { name, value });
    }
    Ok(lines)
}

/// Our own fields that are there. One that no sidecar may set would pass unsigned, so it is refused.
fn own_fields(headers: &HeaderMap) -> Result<[Option<Line<'_>>; COVERED_FIELDS_COUNT], &'static str> {
    let mut lines = [None; COVERED_FIELDS_COUNT];
    let mut unsigned = headers.keys().filter(|name| fields::is_own(name)).count();
    if unsigned == 0 {
        return Ok(lines);
    }
    for (line, name) in lines.iter_mut().zip(&COVERED_FIELDS) {
        let mut values = headers.get_all(name).iter();
        let Some(value) = values.next() else { continue };
        if values.next().is_some() {
            return Err("a field of the mesh's own is there twice");
        }
        *line = Some(Line { name: name.as_str(), value: Value::Text(plain(value)?) });
        unsigned -= 1;
    }
    if unsigned > 0 {
        return Err("a field of the mesh's own is there that a caller may not set");
    }
    Ok(lines)
}

/// The components of trailers: the digest first, then all others by name. Signatures can't cover themselves; those of
/// applications go uncovered, as they do in a head.
pub(super) fn by_trailers(trailers: &HeaderMap) -> Result<Vec<Line<'_>>, &'static str> {
    let digest = field(trailers, &CONTENT_DIGEST)?.ok_or("the trailers have no content-digest")?;
    let is_other =
        |name: &&HeaderName| **name != CONTENT_DIGEST && **name != SIGNATURE_INPUT && **name != SIGNATURE;
    let mut names: Vec<&HeaderName> = trailers.keys().filter(is_other).collect();
    names.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
    let mut lines = Vec::with_capacity(1 + names.len());
    lines.push(digest);
    for name in names {
        lines.extend(field(trailers, name)?);
    }
    Ok(lines)
}

/// A field with all its lines, where it is there.
fn field<'h>(headers: &'h HeaderMap, name: &'h HeaderName) -> Result<Option<Line<'h>>, &'static str> {
    let mut values = headers.get_all(name).iter();
    let Some(first) = values.next() else { return Ok(None) };
    let mut value = Value::Text(plain(first)?);
    for further in values {
        plain(further)?;
        value = Value::Field(headers);
    }
    Ok(Some(Line { name: name.as_str(), value }))
}

/// A value without the whitespace round it. `HeaderValue` has no line ends and no control characters; what it may have beyond
/// ASCII is obs-text, which no two parties need read alike.
fn plain(value: &HeaderValue) -> Result<&[u8], &'static str> {
    let bytes = value.as_bytes();
    if bytes.is_ascii() { Ok(bytes.trim_ascii()) } else { Err("a field's value is not plain ASCII") }
}

fn is_graphic(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}
