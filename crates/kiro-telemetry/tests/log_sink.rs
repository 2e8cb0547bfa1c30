//! A log whose reader is slow, gone, or in trouble never makes anybody wait, and what it loses is said.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests may panic as the tests themselves may"
)]

use std::io::{self, BufRead, BufReader, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kiro_telemetry::log::{FLUSH_BYTES, LineBuffer, LogSink, QUEUE_BYTES_MAX};
use kiro_telemetry::{AccessRecord, Format};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(10);

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

#[test]
fn nobody_reads_and_nobody_waits() {
    const LINES: u64 = 20_000;
    let (reader, writer) = io::pipe().unwrap();
    let sink = LogSink::new(writer, Format::Json, Some("profile")).unwrap();
    // Twenty megabytes: five times what may wait. A push that waited would wait for ever.
    let (done, pushed) = mpsc::channel();
    let pushing = sink.clone();
    std::thread::spawn(move || {
        for number in 0..LINES {
            let text = format!("{{\"number\":{number},\"filling\":\"{}\"}}\n", "x".repeat(1000));
            // Of exact size: what counts is the memory that a line takes.
            pushing.push(text.as_bytes().to_vec());
        }
        drop(pushing);
        done.send(()).unwrap();
    });
    assert!(pushed.recv_timeout(PATIENCE).is_ok(), "a push waits");
    let lost = sink.lost();
    assert!(lost > LINES / 2, "{lost} lost: the queue is not bounded");
    let waiting_bytes = (LINES - lost) as usize * 1000;
    assert!(waiting_bytes > QUEUE_BYTES_MAX * 8 / 10, "{lost} lost, though there was room");
    assert!(!sink.flush(Duration::from_millis(1)), "nothing is flushed while nobody reads");

    // The reader is back: what waited comes whole and in order, and then how much did not.
    drop(sink);
    let lines: Vec<Value> =
        BufReader::new(reader).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    let numbers: Vec<u64> = lines.iter().filter_map(|line| line["number"].as_u64()).collect();
    assert!(numbers.is_sorted() && numbers.first() == Some(&0));
    assert_eq!(numbers.len() as u64, LINES - lost);
    let said: Vec<&Value> = lines.iter().filter(|line| line["target"] == "kiro::log").collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert_eq!(said[0]["lost"], lost);
    assert_eq!(said[0]["level"], "WARN");
    assert_eq!(said[0]["service"], "profile");
}

#[test]
fn losses_are_said_once_and_lines_flow_again() {
    let (reader, writer) = io::pipe().unwrap();
    let sink = LogSink::new(writer, Format::Json, None).unwrap();
    while sink.lost() < 5 {
        sink.push(b"{\"filling\":true}\n".repeat(1000));
    }
    let lost = sink.lost();
    let (lines, received) = mpsc::channel();
    let reading = std::thread::spawn(move || {
        BufReader::new(reader).lines().for_each(|line| lines.send(line.unwrap()).unwrap());
    });
    // Nobody has to push, flush or end for it to be said.
    let said =
        std::iter::from_fn(|| received.recv_timeout(PATIENCE).ok()).find(|line| line.contains("\"lost\""));
    let said: Value = serde_json::from_str(&said.expect("the loss is said")).unwrap();
    assert_eq!(said["lost"], lost);
    sink.push(b"{\"after\":true}\n".to_vec());
    assert!(sink.flush(PATIENCE));
    assert_eq!(sink.lost(), lost);
    drop(sink);
    reading.join().unwrap();
    let rest: Vec<String> = received.iter().filter(|line| !line.contains("filling")).collect();
    assert_eq!(rest, ["{\"after\":true}"], "said once");
}

#[test]
fn a_reader_that_is_gone_costs_lines_and_nothing_else() {
    let (reader, writer) = io::pipe().unwrap();
    let sink = LogSink::new(writer, Format::Json, None).unwrap();
    drop(reader);
    sink.push(b"one\ntwo\n".to_vec());
    wait_for("the loss is noticed", || sink.lost() == 2);
    sink.push(b"three\n".to_vec());
    assert_eq!(sink.lost(), 3, "lost at once, without a try");
    assert!(sink.flush(PATIENCE), "the thread lives on");
}

/// Takes `room` bytes, then fails once, then takes everything.
struct Disk {
    room: usize,
    failed: bool,
    taken: mpsc::Sender<Vec<u8>>,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = if self.failed { bytes.len() } else { bytes.len().min(self.room) };
        if taken == 0 {
            self.failed = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.room -= taken.min(self.room);
        self.taken.send(bytes[..taken].to_vec()).unwrap();
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_survived_and_no_line_is_glued_to_another() {
    let (taken, written) = mpsc::channel();
    let sink = LogSink::new(Disk { room: 6, failed: false, taken }, Format::Json, None).unwrap();
    sink.push(b"one\ntwo\nthree\n".to_vec());
    assert!(sink.flush(PATIENCE));
    sink.push(b"four\n".to_vec());
    assert!(sink.flush(PATIENCE));
    drop(sink);
    let text = String::from_utf8(written.iter().flatten().collect()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["one", "tw"]);
    let loss: Value = serde_json::from_str(lines[2]).unwrap();
    assert_eq!(loss["lost"], 2);
    assert_eq!(lines[3..], ["four"]);
}

/// A non-blocking pipe with no room at first.
struct Busy(u32, mpsc::Sender<Vec<u8>>);

impl Write for Busy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += 1;
        match self.0 {
            1 => Err(io::ErrorKind::WouldBlock.into()),
            2 => Err(io::ErrorKind::Interrupted.into()),
            _ => self.1.send(bytes.to_vec()).map(|()| bytes.len()).map_err(io::Error::other),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_busy_writer_is_tried_again() {
    let (taken, written) = mpsc::channel();
    let sink = LogSink::new(Busy(0, taken), Format::Json, None).unwrap();
    sink.push(b"line\n".to_vec());
    assert!(sink.flush(PATIENCE));
    assert_eq!((written.recv().unwrap(), sink.lost()), (b"line\n".to_vec(), 0));
}

#[test]
fn a_buffer_gathers_lines_until_they_are_many_or_the_timer_comes() {
    let (taken, written) = mpsc::channel();
    let sink = LogSink::new(Disk { room: usize::MAX, failed: false, taken }, Format::Json, None).unwrap();
    let mut buffer = LineBuffer::new(sink.clone());
    assert!(buffer.is_empty());
    buffer.write(|out| out.extend_from_slice(b"early\n"));
    assert!(!buffer.is_empty());
    assert!(sink.flush(PATIENCE));
    assert!(written.try_recv().is_err(), "one line is not handed on by itself");
    buffer.flush();
    assert!(buffer.is_empty());
    assert!(sink.flush(PATIENCE));
    assert_eq!(written.try_recv().unwrap(), b"early\n");

    let line = [b'x'; 1023].into_iter().chain([b'\n']).collect::<Vec<u8>>();
    for _ in 0..FLUSH_BYTES / line.len() {
        buffer.write(|out| out.extend_from_slice(&line));
    }
    assert!(buffer.is_empty(), "many lines are handed on by themselves");
    buffer.write(|out| out.extend_from_slice(b"last\n"));
    drop(buffer);
    assert!(sink.flush(PATIENCE));
    drop(sink);
    let bytes: Vec<u8> = written.iter().flatten().collect();
    assert_eq!(bytes.len(), FLUSH_BYTES + 5);
    assert!(bytes.ends_with(b"\nlast\n"), "a dropped buffer keeps no lines");
}

#[test]
fn one_worker_among_many_keeps_its_lines_whole() {
    let (reader, writer) = io::pipe().unwrap();
    let sink = LogSink::new(writer, Format::Json, None).unwrap();
    let reading = std::thread::spawn(move || {
        BufReader::new(reader).lines().fold(0, |count, line| {
            let value: Value = serde_json::from_str(&line.unwrap()).unwrap();
            assert_eq!(value["target"], "kiro::access");
            count + 1
        })
    });
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let mut buffer = LineBuffer::new(sink.clone());
            std::thread::spawn(move || {
                for _ in 0..500 {
                    buffer.write(|out| access_record().write(Format::Json, out));
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    assert_eq!(sink.lost(), 0);
    drop(sink);
    assert_eq!(reading.join().unwrap(), 2_000);
}

fn access_record() -> AccessRecord<'static> {
    AccessRecord {
        time: std::time::SystemTime::now(),
        service: "profile",
        direction: "inbound",
        caller: "dashboard",
        caller_proof: "mtls",
        remote: None,
        callee: "profile",
        callee_proof: "loopback-mtls",
        method: "GET",
        path: "/",
        protocol: "HTTP/2",
        status: 200,
        reject: None,
        reject_cause: None,
        signature: "verified",
        policy: "allowed",
        policy_denial: None,
        bytes_in: 0,
        bytes_out: 0,
        ended: None,
        duration: Duration::ZERO,
        upstream: None,
        attempts: 1,
        gave_up: None,
        fault: None,
        split: None,
        copy_of: None,
        trace_id: 1,
        span_id: 1,
        sampled: true,
    }
}
