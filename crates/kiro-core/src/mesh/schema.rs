//! What does each section of the mesh file want, and what must hold between them?
//!
//! A section is read to its end though a part of it is wrong, and what depends on a wrong part is not told a second time.

mod allow;
mod faults;
mod health;
mod limit;
mod local;
mod mirrors;
mod service;
mod splits;
mod traffic;

use std::collections::{BTreeMap, BTreeSet};

use super::problem::{Found, Place, Read, Reported};
use super::read::{Fields, Spot};
use super::tree::Node;
use super::{Mesh, Mode, Protocol, Service, Signatures};
use crate::identity::{ServiceName, TrustDomain};

/// The services of the file, whether or not all of each could be read.
#[derive(Default)]
struct Declared {
    services: BTreeMap<ServiceName, DeclaredService>,
    /// Keys that are no names; lines that use them are wrong for a reason that is told already.
    bad_names: BTreeMap<String, Reported>,
}

struct DeclaredService {
    service: Read<Service>,
    /// Whether it is declared `protocol: tcp`.
    tcp: bool,
    /// Where its key `ingress` stands.
    ingress: Option<Place>,
    /// The ports that it takes in its own pod, and the keys that say so.
    ports: Vec<(u16, &'static str)>,
    /// Where its callers find it, if it is `protocol: tcp`.
    found_at: Option<local::FoundAt>,
}

/// What the lines of `allow` open.
#[derive(Default)]
struct Opened {
    /// The services that a line from `ingress` names.
    ingresses: BTreeSet<ServiceName>,
    /// The tcp services that each service may reach.
    tcp: BTreeMap<ServiceName, BTreeSet<ServiceName>>,
}

impl DeclaredService {
    /// What its application speaks, if that could be read.
    fn protocol(&self) -> Option<Protocol> {
        self.service.as_ref().ok().map(|service| service.app.protocol)
    }
}

impl Declared {
    /// What was declared, if all of it is right.
    fn into_services(self) -> Read<BTreeMap<ServiceName, Service>> {
        if let Some(reported) = self.bad_names.into_values().next() {
            return Err(reported);
        }
        self.services.into_iter().map(|(name, declared)| Ok((name, declared.service?))).collect()
    }

    /// The name and service that a word of an allow line means.
    fn find(&self, spot: &Spot<'_>, word: &str, found: &mut Found) -> Read<(&ServiceName, &DeclaredService)> {
        let report = |fix: String, found: &mut Found| spot.wrong("no service of this mesh", fix, found);
        self.find_or(word, report, found)
    }

    /// The same, for a word that is not the spot's value.
    fn find_or(
        &self,
        word: &str,
        report: impl FnOnce(String, &mut Found) -> Reported,
        found: &mut Found,
    ) -> Read<(&ServiceName, &DeclaredService)> {
        if let Some(found) = self.services.get_key_value(word) {
            return Ok(found);
        }
        if let Some(reported) = self.bad_names.get(word) {
            return Err(*reported);
        }
        let fix = match found.nearest(word, self.services.keys().map(ServiceName::as_str)) {
            Some(meant) => format!("write `{meant}` if that was meant, or add the service under `services`"),
            None => "add it under `services`, or take the line out".to_owned(),
        };
        Err(report(fix, found))
    }
}

/// Reads the whole file.
pub(super) fn mesh(root: &Node<'_>, found: &mut Found) -> Read<Mesh> {
    let root = Spot::root(root);
    let keys =
        ["trust_domain", "signatures", "mode", "services", "allow", "limits", "faults", "splits", "mirrors"];
    let fields = root.fields(&keys, "start with `trust_domain: kiro.mesh` and a map `services:`", found)?;
    let fix = "add `trust_domain: kiro.mesh`, or a name that no other mesh of yours has";
    let trust_domain = fields.required("trust_domain", fix, found, trust_domain);
    let signatures = fields.optional("signatures", found, |spot, found| {
        spot.one_of(&[("required", Signatures::Required), ("off", Signatures::Off)], found)
    });
    let mode = fields.optional("mode", found, |spot, found| {
        spot.one_of(&[("enforce", Mode::Enforce), ("audit", Mode::Audit)], found)
    });
    let fix = "add `services:` with a service below it, like `profile: { app: { port: 8002 } }`";
    // Without services every line of `allow` would be told that it names none.
    let declared = fields.required("services", fix, found, |spot, found| services(&spot, fix, found))?;
    let mut opened = Opened::default();
    let allow = fields.optional("allow", found, |spot, found| {
        let fix =
            "write lines like `- { from: dashboard, to: profile }`, or leave `allow` out to allow nothing";
        spot.list(fix, found, |line, found| allow::line(&line, &declared, &mut opened, found))
    });
    let mut names = limit::Names::default();
    let limits = fields.optional("limits", found, |spot, found| {
        let fix = "write lines like `- { from: dashboard, to: profile, rate: 100/s }`, or leave `limits` out";
        spot.list(fix, found, |line, found| limit::line(&line, &declared, &mut names, found))
    });
    let faults = fields.optional("faults", found, |spot, found| {
        let fix = "write lines like `- { from: dashboard, to: profile, abort: 503, abort_percent: 1 }`, or leave `faults` out";
        spot.filled_list(fix, found, |line, found| faults::line(&line, &declared, found))
    });
    let lines = allow.as_ref().ok().map(|lines| lines.as_deref().unwrap_or_default());
    let splits =
        fields.optional("splits", found, |spot, found| splits::lines(&spot, &declared, lines, found));
    let mirrors =
        fields.optional("mirrors", found, |spot, found| mirrors::lines(&spot, &declared, lines, found));
    check_ingresses(&declared, &opened.ingresses, &fields, found);
    local::check(&declared, &opened.tcp, found);
    Ok(Mesh {
        trust_domain: trust_domain?,
        signatures: signatures?.unwrap_or_default(),
        mode: mode?.unwrap_or_default(),
        services: declared.into_services()?,
        allow: allow?.unwrap_or_default(),
        limits: limits?.unwrap_or_default(),
        faults: faults?.unwrap_or_default(),
        splits: splits?.unwrap_or_default(),
        mirrors: mirrors?.unwrap_or_default(),
    })
}

fn trust_domain(spot: Spot<'_>, found: &mut Found) -> Read<TrustDomain> {
    let text = spot.word("write a name like `kiro.mesh`", found)?;
    TrustDomain::parse(text).map_err(|error| spot.wrong("not a trust domain", error.to_string(), found))
}

fn services(spot: &Spot<'_>, fix: &str, found: &mut Found) -> Read<Declared> {
    let entries = spot.entries(fix, found)?;
    if entries.is_empty() {
        return Err(spot.wrong("no services", fix, found));
    }
    let mut declared = Declared::default();
    for entry in entries {
        let spot = spot.entry(entry);
        let service = service::service(&spot, found);
        match ServiceName::parse(&entry.key) {
            Ok(name) => {
                declared.services.insert(name, service);
            }
            Err(error) => {
                let reported =
                    found.report(spot.at, &spot.path, &entry.key, "not a service's name", error.to_string());
                declared.bad_names.insert(entry.key.to_string(), reported);
            }
        }
    }
    Ok(declared)
}

/// An ingress that nobody may use is a mistake, and one that everybody may use should be written down.
fn check_ingresses(
    declared: &Declared,
    opened: &BTreeSet<ServiceName>,
    fields: &Fields<'_>,
    found: &mut Found,
) {
    let services = fields.get("services");
    for (name, service) in &declared.services {
        let (Some(at), Some(services)) = (service.ingress, &services) else { continue };
        // Before a tcp service it has to go in any case, which is told already.
        if service.tcp || opened.contains(name) {
            continue;
        }
        let what = "an ingress that no line of `allow` opens";
        let fix =
            format!("add the line `- {{ from: ingress, to: {name} }}` to `allow`, or take the ingress out");
        found.report(at, &services.path.key(name.as_str()).key("ingress"), "", what, fix);
    }
}
