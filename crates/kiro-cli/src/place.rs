//! Where in the mesh does this command run?
//!
//! In a sidecar's container, whose variables say it: the same ones that configure the sidecar.

use std::path::{Path, PathBuf};

use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_core::mesh::{self, Mesh, Service};

use crate::failure::{Failure, SETUP};

/// The sidecar that this command speaks for.
#[derive(Debug, clap::Args)]
pub(crate) struct Place {
    /// The service whose sidecar this is.
    #[arg(long, env = "KIRO_SERVICE", value_parser = service, hide_env_values = true)]
    pub(crate) service: Option<ServiceName>,
    /// The directory with the sidecar's certificate and key.
    #[arg(
        long,
        env = "KIRO_IDENTITY_DIR",
        value_name = "DIR",
        default_value = "/etc/kiro/identity",
        hide_env_values = true
    )]
    pub(crate) identity: PathBuf,
    /// The directory with mesh.yaml [default: /etc/kiro/mesh with a service, else docker/mesh].
    #[arg(long, env = "KIRO_MESH_DIR", value_name = "DIR", hide_env_values = true)]
    pub(crate) mesh: Option<PathBuf>,
}

/// The name of the mesh file in its directory.
const MESH_FILE: &str = "mesh.yaml";

fn service(text: &str) -> Result<ServiceName, String> {
    ServiceName::parse(text).map_err(|error| error.to_string())
}

/// The mesh file of a sidecar's container, or of the working directory.
pub(crate) fn mesh_file(directory: Option<&Path>, in_container: bool) -> PathBuf {
    let default = if in_container { "/etc/kiro/mesh" } else { "docker/mesh" };
    directory.unwrap_or(Path::new(default)).join(MESH_FILE)
}

/// Reads and checks a mesh file.
pub(crate) fn read_mesh(file: &Path) -> Result<Mesh, Failure> {
    let text = std::fs::read_to_string(file).map_err(|error| {
        Failure::new(
            SETUP,
            format!("the mesh file {} can't be read: {error}", file.display()),
            "name its directory with --mesh, and let everybody read it: it holds no secret",
        )
    })?;
    mesh::parse(&text).map_err(|problems| {
        Failure::new(
            SETUP,
            format!("{} has problems:\n{problems}", file.display()),
            "mend the lines that are named",
        )
    })
}

/// A sidecar's own part of the mesh file.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) name: ServiceName,
    pub(crate) service: Service,
    pub(crate) id: SpiffeId,
    pub(crate) mesh: Mesh,
}

impl Place {
    /// What the mesh file says of this sidecar.
    pub(crate) fn own(&self) -> Result<Own, Failure> {
        let name = self.service.clone().ok_or_else(|| {
            Failure::new(
                SETUP,
                "no sidecar to speak for: KIRO_SERVICE is not set",
                "run this in a sidecar's container, as in `docker compose exec profile-1-proxy kiro …`, or say --service, --identity and --mesh",
            )
        })?;
        let file = mesh_file(self.mesh.as_deref(), true);
        let mesh = read_mesh(&file)?;
        let service = mesh.services.get(name.as_str()).cloned().ok_or_else(|| {
            let known: Vec<_> = mesh.services.keys().map(ServiceName::as_str).collect();
            Failure::new(
                SETUP,
                format!("{} has no service `{name}`; it has {}", file.display(), known.join(", ")),
                "add the service to `services`, or set KIRO_SERVICE to one of those",
            )
        })?;
        let id = SpiffeId::sidecar(&mesh.trust_domain, &name);
        Ok(Own { name, service, id, mesh })
    }
}
