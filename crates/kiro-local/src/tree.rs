//! How does a finished trace look on a terminal?
//!
//! [`TreeExporter`] keeps spans as they end and hands a trace over once nothing more has come for it; [`draw`] makes a tree of it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kiro_telemetry::trace::{OTelSdkResult, SpanData, SpanExporter, SpanKind, Status};

/// Traces that may be collected at a time, and spans of each: a terminal is for looking, not for load.
const TRACES_MAX: usize = 256;
const SPANS_MAX: usize = 256;

/// How long nothing may have come for a trace before it counts as finished.
const QUIET: Duration = Duration::from_millis(250);

/// One span, as the tree shows it.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// Whose it is.
    pub service: String,
    /// What it says.
    pub span: SpanData,
}

#[derive(Debug, Default)]
struct Collected {
    traces: HashMap<u128, (Instant, Vec<Leaf>)>,
}

/// Where the exporters of all services of a process put their spans.
#[derive(Debug, Clone, Default)]
pub struct Traces(Arc<Mutex<Collected>>);

impl Traces {
    /// The exporter of one process's spans.
    #[must_use]
    pub fn exporter(&self, service: impl Into<String>) -> TreeExporter {
        TreeExporter { service: service.into(), traces: self.clone() }
    }

    /// Takes the traces for which nothing has come lately.
    #[must_use]
    pub fn finished(&self) -> Vec<Vec<Leaf>> {
        let mut collected = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let done: Vec<u128> = collected
            .traces
            .iter()
            .filter(|(_, (last, _))| last.elapsed() >= QUIET)
            .map(|(id, _)| *id)
            .collect();
        done.iter().filter_map(|id| collected.traces.remove(id)).map(|(_, leaves)| leaves).collect()
    }

    fn add(&self, service: &str, spans: Vec<SpanData>) {
        let mut collected = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for span in spans {
            let id = u128::from_be_bytes(span.span_context.trace_id().to_bytes());
            if collected.traces.len() >= TRACES_MAX && !collected.traces.contains_key(&id) {
                continue;
            }
            let (last, leaves) = collected.traces.entry(id).or_insert_with(|| (Instant::now(), Vec::new()));
            *last = Instant::now();
            if leaves.len() < SPANS_MAX {
                leaves.push(Leaf { service: service.to_owned(), span });
            }
        }
    }
}

/// Puts one service's spans with those of the others.
#[derive(Debug)]
pub struct TreeExporter {
    service: String,
    traces: Traces,
}

impl SpanExporter for TreeExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.traces.add(&self.service, batch);
        Ok(())
    }
}

/// Draws a trace, the earliest span first.
#[must_use]
pub fn draw(leaves: &[Leaf]) -> String {
    let id = |leaf: &Leaf| u64::from_be_bytes(leaf.span.span_context.span_id().to_bytes());
    let parent = |leaf: &Leaf| u64::from_be_bytes(leaf.span.parent_span_id.to_bytes());
    let known: BTreeMap<u64, usize> =
        leaves.iter().enumerate().map(|(place, leaf)| (id(leaf), place)).collect();
    let mut children: BTreeMap<u64, Vec<&Leaf>> = BTreeMap::new();
    let mut roots = Vec::new();
    for leaf in leaves {
        if known.contains_key(&parent(leaf)) && parent(leaf) != id(leaf) {
            children.entry(parent(leaf)).or_default().push(leaf);
        } else {
            roots.push(leaf);
        }
    }
    for siblings in children.values_mut() {
        siblings.sort_by_key(|leaf| leaf.span.start_time);
    }
    roots.sort_by_key(|leaf| leaf.span.start_time);
    let Some(first) = roots.first() else { return String::new() };
    let begin = first.span.start_time;
    let mut out = format!("trace {}  ({} spans)\n", first.span.span_context.trace_id(), leaves.len());
    let last_root = roots.len().saturating_sub(1);
    for (place, root) in roots.iter().enumerate() {
        branch(&mut out, root, "", place == last_root, begin, &children, 0);
    }
    out
}

/// Spans can't nest deeper than a call chain does; a ring of parents would otherwise draw forever.
const DEPTH_MAX: usize = 64;

fn branch(
    out: &mut String,
    leaf: &Leaf,
    indent: &str,
    last: bool,
    begin: SystemTime,
    children: &BTreeMap<u64, Vec<&Leaf>>,
    depth: usize,
) {
    let span = &leaf.span;
    let millis = |duration: Duration| duration.as_secs_f64() * 1000.0;
    let start = span.start_time.duration_since(begin).unwrap_or_default();
    let length = span.end_time.duration_since(span.start_time).unwrap_or_default();
    let kind = match span.span_kind {
        SpanKind::Client => "→",
        SpanKind::Server => "←",
        SpanKind::Internal | SpanKind::Producer | SpanKind::Consumer => "·",
    };
    let attribute = |name: &str| {
        span.attributes
            .iter()
            .find(|attribute| attribute.key.as_str() == name)
            .map(|attribute| attribute.value.to_string())
    };
    let status = attribute("http.response.status_code").unwrap_or_default();
    let reject = attribute("kiro.reject").map(|code| format!(" [{code}]")).unwrap_or_default();
    let mark = if matches!(span.status, Status::Error { .. }) { " ✗" } else { "" };
    let (elbow, below) = if last { ("└─", "   ") } else { ("├─", "│  ") };
    let _ = writeln!(
        out,
        "{indent}{elbow} {:<18} {kind} {:<28} {status}{reject}{mark}  +{:.1} ms, {:.1} ms",
        leaf.service,
        span.name,
        millis(start),
        millis(length),
    );
    let id = u64::from_be_bytes(span.span_context.span_id().to_bytes());
    if depth >= DEPTH_MAX {
        return;
    }
    let below = format!("{indent}{below}");
    if let Some(inner) = children.get(&id) {
        let count = inner.len();
        for (place, child) in inner.iter().enumerate() {
            branch(out, child, &below, place + 1 == count, begin, children, depth + 1);
        }
    }
}
