//! Selects the VMM of a node's pods: [`probe`] tests the hardware by means of the shim, and [`choose`] selects a VMM and
//! explains why.
//!
//! `/dev/kvm` may exist and still be unable to run a guest, so the shim boots a temporary VM. The result is cached until
//! the next boot or until the shim changes.

use crate::error::{Result, RuntimeError};
use crate::filesystem_layout::FilesystemLayout;
use crate::shim_controller::ShimProgram;
use crate::shim_controller::program::PROBE_TIMEOUT;
use boxlite_proto::probe::ProbeReport;
use boxlite_proto::vmm::{Acceleration, VmmKind};
use boxlite_sys::report::report;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// A selected VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmChoice {
    /// VMM of pods that do not select one.
    pub kind: VmmKind,
    /// QEMU's accelerator.
    pub acceleration: Acceleration,
    /// Reason, in one line.
    pub reason: String,
}

impl std::fmt::Display for VmmChoice {
    /// `/dev/kvm: present, cannot run a guest (…) → qemu, tcg`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} → {}", self.reason, self.kind)?;
        match (&self.kind, self.acceleration) {
            (VmmKind::Qemu, Acceleration::Tcg) => f.write_str(", tcg"),
            (VmmKind::Qemu, Acceleration::Kvm) => f.write_str(", kvm"),
            _ => Ok(()),
        }
    }
}

/// A cached report and its key.
#[derive(Serialize, Deserialize)]
struct CachedProbe {
    key: String,
    report: ProbeReport,
}

/// Tests by means of the shim whether KVM can run guests, at most once per boot and shim. A failed probe counts as "no"
/// with the failure as the reason, because QEMU's emulation needs no hardware support.
///
/// # Errors
/// `Missing` if the shim does not exist.
pub async fn probe(shim: &Path, layout: &FilesystemLayout) -> Result<ProbeReport> {
    let key = key(shim)?;
    let cache = layout.probe_cache();
    if let Some(cached) = read_cache(&cache)
        && cached.key == key
    {
        return Ok(cached.report);
    }
    let program = ShimProgram::new(shim, layout);
    let output = program.role("probe", &[], PROBE_TIMEOUT).await;
    let parsed = output.and_then(|output| {
        serde_json::from_slice::<ProbeReport>(&output).map_err(|error| RuntimeError::ShimProgram {
            action: "probe",
            reason: format!("invalid output: {error}"),
        })
    });
    match parsed {
        Ok(report) => {
            write_cache(
                &cache,
                &CachedProbe {
                    key,
                    report: report.clone(),
                },
            );
            Ok(report)
        }
        Err(error) => Ok(ProbeReport {
            kvm_present: Path::new("/dev/kvm").exists(),
            kvm_usable: false,
            reason: format!("failed to probe KVM: {}", report(&error)),
        }),
    }
}

/// Selects the VMM from the configuration (`None` for auto) and a probe's report.
pub fn choose(requested: Option<&VmmKind>, report: &ProbeReport) -> VmmChoice {
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
    match requested {
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

/// Returns the key of a report: the boot (kernel, modules, machine) and the shim.
fn key(shim: &Path) -> Result<String> {
    let missing = |source| RuntimeError::Missing {
        subject: "shim",
        path: shim.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(shim).map_err(missing)?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(missing)?;
    let device = std::fs::metadata("/dev/kvm")
        .map(|device| device.rdev())
        .unwrap_or(0);
    Ok(format!(
        "{} {} {} {device}",
        boot.trim(),
        metadata.mtime_nsec() ^ metadata.mtime(),
        metadata.len()
    ))
}

fn read_cache(path: &Path) -> Option<CachedProbe> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Writes the cache; a failure only makes the next start probe again.
fn write_cache(path: &Path, cached: &CachedProbe) {
    let written = || -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(&serde_json::to_vec(cached)?)
    };
    if let Err(error) = written() {
        tracing::debug!(path = %path.display(), %error, "failed to cache the probe's report");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn report(kvm_present: bool, kvm_usable: bool) -> ProbeReport {
        ProbeReport {
            kvm_present,
            kvm_usable,
            reason: "why".into(),
        }
    }

    #[test]
    fn choose_follows_hardware_and_explains() {
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

    #[tokio::test]
    async fn probe_caches_report_until_shim_changes() {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let layout =
            FilesystemLayout::new(&directory.path().join("r"), &directory.path().join("s"))
                .unwrap();
        layout.prepare().unwrap();
        let shim = directory.path().join("shim");
        let log = directory.path().join("log");
        let write = |answer: &str| {
            let script = format!("#!/bin/sh\necho x >> {}\necho '{answer}'\n", log.display());
            std::fs::write(&shim, script).unwrap();
            std::fs::set_permissions(&shim, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        write(r#"{"kvm_present":true,"kvm_usable":true,"reason":"ran"}"#);
        assert!(probe(&shim, &layout).await.unwrap().kvm_usable);
        assert!(probe(&shim, &layout).await.unwrap().kvm_usable);
        assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 1);
        write("no json at all, sorry");
        let failed = probe(&shim, &layout).await.unwrap();
        assert!(
            !failed.kvm_usable && failed.reason.contains("invalid output"),
            "{failed:?}"
        );
        std::fs::remove_file(&shim).unwrap();
        assert!(probe(&shim, &layout).await.is_err());
    }
}
