//! Where does the command write? Its result to stdout, whatever else a person should know to stderr.
//!
//! A reader that has gone (`kiro check | head`) is no reason to panic, so write errors are let go.

use std::io::Write as _;

/// A line of the result.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// A line beside the result.
pub(crate) fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
