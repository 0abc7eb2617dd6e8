//! [`SeccompError`]: reasons a profile cannot be compiled.

/// A profile that cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SeccompError {
    /// The profile delegates calls to a process on the host.
    #[error(
        "invalid seccomp profile: SCMP_ACT_NOTIFY is not supported: there is no listener inside the VM"
    )]
    Notify,
    /// A value is out of range.
    #[error("invalid seccomp profile: {field} = {value} is out of range")]
    Range { field: &'static str, value: u64 },
    /// The program or profile exceeds a limit.
    #[error("invalid seccomp profile: it needs {count} {what} (maximum {limit})")]
    TooBig {
        what: &'static str,
        count: usize,
        limit: usize,
    },
}
