//! [`SeccompError`]: reasons a profile cannot be compiled.

/// A profile that cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SeccompError {
    /// The profile delegates calls to a process on the host.
    #[error("seccomp: SCMP_ACT_NOTIFY is not supported: there is no listener inside the VM")]
    Notify,
    /// A value is out of range.
    #[error("seccomp: {field} = {value} is out of range")]
    Range { field: &'static str, value: u64 },
    /// The program or profile exceeds a limit.
    #[error("seccomp: the profile needs {count} {what} (maximum {limit})")]
    TooBig {
        what: &'static str,
        count: usize,
        limit: usize,
    },
}
