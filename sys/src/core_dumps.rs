//! Core dumps of processes whose memory has secrets.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use std::io;

/// Forbids core dumps of this process and, by the limit, of its children. A handler that the node pipes core dumps to is not
/// bound by the limit, only by the attribute, which an exec resets.
///
/// # Errors
/// Those of setrlimit(2) and prctl(2).
pub fn forbid() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let limited = setrlimit(Resource::Core, none);
    let cleared = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    Ok(limited.and(cleared)?)
}
