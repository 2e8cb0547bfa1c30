//! `make chaos`: does what breaks in one place stay there?
//!
//! It brings the demonstration up in containers of its own, beside whatever else runs, sends requests at a rate that no failure slows
//! down, breaks one thing, mends it, and holds what became of every single request against a promise. It writes
//! `target/chaos/results.json`, a ledger for each experiment, and `docs/resilience.md`.
//!
//! - [`experiments`]: what is done, and what is promised. [`faults`]: how each thing is broken and mended.
//! - [`load`]: the requests. [`ledger`]: what became of each. [`figures`], [`judge`]: what that says, and whether it was kept.
//! - [`mesh`]: the containers. [`command`]: programs with an end. [`report`]: the line, the file and the page.
//!
//! **Invariant.** What it starts it ends, and what it breaks it mends, on Ctrl-C and after an error too: both hang on `Drop`. It touches
//! containers of its own Compose project alone, and certificates and a mesh file of its own below `target/chaos`.
//!
//! **Invariant.** Every request that was planned is in the ledger exactly once, or the experiment counts for nothing.

mod command;
mod experiments;
mod faults;
mod figures;
mod judge;
mod ledger;
mod load;
mod mesh;
mod netns;
mod report;
mod run;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Breaks a mesh in containers, one thing at a time, and says what its users saw
#[derive(Debug, Parser)]
#[command(name = "kiro-chaos")]
pub(crate) struct Options {
    /// Only these experiments
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    only: Vec<String>,
    /// How long the fault lasts, where that can be chosen
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: Option<u64>,
    /// Requests a second, in place of each experiment's own
    #[arg(long, value_parser = clap::value_parser!(u32).range(10..=2000))]
    rate: Option<u32>,
    /// Names of all experiments, with their promises
    #[arg(long)]
    list: bool,
    /// Take the images as they are
    #[arg(long)]
    no_build: bool,
    /// Write the page anew from the last run's results
    #[arg(long)]
    report: bool,
    /// Fail where a promise was broken
    #[arg(long)]
    strict: bool,
    /// The kiro command, which makes the certificates; by default the one that was built beside this program
    #[arg(long, value_name = "FILE")]
    kiro: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = kiro_bench::stop::listen().and_then(|()| run::run(&options));
    match outcome {
        Ok(kept) if kept || !options.strict => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            // With stderr gone there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "kiro-chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}
