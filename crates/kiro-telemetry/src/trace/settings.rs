//! What do the `OTEL_*` variables say? Read once, checked whole; what is not understood is an error that names the
//! variable.

use std::time::Duration;

use super::{Sampler, TracingError};

/// The SDK's defaults, which are the specification's.
const QUEUED_SPANS_MAX: u64 = 2048;
const BATCH_SPANS_MAX: u64 = 512;
const DELAY_MS: u64 = 5_000;
const EXPORT_TIMEOUT_MS: u64 = 10_000;
/// Spans a queue may be asked to hold: each takes about a kilobyte.
const QUEUED_SPANS_LIMIT: u64 = 1_000_000;

const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
const PROTOCOLS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
const COMPRESSIONS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"];
const TIMEOUTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"];
const INSECURES: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE"];

type Variable<'a> = &'a dyn Fn(&str) -> Option<String>;

#[derive(Debug)]
pub(super) struct Settings {
    pub(super) endpoint: String,
    pub(super) timeout: Duration,
    pub(super) sampler: Sampler,
    pub(super) service_name: Option<String>,
    pub(super) queued_spans_max: usize,
    pub(super) batch_spans_max: usize,
    pub(super) delay: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            endpoint: String::new(),
            timeout: Duration::from_millis(EXPORT_TIMEOUT_MS),
            sampler: Sampler::PARENT_BASED_ALWAYS_ON,
            service_name: None,
            queued_spans_max: QUEUED_SPANS_MAX as usize,
            batch_spans_max: BATCH_SPANS_MAX as usize,
            delay: Duration::from_millis(DELAY_MS),
        }
    }
}

impl Settings {
    /// `None`: tracing is off.
    pub(super) fn read(variable: Variable<'_>) -> Result<Option<Self>, TracingError> {
        // An empty variable is an unset one, says the specification; Compose makes many of them.
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let variable: Variable<'_> = &variable;
        // Any other value is false, says the specification.
        if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let Some(endpoint) = endpoint(variable)? else { return Ok(None) };
        check_word(
            variable,
            PROTOCOLS,
            &["grpc"],
            "grpc (this program has no other protocol; Jaeger takes it on port 4317)",
        )?;
        check_word(variable, COMPRESSIONS, &["none"], "none")?;
        let timeout = milliseconds(first(variable, TIMEOUTS), EXPORT_TIMEOUT_MS)?;
        let delay_name = "OTEL_BSP_SCHEDULE_DELAY";
        let delay = milliseconds(variable(delay_name).map(|value| (delay_name, value)), DELAY_MS)?;
        let sampler = match variable("OTEL_TRACES_SAMPLER") {
            Some(name) => Sampler::parse(&name, variable("OTEL_TRACES_SAMPLER_ARG").as_deref())?,
            None => Sampler::PARENT_BASED_ALWAYS_ON,
        };
        let queue = spans(variable, "OTEL_BSP_MAX_QUEUE_SIZE", QUEUED_SPANS_MAX)?;
        let batch = spans(variable, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", BATCH_SPANS_MAX)?;
        Ok(Some(Self {
            endpoint,
            timeout,
            sampler,
            service_name: variable("OTEL_SERVICE_NAME"),
            // Bounded above, so they fit.
            queued_spans_max: queue as usize,
            batch_spans_max: batch.min(queue) as usize,
            delay,
        }))
    }
}

/// Where spans go; `None` where nobody asked for it.
fn endpoint(variable: Variable<'_>) -> Result<Option<String>, TracingError> {
    let asked = match variable("OTEL_TRACES_EXPORTER").as_deref() {
        None => false,
        Some("none") => return Ok(None),
        Some("otlp") => true,
        Some(other) => {
            return Err(TracingError::Variable {
                variable: "OTEL_TRACES_EXPORTER",
                value: other.to_owned(),
                allowed: "otlp, none",
            });
        }
    };
    match first(variable, ENDPOINTS) {
        Some((name, value)) => check_endpoint(variable, name, value.trim()).map(Some),
        None if asked => Ok(Some("http://localhost:4317".to_owned())),
        None => Ok(None),
    }
}

fn check_endpoint(variable: Variable<'_>, name: &'static str, value: &str) -> Result<String, TracingError> {
    let refuse = |value: &str, allowed| {
        Err(TracingError::Variable { variable: name, value: value.to_owned(), allowed })
    };
    let insecure =
        first(variable, INSECURES).is_some_and(|(_, insecure)| insecure.eq_ignore_ascii_case("true"));
    let url = if value.contains("://") || !insecure { value.to_owned() } else { format!("http://{value}") };
    let parsed = url.parse::<http::Uri>().ok();
    let Some(authority) = parsed.as_ref().and_then(http::Uri::authority) else {
        return refuse(value, "a URL such as http://jaeger:4317");
    };
    if authority.as_str().contains('@') {
        // The value is not repeated, since it may hold a password.
        return refuse(
            "(hidden)",
            "a URL without user and password; OTEL_EXPORTER_OTLP_HEADERS takes credentials",
        );
    }
    match parsed.as_ref().and_then(http::Uri::scheme_str) {
        Some("http") => Ok(url),
        Some(_) | None => {
            refuse(value, "a URL that begins with http:// (this program speaks no TLS to a collector)")
        }
    }
}

fn check_word(
    variable: Variable<'_>,
    names: [&'static str; 2],
    words: &[&str],
    allowed: &'static str,
) -> Result<(), TracingError> {
    match first(variable, names) {
        Some((name, value)) if !words.contains(&value.as_str()) => {
            Err(TracingError::Variable { variable: name, value, allowed })
        }
        Some(_) | None => Ok(()),
    }
}

/// The first that is set; the name for traces comes before the general one.
fn first(variable: Variable<'_>, names: [&'static str; 2]) -> Option<(&'static str, String)> {
    names.into_iter().find_map(|name| variable(name).map(|value| (name, value)))
}

fn milliseconds(set: Option<(&'static str, String)>, default: u64) -> Result<Duration, TracingError> {
    let number = match set {
        Some((name, value)) => parse_number(name, &value, u64::from(u32::MAX), "milliseconds, from 1")?,
        None => default,
    };
    Ok(Duration::from_millis(number))
}

fn spans(variable: Variable<'_>, name: &'static str, default: u64) -> Result<u64, TracingError> {
    match variable(name) {
        Some(value) => parse_number(name, &value, QUEUED_SPANS_LIMIT, "spans, from 1 to 1000000"),
        None => Ok(default),
    }
}

fn parse_number(
    variable: &'static str,
    value: &str,
    most: u64,
    allowed: &'static str,
) -> Result<u64, TracingError> {
    match value.trim().parse::<u64>() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        Ok(_) | Err(_) => Err(TracingError::Variable { variable, value: value.to_owned(), allowed }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>, TracingError> {
        Settings::read(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn on(variables: &[(&str, &str)]) -> Settings {
        read(variables).unwrap().unwrap()
    }

    const GENERAL: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://jaeger:4317");

    #[test]
    fn on_only_where_somebody_asked_for_it() {
        assert!(read(&[]).unwrap().is_none());
        assert!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]).unwrap().is_none());
        assert!(read(&[GENERAL, ("OTEL_SDK_DISABLED", "TRUE")]).unwrap().is_none());
        assert!(read(&[GENERAL, ("OTEL_TRACES_EXPORTER", "none")]).unwrap().is_none());
        assert_eq!(on(&[GENERAL, ("OTEL_SDK_DISABLED", "yes")]).endpoint, "http://jaeger:4317");
        assert_eq!(on(&[("OTEL_TRACES_EXPORTER", "otlp")]).endpoint, "http://localhost:4317");
    }

    #[test]
    fn defaults_are_the_specifications() {
        let settings = on(&[GENERAL]);
        assert_eq!(settings.timeout, Duration::from_secs(10));
        assert_eq!(settings.delay, Duration::from_secs(5));
        assert_eq!((settings.queued_spans_max, settings.batch_spans_max), (2048, 512));
        assert_eq!(settings.sampler, Sampler::PARENT_BASED_ALWAYS_ON);
        assert_eq!(settings.service_name, None);
    }

    #[test]
    fn the_name_for_traces_comes_first() {
        let settings = on(&[
            GENERAL,
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://other:4317"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2000"),
        ]);
        assert_eq!(settings.endpoint, "http://other:4317");
        assert_eq!(settings.timeout, Duration::from_secs(2));
    }

    #[test]
    fn numbers_and_names() {
        let settings = on(&[
            GENERAL,
            ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "200"),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
            ("OTEL_SERVICE_NAME", "shop"),
            ("OTEL_TRACES_SAMPLER", "always_off"),
        ]);
        // A batch is never larger than the queue.
        assert_eq!((settings.queued_spans_max, settings.batch_spans_max), (100, 100));
        assert_eq!(settings.delay, Duration::from_millis(50));
        assert_eq!(settings.service_name.as_deref(), Some("shop"));
        assert_eq!(settings.sampler, Sampler::parse("always_off", None).unwrap());
    }

    #[test]
    fn an_address_without_scheme_needs_the_word_insecure() {
        let bare = ("OTEL_EXPORTER_OTLP_ENDPOINT", "jaeger:4317");
        assert!(read(&[bare]).unwrap_err().to_string().contains("http://"));
        assert_eq!(on(&[bare, ("OTEL_EXPORTER_OTLP_INSECURE", "true")]).endpoint, "http://jaeger:4317");
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let table = [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://collector:4317"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "/var/run/otlp"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_TRACES_SAMPLER", "some"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "-1"),
            ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ];
        for (name, value) in table {
            let error = read(&[GENERAL, (name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}={value:?} cannot be used; allowed: ")), "{error}");
        }
        let general_only = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense://")]).unwrap_err().to_string();
        assert!(general_only.contains("OTEL_EXPORTER_OTLP_ENDPOINT"), "{general_only}");
    }

    #[test]
    fn a_password_is_not_repeated() {
        let error = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:hunter2@jaeger:4317")]).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert!(error.to_string().contains("OTEL_EXPORTER_OTLP_HEADERS"), "{error}");
    }
}
