//! Helpers of VMM code whose failures are a [`BoxliteError`] with the step.

use boxlite_proto::error::{BoxliteError, BoxliteResult};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::os::fd::AsFd;
use std::path::Path;

/// Adds the failed step to an error.
pub(crate) trait StepExt<T> {
    /// On failure, returns `failed to <step>` with the cause as source.
    fn step(self, step: impl Into<String>) -> BoxliteResult<T>;
}

impl<T, E> StepExt<T> for Result<T, E>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn step(self, step: impl Into<String>) -> BoxliteResult<T> {
        self.map_err(|source| BoxliteError::Step {
            step: step.into(),
            source: source.into(),
        })
    }
}

/// Sets whether later children inherit a descriptor. The calling process has one thread.
pub(crate) fn inherit(fd: impl AsFd, yes: bool) -> BoxliteResult<()> {
    let flags = if yes {
        FdFlag::empty()
    } else {
        FdFlag::FD_CLOEXEC
    };
    fcntl(fd, FcntlArg::F_SETFD(flags))
        .map(drop)
        .step("mark a descriptor for inheritance")
}

/// Checks that a file of the installation exists.
pub(crate) fn require(what: &'static str, path: &Path) -> BoxliteResult<()> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(BoxliteError::Missing {
            what,
            path: path.display().to_string(),
            source: Some(source),
        }),
    }
}

/// Returns an error about the spec's `field`.
pub(crate) fn invalid(
    field: &'static str,
    value: impl ToString,
    reason: impl Into<String>,
) -> BoxliteError {
    BoxliteError::InvalidSpec {
        field,
        value: value.to_string(),
        reason: reason.into(),
    }
}
