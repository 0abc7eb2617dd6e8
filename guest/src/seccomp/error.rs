//! [`SeccompError`]: reasons a profile cannot be compiled.

/// A profile that cannot be put in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeccompError {
    /// It hands calls to a program on the host.
    #[error("seccomp: SCMP_ACT_NOTIFY is not supported: there is no listener inside the VM")]
    Notify,
    /// A value that does not fit.
    #[error("seccomp: {field} = {value} is out of range")]
    Range { field: &'static str, value: u64 },
    /// More than the kernel takes.
    #[error("seccomp: the profile needs {count} {what}, and the limit is {limit}")]
    TooBig {
        what: &'static str,
        count: usize,
        limit: usize,
    },
}
