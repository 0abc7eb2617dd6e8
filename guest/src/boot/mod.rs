//! Early setup by PID 1: a writable root, the kernel's filesystems, the cgroup tree.
//!
//! Single-threaded, called once from `main`. The pod's share, scratch disk and network are set up later, by
//! `Guest.Init`.
//!
//! Under QEMU the root is a read-only EROFS image, under libkrun a virtual virtiofs root that holds `/init` and does
//! not support mkdir. Both are handled alike: a tmpfs is mounted on top of `/` and becomes the root; the old root
//! remains beneath it because the running binary is mapped from there.

pub(crate) mod console;
pub(crate) mod memory;
pub(crate) mod power;
pub(crate) mod reaper;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::fs;
use std::path::Path;

/// A failed boot step; the VM cannot be used and is powered off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The tmpfs could not become the root.
    #[error("failed to switch the root: {step}")]
    Root {
        /// The call that failed.
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// A directory below the new root could not be created.
    #[error("failed to create directory {path}")]
    Directory {
        path: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// A kernel filesystem could not be mounted.
    #[error("failed to mount {fstype} on {path}")]
    Mount {
        fstype: &'static str,
        path: &'static str,
        #[source]
        source: nix::Error,
    },
    /// The cgroup tree could not be created.
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::error::CgroupError),
}

/// Options of the root tmpfs. It holds mount points, sockets and specs of at most a few hundred containers.
const ROOT_OPTIONS: [(&str, &str); 2] = [("mode", "0755"), ("size", "32m")];

/// A filesystem of the kernel.
struct KernelMount {
    fstype: &'static str,
    path: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const NO_PRIVILEGES: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Kernel filesystems in mount order: a mount point may be inside an earlier mount. `favordynmods` is set because
/// every exec moves a process into a cgroup, and each move would otherwise wait for an RCU grace period.
const KERNEL_MOUNTS: [KernelMount; 6] = [
    KernelMount {
        fstype: "proc",
        path: "/proc",
        flags: NO_PRIVILEGES,
        data: None,
    },
    KernelMount {
        fstype: "sysfs",
        path: "/sys",
        flags: NO_PRIVILEGES,
        data: None,
    },
    KernelMount {
        fstype: "devtmpfs",
        path: "/dev",
        flags: MsFlags::MS_NOSUID,
        data: Some("mode=0755"),
    },
    KernelMount {
        fstype: "devpts",
        path: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: Some("newinstance,gid=5,mode=0620,ptmxmode=0666"),
    },
    // Resized to the pod's size by Guest.Init.
    KernelMount {
        fstype: "tmpfs",
        path: "/dev/shm",
        flags: NO_PRIVILEGES,
        data: Some("mode=1777,size=64m"),
    },
    KernelMount {
        fstype: "cgroup2",
        path: "/sys/fs/cgroup",
        flags: NO_PRIVILEGES,
        data: Some("nsdelegate,favordynmods"),
    },
];

/// Directories of the new root other than mount points of [`KERNEL_MOUNTS`].
const DIRECTORIES: [&str; 5] = ["/run", "/run/boxlite", "/tmp", "/etc", "/root"];

/// Maximum number of open files of the agent, which include those the host has open in exported mounts. The kernel's
/// default is 1024.
const MAX_OPEN_FILES: u64 = 64 << 10;

/// Raises the agent's own limit. Called after the spawner was forked, so that containers do not inherit it.
pub(crate) fn allow_many_files() {
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES) {
        tracing::warn!(%error, "failed to raise the limit of open files");
    }
}

/// Sets up the VM: root, mounts, cgroups.
///
/// # Errors
/// If a step fails. Earlier steps are not undone; the caller powers the VM off.
pub(crate) fn prepare() -> Result<(), BootError> {
    switch_root()?;
    for path in DIRECTORIES {
        fs::create_dir_all(path).map_err(|source| BootError::Directory { path, source })?;
    }
    for entry in &KERNEL_MOUNTS {
        // sysfs already has a directory for cgroups and does not allow creating others.
        if !Path::new(entry.path).is_dir() {
            fs::create_dir_all(entry.path).map_err(|source| BootError::Directory {
                path: entry.path,
                source,
            })?;
        }
        mount(
            Some(entry.fstype),
            entry.path,
            Some(entry.fstype),
            entry.flags,
            entry.data,
        )
        .map_err(|source| BootError::Mount {
            fstype: entry.fstype,
            path: entry.path,
            source,
        })?;
    }
    mount_mqueue();
    link_ptmx();
    // After an oops, processes hang. A VM that panics is noticed by the host; one that half works is not.
    let _ = fs::write("/proc/sys/kernel/panic_on_oops", "1");
    let _ = fs::write("/proc/sys/kernel/panic", "-1");
    // A VM has one or two CPUs, where expediting grace periods is cheap; unmounts and exiting namespaces wait for
    // them.
    let _ = fs::write("/sys/kernel/rcu_expedited", "1");
    // The agent must survive every container when memory runs out. -1000 would exempt it even if it were the cause.
    let _ = fs::write("/proc/self/oom_score_adj", "-999");
    crate::cgroup::pod::create_tree()?;
    Ok(())
}

/// Mounts a tmpfs over `/` and moves this process into it. The new mount API does not need a directory to mount on.
fn switch_root() -> Result<(), BootError> {
    let failed = |step| {
        move |errno: rustix::io::Errno| BootError::Root {
            step,
            source: errno.into(),
        }
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen tmpfs"))?;
    for (key, value) in ROOT_OPTIONS {
        fsconfig_set_string(&context, key, value).map_err(failed("fsconfig"))?;
    }
    fsconfig_create(&context).map_err(failed("fsconfig create"))?;
    let tree = fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .map_err(failed("fsmount"))?;
    move_mount(
        &tree,
        "",
        rustix::fs::CWD,
        "/",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(failed("move_mount"))?;
    rustix::process::fchdir(&tree).map_err(failed("fchdir"))?;
    rustix::process::chroot(".").map_err(failed("chroot"))?;
    rustix::process::chdir("/").map_err(failed("chdir"))?;
    Ok(())
}

/// Mounts POSIX message queues if the kernel supports them (libkrunfw's may not). Containers share the pod's.
fn mount_mqueue() {
    if fs::create_dir_all("/dev/mqueue").is_ok() {
        let _ = mount(
            Some("mqueue"),
            "/dev/mqueue",
            Some("mqueue"),
            NO_PRIVILEGES,
            None::<&str>,
        );
    }
}

/// Replaces devtmpfs's `/dev/ptmx`, which opens the kernel's initial devpts, by one that opens the agent's.
fn link_ptmx() {
    let _ = fs::remove_file("/dev/ptmx");
    let _ = std::os::unix::fs::symlink("pts/ptmx", "/dev/ptmx");
}
