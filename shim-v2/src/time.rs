//! Conversions of times to wire types.

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds in a second.
const NANOS: i64 = 1_000_000_000;

/// Returns the wall clock in nanoseconds since the epoch.
pub fn unix_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Returns the wall clock as a protobuf Timestamp.
pub fn now() -> Timestamp {
    timestamp(unix_ns())
}

/// Converts nanoseconds since the epoch to a protobuf Timestamp.
pub fn timestamp(unix_ns: i64) -> Timestamp {
    Timestamp {
        seconds: unix_ns.div_euclid(NANOS),
        nanos: i32::try_from(unix_ns.rem_euclid(NANOS)).unwrap_or(0),
        ..Default::default()
    }
}
