//! What do people see of Kiro at work? Log lines, traces and metrics, for the sidecars and for applications alike.
//!
//! This crate is an API border: it depends on no other crate of Kiro, knows nothing of the mesh, and hides
//! OpenTelemetry, `tracing-subscriber` and `prometheus-client` behind a few types.
//!
//! **Invariant.** Nothing here makes a request wait. Lines and spans are handed to bounded queues; what does not fit
//! is dropped, counted and said. A reader that has stopped reading stdout, or a collector that is down, costs lines
//! and spans, never latency.
//!
//! - [`log`]: lines on stdout from a writer thread, `tracing` events among them.
//! - [`access`]: the one line a request.
//! - [`trace`]: trace contexts on the wire, the sampler, and spans on their way to an OTLP collector.
//! - [`app`]: the SERVER and CLIENT spans of an application.
//! - [`metrics`]: counters, gauges and histograms of atomics, and their text.

pub mod access;
pub mod app;
mod json;
pub mod log;
pub mod metrics;
mod timestamp;
pub mod trace;

pub use access::AccessRecord;
pub use log::{Format, LineBuffer, LogError, LogSink, init_logging};
pub use trace::{Remote, ServiceInfo, Span, TraceContext, Tracing, TracingError, extract, inject};
