//! Which member of `signature-input` and `signature` is ours?
//!
//! Nearly always a field has one line with nothing but our member in it, and that is seen at a glance. Where applications sign
//! as well, the dictionaries (RFC 9651 3.2) are walked. Each line is walked by itself: a line that is no dictionary belongs to
//! somebody's older scheme and is stepped over, unless it begins with our label or our member stands in it.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::scan::{Malformed, Scanner};
use super::{Form, LABEL, LABEL_PREFIX, SIGNATURE, SIGNATURE_INPUT, SignatureError};

/// Our member of both fields, each without its label.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ours<'h> {
    pub(super) input: &'h [u8],
    pub(super) signature: &'h [u8],
}

/// Our signature, where there is one.
pub(super) fn find(headers: &HeaderMap) -> Result<Option<Ours<'_>>, SignatureError> {
    let input = find_member(headers, &SIGNATURE_INPUT, "signature-input")?;
    let signature = find_member(headers, &SIGNATURE, "signature")?;
    Ok(input.zip(signature).map(|(input, signature)| Ours { input, signature }))
}

/// Whether the message carries something under our label or one of our tags.
pub(super) fn is_used(headers: &HeaderMap) -> bool {
    [&SIGNATURE_INPUT, &SIGNATURE].into_iter().any(|name| {
        let seen = walk(headers, name);
        seen.map_or(true, |seen| seen.ours.is_some() || seen.tagged)
    })
}

fn find_member<'h>(
    headers: &'h HeaderMap,
    name: &HeaderName,
    what: &'static str,
) -> Result<Option<&'h [u8]>, SignatureError> {
    let mut lines = headers.get_all(name).iter();
    let Some(first) = lines.next() else { return Ok(None) };
    if lines.next().is_none()
        && let Some(value) = alone(first)
    {
        return Ok(Some(value));
    }
    let seen = walk(headers, name).map_err(|Malformed| SignatureError::Malformed(what))?;
    if seen.ours.is_some() && (seen.tagged || seen.again) {
        return Err(SignatureError::Duplicate);
    }
    Ok(seen.ours)
}

/// Our member's value if the line has nothing else: members are separated by commas, and ours has none.
fn alone(line: &HeaderValue) -> Option<&[u8]> {
    line.as_bytes().strip_prefix(LABEL_PREFIX).filter(|value| !value.contains(&b','))
}

/// What a walk over all lines of a field saw.
#[derive(Default)]
struct Seen<'h> {
    ours: Option<&'h [u8]>,
    /// Our label stood there more than once.
    again: bool,
    /// One of our tags stood under another label.
    tagged: bool,
}

fn walk<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Seen<'h>, Malformed> {
    let mut seen = Seen::default();
    for line in headers.get_all(name) {
        let mut is_ours = line.as_bytes().starts_with(LABEL_PREFIX);
        let mut dictionary = Dictionary::new(line.as_bytes());
        loop {
            match dictionary.next_member() {
                Ok(Some(member)) if member.key == LABEL.as_bytes() => {
                    is_ours = true;
                    seen.again |= seen.ours.replace(member.value).is_some();
                }
                Ok(Some(member)) => seen.tagged |= member.tagged,
                Ok(None) => break,
                Err(Malformed) if is_ours => return Err(Malformed),
                Err(Malformed) => break,
            }
        }
    }
    Ok(seen)
}

/// Removes our member from a field and says whether it was there. Lines without it keep every byte.
pub(super) fn remove_ours(headers: &mut HeaderMap, name: &HeaderName) -> bool {
    let mut lines = headers.get_all(name).iter();
    let Some(first) = lines.next() else { return false };
    if lines.next().is_none() && alone(first).is_some() {
        headers.remove(name);
        return true;
    }
    let cuts: Vec<Cut> = headers.get_all(name).iter().map(cut).collect();
    if cuts.iter().all(|cut| matches!(cut, Cut::Nothing)) {
        return false;
    }
    let lines: Vec<HeaderValue> = headers.get_all(name).iter().cloned().collect();
    headers.remove(name);
    for (line, cut) in lines.into_iter().zip(cuts) {
        match cut {
            Cut::Nothing => headers.append(name, line),
            Cut::Rest(rest) => headers.append(name, rest),
            Cut::All => continue,
        };
    }
    true
}

/// What removing our member does to a line.
enum Cut {
    Nothing,
    Rest(HeaderValue),
    All,
}

fn cut(line: &HeaderValue) -> Cut {
    if alone(line).is_some() {
        return Cut::All;
    }
    let mut rest = Vec::new();
    let mut found = false;
    let mut dictionary = Dictionary::new(line.as_bytes());
    loop {
        match dictionary.next_member() {
            Ok(Some(member)) if member.key == LABEL.as_bytes() => found = true,
            Ok(Some(member)) => {
                rest.extend_from_slice(if rest.is_empty() { b"" } else { b", " });
                rest.extend_from_slice(member.text);
            }
            Ok(None) => break,
            Err(Malformed) => return Cut::Nothing,
        }
    }
    match HeaderValue::try_from(rest) {
        _ if !found => Cut::Nothing,
        Ok(rest) if !rest.is_empty() => Cut::Rest(rest),
        Ok(_) | Err(_) => Cut::All,
    }
}

/// A member of a dictionary.
pub(super) struct Member<'a> {
    pub(super) key: &'a [u8],
    /// What follows the `=`, parameters included; empty for a bare key.
    pub(super) value: &'a [u8],
    /// All of it.
    text: &'a [u8],
    /// It carries one of our tags.
    tagged: bool,
}

/// One line of a dictionary.
pub(super) struct Dictionary<'a> {
    scanner: Scanner<'a>,
    is_first: bool,
}

impl<'a> Dictionary<'a> {
    pub(super) fn new(line: &'a [u8]) -> Self {
        let mut scanner = Scanner::new(line);
        scanner.skip_spaces();
        Self { scanner, is_first: true }
    }

    pub(super) fn next_member(&mut self) -> Result<Option<Member<'a>>, Malformed> {
        let scanner = &mut self.scanner;
        if !self.is_first {
            scanner.skip_optional_whitespace();
        }
        if scanner.is_at_end() {
            return Ok(None);
        }
        if !self.is_first {
            scanner.expect(b",")?;
            scanner.skip_optional_whitespace();
        }
        self.is_first = false;
        let start = scanner.rest();
        let key = scanner.key()?;
        let has_value = scanner.eat(b"=");
        let value_start = scanner.rest();
        if has_value {
            if scanner.rest().starts_with(b"(") {
                scanner.skip_inner_list()?
            } else {
                scanner.skip_bare_item()?
            }
        }
        let mut tagged = false;
        scanner.skip_parameters(|key, value| {
            tagged |=
                key == b"tag" && [Form::Head, Form::Trailers].into_iter().any(|form| is_tag(value, form));
        })?;
        let value = if has_value { scanner.since(value_start) } else { b"" };
        Ok(Some(Member { key, value, text: scanner.since(start), tagged }))
    }
}

/// Whether a parameter's raw value is a string with our tag in it; such a string has nothing to escape.
fn is_tag(value: &[u8], form: Form) -> bool {
    let inside = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
    inside == Some(form.tag().as_bytes())
}
