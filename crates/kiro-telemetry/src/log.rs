//! Where do log lines go? To stdout, as JSON or for people, by a thread that may wait so that nobody else has to.
//!
//! Two kinds of lines meet here: `tracing` events ([`init_logging`]) and access lines, which each worker gathers in
//! a [`LineBuffer`] of its own.

mod events;
mod line_buffer;
mod sink;

use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;

pub use events::EventLayer;
pub use line_buffer::{FLUSH_BYTES, LineBuffer};
pub use sink::{LogSink, QUEUE_BYTES_MAX};

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    Json,
    /// One line for a person, coloured where stdout is a terminal.
    Pretty,
}

impl std::str::FromStr for Format {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        match text {
            "json" => Ok(Self::Json),
            "pretty" => Ok(Self::Pretty),
            other => Err(LogError::Format { value: other.to_owned() }),
        }
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter does not parse.
    #[error(
        "the log filter {value:?} is not understood ({cause}); write a level such as \"info\", or \"info,kiro_proxy=debug\""
    )]
    Filter {
        /// What was given.
        value: String,
        /// What the parser says.
        cause: String,
    },
    /// The format is not one of ours.
    #[error("the log format {value:?} is not known; write \"json\" or \"pretty\"")]
    Format {
        /// What was given.
        value: String,
    },
    /// The writer thread did not start.
    #[error("the thread that writes log lines could not be started: {0}")]
    Thread(#[from] io::Error),
    /// Somebody else has set up logging before.
    #[error("logging has been set up already in this process")]
    AlreadySet,
}

/// Installs the global `tracing` subscriber, whose events go to stdout. `filter` is a level, and levels for targets, separated by
/// commas: `info,kiro::certificate=warn`. Empty means `info`; what libraries have to say of a stranger's bytes is only heard where they are named. (The crate's other filter also selects by field values; that takes
/// a regular-expression engine, which nobody here has a use for.) `service` is put on each line that names none itself.
pub fn init_logging(format: Format, filter: &str, service: Option<&str>) -> Result<LogSink, LogError> {
    let parsed = parse_filter(filter)?;
    let sink = LogSink::stdout(format, service)?;
    let events = EventLayer::new(sink.clone(), format, service);
    let subscriber = tracing_subscriber::registry().with(parsed).with(events);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::AlreadySet)?;
    Ok(sink)
}

fn parse_filter(filter: &str) -> Result<Targets, LogError> {
    let filter = if filter.trim().is_empty() { "info" } else { filter };
    let parsed = filter
        .parse::<Targets>()
        .map_err(|error| LogError::Filter { value: filter.to_owned(), cause: error.to_string() })?;
    let named = |library: &str| filter.split(',').any(|part| part.trim().starts_with(library));
    let quiet = LIBRARIES.into_iter().filter(|library| !named(library));
    Ok(parsed.with_targets(quiet.map(|library| (library, LevelFilter::ERROR))))
}

/// What reads a stranger's bytes and has warnings about them: one for each bad frame, which he could fill a disk with. Kiro's own
/// lines of such things are bounded. Named in the filter (`info,h2=debug`), they say what they have to say.
const LIBRARIES: [&str; 3] = ["h2", "hyper", "rustls"];

pub(crate) const RESET: &str = "\x1b[0m";
pub(crate) const DIM: &str = "\x1b[2m";
pub(crate) const RED: &str = "\x1b[31m";
pub(crate) const GREEN: &str = "\x1b[32m";
pub(crate) const YELLOW: &str = "\x1b[33m";
pub(crate) const BLUE: &str = "\x1b[34m";

/// Whether lines for people are coloured: stdout is a terminal and nobody has asked for none (<https://no-color.org>).
pub(crate) fn colour() -> bool {
    static COLOUR: OnceLock<bool> = OnceLock::new();
    *COLOUR.get_or_init(|| {
        io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    })
}

pub(crate) fn paint(out: &mut Vec<u8>, colour: bool, code: &str) {
    if colour {
        out.extend_from_slice(code.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_named() {
        let error = parse_filter("info,kiro=loudly").unwrap_err().to_string();
        assert!(error.contains("kiro=loudly"), "{error}");
        assert!(parse_filter("").is_ok());
        assert_eq!(parse_filter("  ").unwrap(), parse_filter("info").unwrap());
    }

    #[test]
    fn libraries_that_read_what_strangers_send_are_quiet_unless_they_are_named() {
        let warns = |filter: &str, target: &str| {
            parse_filter(filter).unwrap().would_enable(target, &tracing::Level::WARN)
        };
        assert!(warns("info", "kiro::abuse") && warns("", "hickory_proto::udp"));
        for target in ["h2::proto::ping_pong", "hyper::proto::h1", "rustls::conn"] {
            assert!(!warns("info", target) && !warns("debug", target), "{target}");
        }
        assert!(warns("info,h2=debug", "h2::proto::ping_pong"));
    }

    #[test]
    fn formats_by_name() {
        assert_eq!("json".parse::<Format>().unwrap(), Format::Json);
        assert_eq!("pretty".parse::<Format>().unwrap(), Format::Pretty);
        assert!("xml".parse::<Format>().unwrap_err().to_string().contains("\"xml\""));
    }
}
