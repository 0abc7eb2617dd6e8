//! Which VMM a node's pods get: [`probe`] asks the hardware through the shim, [`choose`] draws the conclusion, in
//! words.
//!
//! `/dev/kvm` may exist and still be unable to run a guest, so nothing is concluded from files. What the shim runs in
//! its throw-away VM is the shim's affair; the answer is kept until the next boot or another shim.

use crate::error::{Result, RuntimeError};
use crate::filesystem_layout::FilesystemLayout;
use crate::shim_controller::ShimProgram;
use crate::shim_controller::program::PROBE_LIMIT;
use boxlite_proto::probe::ProbeReport;
use boxlite_proto::vmm::{Acceleration, VmmKind};
use boxlite_sys::report::report;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// What was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmChoice {
    /// VMM of pods that don't ask for one.
    pub kind: VmmKind,
    /// How QEMU runs guest code.
    pub acceleration: Acceleration,
    /// Why, in one line.
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

/// An answer that was kept, and what it is an answer to.
#[derive(Serialize, Deserialize)]
struct Kept {
    key: String,
    report: ProbeReport,
}

/// Asks the shim whether KVM runs guest code here, at most once per boot and shim. A probe that itself fails counts
/// as "no", with its failure as the reason: QEMU's emulation needs nothing of the hardware.
///
/// # Errors
/// `Missing` where there is no shim to ask.
pub async fn probe(shim: &Path, layout: &FilesystemLayout) -> Result<ProbeReport> {
    let key = key(shim)?;
    let cache = layout.probe_cache();
    if let Some(kept) = read_kept(&cache)
        && kept.key == key
    {
        return Ok(kept.report);
    }
    let program = ShimProgram::new(shim, layout);
    let asked = program.role("probe", &[], PROBE_LIMIT).await;
    let parsed = asked.and_then(|output| {
        serde_json::from_slice::<ProbeReport>(&output).map_err(|error| RuntimeError::ShimProgram {
            action: "probe",
            reason: format!("its answer cannot be read: {error}"),
        })
    });
    match parsed {
        Ok(report) => {
            keep(
                &cache,
                &Kept {
                    key,
                    report: report.clone(),
                },
            );
            Ok(report)
        }
        Err(error) => Ok(ProbeReport {
            kvm_present: Path::new("/dev/kvm").exists(),
            kvm_usable: false,
            reason: format!("the probe failed: {}", report(&error)),
        }),
    }
}

/// The VMM for a configuration's wish (`None`: auto) and a probe's answer.
pub fn choose(wish: Option<&VmmKind>, report: &ProbeReport) -> VmmChoice {
    let found = format!(
        "/dev/kvm: {}",
        match (report.kvm_present, report.kvm_usable) {
            (_, true) => format!("runs guests ({})", report.reason),
            (true, false) => format!("present, cannot run a guest ({})", report.reason),
            (false, false) => "not there".to_owned(),
        }
    );
    let acceleration = match report.kvm_usable {
        true => Acceleration::Kvm,
        false => Acceleration::Tcg,
    };
    match wish {
        Some(kind) => VmmChoice {
            kind: kind.clone(),
            acceleration,
            reason: format!("{found}; the configuration says {kind}"),
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

/// What an answer depends on: the boot (kernel, modules, machine) and the shim.
fn key(shim: &Path) -> Result<String> {
    let missing = |source| RuntimeError::Missing {
        what: "the shim",
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

fn read_kept(path: &Path) -> Option<Kept> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Keeping is a convenience: without it the next start asks again.
fn keep(path: &Path, kept: &Kept) {
    let written = || -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(&serde_json::to_vec(kept)?)
    };
    if let Err(error) = written() {
        tracing::debug!(path = %path.display(), %error, "probe's answer is not kept");
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
    fn the_choice_follows_the_hardware_and_says_why() {
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
    async fn the_answer_is_kept_until_the_shim_changes() {
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
            !failed.kvm_usable && failed.reason.contains("cannot be read"),
            "{failed:?}"
        );
        std::fs::remove_file(&shim).unwrap();
        assert!(probe(&shim, &layout).await.is_err());
    }
}
