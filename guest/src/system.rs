//! Settings of the VM (clock, random pool, hostname, sysctls), and its figures for `Ping` and `Stats`.
//!
//! Called by `Guest.Init`, `Guest.SetTime` and the statistics; independent of containers.

use boxlite_proto::boxlite::v1::NetworkStats;
use boxlite_sys::proc_memory;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// A setting of the VM that could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// The clock could not be set.
    #[error("failed to set the clock to {unix_ns} ns")]
    Clock {
        unix_ns: i64,
        #[source]
        source: nix::Error,
    },
    /// The kernel's caches could not be dropped.
    #[error("failed to drop caches")]
    DropCaches(#[source] io::Error),
    /// The entropy could not be added.
    #[error("failed to add entropy")]
    Entropy(#[source] io::Error),
    /// The hostname was rejected.
    #[error("failed to set hostname {name:?}")]
    Hostname {
        name: String,
        #[source]
        source: nix::Error,
    },
    /// The sysctl does not exist, or the kernel rejected the value.
    #[error("failed to set sysctl {name} = {value:?}")]
    Sysctl {
        name: String,
        value: String,
        #[source]
        source: io::Error,
    },
}

/// Returns the wall clock in ns since the epoch.
pub(crate) fn unix_time_ns() -> i64 {
    time_ns(ClockId::CLOCK_REALTIME)
}

/// Returns the milliseconds since boot.
pub(crate) fn uptime_ms() -> u64 {
    (time_ns(ClockId::CLOCK_BOOTTIME) / 1_000_000).unsigned_abs()
}

fn time_ns(clock: ClockId) -> i64 {
    clock_gettime(clock)
        .map(|time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
        .unwrap_or(0)
}

/// Sets the wall clock.
pub(crate) fn set_time(unix_ns: i64) -> Result<(), SystemError> {
    let time = TimeSpec::new(
        unix_ns.div_euclid(1_000_000_000),
        unix_ns.rem_euclid(1_000_000_000),
    );
    clock_settime(ClockId::CLOCK_REALTIME, time)
        .map_err(|source| SystemError::Clock { unix_ns, source })
}

/// Drops unused inodes and directory entries, with `pages` also cached pages. Takes up to seconds with large caches.
pub(crate) async fn drop_caches(pages: bool) -> Result<(), SystemError> {
    let kinds = if pages { "3" } else { "2" };
    let write = move || std::fs::write("/proc/sys/vm/drop_caches", kinds);
    let written = tokio::task::spawn_blocking(write).await;
    written
        .map_err(io::Error::other)
        .and_then(|written| written)
        .map_err(SystemError::DropCaches)
}

/// Maximum number of bytes of entropy taken from one request.
const MAX_ENTROPY_BYTES: usize = 512;

/// `struct rand_pool_info` of the kernel (linux/random.h) with its buffer.
#[repr(C)]
struct RandPool {
    /// In bits.
    entropy_count: libc::c_int,
    /// In bytes.
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY_BYTES],
}

mod random_ioctl {
    nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [libc::c_int; 2]);
}

/// Mixes `bytes` into the kernel's random pool and credits them; they come from the host's generator.
pub(crate) fn add_entropy(bytes: &[u8]) -> Result<(), SystemError> {
    let bytes = &bytes[..bytes.len().min(MAX_ENTROPY_BYTES)];
    if bytes.is_empty() {
        return Ok(());
    }
    let mut pool = RandPool {
        entropy_count: bytes.len() as libc::c_int * 8,
        buf_size: bytes.len() as libc::c_int,
        buf: [0; MAX_ENTROPY_BYTES],
    };
    pool.buf[..bytes.len()].copy_from_slice(bytes);
    let device = fs::OpenOptions::new()
        .write(true)
        .open("/dev/random")
        .map_err(SystemError::Entropy)?;
    // SAFETY: the pointer is to a live RandPool, whose first two fields are the int[2] encoded in the ioctl's number
    // and whose buffer holds the `buf_size` bytes after them, which is all the kernel reads.
    unsafe { random_ioctl::add_entropy(device.as_raw_fd(), std::ptr::from_ref(&pool).cast()) }
        .map_err(|errno| SystemError::Entropy(errno.into()))?;
    Ok(())
}

/// Sets the hostname of the pod (the VM's UTS namespace).
pub(crate) fn set_hostname(name: &str) -> Result<(), SystemError> {
    nix::unistd::sethostname(name).map_err(|source| SystemError::Hostname {
        name: name.to_owned(),
        source,
    })
}

/// Sets a sysctl by its dotted name. Components may contain dots if the name is written with slashes.
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<(), SystemError> {
    let failed = |source| SystemError::Sysctl {
        name: name.to_owned(),
        value: value.to_owned(),
        source,
    };
    let path =
        sysctl_path(name).ok_or_else(|| failed(io::Error::from(io::ErrorKind::InvalidInput)))?;
    fs::write(path, value).map_err(failed)
}

/// Returns the file of a sysctl, or `None` if the name would leave /proc/sys.
fn sysctl_path(name: &str) -> Option<PathBuf> {
    let below = if name.contains('/') {
        name.to_owned()
    } else {
        name.replace('.', "/")
    };
    let clean = !below.is_empty()
        && below
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..");
    clean.then(|| PathBuf::from("/proc/sys").join(below))
}

/// Returns the memory available to the VM's kernel, in bytes.
pub(crate) fn memory_total() -> Option<u64> {
    proc_memory::meminfo("MemTotal")
}

/// Returns the CPU time used since boot, in ns: user, nice, system, irq, softirq of /proc/stat (ticks of 10 ms).
pub(crate) fn cpu_usage_ns() -> u64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let Some(line) = text.lines().next() else {
        return 0;
    };
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    let busy: u64 = [0, 1, 2, 5, 6]
        .iter()
        .filter_map(|index| ticks.get(*index))
        .sum();
    busy * 10_000_000
}

/// Returns the traffic of every interface that is up except the loopback. Interfaces created by the kernel (dummy0,
/// sit0) are down.
pub(crate) fn network_stats() -> Vec<NetworkStats> {
    let text = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    text.lines()
        .filter_map(network_line)
        .filter(|stats| stats.interface != "lo" && is_up(&stats.interface))
        .collect()
}

fn is_up(interface: &str) -> bool {
    let flags = PathBuf::from("/sys/class/net")
        .join(interface)
        .join("flags");
    fs::read_to_string(flags).is_ok_and(|text| has_up_flag(&text))
}

/// Checks IFF_UP in a string like `0x1003`.
fn has_up_flag(flags: &str) -> bool {
    let digits = flags.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).is_ok_and(|flags| flags & 1 == 1)
}

/// Parses a line of /proc/net/dev: `name: bytes packets errs drop fifo frame compressed multicast` twice.
fn network_line(line: &str) -> Option<NetworkStats> {
    let (name, figures) = line.split_once(':')?;
    let figures: Vec<u64> = figures
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let figure = |index: usize| figures.get(index).copied().unwrap_or(0);
    Some(NetworkStats {
        interface: name.trim().to_owned(),
        rx_bytes: figure(0),
        rx_packets: figure(1),
        rx_errors: figure(2),
        rx_dropped: figure(3),
        tx_bytes: figure(8),
        tx_packets: figure(9),
        tx_errors: figure(10),
        tx_dropped: figure(11),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_path_stays_below_proc_sys() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward").unwrap(),
            PathBuf::from("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/rp_filter").unwrap(),
            PathBuf::from("/proc/sys/net/ipv4/conf/eth0.1/rp_filter")
        );
        for name in ["", ".", "..", "a..b", "/etc/passwd", "net/../../x", "a/"] {
            assert_eq!(sysctl_path(name), None, "{name:?}");
        }
    }

    #[test]
    fn has_up_flag_reads_hexadecimal() {
        assert!(has_up_flag("0x1003\n") && has_up_flag("0x9"));
        assert!(!has_up_flag("0x1002\n") && !has_up_flag("") && !has_up_flag("up"));
    }

    #[test]
    fn network_line_parses_counters() {
        let line = "  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16";
        let stats = network_line(line).unwrap();
        assert_eq!(stats.interface, "eth0");
        assert_eq!(
            (
                stats.rx_bytes,
                stats.rx_dropped,
                stats.tx_bytes,
                stats.tx_dropped
            ),
            (1, 4, 9, 12)
        );
        assert!(network_line("Inter-|   Receive  |  Transmit").is_none());
    }
}
