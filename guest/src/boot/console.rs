//! The console. Output is kept short, because the host shows its last lines when a boot fails.
//!
//! Output of containers and environment variables are not printed here.

use boxlite_sys::report::Report;
use std::error::Error;
use tracing_subscriber::filter::LevelFilter;

/// Sends the agent's log to standard error, which the kernel connected to the console. Not called in the spawner,
/// whose children pass standard error to containers.
pub(crate) fn start_logging() {
    let level = match std::fs::read_to_string("/proc/cmdline") {
        Ok(line) if line.split_whitespace().any(|word| word == "boxlite.debug") => {
            LevelFilter::DEBUG
        }
        _ => LevelFilter::WARN,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();
}

/// Prints an error with its causes on one line.
pub(crate) fn print_error(who: &str, error: &(dyn Error + 'static)) {
    eprintln!("boxlite-guest: {who}: {}", Report(error));
}
