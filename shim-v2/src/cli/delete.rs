//! The action `delete`: cleans up after a shim that crashed or was killed.
//!
//! Runs in the bundle. The kernel has already killed the VM with its shim (PDEATHSIG) and removed the mounts of its mount
//! namespace. This action kills remaining processes by recorded pid and start time, removes taps, cgroups, sockets and mount
//! exports, and prints the DeleteResponse for containerd.

use super::{CliError, write_stdout};
use crate::flags::Flags;
use crate::shim_state::{ADDRESS_FILE, STATE_FILE, ShimState};
use crate::{cgroup, net, time};
use boxlite_sys::report::Report;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Timeout for a killed process to exit. A QEMU with much memory needs a while to release it.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Exit status of a killed shim: 128 + SIGKILL.
const KILLED_EXIT_STATUS: u32 = 137;

/// Runs the action.
///
/// # Errors
/// The response cannot be written. Failures of single steps are reported on standard error and do not stop the others.
pub fn delete(flags: &Flags) -> Result<(), CliError> {
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().map_err(CliError::io("find", "the bundle"))?
    } else {
        PathBuf::from(&flags.bundle)
    };
    let pid = clean(&bundle);
    let response = DeleteResponse {
        pid,
        exit_status: KILLED_EXIT_STATUS,
        exited_at: MessageField::some(time::now()),
        ..Default::default()
    };
    write_stdout(&response.write_to_bytes().map_err(CliError::Encode)?)
}

/// Cleans up a bundle on a best-effort basis and returns the pid of its VM, 0 if unknown.
pub fn clean(bundle: &Path) -> u32 {
    let Some(state) = ShimState::load(bundle) else {
        // Without a state file the shim never started, or the container belongs to another sandbox's shim.
        let _ = std::fs::remove_file(bundle.join(ADDRESS_FILE));
        return 0;
    };
    for process in [&state.shim, &state.vmm].into_iter().flatten() {
        if let Err(error) = process.kill(KILL_TIMEOUT) {
            eprintln!(
                "containerd-shim-boxlite-v2: failed to kill process {}: {error}",
                process.pid
            );
        }
    }
    if !state.exports.is_empty() {
        crate::mount_export::host_mounter::sweep(&state.exports);
    }
    if let Some(netns) = &state.netns
        && let Err(error) = net::detach(netns)
    {
        eprintln!("containerd-shim-boxlite-v2: {}", Report(&error));
    }
    cgroup::remove(&state.cgroups, KILL_TIMEOUT);
    if !state.socket.as_os_str().is_empty() {
        let _ = std::fs::remove_file(&state.socket);
    }
    let _ = std::fs::remove_dir_all(bundle.join("vm"));
    if let Some(scratch) = &state.scratch {
        let _ = std::fs::remove_file(scratch);
    }
    for name in ["network.json", ADDRESS_FILE, STATE_FILE] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
    state.vmm.map_or(0, |vmm| vmm.pid.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_removes_the_recorded_scratch_disk() {
        let dir = tempfile::tempdir().expect("tempdir");
        let disk = dir.path().join("scratch/x.img");
        std::fs::create_dir(dir.path().join("scratch")).expect("directory");
        std::fs::write(&disk, "x").expect("disk");
        let state = ShimState {
            scratch: Some(disk.clone()),
            ..ShimState::default()
        };
        state.store(dir.path()).expect("stored");
        clean(dir.path());
        assert!(!disk.exists());
    }
}
