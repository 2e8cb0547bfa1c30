//! What does a sidecar log beside the requests that it has served?

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

/// Lines that are kept: far more than a sidecar writes of strangers while a flood is measured.
const LINES_MAX: usize = 20_000;
/// What the line of a request has that was refused, or whose answer was given up.
const MARKS: [&[u8]; 2] = [br#""reject":""#, br#""ended":""#];

/// Lines of a pair's log, as they come.
#[derive(Debug, Default)]
pub(crate) struct Events(Mutex<Vec<Vec<u8>>>);

impl Events {
    /// Keeps a line, unless it is that of a request that was served.
    pub(super) fn note(&self, line: &[u8], access: bool) {
        let has = |mark: &[u8]| line.windows(mark.len()).any(|window| window == mark);
        if access && !MARKS.into_iter().any(has) {
            return;
        }
        let mut lines = self.lines();
        if lines.len() < LINES_MAX {
            lines.push(line.to_vec());
        }
    }

    /// How many there are so far.
    pub(crate) fn count(&self) -> usize {
        self.lines().len()
    }

    /// Those that came after the first `from`, read.
    pub(crate) fn since(&self, from: usize) -> Vec<Value> {
        let lines = self.lines();
        let new = lines.get(from..).unwrap_or_default();
        new.iter().filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    fn lines(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_served_is_not_kept() {
        let events = Events::default();
        events.note(b"{\"target\":\"kiro::access\",\"status\":200}\n", true);
        events.note(b"{\"target\":\"kiro::access\",\"status\":408,\"reject\":\"request_timeout\"}\n", true);
        events.note(b"{\"target\":\"kiro::abuse\",\"reason\":\"rapid_reset\"}\n", false);
        events.note(b"no JSON\n", false);
        assert_eq!(events.count(), 3);
        let new = events.since(1);
        assert_eq!(new.len(), 1);
        assert_eq!(new[0]["reason"], "rapid_reset");
    }
}
