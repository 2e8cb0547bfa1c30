//! Who waits when nobody reads stdout? The writer thread, and nobody else.
//!
//! Callers put lines into a queue that is bounded in bytes. What does not fit is counted as lost at once. When there is
//! room again, one line says how many were lost.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

use super::{Format, colour, events};

/// Memory that may wait for a slow reader: about eight thousand access lines, a second of a busy sidecar.
pub const QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What an entry costs beside its bytes, so that a flood of tiny entries is bounded too.
const ENTRY_OVERHEAD_BYTES: usize = 64;

/// How long the thread sleeps where stdout is a non-blocking descriptor with no room: some parents set that flag on a
/// pipe that they share with us.
const NONBLOCKING_RETRY: Duration = Duration::from_millis(10);

/// A handle to the queue; clones share it. The thread ends when the last clone is dropped and the queue is empty.
#[derive(Debug, Clone)]
pub struct LogSink {
    queue: mpsc::Sender<Message>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queued_bytes: AtomicUsize,
    lost_lines: AtomicU64,
    /// The reader has closed its end for good.
    closed: AtomicBool,
}

#[derive(Debug)]
enum Message {
    Lines(Vec<u8>),
    Flush(mpsc::SyncSender<()>),
}

impl LogSink {
    /// A sink that writes to this process's stdout. `service` is put on the line that tells of losses.
    pub fn stdout(format: Format, service: Option<&str>) -> io::Result<Self> {
        Self::new(io::stdout(), format, service)
    }

    /// A sink in front of any writer.
    pub fn new(
        writer: impl Write + Send + 'static,
        format: Format,
        service: Option<&str>,
    ) -> io::Result<Self> {
        // Unbounded in entries, bounded in bytes by `push`.
        let (queue, messages) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let pen = Pen {
            writer,
            format,
            service: service.map(str::to_owned),
            shared: Arc::clone(&shared),
            lost_lines_said: 0,
            torn: false,
        };
        std::thread::Builder::new().name("kiro-log".to_owned()).spawn(move || pen.run(&messages))?;
        Ok(Self { queue, shared })
    }

    /// Queues whole lines, line ends included. Never waits: lines that do not fit are lost and counted.
    pub fn push(&self, lines: Vec<u8>) {
        if lines.is_empty() {
            return;
        }
        let size = entry_bytes(&lines);
        let shared = &self.shared;
        if shared.closed.load(Ordering::Relaxed) {
            shared.lose(&lines);
            return;
        }
        if shared.queued_bytes.fetch_add(size, Ordering::Relaxed) + size > QUEUE_BYTES_MAX {
            shared.queued_bytes.fetch_sub(size, Ordering::Relaxed);
            shared.lose(&lines);
        } else if let Err(mpsc::SendError(Message::Lines(lines))) = self.queue.send(Message::Lines(lines)) {
            shared.lose(&lines);
        }
    }

    /// Lines lost since the start.
    pub fn lost(&self) -> u64 {
        self.shared.lost_lines.load(Ordering::Relaxed)
    }

    /// Waits until what was pushed before is written, at most `timeout`; says whether it was in time. For the end of a
    /// process.
    pub fn flush(&self, timeout: Duration) -> bool {
        let (done, written) = mpsc::sync_channel(1);
        self.queue.send(Message::Flush(done)).is_ok() && written.recv_timeout(timeout).is_ok()
    }
}

impl Shared {
    fn lose(&self, lines: &[u8]) {
        let count = memchr::memchr_iter(b'\n', lines).count().max(1);
        self.lost_lines.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// An entry's capacity counts, not its length: the bound is on memory.
fn entry_bytes(lines: &Vec<u8>) -> usize {
    lines.capacity() + ENTRY_OVERHEAD_BYTES
}

/// The writer thread's own state.
struct Pen<W> {
    writer: W,
    format: Format,
    service: Option<String>,
    shared: Arc<Shared>,
    lost_lines_said: u64,
    /// A write failed in the middle of a line.
    torn: bool,
}

impl<W: Write> Pen<W> {
    fn run(mut self, messages: &mpsc::Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Lines(lines) => {
                    self.write(&lines);
                    // Counted until it is written, so that the entry in hand is part of the bound.
                    let size = entry_bytes(&lines);
                    let before = self.shared.queued_bytes.fetch_sub(size, Ordering::Relaxed);
                    // Not at each entry: a reader that is just too slow would get a warning for each of them.
                    if before - size <= QUEUE_BYTES_MAX / 2 {
                        self.say_losses();
                    }
                }
                Message::Flush(done) => {
                    self.say_losses();
                    // An error shows again at the next write, and is dealt with there.
                    let _ = self.writer.flush();
                    // The one who asked may have given up waiting.
                    let _ = done.try_send(());
                }
            }
        }
        self.say_losses();
        let _ = self.writer.flush();
    }

    fn say_losses(&mut self) {
        let lost = self.shared.lost_lines.load(Ordering::Relaxed);
        if lost == self.lost_lines_said || self.shared.closed.load(Ordering::Relaxed) {
            return;
        }
        let mut line = Vec::new();
        events::write_losses(
            &mut line,
            self.format,
            colour(),
            self.service.as_deref(),
            SystemTime::now(),
            lost - self.lost_lines_said,
        );
        self.lost_lines_said = lost;
        self.write(&line);
    }

    fn write(&mut self, lines: &[u8]) {
        if self.shared.closed.load(Ordering::Relaxed) {
            self.shared.lose(lines);
            return;
        }
        // What failed in the middle of a line must not swallow the beginning of the next.
        if self.torn && !self.write_all(b"\n").is_empty() {
            self.shared.lose(lines);
            return;
        }
        let unwritten = self.write_all(lines);
        if !unwritten.is_empty() {
            self.shared.lose(unwritten);
        }
    }

    /// Returns what could not be written.
    fn write_all<'a>(&mut self, mut rest: &'a [u8]) -> &'a [u8] {
        while !rest.is_empty() {
            let error = match self.writer.write(rest) {
                Ok(0) => io::ErrorKind::WriteZero,
                Ok(written) => {
                    self.torn = rest.get(written - 1).is_some_and(|last| *last != b'\n');
                    rest = rest.get(written..).unwrap_or_default();
                    continue;
                }
                Err(error) => error.kind(),
            };
            if error == io::ErrorKind::Interrupted {
                continue;
            }
            if error == io::ErrorKind::WouldBlock {
                std::thread::sleep(NONBLOCKING_RETRY);
                continue;
            }
            if error == io::ErrorKind::BrokenPipe {
                self.shared.closed.store(true, Ordering::Relaxed);
            }
            // Anything else may pass (a full disk): these lines are lost, the next are tried.
            break;
        }
        rest
    }
}
