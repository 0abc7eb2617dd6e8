//! Table of unimplemented calls. ARCHITECTURE.md repeats it, and a test compares the two.

use super::error::ServiceError;
use tonic::Status;

/// Calls, each with its missing prerequisite.
pub(crate) const TABLE: [(&str, &str); 3] = [
    (
        "CheckpointContainer",
        "a tool in the guest that saves and restores processes (CRIU); the guest has none",
    ),
    (
        "CheckpointPod",
        "snapshots of a running VM; neither VMM of this runtime saves one with its devices",
    ),
    (
        "RestorePod",
        "snapshots of a running VM; neither VMM of this runtime saves one with its devices",
    ),
];

/// Returns UNIMPLEMENTED for a call of the table.
pub(crate) fn answer(call: &'static str) -> Status {
    let prerequisite = TABLE
        .iter()
        .find(|(name, _)| *name == call)
        .map_or("", |(_, what)| what);
    ServiceError::Unimplemented { call, prerequisite }.into()
}
