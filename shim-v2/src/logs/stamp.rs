//! Timestamps of CRI log lines: RFC 3339 in UTC with nine fractional digits, [`STAMP_BYTES`] bytes wide, monotonic.
//!
//! Implemented here because it runs once per batch of output; the fixed width makes lines sortable as text.

use std::time::{SystemTime, UNIX_EPOCH};

/// Length of a timestamp: `2026-01-02T15:04:05.123456789Z`.
pub const STAMP_BYTES: usize = 30;
/// Seconds in a day.
const SECONDS_PER_DAY: u64 = 86_400;

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
    let (year, month, day) = date(seconds / SECONDS_PER_DAY);
    let time = seconds % SECONDS_PER_DAY;
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    digits(&mut text[0..4], year);
    digits(&mut text[5..7], month);
    digits(&mut text[8..10], day);
    digits(&mut text[11..13], time / 3600);
    digits(&mut text[14..16], time / 60 % 60);
    digits(&mut text[17..19], time % 60);
    digits(&mut text[20..29], u64::try_from(nanos).unwrap_or(0));
    text
}

fn digits(field: &mut [u8], mut number: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
}

/// Converts days since the epoch to year, month and day of the Gregorian calendar, counting years from March in eras of 400.
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
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
