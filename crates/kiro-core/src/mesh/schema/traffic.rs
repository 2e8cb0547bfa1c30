//! What does `traffic` say?

use std::num::NonZeroU32;

use http::{Method, StatusCode};

use super::super::problem::{Found, Read};
use super::super::read::Spot;
use super::super::{Route, Timeout, Traffic};
use super::allow::{method, pattern};
use crate::breaker::BreakerSettings;
use crate::concurrency::{Adaptive, ConcurrencySettings, Limit, QueueSettings};
use crate::retry::{RETRIES_MAX, RetryPolicy, RetrySettings};

/// More requests under way than that no sidecar has: its peers' streams and its clients' connections end before.
const CONCURRENCY_MAX: u32 = 100_000;

/// Who waits behind so many others waits in vain: a second at the most is what anybody waits.
const QUEUE_MAX: u32 = 10_000;

/// Reads the section; `tcp` where the service's application speaks no HTTP.
pub(super) fn traffic(spot: &Spot<'_>, tcp: bool, found: &mut Found) -> Read<Traffic> {
    let keys = ["timeout", "retries", "breaker", "routes", "concurrency"];
    let fields = spot.fields(&keys, "write it like `traffic: { timeout: 2s, retries: 2 }`", found)?;
    let http = |spot: &Spot<'_>, found: &mut Found| match tcp {
        false => Ok(()),
        true => {
            let fix = "take it out: of a tcp service's bytes nobody knows what is a request";
            Err(spot.wrong("for applications that speak HTTP", fix, found))
        }
    };
    let timeout = fields.optional("timeout", found, timeout);
    let retries = fields.optional("retries", found, |spot, found| {
        http(&spot, found)?;
        retries(&spot, found)
    });
    let breaker = fields.optional("breaker", found, |spot, found| {
        http(&spot, found)?;
        breaker(&spot, found)
    });
    let routes = fields.optional("routes", found, |spot, found| {
        http(&spot, found)?;
        let fix = "write routes like `- { paths: [\"/reports/**\"], timeout: 30s }`, or leave `routes` out";
        spot.filled_list(fix, found, route)
    });
    let concurrency = fields.optional("concurrency", found, |spot, found| {
        http(&spot, found)?;
        concurrency(&spot, found)
    });
    Ok(Traffic {
        timeout: timeout?.unwrap_or_default(),
        retries: retries?,
        breaker: breaker?.flatten(),
        concurrency: concurrency?,
        routes: routes?.unwrap_or_default(),
    })
}

fn timeout(spot: Spot<'_>, found: &mut Found) -> Read<Timeout> {
    Ok(spot.duration(found)?.map_or(Timeout::Off, Timeout::After))
}

/// A number alone, or a map. None at all where the number is 0.
fn retries(spot: &Spot<'_>, found: &mut Found) -> Read<RetryPolicy> {
    const FIX: &str = "write how often, like `retries: 2`, or `retries: { count: 2, statuses: [503] }`";
    let defaults = RetrySettings::default();
    if spot.is_word() {
        let retries = spot.number(0..=RETRIES_MAX, found)?;
        return policy(RetrySettings { retries, ..defaults }, spot, found);
    }
    let fields = spot.fields(&["count", "methods", "statuses", "per_try"], FIX, found)?;
    let count = fields.optional("count", found, |spot, found| spot.number(1..=RETRIES_MAX, found));
    let methods = fields.optional("methods", found, |spot, found| {
        let fix = "leave `methods` out for the idempotent ones, or name some, like `[GET, POST]`";
        spot.filled_list(fix, found, |spot, found| {
            let text = method(spot, found)?;
            Method::from_bytes(text.as_bytes())
                .map_err(|_| spot.wrong("not a method", "write a method, like `GET`", found))
        })
    });
    let statuses = fields.optional("statuses", found, |spot, found| {
        let fix = "leave `statuses` out for 502, 503 and 504, or name some, like `[503]`";
        spot.filled_list(fix, found, |spot, found| {
            let number = spot.number(400..=599, found)?;
            let status = u16::try_from(number).ok().and_then(|number| StatusCode::from_u16(number).ok());
            status.ok_or_else(|| spot.wrong("not a status", "write one like `503`", found))
        })
    });
    let per_try = fields.optional("per_try", found, |spot, found| spot.duration(found));
    let settings = RetrySettings {
        retries: count?.unwrap_or(defaults.retries),
        methods: methods?,
        statuses: statuses?.unwrap_or(defaults.statuses),
        per_try_timeout: per_try?.flatten(),
        ..defaults
    };
    policy(settings, spot, found)
}

fn policy(settings: RetrySettings, spot: &Spot<'_>, found: &mut Found) -> Read<RetryPolicy> {
    if settings.retries == 0 {
        return Ok(RetryPolicy::undeclared());
    }
    RetryPolicy::new(settings).map_err(|error| {
        let (what, fix) = told(&error);
        spot.wrong(what, fix, found)
    })
}

/// `on`, `off`, or a map.
fn breaker(spot: &Spot<'_>, found: &mut Found) -> Read<Option<BreakerSettings>> {
    const FIX: &str = "write `breaker: on`, or `breaker: { failures: 50%, requests: 20, open: 5s }`";
    let defaults = BreakerSettings::default();
    if spot.is_word() {
        return spot.one_of(&[("on", Some(defaults)), ("off", None)], found);
    }
    let fields = spot.fields(&["failures", "requests", "open"], FIX, found)?;
    let failures = fields.optional("failures", found, |spot, found| spot.percent(found));
    let requests = fields.optional("requests", found, |spot, found| spot.number(1..=1_000_000, found));
    let open = fields.optional("open", found, |spot, found| match spot.duration(found)? {
        Some(open) => Ok(open),
        None => Err(spot.wrong("a breaker that would never open", "leave `breaker` out", found)),
    });
    let open = open?.unwrap_or(defaults.open_base);
    let settings = BreakerSettings {
        failures_percent: failures?.map_or(defaults.failures_percent, u32::from),
        requests_min: requests?.unwrap_or(defaults.requests_min),
        open_base: open,
        open_max: defaults.open_max.max(open),
        ..defaults
    };
    settings.check().map(|()| Some(settings)).map_err(|error| {
        let (what, fix) = told(&error);
        spot.wrong(what, fix, found)
    })
}

/// A number alone, or a map.
fn concurrency(spot: &Spot<'_>, found: &mut Found) -> Read<ConcurrencySettings> {
    const FIX: &str = "write `concurrency: 100`, or `concurrency: { max: 100, queue: 100, adaptive: true }`";
    let defaults = ConcurrencySettings::default();
    let fixed = |max: u32| NonZeroU32::new(max).map(Limit::Fixed);
    if spot.is_word() {
        let max = spot.number(1..=CONCURRENCY_MAX, found)?;
        return Ok(ConcurrencySettings { limit: fixed(max).unwrap_or(defaults.limit), ..defaults });
    }
    let fields = spot.fields(&["max", "queue", "adaptive"], FIX, found)?;
    let max = fields.optional("max", found, |spot, found| spot.number(1..=CONCURRENCY_MAX, found));
    let queue = fields.optional("queue", found, |spot, found| spot.number(0..=QUEUE_MAX, found));
    let adaptive = fields.optional("adaptive", found, |spot, found| spot.boolean(found));
    let (max, queue, adaptive) = (max?, queue?, adaptive?.unwrap_or_default());
    let limit = match (max, adaptive) {
        (None, false) => {
            let fix =
                "add `max: ` and how many requests the application may have under way, or `adaptive: true`";
            return Err(fields.lacks("the key `max` is missing", fix, found));
        }
        (None, true) => Limit::Adaptive(Adaptive::default()),
        (Some(max), true) => {
            let least = Adaptive::default().min().min(max);
            Limit::Adaptive(Adaptive::new(least, max).unwrap_or_default())
        }
        (Some(max), false) => fixed(max).unwrap_or(defaults.limit),
    };
    let max_waiting = queue.unwrap_or(defaults.queue.max_waiting);
    Ok(ConcurrencySettings { limit, queue: QueueSettings { max_waiting, ..defaults.queue }, ..defaults })
}

/// An error that names its fix behind a colon, in two parts.
fn told(error: &impl std::fmt::Display) -> (String, String) {
    let text = error.to_string();
    match text.split_once(": ") {
        Some((what, fix)) => (what.to_owned(), fix.to_owned()),
        None => (text, "change it".to_owned()),
    }
}

fn route(spot: Spot<'_>, found: &mut Found) -> Read<Route> {
    let fix = "write a route like `- { paths: [\"/reports/**\"], timeout: 30s }`";
    let fields = spot.fields(&["methods", "paths", "timeout", "retries"], fix, found)?;
    let methods = fields.optional("methods", found, |spot, found| {
        spot.filled_list("leave `methods` out for every one, or name some, like `[GET]`", found, method)
    });
    let paths = fields.optional("paths", found, |spot, found| {
        let fix = "leave `paths` out for every one, or name some, like `[\"/reports/**\"]`";
        spot.filled_list(fix, found, pattern)
    });
    let timeout = fields.optional("timeout", found, timeout);
    let retries = fields.optional("retries", found, |spot, found| retries(&spot, found));
    if matches!((&timeout, &retries), (Ok(None), Ok(None))) {
        let fix = "add `timeout: ` or `retries: `, or take the route out";
        return Err(fields.lacks("a route that changes nothing", fix, found));
    }
    Ok(Route { methods: methods?, paths: paths?, timeout: timeout?, retries: retries? })
}
