//! The error of the VMM boundary: what `Vmm::create` and the vmm child report, also across the process boundary.

use crate::exit::ExitCode;
use crate::vmm::VmmKind;

/// Result of the VMM boundary.
pub type BoxliteResult<T> = Result<T, BoxliteError>;

/// What went wrong between an InstanceSpec and a running VM.
#[derive(Debug, thiserror::Error)]
pub enum BoxliteError {
    /// The spec's `field` has a value that no VMM takes.
    #[error("instance spec: {field} = {value:?}: {reason}")]
    InvalidSpec {
        field: &'static str,
        value: String,
        reason: String,
    },
    /// More devices than the VMM has slots for.
    #[error("{kind} has {limit} device slots and the pod needs {wanted}: {devices}")]
    TooManyDevices {
        kind: VmmKind,
        limit: usize,
        wanted: usize,
        devices: String,
    },
    /// No VMM of that kind is registered.
    #[error("no VMM is registered for kind {kind}")]
    UnknownVmm { kind: VmmKind },
    /// A file or program the VMM needs is not there.
    #[error("{what} is missing at {path}")]
    Missing {
        what: &'static str,
        path: String,
        #[source]
        source: Option<std::io::Error>,
    },
    /// A system call or helper failed at `step`.
    #[error("failed to {step}")]
    Step {
        step: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A call of libkrun answered a negative errno.
    #[error("libkrun: {call} answered {errno}")]
    Krun { call: &'static str, errno: i32 },
}

impl BoxliteError {
    /// The exit code the vmm child ends with on this error.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::InvalidSpec { .. } | Self::UnknownVmm { .. } => ExitCode::BadArguments,
            Self::TooManyDevices { .. } => ExitCode::VmmConfig,
            Self::Missing { .. } => ExitCode::MissingFile,
            Self::Step { .. } => ExitCode::VmmStart,
            Self::Krun { .. } => ExitCode::VmmConfig,
        }
    }
}
