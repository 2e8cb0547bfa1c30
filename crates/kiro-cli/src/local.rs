//! `kiro local`: the whole mesh in one process, without Docker and without a name to add anywhere.

use anyhow::Context;
use clap::Args;
use kiro_local::demo::PORT_BASE;
use kiro_local::{Demo, DemoOptions};
use kiro_telemetry::log::{Format, init_logging};
use tokio::signal::unix::{SignalKind, signal};

use crate::output;

/// Run the demonstration in one process: three services with their sidecars on loopback, certificates made in memory.
///
/// Traces go to a collector where OTEL_EXPORTER_OTLP_ENDPOINT is set; otherwise each finished trace is drawn on the terminal.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The ingress's port; the mesh takes the hundred ports above it as well.
    #[arg(long, default_value_t = PORT_BASE)]
    port_base: u16,
    /// What is logged: a tracing filter.
    #[arg(long, env = "KIRO_LOG", default_value = "info")]
    log: String,
    /// `pretty` or `json`.
    #[arg(long, env = "KIRO_LOG_FORMAT", default_value = "pretty")]
    log_format: Format,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let log = init_logging(arguments.log_format, &arguments.log, None)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the system gives no runtime")?;
    let clean = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM can't be handled")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("Ctrl-C can't be handled")?;
        let options = DemoOptions {
            port_base: arguments.port_base,
            log: log.clone(),
            log_format: arguments.log_format,
            draw: Some(output::note),
        };
        let demo = Demo::start(options).await?;
        log.flush(FLUSH);
        output::note(&format!(
            "\nThe mesh is up.\n\n  page          {url}\n  a user        curl {url}/dashboard/alice\n  a disabled    curl {url}/dashboard/mallory\n  a denied call curl {url}/try/denied\n\nCtrl-C ends it.\n",
            url = demo.url
        ));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        output::note("\nending: sidecars drain, spans are flushed");
        anyhow::Ok(demo.stop().await)
    })?;
    log.flush(FLUSH);
    Ok(u8::from(!clean))
}

const FLUSH: std::time::Duration = std::time::Duration::from_secs(2);
