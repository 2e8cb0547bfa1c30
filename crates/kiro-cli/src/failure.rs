//! Why could a command not do its work, what mends it, and which exit code says so?
//!
//! The codes are curl's where curl has one, since that is what scripts around `kiro call` know.

/// A wrong command line; clap's own code too.
pub(crate) const USAGE: u8 = 2;
/// Nobody accepts connections.
pub(crate) const CONNECT: u8 = 7;
/// The answer's status is 400 or more.
pub(crate) const STATUS: u8 = 22;
/// No end in time.
pub(crate) const TIMEOUT: u8 = 28;
/// The TLS handshake failed.
pub(crate) const TLS: u8 = 35;
/// The connection broke.
pub(crate) const BROKEN: u8 = 56;
/// Mesh file or certificates can't be used: "configuration error" in sysexits.h.
pub(crate) const SETUP: u8 = 78;

/// What went wrong and what to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) what: String,
    pub(crate) fix: String,
}

impl Failure {
    pub(crate) fn new(code: u8, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { code, what: what.into(), fix: fix.into() }
    }
}
