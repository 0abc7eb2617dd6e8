//! Exit codes of boxlite's processes. 125–127 are used by libkrun and codes above 128 for signals, so both are avoided.

/// Exit code of a vmm child or a shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Ended on request.
    Ok = 0,
    /// Any other failure.
    Failure = 1,
    /// Invalid command line or InstanceSpec.
    BadArguments = 64,
    /// A file, kernel library or helper program is missing.
    MissingFile = 66,
    /// The jail (namespaces, mounts, capabilities) could not be built.
    Jail = 70,
    /// The VMM rejected the configuration.
    VmmConfig = 71,
    /// The VMM failed to start or failed while running.
    VmmStart = 72,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
