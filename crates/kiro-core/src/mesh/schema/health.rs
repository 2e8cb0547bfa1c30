//! What does `health` say?

use std::time::Duration;

use http::uri::PathAndQuery;

use super::super::problem::{Found, Read};
use super::super::read::{Fields, Spot};
use super::super::{HealthCheck, Protocol, Question};
use crate::health::{HealthError, HealthSettings};

const FIX: &str =
    "write what is asked, like `health: { http: /healthz }`, `{ grpc: true }` or `{ tcp: true }`";

/// A name of a gRPC service is short; a head has to carry it.
const GRPC_SERVICE_BYTES: usize = 255;

/// Reads the section; `protocol` is none where that could not be read, which is told already.
pub(super) fn health(spot: &Spot<'_>, protocol: Option<Protocol>, found: &mut Found) -> Read<HealthCheck> {
    let keys = ["http", "grpc", "tcp", "interval", "timeout", "healthy", "unhealthy"];
    let fields = spot.fields(&keys, FIX, found)?;
    let question = question(&fields, spot, protocol, found);
    let settings = settings(&fields, spot, found);
    Ok(HealthCheck { question: question?, settings: settings? })
}

fn question(
    fields: &Fields<'_>,
    spot: &Spot<'_>,
    protocol: Option<Protocol>,
    found: &mut Found,
) -> Read<Question> {
    let http = fields.optional("http", found, |spot, found| {
        if protocol == Some(Protocol::Tcp) {
            let fix = "write `tcp: true`, or leave `app.protocol: tcp` out";
            return Err(spot.wrong("a check by HTTP of an application that speaks none", fix, found));
        }
        path(&spot, found)
    });
    let grpc = fields.optional("grpc", found, |spot, found| {
        let fix = match protocol {
            Some(Protocol::Tcp) => "write `tcp: true`, or `app.protocol: grpc` if that is what it speaks",
            Some(Protocol::Http1) => {
                "write `http: /healthz`, or `app.protocol: grpc` if that is what it speaks"
            }
            Some(Protocol::H2 | Protocol::Grpc) | None => return grpc_service(&spot, found),
        };
        Err(spot.wrong("a check by gRPC of an application that speaks no HTTP/2", fix, found))
    });
    let tcp = fields.optional("tcp", found, |spot, found| match spot.boolean(found)? {
        true => Ok(()),
        false => Err(spot.wrong("a check that is none", "write `tcp: true`, or leave it out", found)),
    });
    match (http?, grpc?, tcp?) {
        (Some(path), None, None) => Ok(Question::Http(path)),
        (None, Some(service), None) => Ok(Question::Grpc(service)),
        (None, None, Some(())) => Ok(Question::Tcp),
        (None, None, None) => Err(fields.lacks("nothing is asked", FIX, found)),
        _ => Err(spot.wrong("several checks", "leave one of `http`, `grpc` and `tcp`", found)),
    }
}

fn path(spot: &Spot<'_>, found: &mut Found) -> Read<String> {
    const FIX: &str = "write a path, like `/healthz`";
    let text = spot.word(FIX, found)?;
    let is_path = text.starts_with('/') && !text.contains('#') && text.parse::<PathAndQuery>().is_ok();
    is_path.then(|| text.to_owned()).ok_or_else(|| spot.wrong("not a path", FIX, found))
}

/// `true` for the server as a whole, or a service's name.
fn grpc_service(spot: &Spot<'_>, found: &mut Found) -> Read<String> {
    const FIX: &str = "write `grpc: true`, or the name of a service, like `grpc: shop.v1.Orders`";
    let text = spot.word(FIX, found)?;
    let is_name = |text: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
        text.len() <= GRPC_SERVICE_BYTES
            && text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.chars().all(known)
    };
    match text {
        "true" => Ok(String::new()),
        "false" => Err(spot.wrong("a check that is none", FIX, found)),
        name if is_name(name) => Ok(name.to_owned()),
        _ => Err(spot.wrong("not the name of a service", FIX, found)),
    }
}

fn settings(fields: &Fields<'_>, spot: &Spot<'_>, found: &mut Found) -> Read<HealthSettings> {
    let defaults = HealthSettings::default();
    let time = |spot: Spot<'_>, found: &mut Found| match spot.duration(found)? {
        Some(time) => Ok(time),
        None => Err(spot.wrong("no time", "write one like `5s`, or leave `health` out for no checks", found)),
    };
    let interval = fields.optional("interval", found, time);
    let timeout = fields.optional("timeout", found, time);
    let healthy = fields.optional("healthy", found, |spot, found| spot.number(1..=100, found));
    let unhealthy = fields.optional("unhealthy", found, |spot, found| spot.number(1..=100, found));
    let interval = interval?.unwrap_or(defaults.interval());
    let timeout: Duration = timeout?.unwrap_or(defaults.timeout().min(interval));
    let told = |error: HealthError, found: &mut Found| {
        let key = match error {
            HealthError::Timeout { .. } => "timeout",
            HealthError::IntervalTooShort(_) | HealthError::IntervalTooLong(_) => "interval",
            HealthError::NoThreshold(_) => "healthy",
        };
        let text = error.to_string();
        let (what, fix) = text.split_once("; ").unwrap_or((&text, "change it"));
        fields.get(key).as_ref().unwrap_or(spot).wrong(what, fix, found)
    };
    let settings = defaults.with_times(interval, timeout).map_err(|error| told(error, found))?;
    let healthy = healthy?.unwrap_or(defaults.successes());
    let unhealthy = unhealthy?.unwrap_or(defaults.failures());
    settings.with_thresholds(healthy, unhealthy).map_err(|error| told(error, found))
}
