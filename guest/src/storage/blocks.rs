//! [`Blocks`]: block devices of the host in one container. The host serves each device as a file of the share; a loop
//! device turns it into a block device, and a device node of this container is bind-mounted at the requested path.
//!
//! A bind mount is used instead of a node in the container's /dev, because the path may be anywhere and nodes cannot
//! be created in a user namespace.

use super::StorageError;
use super::layers::below_share;
use super::loops::{Loop, MAJOR};
use boxlite_proto::boxlite::v1::BlockDevice;
use boxlite_sys::sync::Mutex;
use oci_spec::runtime::{
    LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Mount, MountBuilder, Spec,
};
use rustix::fs::{CWD, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Directory of the nodes; in the VM's /dev, because the other filesystems do not allow devices.
pub(crate) const NODES: &str = "/dev/boxlite";

/// Block devices of one container.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    nodes: Vec<PathBuf>,
    /// Released when the container is removed, even if another reference to `self` exists.
    loops: Mutex<Vec<Arc<Loop>>>,
}

impl Blocks {
    /// Creates the devices of the container `id`, and adds their binds and rules to `spec`. `outside` maps a user or
    /// group of the container to the VM's ID. After an error, `self` holds the created parts, for [`Self::take_down`].
    /// Blocks.
    ///
    /// # Errors
    /// If a path is invalid or a system call fails.
    pub(crate) fn make(
        &mut self,
        id: &str,
        requests: &[BlockDevice],
        outside: impl Fn(u32) -> u32,
        spec: &mut Spec,
    ) -> Result<(), StorageError> {
        let (mut binds, mut rules) = (Vec::new(), Vec::new());
        for (index, device) in requests.iter().enumerate() {
            check_plain_path(&device.path)?;
            let file = below_share(&device.file)?;
            let read_only = !device.access.contains('w');
            let held = Loop::hold(&file, read_only, device.block_size)?;
            let minor = held.minor;
            let mut loops = self.loops.lock();
            loops.push(held);
            drop(loops);
            let node = Path::new(NODES).join(format!("{id}.{index}"));
            self.nodes.push(node.clone());
            make_node(&node, minor, device, &outside)
                .map_err(StorageError::path("create device node", &node))?;
            binds.push(bind(&node, &device.path)?);
            rules.push(rule(minor, &device.access)?);
        }
        if !requests.is_empty() {
            add(spec, binds, rules);
        }
        Ok(())
    }

    /// Removes the nodes and releases the loop devices. Idempotent.
    pub(crate) fn take_down(&self) {
        for node in &self.nodes {
            // Only the agent writes to this directory, so an error means the node does not exist.
            let _ = fs::remove_file(node);
        }
        let mut loops = self.loops.lock();
        loops.clear();
    }
}

/// Checks that a path is absolute and consists of normal components.
fn check_plain_path(path: &str) -> Result<(), StorageError> {
    let mut parts = Path::new(path).components();
    let root = parts.next() == Some(Component::RootDir);
    let mut names = parts.peekable();
    let any = names.peek().is_some();
    if root && any && names.all(|part| matches!(part, Component::Normal(_))) {
        return Ok(());
    }
    Err(StorageError::Escape {
        path: path.to_owned(),
        base: "/",
    })
}

fn make_node(
    node: &Path,
    minor: u32,
    device: &BlockDevice,
    outside: &impl Fn(u32) -> u32,
) -> std::io::Result<()> {
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(NODES)?;
    let mode = Mode::from_raw_mode(device.mode & 0o777);
    mknodat(
        CWD,
        node,
        FileType::BlockDevice,
        mode,
        makedev(MAJOR, minor),
    )?;
    // The umask was applied to the mode.
    chmodat(CWD, node, mode, rustix::fs::AtFlags::empty())?;
    let uid = Uid::from_raw(outside(device.uid));
    let gid = Gid::from_raw(outside(device.gid));
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    Ok(chownat(CWD, node, Some(uid), Some(gid), flags)?)
}

fn built<T, E: std::error::Error + Send + Sync + 'static>(
    made: Result<T, E>,
    path: &Path,
) -> Result<T, StorageError> {
    made.map_err(|error| {
        StorageError::path("build the mount of", path)(std::io::Error::other(error))
    })
}

fn bind(node: &Path, target: &str) -> Result<Mount, StorageError> {
    let options = ["bind", "rprivate", "rw", "nosuid", "noexec"].map(str::to_owned);
    let mount = MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(node)
        .options(options)
        .build();
    built(mount, node)
}

fn rule(minor: u32, access: &str) -> Result<LinuxDeviceCgroup, StorageError> {
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(i64::from(MAJOR))
        .minor(i64::from(minor))
        .access(access)
        .build();
    built(rule, Path::new(NODES))
}

fn add(spec: &mut Spec, binds: Vec<Mount>, rules: Vec<LinuxDeviceCgroup>) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.extend(binds);
    spec.set_mounts(Some(mounts));
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut all = resources.devices().clone().unwrap_or_default();
    // An empty list allows all devices; a single rule would forbid all others.
    if !all.is_empty() {
        all.extend(rules);
    }
    resources.set_devices(Some(all));
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn requests(file: &str, path: &str) -> BlockDevice {
        BlockDevice {
            file: file.into(),
            path: path.into(),
            access: "rw".into(),
            block_size: 512,
            mode: 0o660,
            ..Default::default()
        }
    }

    #[test]
    fn make_invalid_paths_returns_escape() {
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2"})).unwrap();
        for (file, path) in [
            ("../etc/passwd", "/x"),
            ("/etc/passwd", "/x"),
            ("b/1", "x"),
            ("b/1", "/"),
            ("b/1", "/a/../b"),
            ("b/1", ""),
        ] {
            let mut blocks = Blocks::default();
            let made = blocks.make("c", &[requests(file, path)], |id| id, &mut spec);
            let error = made.unwrap_err();
            assert!(matches!(error, StorageError::Escape { .. }), "{error}");
            assert!(blocks.nodes.is_empty());
        }
    }

    #[test]
    fn add_appends_binds_and_rules() {
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2",
            "mounts": [{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
            "linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}}}))
        .unwrap();
        let node = Path::new("/dev/boxlite/c.0");
        add(
            &mut spec,
            vec![bind(node, "/dev/xvda").unwrap()],
            vec![rule(3, "r").unwrap()],
        );
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[1].destination(), Path::new("/dev/xvda"));
        assert_eq!(mounts[1].source().as_deref(), Some(node));
        let linux = spec.linux().as_ref().unwrap();
        let rules = linux.resources().as_ref().unwrap().devices();
        let last = rules.as_ref().unwrap().last().unwrap();
        assert_eq!((last.major(), last.minor()), (Some(7), Some(3)));
        assert_eq!(last.access().as_deref(), Some("r"));
    }
}
