//! The action `delete`: cleans up what a shim left that crashed or was killed.
//!
//! Runs in the bundle. The kernel has already ended the VM with its shim (PDEATHSIG) and taken the mounts with its mount
//! namespace. This kills what may be left by recorded pid and start time, takes taps, cgroups, sockets and the host's mounts
//! of the guest's mounts away, and prints the DeleteResponse that containerd reads.

use super::{CliError, write_stdout};
use crate::record::{ADDRESS_FILE, RECORD_FILE, Record};
use crate::{cgroup, net};
use boxlite_sys::report::Report;
use containerd_shim::Flags;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How long a killed process may take to go. A QEMU with much memory needs a while to give it back.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Exit status of what was killed: 128 + SIGKILL.
const KILLED: u32 = 137;

/// Runs the action.
///
/// # Errors
/// When the answer cannot be written. Failures of single steps are reported on standard error and do not stop the others.
pub fn delete(flags: &Flags) -> Result<(), CliError> {
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().map_err(CliError::io("find", "the bundle"))?
    } else {
        PathBuf::from(&flags.bundle)
    };
    let pid = clean(&bundle);
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(now.subsec_nanos()).unwrap_or(0),
            ..Default::default()
        }),
        ..Default::default()
    };
    write_stdout(&response.write_to_bytes().map_err(CliError::Encode)?)
}

/// Cleans a bundle, as far as it goes, and gives the pid its VM had (0: none known).
pub fn clean(bundle: &Path) -> u32 {
    let Some(record) = Record::load(bundle) else {
        // No record: never started, or the container of a grouped shim, which belongs to that shim.
        let _ = std::fs::remove_file(bundle.join(ADDRESS_FILE));
        return 0;
    };
    for process in [&record.shim, &record.vmm].into_iter().flatten() {
        if let Err(error) = process.kill(KILL_LIMIT) {
            eprintln!("containerd-shim-boxlite-v2: kill {}: {error}", process.pid);
        }
    }
    if !record.shown.is_empty() {
        crate::mount_export::host_mounter::sweep(&record.shown);
    }
    if let Some(netns) = &record.netns
        && let Err(error) = net::detach(netns)
    {
        eprintln!("containerd-shim-boxlite-v2: {}", Report(&error));
    }
    cgroup::remove(&record.cgroups, KILL_LIMIT);
    if !record.socket.as_os_str().is_empty() {
        let _ = std::fs::remove_file(&record.socket);
    }
    let _ = std::fs::remove_dir_all(bundle.join("vm"));
    if let Some(scratch) = &record.scratch {
        let _ = std::fs::remove_file(scratch);
    }
    for name in ["network.json", ADDRESS_FILE, RECORD_FILE] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
    record.vmm.map_or(0, |vmm| vmm.pid.unsigned_abs())
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
        let record = Record {
            scratch: Some(disk.clone()),
            ..Record::default()
        };
        record.store(dir.path()).expect("stored");
        clean(dir.path());
        assert!(!disk.exists());
    }
}
