//! Which VMM runs pods: the probe's answer, the configuration's wish, and the sentence that says why.
//!
//! Runs no guest code itself: the runtime asks the shim, whose throw-away VM does.

use crate::config::Config;
use boxlite_runtime::RuntimeError;
use boxlite_runtime::filesystem_layout::FilesystemLayout;
use boxlite_runtime::vmm_probe::{self, VmmChoice};

/// Probes (at most once per boot and shim) and chooses. Makes the two directories if need be: the answer is kept there.
///
/// # Errors
/// Of the directories, or a shim that is not there.
pub async fn choose(config: &Config) -> Result<VmmChoice, RuntimeError> {
    let layout = FilesystemLayout::new(&config.root, &config.state)?;
    layout.prepare()?;
    let report = vmm_probe::probe(&config.paths.shim, &layout).await?;
    let mut choice = vmm_probe::choose(config.vmm.as_ref(), &report);
    if let Some(wish) = config.acceleration {
        choice.acceleration = wish;
    }
    Ok(choice)
}
