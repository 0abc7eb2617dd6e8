//! [`probe`]: tests by means of the shim whether KVM runs guest code on this node. boxlite-config selects the VMM.

use crate::error::{Result, RuntimeError};
use crate::filesystem_layout::FilesystemLayout;
use crate::shim_controller::ShimProgram;
use crate::shim_controller::program::PROBE_TIMEOUT;
use boxlite_config::vmm_probe::{ProbeCache, failed_probe};
pub use boxlite_config::vmm_probe::{VmmChoice, choose};
use boxlite_proto::probe::ProbeReport;
use boxlite_sys::report::Report;
use std::path::Path;

/// Tests by means of the shim whether KVM can run guests, at most once per boot and shim. A failed probe counts as "no"
/// with the failure as the reason, because QEMU's emulation needs no hardware support.
///
/// # Errors
/// `Missing` if the shim does not exist.
pub async fn probe(shim: &Path, layout: &FilesystemLayout) -> Result<ProbeReport> {
    let cache = ProbeCache::new(layout.probe_cache(), shim);
    let cache = cache.map_err(|source| RuntimeError::Missing {
        subject: "shim",
        path: shim.to_owned(),
        source,
    })?;
    if let Some(report) = cache.get() {
        return Ok(report);
    }
    let program = ShimProgram::new(shim, layout);
    let output = program.role("probe", &[], PROBE_TIMEOUT).await;
    let report = output.and_then(|output| {
        serde_json::from_slice::<ProbeReport>(&output).map_err(|error| RuntimeError::ShimProgram {
            action: "probe",
            reason: format!("invalid output: {error}"),
        })
    });
    match report {
        Ok(report) => {
            if let Err(error) = cache.put(&report) {
                tracing::debug!(%error, "failed to cache the probe's report");
            }
            Ok(report)
        }
        Err(error) => Ok(failed_probe(Report(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

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
