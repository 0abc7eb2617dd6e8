//! Step 3: the guest's root, a virtual file system that contains only the agent, and the console.
//!
//! libkrun starts `/init.krun`, which is the agent itself: neither libkrun's init nor a root on disk is used. Its contents are
//! the file's page cache, mapped read-only and shared by all pods.

use super::ffi::Context;
use crate::vmm::step::{StepExt, require};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Tag of the guest's root file system.
const ROOT_TAG: &str = "/dev/root";
/// Mount points needed in the read-only root by the agent and, for /dev, by the kernel.
const DIRECTORIES: [&str; 6] = ["dev", "proc", "sys", "run", "tmp", "etc"];

pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    require("the agent", &spec.installation.guest)?;
    let agent = map_file(&spec.installation.guest)?;
    context.disable_implicit_init()?;
    context.add_virtiofs(ROOT_TAG, None, 0, false)?;
    for name in DIRECTORIES {
        context.add_overlay_dir(ROOT_TAG, name, 0o755)?;
    }
    context.add_overlay_file(ROOT_TAG, "init.krun", agent, 0o755)?;
    if spec.debug_console {
        // libkrun always passes "quiet"; this overrides it.
        context.add_kernel_word("ignore_loglevel")?;
    }
    // A pipe to the shim, which bounds the log.
    context.set_console_output("/proc/self/fd/1")
}

/// Maps a file for the rest of the process's lifetime.
///
/// JUSTIFICATION for unsafe: reading the file would give each pod its own copy of the agent.
fn map_file(path: &Path) -> BoxliteResult<&'static [u8]> {
    let step = || format!("map {}", path.display());
    let file = File::open(path).step(step())?;
    let bytes = usize::try_from(file.metadata().step(step())?.len()).step(step())?;
    if bytes == 0 {
        return Err(std::io::Error::other("empty file")).step(step());
    }
    // SAFETY: a new mapping at an address chosen by the kernel replaces nothing and is never unmapped. Upgrades replace the
    // agent by rename and do not truncate it in place.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error()).step(step());
    }
    // SAFETY: the mapping has `bytes` readable bytes and lives as long as the process.
    Ok(unsafe { std::slice::from_raw_parts(start.cast::<u8>(), bytes) })
}
