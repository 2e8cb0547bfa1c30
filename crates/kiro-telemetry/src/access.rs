//! What does a sidecar say about a request? One line, written once a request, on the hot path.
//!
//! The line is put together by hand: at tens of thousands of requests a second a general serializer would cost more
//! than the parsing of the request. Nothing is allocated but what the caller's buffer grows by.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use crate::json;
use crate::log::{self, Format};
use crate::timestamp;

/// What the line says. Strings come from closed sets of the caller's, but for `path`, `method`, `callee` and
/// `reject_cause`, which may hold anything a client sent: every string is escaped.
#[derive(Debug, Clone)]
pub struct AccessRecord<'a> {
    /// When the request arrived.
    pub time: SystemTime,
    /// The service whose sidecar writes the line.
    pub service: &'a str,
    /// `inbound`, `outbound` or `ingress`.
    pub direction: &'a str,
    /// Who called.
    pub caller: &'a str,
    /// How that was proven: `mtls`, `loopback-mtls`, `loopback` or `none`.
    pub caller_proof: &'a str,
    /// The client's address, where nothing else says who it is: at an ingress.
    pub remote: Option<SocketAddr>,
    /// Who was called.
    pub callee: &'a str,
    /// How that was proven.
    pub callee_proof: &'a str,
    /// The method.
    pub method: &'a str,
    /// The path as it was received. Never the query: people put secrets there.
    pub path: &'a str,
    /// `HTTP/1.1`, `HTTP/2`, …
    pub protocol: &'a str,
    /// The answer's status.
    pub status: u16,
    /// The code of a request that the proxy refused or could not serve.
    pub reject: Option<&'a str>,
    /// The cause, for the operator alone.
    pub reject_cause: Option<&'a str>,
    /// `verified`, `signed`, `off`, `none` or `refused`.
    pub signature: &'a str,
    /// `allowed`, `audited`, `denied` or `none`.
    pub policy: &'a str,
    /// The code of the denial, also where `audited` let it through.
    pub policy_denial: Option<&'a str>,
    /// Body bytes of the request.
    pub bytes_in: u64,
    /// Body bytes of the answer.
    pub bytes_out: u64,
    /// How a tunnel or WebSocket ended: `finished`, `client_reset`, `app_reset`, `peer_reset`, `reset`, `idle`, `cut` or `stopped`; also
    /// `idle` where an answer on HTTP/2 was not read.
    pub ended: Option<&'a str>,
    /// From the request's head to the answer's end.
    pub duration: Duration,
    /// Where the request was sent.
    pub upstream: Option<SocketAddr>,
    /// How often it was sent.
    pub attempts: u32,
    /// Why there was no other attempt, where the last one failed.
    pub gave_up: Option<&'a str>,
    /// What went wrong on purpose, by the mesh file's `faults`: `delay`, `abort` or `delay+abort`.
    pub fault: Option<&'a str>,
    /// The name that was asked for, where the mesh file's `splits` say which version of it was called.
    pub split: Option<&'a str>,
    /// Where this is a copy, by the mesh file's `mirrors`: the service that got the original.
    pub copy_of: Option<&'a str>,
    /// The trace.
    pub trace_id: u128,
    /// The span of this hop.
    pub span_id: u64,
    /// Whether that span is exported.
    pub sampled: bool,
}

impl AccessRecord<'_> {
    /// Appends the line, line end included.
    pub fn write(&self, format: Format, out: &mut Vec<u8>) {
        match format {
            Format::Json => self.write_json(out),
            Format::Pretty => self.write_pretty(log::colour(), out),
        }
    }

    fn write_json(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"time":""#);
        timestamp::write_rfc3339(out, self.time);
        // The same first fields as an event's, so that one reader serves both.
        let level: &[u8] = match self.reject {
            None => br#"","level":"INFO","target":"kiro::access","service":""#,
            Some(_) => br#"","level":"WARN","target":"kiro::access","service":""#,
        };
        out.extend_from_slice(level);
        json::write_escaped(out, self.service);
        text(out, br#"","direction":""#, self.direction);
        text(out, br#"","caller":""#, self.caller);
        text(out, br#"","caller_proof":""#, self.caller_proof);
        if let Some(remote) = self.remote {
            out.extend_from_slice(br#"","remote":""#);
            write_address(out, remote);
        }
        text(out, br#"","callee":""#, self.callee);
        text(out, br#"","callee_proof":""#, self.callee_proof);
        text(out, br#"","method":""#, self.method);
        text(out, br#"","path":""#, self.path);
        text(out, br#"","protocol":""#, self.protocol);
        integer(out, br#"","status":"#, u64::from(self.status));
        // From here on each field begins with the comma before it.
        if let Some(reject) = self.reject {
            optional(out, br#","reject":""#, reject);
        }
        if let Some(cause) = self.reject_cause {
            optional(out, br#","reject_cause":""#, cause);
        }
        optional(out, br#","signature":""#, self.signature);
        optional(out, br#","policy":""#, self.policy);
        if let Some(denial) = self.policy_denial {
            optional(out, br#","policy_denial":""#, denial);
        }
        integer(out, br#","bytes_in":"#, self.bytes_in);
        integer(out, br#","bytes_out":"#, self.bytes_out);
        if let Some(ended) = self.ended {
            optional(out, br#","ended":""#, ended);
        }
        integer(out, br#","duration_us":"#, micros(self.duration));
        if let Some(upstream) = self.upstream {
            out.extend_from_slice(br#","upstream":""#);
            write_address(out, upstream);
            out.push(b'"');
        }
        integer(out, br#","attempts":"#, u64::from(self.attempts));
        if let Some(reason) = self.gave_up {
            optional(out, br#","gave_up":""#, reason);
        }
        if let Some(fault) = self.fault {
            optional(out, br#","fault":""#, fault);
        }
        if let Some(split) = self.split {
            optional(out, br#","split":""#, split);
        }
        if let Some(original) = self.copy_of {
            optional(out, br#","copy_of":""#, original);
        }
        out.extend_from_slice(br#","trace_id":""#);
        write_trace_id(out, self.trace_id);
        out.extend_from_slice(br#"","span_id":""#);
        json::write_hex(out, self.span_id, 16);
        out.extend_from_slice(if self.sampled {
            b"\",\"sampled\":true}\n"
        } else {
            b"\",\"sampled\":false}\n"
        });
    }

    fn write_pretty(&self, colour: bool, out: &mut Vec<u8>) {
        let paint = |out: &mut Vec<u8>, code: &str| log::paint(out, colour, code);
        paint(out, log::DIM);
        timestamp::write_time_of_day(out, self.time);
        paint(out, log::RESET);
        for word in [self.service, self.direction, self.method, self.path] {
            out.push(b' ');
            json::write_plain(out, word);
        }
        out.push(b' ');
        paint(out, status_colour(self.status));
        json::write_integer(out, self.status);
        paint(out, log::RESET);
        out.push(b' ');
        write_milliseconds(out, self.duration);
        out.extend_from_slice(b"ms ");
        for (name, proof, end) in
            [(self.caller, self.caller_proof, " -> "), (self.callee, self.callee_proof, "")]
        {
            json::write_plain(out, name);
            out.push(b'(');
            json::write_plain(out, proof);
            out.push(b')');
            out.extend_from_slice(end.as_bytes());
        }
        if let Some(reject) = self.reject {
            paint(out, log::RED);
            pair(out, " reject=", reject);
            paint(out, log::RESET);
        }
        if let Some(cause) = self.reject_cause {
            out.extend_from_slice(b" cause=\"");
            json::write_plain(out, cause);
            out.push(b'"');
        }
        paint(out, log::DIM);
        self.write_pretty_details(out);
        paint(out, log::RESET);
        out.push(b'\n');
    }

    fn write_pretty_details(&self, out: &mut Vec<u8>) {
        pair(out, " ", self.protocol);
        pair(out, " signature=", self.signature);
        pair(out, " policy=", self.policy);
        if let Some(denial) = self.policy_denial {
            out.push(b':');
            json::write_plain(out, denial);
        }
        out.extend_from_slice(b" in=");
        json::write_integer(out, self.bytes_in);
        out.extend_from_slice(b" out=");
        json::write_integer(out, self.bytes_out);
        if let Some(ended) = self.ended {
            pair(out, " ended=", ended);
        }
        if let Some(remote) = self.remote {
            out.extend_from_slice(b" remote=");
            write_address(out, remote);
        }
        if let Some(upstream) = self.upstream {
            out.extend_from_slice(b" upstream=");
            write_address(out, upstream);
        }
        if self.attempts > 1 {
            out.extend_from_slice(b" attempts=");
            json::write_integer(out, self.attempts);
        }
        if let Some(reason) = self.gave_up {
            pair(out, " gave_up=", reason);
        }
        if let Some(fault) = self.fault {
            pair(out, " fault=", fault);
        }
        if let Some(split) = self.split {
            pair(out, " split=", split);
        }
        if let Some(original) = self.copy_of {
            pair(out, " copy_of=", original);
        }
        out.extend_from_slice(b" trace=");
        write_trace_id(out, self.trace_id);
    }
}

fn text(out: &mut Vec<u8>, before: &[u8], value: &str) {
    out.extend_from_slice(before);
    json::write_escaped(out, value);
}

fn optional(out: &mut Vec<u8>, before: &[u8], value: &str) {
    text(out, before, value);
    out.push(b'"');
}

fn integer(out: &mut Vec<u8>, before: &[u8], value: u64) {
    out.extend_from_slice(before);
    json::write_integer(out, value);
}

fn pair(out: &mut Vec<u8>, before: &str, value: &str) {
    out.extend_from_slice(before.as_bytes());
    json::write_plain(out, value);
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn write_milliseconds(out: &mut Vec<u8>, duration: Duration) {
    let micros = micros(duration);
    json::write_integer(out, micros / 1000);
    out.push(b'.');
    json::write_integer(out, micros / 100 % 10);
}

fn write_trace_id(out: &mut Vec<u8>, trace_id: u128) {
    // The two halves; the casts keep the lowest 64 bits.
    json::write_hex(out, (trace_id >> 64) as u64, 16);
    json::write_hex(out, trace_id as u64, 16);
}

fn write_address(out: &mut Vec<u8>, address: SocketAddr) {
    match address {
        SocketAddr::V4(address) => {
            let [a, b, c, d] = address.ip().octets();
            for (octet, separator) in [(a, b'.'), (b, b'.'), (c, b'.'), (d, b':')] {
                json::write_integer(out, octet);
                out.push(separator);
            }
            json::write_integer(out, address.port());
        }
        // A scope id may hold no letters, so the address needs no escaping; writing to a Vec does not fail.
        SocketAddr::V6(address) => {
            let _ = std::io::Write::write_fmt(out, format_args!("{address}"));
        }
    }
}

fn status_colour(status: u16) -> &'static str {
    match status {
        0..400 => log::GREEN,
        400..500 => log::YELLOW,
        500.. => log::RED,
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use serde_json::{Value, json};

    use super::*;

    fn record() -> AccessRecord<'static> {
        AccessRecord {
            time: UNIX_EPOCH + Duration::new(1_618_884_473, 7_000),
            service: "profile",
            direction: "inbound",
            caller: "dashboard",
            caller_proof: "mtls",
            remote: None,
            callee: "profile",
            callee_proof: "loopback-mtls",
            method: "GET",
            path: "/profiles/alice",
            protocol: "HTTP/2",
            status: 200,
            reject: None,
            reject_cause: None,
            signature: "verified",
            policy: "allowed",
            policy_denial: None,
            bytes_in: 0,
            bytes_out: u64::MAX,
            ended: None,
            duration: Duration::from_micros(1_234),
            upstream: Some(([127, 0, 0, 1], 8002).into()),
            attempts: 1,
            gave_up: None,
            fault: None,
            split: None,
            copy_of: None,
            trace_id: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
            span_id: 0x00f0_67aa_0ba9_02b7,
            sampled: true,
        }
    }

    fn line(record: &AccessRecord<'_>) -> String {
        let mut out = Vec::new();
        record.write(Format::Json, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_allowed_request() {
        let value: Value = serde_json::from_str(&line(&record())).unwrap();
        assert_eq!(
            value,
            json!({
                "time": "2021-04-20T02:07:53.000007Z", "level": "INFO", "target": "kiro::access",
                "service": "profile", "direction": "inbound",
                "caller": "dashboard", "caller_proof": "mtls",
                "callee": "profile", "callee_proof": "loopback-mtls",
                "method": "GET", "path": "/profiles/alice", "protocol": "HTTP/2", "status": 200,
                "signature": "verified", "policy": "allowed",
                "bytes_in": 0, "bytes_out": u64::MAX, "duration_us": 1234,
                "upstream": "127.0.0.1:8002", "attempts": 1,
                "trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "00f067aa0ba902b7", "sampled": true,
            })
        );
    }

    #[test]
    fn a_refused_request() {
        let record = AccessRecord {
            status: 403,
            reject: Some("policy_no_edge"),
            reject_cause: Some("no allow line \"dashboard\" to profile"),
            policy: "denied",
            policy_denial: Some("policy_no_edge"),
            remote: Some("192.0.2.7:50000".parse().unwrap()),
            upstream: Some("[fe80::1%3]:15006".parse().unwrap()),
            duration: Duration::MAX,
            sampled: false,
            ..record()
        };
        let value: Value = serde_json::from_str(&line(&record)).unwrap();
        let expected = [
            ("level", json!("WARN")),
            ("status", json!(403)),
            ("remote", json!("192.0.2.7:50000")),
            ("reject", json!("policy_no_edge")),
            ("reject_cause", json!("no allow line \"dashboard\" to profile")),
            ("policy", json!("denied")),
            ("policy_denial", json!("policy_no_edge")),
            ("upstream", json!("[fe80::1%3]:15006")),
            ("duration_us", json!(u64::MAX)),
            ("sampled", json!(false)),
        ];
        for (name, expected) in expected {
            assert_eq!(value[name], expected, "{name}");
        }
    }

    #[test]
    fn no_string_can_leave_its_place() {
        let hostile = "\",\"status\":200}\n{\"x\":\"\\ \u{1b}[2J\u{9b}é\u{0}";
        let every_string_hostile = AccessRecord {
            service: hostile,
            direction: hostile,
            caller: hostile,
            caller_proof: hostile,
            callee: hostile,
            callee_proof: hostile,
            method: hostile,
            path: hostile,
            protocol: hostile,
            reject: Some(hostile),
            reject_cause: Some(hostile),
            signature: hostile,
            policy: hostile,
            policy_denial: Some(hostile),
            ended: Some(hostile),
            fault: Some(hostile),
            split: Some(hostile),
            copy_of: Some(hostile),
            ..record()
        };
        let json = line(&every_string_hostile);
        let value: Value = serde_json::from_str(&json).unwrap();
        let strings = value.as_object().unwrap().values().filter(|value| **value == json!(hostile));
        assert_eq!(strings.count(), 18);
        let mut pretty = Vec::new();
        every_string_hostile.write_pretty(false, &mut pretty);
        for line in [json, String::from_utf8(pretty).unwrap()] {
            let (line, end) = line.split_at(line.len() - 1);
            assert_eq!(end, "\n");
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
    }

    #[test]
    fn for_people() {
        let mut out = Vec::new();
        record().write_pretty(false, &mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "02:07:53.000 profile inbound GET /profiles/alice 200 1.2ms dashboard(mtls) -> profile(loopback-mtls) \
             HTTP/2 signature=verified policy=allowed in=0 out=18446744073709551615 upstream=127.0.0.1:8002 \
             trace=0af7651916cd43dd8448eb211c80319c\n"
        );
        let mut coloured = Vec::new();
        AccessRecord { status: 502, reject: Some("app_down"), ..record() }.write_pretty(true, &mut coloured);
        let coloured = String::from_utf8(coloured).unwrap();
        assert!(coloured.contains("\u{1b}[31m502\u{1b}[0m"), "{coloured:?}");
        assert!(coloured.contains("\u{1b}[31m reject=app_down\u{1b}[0m"), "{coloured:?}");
    }

    #[test]
    fn the_buffer_is_appended_to() {
        let mut out = b"before\n".to_vec();
        record().write(Format::Json, &mut out);
        record().write(Format::Json, &mut out);
        assert_eq!(memchr::memchr_iter(b'\n', &out).count(), 3);
        assert!(out.starts_with(b"before\n{\"time\""));
    }
}
