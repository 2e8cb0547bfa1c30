//! How does an application come back after its pod's network namespace has died?
//!
//! By ending. `kiro guard -- COMMAND` starts the application and stays in front of it: it passes signals on and hands back the
//! exit code, and once every interface of its start has been gone for a while ([`kiro_core::interfaces`] says why so long) it ends
//! the application, so that Docker starts the container again, in the new namespace. It knows nothing else of the mesh.
//!
//! As a container's first process it also collects the orphans that nobody else would.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kiro_core::interfaces::Watch;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::time::{Instant as TokioInstant, MissedTickBehavior, interval, sleep_until};

use crate::output::note;

/// Run a command and end it when the pod's network has gone, so that the container is started again.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How long the command may take to end after its network has gone, in milliseconds. Short: whom could it still answer?
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 500)]
    grace_ms: u64,
    /// Where the interfaces are listed.
    #[arg(long, value_name = "FILE", default_value = "/proc/net/dev", hide = true)]
    interfaces: PathBuf,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The exit code after the network has gone, whatever the command made of its end: "try again" in sysexits.h.
const NETWORK_GONE: u8 = 75;
/// What shells answer for a command that can't be run, and for one that isn't there.
const NOT_RUNNABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// How often the interfaces are looked at: one small read.
const LOOK: Duration = Duration::from_millis(200);

/// What is passed on: everything that a person or an engine sends to ask something of the application.
const PASSED_ON: [(SignalKind, Signal); 6] = [
    (SignalKind::terminate(), Signal::TERM),
    (SignalKind::interrupt(), Signal::INT),
    (SignalKind::hangup(), Signal::HUP),
    (SignalKind::quit(), Signal::QUIT),
    (SignalKind::user_defined1(), Signal::USR1),
    (SignalKind::user_defined2(), Signal::USR2),
];

/// Runs the command to its end and gives the exit code.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(guard(arguments))
}

async fn guard(arguments: &Arguments) -> anyhow::Result<u8> {
    // Before the command starts, so that no signal and no end of it is missed.
    let mut signals = Signals::listen()?;
    let mut ended = signal(SignalKind::child()).context("SIGCHLD can't be handled")?;
    let mut network = Network::of(&arguments.interfaces);
    let (program, rest) = arguments.command.split_first().context("no command")?;
    let child = match Command::new(program).args(rest).spawn() {
        Ok(child) => child,
        Err(error) => return Ok(not_started(program, &error)),
    };
    let child =
        i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("the child has no process id")?;

    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut kill_at: Option<TokioInstant> = None;
    loop {
        let patience = kill_at.unwrap_or_else(TokioInstant::now);
        tokio::select! {
            _ = ended.recv() => if let Some(status) = collect(child)? {
                return Ok(if kill_at.is_some() { NETWORK_GONE } else { exit_code(status) });
            },
            passed_on = signals.next() => send(child, passed_on),
            _ = look.tick(), if kill_at.is_none() => if network.is_gone() {
                note("kiro guard: the pod's network namespace is gone: ending, so that the container is started in the new one");
                send(child, Signal::TERM);
                kill_at = Some(TokioInstant::now() + Duration::from_millis(arguments.grace_ms));
            },
            () = sleep_until(patience), if kill_at.is_some() => {
                send(child, Signal::KILL);
                // Once is enough: what even SIGKILL does not end, a second one does not either, and its end is still waited for.
                kill_at = Some(TokioInstant::now() + Duration::from_secs(3600));
            }
        }
    }
}

fn not_started(program: &OsString, error: &std::io::Error) -> u8 {
    note(&format!("kiro guard: {} can't be started: {error}", Path::new(program).display()));
    if error.kind() == ErrorKind::NotFound { NOT_FOUND } else { NOT_RUNNABLE }
}

/// Collects whoever has ended, orphans that were handed to us included; the status if the command was among them.
fn collect(child: Pid) -> anyhow::Result<Option<WaitStatus>> {
    let mut status_of_child = None;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == child => status_of_child = Some(status),
            Ok(Some(_)) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(status_of_child),
            Err(error) => return Err(error).context("waiting for the command failed"),
        }
    }
}

/// A command that was killed by a signal has no exit code; shells say 128 and the signal's number.
fn exit_code(status: WaitStatus) -> u8 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

fn send(child: Pid, signal: Signal) {
    // It fails only where the command has just ended, which the next round sees.
    let _ = kill_process(child, signal);
}

struct Signals(Vec<(SignalStream, Signal)>);

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |(kind, passed_on): (SignalKind, Signal)| Ok((signal(kind)?, passed_on));
        let streams: std::io::Result<Vec<_>> = PASSED_ON.into_iter().map(listen).collect();
        Ok(Self(streams.context("signals can't be handled")?))
    }

    async fn next(&mut self) -> Signal {
        std::future::poll_fn(|context| {
            for (stream, passed_on) in &mut self.0 {
                if stream.poll_recv(context).is_ready() {
                    return Poll::Ready(*passed_on);
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// The interfaces of this process. Where the system lists none there is no namespace to lose.
struct Network<'a> {
    listing: &'a Path,
    watch: Option<Watch>,
}

impl<'a> Network<'a> {
    fn of(listing: &'a Path) -> Self {
        let watch = std::fs::read_to_string(listing).ok().map(|text| Watch::new(&text));
        Self { listing, watch }
    }

    fn is_gone(&mut self) -> bool {
        let (Some(watch), Ok(text)) = (&mut self.watch, std::fs::read_to_string(self.listing)) else {
            return false;
        };
        watch.observe(&text, Instant::now())
    }
}
