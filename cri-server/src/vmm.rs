//! Choice of the VMM: the configured one, or the best one that works on this machine, with the reason.
//!
//! Runs no guest code itself: the runtime makes the shim run some in a short-lived VM.

use crate::config::Config;
use boxlite_runtime::RuntimeError;
use boxlite_runtime::filesystem_layout::FilesystemLayout;
use boxlite_runtime::vmm_probe::{self, VmmChoice};

/// Probes (at most once per boot and shim) and chooses. Creates root and state if needed: the result is cached there.
///
/// # Errors
/// If a directory cannot be created or the shim is missing.
pub(crate) async fn choose(config: &Config) -> Result<VmmChoice, RuntimeError> {
    let layout = FilesystemLayout::new(&config.root, &config.state)?;
    layout.prepare()?;
    let report = vmm_probe::probe(&config.shim, &layout).await?;
    let mut choice = vmm_probe::choose(config.vmm.kind.as_ref(), &report);
    if let Some(acceleration) = config.vmm.acceleration {
        choice.acceleration = acceleration;
    }
    Ok(choice)
}
