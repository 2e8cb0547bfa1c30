//! The sidecar as a program of its own. The images carry the same as `kiro proxy`.

use std::process::ExitCode;

use clap::Parser;
use kiro_proxy::process::{self, Arguments};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Kiro's sidecar: mutual TLS, signatures, policy and traces for one service.
#[derive(Debug, Parser)]
#[command(name = "kiro-proxy", version)]
struct Program {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    process::run(Program::parse().arguments)
}
