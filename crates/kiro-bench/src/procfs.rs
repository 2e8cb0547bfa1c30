//! What have processes cost so far? Read from `/proc`.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

/// What is read of `/proc/<pid>/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// The process.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// User and system time of all of its threads, in ticks.
    pub ticks: u64,
}

/// Reads one line of `stat`. The name in parentheses may hold anything, parentheses and spaces too.
pub fn parse_stat(text: &str) -> Option<Stat> {
    let (pid, rest) = text.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split_ascii_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    // Fields 14 and 15 of the whole line, of which three are gone and the fourth was the parent.
    let user: u64 = fields.nth(9)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Stat { pid: pid.trim().parse().ok()?, parent, ticks: user + system })
}

/// The `Pss:` line of `smaps_rollup`, in bytes.
pub fn parse_pss(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The `VmHWM:` line of `status`, in bytes: the most memory that a process has had since its peak was reset.
pub fn parse_peak(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// From here on a process's peak counts anew.
pub fn reset_peak(pid: u32) -> std::io::Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5")
}

/// The most memory that a process has had since, in MB (10^6 bytes).
pub fn peak_mb(pid: u32) -> Option<f64> {
    let bytes = parse_peak(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)?;
    Some(bytes as f64 / 1e6)
}

/// These processes and all that descend from them.
fn tree(roots: &[u32]) -> Vec<Stat> {
    if roots.is_empty() {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let all: Vec<Stat> = pids
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok())
        .filter_map(|text| parse_stat(&text))
        .collect();
    let mut members: BTreeSet<u32> = roots.iter().copied().collect();
    loop {
        let before = members.len();
        let children = all.iter().filter(|stat| members.contains(&stat.parent)).map(|stat| stat.pid);
        members.extend(children.collect::<Vec<_>>());
        if members.len() == before {
            return all.into_iter().filter(|stat| members.contains(&stat.pid)).collect();
        }
    }
}

/// User and system time of these processes and their descendants.
pub fn cpu(roots: &[u32]) -> Duration {
    let ticks: u64 = tree(roots).iter().map(|stat| stat.ticks).sum();
    let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / ticks_per_second))
}

/// Proportional set size of these processes and their descendants, in MB (10^6 bytes).
pub fn pss_mb(roots: &[u32]) -> Option<f64> {
    let sizes = tree(roots).into_iter().map(|stat| {
        fs::read_to_string(format!("/proc/{}/smaps_rollup", stat.pid)).ok().and_then(|text| parse_pss(&text))
    });
    let bytes: u64 = sizes.sum::<Option<u64>>()?;
    (bytes > 0).then_some(bytes as f64 / 1e6)
}

/// The machine in a line.
pub fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("an unknown processor", |(_, model)| model.trim());
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_kb: u64 = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or_default();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores of {model}, {} GB, Linux {}", memory_kb / 1_000_000, release.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let text = "42 (a) b (c) S 7 42 42 0 -1 4194560 1 2 3 4 150 50 9 9 20 0 3 0 100 200 300";
        assert_eq!(parse_stat(text), Some(Stat { pid: 42, parent: 7, ticks: 200 }));
        for nonsense in ["", "42", "42 (name)", "42 (name) S 7 1 1", "x (name) S 7 42 42 0 -1 1 1 2 3 4 1 1"]
        {
            assert_eq!(parse_stat(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn the_rollups_line() {
        let text = "00400000-7fff [rollup]\nRss:   900 kB\nPss:                 512 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(parse_pss(text), Some(512 * 1024));
        assert_eq!(parse_pss("Rss: 1 kB\n"), None);
        assert_eq!(parse_pss("Pss: many\n"), None);
    }

    #[test]
    fn a_peak_is_reset() {
        assert_eq!(parse_peak("VmPeak: 9 kB\nVmHWM:\t     128 kB\n"), Some(128 * 1024));
        assert_eq!(parse_peak("VmHWM: much\n"), None);
        let own = std::process::id();
        let large = std::hint::black_box(vec![1_u8; 64 << 20]);
        let with = peak_mb(own).unwrap();
        drop(large);
        reset_peak(own).unwrap();
        assert!(peak_mb(own).unwrap() < with, "{with} MB");
    }

    #[test]
    fn this_process_is_found() {
        let own = std::process::id();
        assert!(tree(&[own]).iter().any(|stat| stat.pid == own));
        assert!(pss_mb(&[own]).unwrap() > 0.1);
    }
}
