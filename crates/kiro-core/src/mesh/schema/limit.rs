//! What does one line of `limits` say, and can it ever hold?

use std::collections::BTreeMap;

use http::HeaderName;

use super::super::problem::{Found, Read};
use super::super::read::{Fields, Spot};
use super::super::{LimitedSource, Per, RateLine, Source};
use super::allow::{destination, method, pattern, source};
use super::{Declared, DeclaredService};
use crate::fields;
use crate::identity::ServiceName;
use crate::rate::{PolicyName, REQUESTS_PER_SECOND_MAX, RateError, RateSettings};

/// The word for every caller.
const ANYBODY: &str = "*";

/// More at once than a sidecar carries in some seconds is no limit.
const BURST_MAX: u32 = 1_000_000;

/// Fields that are about one connection, or that sidecars make anew: no two hops have the same.
const OF_ONE_HOP: [&str; 9] = [
    "connection",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "content-length",
];

/// The lines so far, by name, with their places in the file.
#[derive(Default)]
pub(super) struct Names(BTreeMap<String, usize>);

/// Reads one line; `names` gathers what the lines are called.
pub(super) fn line(
    spot: &Spot<'_>,
    declared: &Declared,
    names: &mut Names,
    found: &mut Found,
) -> Read<RateLine> {
    let fix = "write a line like `- { from: dashboard, to: profile, rate: 100/s }`";
    let keys = ["name", "from", "to", "methods", "paths", "rate", "burst", "per"];
    let fields = spot.fields(&keys, fix, found)?;
    let from =
        fields.required("from", "add `from: ` and a service, `ingress` or `\"*\"`", found, |spot, found| {
            match spot.word("write a service's name, `ingress`, or `\"*\"` for every caller", found)? {
                ANYBODY => Ok(LimitedSource::Anybody),
                _ => Ok(match source(&spot, declared, found)? {
                    Source::Ingress => LimitedSource::Ingress,
                    Source::Service(name) => LimitedSource::Service(name),
                }),
            }
        });
    let to = fields
        .required("to", "add `to: ` and a service", found, |spot, found| destination(&spot, declared, found));
    let methods = fields.optional("methods", found, |spot, found| {
        spot.filled_list("leave `methods` out to count every one, or name some, like `[POST]`", found, method)
    });
    let paths = fields.optional("paths", found, |spot, found| {
        let fix = "leave `paths` out to count every one, or name some, like `[\"/search/**\"]`";
        spot.filled_list(fix, found, pattern)
    });
    let rate = rate(&fields, found);
    let per = fields.optional("per", found, per);
    if let Ok((to, service)) = &to {
        check(&fields, from.as_ref().ok(), to, service, found);
    }
    if let (Ok(LimitedSource::Ingress | LimitedSource::Service(_)), Ok(Some(Per::Service)), Some(spot)) =
        (&from, &per, fields.get("per"))
    {
        let fix = "take `per` out, or write `from: \"*\"`";
        spot.wrong("a share for each caller, of one caller", fix, found);
    }
    let (from, to) = (from?, to?.0.clone());
    let name = name(spot, &fields, (&from, &to), names, found);
    Ok(RateLine {
        name: name?,
        from,
        to,
        methods: methods?,
        paths: paths?,
        rate: rate?,
        per: per?,
        line: spot.value_at().line,
    })
}

fn rate(fields: &Fields<'_>, found: &mut Found) -> Read<RateSettings> {
    let fix = "add `rate: ` and requests in a time, like `rate: 100/s`";
    let rate = fields.required("rate", fix, found, |spot, found| spot.rate(found));
    let burst = fields.optional("burst", found, |spot, found| spot.number(1..=BURST_MAX, found));
    let ((requests, per), burst) = (rate?, burst?);
    RateSettings::new(requests, per, burst).map_err(|error| match error {
        RateError::TooSlow { .. } => {
            let spot = fields.get("burst").or_else(|| fields.get("rate"));
            let what = "a burst that takes more than a year to fill at this rate";
            wrong(fields, spot, what, "write a smaller `burst`, or a higher `rate`", found)
        }
        RateError::TooFast { .. } | RateError::NoRequests | RateError::NoTime | RateError::NoBurst => {
            let what = format!("more than {REQUESTS_PER_SECOND_MAX} requests a second");
            wrong(fields, fields.get("rate"), &what, "write fewer, or take the line out", found)
        }
    })
}

fn wrong(
    fields: &Fields<'_>,
    spot: Option<Spot<'_>>,
    what: &str,
    fix: &str,
    found: &mut Found,
) -> super::super::problem::Reported {
    match spot {
        Some(spot) => spot.wrong(what, fix, found),
        None => fields.lacks(what, fix, found),
    }
}

fn per(spot: Spot<'_>, found: &mut Found) -> Read<Per> {
    const FIX: &str = "write `service`, `path`, or `header:` and a field's name, like `header:x-user`";
    let text = spot.word(FIX, found)?;
    let name = match text.split_once(':') {
        None if text == "service" => return Ok(Per::Service),
        None if text == "path" => return Ok(Per::Path),
        Some(("header", name)) => name,
        None | Some(_) => return Err(spot.wrong("not one of `service`, `path`, `header:…`", FIX, found)),
    };
    let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
        let fix = "write a name of letters, digits and hyphens, like `header:x-user`";
        return Err(spot.wrong("not the name of a header field", fix, found));
    };
    if fields::is_own(&name) {
        let fix = "write a field of the callers' own, like `header:x-user`; for a share of each caller, `per: service`";
        return Err(spot.wrong("a field of the sidecars' own", fix, found));
    }
    if OF_ONE_HOP.contains(&name.as_str()) {
        let fix = "write a field that says who asks, like `header:x-user`";
        return Err(spot.wrong("a field that is about one connection or message", fix, found));
    }
    Ok(Per::Header(name))
}

/// The line's own name, or one that is made of the services'.
fn name(
    spot: &Spot<'_>,
    fields: &Fields<'_>,
    (from, to): (&LimitedSource, &ServiceName),
    names: &mut Names,
    found: &mut Found,
) -> Read<PolicyName> {
    let named = fields.optional("name", found, |spot, found| {
        let text = spot.word("write a name, like `searches`", found)?;
        PolicyName::new(text).map_err(|_| {
            let fix = "write 1 to 64 letters, digits, and - _ . / :";
            spot.wrong("not a name for a limit", fix, found)
        })
    });
    let name = match named? {
        Some(name) => name,
        None => {
            let made = match from {
                LimitedSource::Anybody => to.as_str().to_owned(),
                LimitedSource::Ingress => format!("{}.{to}", super::allow::INGRESS),
                LimitedSource::Service(from) => format!("{from}.{to}"),
            };
            PolicyName::new(&made).map_err(|_| {
                let what = format!("`{made}`, which names the line in answers, is too long");
                fields.lacks(&what, "add `name: ` and a short one", found)
            })?
        }
    };
    if let Some(line) = names.0.insert(name.as_str().to_owned(), spot.value_at().line) {
        let what = format!("another limit, in line {line}, is called `{}` too", name.as_str());
        let fix = "add `name: ` and another one: answers, log and metrics tell limits apart by it";
        return Err(wrong(fields, fields.get("name"), &what, fix, found));
    }
    Ok(name)
}

/// What would never hold.
fn check(
    fields: &Fields<'_>,
    from: Option<&LimitedSource>,
    to: &ServiceName,
    service: &DeclaredService,
    found: &mut Found,
) {
    let Some(spot) = fields.get("to") else { return };
    if service.tcp {
        let what = format!("`{to}` is `protocol: tcp`: of its bytes nobody knows what is a request");
        spot.wrong(what, "take the line out", found);
        return;
    }
    match from {
        Some(LimitedSource::Service(from)) if from == to => {
            let fix = "take the line out: an application reaches itself without the mesh";
            spot.wrong("source and destination are the same service", fix, found);
        }
        Some(LimitedSource::Ingress) if service.ingress.is_none() => {
            let fix = format!("add `ingress: {{ port: 8080 }}` to `services.{to}`, or take the line out");
            spot.wrong("a service without an ingress", fix, found);
        }
        Some(_) | None => {}
    }
}
