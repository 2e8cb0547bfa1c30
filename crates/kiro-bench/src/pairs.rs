//! How is a pair of proxies set up? On equal terms: TLS 1.3, P-256 keys, verified both ways, no session resumed, connections kept.

mod envoy;
mod haproxy;
pub(crate) mod kiro;
mod nginx;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::child::Child;
use crate::collector::Collector;
use crate::identity::Identities;
use crate::load::h1;
use crate::plan::{Mode, Pair};
use crate::ports;
use crate::tools::Tools;

/// The cipher suite of every pair: the one that Kiro prefers, and Envoy, which can't be told.
pub(crate) const CIPHER_SUITE: &str = "TLS_AES_128_GCM_SHA256";

/// How long a pair may take until a request comes through.
const START: Duration = Duration::from_secs(20);

/// The group of the key exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    /// The classical one.
    X25519,
    /// The hybrid with a post-quantum half.
    X25519MlKem768,
}

/// Everything that a pair is set up from.
#[derive(Debug)]
pub(crate) struct Order<'a> {
    /// Whose proxies.
    pub(crate) pair: Pair,
    /// Threads, or processes, that serve.
    pub(crate) workers: usize,
    /// What the application speaks.
    pub(crate) mode: Mode,
    /// Whether bodies are of a MiB, or streams.
    pub(crate) large_bodies: bool,
    /// The key exchange, where it can be set.
    pub(crate) group: Group,
    /// The application.
    pub(crate) app: SocketAddr,
    /// Where the callee's proxy listens.
    pub(crate) inbound: SocketAddr,
    /// Where the caller's proxy finds it: there, or at something in between.
    pub(crate) dial: SocketAddr,
    /// The mesh file that a Kiro pair gets.
    pub(crate) mesh: kiro::MeshFile,
    /// Who the two are.
    pub(crate) identities: &'a Identities,
    /// The programs.
    pub(crate) tools: &'a Tools,
    /// Kiro's.
    pub(crate) kiro_proxy: &'a Path,
    /// Where spans go.
    pub(crate) collector: &'a Collector,
    /// Who keeps what a Kiro pair with everything on logs beside the requests that it served, if anybody does.
    pub(crate) events: Option<std::sync::Arc<kiro::Events>>,
    /// Where configurations are written.
    pub(crate) dir: &'a Path,
}

/// A pair that serves.
#[derive(Debug)]
pub(crate) struct Running {
    /// The proxies; the caller's is first.
    pub(crate) children: Vec<Child>,
    /// Where the client connects.
    pub(crate) entry: SocketAddr,
    /// What watches over Kiro with everything on.
    pub(crate) watch: Option<kiro::Watch>,
    /// Requests that were answered before the pair served well.
    pub(crate) probes: u64,
}

impl Running {
    /// Starts a pair and sees one request through it.
    pub(crate) fn start(order: &Order<'_>) -> anyhow::Result<Self> {
        let entry = ports::free()?;
        let mut running = match order.pair {
            Pair::KiroEverything | Pair::KiroBare => kiro::start(order, entry)?,
            Pair::EnvoyH2 => envoy::start(order, entry)?,
            Pair::HaproxyH2 | Pair::HaproxyH1 => haproxy::start(order, entry)?,
            Pair::NginxH1 => nginx::start(order, entry)?,
            Pair::Direct => Self { children: Vec::new(), entry: order.app, watch: None, probes: 0 },
        };
        running.wait_until_it_serves(order).with_context(|| format!("{} does not serve", order.pair))?;
        Ok(running)
    }

    /// The processes whose cost counts.
    pub(crate) fn roots(&self) -> Vec<u32> {
        self.children.iter().map(Child::pid).collect()
    }

    /// An error if one of the proxies has died.
    pub(crate) fn alive(&mut self) -> anyhow::Result<()> {
        self.children.iter_mut().try_for_each(Child::alive)
    }

    fn wait_until_it_serves(&mut self, order: &Order<'_>) -> anyhow::Result<()> {
        let entry = self.entry;
        match order.mode {
            Mode::Http => {
                let mut alive = || self.children.iter_mut().try_for_each(Child::alive);
                let answered = h1::wait_for_answer(entry, crate::identity::CALLEE, "/", START, &mut alive);
                self.probes += answered.map_err(|error| self.with_last_words(error))?;
                Ok(())
            }
            // The load waits for its own first answer.
            Mode::Grpc | Mode::Tcp => Ok(()),
        }
    }

    fn with_last_words(&self, error: anyhow::Error) -> anyhow::Error {
        let words: String = self.children.iter().map(Child::last_words).collect();
        anyhow::anyhow!("{error:#}{words}")
    }
}

/// Writes a configuration and says where.
fn write(order: &Order<'_>, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let file = order.dir.join(name);
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}
