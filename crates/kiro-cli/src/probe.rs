//! Is this container well? What Compose asks, in an image that has no shell.
//!
//! `ready` and `live` ask the sidecar's admin port; `tcp` asks whether somebody listens, which is all that can be said of an
//! application that speaks mutual TLS to its own sidecar alone. One line on stdout says why, and Docker keeps it
//! (`docker inspect`).

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::output::say;

/// Ask whether a sidecar, a pod or an application is well: exit code 0 or 1, and one line that says why.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, Copy, clap::Subcommand)]
enum What {
    /// The sidecar has its certificates, its mesh file and its ports, and is not draining.
    Ready(Admin),
    /// The sidecar answers at all.
    Live(Admin),
    /// Somebody accepts connections at an address.
    Tcp {
        /// For example 127.0.0.1:8001.
        address: SocketAddr,
    },
}

#[derive(Debug, Clone, Copy, clap::Args)]
struct Admin {
    /// Where the sidecar's admin listens.
    #[arg(long = "addr", env = "KIRO_ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    address: SocketAddr,
}

/// How long each step may take: on loopback, so whoever takes longer is not well.
const PATIENCE: Duration = Duration::from_secs(2);

/// How much of an answer is read: its status line and a word.
const ANSWER_BYTES_MAX: u64 = 4096;

/// The same where the answer is all that the sidecar runs with, or all that it knows, of a mesh of any size that its file may have.
#[cfg(feature = "sidecar")]
const DOCUMENT_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Asks, and says what came out.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let outcome = match arguments.what {
        What::Ready(admin) => ask(admin.address, "/ready"),
        What::Live(admin) => ask(admin.address, "/live"),
        What::Tcp { address } => reach(address),
    };
    let (code, line) = match outcome {
        Ok(line) => (0, line),
        Err(line) => (1, line),
    };
    say(&line);
    code
}

/// Whether somebody accepts connections there.
pub(crate) fn reach(address: SocketAddr) -> Result<String, String> {
    match TcpStream::connect_timeout(&address, PATIENCE) {
        Ok(_) => Ok(format!("{address} accepts connections")),
        Err(error) => Err(format!("nobody answers at {address}: {error}")),
    }
}

/// What a sidecar's admin port answers.
pub(crate) fn ask(address: SocketAddr, path: &str) -> Result<String, String> {
    ask_for(address, path, ANSWER_BYTES_MAX)
}

/// What a sidecar runs with.
#[cfg(feature = "sidecar")]
pub(crate) fn config(address: SocketAddr) -> Result<serde_json::Value, String> {
    document(address, "/config")
}

/// The mesh as a sidecar sees it.
#[cfg(feature = "sidecar")]
pub(crate) fn mesh_health(address: SocketAddr) -> Result<serde_json::Value, String> {
    document(address, "/mesh/health")
}

#[cfg(feature = "sidecar")]
fn document(address: SocketAddr, path: &str) -> Result<serde_json::Value, String> {
    let text = ask_for(address, path, DOCUMENT_BYTES_MAX)?;
    serde_json::from_str(&text).map_err(|error| format!("{address}{path} can't be read: {error}"))
}

fn ask_for(address: SocketAddr, path: &str, bytes_max: u64) -> Result<String, String> {
    let answer = get(address, path, bytes_max).map_err(|error| {
        format!("no sidecar answers at {address}: {error}; its log says why it is not up")
    })?;
    let status = answer.split_ascii_whitespace().nth(1).unwrap_or_default();
    let word = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body.trim());
    match status {
        "200" => Ok(word.to_owned()),
        "" => Err(format!("{address} does not speak HTTP: is that the sidecar's admin port?")),
        _ => Err(format!("{path} answers {status}: {word}")),
    }
}

fn get(address: SocketAddr, path: &str, bytes_max: u64) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // In one write: who answers after the first piece of a request would be answered with a reset.
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(bytes_max).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
