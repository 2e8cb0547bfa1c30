//! What is counted, at which of the two sidecars, and who asks for it?

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::Setting;
use super::callgrind::Counted;
use crate::child::{Child, Output};
use crate::identity::{CALLEE, CALLER};
use crate::load::{grpc, h1};
use crate::pairs::kiro::{self, Addresses, MeshFile};
use crate::plan::Mode;
use crate::{ports, stop};

/// valgrind is some fifty times slower than the machine.
const START: Duration = Duration::from_secs(60);
/// Small enough that its digest is signed in the head.
const HELD_BYTES: usize = 1 << 10;
/// Large enough that it streams, signed by a trailer.
const STREAMED_BYTES: usize = 1 << 17;

/// One kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    /// A GET over HTTP/1.1 of twelve bytes.
    Get,
    /// A POST of a KiB, whose digest is signed in the head.
    Post1k,
    /// A POST of 128 KiB, which streams.
    Post128k,
    /// A gRPC call of one small message each way.
    GrpcUnary,
    /// A GET from outside the mesh.
    Ingress,
}

/// The sidecar that is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Side {
    /// The caller's.
    Outbound,
    /// The callee's.
    Inbound,
}

/// Everything that is counted. A request from outside meets one sidecar alone.
pub(super) fn all() -> impl Iterator<Item = (Case, Side)> {
    let both = [Case::Get, Case::Post1k, Case::Post128k, Case::GrpcUnary];
    let both = both.into_iter().flat_map(|case| [(case, Side::Outbound), (case, Side::Inbound)]);
    both.chain([(Case::Ingress, Side::Inbound)])
}

impl Case {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post1k => "post-1k",
            Self::Post128k => "post-128k",
            Self::GrpcUnary => "grpc-unary",
            Self::Ingress => "ingress",
        }
    }

    /// How many requests come before those that count, and how many count.
    fn requests(self) -> (u32, u32) {
        match self {
            Self::Get | Self::Post1k | Self::GrpcUnary | Self::Ingress => (200, 1_000),
            Self::Post128k => (30, 120),
        }
    }

    fn mode(self) -> Mode {
        if self == Self::GrpcUnary { Mode::Grpc } else { Mode::Http }
    }
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// Instructions of one sidecar's serving thread for one request.
pub(super) fn count(setting: &Setting<'_>, case: Case, side: Side) -> anyhow::Result<u64> {
    let [caller, callee] = [Addresses::free()?, Addresses::free()?];
    let ingress = ports::free()?;
    let dir = &setting.dir;
    let mesh = dir.join("mesh");
    fs::create_dir_all(&mesh).with_context(|| format!("cannot create {}", mesh.display()))?;
    let app = if case == Case::GrpcUnary { setting.grpc_app } else { setting.app };
    let file = if case == Case::Ingress { MeshFile::Ingress } else { MeshFile::Everything };
    fs::write(mesh.join("mesh.yaml"), file.text(case.mode(), app, callee.inbound, ingress))
        .context("cannot write the mesh file")?;
    let counts = dir.join(format!("{}-{}.out", case.name(), side.name()));
    let one = |name: &str, addresses, identity: &Path, counted: bool| {
        let mut command = kiro::sidecar(setting.kiro_proxy, name, addresses, identity, &mesh, 1);
        everything(&mut command);
        if counted {
            command = setting.valgrind.command(&command, &counts)?;
        }
        Child::start(&format!("kiro-{name}"), &mut command, Output::Pipe, dir)
    };
    let identities = &setting.identities;
    let mut children = vec![one(CALLEE, callee, &identities.callee, side == Side::Inbound)?];
    let mut ready = vec![callee];
    if case != Case::Ingress {
        children.push(one(CALLER, caller, &identities.caller, side == Side::Outbound)?);
        ready.push(caller);
    }
    let readers = children.iter_mut().map(read_log).collect::<anyhow::Result<Vec<_>>>()?;
    for addresses in ready {
        let mut alive = || children.iter_mut().try_for_each(Child::alive);
        h1::wait_for_answer(addresses.health, "localhost", "/ready", START, &mut alive)?;
    }
    let entry = if case == Case::Ingress { ingress } else { caller.outbound };
    let counted = Counted {
        pid: children.get(usize::from(side == Side::Outbound)).context("no such sidecar")?.pid(),
        health: if side == Side::Outbound { caller.health } else { callee.health },
        counts: &counts,
    };
    let counted = measured(case, entry, &counted);
    let words: String = children.iter().map(Child::last_words).collect();
    let instructions = counted.with_context(|| format!("{} by {}{words}", case.name(), side.name()))?;
    for child in &mut children {
        child.stop();
    }
    for reader in readers {
        // The sidecars have closed their ends.
        reader.join().map_err(|_| anyhow::anyhow!("a log reader has panicked"))?;
    }
    Ok(instructions)
}

/// Some requests that fill pools and caches, and then those that count.
fn measured(case: Case, entry: SocketAddr, counted: &Counted<'_>) -> anyhow::Result<u64> {
    let mut client = first(case, entry)?;
    let (few, many) = case.requests();
    client.ask(few)?;
    counted.begin()?;
    client.ask(many)?;
    Ok(counted.end()? / u64::from(many))
}

/// What the environment of a sidecar with everything on says of traces. Nobody listens at port 9, and no span is ever sent there.
fn everything(command: &mut Command) {
    command
        .env("KIRO_INGRESS_HOST", "127.0.0.1")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
        .env("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        .env("OTEL_TRACES_SAMPLER_ARG", "0");
}

/// A log into a pipe that nobody reads would fill it.
fn read_log(child: &mut Child) -> anyhow::Result<std::thread::JoinHandle<()>> {
    let mut output = child.stdout().context("the sidecar's log is no pipe")?;
    std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || {
            // The sidecar's end is its log's.
            let _ = std::io::copy(&mut output, &mut std::io::sink());
        })
        .context("no thread for a log")
}

/// One connection of a client, which asks again when the last answer is there: how many requests share a wake-up is left to no chance.
enum Client {
    Http1(h1::Client, Vec<u8>),
    Grpc(grpc::Client),
}

impl Client {
    fn connect(case: Case, entry: SocketAddr) -> anyhow::Result<Self> {
        let request = match case {
            Case::GrpcUnary => return Ok(Self::Grpc(grpc::Client::connect(entry, CALLEE)?)),
            Case::Get | Case::Ingress => h1::get(CALLEE, "/"),
            Case::Post1k => post(HELD_BYTES),
            Case::Post128k => post(STREAMED_BYTES),
        };
        let client = h1::Client::connect(entry);
        Ok(Self::Http1(client.with_context(|| format!("cannot connect to the sidecar at {entry}"))?, request))
    }

    fn ask(&mut self, times: u32) -> anyhow::Result<()> {
        for _ in 0..times {
            stop::check()?;
            match self {
                Self::Grpc(client) => client.call()?,
                Self::Http1(client, request) => {
                    let answer = client.call(request).context("a request failed")?;
                    let text = String::from_utf8_lossy(&answer.body);
                    let status = answer.status;
                    anyhow::ensure!(status == 200, "status {status} instead of 200: {}", text.trim());
                }
            }
        }
        Ok(())
    }
}

/// The connection whose first request went well. Under valgrind a handshake between the sidecars takes seconds where the machine has
/// other work, longer than they wait for each other.
fn first(case: Case, entry: SocketAddr) -> anyhow::Result<Client> {
    let end = Instant::now() + START;
    loop {
        let asked = Client::connect(case, entry).and_then(|mut client| client.ask(1).map(|()| client));
        match asked {
            Ok(client) => return Ok(client),
            Err(error) if stop::asked() || Instant::now() >= end => return Err(error),
            // A sidecar that was refused is not asked at once again.
            Err(_) => stop::pause(Duration::from_millis(500))?,
        }
    }
}

fn post(bytes: usize) -> Vec<u8> {
    let head = format!(
        "POST /post HTTP/1.1\r\nHost: {CALLEE}\r\ncontent-type: application/octet-stream\r\ncontent-length: {bytes}\r\n\r\n"
    );
    [head.as_bytes(), &vec![b'x'; bytes]].concat()
}
