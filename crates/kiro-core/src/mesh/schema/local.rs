//! At which port of their own loopback do callers find a tcp service, and is it free in each of their pods?

use std::collections::{BTreeMap, BTreeSet};

use super::super::problem::{Found, Path, Place, Read};
use super::super::read::{Fields, Spot};
use super::super::{Protocol, SIDECAR_PORTS};
use super::Declared;
use crate::identity::ServiceName;

/// The port that callers of a tcp service have for it, and what in the file says so.
pub(super) struct FoundAt {
    port: u16,
    at: Place,
    /// `local_port`, or the `app.port` that stands in for it.
    written: Written,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    LocalPort,
    AppPort,
}

/// Reads `local_port`; `protocol` is none where that could not be read, which is told already.
pub(super) fn port(spot: &Spot<'_>, protocol: Option<Protocol>, found: &mut Found) -> Read<u16> {
    if protocol.is_some_and(|protocol| protocol != Protocol::Tcp) {
        let fix = "take `local_port` out, or write `protocol: tcp` into `app`";
        return Err(spot.wrong(
            "a local port for a service with HTTP, which is called by its name",
            fix,
            found,
        ));
    }
    let port = spot.port(found)?;
    match SIDECAR_PORTS.iter().find(|(other, _)| *other == port) {
        Some((_, by)) => {
            let what = format!("a port that {by} has in every pod");
            Err(spot.wrong(what, "choose another one that is free in the pods of its callers", found))
        }
        None => Ok(port),
    }
}

/// Where callers find the tcp service of these fields; none where its port is wrong, which is told already.
pub(super) fn found_at(fields: &Fields<'_>) -> Option<FoundAt> {
    if let Some(spot) = fields.get("local_port") {
        let port = spot.port_if_right()?;
        return Some(FoundAt { port, at: spot.value_at(), written: Written::LocalPort });
    }
    let app = fields.get("app")?;
    let spot = app.get("port")?;
    Some(FoundAt { port: spot.port_if_right()?, at: spot.value_at(), written: Written::AppPort })
}

/// Each port of a caller's pod has one owner: its application, its ingress, or one of the tcp services that it may reach.
pub(super) fn check(
    declared: &Declared,
    reached: &BTreeMap<ServiceName, BTreeSet<ServiceName>>,
    found: &mut Found,
) {
    for (caller, callees) in reached {
        let Some(own) = declared.services.get(caller) else { continue };
        let mut taken: BTreeMap<u16, String> =
            own.ports.iter().map(|(port, key)| (*port, format!("its own `{key}`"))).collect();
        for callee in callees {
            let Some(at) = declared.services.get(callee).and_then(|callee| callee.found_at.as_ref()) else {
                continue;
            };
            match taken.get(&at.port) {
                Some(by) => report(caller, callee, at, by, found),
                None => {
                    taken.insert(at.port, format!("`{callee}`"));
                }
            }
        }
    }
}

fn report(caller: &ServiceName, callee: &ServiceName, at: &FoundAt, by: &str, found: &mut Found) {
    let services = Path::ROOT.key("services");
    let service = services.key(callee.as_str());
    let app = service.key("app");
    let (path, fix) = match at.written {
        Written::LocalPort => (service.key("local_port"), "choose another `local_port`, one"),
        Written::AppPort => (app.key("port"), "write `local_port: ` beside `app`, with a port"),
    };
    let what = format!("`{caller}` is to find `{callee}` at this port of its pod, where it has {by}");
    let fix = format!("{fix} that is free in the pods of `{callee}`'s callers");
    found.report(at.at, &path, &at.port.to_string(), what, fix);
}
