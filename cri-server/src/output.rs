//! Parts that the output of several commands shares: its format, the program's version, and writing it.

use clap::ValueEnum;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// Version of this program and the commit it was built from.
pub(crate) const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (commit ",
    env!("BOXLITE_COMMIT"),
    ")"
);

/// Format of a report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Aligned text.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// Writes a command's output and returns its exit code, `code` if all was written.
///
/// A reader such as `head` closes the pipe early, which counts as success. `print!` would panic.
pub(crate) fn print(text: &str, code: ExitCode) -> ExitCode {
    write(&mut std::io::stdout(), text, code)
}

fn write(to: &mut impl Write, text: &str, code: ExitCode) -> ExitCode {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("boxlite-cri: failed to write to standard output: {error}");
            ExitCode::FAILURE
        }
        _ => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_to_full_disk_fails_and_to_closed_pipe_does_not() {
        let two = || ExitCode::from(2);
        let mut full = std::fs::File::create("/dev/full").unwrap();
        assert_eq!(write(&mut full, "x", two()), ExitCode::FAILURE);
        let (reader, mut writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(write(&mut writer, "x", two()), two());
        let mut text = Vec::new();
        assert_eq!(write(&mut text, "x", two()), two());
        assert_eq!(text, b"x");
    }
}
