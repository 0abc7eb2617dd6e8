//! Exit codes of boxlite's own processes. 125–127 are libkrun's, codes above 128 are deaths by signal: both avoided.

/// Why a vmm child or a shim ended, as its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Ended as asked.
    Ok = 0,
    /// Anything without a code of its own.
    Failure = 1,
    /// The command line or the InstanceSpec was wrong.
    BadArguments = 64,
    /// A file, kernel library or helper program is missing.
    MissingFile = 66,
    /// The jail (namespaces, mounts, capabilities) could not be built.
    Jail = 70,
    /// The VMM refused the configuration.
    VmmConfig = 71,
    /// The VMM could not start or broke while running.
    VmmStart = 72,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
