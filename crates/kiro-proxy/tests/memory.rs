//! What a sidecar has freed is the system's again, and its pages are small.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::time::{Duration, Instant};

use kiro_proxy::memory;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A line of /proc/self/smaps_rollup, in KiB.
fn held_kib(what: &str) -> usize {
    let all = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = all.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn what_connections_had_is_given_back() {
    memory::small_pages();
    let before = held_kib("Anonymous:");
    // On a thread of its own, as a worker is.
    std::thread::spawn(|| {
        let buffers: Vec<_> = (0..10_000).map(|_| vec![1_u8; 8192]).collect();
        assert_eq!(held_kib("AnonHugePages:"), 0);
        drop(buffers);
    })
    .join()
    .unwrap();
    // Of eighty megabytes.
    let begin = Instant::now();
    while held_kib("Anonymous:") > before + 24 * 1024 {
        assert!(begin.elapsed() < Duration::from_secs(20), "{} KiB are held", held_kib("Anonymous:"));
        std::thread::sleep(Duration::from_millis(100));
        memory::give_back_once();
    }
}
