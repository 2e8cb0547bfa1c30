//! How does a worker write a line a request without a lock or a system call a request? It gathers them.

use super::LogSink;

/// Lines are handed on when there are this many bytes of them. Enough that the hand-over costs nothing a line, and small
/// against the queue, so that a full queue loses little at a time.
pub const FLUSH_BYTES: usize = 32 * 1024;

/// One worker's lines on their way to the sink. The owner calls [`LineBuffer::flush`] on a timer (20 ms or less), so
/// that a line is never late for a person's eye.
#[derive(Debug)]
pub struct LineBuffer {
    sink: LogSink,
    lines: Vec<u8>,
}

impl LineBuffer {
    /// An empty buffer in front of `sink`.
    pub fn new(sink: LogSink) -> Self {
        Self { sink, lines: Vec::new() }
    }

    /// Lets `line` append whole lines, line ends included.
    pub fn write(&mut self, line: impl FnOnce(&mut Vec<u8>)) {
        line(&mut self.lines);
        if self.lines.len() >= FLUSH_BYTES {
            self.flush();
        }
    }

    /// Hands the lines to the sink; never waits.
    pub fn flush(&mut self) {
        if !self.lines.is_empty() {
            // A copy of the exact size: the buffer keeps its capacity for the next lines, and what waits in the
            // queue takes no more memory than the queue counts.
            self.sink.push(self.lines.as_slice().to_vec());
            self.lines.clear();
        }
    }

    /// Whether there is nothing to flush.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

impl Drop for LineBuffer {
    fn drop(&mut self) {
        self.flush();
    }
}
