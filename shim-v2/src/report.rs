//! Prints an error with its causes on one line: `what: why: why`.
//!
//! The one place where causes are joined; error types say their own part once.

use std::error::Error;
use std::fmt;

/// Displays an error followed by its chain of sources. A source that its parent already printed is left out.
pub struct Report<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !said.ends_with(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            next = cause.source();
        }
        Ok(())
    }
}
