//! What is wrong with this mesh, and what is to be done about it?
//!
//! On a host, before anything is started ([`host`]): the mesh file, certificates and keys, who may read them, published ports. In a
//! sidecar's container, while it runs ([`pod`]): its own files as its own user, its ports, its application, and the way to every
//! service that it may call, up to the other sidecar's word on our certificate. Every problem is named with its fix, and the exit
//! code is 1 if there is one.

mod access;
mod host;
mod local;
mod pod;
mod report;

use std::path::PathBuf;

use crate::place::Place;
use report::Report;

/// Look at mesh file, certificates, ports and reachability, and say what is wrong and what to do.
///
/// In a sidecar's container (`docker compose exec profile-1-proxy kiro check`) it looks at what that sidecar needs; elsewhere, at what
/// the whole mesh needs before it starts.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    place: Place,
    /// On a host: the directory that `kiro certs` wrote.
    #[arg(long, value_name = "DIR", default_value = "certs")]
    certs: PathBuf,
    /// On a host: the file that Compose reads variables from.
    #[arg(long, value_name = "FILE", default_value = ".env")]
    env_file: PathBuf,
    #[command(flatten)]
    ports: pod::Ports,
}

/// Looks, and gives the exit code.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let mut report = Report::default();
    match &arguments.place.service {
        Some(_) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(pod::check(&arguments.place, &arguments.ports, &mut report));
        }
        None => host::check(arguments, &mut report),
    }
    Ok(report.end())
}
