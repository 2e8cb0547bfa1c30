//! Is everything there that the mesh needs before it starts?

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;

use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_core::mesh::{AppTls, Mesh, Service, Signatures, Source};
use kiro_tls::{EdgeSecrets, Identity, LeafFacts, SidecarIdentity, expiry_warning};
use time::OffsetDateTime;

use super::Arguments;
use super::access::{Ids, may_read};
use super::local;
use super::report::Report;
use crate::place::{mesh_file, read_mesh};

/// What makes most things right.
const MAKE_CERTS: &str = "run `make certs` (`kiro certs`)";

/// Looks at a working directory.
pub(super) fn check(arguments: &Arguments, report: &mut Report) {
    let file = mesh_file(arguments.place.mesh.as_deref(), false);
    let env = std::fs::read_to_string(&arguments.env_file).unwrap_or_default();
    match read_mesh(&file) {
        Ok(mesh) => {
            let (services, lines) = (mesh.services.len(), mesh.allow.len());
            report.good(format!("{}: {services} services, {lines} allow lines", file.display()));
            local::declared(&mesh, report);
            certificates(&mesh, arguments, &env, &file, report);
        }
        Err(failure) => report.bad(failure.what, failure.fix),
    }
    if Path::new("docker-compose.yml").exists() {
        ports(&env, report);
    }
}

fn certificates(mesh: &Mesh, arguments: &Arguments, env: &str, mesh_file: &Path, report: &mut Report) {
    if !arguments.certs.exists() {
        report.bad(format!("{}: there are no certificates yet", arguments.certs.display()), MAKE_CERTS);
        return;
    }
    let id = |name: &str| variable(env, name).and_then(|value| value.parse().ok());
    let (sidecar, app, gid) = (id("KIRO_SIDECAR_UID"), id("KIRO_APP_UID"), id("KIRO_GID"));
    let (Some(sidecar), Some(app), Some(gid)) = (sidecar, app, gid) else {
        let what = format!("{}: does not say as whom containers run", arguments.env_file.display());
        report.bad(what, MAKE_CERTS);
        return;
    };
    let (sidecar, app) = (Ids { uid: sidecar, gid }, Ids { uid: app, gid });
    for path in [mesh_file.parent(), Some(mesh_file)].into_iter().flatten() {
        if may_read(path, sidecar) == Some(false) {
            let what = format!("{}: sidecars, who run as {}, can't read it", path.display(), sidecar.uid);
            report.bad(what, format!("`chmod a+rX {}`: it holds no secret", path.display()));
        }
    }
    for (name, service) in &mesh.services {
        let directory = arguments.certs.join(name.as_str());
        readable(
            &directory,
            &["ca.pem", "leaf.pem", "leaf.key", "edges.json", "ingress.key"],
            sidecar,
            report,
        );
        sidecar_files(mesh, name, service, &directory, report);
        if service.app.tls == AppTls::Mutual {
            let directory = arguments.certs.join(format!("{name}-app"));
            readable(&directory, &["ca.pem", "leaf.pem", "leaf.key"], app, report);
            let id = SpiffeId::app(&mesh.trust_domain, name);
            match Identity::load(&directory, &id) {
                Ok(identity) => valid(&directory, &id.to_string(), identity.facts(), report),
                Err(error) => report.bad_as_said(error),
            }
        }
    }
}

fn sidecar_files(mesh: &Mesh, name: &ServiceName, service: &Service, directory: &Path, report: &mut Report) {
    let id = SpiffeId::sidecar(&mesh.trust_domain, name);
    let identity = match SidecarIdentity::load(directory, &id) {
        Ok(identity) => identity,
        Err(error) => return report.bad_as_said(error),
    };
    valid(directory, &id.to_string(), identity.identity.facts(), report);
    edges(mesh, name, &identity.edges, directory, report);
    let tls_ingress = service.ingress.as_ref().is_some_and(|ingress| ingress.tls_port.is_some());
    match &identity.ingress {
        Some(ingress) => valid(&directory.join("ingress.pem"), "ingress", ingress.facts(), report),
        None if tls_ingress => {
            let what =
                format!("{}: no ingress.pem, and the mesh file opens a TLS ingress", directory.display());
            report.bad(what, MAKE_CERTS);
        }
        None => {}
    }
}

fn valid(path: &Path, who: &str, facts: &LeafFacts, report: &mut Report) {
    let what = format!("{}: {who}, until {}", path.display(), facts.not_after.date());
    match expiry_warning(facts.not_after, OffsetDateTime::now_utc()) {
        Some(warning) if !warning.left.is_positive() => report.bad(format!("{what}: it is over"), MAKE_CERTS),
        Some(warning) => report.warn(format!("{what}: {} days left", warning.left.whole_days()), MAKE_CERTS),
        None => report.good(what),
    }
}

/// Whether a sidecar has a secret for every edge that the mesh file allows it.
pub(super) fn edges(mesh: &Mesh, me: &ServiceName, edges: &EdgeSecrets, place: &Path, report: &mut Report) {
    if mesh.signatures == Signatures::Off {
        return;
    }
    for allow in &mesh.allow {
        let Source::Service(from) = &allow.from else { continue };
        let missing = if from == me {
            edges.signing(allow.to.as_str()).is_none()
        } else {
            allow.to == *me && edges.verifying(from.as_str()).next().is_none()
        };
        if missing {
            report.bad(
                format!("{}: no secret for the edge {from} → {}", place.display(), allow.to),
                MAKE_CERTS,
            );
        }
    }
}

/// Whether the container's user may read its directory. A file that is missing is for others to say.
fn readable(directory: &Path, names: &[&str], ids: Ids, report: &mut Report) {
    let files = names.iter().map(|name| directory.join(name));
    for path in std::iter::once(directory.to_owned()).chain(files) {
        if may_read(&path, ids) == Some(false) {
            let (uid, gid) = (ids.uid, ids.gid);
            report.bad(
                format!("{}: its container runs as {uid}:{gid} and can't read it", path.display()),
                MAKE_CERTS,
            );
        }
    }
}

/// The variables of docker-compose.yml that name published ports, and what is published there.
const PUBLISHED: [(&str, u16, &str); 3] = [
    ("KIRO_HTTP_PORT", 8080, "dashboard-pod"),
    ("KIRO_HTTPS_PORT", 8443, "dashboard-pod"),
    ("KIRO_JAEGER_PORT", 16686, "jaeger"),
];

fn ports(env: &str, report: &mut Report) {
    let mut running = None;
    for (name, default, service) in PUBLISHED {
        let set = std::env::var(name).ok().or_else(|| variable(env, name).map(str::to_owned));
        let port = match set.as_deref().map(str::parse::<u16>) {
            None => default,
            Some(Ok(port)) => port,
            Some(Err(_)) => {
                report.bad(
                    format!("{name} is no port: {}", set.unwrap_or_default()),
                    "set it to a free port, in .env",
                );
                continue;
            }
        };
        // Without SO_REUSEPORT, so that whoever listens there is noticed.
        let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) else {
            report.good(format!("127.0.0.1:{port}: free for {service}"));
            continue;
        };
        let what = format!("127.0.0.1:{port}, for {service}, can't be had: {error}");
        let fix = format!("end who listens there, or set {name} to a free port, in .env");
        match running.get_or_insert_with(running_services) {
            Some(running) if running.iter().any(|found| found == service) => {
                report.good(format!("127.0.0.1:{port}: {service} runs and is published there"));
            }
            Some(_) => report.bad(what, fix),
            None => report.warn(what, format!("unless that is this mesh, which runs already: {fix}")),
        }
    }
}

/// What Compose says runs of this mesh; `None` where there is no Compose to ask.
fn running_services() -> Option<Vec<String>> {
    let asked =
        Command::new("docker").args(["compose", "ps", "--status", "running", "--services"]).output().ok()?;
    let text = String::from_utf8_lossy(&asked.stdout);
    asked.status.success().then(|| text.lines().map(|line| line.trim().to_owned()).collect())
}

/// A variable in a file that Compose reads; the last line counts.
fn variable<'a>(env: &'a str, name: &str) -> Option<&'a str> {
    let set = |line: &'a str| {
        let line = line.trim();
        let (found, value) = line.strip_prefix("export ").unwrap_or(line).split_once('=')?;
        let value = value.split(" #").next().unwrap_or_default();
        (found.trim() == name).then(|| value.trim().trim_matches(['"', '\'']))
    };
    env.lines().filter_map(set).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_as_compose_reads_them() {
        let env = "A=1\n# A=2\nexport B = \"x y\" # why\nA=3\nAA=4\n";
        assert_eq!(variable(env, "A"), Some("3"));
        assert_eq!(variable(env, "B"), Some("x y"));
        assert_eq!(variable(env, "C"), None);
    }
}
