//! Times of the CRI: nanoseconds since the epoch in an i64, 0 for "never".

use std::time::{SystemTime, UNIX_EPOCH};

/// Returns the current time. Saturates in the year 2262; a clock before 1970 gives 0.
pub(crate) fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
        })
}
