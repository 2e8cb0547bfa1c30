//! Which charts are worth a look?

use crate::plan::{GRPC_STREAMS, IDLE_CONNECTIONS, OPEN_LOOP_CONNECTIONS, Pair, Scenario, TCP_CONNECTIONS};
use crate::records::Results;
use crate::report::svg::{Bar, bars};
use crate::stats::Figure;

/// A chart in a file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plot {
    /// Its file's name, without the ending.
    pub(crate) name: &'static str,
    /// What it shows.
    pub(crate) title: &'static str,
    /// The picture.
    pub(crate) svg: String,
}

type Asked = (&'static str, &'static str, &'static str, Scenario, usize, Figure);

const US: &str = "µs of user and system time of both proxies for a request";
const MB: &str = "MB of both proxies";
const MS: &str = "ms";

const CHARTS: [Asked; 9] = [
    ("cpu-small", "CPU a request, twelve bytes, 32 connections", US, Scenario::Small, 32, Figure::CpuUs),
    ("cpu-16k", "CPU a request, 16 KiB down, 32 connections", US, Scenario::Get16k, 32, Figure::CpuUs),
    ("cpu-1m-down", "CPU a request, 1 MiB down, 8 connections", US, Scenario::Down1m, 8, Figure::CpuUs),
    ("cpu-1m-up", "CPU a request, 1 MiB up, 8 connections", US, Scenario::Up1m, 8, Figure::CpuUs),
    ("cpu-grpc", "CPU a call, gRPC unary, 32 streams", US, Scenario::GrpcUnary, GRPC_STREAMS, Figure::CpuUs),
    (
        "cpu-tcp",
        "CPU a MiB, TCP",
        "µs of user and system time of both proxies for a MiB",
        Scenario::TcpStream,
        TCP_CONNECTIONS,
        Figure::CpuUs,
    ),
    (
        "p99-open-loop",
        "99 % of answers within, at a fixed rate",
        MS,
        Scenario::OpenLoop,
        OPEN_LOOP_CONNECTIONS,
        Figure::P99Ms,
    ),
    ("memory-small", "Memory, 32 connections at work", MB, Scenario::Small, 32, Figure::RssMb),
    ("memory-idle", "Memory, 10,000 idle connections", MB, Scenario::Idle, IDLE_CONNECTIONS, Figure::RssMb),
];

/// Those charts for which there are figures.
pub(crate) fn all(results: &Results) -> Vec<Plot> {
    CHARTS.into_iter().filter_map(|asked| one(results, asked)).collect()
}

fn one(results: &Results, (name, title, unit, scenario, connections, figure): Asked) -> Option<Plot> {
    let bar = |pair: &Pair| {
        let (spread, workers) = results.best(*pair, scenario, connections, figure)?;
        let label = if workers == 0 { pair.to_string() } else { format!("{pair} ({workers}w)") };
        Some(Bar { label, spread, ours: pair.is_kiro() })
    };
    let drawn: Vec<Bar> = Pair::ALL.iter().filter_map(bar).collect();
    (!drawn.is_empty()).then(|| Plot { name, title, svg: bars(title, unit, &drawn) })
}
