//! Where do applications find the tcp services that they may reach?

use std::net::SocketAddr;

use kiro_core::mesh::Mesh;
use serde_json::Value;

use super::report::Report;
use crate::place::Own;
use crate::probe;

/// On a host: what the mesh file says.
pub(super) fn declared(mesh: &Mesh, report: &mut Report) {
    for caller in mesh.services.keys() {
        for (callee, port) in mesh.local_ports(caller) {
            report.good(format!("{caller} finds {callee} at 127.0.0.1:{port} of its pod"));
        }
    }
}

/// In a pod: what the sidecar says of its own. Nobody connects there to see: that would be a connection to the service's application.
pub(super) fn bound(own: &Own, admin: SocketAddr, report: &mut Report) {
    let wanted = own.mesh.local_ports(&own.name);
    if wanted.is_empty() {
        return;
    }
    let config = match probe::config(admin) {
        Ok(config) => config,
        Err(what) => {
            return report.bad(
                format!("local ports: {what}"),
                format!("read its log: `docker compose logs {}-proxy`", own.name),
            );
        }
    };
    for (callee, port) in wanted {
        let shown = config.get("local_ports").and_then(|ports| ports.get(callee.as_str()));
        let said = |key: &str| shown.and_then(|shown| shown.get(key)).and_then(Value::as_str);
        match (said("address"), said("error")) {
            (Some(address), _) => report.good(format!("{callee}: the application finds it at {address}")),
            (None, Some(error)) => report.bad(
                format!("{callee}: the application can't reach it at port {port}: {error}"),
                format!("free the port in this pod, or give `services.{callee}` another `local_port`"),
            ),
            (None, None) => report.bad(
                format!("{callee}: the sidecar does not listen at port {port} for it"),
                format!(
                    "it runs with another mesh file; its log says why: `docker compose logs {}-proxy`",
                    own.name
                ),
            ),
        }
    }
}
