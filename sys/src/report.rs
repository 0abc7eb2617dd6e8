//! [`Report`]: an error and its causes on one line; [`chain`] walks along them.

use std::error::Error;
use std::fmt;

/// Displays an error followed by its chain of sources: `a: b: c`.
///
/// A source is omitted if the text of its parent already ends with it, as transparent errors repeat their cause.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut previous = self.0.to_string();
        f.write_str(&previous)?;
        for cause in chain(self.0).skip(1) {
            let text = cause.to_string();
            if !previous.ends_with(&text) {
                write!(f, ": {text}")?;
                previous = text;
            }
        }
        Ok(())
    }
}

/// Returns the error and its causes, the outermost first.
pub fn chain<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Formats an error with its causes, see [`Report`].
pub fn report(error: &(dyn Error + 'static)) -> String {
    Report(error).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum TestError {
        #[error("failed to open {0:?}")]
        Open(&'static str, #[source] Box<TestError>),
        #[error(transparent)]
        Transparent(Box<TestError>),
        #[error("no such file")]
        Missing,
    }

    #[test]
    fn report_joins_causes_and_skips_repeated_ones() {
        let error = TestError::Open("a", TestError::Missing.into());
        assert_eq!(report(&error), "failed to open \"a\": no such file");
        let wrapped = TestError::Transparent(error.into());
        assert_eq!(report(&wrapped), "failed to open \"a\": no such file");
    }
}
