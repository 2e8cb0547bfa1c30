//! What does one line of `allow` say, and can it ever hold?

use super::super::problem::{Found, Read};
use super::super::read::{Fields, Spot};
use super::super::{Allow, Source};
use super::{Declared, DeclaredService, Opened};
use crate::identity::ServiceName;
use crate::path::PathPattern;

/// The word for what comes from outside, as a source.
pub(super) const INGRESS: &str = "ingress";

/// Reads one line; `opened` gathers what the lines open.
pub(super) fn line(
    spot: &Spot<'_>,
    declared: &Declared,
    opened: &mut Opened,
    found: &mut Found,
) -> Read<Allow> {
    let fix =
        "write a line like `- { from: dashboard, to: profile, methods: [GET], paths: [\"/profiles/*\"] }`";
    let fields = spot.fields(&["from", "to", "methods", "paths"], fix, found)?;
    let from =
        fields.required("from", "add `from: ` and a service, or `from: ingress`", found, |spot, found| {
            source(&spot, declared, found)
        });
    let to = fields
        .required("to", "add `to: ` and a service", found, |spot, found| destination(&spot, declared, found));
    let methods = fields.optional("methods", found, |spot, found| {
        spot.filled_list(
            "leave `methods` out to allow every one, or name some, like `[GET, POST]`",
            found,
            method,
        )
    });
    let paths = fields.optional("paths", found, |spot, found| {
        spot.filled_list(
            "leave `paths` out to allow every one, or name some, like `[\"/profiles/*\"]`",
            found,
            pattern,
        )
    });
    if let Ok((to, service)) = &to {
        match &from {
            Ok(Source::Ingress) => {
                opened.ingresses.insert((*to).clone());
            }
            Ok(Source::Service(from)) if service.tcp => {
                opened.tcp.entry(from.clone()).or_default().insert((*to).clone());
            }
            Ok(Source::Service(_)) | Err(_) => {}
        }
        check(&fields, from.as_ref().ok(), to, service, found);
    }
    Ok(Allow { from: from?, to: to?.0.clone(), methods: methods?, paths: paths? })
}

pub(super) fn source(spot: &Spot<'_>, declared: &Declared, found: &mut Found) -> Read<Source> {
    match spot.word("write a service's name, or `ingress`", found)? {
        INGRESS => Ok(Source::Ingress),
        word => Ok(Source::Service(declared.find(spot, word, found)?.0.clone())),
    }
}

pub(super) fn destination<'d>(
    spot: &Spot<'_>,
    declared: &'d Declared,
    found: &mut Found,
) -> Read<(&'d ServiceName, &'d DeclaredService)> {
    match spot.word("write a service's name", found)? {
        INGRESS => {
            Err(spot.wrong("the ingress, from which calls come", "write the name of a service", found))
        }
        word => declared.find(spot, word, found),
    }
}

pub(super) fn method(spot: Spot<'_>, found: &mut Found) -> Read<String> {
    let text = spot.word("write a method, like `GET`", found)?;
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if text.is_empty() || !text.bytes().all(token) {
        return Err(spot.wrong("not a method", "write a method, like `GET`", found));
    }
    if text == "*" {
        return Err(spot.wrong("not a method", "leave `methods` out to allow every one", found));
    }
    if text.bytes().any(|byte| byte.is_ascii_lowercase()) {
        let fix = format!("write `{}`: methods are compared as they are", text.to_ascii_uppercase());
        return Err(spot.wrong("a method in lower case", fix, found));
    }
    if text == "CONNECT" {
        let fix =
            "take it out: a line without methods and paths allows tunnels to a service with `protocol: tcp`";
        return Err(spot.wrong("CONNECT, which is no request", fix, found));
    }
    Ok(text.to_owned())
}

pub(super) fn pattern(spot: Spot<'_>, found: &mut Found) -> Read<PathPattern> {
    let text = spot.word("write a path pattern, like `\"/profiles/*\"`", found)?;
    PathPattern::parse(text).map_err(|error| spot.wrong("not a path pattern", error.to_string(), found))
}

/// What would never hold, or not mean what it says.
fn check(
    fields: &Fields<'_>,
    from: Option<&Source>,
    to: &ServiceName,
    service: &DeclaredService,
    found: &mut Found,
) {
    let Some(to_spot) = fields.get("to") else { return };
    match from {
        Some(Source::Service(from)) if from == to => {
            let fix = "take the line out: an application reaches itself without the mesh";
            to_spot.wrong("source and destination are the same service", fix, found);
        }
        Some(Source::Ingress) if service.ingress.is_none() => {
            let fix = format!("add `ingress: {{ port: 8080 }}` to `services.{to}`, or take the line out");
            to_spot.wrong("a service without an ingress", fix, found);
        }
        Some(Source::Service(_) | Source::Ingress) | None => {}
    }
    for key in ["methods", "paths"] {
        if let (true, Some(spot)) = (service.tcp, fields.get(key)) {
            let what = format!("`{to}` is `protocol: tcp`, where nobody sees {key}");
            spot.wrong(what, format!("take `{key}` out of this line"), found);
        }
    }
}
