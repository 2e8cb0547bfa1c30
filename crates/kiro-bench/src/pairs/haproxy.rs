//! HAProxy at its best: connections to servers are shared, threads share one process, nothing is logged.
//!
//! With ten thousand clients its default is to close idle connections to servers, for fear of running out of descriptors; the two
//! `fd-ratio` settings take that fear.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::Context as _;

use super::{CIPHER_SUITE, Order, Running, write};
use crate::child::{Child, Output};
use crate::identity::CALLEE;
use crate::plan::{Mode, Pair};

/// Starts the pair.
pub(super) fn start(order: &Order<'_>, entry: SocketAddr) -> anyhow::Result<Running> {
    let program = order.tools.haproxy.as_ref().context("HAProxy is missing")?;
    let one = |name: &str, text: String| -> anyhow::Result<Child> {
        let file = write(order, &format!("{name}.cfg"), &text)?;
        let mut command = Command::new(program);
        command.arg("-db").arg("-f").arg(file);
        Child::start(name, &mut command, Output::Null, order.dir)
    };
    let children = vec![one("haproxy-caller", caller(order, entry))?, one("haproxy-callee", callee(order))?];
    Ok(Running { children, entry, watch: None, probes: 0 })
}

fn head(order: &Order<'_>) -> String {
    let mode = if order.mode == Mode::Tcp { "tcp" } else { "http" };
    // A buffer is also a frame and a TLS record's source: larger ones pay with large bodies alone.
    let buffers = if order.large_bodies { "  tune.bufsize 65536\n" } else { "" };
    let reuse = if order.mode == Mode::Tcp { "" } else { "  http-reuse always\n" };
    format!(
        "global
  nbthread {workers}
  no strict-limits
  maxconn 12000
  tune.ssl.cachesize 0
{buffers}  tune.pool-low-fd-ratio 90
  tune.pool-high-fd-ratio 95
  tune.h2.initial-window-size 1048576
  ssl-default-bind-ciphersuites {CIPHER_SUITE}
  ssl-default-server-ciphersuites {CIPHER_SUITE}
  ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
  ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
  mode {mode}
  timeout connect 5s
  timeout client 600s
  timeout server 60s
{reuse}",
        workers = order.workers,
    )
}

/// What the two say in ALPN.
fn alpn(order: &Order<'_>) -> &'static str {
    match (order.mode, order.pair) {
        (Mode::Tcp, _) => "",
        (_, Pair::HaproxyH1) => "alpn http/1.1",
        _ => "alpn h2",
    }
}

fn caller(order: &Order<'_>, entry: SocketAddr) -> String {
    let home = order.identities.caller.display();
    format!(
        "{head}frontend outbound
  bind {entry} backlog 4096
  default_backend peer
backend peer
  server {CALLEE} {dial} ssl crt {home}/both.pem ca-file {home}/ca.pem verify required verifyhost {CALLEE} \
sni str({CALLEE}) no-ssl-reuse {alpn}
",
        head = head(order),
        dial = order.dial,
        alpn = alpn(order),
    )
}

fn callee(order: &Order<'_>) -> String {
    let home = order.identities.callee.display();
    let protocol = if order.mode == Mode::Grpc { " proto h2" } else { "" };
    format!(
        "{head}frontend inbound
  bind {inbound} backlog 4096 ssl crt {home}/both.pem ca-file {home}/ca.pem verify required curves X25519 {alpn}
  default_backend app
backend app
  server app {app}{protocol}
",
        head = head(order),
        inbound = order.inbound,
        alpn = alpn(order),
        app = order.app,
    )
}
