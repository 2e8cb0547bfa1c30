//! How does a `tracing` event become a line? Its fields are flattened into one JSON object, each with its type.

use std::error::Error;
use std::fmt::{self, Write};
use std::sync::Arc;
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::{BLUE, DIM, Format, GREEN, LogSink, RED, RESET, YELLOW, colour, paint};
use crate::json::{self, Escaping, Plain};
use crate::timestamp;

/// A layer for `tracing_subscriber` that turns events into lines. Spans are not shown: a request's context stands in its
/// access line.
#[derive(Debug)]
pub struct EventLayer {
    sink: LogSink,
    format: Format,
    service: Option<Arc<str>>,
}

impl EventLayer {
    /// Lines go to `sink`; `service` is put on each that names none itself.
    pub fn new(sink: LogSink, format: Format, service: Option<&str>) -> Self {
        Self { sink, format, service: service.map(Arc::from) }
    }
}

impl<S: Subscriber> Layer<S> for EventLayer {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let metadata = event.metadata();
        let mut fields = Fields::new(self.format, colour());
        event.record(&mut fields);
        let mut line = Vec::with_capacity(fields.rest.len() + fields.message.len() + 160);
        let head = Head {
            time: SystemTime::now(),
            level: *metadata.level(),
            target: metadata.target(),
            service: self.service.as_deref(),
        };
        fields.write_line(&head, &mut line);
        self.sink.push(line);
    }
}

/// The line that tells of lost lines.
pub(super) fn write_losses(
    out: &mut Vec<u8>,
    format: Format,
    colour: bool,
    service: Option<&str>,
    time: SystemTime,
    lost: u64,
) {
    let mut fields = Fields::new(format, colour);
    fields.message.extend_from_slice(b"log lines were lost, because stdout was read too slowly");
    fields.integer("lost", lost);
    fields.write_line(&Head { time, level: Level::WARN, target: "kiro::log", service }, out);
}

struct Head<'a> {
    time: SystemTime,
    level: Level,
    target: &'a str,
    service: Option<&'a str>,
}

/// Collects an event's fields: the message by itself, the others already in the line's form.
struct Fields {
    format: Format,
    colour: bool,
    message: Vec<u8>,
    rest: Vec<u8>,
    names_service: bool,
}

impl Fields {
    fn new(format: Format, colour: bool) -> Self {
        Self { format, colour, message: Vec::new(), rest: Vec::new(), names_service: false }
    }

    fn write_line(&self, head: &Head<'_>, out: &mut Vec<u8>) {
        match self.format {
            Format::Json => self.write_json(head, out),
            Format::Pretty => self.write_pretty(head, out),
        }
    }

    fn write_json(&self, head: &Head<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"time":""#);
        timestamp::write_rfc3339(out, head.time);
        out.extend_from_slice(br#"","level":""#);
        out.extend_from_slice(head.level.as_str().as_bytes());
        out.extend_from_slice(br#"","target":"#);
        json::write_string(out, head.target);
        if let Some(service) = head.service.filter(|_| !self.names_service) {
            out.extend_from_slice(br#","service":"#);
            json::write_string(out, service);
        }
        out.extend_from_slice(br#","message":""#);
        out.extend_from_slice(&self.message);
        out.push(b'"');
        out.extend_from_slice(&self.rest);
        out.extend_from_slice(b"}\n");
    }

    fn write_pretty(&self, head: &Head<'_>, out: &mut Vec<u8>) {
        paint(out, self.colour, DIM);
        timestamp::write_time_of_day(out, head.time);
        paint(out, self.colour, RESET);
        out.push(b' ');
        paint(out, self.colour, level_colour(head.level));
        out.extend_from_slice(head.level.as_str().as_bytes());
        paint(out, self.colour, RESET);
        for word in [head.service.filter(|_| !self.names_service), Some(head.target)].into_iter().flatten() {
            out.push(b' ');
            json::write_plain(out, word);
        }
        out.extend_from_slice(b": ");
        out.extend_from_slice(&self.message);
        out.extend_from_slice(&self.rest);
        out.push(b'\n');
    }

    /// Writes the field's name, and then lets `value` write its value.
    fn field(&mut self, name: &str, value: impl FnOnce(&mut Vec<u8>)) {
        self.names_service |= name == "service";
        match self.format {
            Format::Json => {
                // Two members of one name would make the object ambiguous.
                let prefix = if matches!(name, "time" | "level" | "target") { "field." } else { "" };
                self.rest.extend_from_slice(b",\"");
                self.rest.extend_from_slice(prefix.as_bytes());
                json::write_escaped(&mut self.rest, name);
                self.rest.extend_from_slice(b"\":");
            }
            Format::Pretty => {
                self.rest.push(b' ');
                paint(&mut self.rest, self.colour, DIM);
                json::write_plain(&mut self.rest, name);
                self.rest.push(b'=');
                paint(&mut self.rest, self.colour, RESET);
            }
        }
        value(&mut self.rest);
    }

    fn integer(&mut self, name: &str, value: impl itoa::Integer) {
        self.field(name, |out| json::write_integer(out, value));
    }

    fn text(&mut self, name: &str, value: fmt::Arguments<'_>) {
        let format = self.format;
        if name == "message" {
            write_arguments(&mut self.message, format, value);
            return;
        }
        self.field(name, |out| match format {
            Format::Json => {
                out.push(b'"');
                write_arguments(out, format, value);
                out.push(b'"');
            }
            Format::Pretty => write_arguments(out, format, value),
        });
    }
}

/// A value whose `Display` or `Debug` fails leaves what it had written: a log line is no place to fail.
fn write_arguments(out: &mut Vec<u8>, format: Format, value: fmt::Arguments<'_>) {
    let _ = match format {
        Format::Json => Escaping(out).write_fmt(value),
        Format::Pretty => Plain(out).write_fmt(value),
    };
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no number for these.
        if value.is_finite() {
            self.field(field.name(), |out| {
                let _ = std::io::Write::write_fmt(out, format_args!("{value}"));
            });
        } else {
            self.text(field.name(), format_args!("{value}"));
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.integer(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.integer(field.name(), value);
    }

    // Many readers of JSON keep 53 bits of a number; these are ids, so they are text.
    fn record_i128(&mut self, field: &Field, value: i128) {
        self.text(field.name(), format_args!("{value}"));
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.text(field.name(), format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.field(field.name(), |out| out.extend_from_slice(if value { b"true" } else { b"false" }));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field.name(), format_args!("{value}"));
    }

    fn record_bytes(&mut self, field: &Field, value: &[u8]) {
        match self.format {
            Format::Json => self.field(field.name(), |out| json::write_bytes(out, value)),
            Format::Pretty => self.text(field.name(), format_args!("{}", String::from_utf8_lossy(value))),
        }
    }

    /// The causes too: the outermost error alone rarely says what to do.
    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Some libraries print their cause themselves.
            if !text.ends_with(&cause_text) {
                text.push_str(": ");
                text.push_str(&cause_text);
            }
            source = cause.source();
        }
        self.text(field.name(), format_args!("{text}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field.name(), format_args!("{value:?}"));
    }
}

fn level_colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => RED,
        Level::WARN => YELLOW,
        Level::INFO => GREEN,
        _ => BLUE,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::time::Duration;

    use serde_json::{Value, json};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// The lines that `work` makes by events.
    fn lines(format: Format, service: Option<&str>, work: impl FnOnce()) -> Vec<String> {
        let (reader, writer) = std::io::pipe().unwrap();
        let sink = LogSink::new(writer, format, service).unwrap();
        let layer = EventLayer::new(sink.clone(), format, service);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        assert!(sink.flush(Duration::from_secs(5)));
        drop(sink);
        BufReader::new(reader).lines().map(Result::unwrap).collect()
    }

    fn object(work: impl FnOnce()) -> Value {
        let lines = lines(Format::Json, Some("auth"), work);
        assert_eq!(lines.len(), 1);
        let mut value: Value = serde_json::from_str(&lines[0]).unwrap();
        let time = value.as_object_mut().unwrap().remove("time").unwrap();
        assert!(time.as_str().unwrap().ends_with('Z'));
        value
    }

    #[test]
    fn fields_keep_their_types() {
        let value = object(|| {
            tracing::info!(
                target: "kiro::certificate",
                yes = true, small = -3, large = u64::MAX, huge = u128::MAX, ratio = 0.25, nan = f64::NAN,
                text = "a\"b", shown = %Duration::from_secs(1).as_secs(), debugged = ?Some("x"),
                absent = Option::<u64>::None,
                "certificate {}", "verified"
            );
        });
        assert_eq!(
            value,
            json!({
                "level": "INFO", "target": "kiro::certificate", "service": "auth",
                "message": "certificate verified",
                "yes": true, "small": -3, "large": u64::MAX, "huge": u128::MAX.to_string(), "ratio": 0.25,
                "nan": "NaN", "text": "a\"b", "shown": "1", "debugged": "Some(\"x\")",
            })
        );
    }

    #[test]
    fn no_name_stands_twice() {
        let line = lines(Format::Json, Some("auth"), || {
            tracing::warn!(service = "profile", time = 1, level = 2, target = 3, "m");
        });
        for name in ["\"service\":", "\"time\":", "\"level\":", "\"target\":"] {
            assert_eq!(line[0].matches(name).count(), 1, "{}", line[0]);
        }
        let value: Value = serde_json::from_str(&line[0]).unwrap();
        assert_eq!(value["service"], "profile");
        assert_eq!(value["level"], "WARN");
        assert_eq!(
            (&value["field.time"], &value["field.level"], &value["field.target"]),
            (&json!(1), &json!(2), &json!(3))
        );
    }

    #[test]
    fn an_error_brings_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        let value = object(|| tracing::error!(error = &error as &dyn Error, "failed"));
        assert_eq!(value["error"], "outer: inner");
    }

    #[test]
    fn strangers_text_stays_in_its_line() {
        let hostile = "x\n{\"level\":\"ERROR\"}\u{1b}[2J";
        let value = object(|| tracing::info!(text = hostile, debugged = ?hostile, "{hostile}"));
        assert_eq!(value["message"], hostile);
        assert_eq!(value["text"], hostile);
        let pretty = lines(Format::Pretty, None, || tracing::info!(text = hostile, "{hostile}"));
        assert_eq!(pretty.len(), 1);
        let uncoloured = pretty[0].replace([DIM, RESET, GREEN].map(str::to_owned).join("").as_str(), "");
        assert!(uncoloured.contains("x\\u000a{\"level\":\"ERROR\"}\\u001b[2J"), "{uncoloured:?}");
    }

    #[test]
    fn for_people() {
        let mut fields = Fields::new(Format::Pretty, false);
        fields.text("message", format_args!("mesh file reloaded"));
        fields.integer("edges", 4);
        fields.text("path", format_args!("/etc/kiro"));
        let head = Head {
            time: std::time::UNIX_EPOCH,
            level: Level::WARN,
            target: "kiro::mesh",
            service: Some("auth"),
        };
        let mut line = Vec::new();
        fields.write_line(&head, &mut line);
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "00:00:00.000 WARN auth kiro::mesh: mesh file reloaded edges=4 path=/etc/kiro\n"
        );
    }
}
