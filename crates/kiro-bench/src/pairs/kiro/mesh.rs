//! Which mesh files do the sidecars get?

use std::fmt::Write as _;
use std::net::SocketAddr;

use crate::identity::{CALLEE, CALLER, TRUST_DOMAIN};
use crate::plan::Mode;

/// Services of the large mesh file.
const LARGE_SERVICES: usize = 1_000;
/// Lines of its policy for each service.
const LARGE_LINES_PER_SERVICE: usize = 10;
/// Lines of the policy with everything on.
const POLICY_LINES: usize = 20;
/// What the load asks for; what most of it asks for is last, so that it pays for all lines.
const PATHS: [&str; 6] = ["/1k", "/16k", "/1m", "/post", "/bench.Echo/Unary", "/"];

/// One of the mesh files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MeshFile {
    /// Signatures required, twenty lines of policy with paths.
    Everything,
    /// Signatures off, one line of policy.
    OneLine,
    /// Like `Everything`, for calls from outside: the callee has an ingress at `entry`'s port.
    Ingress,
    /// Like `Everything`, and the callee has an ingress at this port, open for what the load asks for.
    Doors(u16),
    /// As it comes, with three services and three lines.
    Small,
    /// As it comes, with a thousand services and ten thousand lines.
    Large,
}

/// The services of the largest file, which are those of every other one too.
pub(crate) fn services() -> Vec<String> {
    let fixed = [CALLER, CALLEE, "web"].map(str::to_owned);
    fixed.into_iter().chain((3..LARGE_SERVICES).map(|number| format!("service-{number}"))).collect()
}

impl MeshFile {
    /// Its text. `entry` is where the caller's client finds a TCP service.
    pub(crate) fn text(self, mode: Mode, app: SocketAddr, dial: SocketAddr, entry: SocketAddr) -> String {
        let signatures = if self == Self::OneLine { "off" } else { "required" };
        let (protocol, local) = match mode {
            Mode::Http => ("", String::new()),
            Mode::Grpc => (", protocol: grpc", String::new()),
            Mode::Tcp => (", protocol: tcp", format!(", local_port: {}", entry.port())),
        };
        let port = app.port();
        let ingress = match self {
            Self::Ingress => format!(", ingress: {{ port: {} }}", entry.port()),
            Self::Doors(port) => format!(", ingress: {{ port: {port} }}"),
            Self::Everything | Self::OneLine | Self::Small | Self::Large => String::new(),
        };
        let mut text = format!(
            "trust_domain: {TRUST_DOMAIN}
signatures: {signatures}
services:
  {CALLER}: {{ app: {{ port: 9 }} }}
  {CALLEE}: {{ app: {{ port: {port}{protocol} }}{local}{ingress}, endpoints: [\"{dial}\"] }}
  web: {{ app: {{ port: 9 }} }}
"
        );
        if self == Self::Large {
            for service in services().iter().skip(3) {
                // Writing to a String does not fail.
                let _ = writeln!(text, "  {service}: {{ app: {{ port: 9 }}, endpoints: [\"{dial}\"] }}");
            }
        }
        text.push_str("allow:\n");
        for line in self.lines(mode) {
            text.push_str(&line);
        }
        text
    }

    fn lines(self, mode: Mode) -> Vec<String> {
        // A tunnel has neither method nor path.
        let whole = format!("  - {{ from: {CALLER}, to: {CALLEE} }}\n");
        let from = if self == Self::Ingress { "ingress" } else { CALLER };
        let edge = |from: &str, to: &str, path: &str| {
            format!("  - {{ from: {from}, to: {to}, methods: [GET, POST], paths: [\"{path}\"] }}\n")
        };
        let path = |to: &str, path: &str| edge(from, to, path);
        let last = |path_line: String| if mode == Mode::Tcp { whole.clone() } else { path_line };
        match self {
            Self::OneLine => vec![whole],
            Self::Everything | Self::Ingress => {
                let to = if mode == Mode::Tcp { "web" } else { CALLEE };
                let never = (PATHS.len()..POLICY_LINES).map(|number| path(to, &format!("/never/{number}/*")));
                let asked = PATHS.iter().map(|asked| path(to, asked));
                let mut lines: Vec<String> = never.chain(asked).collect();
                if let Some(line) = lines.last_mut() {
                    *line = last(line.clone());
                }
                lines
            }
            Self::Doors(_) => {
                let outside = PATHS.iter().map(|asked| edge("ingress", CALLEE, asked));
                outside.chain(Self::Everything.lines(mode)).collect()
            }
            Self::Small => vec![path("web", "/a/*"), path("web", "/b/*"), last(path(CALLEE, "/"))],
            Self::Large => {
                let services = services();
                let others = services.iter().skip(2).flat_map(|service| {
                    (0..LARGE_LINES_PER_SERVICE).map(move |number| {
                        format!("  - {{ from: {CALLEE}, to: {service}, methods: [GET], paths: [\"/{number}/*\"] }}\n")
                    })
                });
                let never = (1..2 * LARGE_LINES_PER_SERVICE)
                    .map(|number| path(CALLEE, &format!("/never/{number}/*")));
                others.chain(never).chain([last(path(CALLEE, "/"))]).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(file: MeshFile, mode: Mode) -> usize {
        let address = SocketAddr::from(([127, 0, 0, 1], 20_000));
        let entry = SocketAddr::from(([127, 0, 0, 1], 20_001));
        let mesh = kiro_core::mesh::parse(&file.text(mode, address, address, entry)).unwrap();
        mesh.allow.len()
    }

    #[test]
    fn policies_are_as_long_as_they_say() {
        assert_eq!(lines(MeshFile::Everything, Mode::Http), POLICY_LINES);
        assert_eq!(lines(MeshFile::Ingress, Mode::Http), POLICY_LINES);
        assert_eq!(lines(MeshFile::Doors(20_002), Mode::Http), POLICY_LINES + PATHS.len());
        assert_eq!(lines(MeshFile::OneLine, Mode::Http), 1);
        assert_eq!(lines(MeshFile::Small, Mode::Http), 3);
        assert_eq!(lines(MeshFile::Large, Mode::Http), 10_000);
        assert_eq!(services().len(), 1_000);
    }

    #[test]
    fn every_protocol_has_its_mesh_file() {
        for mode in [Mode::Http, Mode::Grpc, Mode::Tcp] {
            assert_eq!(lines(MeshFile::Everything, mode), POLICY_LINES);
            assert_eq!(lines(MeshFile::OneLine, mode), 1);
        }
    }
}
