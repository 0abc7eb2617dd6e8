//! Memory sizes that the kernel prints as `Key:   123 kB` in files of /proc.
//!
//! Reads and parses only; callers decide what a missing value means.

use std::fs::read_to_string;

/// Returns a value of /proc/meminfo in bytes, for example of `MemAvailable`.
pub fn meminfo(key: &str) -> Option<u64> {
    bytes_of(&read_to_string("/proc/meminfo").ok()?, key)
}

/// Returns the proportional set size of a process in bytes.
pub fn pss(pid: i32) -> Option<u64> {
    bytes_of(
        &read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?,
        "Pss",
    )
}

/// Returns the first value with this key in bytes.
fn bytes_of(text: &str, key: &str) -> Option<u64> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_found_by_its_whole_key() {
        let text = "MemTotal:       16384 kB\nMem:   1 kB\nHugePages_Total:       0\n";
        assert_eq!(bytes_of(text, "Mem"), Some(1024));
        assert_eq!(bytes_of(text, "MemTotal"), Some(16 << 20));
        assert_eq!(bytes_of(text, "MemFree"), None);
        assert_eq!(bytes_of(text, "HugePages_Total"), None);
        assert_eq!(bytes_of(&format!("A: {} kB", u64::MAX), "A"), None);
    }

    #[test]
    fn kernel_reports_memory_of_machine_and_process() {
        let total = meminfo("MemTotal").unwrap();
        let own = pss(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(0 < own && own < total, "{own} of {total}");
    }
}
