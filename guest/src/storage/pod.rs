//! The pod's own mounts: share, scratch disk, /dev/shm. Set up once by `Guest.Init`, removed by `Guest.Shutdown`.

use super::{StorageError, mount_error, unmount};
use boxlite_proto::boxlite::v1::FilesystemStats;
use boxlite_proto::names;
use boxlite_sys::mountinfo::mounts;
use nix::mount::{MntFlags, MsFlags, mount};
use std::fs;
use std::path::Path;

/// Default size of the pod's /dev/shm in bytes, that of other runtimes.
pub(super) const DEFAULT_SHM_BYTES: u64 = 64 << 20;
/// Directory in which the kernel lists block devices.
const BLOCK_DEVICES: &str = "/sys/block";

/// Mounts the virtiofs share with the tag `tag`; does nothing if it is empty.
pub(crate) fn mount_share(tag: &str) -> Result<(), StorageError> {
    if tag.is_empty() || is_mount_point(names::GUEST_SHARE) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    make_and_mount(tag, names::GUEST_SHARE, "virtiofs", flags, None)
}

/// Mounts the scratch disk, given by serial or path, or a tmpfs if `device` is empty.
pub(crate) fn mount_scratch(device: &str) -> Result<(), StorageError> {
    if is_mount_point(names::GUEST_SCRATCH) {
        return Ok(());
    }
    if device.is_empty() {
        return make_and_mount(
            "scratch",
            names::GUEST_SCRATCH,
            "tmpfs",
            MsFlags::MS_NOATIME,
            Some("mode=0700"),
        );
    }
    let path = find_disk(device)?;
    // Discard returns deleted blocks to the sparse image on the host.
    make_and_mount(
        &path,
        names::GUEST_SCRATCH,
        "ext4",
        MsFlags::MS_NOATIME,
        Some("discard"),
    )
}

/// Sets the size of the pod's /dev/shm in bytes.
pub(crate) fn resize_shm(bytes: u64) -> Result<(), StorageError> {
    let bytes = if bytes == 0 { DEFAULT_SHM_BYTES } else { bytes };
    let options = format!("mode=1777,size={bytes}");
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tmpfs"),
        "/dev/shm",
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )
    .map_err(|errno| mount_error("tmpfs", "size", "/dev/shm", errno))
}

/// Writes all dirty data and unmounts the scratch disk; remaining users are cut off.
pub(crate) fn release_scratch() -> Result<(), StorageError> {
    rustix::fs::sync();
    unmount(Path::new(names::GUEST_SCRATCH), MntFlags::empty())
}

/// Returns usage figures of the scratch disk, or `None` if none is mounted. Does not access the disk.
pub(crate) fn scratch_stats() -> Option<FilesystemStats> {
    if !is_mount_point(names::GUEST_SCRATCH) {
        return None;
    }
    let room = rustix::fs::statvfs(names::GUEST_SCRATCH).ok()?;
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    Some(FilesystemStats {
        device: origin_of(&table, names::GUEST_SCRATCH).unwrap_or_default(),
        capacity_bytes: room.f_blocks.saturating_mul(room.f_frsize),
        available_bytes: room.f_bavail.saturating_mul(room.f_frsize),
        inodes: room.f_files,
        inodes_free: room.f_ffree,
    })
}

/// Returns the source of the topmost mount at `target` in a mount table.
fn origin_of(table: &str, target: &str) -> Option<String> {
    let topmost = mounts(table).rfind(|mount| mount.point == Path::new(target))?;
    Some(topmost.source.to_owned())
}

/// Returns the guest's block devices for messages: `vda (serial)`.
pub(crate) fn devices() -> Vec<String> {
    disks()
        .into_iter()
        .map(|(name, serial)| {
            if serial.is_empty() {
                name
            } else {
                format!("{name} ({serial})")
            }
        })
        .collect()
}

/// Returns the device node of the disk with that serial, or the only writable one if the VMM reports no serials.
fn find_disk(device: &str) -> Result<String, StorageError> {
    if device.starts_with("/dev/") {
        return Ok(device.to_owned());
    }
    let disks = disks();
    let by_serial = disks.iter().find(|(_, serial)| serial == device);
    let nameless = || {
        disks
            .iter()
            .find(|(name, serial)| serial.is_empty() && is_writable(name))
    };
    match by_serial.or_else(nameless) {
        Some((name, _)) => Ok(format!("/dev/{name}")),
        None => Err(StorageError::NoDisk {
            serial: device.to_owned(),
            present: devices().join(", "),
        }),
    }
}

/// Returns virtio-blk disks by name, with their serials.
fn disks() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(BLOCK_DEVICES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("vd") {
            let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            found.push((name, serial.trim().to_owned()));
        }
    }
    found.sort();
    found
}

fn is_writable(name: &str) -> bool {
    let flag = Path::new(BLOCK_DEVICES).join(name).join("ro");
    fs::read_to_string(flag).is_ok_and(|text| text.trim() == "0")
}

/// Returns whether `path` is a mount point, by comparing device numbers with its parent.
fn is_mount_point(path: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
    match (fs::metadata(path), fs::metadata(parent)) {
        (Ok(own), Ok(above)) => own.dev() != above.dev(),
        _ => false,
    }
}

fn make_and_mount(
    origin: &str,
    target: &str,
    fstype: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), StorageError> {
    fs::create_dir_all(target).map_err(StorageError::path("create directory", target))?;
    mount(Some(origin), target, Some(fstype), flags, options)
        .map_err(|errno| mount_error(fstype, origin, target, errno))
}

#[cfg(test)]
mod tests {
    use super::origin_of;

    #[test]
    fn origin_of_returns_the_last_mount() {
        let table = "1 0 254:0 / / ro - erofs /dev/vda ro\n2 1 0:9 / /x rw - tmpfs tmpfs rw\n\
            3 2 254:16 / /x rw - ext4 /dev/vdb rw\n";
        assert_eq!(origin_of(table, "/x").as_deref(), Some("/dev/vdb"));
        assert_eq!(origin_of(table, "/y"), None);
    }
}
