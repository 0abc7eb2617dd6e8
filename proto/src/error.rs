//! Errors of the VMM boundary, reported by `Vmm::create` and, across the process boundary, by the vmm child.

use crate::exit::ExitCode;
use crate::vmm::VmmKind;

/// Result of the VMM boundary.
pub type BoxliteResult<T> = Result<T, BoxliteError>;

/// Error between an InstanceSpec and a running VM.
#[derive(Debug, thiserror::Error)]
pub enum BoxliteError {
    /// A field of the spec has a value that no VMM supports.
    #[error("invalid instance spec: {field} = {value:?}: {reason}")]
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
    #[error("VMM {kind} not found")]
    UnknownVmm { kind: VmmKind },
    /// A file or program required by the VMM does not exist.
    #[error("{what} not found at {path}")]
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
    /// A call of libkrun returned a negative errno.
    #[error("failed to call {call} of libkrun: errno {errno}")]
    Krun { call: &'static str, errno: i32 },
}

impl BoxliteError {
    /// Returns the exit code of the vmm child for this error.
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
