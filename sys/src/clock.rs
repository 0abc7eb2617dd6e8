//! The wall clock as a number. Conversions to wire types belong to the crates that own those types.

use std::time::{SystemTime, UNIX_EPOCH};

/// Returns the wall clock in nanoseconds since the epoch; 0 if it is before the epoch.
pub fn unix_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
