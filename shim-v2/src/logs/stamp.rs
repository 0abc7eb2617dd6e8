//! Timestamps of CRI log lines: RFC 3339 in UTC with nine fractional digits, [`STAMP_BYTES`] bytes wide, monotonic.
//!
//! Formatted here because it runs once per batch of output; the fixed width makes lines sortable as text.

use boxlite_sys::calendar::UtcTime;
use std::time::{SystemTime, UNIX_EPOCH};

/// Length of a timestamp: `2026-01-02T15:04:05.123456789Z`.
pub const STAMP_BYTES: usize = 30;

/// A clock whose timestamps never decrease, even if the wall clock does.
#[derive(Debug, Default)]
pub struct Clock {
    last: u128,
}

impl Clock {
    /// Returns the current timestamp.
    pub fn stamp(&mut self) -> [u8; STAMP_BYTES] {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        self.last = self.last.max(now);
        format(self.last)
    }
}

/// Formats nanoseconds since the epoch. Years beyond 9999 are truncated to their last four digits.
pub fn format(unix_ns: u128) -> [u8; STAMP_BYTES] {
    let nanos = unix_ns % 1_000_000_000;
    let seconds = u64::try_from(unix_ns / 1_000_000_000).unwrap_or(u64::MAX);
    let time = UtcTime::from_seconds(seconds);
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    digits(&mut text[0..4], time.year);
    digits(&mut text[5..7], time.month);
    digits(&mut text[8..10], time.day);
    digits(&mut text[11..13], time.hour);
    digits(&mut text[14..16], time.minute);
    digits(&mut text[17..19], time.second);
    digits(&mut text[20..29], u64::try_from(nanos).unwrap_or(0));
    text
}

fn digits(field: &mut [u8], mut number: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(seconds: u128, nanos: u128) -> String {
        String::from_utf8(format(seconds * 1_000_000_000 + nanos).to_vec()).expect("ascii")
    }

    #[test]
    fn format_known_times() {
        assert_eq!(text(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(text(951_782_400, 5), "2000-02-29T00:00:00.000000005Z");
        assert_eq!(
            text(1_709_251_199, 999_999_999),
            "2024-02-29T23:59:59.999999999Z"
        );
        assert_eq!(
            text(1_767_366_245, 123_456_789),
            "2026-01-02T15:04:05.123456789Z"
        );
        assert_eq!(text(4_107_542_400, 0), "2100-03-01T00:00:00.000000000Z");
    }

    #[test]
    fn stamp_never_decreases() {
        let mut clock = Clock {
            last: u128::from(u64::MAX),
        };
        let first = clock.stamp();
        assert_eq!(clock.stamp(), first);
    }
}
