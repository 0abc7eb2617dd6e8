//! Parts that the output of several commands shares: its format, and the program's version.

use clap::ValueEnum;

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
