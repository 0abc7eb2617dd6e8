//! [`choose`]: selects the VMM of a node's pods and explains why; [`ProbeCache`]: file with the report of the probe.
//!
//! `/dev/kvm` may exist and still be unable to run a guest, so the shim boots a temporary VM. The report is cached until the
//! next boot or until the shim changes.

use boxlite_proto::probe::ProbeReport;
use boxlite_proto::vmm::{Acceleration, VmmKind};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The chosen VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmChoice {
    /// VMM of pods that do not request one.
    pub kind: VmmKind,
    /// Acceleration of QEMU.
    pub acceleration: Acceleration,
    /// Reason on one line.
    pub reason: String,
}

impl std::fmt::Display for VmmChoice {
    /// `/dev/kvm: present, cannot run a guest (…) → qemu, tcg`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} → {}", self.reason, self.kind)?;
        match (&self.kind, self.acceleration) {
            (VmmKind::Qemu, Acceleration::Tcg) => f.write_str(", tcg"),
            (VmmKind::Qemu, Acceleration::Kvm) => f.write_str(", kvm"),
            (VmmKind::Krun, _) => Ok(()),
        }
    }
}

/// Chooses the VMM for the configured kind (`None`: auto) and a probe's answer.
pub fn choose(configured: Option<&VmmKind>, report: &ProbeReport) -> VmmChoice {
    let found = format!(
        "/dev/kvm: {}",
        match (report.kvm_present, report.kvm_usable) {
            (_, true) => format!("runs guests ({})", report.reason),
            (true, false) => format!("present, cannot run a guest ({})", report.reason),
            (false, false) => "not found".to_owned(),
        }
    );
    let acceleration = match report.kvm_usable {
        true => Acceleration::Kvm,
        false => Acceleration::Tcg,
    };
    match configured {
        Some(kind) => VmmChoice {
            kind: kind.clone(),
            acceleration,
            reason: format!("{found}; configured: {kind}"),
        },
        None => VmmChoice {
            kind: if report.kvm_usable {
                VmmKind::Krun
            } else {
                VmmKind::Qemu
            },
            acceleration,
            reason: found,
        },
    }
}

/// The report for a probe that failed itself. It counts as "no": QEMU's emulation needs nothing of the hardware.
pub fn failed_probe(error: impl std::fmt::Display) -> ProbeReport {
    ProbeReport {
        kvm_present: Path::new("/dev/kvm").exists(),
        kvm_usable: false,
        reason: format!("failed to probe KVM: {error}"),
    }
}

/// The file that keeps a probe's answer for one boot and one shim.
#[derive(Debug)]
pub struct ProbeCache {
    path: PathBuf,
    key: String,
}

/// Content of the file.
#[derive(Serialize, Deserialize)]
struct CachedReport {
    key: String,
    report: ProbeReport,
}

impl ProbeCache {
    /// Refers to the file at `path` for answers of the program `shim`.
    ///
    /// # Errors
    /// The shim's metadata or the boot id cannot be read.
    pub fn new(path: PathBuf, shim: &Path) -> io::Result<Self> {
        // The answer depends on the boot (kernel, modules, machine) and on the shim.
        let metadata = std::fs::metadata(shim)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let device = std::fs::metadata("/dev/kvm")
            .map(|device| device.rdev())
            .unwrap_or(0);
        let key = format!(
            "{} {} {} {device}",
            boot.trim(),
            metadata.mtime_nsec() ^ metadata.mtime(),
            metadata.len()
        );
        Ok(Self { path, key })
    }

    /// Returns the cached answer, unless it is of another boot or another shim.
    pub fn get(&self) -> Option<ProbeReport> {
        let cached: CachedReport = serde_json::from_slice(&std::fs::read(&self.path).ok()?).ok()?;
        (cached.key == self.key).then_some(cached.report)
    }

    /// Stores an answer.
    ///
    /// # Errors
    /// The file cannot be written. Callers may ignore that: the next start probes again.
    pub fn put(&self, report: &ProbeReport) -> io::Result<()> {
        let cached = CachedReport {
            key: self.key.clone(),
            report: report.clone(),
        };
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.path)?;
        file.write_all(&serde_json::to_vec(&cached)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(kvm_present: bool, kvm_usable: bool) -> ProbeReport {
        ProbeReport {
            kvm_present,
            kvm_usable,
            reason: "why".into(),
        }
    }

    #[test]
    fn choose_follows_the_hardware_and_gives_the_reason() {
        let choice = choose(None, &report(true, false));
        assert_eq!(
            choice.to_string(),
            "/dev/kvm: present, cannot run a guest (why) → qemu, tcg"
        );
        assert_eq!(choose(None, &report(true, true)).kind, VmmKind::Krun);
        assert_eq!(choose(None, &report(false, false)).kind, VmmKind::Qemu);
        let choice = choose(Some(&VmmKind::Qemu), &report(true, true));
        assert_eq!(
            (choice.kind, choice.acceleration),
            (VmmKind::Qemu, Acceleration::Kvm)
        );
    }

    #[test]
    fn cache_of_another_shim_returns_none() {
        let directory = tempfile::tempdir().unwrap();
        let (shim, path) = (
            directory.path().join("shim"),
            directory.path().join("cache"),
        );
        std::fs::write(&shim, "1").unwrap();
        let cache = ProbeCache::new(path.clone(), &shim).unwrap();
        assert_eq!(cache.get(), None);
        cache.put(&report(true, true)).unwrap();
        assert_eq!(cache.get(), Some(report(true, true)));
        std::fs::write(&shim, "another").unwrap();
        assert_eq!(ProbeCache::new(path, &shim).unwrap().get(), None);
    }
}
