//! The `kiro` command: what a person has at hand, and what stands in the images where there is no shell.
//!
//! - In every image: `guard` before applications, `pod` as a namespace's owner, `probe` for health checks, `call` and `check` for a
//!   person who looks into a pod.
//! - With the feature `mesh`, on a person's own machine: `certs`. What runs beside a workload is built without it, since it must not
//!   be able to mint an identity.

mod call;
#[cfg(feature = "mesh")]
mod certs;
mod check;
mod failure;
mod guard;
#[cfg(feature = "mesh")]
mod local;
mod output;
mod place;
mod pod;
mod probe;

use std::process::ExitCode;

use clap::Parser;

/// Kiro, a secure service mesh for Docker Compose.
#[derive(Debug, Parser)]
#[command(name = "kiro", version)]
enum Kiro {
    Guard(guard::Arguments),
    Pod(pod::Arguments),
    Probe(probe::Arguments),
    Call(call::Arguments),
    Check(check::Arguments),
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
        Kiro::Call(arguments) => call::run(&arguments),
        Kiro::Check(arguments) => check::run(&arguments),
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
