//! Has somebody asked for an end? Every wait of the tool asks here, so that an interrupted run ends what it started.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

static ASKED: AtomicBool = AtomicBool::new(false);

/// How often waits look.
const LOOK: Duration = Duration::from_millis(5);

/// From here on SIGINT and SIGTERM are noted instead of ending the process.
pub fn listen() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime for signals")?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt()).context("SIGINT can't be handled")?,
            signal(SignalKind::terminate()).context("SIGTERM can't be handled")?,
        )
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            });
            ASKED.store(true, Ordering::Relaxed);
        })
        .context("no thread for signals")?;
    Ok(())
}

/// Whether an end was asked for.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// An error once an end was asked for.
pub fn check() -> anyhow::Result<()> {
    if asked() { Err(anyhow::anyhow!("interrupted")) } else { Ok(()) }
}

/// Waits, unless an end is asked for meanwhile.
pub fn pause(length: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + length;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(LOOK));
    }
}
