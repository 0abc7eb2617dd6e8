//! Conversions of times to wire types.

pub use boxlite_sys::clock::unix_ns;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;

/// Nanoseconds in a second.
const NANOS: i64 = 1_000_000_000;

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
