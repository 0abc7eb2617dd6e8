//! Prints an error with its causes in one line.

use std::error::Error;
use std::fmt::Write;

/// `error: cause: cause of the cause`.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Writing to a String does not fail.
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    text
}
