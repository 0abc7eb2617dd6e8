//! Times as the wire types want them. The one place where a clock is turned into a message.

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds in a second.
const NANOS: i64 = 1_000_000_000;

/// Wall clock, nanoseconds since the epoch.
pub fn unix_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Wall clock as a protobuf Timestamp.
pub fn now() -> Timestamp {
    timestamp(unix_ns())
}

/// Nanoseconds since the epoch as a protobuf Timestamp.
pub fn timestamp(unix_ns: i64) -> Timestamp {
    Timestamp {
        seconds: unix_ns.div_euclid(NANOS),
        nanos: i32::try_from(unix_ns.rem_euclid(NANOS)).unwrap_or(0),
        ..Default::default()
    }
}
