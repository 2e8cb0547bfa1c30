//! Has this process lost its network namespace's owner?
//!
//! When the container that owns a namespace dies, Docker takes its interfaces away; whoever had joined is left with `lo` and is
//! still "Up". Only an exit helps, and not at once: a container that Docker restarts while the owner is down fails and is never
//! tried again. So the interfaces have to be gone for a while.

use std::time::{Duration, Instant};

/// How long they have to be gone: long enough for Docker to have started the owner again (measured: 10 of 10 rejoined).
pub const GONE_FOR: Duration = Duration::from_secs(2);

/// Watches the interfaces that a process had at its start.
#[derive(Debug, Clone)]
pub struct Watch {
    at_start: Vec<String>,
    gone_since: Option<Instant>,
}

impl Watch {
    /// Notes the interfaces at the start, as `/proc/net/dev` lists them; loopback does not count.
    #[must_use]
    pub fn new(proc_net_dev: &str) -> Self {
        Self { at_start: names(proc_net_dev).map(str::to_owned).collect(), gone_since: None }
    }

    /// Takes a later look in; true once every interface of the start has been gone for [`GONE_FOR`]. A process that had none has
    /// none to lose.
    pub fn observe(&mut self, proc_net_dev: &str, now: Instant) -> bool {
        let left = names(proc_net_dev).any(|name| self.at_start.iter().any(|known| known == name));
        if left || self.at_start.is_empty() {
            self.gone_since = None;
            return false;
        }
        let since = *self.gone_since.get_or_insert(now);
        now.saturating_duration_since(since) >= GONE_FOR
    }
}

/// The names in `/proc/net/dev`: two lines of headings, then `name: counters`.
fn names(proc_net_dev: &str) -> impl Iterator<Item = &str> {
    proc_net_dev
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .filter(|name| *name != "lo" && !name.is_empty() && !name.contains('|'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADINGS: &str =
        "Inter-|   Receive          |  Transmit\n face |bytes    packets errs |bytes    packets\n";

    fn listing(names: &[&str]) -> String {
        let lines: String = names.iter().map(|name| format!("{name:>6}: 1 2 3\n")).collect();
        format!("{HEADINGS}{lines}")
    }

    #[track_caller]
    fn check(at_start: &[&str], looks: &[(u64, &[&str])], gone_at_last: bool) {
        let begin = Instant::now();
        let mut watch = Watch::new(&listing(at_start));
        let mut gone = false;
        for (millis, names) in looks {
            assert!(!gone, "gone too soon");
            gone = watch.observe(&listing(names), begin + Duration::from_millis(*millis));
        }
        assert_eq!(gone, gone_at_last);
    }

    #[test]
    fn all_interfaces_have_to_be_gone_for_a_while() {
        check(&["lo", "eth0"], &[(0, &["lo"]), (1900, &["lo"]), (2000, &["lo"])], true);
        check(&["lo", "eth0"], &[(0, &["lo"]), (1900, &["lo"])], false);
        check(&["lo", "eth0"], &[(0, &["lo"]), (1000, &["lo", "eth0"]), (2500, &["lo"])], false);
        check(&["lo", "eth0", "eth1"], &[(0, &["lo", "eth1"]), (9000, &["lo", "eth1"])], false);
    }

    #[test]
    fn a_new_interface_is_not_the_old_one() {
        check(&["lo", "eth0"], &[(0, &["lo", "eth7"]), (2000, &["lo", "eth7"])], true);
    }

    #[test]
    fn who_had_none_has_none_to_lose() {
        check(&["lo"], &[(0, &["lo"]), (9000, &["lo"])], false);
    }
}
