//! The one table of calls that are not there yet. ARCHITECTURE.md repeats it, and a test compares the two.

use tonic::Status;

/// Call and what it waits for.
pub const TABLE: [(&str, &str); 1] = [(
    "CheckpointContainer",
    "a tool in the guest that saves and restores processes (CRIU); the guest has none",
)];

/// UNIMPLEMENTED for a call of the table.
pub fn answer(call: &'static str) -> Status {
    let waits_for = TABLE
        .iter()
        .find(|(name, _)| *name == call)
        .map_or("", |(_, what)| what);
    Status::unimplemented(format!("{call} is not there yet: {waits_for}"))
}
