//! How is our member of `signature-input` written, and is this it?
//!
//! `("component" …);created=…;expires=…;nonce="…";keyid="…";alg="hmac-sha256";tag="kiro"` for a head; trailers have neither
//! `created` nor `expires`, since a stream may be long and their nonce ties them to a head that was in time. There is this one
//! spelling, so a parameter that is missing, unknown, double or elsewhere is never anything but malformed.

use super::base::Line;
use super::covered::DERIVED;
use super::scan::{Malformed, Scanner};
use super::{ALGORITHM, CONTENT_DIGEST, Form, Nonce, SignatureError};
use crate::fields::COVERED_FIELDS;

/// What an integer of a structured field may hold.
const INTEGER_MAX: u64 = 999_999_999_999_999;

/// A head's parameters.
#[derive(Debug)]
pub(super) struct HeadParameters<'h> {
    pub(super) created: u64,
    pub(super) expires: u64,
    pub(super) key: KeyParameters<'h>,
}

/// The parameters of heads and trailers alike.
#[derive(Debug)]
pub(super) struct KeyParameters<'h> {
    pub(super) nonce: Nonce,
    pub(super) keyid: &'h [u8],
    pub(super) algorithm: &'h [u8],
    pub(super) tag: &'h [u8],
}

impl KeyParameters<'_> {
    pub(super) fn check_algorithm_and_tag(&self, form: Form) -> Result<(), SignatureError> {
        if self.algorithm != ALGORITHM.as_bytes() {
            return Err(SignatureError::WrongAlgorithm);
        }
        if self.tag != form.tag().as_bytes() {
            return Err(SignatureError::Malformed("tag"));
        }
        Ok(())
    }
}

/// The end of our member, the same for all signatures of a connection.
pub(super) fn ending(keyid: &str, form: Form) -> String {
    let tag = form.tag();
    format!("\";keyid=\"{keyid}\";alg=\"{ALGORITHM}\";tag=\"{tag}\"")
}

/// Writes the list of components.
pub(super) fn write_list<'l, 'h: 'l>(
    out: &mut Vec<u8>,
    form: Form,
    lines: impl Iterator<Item = &'l Line<'h>>,
) {
    let mut before = &b"(\""[..];
    for line in lines {
        out.extend_from_slice(before);
        out.extend_from_slice(line.name.as_bytes());
        out.push(b'"');
        out.extend_from_slice(form.suffix().as_bytes());
        before = b" \"";
    }
    out.push(b')');
}

/// Writes a number as [`Scanner::number`] reads it.
pub(super) fn write_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Reads a head's member that must list exactly `lines`.
pub(super) fn parse_head<'h, 'l, 'c: 'l>(
    text: &'h [u8],
    lines: impl Iterator<Item = &'l Line<'c>> + Clone,
) -> Result<HeadParameters<'h>, SignatureError> {
    let mut scanner = Scanner::new(text);
    expect_list(&mut scanner, Form::Head, lines)?;
    let created =
        integer(&mut scanner, b";created=").map_err(|Malformed| SignatureError::Malformed("created"))?;
    let expires =
        integer(&mut scanner, b";expires=").map_err(|Malformed| SignatureError::Malformed("expires"))?;
    Ok(HeadParameters { created, expires, key: key_parameters(&mut scanner)? })
}

/// Reads the trailers' member that must list exactly `lines`.
pub(super) fn parse_trailers<'h>(
    text: &'h [u8],
    lines: &[Line<'_>],
) -> Result<KeyParameters<'h>, SignatureError> {
    let mut scanner = Scanner::new(text);
    expect_list(&mut scanner, Form::Trailers, lines.iter())?;
    key_parameters(&mut scanner)
}

fn key_parameters<'h>(scanner: &mut Scanner<'h>) -> Result<KeyParameters<'h>, SignatureError> {
    let nonce = nonce(scanner).map_err(|Malformed| SignatureError::Malformed("nonce"))?;
    let keyid = string(scanner, b";keyid=\"").map_err(|Malformed| SignatureError::Malformed("keyid"))?;
    let algorithm = string(scanner, b";alg=\"").map_err(|Malformed| SignatureError::Malformed("alg"))?;
    let tag = string(scanner, b";tag=\"").map_err(|Malformed| SignatureError::Malformed("tag"))?;
    if !scanner.is_at_end() {
        return Err(SignatureError::Malformed("more than our parameters"));
    }
    Ok(KeyParameters { nonce, keyid, algorithm, tag })
}

fn nonce(scanner: &mut Scanner<'_>) -> Result<Nonce, Malformed> {
    scanner.expect(b";nonce=\"")?;
    let nonce = scanner.number()?;
    scanner.expect(b"\"")?;
    Ok(Nonce(nonce))
}

fn integer(scanner: &mut Scanner<'_>, name: &[u8]) -> Result<u64, Malformed> {
    scanner.expect(name)?;
    scanner.number().ok().filter(|number| *number <= INTEGER_MAX).ok_or(Malformed)
}

fn string<'h>(scanner: &mut Scanner<'h>, name: &[u8]) -> Result<&'h [u8], Malformed> {
    scanner.expect(name)?;
    scanner.until_quote()
}

fn expect_list<'l, 'h: 'l>(
    scanner: &mut Scanner<'_>,
    form: Form,
    lines: impl Iterator<Item = &'l Line<'h>> + Clone,
) -> Result<(), SignatureError> {
    let mut list = *scanner;
    match match_list(&mut list, form, lines.clone()) {
        Ok(()) => *scanner = list,
        Err(Malformed) => return Err(diagnose(*scanner, form, lines)),
    }
    Ok(())
}

/// The mirror of [`write_list`].
fn match_list<'l, 'h: 'l>(
    scanner: &mut Scanner<'_>,
    form: Form,
    lines: impl Iterator<Item = &'l Line<'h>>,
) -> Result<(), Malformed> {
    let mut before = &b"(\""[..];
    for line in lines {
        scanner.expect(before)?;
        scanner.expect(line.name.as_bytes())?;
        scanner.expect(b"\"")?;
        scanner.expect(form.suffix().as_bytes())?;
        before = b" \"";
    }
    scanner.expect(b")")
}

/// Says what is wrong with a list that is known not to be the right one.
#[cold]
fn diagnose<'l, 'h: 'l>(
    mut scanner: Scanner<'_>,
    form: Form,
    lines: impl Iterator<Item = &'l Line<'h>> + Clone,
) -> SignatureError {
    let Ok(listed) = read_list(&mut scanner) else { return SignatureError::Malformed("component list") };
    let present: Vec<String> = lines.map(|line| format!("\"{}\"{}", line.name, form.suffix())).collect();
    for (index, component) in listed.iter().enumerate() {
        if listed.iter().take(index).any(|earlier| earlier == component) {
            return SignatureError::Component("a component is listed twice");
        }
        if !present.iter().any(|present| present.as_bytes() == *component) {
            return SignatureError::Component(if is_known(component, form) {
                "a field is listed that is not there"
            } else {
                "an unknown component is listed"
            });
        }
    }
    SignatureError::Component(if listed.len() < present.len() {
        "a field is there that is not listed"
    } else {
        "the components are listed in another order"
    })
}

fn read_list<'a>(scanner: &mut Scanner<'a>) -> Result<Vec<&'a [u8]>, Malformed> {
    scanner.expect(b"(")?;
    let mut listed = Vec::new();
    while !scanner.eat(b")") {
        if !listed.is_empty() {
            scanner.expect(b" ")?;
        }
        let start = scanner.rest();
        scanner.skip_item()?;
        listed.push(scanner.since(start));
    }
    Ok(listed)
}

/// Whether a message of this form might have the component at all.
fn is_known(component: &[u8], form: Form) -> bool {
    match form {
        Form::Head => {
            let fields = COVERED_FIELDS.iter().chain([&CONTENT_DIGEST]).map(|name| name.as_str());
            DERIVED.into_iter().chain(fields).any(|name| format!("\"{name}\"").as_bytes() == component)
        }
        Form::Trailers => component.ends_with(b"\";tr"),
    }
}
