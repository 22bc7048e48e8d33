//! Log output: what is written, in which form, and where it goes.
//!
//! # Invariants
//!
//! - Other crates never log below INFO, whatever the filter asks for: HTTP,
//!   TLS and Redis libraries print headers and commands, and so secrets, there.
//! - Output goes to standard error, in UTC; standard output belongs to commands.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal};
use std::panic::{self, PanicHookInfo};
use std::thread;

use thiserror::Error;
use tracing::level_filters::LevelFilter;
use tracing::{Metadata, Subscriber, error};
use tracing_subscriber::filter::{ParseError, filter_fn};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, registry};

/// The form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For a person.
    #[default]
    Text,
    /// One JSON object in a line.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("`{filter}` is not a log filter such as `info` or `info,token_sidecar=debug`")]
    Filter {
        /// The filter as given.
        filter: String,
        /// What the parser says.
        source: ParseError,
    },
    /// Something in this process has set up logging before.
    #[error("logging is set up already")]
    AlreadySet(#[from] TryInitError),
}

/// Sends the events that `filter` lets through to standard error, panics
/// included.
///
/// `filter` has the syntax of `RUST_LOG`; the environment is not read.
///
/// # Errors
///
/// [`TelemetryError`] if `filter` does not parse, or on a second call.
pub fn init(filter: &str, format: Format) -> Result<(), TelemetryError> {
    let color = io::stderr().is_terminal();
    subscriber(filter, format, color, io::stderr)?.try_init()?;
    panic::set_hook(Box::new(log_panic));
    Ok(())
}

fn subscriber<W>(
    filter: &str,
    format: Format,
    color: bool,
    writer: W,
) -> Result<impl Subscriber + Send + Sync, TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Clone + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter)
        .map_err(|source| TelemetryError::Filter { filter: filter.to_owned(), source })?;
    let text = (format == Format::Text).then(|| {
        let layer = fmt::layer().with_writer(writer.clone());
        // Left alone on a terminal: the layer obeys `NO_COLOR` by itself.
        if color { layer } else { layer.with_ansi(false) }
    });
    let json = (format == Format::Json)
        .then(|| fmt::layer().json().flatten_event(true).with_span_list(false).with_writer(writer));
    Ok(registry().with(filter).with(filter_fn(may_be_logged)).with(text).with(json))
}

/// A list of ours, not of theirs: a dependency that comes later is capped too.
/// What rustls warns of is what strangers send, in their own words.
fn may_be_logged(metadata: &Metadata<'_>) -> bool {
    let cap = match metadata.target().split("::").next() {
        Some(env!("CARGO_CRATE_NAME")) => return true,
        Some("rustls") => LevelFilter::ERROR,
        _ => LevelFilter::INFO,
    };
    *metadata.level() <= cap
}

fn log_panic(info: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then_some(backtrace);
    error!(
        message = "a task panicked",
        panic.message = info.payload_as_str().unwrap_or("none"),
        panic.location = info.location().map(tracing::field::display),
        panic.thread = thread.name(),
        panic.backtrace = backtrace.as_ref().map(tracing::field::display),
    );
}

#[cfg(test)]
mod tests {
    use super::{Format, TelemetryError, log_panic, subscriber};
    use std::io;
    use std::panic;
    use std::sync::{Arc, Mutex, PoisonError};
    use tracing::{debug, error, info, trace, warn};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged while `act` runs.
    fn logged(filter: &str, format: Format, act: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = subscriber(filter, format, false, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, act);
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn other_crates_stay_at_info_whatever_the_filter_says() {
        for filter in
            ["trace", "trace,hyper=trace", "hyper::proto[send]=trace,h2=trace,redis=debug"]
        {
            let text = logged(filter, Format::Text, || {
                trace!(target: "hyper::proto::h1", "authorization: secret");
                let _span = tracing::trace_span!(target: "hyper::proto", "send", token = "secret")
                    .entered();
                debug!(target: "h2", "secret");
                debug!(target: "redis::cmd", "AUTH secret");
                debug!(target: "token_sidecar_like", "secret");
                info!(target: "redis", "connected");
            });
            assert!(!text.contains("secret"), "{filter}: {text}");
        }
    }

    #[test]
    fn what_strangers_send_is_not_quoted_by_rustls() {
        let text = logged("trace", Format::Text, || {
            warn!(target: "rustls::msgs::handshake", "Illegal SNI hostname received: noise");
            error!(target: "rustls::common_state", "a fault of its own");
        });
        assert!(!text.contains("noise") && text.contains("a fault of its own"), "{text}");
    }

    #[test]
    fn own_events_obey_the_filter() {
        let act = || {
            trace!("own trace");
            debug!("own debug");
            info!(target: "redis", "connected");
        };
        let text = logged("info,token_sidecar=debug", Format::Text, act);
        assert!(text.contains("own debug") && text.contains("connected"), "{text}");
        assert!(!text.contains("own trace"), "{text}");
        assert!(logged("trace", Format::Text, act).contains("own trace"));
    }

    #[test]
    fn a_bad_filter_is_an_error_that_names_the_variable() {
        let Err(error) = subscriber("info,token_sidecar=loud", Format::Text, false, io::sink)
        else {
            panic!("the filter was taken");
        };
        assert!(matches!(error, TelemetryError::Filter { .. }));
        assert!(error.to_string().starts_with("`info,token_sidecar=loud`"), "{error}");
    }

    #[test]
    fn text_has_utc_times_and_no_colour_off_a_terminal() {
        let text = logged("info", Format::Text, || {
            info!(generation = 3, "token refreshed");
        });
        assert!(!text.contains('\u{1b}'), "{text}");
        let time = text.split_whitespace().next().unwrap();
        assert!(humantime::parse_rfc3339(time).is_ok(), "{time}");
        assert!(text.contains("token refreshed generation=3"), "{text}");
    }

    #[test]
    fn json_is_one_flat_object_in_a_line() {
        let text = logged("info", Format::Json, || {
            info!(generation = 3, "token refreshed");
            info!("stopped");
        });
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["message"], "token refreshed");
        assert_eq!(lines[0]["generation"], 3);
        assert!(humantime::parse_rfc3339(lines[0]["timestamp"].as_str().unwrap()).is_ok());
    }

    #[test]
    fn a_panic_is_logged_with_its_place() {
        let text = logged("error", Format::Text, || {
            let before = panic::take_hook();
            panic::set_hook(Box::new(log_panic));
            let outcome = panic::catch_unwind(|| panic!("out of cheese"));
            panic::set_hook(before);
            assert!(outcome.is_err());
        });
        assert!(text.contains("ERROR") && text.contains("out of cheese"), "{text}");
        assert!(text.contains("src/telemetry.rs:"), "{text}");
    }
}
