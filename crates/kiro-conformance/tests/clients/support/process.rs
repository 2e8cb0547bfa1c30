//! Processes that do not outlive their test.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longer than anything here takes on a machine that is busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A server is given so long to end by itself before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// A command, with no variable of the caller's that could configure Kiro or a client's proxy.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let lower = name.to_string_lossy().to_lowercase();
        let foreign = ["kiro_", "otel_", "grpc_", "pg"].iter().any(|prefix| lower.starts_with(prefix));
        if foreign || lower.ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// A process in the background whose output is in a file.
pub(crate) struct Server {
    name: String,
    child: Child,
    log: PathBuf,
    end_by: Signal,
}

impl Server {
    /// Starts it; what it writes goes to `<name>.log` in the directory.
    #[track_caller]
    pub(crate) fn start(name: &str, directory: &Path, command: &mut Command) -> Self {
        let log = directory.join(format!("{name}.log"));
        let file = File::create(&log).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {command:?}: {error}"));
        Self { name: name.to_owned(), child, log, end_by: Signal::TERM }
    }

    /// Ends with another signal than SIGTERM.
    pub(crate) fn ending_by(mut self, signal: Signal) -> Self {
        self.end_by = signal;
        self
    }

    /// What it has written so far.
    pub(crate) fn written(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has written this, or fails by name with what it wrote.
    #[track_caller]
    pub(crate) fn ready_when_it_says(&mut self, text: &str) {
        let log = self.log.clone();
        self.ready(|| std::fs::read_to_string(&log).unwrap_or_default().contains(text).then_some(()));
    }

    /// Waits until it is ready, or fails by name with what it wrote.
    #[track_caller]
    pub(crate) fn ready<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> T {
        let begin = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{} ended by itself ({ended:?}):\n{}", self.name, self.written());
            assert!(begin.elapsed() < PATIENCE, "{} is never ready:\n{}", self.name, self.written());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} wrote:\n{}", self.name, self.written());
        }
        end(&mut self.child, self.end_by, GRACE);
    }
}

fn end(child: &mut Child, signal: Signal, grace: Duration) {
    let begin = Instant::now();
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
        && child.try_wait().is_ok_and(|ended| ended.is_none())
    {
        let _ = kill_process(pid, signal);
    }
    while begin.elapsed() < grace && child.try_wait().is_ok_and(|ended| ended.is_none()) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// A client that ran to its end.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Outcome {
    /// What it wrote, as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Its text, if it ended well.
    #[track_caller]
    pub(crate) fn success(self) -> String {
        assert!(self.status.success(), "{}\n{}\n{}", self.status, self.text(), self.stderr);
        self.text()
    }
}

/// Runs a client to its end; one that takes too long is killed, which fails its test.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Outcome {
    run_with(command, b"")
}

/// The same, with something to read on its standard input.
#[track_caller]
pub(crate) fn run_with(command: &mut Command, input: &[u8]) -> Outcome {
    let begin = Instant::now();
    let mut client = Client::start(command);
    let mut stdin = client.stdin.take();
    let input = input.to_owned();
    // On a thread of its own: a client that writes while it reads would wait for us for ever.
    let feeding = std::thread::spawn(move || {
        if let Some(stdin) = &mut stdin {
            // One that ends early does not read it all.
            let _ = stdin.write_all(&input);
        }
    });
    let (status, stdout, stderr) = client.end();
    feeding.join().unwrap();
    Outcome { status, stdout, stderr, took: begin.elapsed() }
}

/// A client in the background, whose output is looked at line by line.
pub(crate) struct Client {
    child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    lines: Receiver<Vec<u8>>,
    stderr: Option<std::thread::JoinHandle<String>>,
}

impl Client {
    /// Starts it.
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdin = child.stdin.take();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut errors = child.stderr.take().unwrap();
        let (found, lines) = channel();
        std::thread::spawn(move || {
            loop {
                let mut line = Vec::new();
                match stdout.read_until(b'\n', &mut line) {
                    Ok(1..) if found.send(line).is_ok() => {}
                    Ok(_) | Err(_) => return,
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = errors.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { child, stdin, lines, stderr: Some(stderr) }
    }

    /// The next line of its output, as soon as it is there, without its end.
    #[track_caller]
    pub(crate) fn line(&mut self) -> String {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => String::from_utf8_lossy(&line).trim_end().to_owned(),
            Err(error) => {
                let _ = self.child.kill();
                let stderr = self.stderr.take().map(|stderr| stderr.join().unwrap());
                panic!("no further line of the client ({error}):\n{}", stderr.unwrap_or_default());
            }
        }
    }

    /// Types into it.
    #[track_caller]
    pub(crate) fn write(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Sends it a signal.
    #[track_caller]
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// Its end, and what was not looked at before.
    #[track_caller]
    pub(crate) fn end(mut self) -> (ExitStatus, Vec<u8>, String) {
        drop(self.stdin.take());
        let begin = Instant::now();
        let mut rest = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE.saturating_sub(begin.elapsed())) {
                Ok(line) => rest.extend_from_slice(&line),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    let stderr = self.stderr.take().map(|stderr| stderr.join().unwrap()).unwrap_or_default();
                    panic!("the client never ends:\n{}\n{stderr}", String::from_utf8_lossy(&rest));
                }
            }
        }
        let status = self.child.wait().unwrap();
        let stderr = self.stderr.take().map(|stderr| stderr.join().unwrap()).unwrap_or_default();
        (status, rest, stderr)
    }

    /// Kills it, as a person does who has seen enough.
    pub(crate) fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks again until there is something, and fails by name if there never is.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "never seen: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
