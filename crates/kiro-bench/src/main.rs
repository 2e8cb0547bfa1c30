//! `make bench`: is Kiro as light as its peers?
//!
//! It sets pairs of proxies beside each other at the same work, in rounds that alternate, and writes `target/bench/results.json`, a
//! table, and `docs/performance.md` with plots. See [`plan`] for the pairs and the scenarios, [`pairs`] for how each is set up, [`load`]
//! for who makes the load, `pairs::kiro::audit` for the rules that a run with everything on must keep.
//!
//! **Invariant.** Whatever it starts is its own child and ends with it; it listens and connects on loopback alone, and writes below
//! `target/bench`, but for the documents.

mod app;
mod child;
mod collector;
mod hostile;
mod identity;
mod instructions;
mod load;
mod measure;
mod pairs;
mod plan;
mod ports;
mod records;
mod report;
mod run;
mod stats;
mod tools;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use kiro_bench::{procfs, say, stop};

/// Sets Kiro beside Envoy, HAProxy and nginx
#[derive(Debug, Parser)]
#[command(name = "kiro-bench")]
pub(crate) struct Options {
    /// One short round, to see that everything works: its figures are worth little
    #[arg(long)]
    quick: bool,
    /// Only these pairs
    #[arg(long, value_delimiter = ',', value_name = "PAIR,…")]
    pairs: Vec<plan::Pair>,
    /// Only these scenarios
    #[arg(long, value_delimiter = ',', value_name = "SCENARIO,…")]
    scenarios: Vec<plan::Scenario>,
    /// How often each is measured
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Seconds of a round that count
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: Option<u64>,
    /// The sidecar; by default the one that was built beside this program
    #[arg(long, value_name = "FILE")]
    kiro_proxy: Option<std::path::PathBuf>,
    /// Install nothing, not even below target/bench
    #[arg(long)]
    no_install: bool,
    /// Count the instructions of a request under valgrind, and compare with what is kept in docs/performance
    #[arg(long, conflicts_with_all = ["quick", "report"])]
    instructions: bool,
    /// Only these cases of --instructions
    #[arg(long, value_delimiter = ',', value_name = "CASE,…", requires = "instructions")]
    cases: Vec<instructions::Case>,
    /// Keep what --instructions counts
    #[arg(long, requires = "instructions")]
    accept: bool,
    /// Measure what hostile clients cost others and in memory, and write it into docs/hostile-peers.md
    #[arg(long, conflicts_with = "instructions")]
    hostile: bool,
    /// Only these attacks of --hostile
    #[arg(long, value_delimiter = ',', value_name = "ATTACK,…", requires = "hostile")]
    attacks: Vec<hostile::Attack>,
    /// Only these doors of --hostile
    #[arg(long, value_delimiter = ',', value_name = "DOOR,…", requires = "hostile")]
    doors: Vec<hostile::Door>,
    /// Write table and documents anew from the last run's results
    #[arg(long)]
    report: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = stop::listen().and_then(|()| run::run(&options));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With stderr gone there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "kiro-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
