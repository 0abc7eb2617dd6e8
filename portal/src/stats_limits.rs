//! [`StatsLimits`]: bounds of the counters that a guest of known size can have. A hostile guest reports any; shim and runtime
//! apply the bounds before they pass the counters on.
//!
//! Limits that the guest was configured with, and counters of events and transferred bytes, are not bounded.

use boxlite_proto::boxlite::v1::{
    CgroupStats, ContainerStatsResponse, GuestStatsResponse, Pressure,
};
use boxlite_sys::clock::unix_ns;
use boxlite_sys::sync::Mutex;
use std::collections::HashMap;

/// Maximum number of lines of memory.stat; Linux 6.12 has 57.
const MAX_MEMORY_KINDS: usize = 256;
/// Maximum number of interfaces and block devices. A pod has a few.
const MAX_DEVICES: usize = 64;
/// Maximum length of an interface's name, by the kernel.
const MAX_INTERFACE_BYTES: usize = 15;

/// Added to the age of a VM: a warm one used its CPUs before its pod was created, and the host's clock may be set back.
const AGE_ALLOWANCE_USEC: u64 = 10 * 60 * 1_000_000;

/// Upper bounds of the values that a VM can reach.
#[derive(Debug, Clone, Copy)]
pub struct StatsLimits {
    /// Memory of the VM.
    pub memory_bytes: u64,
    /// Writable disk of the VM.
    pub disk_bytes: u64,
    /// CPU time of all vCPUs since the VM was created.
    pub cpu_usec: u64,
}

impl StatsLimits {
    /// Returns the bounds of a VM of this size that was created at `created_at_ns` since the epoch.
    pub fn of(memory_mib: u32, disk_bytes: u64, vcpus: u8, created_at_ns: i64) -> Self {
        let age_ns = unix_ns().saturating_sub(created_at_ns).max(0);
        let age_usec = u64::try_from(age_ns / 1000).unwrap_or(0);
        Self {
            memory_bytes: u64::from(memory_mib) << 20,
            disk_bytes,
            cpu_usec: age_usec
                .saturating_add(AGE_ALLOWANCE_USEC)
                .saturating_mul(u64::from(vcpus)),
        }
    }

    /// Bounds the counters of a cgroup.
    pub fn apply(&self, stats: &mut CgroupStats) {
        for value in [
            &mut stats.memory_current,
            &mut stats.memory_peak,
            &mut stats.memory_swap_current,
        ] {
            *value = self.memory_bytes.min(*value);
        }
        if stats.memory_stat.len() > MAX_MEMORY_KINDS {
            stats.memory_stat.clear();
        }
        for (name, value) in &mut stats.memory_stat {
            // pgfault, pgmajfault and similar fields count events.
            if !name.starts_with("pg") && !name.starts_with("workingset_") {
                *value = self.memory_bytes.min(*value);
            }
        }
        for value in cpu_times(stats) {
            *value = self.cpu_usec.min(*value);
        }
        stats.io.truncate(MAX_DEVICES);
        stats.hugetlb.truncate(MAX_DEVICES);
        let pressures = [
            &mut stats.cpu_pressure,
            &mut stats.memory_pressure,
            &mut stats.io_pressure,
        ];
        pressures.into_iter().flatten().for_each(bound_pressure);
    }

    /// Bounds the counters of a container.
    pub fn apply_to_container(&self, stats: &mut ContainerStatsResponse) {
        if let Some(cgroup) = &mut stats.cgroup {
            self.apply(cgroup);
        }
        stats.upper_bytes = self.disk_bytes.min(stats.upper_bytes);
        // A file on the disk has at least its inode.
        stats.upper_inodes = self.disk_bytes.min(stats.upper_inodes);
    }

    /// Bounds the counters of a VM. Interfaces with impossible names are dropped.
    pub fn apply_to_guest(&self, stats: &mut GuestStatsResponse) {
        if let Some(pod) = &mut stats.pod {
            self.apply(pod);
        }
        stats.memory_total_bytes = self.memory_bytes.min(stats.memory_total_bytes);
        stats.memory_available_bytes = stats.memory_total_bytes.min(stats.memory_available_bytes);
        stats.cpu_usage_ns = self.cpu_usec.saturating_mul(1000).min(stats.cpu_usage_ns);
        stats
            .networks
            .retain(|network| is_interface(&network.interface));
        stats.networks.truncate(MAX_DEVICES);
        if let Some(scratch) = &mut stats.scratch {
            scratch.capacity_bytes = self.disk_bytes.min(scratch.capacity_bytes);
            scratch.available_bytes = scratch.capacity_bytes.min(scratch.available_bytes);
            scratch.inodes = self.disk_bytes.min(scratch.inodes);
            scratch.inodes_free = scratch.inodes.min(scratch.inodes_free);
        }
    }
}

fn bound_pressure(pressure: &mut Pressure) {
    let lines = [&mut pressure.some, &mut pressure.full];
    for line in lines.into_iter().flatten() {
        for average in [&mut line.avg10, &mut line.avg60, &mut line.avg300] {
            *average = if average.is_nan() {
                0.0
            } else {
                average.clamp(0.0, 100.0)
            };
        }
    }
}

fn is_interface(name: &str) -> bool {
    let valid = |c: char| !c.is_whitespace() && !c.is_control() && c != '/';
    (1..=MAX_INTERFACE_BYTES).contains(&name.len()) && name.chars().all(valid)
}

fn cpu_times(stats: &mut CgroupStats) -> [&mut u64; 3] {
    [
        &mut stats.cpu_usage_usec,
        &mut stats.cpu_user_usec,
        &mut stats.cpu_system_usec,
    ]
}

/// The highest CPU times reported so far, by container id. Readers compute rates, and a counter that falls is a rate without
/// meaning.
#[derive(Debug, Default)]
pub struct HighestCpuTimes(Mutex<HashMap<String, [u64; 3]>>);

impl HighestCpuTimes {
    /// Replaces CPU times that are lower than before by those before.
    pub fn apply(&self, id: &str, stats: &mut CgroupStats) {
        let mut all = self.0.lock();
        let highest = all.entry(id.to_owned()).or_default();
        for (value, highest) in cpu_times(stats).into_iter().zip(highest) {
            *highest = (*highest).max(*value);
            *value = *highest;
        }
    }

    /// Forgets all but these ids.
    pub fn retain(&self, known: impl Fn(&str) -> bool) {
        self.0.lock().retain(|id, _| known(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::boxlite::v1::{FilesystemStats, NetworkStats, PressureLine};

    const LIMITS: StatsLimits = StatsLimits {
        memory_bytes: 1 << 30,
        disk_bytes: 1 << 34,
        cpu_usec: 1000,
    };

    #[test]
    fn apply_clamps_usage_to_the_vm_and_keeps_limits() {
        let nan = PressureLine {
            total_usec: 3,
            avg10: f64::NAN,
            avg60: f64::INFINITY,
            avg300: -1.0,
        };
        let mut stats = CgroupStats {
            memory_current: u64::MAX,
            memory_peak: 5,
            memory_max: u64::MAX,
            cpu_usage_usec: u64::MAX,
            cpu_user_usec: 7,
            cpu_pressure: Some(Pressure {
                some: Some(nan),
                full: None,
            }),
            ..Default::default()
        };
        stats.memory_stat.insert("anon".to_owned(), u64::MAX);
        stats.memory_stat.insert("pgfault".to_owned(), 1 << 40);
        LIMITS.apply(&mut stats);
        assert_eq!((stats.memory_current, stats.memory_peak), (1 << 30, 5));
        assert_eq!(stats.memory_max, u64::MAX);
        assert_eq!((stats.cpu_usage_usec, stats.cpu_user_usec), (1000, 7));
        assert_eq!(stats.memory_stat["anon"], 1 << 30);
        assert_eq!(stats.memory_stat["pgfault"], 1 << 40);
        let line = stats.cpu_pressure.and_then(|pressure| pressure.some);
        let line = line.expect("no pressure");
        assert_eq!((line.avg10, line.avg60, line.avg300), (0.0, 100.0, 0.0));
    }

    #[test]
    fn apply_to_guest_drops_impossible_interfaces() {
        let named = |interface: &str| NetworkStats {
            interface: interface.to_owned(),
            ..Default::default()
        };
        let floods = (0..100).map(|n| named(&format!("eth{n}")));
        let names = ["eth0\nx", "", "a/b", "longer than an interface"];
        let mut stats = GuestStatsResponse {
            cpu_usage_ns: u64::MAX,
            memory_total_bytes: u64::MAX,
            memory_available_bytes: u64::MAX,
            networks: names.map(named).into_iter().chain(floods).collect(),
            scratch: Some(FilesystemStats {
                available_bytes: u64::MAX,
                ..Default::default()
            }),
            ..Default::default()
        };
        LIMITS.apply_to_guest(&mut stats);
        assert_eq!(stats.cpu_usage_ns, 1_000_000);
        assert_eq!(stats.memory_available_bytes, 1 << 30);
        assert_eq!(stats.networks.len(), MAX_DEVICES);
        assert_eq!(stats.networks[0].interface, "eth0");
        assert_eq!(stats.scratch.expect("no disk").available_bytes, 0);
    }

    #[test]
    fn of_allows_for_a_warm_vm_and_a_clock_set_back() {
        let hour_ns = 3_600_000_000_000;
        for (created_at_ns, least) in [
            (unix_ns(), 600),
            (unix_ns() + hour_ns, 600),
            (unix_ns() - hour_ns, 4200),
        ] {
            let seconds = StatsLimits::of(1, 1, 2, created_at_ns).cpu_usec / 2_000_000;
            assert!((least..least + 60).contains(&seconds), "{seconds}");
        }
    }

    #[test]
    fn highest_cpu_times_never_fall() {
        let highest = HighestCpuTimes::default();
        let reported = |id: &str, cpu_usage_usec| {
            let mut stats = CgroupStats {
                cpu_usage_usec,
                ..Default::default()
            };
            highest.apply(id, &mut stats);
            stats.cpu_usage_usec
        };
        let seen = [("a", 5), ("a", 3), ("b", 2), ("a", 9)].map(|(id, usec)| reported(id, usec));
        assert_eq!(seen, [5, 5, 2, 9]);
        highest.retain(|id| id == "b");
        assert_eq!([reported("a", 1), reported("b", 1)], [1, 2]);
    }
}
