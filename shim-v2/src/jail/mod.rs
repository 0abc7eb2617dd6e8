//! The vmm child's jail: its own mount, IPC and UTS namespaces, a root with only the listed host files, few capabilities.
//!
//! The PID namespace is created by the supervisor before the fork; the network namespace is entered by [`enter_netns`] before
//! the VMM opens its tap. Called once, in a single-threaded process.
//!
//! ```text
//! enter_netns → Vmm::create (sees the host) → close: namespaces → root → pivot_root → capabilities, no_new_privs, seccomp
//! ```

mod host_files;
mod privileges;
mod root;
mod seccomp;

pub use host_files::HostFiles;
pub use privileges::{drop_all_capabilities, forbid_core_dumps, raise_file_limit};
pub use seccomp::with_vsock_filter;

use nix::sched::{CloneFlags, setns, unshare};
use std::path::{Path, PathBuf};

/// Error while setting up the jail. The VM is not started then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call without a path failed.
    #[error("failed to {step} for the jail")]
    System {
        step: &'static str,
        #[source]
        source: nix::Error,
    },
    /// A system call on a host path failed.
    #[error("failed to {step} {path} for the jail")]
    Path {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Capabilities could not be changed.
    #[error("failed to reduce capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// The system call filter could not be installed.
    #[error("failed to install the system call filter")]
    Seccomp(#[source] seccompiler::Error),
}

fn at_path<E: Into<std::io::Error>>(
    step: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Path {
        step,
        path: path.to_owned(),
        source: source.into(),
    }
}

fn system(step: &'static str) -> impl FnOnce(nix::Error) -> JailError {
    move |source| JailError::System { step, source }
}

/// Moves the calling thread, in a single-threaded process, into a network namespace.
///
/// # Errors
/// The path is not a network namespace, or the process lacks the privilege.
pub fn enter_netns(path: &Path) -> Result<(), JailError> {
    let file = std::fs::File::open(path).map_err(at_path("open network namespace", path))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(at_path("enter network namespace", path))
}

/// Enters the jail: afterwards this process sees `files` under their own names and nothing else of the host, its working
/// directory is `files.work_dir`, it holds only the capabilities of a file
/// server, and a system call filter is in force.
///
/// # Errors
/// The failed step. The process is in an undefined state then and must exit.
pub fn close(files: &HostFiles) -> Result<(), JailError> {
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).map_err(system("unshare namespaces"))?;
    root::enter(files)?;
    privileges::reduce()?;
    seccomp::install()
}
