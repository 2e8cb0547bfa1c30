//! Programs of others: where they are, and what to do where they are not.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::command;

/// A program on the path, from a package of that name.
pub(crate) fn program(name: &str, package: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps servers where an ordinary user's path does not lead.
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let found = dirs.map(|dir| dir.join(name)).find(|file| file.is_file());
    found.or_else(|| missing(name, &format!("apt-get install {package}")))
}

/// A program that its package keeps out of the path, in a directory for each version: what is above and below the version.
pub(crate) fn program_in([root, below]: [&str; 2], name: &str, package: &str) -> Option<PathBuf> {
    let mut versions: Vec<_> = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join(below).join(name)))
        .filter(|file| file.is_file())
        .collect();
    versions.sort();
    versions.pop().or_else(|| program(name, package))
}

/// What `crates/kiro-conformance/prepare` made.
fn prepared(path: &str) -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
    let file = target.join("conformance").join(path);
    if file.exists() { Some(file) } else { missing(path, "make conformance") }
}

/// A script in `python/`, to be run by the prepared Python.
pub(crate) fn python(script: &str) -> Option<Command> {
    let mut command = command(prepared("venv/bin/python")?);
    command
        .arg("-u")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(script))
        .env("PYTHONDONTWRITEBYTECODE", "1");
    Some(command)
}

/// A program of `go/`.
pub(crate) fn go(name: &str) -> Option<Command> {
    Some(command(prepared(&format!("bin/{name}"))?))
}

/// A test without its tool is skipped, aloud, and fails where everything is demanded.
fn missing<T>(what: &str, fix: &str) -> Option<T> {
    let all = std::env::var("KIRO_CONFORMANCE").is_ok_and(|value| value == "all");
    let ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!all && !ci, "{what} is not here, and KIRO_CONFORMANCE=all or CI=true demands it; fix: {fix}");
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // Past the harness, which keeps to itself what a passing test prints.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {what} is not here; fix: {fix}");
    None
}
