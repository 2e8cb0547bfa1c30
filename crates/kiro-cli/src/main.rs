//! The `kiro` command: what a person has at hand, and what stands in the images where there is no shell.
//!
//! - In every image: `guard` before applications, `pod` as a namespace's owner, `probe` for health checks.
//! - In the sidecar's image (feature `sidecar`): `proxy`, the sidecar itself, and `call`, `check` and `health` for a person who
//!   looks into a pod.
//! - On a person's own machine (feature `mesh`): `certs` and `local`, with `call` and `check`. What runs beside a workload is built
//!   without it, since it must not be able to mint an identity.

#[cfg(feature = "sidecar")]
mod call;
#[cfg(feature = "mesh")]
mod certs;
#[cfg(feature = "sidecar")]
mod check;
#[cfg(feature = "sidecar")]
mod failure;
mod guard;
#[cfg(feature = "sidecar")]
mod health;
#[cfg(feature = "mesh")]
mod local;
mod output;
#[cfg(feature = "sidecar")]
mod place;
mod pod;
mod probe;

use std::process::ExitCode;

use clap::Parser;

#[cfg(feature = "sidecar")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Kiro, a secure service mesh for Docker Compose.
#[derive(Debug, Parser)]
#[command(name = "kiro", version)]
enum Kiro {
    Guard(guard::Arguments),
    Pod(pod::Arguments),
    Probe(probe::Arguments),
    /// Run a sidecar: mutual TLS, signatures, policy and traces for one service.
    #[cfg(feature = "sidecar")]
    Proxy(kiro_proxy::process::Arguments),
    #[cfg(feature = "sidecar")]
    Call(call::Arguments),
    #[cfg(feature = "sidecar")]
    Check(check::Arguments),
    #[cfg(feature = "sidecar")]
    Health(health::Arguments),
    #[cfg(feature = "mesh")]
    Certs(certs::CertsArgs),
    #[cfg(feature = "mesh")]
    Local(local::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Kiro::parse() {
        Kiro::Guard(arguments) => guard::run(&arguments),
        Kiro::Pod(arguments) => pod::run(&arguments),
        Kiro::Probe(arguments) => Ok(probe::run(&arguments)),
        #[cfg(feature = "sidecar")]
        Kiro::Proxy(arguments) => return kiro_proxy::process::run(arguments),
        #[cfg(feature = "sidecar")]
        Kiro::Call(arguments) => call::run(&arguments),
        #[cfg(feature = "sidecar")]
        Kiro::Check(arguments) => check::run(&arguments),
        #[cfg(feature = "sidecar")]
        Kiro::Health(arguments) => Ok(health::run(&arguments)),
        #[cfg(feature = "mesh")]
        Kiro::Certs(arguments) => certs::run(arguments).map(|()| 0),
        #[cfg(feature = "mesh")]
        Kiro::Local(arguments) => local::run(&arguments),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::note(&format!("kiro: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Kiro::command().debug_assert();
    }
}
