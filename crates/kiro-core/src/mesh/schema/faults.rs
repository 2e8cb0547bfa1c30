//! What does one line of `faults` say?

use http::StatusCode;

use super::super::FaultLine;
use super::super::problem::{Found, Read};
use super::super::read::{Fields, Spot};
use super::Declared;
use super::allow::{method, pattern};
use crate::identity::ServiceName;
use crate::shaping::{FAULT_DELAY_MAX, Fault, Share};

/// The word for every caller.
const EVERYBODY: &str = "*";

const FIX: &str = "write a line like `- { from: dashboard, to: profile, delay: 100ms, delay_percent: 5, abort: 503, abort_percent: 1 }`";

/// Reads one line.
pub(super) fn line(spot: &Spot<'_>, declared: &Declared, found: &mut Found) -> Read<FaultLine> {
    let keys = ["from", "to", "methods", "paths", "delay", "delay_percent", "abort", "abort_percent"];
    let fields = spot.fields(&keys, FIX, found)?;
    let from = fields.required(
        "from",
        "add `from: ` and a service, or `from: \"*\"` for every caller",
        found,
        |spot, found| caller(&spot, declared, found),
    );
    let to = fields.required("to", "add `to: ` and a service", found, |spot, found| {
        http_service(&spot, declared, found).cloned()
    });
    let methods = fields.optional("methods", found, |spot, found| {
        spot.filled_list("leave `methods` out for every one, or name some, like `[GET]`", found, method)
    });
    let paths = fields.optional("paths", found, |spot, found| {
        let fix = "leave `paths` out for every one, or name some, like `[\"/reports/**\"]`";
        spot.filled_list(fix, found, pattern)
    });
    let fault = fault(&fields, found);
    if let (Ok(Some(from)), Ok(to), Some(spot)) = (&from, &to, fields.get("to"))
        && from == to
    {
        let fix = "take the line out: an application reaches itself without the mesh";
        return Err(spot.wrong("source and destination are the same service", fix, found));
    }
    Ok(FaultLine { from: from?, to: to?, methods: methods?, paths: paths?, fault: fault? })
}

fn caller(spot: &Spot<'_>, declared: &Declared, found: &mut Found) -> Read<Option<ServiceName>> {
    match spot.word("write a service's name, or `\"*\"` for every caller", found)? {
        EVERYBODY => Ok(None),
        "ingress" => {
            let fix = "write a service's name, or `\"*\"`: what goes wrong does so in the caller's sidecar, and outside there is none";
            Err(spot.wrong("the ingress, whose callers have no sidecar", fix, found))
        }
        word => Ok(Some(declared.find(spot, word, found)?.0.clone())),
    }
}

/// A service whose application speaks HTTP: nobody knows what is a request among another one's bytes.
pub(super) fn http_service<'d>(
    spot: &Spot<'_>,
    declared: &'d Declared,
    found: &mut Found,
) -> Read<&'d ServiceName> {
    let word = spot.word("write a service's name", found)?;
    let (name, service) = declared.find(spot, word, found)?;
    if service.tcp {
        let what = format!("`{name}` is `protocol: tcp`, where nobody sees requests");
        return Err(spot.wrong(
            what,
            "name a service whose application speaks HTTP, or take the line out",
            found,
        ));
    }
    Ok(name)
}

fn fault(fields: &Fields<'_>, found: &mut Found) -> Read<Fault> {
    let delay = fields.optional("delay", found, |spot, found| {
        let Some(delay) = spot.duration(found)? else {
            return Err(spot.wrong("a delay that never ends", "write a duration, like `100ms`", found));
        };
        if delay > FAULT_DELAY_MAX {
            let fix = format!("write {FAULT_DELAY_MAX:?} or less");
            return Err(spot.wrong(format!("a delay over {FAULT_DELAY_MAX:?}"), fix, found));
        }
        Ok(delay)
    });
    let abort = fields.optional("abort", found, |spot, found| {
        let number = spot.number(400..=599, found)?;
        let status = u16::try_from(number).ok().and_then(|number| StatusCode::from_u16(number).ok());
        status.ok_or_else(|| spot.wrong("not an error's status", "write one from 400 to 599", found))
    });
    let delay_share = share_of(fields, "delay", "delay_percent", found);
    let abort_share = share_of(fields, "abort", "abort_percent", found);
    let (delay, delay_share, abort, abort_share) = (delay?, delay_share?, abort?, abort_share?);
    let mut fault = Fault::default();
    // The bounds have been checked, where a problem has a place in the file.
    let broken =
        |error: &dyn std::fmt::Display, found: &mut Found| fields.lacks(&error.to_string(), FIX, found);
    if let (Some(delay), Some(share)) = (delay, delay_share) {
        fault = fault.with_delay(share, delay).map_err(|error| broken(&error, found))?;
    }
    if let (Some(status), Some(share)) = (abort, abort_share) {
        fault = fault.with_abort(share, status).map_err(|error| broken(&error, found))?;
    }
    if fault == Fault::default() {
        let fix =
            "add `delay: 100ms, delay_percent: 5` or `abort: 503, abort_percent: 1`, or take the line out";
        return Err(fields.lacks("a line by which nothing goes wrong", fix, found));
    }
    Ok(fault)
}

/// How many requests something happens to. Written down always, so that nobody breaks all by leaving a word out.
fn share_of(fields: &Fields<'_>, what: &str, percent: &str, found: &mut Found) -> Read<Option<Share>> {
    let share = fields.optional(percent, found, |spot, found| spot.share(found))?;
    match (fields.get(what), fields.get(percent)) {
        (Some(spot), None) => {
            let fix = format!("add `{percent}: 5`, or `{percent}: 100` for all of them");
            Err(spot.wrong("it is not said how many requests this happens to", fix, found))
        }
        (None, Some(spot)) => {
            let fix = format!("add `{what}: `, or take `{percent}` out");
            Err(spot.wrong(format!("a share of requests, and no `{what}`"), fix, found))
        }
        (Some(_), Some(_)) | (None, None) => Ok(share),
    }
}
