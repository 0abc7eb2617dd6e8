//! `boxlite-cri check`.

use crate::config::Config;
use std::process::ExitCode;

/// The verb.
pub async fn check(_config: Config) -> ExitCode {
    ExitCode::SUCCESS
}
