//! What PID 1 does before anything else: a writable root, the kernel's file systems, the cgroup tree.
//!
//! Single-threaded, called once from `main`. The pod's own things (share, scratch disk, network) come later, from
//! `Guest.Init`; nothing here knows the pod.
//!
//! Under QEMU the root is a read-only EROFS image, under libkrun a virtual virtiofs root that holds `/init` and cannot
//! take a directory. Both are covered alike: a tmpfs is mounted on top of `/` and becomes the root; the old root stays
//! beneath it because the running binary is mapped from there.

pub mod console;
pub mod memory;
pub mod power;
pub mod reaper;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::fs;
use std::path::Path;

/// A step of the boot that failed; the VM cannot be used and is powered off.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The tmpfs could not become the root.
    #[error("root switch: {step}")]
    Root {
        /// The call that failed.
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// A directory below the new root could not be made.
    #[error("mkdir {path}")]
    Directory {
        path: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// A kernel file system could not be mounted.
    #[error("mount {fstype} on {path}")]
    Mount {
        fstype: &'static str,
        path: &'static str,
        #[source]
        source: nix::Error,
    },
    /// The cgroup tree could not be laid out.
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::CgroupError),
}

/// Size of the root tmpfs: mount points, sockets and specs of at most some hundred containers.
const ROOT_OPTIONS: [(&str, &str); 2] = [("mode", "0755"), ("size", "32m")];

/// One of the kernel's file systems.
struct KernelMount {
    fstype: &'static str,
    path: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const HARMLESS: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// In this order: a mount's directory may lie in the one before. `favordynmods`: every exec moves a process into a cgroup,
/// and without it each move waits for an RCU grace period.
const KERNEL_MOUNTS: [KernelMount; 6] = [
    KernelMount {
        fstype: "proc",
        path: "/proc",
        flags: HARMLESS,
        data: None,
    },
    KernelMount {
        fstype: "sysfs",
        path: "/sys",
        flags: HARMLESS,
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
    // Guest.Init gives it the pod's size.
    KernelMount {
        fstype: "tmpfs",
        path: "/dev/shm",
        flags: HARMLESS,
        data: Some("mode=1777,size=64m"),
    },
    KernelMount {
        fstype: "cgroup2",
        path: "/sys/fs/cgroup",
        flags: HARMLESS,
        data: Some("nsdelegate,favordynmods"),
    },
];

/// Directories of the new root beside those that [`KERNEL_MOUNTS`] are on.
const DIRECTORIES: [&str; 5] = ["/run", "/run/boxlite", "/tmp", "/etc", "/root"];

/// Open files of the agent: those that the host has open in mounts of containers are among them. The kernel begins with 1024.
const FILE_LIMIT: u64 = 64 << 10;

/// Raises the agent's own limit. After the spawner was forked: containers have what they ask for.
pub fn allow_many_files() {
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, FILE_LIMIT, FILE_LIMIT) {
        tracing::warn!(%error, "the limit of open files stays");
    }
}

/// Makes the VM habitable: root, mounts, cgroups.
///
/// # Errors
/// The first step that failed; what was done before stays, the caller powers the VM off.
pub fn prepare() -> Result<(), BootError> {
    switch_root()?;
    for path in DIRECTORIES {
        fs::create_dir_all(path).map_err(|source| BootError::Directory { path, source })?;
    }
    for entry in &KERNEL_MOUNTS {
        // sysfs has its own directory for cgroups and takes no other.
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
    // A kernel that has met a bug of its own leaves processes stuck: better no VM, which the host notices, than half a one.
    let _ = fs::write("/proc/sys/kernel/panic_on_oops", "1");
    let _ = fs::write("/proc/sys/kernel/panic", "-1");
    // A VM has one or two CPUs, where grace periods cost nothing to hurry; unmounts and ended namespaces wait for them.
    let _ = fs::write("/sys/kernel/rcu_expedited", "1");
    // The agent must outlive every container when memory runs out. -1000 would keep it from being chosen even when it
    // alone is to blame.
    let _ = fs::write("/proc/self/oom_score_adj", "-999");
    crate::cgroup::lay_out()?;
    Ok(())
}

/// Mounts a tmpfs over `/` and moves this process into it. The mount calls of the new API need no directory to mount on.
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

/// POSIX message queues, where the kernel has them (libkrunfw's may not). Containers share the pod's.
fn mount_mqueue() {
    if fs::create_dir_all("/dev/mqueue").is_ok() {
        let _ = mount(
            Some("mqueue"),
            "/dev/mqueue",
            Some("mqueue"),
            HARMLESS,
            None::<&str>,
        );
    }
}

/// devtmpfs's own `/dev/ptmx` opens the kernel's first devpts; the agent's is the one mounted here.
fn link_ptmx() {
    let _ = fs::remove_file("/dev/ptmx");
    let _ = std::os::unix::fs::symlink("pts/ptmx", "/dev/ptmx");
}
