//! The sidecar, built beside the tests so that each test starts the one that belongs to it. It is `kiro-proxy` and nothing else.

use std::process::ExitCode;

use clap::Parser;
use kiro_proxy::process::{self, Arguments};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Kiro's sidecar: mutual TLS, signatures, policy and traces for one service.
#[derive(Debug, Parser)]
#[command(name = "conformance-sidecar", version)]
struct Program {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    process::run(Program::parse().arguments)
}
